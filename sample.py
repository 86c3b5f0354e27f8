"""
Generates images with a trained GPT: a picture grid with a row for each class, or one file an image.

$ python sample.py                                              # out/samples.png, after `python train_gpt.py`
$ python sample.py --classes 0,3,8 --n 24 --cfg-scale 3 --out grid.png
$ torchrun --nproc-per-node=8 sample.py --count 50000 --npz samples.npz             # what ADM's evaluator reads
"""

import json
import math
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from fqgan import FQGAN, FQGANConfig, Folder, GPT, GPTConfig, UserError, build, load_checkpoint, load_tokenizer, require, sampling, to_uint8
from train_tokenizer import Parser, cli, has_fast_bf16, replacing, save_grid, start, write_json


def numbers(kind):
    """A flag's value: one number, or one for each code of a position."""
    def read(text):
        values = [kind(n) for n in text.split(",")]
        return values[0] if len(values) == 1 else values
    read.__name__ = f"{kind.__name__}, or several with commas between:"  # argparse puts it into "invalid ... value"
    return read


def parse_knobs(parser):
    """The command line of a script that samples: the parser's own flags, --n among them, and those of sampling."""
    add = parser.add_argument
    add("--cfg-scale", type=numbers(float), default=1.5, help="guidance; 1 for none (default: %(default)s)")
    add("--temperature", type=numbers(float), default=1.0, help="below 1 likelier codes, 0 the likeliest (default: %(default)s)")
    add("--top-k", type=numbers(int), default=0, help="sample from the k likeliest codes only; 0: from all (default: %(default)s)")
    add("--top-p", type=numbers(float), default=1.0, help="sample from the likeliest codes that make up p (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed, other samples (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="cuda, mps, cpu, ...; auto: the best there is (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of sampling; auto: bfloat16 where the hardware has it (default: %(default)s)")
    args = parser.parse_args()
    require((args.n is None or args.n >= 1) and args.batch_size >= 1, "--n and --batch-size must be at least 1")
    return args


def flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--gpt", default="out/gpt.pt", help="the GPT's checkpoint (default: %(default)s)")
    add("--tokenizer", help="a tokenizer's checkpoint in place of the one that the GPT's holds")
    add("--classes", help="class numbers or names, with commas between (default: all; in a grid the first 10)")
    add("--n", "--count", type=int, help="images in all, dealt to the classes in turn (default: 8 a class); under torchrun, which "
        "takes --n for one of its own flags, write --count")
    add("--out", help="a picture (.png, .jpg, ...) for a grid, or a folder for one file an image (default: samples.png beside the GPT)")
    add("--npz", metavar="FILE", help="pack the images into one .npz as ADM's (arr_0, uint8 NHWC); they are kept in the folder of its name")
    return parse_knobs(parser)


def pick_classes(text, names):
    """"0,3" or "star,moon" -> class numbers"""
    picked = []
    for word in text.split(","):
        word = word.strip()
        index = names.index(word) if word in names else int(word) if word.isdecimal() else -1
        require(0 <= index < len(names),
                f"--classes: no class {word!r}; there are 0 to {len(names) - 1}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
        picked.append(index)
    return picked


def load_generator(path, tokenizer_path=None, device="cpu"):
    """
    Checkpoint -> (GPT, the tokenizer whose codes it speaks, class names). A GPT's checkpoint holds its tokenizer;
    `tokenizer_path` takes its place. Raises UserError where the two do not fit each other.
    """
    state = load_checkpoint(path, "gpt")
    require(tokenizer_path or "tokenizer" in state, f"{path} holds no tokenizer: name it with --tokenizer")
    gpt = build(GPT, GPTConfig, state, path, device)
    tokenizer = load_tokenizer(tokenizer_path, device) if tokenizer_path else build(FQGAN, FQGANConfig, state["tokenizer"], path, device)
    for name, ours, its in (("k", gpt.config.k, tokenizer.config.k), ("codes", gpt.config.vocab_size, tokenizer.config.codebook_size)):
        require(ours == its, f"{path} was trained for {name} {ours}, the tokenizer {tokenizer_path or path} has {name} {its}")
    return gpt, tokenizer, state.get("classes") or [str(i) for i in range(gpt.config.num_classes)]


def generate(gpt, tokenizer, labels, batches, args):
    """
    Yields (batch, images (B,3,H,W) about [-1,1]) for each of `batches`, ranges of places in `labels`, with the knobs in `args`.
    A batch has its own random state: whoever makes it, and whenever, it comes out the same.
    """
    device = gpt.rotary.device
    bf16 = args.dtype == "bfloat16" or args.dtype == "auto" and has_fast_bf16(device)
    gpt = gpt.to(torch.bfloat16 if bf16 else torch.float32)
    with sampling(gpt, 2 * args.batch_size):
        for batch in batches:
            generator = torch.Generator(device).manual_seed((args.seed * 1_000_003 + batch.start) % 2**63)
            ids = gpt.generate(labels[batch.start:batch.stop].to(device), args.cfg_scale, args.temperature, args.top_k, args.top_p, generator)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                images = tokenizer.decode(ids)
            yield batch, images  # outside autocast, which would go on in the caller


def main():
    args = flags()
    require(not args.npz or Path(args.npz).suffix == ".npz", f"--npz {args.npz}: give a name that ends in .npz")
    device, rank, world = start(args.device, args.seed)
    began = time.time()
    gpt, tokenizer, names = load_generator(args.gpt, args.tokenizer, device)

    out = Path(args.out) if args.out else Path(args.npz).with_suffix("") if args.npz else Path(args.gpt).parent / "samples.png"
    grid = out.suffix.lower() in Folder.suffixes and not args.npz
    classes = pick_classes(args.classes, names) if args.classes else list(range(min(10, len(names)) if grid else len(names)))
    total = args.n or 8 * len(classes)
    labels = torch.tensor([classes[i % len(classes)] for i in range(total)])

    try:
        (out.parent if grid else out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made into a folder ({error.strerror})") from None
    files = [out / f"{i:06d}_class{int(label)}.png" for i, label in enumerate(labels)]
    if not grid and rank == 0:
        made_with = {n: v for n, v in vars(args).items() if n not in ("out", "npz", "n", "device")}
        remember(out / "sample.json", made_with | {f"{n}_file": str(stamp(vars(args)[n])) for n in ("gpt", "tokenizer") if vars(args)[n]})

    batches = [range(i, min(i + args.batch_size, total)) for i in range(0, total, args.batch_size)]
    todo = [b for b in batches if grid or not all(files[i].exists() for i in b)]
    if world > 1:
        dist.barrier()  # before the first rank writes: all have the same list
    if len(todo) < len(batches):
        if rank == 0:
            print(f"going on in {out}: {len(batches) - len(todo)} of {len(batches)} batches are there")
    made, done = [], 0
    for batch, images in generate(gpt, tokenizer, labels, todo if grid else todo[rank::world], args):
        done += len(batch)
        if grid:
            made.append(images.cpu())
        else:
            for i, image in zip(batch, to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
                with replacing(files[i]) as file:
                    Image.fromarray(image).save(file, "png")
        if rank == 0:
            speed = done / (time.time() - began)
            whole = math.ceil(len(todo) / (1 if grid else world)) * args.batch_size
            print(f"{done} images, {speed * world:.1f} images/s, {max(0, whole - done) / speed:.0f} s left", flush=True)
    if world > 1:
        dist.barrier()
    if rank:
        return
    if grid:
        images = torch.cat(made)
        save_grid(out, [(names[c], images[labels == c]) for c in dict.fromkeys(labels.tolist())])
    elif args.npz:
        pack(Path(args.npz), files)
    print(f"{total} images of {len(set(labels.tolist()))} classes in {args.npz or out}, {time.time() - began:.1f} s")


def stamp(path):
    """Tells a file from another one that took its place."""
    state = Path(path).stat()
    return state.st_size, state.st_mtime_ns


def remember(path, settings):
    """Writes down what a folder of samples was made with; refuses to mix others in."""
    if path.exists():
        try:
            known = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is damaged: choose another --out") from None
        changed = [f"--{n.replace('_', '-')} {known.get(n)} (now {v})" for n, v in settings.items() if known.get(n) != v]
        require(not changed, f"{path.parent} holds samples made with {', '.join(changed)}: choose another --out")
    else:
        write_json(path, settings)


def pack(path, files):
    """The files' pixels as arr_0 (n, H, W, 3) uint8, one image in memory at a time."""
    shape = len(files), *np.asarray(Image.open(files[0]).convert("RGB")).shape
    with (replacing(path) as whole, zipfile.ZipFile(whole, "w") as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as member):  # what np.savez writes, image by image
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for file in files:
            pixels = np.asarray(Image.open(file).convert("RGB"))
            require(pixels.shape == shape[1:], f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, the first {shape[2]}x{shape[1]}: remove it, and it is made again")
            member.write(pixels.tobytes())


if __name__ == "__main__":
    cli(main)
