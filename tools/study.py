"""
The rows of assets/study.md: for each a tokenizer and a GPT on its codes are trained and measured.

$ python tools/study.py cifar10-train/        # the rows that assets/study.csv lacks, then assets/study.svg
$ python tools/study.py cifar10-train/ 0 2    # every second of them, while another process has 1 2
$ python tools/study.py                       # the picture alone

Another row is a line in TOKENIZERS or GPTS. To run them all again, move assets/study.csv away. Rows with a teacher need
its file, cifar10-teacher.pt, beside fqgan.py: without it they are left out.
"""

import csv
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fqgan import Parser, check, cli, pick_dtype

TEACHER_FILE = "cifar10-teacher.pt"
TEACHER = f"--teachers {TEACHER_FILE}"
TOKENIZERS = {
    "2x512": "--k 2 --codebook-size 512",
    "1x1024": "--k 1 --codebook-size 1024",
    "2x512 without": "--k 2 --codebook-size 512 --disentangle-weight 0",
    "2x512 both": f"--k 2 --codebook-size 512 {TEACHER}",
    "2x512 teacher": f"--k 2 --codebook-size 512 --disentangle-weight 0 {TEACHER}",
    "4x256": "--k 4",
    "1x512": "--k 1 --codebook-size 512",
    "3x256": "--k 3",
    "1x256": "--k 1",
    "2x256": "--k 2",
    "3x256 both": f"--k 3 {TEACHER}",
    "1x4096": "--k 1 --codebook-size 4096",
    "8x256": "--k 8",
    "1x16384": "--k 1 --codebook-size 16384",
    "2x8192": "--k 2 --codebook-size 8192",
    "1x65536": "--k 1 --codebook-size 65536",
    "2x512 decorrelated": "--k 2 --codebook-size 512 --disentangle-weight 0 --decorrelate-weight 0.1",
    "4x256 decorrelated": "--k 4 --disentangle-weight 0 --decorrelate-weight 0.1",
    "3x256 without": "--k 3 --disentangle-weight 0",
    "4x256 without": "--k 4 --disentangle-weight 0",
    "8x256 without": "--k 8 --disentangle-weight 0",
    "8x256 decorrelated": "--k 8 --disentangle-weight 0 --decorrelate-weight 0.1",
}
GPTS = {name: (name, "") for name in TOKENIZERS}  # name: (whose codes, flags)
GPTS["2x512 linear"] = ("2x512", "--head-layers 0")
GPTS["3x256 linear"] = ("3x256", "--head-layers 0")

# by the steps of the tokenizer: flags of train_tokenizer.py and of train_gpt.py, beside --preset cifar10
RECIPES = {
    800: ("--entropy-weight 0.03 --lr 2e-3", "--batch-size 64 --lr 2e-3 --steps 300"),
    3200: ("", "--steps 600"),
}
LONG = ("4x256", "4x256 without", "4x256 decorrelated", "8x256", "8x256 without", "8x256 decorrelated", "3x256",
        "3x256 without", "2x512")
LONG_ONLY = ("3x256 without", "4x256 without", "8x256 without", "8x256 decorrelated")
SHORT = [name for name in GPTS if name not in LONG_ONLY]
TWO_SEEDS = [name for name in SHORT if name not in ("2x512 linear", "1x65536")]
THREE_SEEDS = ("1x512", "1x1024", "2x512", "4x256", "2x512 without", "2x512 teacher", "2x512 both",
               "2x512 decorrelated")
ROWS = [(800, name, 0) for name in SHORT]
ROWS += [(800, name, 1) for name in TWO_SEEDS]
ROWS += [(800, name, 2) for name in THREE_SEEDS]
ROWS += [(3200, name, 0) for name in LONG]
ROWS += [(3200, name, seed) for seed in (1, 2) for name in LONG[:3]]
ROWS += [(3200, "2x512", 1)]
# of other seeds than the first the tokenizer alone, but for these
GPTS_OF_OTHER_SEEDS = [("2x512 without", 2), ("2x512 teacher", 2), ("3x256", 1), ("3x256 linear", 1),
                       ("3x256 both", 1)]

