"""
Samples images from a trained GPT: a grid with a row for each class, a folder with a file for each image, or one array.

$ python sample.py                                                      # out/samples.png
$ python sample.py --classes 0,3,8 --n 24 --cfg-scale 3 --best-of 4 --out grid.png
$ python sample.py --n 1000 --out samples/                              # samples/000000_circle.png, ...
$ torchrun --nproc-per-node=8 sample.py --count 50000 --npz samples.npz # arr_0 and labels, for evaluate.py --fake
"""

import csv
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from fqgan import (
    batches_of_this_rank, build_model, catch_signals, check, cli, duration, FQGAN, FQGANConfig, from_uint8,
    gather_on_rank0, GPT, GPTConfig, is_image, load_checkpoint, load_tokenizer, normalize_unicode, on_any_rank,
    Parser, pick_dtype, print0, rank, refuse_output_inside_data, save_grid, setup_device, to_uint8, without_hidden)

COLUMNS = 16  # images in a row of a grid

def numbers(text):
    """A sampling parameter: "2" -> 2; "1.5,2" -> [1.5, 2], one for each code of a position."""
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
    add("--out", help="a grid, a .png, or a folder (default: samples.png beside the GPT)")
    add("--npz", metavar="FILE", help="write arr_0, uint8 (N, H, W, 3), labels and classes into one .npz instead")
    add("--cfg-scale", type=numbers, default=1.5, help="guidance; 1 for none (default: %(default)s)")
    add("--cfg-power", type=numbers, default=0, help="1: guidance grows linearly with the position (default: 0)")
    add("--temperature", type=numbers, default=1.0, help="below 1 likelier codes, 0 the likeliest (default: 1)")
    add("--top-k", type=numbers, default=0, help="sample from the k likeliest codes only (default: from all)")
    add("--top-p", type=numbers, default=1.0, help="sample from the likeliest codes that make up p (default: 1)")
    add("--best-of", type=int, default=1, metavar="N", help="draw N for each image, keep the one whose class the GPT "
        "is surest of, which takes a pass for each class there is (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed (or batch size), other samples (default: 0)")
    add("--batch-size", type=int, default=64, help="images at a time, each of --best-of draws (default: %(default)s)")
    add("--device", default="auto", help="cuda, mps, cpu, ... (default: the best there is)")
    add("--dtype", default="auto", help="of the GPT: float32, bfloat16, float16 (default: bfloat16 where it is fast)")
    options = parser.parse_args()
    check(options.n is None or options.n >= 1, "--n must be at least 1")
    check(options.batch_size >= 1, "--batch-size must be at least 1")
    check(options.best_of >= 1, "--best-of must be at least 1")
    check(not (options.npz and options.out), "--out and --npz exclude each other")
    check(not options.npz or options.npz.endswith(".npz"), f"--npz {options.npz}: the name must end in .npz")
    return options

def class_indices(text, names):
    """From "0,3" or "star,moon" to class numbers. Names go before numbers; quotes protect commas in names."""
    picked = []
    for word in next(csv.reader([normalize_unicode(text)], skipinitialspace=True)):
        word = word.strip()
        index = int(word) if word.isdecimal() else -1
        if word in names:
            index = names.index(word)
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        check(0 <= index < len(names), f"--classes: no class {word!r}; there are 0 to {len(names) - 1}: {shown}")
        picked.append(index)
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
    expected = {"k": gpt.config.k, "codebook_size": gpt.config.vocab_size}
    for name, value in expected.items():
        found = getattr(tokenizer.config, name)
        check(found == value, f"{options.gpt} was trained for {name} {value}, the tokenizer has {found}")
    refuse_output_inside_data(options.npz or options.out or options.gpt, state.get("settings", {}).get("data"))
    names = state.get("classes") or [str(i) for i in range(gpt.config.num_classes)]
    return gpt.to(pick_dtype(options.dtype, device)), tokenizer, names  # the tokenizer stays in float32

