"""
Samples images from a trained GPT: a grid with a row for each class, a folder with a file for each image, or one array.

$ python sample.py                                                      # out/samples.png
$ python sample.py --classes 0,3,8 --n 24 --cfg-scale 3 --out grid.png
$ python sample.py --n 1000 --out samples/                              # samples/000000_circle.png, ...
$ torchrun --nproc-per-node=8 sample.py --count 50000 --npz samples.npz # arr_0 and labels, for evaluate.py --fake
"""

import csv
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fqgan import (
    FQGAN, FQGANConfig, GPT, GPTConfig, Parser, barrier, build_model, catch_signals, check, check_apart, cli,
    duration, from_uint8, gather, init_distributed, is_image, load_checkpoint, load_tokenizer, nfc, on_any_rank,
    pick_dtype, print0, rank, rank_batches, save_grid, to_uint8, visible)

GRID_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
COLUMNS = 16  # images in a row of a grid

def numbers(text):
    """A knob: "2" -> 2; "1.5,2" -> [1.5, 2], one for each code of a position."""
    values = [int(word) if word.isdecimal() else float(word) for word in text.split(",")]
    return values[0] if len(values) == 1 else values

def parse_options():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--gpt", default="out/gpt.pt", help="the GPT's checkpoint (default: %(default)s)")
    add("--tokenizer", help="a tokenizer's checkpoint, to replace the one in the GPT's checkpoint")
    add("--classes", help="class numbers or names, separated by commas (default: all; in a grid the first 10)")
    add("--n", "--count", type=int, help="number of images; the classes take turns, so that all get equally many "
        "(default: 8 for each class). torchrun has its own --n: use --count")
    add("--out", help="a grid (.png, .jpg, .webp) or a folder (default: samples.png beside the GPT)")
    add("--npz", metavar="FILE", help="write arr_0, uint8 (N, H, W, 3), labels and classes into one .npz instead")
    add("--cfg-scale", type=numbers, default=1.5, help="guidance; 1 for none (default: %(default)s)")
    add("--temperature", type=numbers, default=1.0, help="below 1 likelier codes, 0 the likeliest (default: 1)")
    add("--top-k", type=numbers, default=0, help="sample from the k likeliest codes only (default: from all)")
    add("--top-p", type=numbers, default=1.0, help="sample from the likeliest codes that make up p (default: 1)")
    add("--seed", type=int, default=0, help="another seed, other samples (default: 0)")
    add("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="cuda, mps, cpu, ... (default: the best there is)")
    add("--dtype", default="auto", help="of the GPT: float32, bfloat16, float16 (default: bfloat16 where it is fast)")
    options = parser.parse_args()
    check(options.n is None or options.n >= 1, "--n must be at least 1")
    check(options.batch_size >= 1, "--batch-size must be at least 1")
    check(not (options.npz and options.out), "--out and --npz exclude each other")
    check(not options.npz or options.npz.endswith(".npz"), f"--npz {options.npz}: the name must end in .npz")
    return options

def class_indices(text, names):
    """From "0,3" or "star,moon" to class numbers. Names go before numbers; quotes protect commas in names."""
    picked = []
    for word in next(csv.reader([nfc(text)], skipinitialspace=True)):
        word = word.strip()
        index = int(word) if word.isdecimal() else -1
        if word in names:
            index = names.index(word)
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        check(0 <= index < len(names), f"--classes: no class {word!r}; there are 0 to {len(names) - 1}: {shown}")
        picked.append(index)
    if any(name.isdecimal() and name != str(i) for i, name in enumerate(names)):
        print0(f"--classes: names that are numbers go before numbers; taken are {', '.join(names[i] for i in picked)}")
    return picked

def load_models(options, device):
    """-> (GPT, tokenizer, class names). A GPT's checkpoint holds its tokenizer; --tokenizer replaces it."""
    state = load_checkpoint(options.gpt, "gpt")
    gpt = build_model(GPT, GPTConfig, state, options.gpt, device)
    own = state.get("tokenizer")
    check(own or options.tokenizer, f"{options.gpt} holds no tokenizer: name it with --tokenizer")
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer, device)
        if own and not all(map(torch.equal, own["model"].values(), tokenizer.cpu().state_dict().values())):
            print0(f"{options.tokenizer} is not the tokenizer whose codes {options.gpt} has learned")
        tokenizer.to(device)
    else:
        tokenizer = build_model(FQGAN, FQGANConfig, own, options.gpt, device)
    for a, b in (("k", "k"), ("vocab_size", "codebook_size")):
        found, expected = getattr(tokenizer.config, b), getattr(gpt.config, a)
        check(found == expected, f"{options.gpt} was trained for {b} {expected}, the tokenizer has {found}")
    check_apart(options.npz or options.out or options.gpt, state.get("settings", {}).get("data"))
    names = state.get("classes") or [str(i) for i in range(gpt.config.num_classes)]
    return gpt.to(pick_dtype(options.dtype, device)), tokenizer, names  # the tokenizer stays in float32

