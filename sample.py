"""
Samples images from a trained GPT: a grid with a row for each class, a folder with a file for each image, or one array.

$ python sample.py                                                      # out/samples.png
$ python sample.py --classes 0,3,8 --n 24 --cfg-scale 3 --out grid.png
$ python sample.py --n 1000 --out samples/                              # samples/000000_circle.png, ...
$ torchrun --nproc-per-node=8 sample.py --count 50000 --npz samples.npz # arr_0, as ADM's evaluator reads it
"""

import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fqgan import (
    Parser, add_sampling_flags, atomic_write, barrier, check, class_indices, cli, duration, from_uint8, gather,
    generate_images, init_distributed, list_images, load_generator, print0, rank, rank_batches, save_grid, to_uint8)

GRID_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
COLUMNS = 16  # images in a row of a grid

def parse_options():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--gpt", default="out/gpt.pt", help="the GPT's checkpoint (default: %(default)s)")
    add("--tokenizer", help="a tokenizer's checkpoint, to replace the one in the GPT's checkpoint")
    add("--grid", type=int, help="positions along a side, for published GPTs that do not store it (384 pixels: 24)")
    add("--classes", help="class numbers or names, separated by commas (default: all; in a grid the first 10)")
    add("--n", "--count", type=int, help="number of images; the classes take turns, so that all get equally many "
        "(default: 8 for each class). torchrun has its own --n: use --count")
    add("--out", help="a grid (.png, .jpg, .webp) or a folder (default: samples.png beside the GPT)")
    add("--npz", metavar="FILE", help="write all images into one .npz instead: arr_0, uint8 (N, H, W, 3)")
    add_sampling_flags(parser)
    options = parser.parse_args()
    check(options.n is None or options.n >= 1, "--n must be at least 1")
    check(options.batch_size >= 1, "--batch-size must be at least 1")
    check(not (options.npz and options.out), "--out and --npz exclude each other")
    return options

def output_path(options):
    """-> (path, kind): "grid", "folder" or "npz". What cannot be written is refused before any sampling."""
    if options.npz:
        path = Path(options.npz)
        kind = "npz"
        check(path.suffix == ".npz", f"--npz {path}: the name must end in .npz")
    else:
        path = Path(options.out or Path(options.gpt).parent / "samples.png")
        kind = "grid" if path.suffix.lower() in GRID_FORMATS else "folder"
    if kind == "folder":
        check(not path.suffix or path.is_dir(),
              f"--out {path}: cannot write {path.suffix} files; name a {', '.join(GRID_FORMATS)} file, or a folder")
        check(not path.is_dir() or not list_images(path)[0], f"--out {path} holds images already: choose a new folder")
    return path, kind

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
    path, kind = output_path(options)
    device = init_distributed(options.device, options.seed)
    barrier()  # every process has seen the empty folder before the first one writes
    start = time.time()
    gpt, tokenizer, names = load_generator(options.gpt, options.tokenizer, device, options.grid)

    # labels: the classes in turn
    if options.classes:
        classes = torch.tensor(class_indices(options.classes, names))
    else:
        classes = torch.arange(len(names))
        if kind == "grid":
            classes = classes[:10]
    n = options.n or 8 * len(classes)
    labels = classes[torch.arange(n) % len(classes)]
    if kind == "grid":
        rows = grid_rows(labels, names)
        # picture formats have limits, and save_grid enlarges small images to less than 192 pixels
        most = 16_000 // max(192, tokenizer.config.image_size)
        check(len(rows) <= most, f"a grid of {len(rows)} rows is too tall, {most} is the limit: give --out a folder")

    # sample
    folder = path if kind == "folder" else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    batches = rank_batches(n, options.batch_size)
    share = sum(len(batch) for batch in batches)
    made = []
    done = 0
    for batch, images in generate_images(gpt, tokenizer, labels, batches, options):
        images = to_uint8(images).cpu()
        if kind == "folder":
            for i, image in zip(batch, images):
                pixels = image.permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(path / file_name(i, names[labels[i]]))
        else:
            made.append((batch.start, images))
        done += len(batch)
        total = n * done // share  # of all processes
        seconds = time.time() - start
        left = seconds * (share - done) / done
        print0(f"{total} images, {total / seconds:.1f} images/s, {left:.0f} s left")

    # write the grid or the array
    gathered = gather(made)  # also waits until all files of a folder are there
    if rank() == 0 and kind != "folder":
        made = sorted(sum(gathered, []), key=lambda part: part[0])
        images = torch.cat([images for _, images in made])
        if kind == "npz":
            array = images.permute(0, 2, 3, 1).numpy()
            with atomic_write(path) as tmp, open(tmp, "wb") as file:
                np.savez(file, arr_0=array)
        else:
            save_grid(path, [(name, from_uint8(images[indices])) for name, indices in rows])
    print0(f"{n} images of {len(labels.unique())} classes in {path}, {duration(time.time() - start)}")

if __name__ == "__main__":
    cli(main)