@torch.no_grad()
def surest(gpt, ids, labels, n):
    """
    Of each n successive draws of a class, ids (B*n,k,h,w) and labels (B*n), the one whose class the GPT is surest of:
    (B,k,h,w). By Bayes' rule p(class | ids) is the softmax over all classes of log p(ids | class). Razavi et al.,
    https://arxiv.org/abs/1906.00446, reject samples likewise, but by another network, a classifier.
    """
    log_p = []
    for label in range(gpt.config.num_classes):
        logits, _ = gpt(ids, torch.full_like(labels, label))  # (B*n, k, h*w, vocab_size)
        nats = F.cross_entropy(logits.movedim(-1, 1), ids.flatten(2), reduction="none")
        log_p.append(-nats.sum((1, 2)))
    p = torch.stack(log_p, 1).softmax(1).gather(1, labels[:, None])  # of each draw's own class
    best = p.view(-1, n).argmax(1)
    return ids.unflatten(0, (-1, n))[torch.arange(len(best), device=ids.device), best]

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
    is_grid = not options.npz and path.suffix.lower() == ".png"
    is_folder = not options.npz and not is_grid
    check(not is_folder or not path.suffix[1:].isalpha() or path.is_dir(),
          f"--out {path}: cannot write {path.suffix} files; name a .png file, or a folder")
    check(not is_folder or not path.is_dir() or not any(map(is_image, without_hidden(os.listdir(path)))),
          f"--out {path} holds images already: choose a new folder")
    device = setup_device(options.device)
    gpt, tokenizer, names = load_models(options, device)

    # labels: the classes in turn
    classes = torch.arange(min(10, len(names)) if is_grid else len(names))
    if options.classes:
        classes = torch.tensor(class_indices(options.classes, names))
    n = options.n or 8 * len(classes)
    labels = classes[torch.arange(n) % len(classes)]
    folder = path if is_folder else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    size = 3 * n * tokenizer.config.image_size**2  # of an array, in bytes
    free = shutil.disk_usage(folder).free
    check(not options.npz or free > size, f"{n} images take {size} bytes; {folder} has {free} left")

    # sample
    signals = catch_signals()  # a list: empty until Ctrl-C or a signal that ends the job
    start = time.time()
    made = []
    batches = batches_of_this_rank(n, options.batch_size)
    for i, batch in enumerate(batches):
        # a random state of its own: whichever process makes the batch, its images are the same
        generator = torch.Generator(device).manual_seed((options.seed * 1_000_003 + batch.start) % 2**63)
        drawn = labels[batch.start:batch.stop].repeat_interleave(options.best_of).to(device)
        ids = gpt.generate(drawn, options.cfg_scale, options.temperature, options.top_k, options.top_p, generator,
                           options.cfg_power)
        if options.best_of > 1:
            ids = surest(gpt, ids, drawn, options.best_of)
        images = to_uint8(tokenizer.decode(ids)).cpu()
        if is_folder:
            for j, image in zip(batch, images):
                to_pil_image(image).save(path / file_name(j, names[labels[j]]))
            images = images[:0]
        made.append((batch, images))
        seconds = time.time() - start
        print0(f"batch {i + 1}/{len(batches)}, {seconds * (len(batches) / (i + 1) - 1):.0f} s left")
        if signals:
            break

    # write the grid or the array: after Ctrl-C, of what there is
    made = sorted(sum(gather_on_rank0(made), []), key=lambda part: part[0].start)
    if rank() == 0:
        labels = torch.cat([labels[batch.start:batch.stop] for batch, _ in made])
        images = torch.cat([images for _, images in made])
        if options.npz:
            tmp = path.with_name(f".{path.name}")
            np.savez(tmp, arr_0=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy(), classes=np.array(names))
            tmp.replace(path)
        elif is_grid:
            save_grid(path, [(name, from_uint8(images[indices])) for name, indices in grid_rows(labels, names)])
        print0(f"{len(labels)} images of {len(labels.unique())} classes in {path}, {duration(time.time() - start)}")
    if on_any_rank(signals, device):
        raise KeyboardInterrupt

if __name__ == "__main__":
    cli(main)