def grid_rows(labels, names):
    """Labels of all images -> [(class name, indices of the row's images)]; a class's name is on its first row only."""
    rows = []
    for label in dict.fromkeys(labels.tolist()):
        indices = (labels == label).nonzero().flatten()
        for i, part in enumerate(indices.split(COLUMNS)):
            rows.append((names[label] if i == 0 else "", part))
    return rows

def file_name(index, name):
    safe = re.sub(r"[^\w.-]+", "_", name)[:60]
    return f"{index:06d}_{safe}.png"

def main():
    options = parse_options()
    path = Path(options.npz or options.out or Path(options.gpt).parent / "samples.png")
    is_folder = not options.npz and path.suffix.lower() not in GRID_FORMATS
    check(not is_folder or not path.suffix or path.is_dir(),
          f"--out {path}: cannot write {path.suffix} files; name a {', '.join(GRID_FORMATS)} file, or a folder")
    device = init_distributed(options.device, options.seed)
    start = time.time()
    gpt, tokenizer, names = load_models(options, device)

    # labels: the classes in turn
    is_grid = not is_folder and not options.npz
    classes = torch.arange(len(names))
    if is_grid:
        classes = classes[:10]
    if options.classes:
        classes = torch.tensor(class_indices(options.classes, names))
    n = options.n or 8 * len(classes)
    labels = classes[torch.arange(n) % len(classes)]
    # picture formats have limits, and save_grid enlarges small images, to less than twice its 96 pixels
    most = 16_000 // max(192, tokenizer.config.image_size)
    num_rows = len(grid_rows(labels, names))
    check(not is_grid or num_rows <= most,
          f"a grid of {num_rows} rows is too tall, {most} is the limit: give --out a folder")

    # a folder that Ctrl-C left incomplete is completed
    batches = rank_batches(n, options.batch_size)
    if is_folder:
        files = [file_name(i, names[label]) for i, label in enumerate(labels)]
        path.mkdir(parents=True, exist_ok=True)
        found = set(filter(is_image, visible(os.listdir(path))))
        check(found < set(files), f"--out {path} holds images already: choose a new folder")
        there = [batch for batch in batches if found.issuperset(files[batch.start:batch.stop])]
        batches = [batch for batch in batches if batch not in there]
        if found:
            print0(f"{len(found)} images are there already: the others follow")
            batches = there[:1] + batches  # one is made again, to see that it is the same
        barrier()  # every process has seen the folder before the first one writes
    else:
        path.parent.mkdir(parents=True, exist_ok=True)

    # sample
    signals = catch_signals()
    made = []
    for i, batch in enumerate(batches):
        # a random state of its own: whichever process makes the batch, its images are the same
        generator = torch.Generator(device).manual_seed((options.seed * 1_000_003 + batch.start) % 2**63)
        ids = gpt.generate(labels[batch.start:batch.stop].to(device), options.cfg_scale, options.temperature,
                           options.top_k, options.top_p, generator)
        images = to_uint8(tokenizer.decode(ids)).cpu()
        if is_folder:
            for j, image in zip(batch, images):
                pixels = image.permute(1, 2, 0).numpy()
                if files[j] in found:
                    check(np.array_equal(pixels, Image.open(path / files[j])),
                          f"--out {path} holds images of another GPT or of other flags: choose a new folder")
                tmp = path / f".{files[j]}"
                Image.fromarray(pixels).save(tmp, "png")
                tmp.replace(path / files[j])
        made.append((batch, None if is_folder else images))
        seconds = time.time() - start
        print0(f"batch {i + 1}/{len(batches)}, {seconds * (len(batches) / (i + 1) - 1):.0f} s left")
        if signals:
            break

    # write the grid or the array: after Ctrl-C, of what there is
    gathered = gather(made)
    if rank() == 0:
        made = sorted(sum(gathered, []), key=lambda part: part[0].start)
        labels = torch.cat([labels[batch.start:batch.stop] for batch, _ in made])
        if not is_folder:
            images = torch.cat([images for _, images in made])
        if options.npz:
            array = images.permute(0, 2, 3, 1).numpy()
            tmp = path.with_name(f".{path.name}")
            np.savez(tmp, arr_0=array, labels=labels.numpy(), classes=np.array(names))
            tmp.replace(path)
        elif is_grid:
            save_grid(path, [(name, from_uint8(images[indices])) for name, indices in grid_rows(labels, names)])
        print0(f"{len(labels)} images of {len(labels.unique())} classes in {path}, {duration(time.time() - start)}")
    if on_any_rank(signals, device):
        raise KeyboardInterrupt

if __name__ == "__main__":
    cli(main)
