"""
Times the fast paths against plain ones, which have every formula as it is written. Full-size models, random weights.

$ python .ci/bench.py                            # every row
$ python .ci/bench.py encoding                   # the rows with this word in their name
$ python .ci/bench.py --against ../before        # each of our ways also as the code in another checkout does it

Each way runs in a process of its own. Time and memory are compared with the row's first way; 10 % is noise.
Memory is the peak of the process, weights and libraries included; "more" is what the work itself added to it.
"""

import argparse
import functools
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [os.environ.get("BENCH_CODE", str(HERE)), str(HERE)]  # the code to time; the tests' plain models

import evaluate
import fqgan
import train_gpt
from fqgan import FQGAN, GPT, Discriminator, FQGANConfig, GPTConfig, Quantizer

part = functools.partial

def plain_quantizer(z, codes):
    """The whole matrix of assignments at once: -> (straight-through vectors, the sum of the losses)"""
    z = F.normalize(z.float(), dim=1)
    codes = F.normalize(codes, dim=1)
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)
    distance = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
    nearest = codes[distance.argmin(1)]
    p = (-distance / 0.01).softmax(1)
    mean = p.mean(0)
    entropy = -(p * (p + 1e-5).log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    loss = F.mse_loss(nearest, flat.detach()) + 0.25 * F.mse_loss(flat, nearest.detach()) + 0.03 * entropy
    z_q = nearest.view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    return z + (z_q - z).detach(), loss

def published_tokenizer(k=3):
    """A tokenizer of the published size, run as the description of its file reads."""
    from tools.test_convert import PublishedTokenizer

    return PublishedTokenizer(k, widths=(128, 128, 256, 256, 512), z=256, V=16384, grid=16, depth=6)

def plain_forward(model, images):
    """A published tokenizer's forward pass in training: -> (reconstruction, dict of losses)"""
    codes = [model.state[f"quantize{branch}.embedding.weight"] for branch in model.branches]
    quantized, losses = zip(*map(plain_quantizer, model.vectors(images), codes))
    pairs = list(itertools.combinations(quantized, 2))
    cosines = [F.cosine_similarity(a, b) for a, b in pairs]
    disentangle = sum(cosine.square().mean() for cosine in cosines) / len(pairs)
    reconstruction = model.decode_vectors(quantized)
    return reconstruction, {"total": sum(losses) + 0.1 * disentangle + F.mse_loss(reconstruction, images)}

# -----------------------------------------------------------------------------
# The work. Each function prepares a way and returns (the function to time, how often to run it)

def inference(work, dtype):
    def run():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            work()

    return run

def training(loss, parameters, dtype="float32"):
    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss()
        value.backward()
        for p in parameters:
            p.grad = None

    return step

def frechet(plain=False):
    spread = np.linspace(0.1, 2, 2048)
    noise = np.random.default_rng(0).standard_normal((2, 4096, 2048))
    a, b = (np.cov(x * spread, rowvar=False) for x in noise)
    mu = np.zeros(2048)
    if plain:
        return (lambda: np.trace(scipy.linalg.sqrtm(a @ b)).real), 1
    return (lambda: evaluate.frechet_distance(mu, a, mu, b)), 1

def ten_crops(plain=False):
    path = Path(tempfile.mkdtemp()) / "image.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(path)
    data = fqgan.load_data(str(path.parent), 256, False)

    views = train_gpt.Views(data, 10)

    def one_by_one():
        for _ in range(10):
            views[0]

    return (one_by_one if plain else lambda: views[0]), 20

def quantizer(plain=False, tokens=4096, codes=16384, k=1):
    modules = [Quantizer(codes, 8) for _ in range(k)]

    def loss(z):
        if plain:
            return sum(plain_quantizer(z, module.codebook)[1] for module in modules)
        losses = [module(z)[2].values() for module in modules]
        return sum(map(sum, losses))

    def work(tokens=tokens):
        z = torch.randn(1, 8, tokens, 1, requires_grad=True)
        training(lambda: loss(z), [module.codebook for module in modules])()

    work(64)  # what is loaded and set up once is not counted
    return work, 2

def tokenizer_step(plain=False, dtype="float32", k=3, size=256, batch=2):
    images = torch.rand(batch, 3, size, size) * 2 - 1
    disc = Discriminator()
    if plain:
        made = published_tokenizer(k)
        model = part(plain_forward, made)
        parameters = [tensor.requires_grad_() for tensor in made.state.values()]
    else:
        model = FQGAN(FQGANConfig(k=k, image_size=size)).train()
        parameters = [*model.parameters()]

    def loss():
        reconstruction, losses = model(images)
        disc.requires_grad_(False)
        value = sum(losses.values()) - 0.5 * disc(reconstruction).float().mean()
        disc.requires_grad_(True)
        return value + 0.5 * fqgan.hinge_loss(disc(images), disc(reconstruction.detach()))

    return training(loss, [*parameters, *disc.parameters()], dtype), 1

def coding(direction, plain=False, dtype="float32"):
    model = FQGAN(FQGANConfig()).eval()
    if plain:
        model = published_tokenizer()
    images = torch.rand(2, 3, 256, 256)
    ids = torch.randint(0, 16384, (2, 3, 16, 16))
    work = {"encode": lambda: model.encode(images), "decode": lambda: model.decode(ids)}
    return inference(work[direction], dtype), 2

def gpt_step(batch, plain=False, dtype="float32"):
    ids = torch.randint(0, 16384, (batch, 3, 16, 16))
    labels = torch.arange(batch)
    if not plain:
        model = GPT(GPTConfig(dropout=0.0)).train()
        return training(lambda: model(ids, labels)[1], [*model.parameters()], dtype), 1
    from tools.test_convert import PublishedGPT

    model = PublishedGPT(3, D=1024, V=16384, classes=1000, trunk=24, head=3)
    parameters = [tensor.requires_grad_() for tensor in model.state.values()]

    def loss():
        logits = model.logits(ids.flatten(2), labels, 16).float()
        return F.cross_entropy(logits.flatten(0, 2), ids.flatten())

    return training(loss, parameters, dtype), 1

def gpt_sampling(dtype="float32"):
    model = GPT(GPTConfig(grid=8)).to(getattr(torch, dtype)).eval()
    return (lambda: model.generate(torch.arange(4), cfg_scale=2.0)), 1

def small_sampling(plain=False):
    shape = dict(k=3, vocab_size=256, num_classes=10, grid=16, n_layer=6, n_head=3, n_embd=192, head_layers=1)
    model = GPT(GPTConfig(**shape)).eval()
    labels = torch.arange(4)
    if not plain:
        return (lambda: model.generate(labels, cfg_scale=2.0)), 1
    from test_fqgan import uncached

    return torch.no_grad()(lambda: uncached(model, labels, [2.0] * 3, [1.0] * 3, [0] * 3, [1.0] * 3, None)), 1

# -----------------------------------------------------------------------------
# Rows

def in_both_types(make, *args):
    ways = {}
    for dtype in ("float32", "bfloat16"):
        ways[f"plain, {dtype}"] = part(make, *args, plain=True, dtype=dtype)
        ways[f"ours, {dtype}"] = part(make, *args, dtype=dtype)
    return ways

def by(make, name, values, **options):
    return {str(value): part(make, **{name: value}, **options) for value in values}

ROWS = {
    "Frechet distance, 2048x2048": {"plain, scipy": part(frechet, plain=True), "ours": frechet},
    "ten crops of a JPEG of 500x375": {"plain, one by one": part(ten_crops, plain=True), "ours": ten_crops},
    "quantizer, 4,096 tokens x 16,384 codes": {"plain": part(quantizer, plain=True), "ours": quantizer},
    "FQGAN-Triple 16x, training step of 2": in_both_types(tokenizer_step),
    "FQGAN-Triple 16x, encoding 2 images": in_both_types(coding, "encode"),
    "FQGAN-Triple 16x, decoding 2 images": in_both_types(coding, "decode"),
    "FAR-Base, training step of 2": in_both_types(gpt_step, 2),
    "FAR-Base, training step of 8": in_both_types(gpt_step, 8),
    "FAR-Base, 64 positions x 4 images, guided": by(gpt_sampling, "dtype", ("float32", "bfloat16")),
    "GPT of 3.5 M, 256 positions x 4 images, guided": {
        "plain, uncached": part(small_sampling, plain=True),
        "ours": small_sampling,
    },
    "quantizer, 4,096 tokens, by codes": by(quantizer, "codes", (1024, 4096, 16384, 65536, 262144)),
    "quantizer, 16,384 codes, by tokens": by(quantizer, "tokens", (1024, 4096, 16384)),
    "quantizers, 4,096 tokens x 16,384 codes, by k": by(quantizer, "k", (1, 2, 4, 8)),
    "training step of 1 at 256x256, by k": by(tokenizer_step, "k", (1, 2, 4, 8), batch=1),
    "training step of 1, k=3, by image size": by(tokenizer_step, "size", (64, 128, 256, 512), batch=1),
}

def measure(row, way):
    """Runs one way in this process: prints its seconds, the GB that it added, and the GB in all."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    work, times = ROWS[row][way]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()  # the first run counts for memory alone
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    for _ in range(times):
        work()
    seconds = (time.perf_counter() - began) / times
    print(json.dumps([seconds, (peak - before) / 1e6, peak / 1e6]))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="part of a row's name (default: all rows)")
    parser.add_argument("--against", metavar="DIR", help="a checkout to compare with")
    parser.add_argument("--measure", nargs=2, metavar=("ROW", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure)

    for row in [name for name in ROWS if args.word in name]:
        first = None
        for way in ROWS[row]:
            codes = {way: str(HERE)}
            if args.against and not way.startswith("plain"):
                codes[f"{way}, there"] = args.against
            for label, code in codes.items():
                words = [sys.executable, __file__, "--measure", row, way]
                told = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"BENCH_CODE": code})
                if told.returncode:
                    print(f"{row:48s} {label:22s} failed: {told.stderr.strip().splitlines()[-1]}")
                    continue
                seconds, more, peak = json.loads(told.stdout)
                first = first or (seconds, peak)
                line = f"{row:48s} {label:22s} {seconds:7.2f} s {more:6.2f} GB more {peak:6.2f} GB in all"
                print(f"{line} {seconds / first[0]:6.2f} of the time {peak / first[1]:6.2f} of the memory", flush=True)

if __name__ == "__main__":
    main()