TABLE = Path("assets/study.csv")
COLUMNS = (
    "row steps seed machine psnr rfd named usage shared_bits probes probe_all nats_a_position fd named_samples").split()
JUDGE = "--features assets/cifar10-features.pt --json"

# -----------------------------------------------------------------------------
# Training and measuring

def run(command):
    subprocess.run([sys.executable, *shlex.split(command)], check=True)

def folder_of(name, steps, seed):
    return "study/" + f"{name} {steps} {seed}".replace(" ", "-")

def measure_tokenizer(name, steps, seed, data):
    out = folder_of(name, steps, seed)
    if not Path(out, "figures.json").exists():
        run(f"train_tokenizer.py --preset cifar10 {RECIPES[steps][0]} --data {data} --steps {steps} --seed {seed} "
            f"--out {out} --overwrite {TOKENIZERS[name]}")
        run(f"evaluate.py --tokenizer {out}/tokenizer.pt {JUDGE} {out}/figures.json")
    figures = json.loads(Path(out, "figures.json").read_text())
    k = sum(key.startswith("usage_") for key in figures)
    row = {key: figures[key] for key in ("psnr", "rfd", "named")}
    row["usage"] = mean(figures[f"usage_{i + 1}"] for i in range(k))
    pairs = [f"mutual_information_{i + 1}_{j + 1}" for j in range(k) for i in range(j)]
    row["shared_bits"] = mean(figures[pair] for pair in pairs) if pairs else ""
    row["probes"] = " ".join(f"{figures[f'probe_{i + 1}']:.3f}" for i in range(k))
    row["probe_all"] = figures.get("probe_all", figures["probe_1"])
    return row

def measure_gpt(name, steps, seed, data):
    tokenizer_name, flags = GPTS[name]
    tokenizer = folder_of(tokenizer_name, steps, seed) + "/tokenizer.pt"
    out = folder_of(name, steps, seed)
    run(f"train_gpt.py --preset cifar10 --crops 1 {RECIPES[steps][1]} --seed {seed} --tokenizer {tokenizer} "
        f"--out {out} --overwrite {flags}")
    run(f"sample.py --gpt {out}/gpt.pt --n 2000 --cfg-scale 2 --npz {out}/samples.npz")
    run(f"evaluate.py --fake {out}/samples.npz --data {data} {JUDGE} {out}/samples.json")
    samples = json.loads(Path(out, "samples.json").read_text())
    with open(f"{out}/gpt_log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    nats = sum(float(value) for key, value in last.items() if key.startswith("val_loss_"))
    return {"nats_a_position": nats, "fd": samples["fd"], "named_samples": samples["named"]}

def read_table():
    if not TABLE.exists():
        return []
    with TABLE.open() as file:
        return list(csv.DictReader(file))

def run_missing_rows(data, part, parts):
    machine = f"{torch.backends.cpu.get_cpu_capability()} {pick_dtype('auto', torch.device('cpu'))}"
    for steps, name, seed in ROWS[part::parts]:
        if (name, str(steps), str(seed)) in [(row["row"], row["steps"], row["seed"]) for row in read_table()]:
            continue
        if TEACHER in TOKENIZERS[GPTS[name][0]] and not Path(TEACHER_FILE).exists():
            print(f"left out, since there is no {TEACHER_FILE}: {name}, {steps} steps, seed {seed}")
            continue
        row = {"row": name, "steps": steps, "seed": seed, "machine": machine}
        row |= measure_tokenizer(GPTS[name][0], steps, seed, data)
        if seed == 0 or (name, seed) in GPTS_OF_OTHER_SEEDS:
            row |= measure_gpt(name, steps, seed, data)
        with TABLE.open("a", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                table.writeheader()
            table.writerow(row)

# -----------------------------------------------------------------------------
# The picture

COLORS = {"1": "gray", "2": "royalblue", "3": "seagreen", "4": "firebrick", "8": "purple"}  # by k

def picture(rows):
    """Rows of the table -> an SVG: those of 800 steps, a GPT's loss against rFD, means over seeds."""
    seeds_of = {}
    for row in rows:
        if row["steps"] == "800":
            seeds_of.setdefault(row["row"], []).append(row)
    points = {}
    for name, seeds in seeds_of.items():
        nats = [float(row["nats_a_position"]) for row in seeds if row["nats_a_position"]]
        if not nats:
            continue
        points[name] = mean(nats), mean(float(row["rfd"]) for row in seeds)
    check(points, f"no row of {TABLE} has a GPT")
    low_x, low_y = [math.floor(min(values)) for values in zip(*points.values())]
    high_x, high_y = [math.ceil(max(values)) for values in zip(*points.values())]

    def place(x, y):
        return 120 + 600 * math.log(x / low_x) / math.log(high_x / low_x), 470 - 440 * (y - low_y) / (high_y - low_y)

    svg = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 520" font-family="sans-serif" font-size="12">',
        '<rect width="800" height="520" fill="white"/>',
        '<path d="M60 20V470H780" fill="none" stroke="black"/>',
        '<text x="400" y="510" text-anchor="middle">cross-entropy of the GPT, nats per position (log scale)</text>',
        '<text x="20" y="250" text-anchor="middle" transform="rotate(-90 20 250)">rFD of reconstructions</text>',
        '<text x="780" y="30" text-anchor="end">variants of the rows of their color: w without disentanglement,</text>',
        '<text x="780" y="46" text-anchor="end">t teacher, b both, d decorrelated, l linear head</text>',
    ]
    for x in range(low_x, high_x + 1, 1 if high_x < 16 else 2):
        svg.append(f'<text x="{place(x, 0)[0]:.0f}" y="488" text-anchor="middle">{x}</text>')
    for y in range(low_y, high_y + 1):
        svg.append(f'<text x="50" y="{place(1, y)[1] + 4:.0f}" text-anchor="end">{y}</text>')

    spots = {name: place(*point) for name, point in points.items()}
    taken = [(x - 6, x + 6, y) for x, y in spots.values()]  # left, right, height
    for name, (x, y) in spots.items():
        shape, _, variant = name.partition(" ")
        color = COLORS.get(shape.partition("x")[0], "black")
        svg.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" stroke="{color}" fill="{"none" if variant else color}"/>')
        label = variant[:1] or shape
        width = 7 * len(label)
        for left, height in ((x - 9 - width, y), (x + 9, y), (x - width / 2, y + 15), (x - width / 2, y - 15)):
            if not any(left < end and left + width > begin and abs(height - other) < 11 for begin, end, other in taken):
                break
        taken.append((left, left + width, height))
        svg.append(f'<text x="{left + width / 2:.0f}" y="{height + 4:.0f}" text-anchor="middle">{label}</text>')
    return "\n".join(svg) + "\n</svg>\n"

def main():
    parser = Parser(__doc__)
    parser.add_argument("data", nargs="?", help="folder of CIFAR-10, with its parts train and val")
    parser.add_argument("part", nargs="?", type=int, default=0, help="which of the parts to run, from 0 on")
    parser.add_argument("parts", nargs="?", type=int, default=1, help="how many parts the rows are divided into")
    options = parser.parse_args()
    check(0 <= options.part < options.parts, f"part {options.part} of {options.parts}: parts are counted from 0")
    data = shlex.quote(os.path.abspath(options.data)) if options.data else ""
    os.chdir(Path(__file__).resolve().parent.parent)
    if data:
        run_missing_rows(data, options.part, options.parts)
    Path("assets/study.svg").write_text(picture(read_table()))

if __name__ == "__main__":
    cli(main)
