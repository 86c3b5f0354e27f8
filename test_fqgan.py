"""
Tests of behaviour: every loss against its plain formula, cached sampling against uncached, a resumed run against an
unbroken one, two processes against one, bad input against its one line. Nothing is downloaded.

$ python -m pytest -q test_fqgan.py
$ python test_fqgan.py --bench [WORD]          # the benchmark, or its rows with a word in their name
$ python test_fqgan.py --faults [WORD]         # kills, damaged files and strange flags by the thousand; or of checkpoints, images, flags, kills
"""

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import evaluate
import fqgan
import sample
import train_gpt
import train_tokenizer
from fqgan import FQGAN, GPT, FQGANConfig, GPTConfig, Quantizer, UserError, disentangle_loss, entropy_loss, load_data

HERE = Path(__file__).parent
# the smallest tokenizer and GPT that have every part: seconds, not minutes
SMALL = dict(image_size=16, downsample=4, patch_size=2, channels=32, channel_mult=(1, 1), res_blocks=1, z_channels=32,
             codebook_size=32, codebook_dim=4, adapter_depth=1, adapter_width=32, adapter_heads=2)
SMALL_GPT = dict(n_layer=2, n_head=2, n_embd=32, head_layers=1)


def as_flags(values):
    for name, value in values.items():
        yield "--" + name.replace("_", "-")
        if value is not True:
            yield ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


TINY_RUN = [*as_flags(SMALL), *as_flags(dict(steps=4, batch_size=8, eval_every=2, eval_images=16, log_every=1, dtype="float32", device="cpu"))]
TINY_GPT_RUN = [*as_flags(SMALL_GPT), *TINY_RUN[len([*as_flags(SMALL)]):]]


def call(script, *argv):
    """Runs a script's main() in this process."""
    before, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"{script.__name__}.py", *map(str, argv)]
    try:
        script.main()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


SHELL = os.environ | {"OMP_NUM_THREADS": "1"}


def shell_words(ranks, *argv):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else ["-u"]
    return [sys.executable, *launcher, *map(str, argv)]


def shell(*argv, ranks=0, check=True):
    """Runs a script as a person would, in a process of its own, or in one for each rank."""
    told = subprocess.run(shell_words(ranks, *argv), cwd=HERE, text=True, capture_output=True, timeout=240, env=SHELL)
    assert not check or told.returncode == 0, told.stderr
    return told


class Hostile:
    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


load = functools.partial(torch.load, weights_only=True)


def log_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def images_like(config, n=2):
    return torch.rand(n, 3, config.image_size, config.image_size) * 2 - 1


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with the tokenizer and the GPT that the two scripts make of `shapes` in a few steps."""
    out = tmp_path_factory.mktemp("trained")
    call(train_tokenizer, "--k", 2, "--out", out, *TINY_RUN)
    call(train_gpt, "--out", out, *TINY_GPT_RUN)
    return out


# -----------------------------------------------------------------------------
# Tokenizer


def test_vectors_of_flat_images_are_exact():
    """With channels last in memory PyTorch's GroupNorm is off by 1e-4 on images of one colour, enough to find other codes."""
    model = FQGAN(FQGANConfig(k=2, image_size=32, downsample=4, channels=32, z_channels=32, adapter_depth=1, adapter_width=64, adapter_heads=2)).eval()
    images = torch.tensor([1.0, -0.5]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    with torch.no_grad():
        for vectors, exact in zip(model.vectors(images), copy.deepcopy(model).double().vectors(images.double())):
            assert (vectors - exact).abs().max() < 1e-5


@pytest.mark.parametrize("k, downsample", [(1, 4), (2, 8), (3, 16), (5, 4)])
def test_tokenizer_shapes_and_gradients(k, downsample):
    config = FQGANConfig(k=k, image_size=32, downsample=downsample, channels=32, res_blocks=1, z_channels=32, codebook_size=16,
                         adapter_depth=1, adapter_width=64, adapter_heads=2)
    model, images = FQGAN(config).train(), images_like(config)
    reconstruction, losses = model(images)
    assert reconstruction.shape == images.shape
    assert {"codebook", "commit", "entropy", "disentangle"} <= set(losses) and all(v.ndim == 0 for v in losses.values())
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None], "every weight must be trained"
    ids = model.eval().encode(images)
    assert ids.shape == (2, k, 32 // downsample, 32 // downsample) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < 16
    assert torch.allclose(model.decode(ids), model(images)[0], atol=1e-4), "forward in eval mode is encode, then decode"
    assert torch.equal(model.decode(ids, only=range(k)), model.decode(ids))
    others = torch.cat([ids[:, :1], (ids[:, 1:] + 1) % 16], 1)
    assert torch.equal(model.decode(ids, only=[0]), model.decode(others, only=[0])), "of the first sub-codebook alone"
    assert k == 1 or not torch.equal(model.decode(ids, only=[0]), model.decode(ids))
    weighted = FQGAN(dataclasses.replace(config, commit_weight=0.3, entropy_weight=0.2, entropy_temperature=0.5, disentangle_weight=0.7))
    weighted.load_state_dict(model.state_dict())
    plain = [Quantizer(16, 8, 0.3, 0.2, 0.5) for _ in range(k)]
    for branch, quantizer in zip(model.branches, plain):
        quantizer.load_state_dict(branch.quantizer.state_dict())
    with torch.no_grad():
        made, quantized = weighted(images)[1], [q(z) for q, z in zip(plain, model.vectors(images))]
    expected = {n: sum(each[n] for _, _, each in quantized) for n in ("codebook", "commit", "entropy")}
    expected |= {"disentangle": 0.7 * disentangle_loss([z for z, _, _ in quantized]), "reconstruct": F.mse_loss(weighted(images)[0], images)}
    assert made.keys() == expected.keys() and all(torch.allclose(made[n], expected[n], atol=1e-6) for n in made), "summed over sub-codebooks, weights included"


@pytest.mark.parametrize("options, tensors", [
    (dict(k=2), 552 - 46 - 2), (dict(k=2, downsample=8), 508 - 46 - 2), (dict(k=3), 683 - 92 - 3), (dict(k=3, downsample=8), 639 - 92 - 3),
    (dict(k=1, adapter_depth=0), 344 - 1), (dict(k=1, adapter_depth=0, downsample=8), 300 - 1)])
def test_as_many_tensors_as_the_published_files(options, tensors):
    """
    Less the feature heads and the codebook_used statistics, which the published files hold as well, and 4 for each
    of 7 attention blocks, whose q, k and v are one tensor here.
    """
    with torch.device("meta"):
        model = FQGAN(FQGANConfig(**options))
    assert len(model.state_dict()) == tensors - 7 * 4
    assert model.post_quant_conv.weight.shape == (256, 8 * options["k"], 1, 1)


def test_published_widths_are_the_default():
    widths = {4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 1, 2, 2, 4)}
    assert {d: FQGANConfig(downsample=d).channel_mult for d in widths} == widths


def test_without_adapters_any_size_is_taken():
    model = FQGAN(FQGANConfig(**SMALL | dict(k=1, adapter_depth=0))).eval()
    assert model.encode(torch.zeros(1, 3, 24, 40)).shape == (1, 1, 6, 10)
    with pytest.raises(UserError, match="not divisible"):
        model.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(UserError, match="positions are for 16x16"):
        FQGAN(FQGANConfig(**SMALL | dict(k=1))).encode(torch.zeros(1, 3, 24, 24))


def test_quantizer_against_its_definition():
    torch.manual_seed(0)
    q = Quantizer(50, 6, commit_weight=0.25, entropy_weight=0.03, entropy_temperature=0.1).double()
    q.codebook.data *= torch.rand(50, 1) + 0.5  # stored codes of any length
    z = (3 * torch.randn(2, 6, 3, 4, dtype=torch.double)).requires_grad_()
    q.codebook.data = q.codebook.data.float().double()
    z.data = z.data.float().double()
    z_q, ids, losses = q(z)

    flat = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, 6), dim=1)
    codes = F.normalize(q.codebook, dim=1)
    distance = (flat[:, None] - codes[None]).square().sum(-1)
    nearest = codes[distance.argmin(1)]
    p = torch.softmax(-distance / 0.1, 1)
    mean_p = p.mean(0)
    expected = {"codebook": (nearest - flat.detach()).square().mean(), "commit": 0.25 * (nearest.detach() - flat).square().mean(),
                "entropy": 0.03 * (-(p * p.log()).sum(1).mean() + (mean_p * (mean_p + 1e-5).log()).sum())}
    assert torch.equal(ids.flatten(), distance.argmin(1))
    assert torch.allclose(z_q.permute(0, 2, 3, 1).reshape(-1, 6).double(), nearest, atol=1e-6)
    for name, value in expected.items():
        assert torch.allclose(losses[name].double(), value, rtol=1e-4), name
        for of in (z, q.codebook):
            ours, plain = (torch.autograd.grad(x, of, retain_graph=True, allow_unused=True)[0] for x in (losses[name], value))
            assert (ours is None) == (plain is None), f"{name} must move what its formula moves, and nothing else"
            assert ours is None or torch.allclose(ours, plain, rtol=1e-3, atol=1e-7), name

    pull = torch.randn_like(z_q)  # straight-through: the gradient at z_q is that at the normalized z
    ours, = torch.autograd.grad((z_q * pull).sum(), z, retain_graph=True)
    plain, = torch.autograd.grad((F.normalize(z, dim=1) * pull).sum(), z)
    assert torch.allclose(ours, plain.to(ours.dtype), atol=1e-6)


def test_entropy_in_chunks_is_the_plain_entropy():
    torch.manual_seed(0)
    raw = [torch.randn(n, 8, dtype=torch.double, requires_grad=True) for n in (700, 2**14)]  # in chunks of 16
    z, codes = (F.normalize(x, dim=1) for x in raw)
    ours, ids = entropy_loss(z, codes, 0.05)
    p = torch.softmax(-torch.cdist(z, codes).square() / 0.05, 1)
    plain = -(p * p.log()).sum(1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    assert torch.allclose(ours, plain) and torch.equal(ids, torch.cdist(z, codes).argmin(1))
    for a, b in zip(torch.autograd.grad(ours, raw, retain_graph=True), torch.autograd.grad(plain, raw)):
        assert torch.allclose(a, b, atol=1e-9)


def test_codes_are_searched_in_float32_under_autocast():
    """In bfloat16 one vector in fifteen finds another code: a GPT would learn wrong tokens."""
    torch.manual_seed(0)
    q, z = Quantizer(1024, 8), torch.randn(2, 8, 32, 32)
    plain, bare = q(z)[1], Quantizer(1024, 8, entropy_weight=0)
    bare.load_state_dict(q.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(q(z)[1], plain) and torch.equal(q.nearest(z), plain) and torch.equal(bare(z)[1], plain)
    rounded = F.normalize(z, dim=1).permute(0, 2, 3, 1).reshape(-1, 8).bfloat16() @ F.normalize(q.codebook, dim=1).bfloat16().T
    assert (rounded.argmax(1) != plain.flatten()).any()


def test_counts_are_true_and_taken_once():
    model = FQGAN(FQGANConfig(**SMALL | dict(k=2))).train()
    with torch.no_grad():
        model(images_like(model.config, 3))
        model.eval().encode(images_like(model.config))
    counts = train_tokenizer.take_counts(model)
    assert counts.sum(1).tolist() == [3 * 16] * 2 and train_tokenizer.take_counts(model).sum() == 0
    share, perplexity = train_tokenizer.usage(torch.tensor([[5, 5, 0, 0], [1, 1, 1, 1], [8, 0, 0, 0]]))
    assert share.tolist() == [0.5, 1.0, 0.25] and np.allclose(perplexity, [2, 4, 1])


def test_disentangle_loss():
    x = torch.tensor([1.0, 0, 0, 0]).view(1, 4, 1, 1).expand(2, 4, 3, 3)
    y = torch.tensor([0, 2.0, 0, 0]).view(1, 4, 1, 1).expand(2, 4, 3, 3)
    assert disentangle_loss([x]) == 0 and disentangle_loss([x, y]) == 0
    assert disentangle_loss([x, x]) == 1 and disentangle_loss([x, -x]) == 1, "squared: opposite is not orthogonal"
    assert math.isclose(disentangle_loss([x, y, x]), 1 / 3, rel_tol=1e-6)
    z = [torch.randn(2, 5, 3, 3, dtype=torch.double) for _ in range(4)]
    plain = np.mean([F.cosine_similarity(a, b, dim=1).square().mean() for a, b in itertools.combinations(z, 2)])
    assert math.isclose(disentangle_loss(z), plain, rel_tol=1e-5)


def test_adversary():
    disc = fqgan.Discriminator()
    assert disc(torch.randn(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert sorted(disc.state_dict())[:2] == ["main.0.bias", "main.0.weight"] and "main.11.weight" in disc.state_dict()
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert fqgan.hinge_loss(real, fake) == 0.5 * ((0 + 1) / 2 + (0 + 2) / 2)


def test_overfits_one_batch():
    torch.manual_seed(0)
    config = FQGANConfig(**SMALL | dict(k=2))
    model, images = FQGAN(config), torch.stack([load_data("shapes", 16, True)[i][0] for i in range(4)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        reconstruction, losses = model(images)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        first = losses["reconstruct"].item() if step == 0 else first
    assert losses["reconstruct"].item() < 0.05 * first


@pytest.mark.parametrize("config, options, message", [*((FQGANConfig, *row) for row in [
    (dict(k=0), "k is 0"), (dict(image_size=250), "250 is not divisible by downsample 16: 240 is"), (dict(downsample=12), "power of two"),
    (dict(channels=100), "multiples of norm_groups 32"), (dict(channel_mult=(1, 2)), "names 2 levels"), (dict(adapter_heads=7), "adapter_heads 7"),
    (dict(downsample=4, patch_size=8), "multiple of patch_size 8"), (dict(entropy_temperature=0), "above 0")]),
    (GPTConfig, dict(k=3, head_layers=0), "head_layers is 0; with k=3 it must be at least 1"), (GPTConfig, dict(n_embd=100), "multiple of 4 x n_head"), (GPTConfig, dict(dropout=1.0), "dropout is 1.0")])
def test_config_refuses(config, options, message):
    with pytest.raises(UserError, match=message):
        config(**options)


# -----------------------------------------------------------------------------
# Data


def test_shapes():
    train, held_out = (load_data("shapes", 32, part) for part in (True, False))
    image, label = train[13]
    assert image.shape == (3, 32, 32) and image.min() >= -1 and image.max() <= 1 and image.dtype == torch.float32
    assert train.classes[label] == "diamond" and len(set(train.classes)) == 10
    assert torch.equal(load_data("shapes", 32, True)[13][0], image), "the same item is the same picture, always"
    seen = {train[i][0].numpy().tobytes() for i in range(1000)}
    assert len(seen) == 1000 and not seen & {held_out[i][0].numpy().tobytes() for i in range(300)}
    small, large = (F.avg_pool2d(load_data("shapes", s, True)[3][0], s // 8) for s in (32, 64))
    assert (small - large).abs().max() < 0.1, "rendered at another size it is the same figure"
    with pytest.raises(IndexError):
        train[len(train)]


def test_every_kind_of_image_becomes_upright_rgb(tmp_path):
    red = Image.new("RGB", (40, 20), (200, 30, 40))
    red.save(tmp_path / "a_rgb.png")
    red.convert("L").save(tmp_path / "b_gray.png")
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "c_palette.png")
    red.convert("CMYK").save(tmp_path / "d_cmyk.jpg", quality=95)
    Image.new("RGBA", (40, 20), (200, 30, 40, 0)).save(tmp_path / "e_transparent.png")
    Image.fromarray(np.full((20, 40), 128 * 257, np.uint16)).save(tmp_path / "f_16bit.png")
    turned = Image.new("RGB", (20, 40), "blue")
    turned.paste("white", (0, 0, 20, 20))  # upper half; EXIF 6 says: turn by 90 degrees clockwise to view
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "g_turned.jpg", quality=95, exif=exif)
    data = load_data(tmp_path, 16, False)
    assert len(data) == 7 and data.classes == [tmp_path.name]
    pixels = [((image.permute(1, 2, 0) + 1) * 127.5).round().int() for image, _ in data]
    for i, expected in enumerate([(200, 30, 40), (82, 82, 82), (200, 30, 40), (200, 30, 40), (255, 255, 255), (128, 128, 128)]):
        assert (pixels[i][8, 8] - torch.tensor(expected)).abs().max() <= 12, f"item {i}: {pixels[i][8, 8]}"
    assert pixels[6][8, 1][0] < 60 and pixels[6][8, 14][0] > 200, "what was above is to the right after the turn"


def make_folder(root, classes=2, each=60, size=(20, 24)):
    rng = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class {c}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"class {c}" / f"{i:03d}.png")
    return root


def test_folders_are_split(tmp_path):
    folder = make_folder(tmp_path / "all")
    train, held_out = (load_data(folder, 16, part) for part in (True, False))
    assert (len(train), len(held_out)) == (108, 12) and train.classes == ["class 0", "class 1"]
    assert not {s[0] for s in train.source.samples} & {s[0] for s in held_out.source.samples}
    assert "every tenth" in held_out.origin and held_out[11][1] == 1
    few = load_data(folder / "class 0", 16, False)
    assert len(few) == 60 and "too few" in few.origin, "a flat folder of one class, too small to hold any out"
    for part, n in (("train", 5), ("val", 3)):
        make_folder(tmp_path / "parts" / part, each=n)
    assert [len(load_data(tmp_path / "parts", 16, part)) for part in (True, False)] == [10, 6]


def test_recomputing_changes_nothing(monkeypatch):
    grads, plain, calls = [], fqgan.checkpoint, []
    monkeypatch.setattr(fqgan, "checkpoint", lambda *args, **options: calls.append(args) or plain(*args, **options))
    for recompute in (False, True):
        torch.manual_seed(0)
        model = FQGAN(FQGANConfig(**SMALL | dict(recompute=recompute)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sum(model(images_like(model.config))[1].values()).backward()
        grads.append([p.grad for p in model.parameters()])
        assert bool(calls) == recompute
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.compile, about checkpointing
@pytest.mark.parametrize("recompute", [False, True])
def test_models_compile_as_one_graph(recompute):
    """Nothing falls back to Python, which would be silent and slow; and the losses are the same."""
    torch.manual_seed(0)
    model, gpt = FQGAN(FQGANConfig(k=2, recompute=recompute, **SMALL)), small_gpt(dropout=0.0, label_dropout=0.0)
    images, labels = images_like(model.config), torch.tensor([1, 2])
    ids = torch.randint(0, gpt.config.vocab_size, (2, gpt.config.k, gpt.config.grid, gpt.config.grid))
    for module, arguments in ((model, (images,)), (gpt, (ids, labels))):
        module.train()
        plain, compiled = module(*arguments)[1], torch.compile(module, backend="aot_eager", fullgraph=True)(*arguments)[1]
        plain, compiled = (x if isinstance(x, dict) else {"loss": x} for x in (plain, compiled))
        assert nearly_same(plain, compiled)
        sum(compiled.values()).backward()


def test_crops():
    """Red tells a pixel's column, green its row: every view is where LlamaGen takes it, and mirrored when it should be."""
    plane = np.stack([*np.meshgrid(np.arange(200), np.arange(100)), np.zeros((100, 200))], 2).astype(np.uint8)
    image = Image.fromarray(plane)

    def corners(picture):  # left, right, top, bottom: the original's columns and rows
        pixels = np.asarray(picture, float)
        assert pixels.shape == (50, 50, 3)
        return np.array([pixels[:, 0, 0].mean(), pixels[:, -1, 0].mean(), pixels[0, :, 1].mean(), pixels[-1, :, 1].mean()])

    assert np.allclose(corners(fqgan.crop_square(image, 50)[0]), [50, 149, 0, 99], atol=2)
    assert np.allclose([corners(crop) for crop in fqgan.crop_square(image, 50, views=2)], [[50, 149, 0, 99], [149, 50, 0, 99]], atol=2)
    ten = fqgan.crop_square(image, 50, views=10)
    for view in range(10):  # of the central square, scaled to 55 pixels
        x, y = [(54.5, 4.5), (50, 0), (59, 0), (50, 9), (59, 9)][view % 5]
        left, right = (x, x + 90) if view < 5 else (x + 90, x)
        assert np.allclose(corners(ten[view]), [left, right, y, y + 90], atol=2), view
    drawn = np.stack([corners(*fqgan.crop_square(image, 50, rng=random.Random(i))) for i in range(300)])
    widths, mirrored = abs(drawn[:, 1] - drawn[:, 0]), drawn[:, 1] < drawn[:, 0]
    assert 77 <= widths.min() <= 83 and 95 <= widths.max() <= 101 and 0.4 < mirrored.mean() < 0.6, "0.8 to 1.0 of the shorter side"
    assert drawn[:, :2].min() < 15 and drawn[:, :2].max() > 185 and drawn[:, 2].max() > 12, "anywhere"
    small = np.asarray(fqgan.crop_square(image.resize((55, 52)), 50, rng=random.Random(0))[0])
    assert small[:, :, 0].max() - small[:, :, 0].min() > 170, "a small image is not enlarged: nothing is learned from blur"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    assert np.allclose(np.float32(fqgan.crop_square(noise, 50)[0]), np.float32(noise.reduce(2).reduce(2)), atol=2), "halved by box averages, as ADM does it"
    for strip in ((1, 60_000), (60_000, 1), (3, 100)):  # scaled whole, the first would have 960,000 x 16 pixels
        assert all(fqgan.crop_square(Image.new("RGB", strip), 16, rng=rng)[0].size == (16, 16) for rng in (None, random.Random(0)))


def test_unreadable_images(tmp_path, capsys):
    folder = make_folder(tmp_path / "f", classes=1, each=300)
    victim = load_data(folder, 16, True).source.samples[7][0]
    victim.write_bytes(victim.read_bytes()[:60])
    data = load_data(folder, 16, True)
    data.augment = False
    for _ in range(2):
        assert torch.equal(data[7][0], data[8][0]), "the next image stands in"
    assert data.unreadable == 1 and capsys.readouterr().err.count(victim.name) == 1, "named once"
    for path, _ in data.source.samples[20:40]:
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match="more than 1 %"):
        [data[i] for i in range(60)]
    with pytest.raises(UserError, match="more than 1 %"):  # raised in a worker process, it arrives as one line
        try:
            list(torch.utils.data.DataLoader(load_data(folder, 16, True), 10, num_workers=1))
        except UserError as error:
            assert str(error).strip().splitlines()[-1].startswith("fqgan.UserError: ")
            raise


def test_training_crops_are_drawn_and_repeatable(tmp_path):
    train, held_out = (load_data(make_folder(tmp_path / "f") if part else tmp_path / "f", 16, part) for part in (True, False))
    assert torch.equal(train[0, "a"][0], train[0, "a"][0]) and not torch.equal(train[0, "a"][0], train[0, "b"][0])
    assert torch.equal(held_out[0, "a"][0], held_out[0, "b"][0]), "held out: the center"


def test_torchvision_sets(monkeypatch):
    """Their two parts are told apart, by `train` or by `split`, whatever the parts are called."""
    class Named:
        classes = [("first", "one"), "second"]

        def __init__(self, root, part):
            self.part = part

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Image.new("RGB", (20, 20)), index % 2

    class ByTrain(Named):
        def __init__(self, root, train=True, download=False):
            super().__init__(root, train)

    class BySplit(Named):
        def __init__(self, root, split="train"):
            if split not in ("train", "test"):
                raise ValueError(split)
            super().__init__(root, split)

    for cls, parts in ((ByTrain, [True, False]), (BySplit, ["train", "test"])):
        monkeypatch.setattr(torchvision.datasets, cls.__name__, cls, raising=False)
        monkeypatch.setattr(torchvision.datasets, "__all__", [*torchvision.datasets.__all__, cls.__name__])
        sets = [load_data(cls.__name__.lower(), 16, train) for train in (True, False)]
        assert [data.source.part for data in sets] == parts and sets[0].classes == ["first, one", "second"] and sets[0][1][1] == 1


def test_no_data(tmp_path):
    make_folder(tmp_path / "parts" / "train", each=3)
    make_folder(tmp_path / "parts" / "val", classes=1, each=3)
    with pytest.raises(UserError, match="hold different class folders"):
        load_data(tmp_path / "parts", 16, True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "beside" / "folder").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "beside" / "a.png")
    for path, message in ((tmp_path / "empty", "empty holds no image"), (tmp_path / "beside", "the folders in .* hold no image"), (tmp_path / "file.txt", "is a file"),
                          (tmp_path / "missing", "no such folder"), ("~nobody's/x", "no such folder")):
        with pytest.raises(UserError, match=message):
            load_data(str(path), 16, True)


def test_order_is_the_same_on_any_number_of_ranks():
    def batches(rank, world, first=0, accumulate=1):
        run = type("Run", (), dict(rank=rank, world=world, seed=3, step=first, steps_total=9, batch_size=4, accumulate=accumulate))
        return list(train_tokenizer.Order(10, run))
    one = batches(0, 1)
    assert [sorted(a + b) for a, b in zip(batches(0, 2), batches(1, 2))] == [sorted(b) for b in one]
    assert batches(0, 1, first=5) == one[5:], "taken up at step 5"
    assert [a + b for a, b in zip(batches(0, 1, accumulate=2)[::2], batches(0, 1, accumulate=2)[1::2])] == one
    flat = [i for b in one for i, _ in b]
    assert sorted(flat[:10]) == list(range(10)) and sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:20]


# -----------------------------------------------------------------------------
# GPT


def small_gpt(k=2, **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(k=k, vocab_size=11, num_classes=5, grid=3) | SMALL_GPT | options)).eval()
    for output in model.outputs:  # they start at zero: nothing to compare
        torch.nn.init.normal_(output.weight, std=0.5)
    return model


def test_gpt_starts_at_the_entropy_of_a_guess():
    model = GPT(GPTConfig(k=3, vocab_size=11, num_classes=5, grid=3, **SMALL_GPT))
    ids = torch.randint(11, (2, 3, 3, 3))
    logits, loss = model(ids, torch.tensor([0, 4]))
    assert logits.shape == (2, 3, 9, 11) and math.isclose(loss.item(), math.log(11), rel_tol=1e-5)
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_dropout_is_on_in_training_only():
    model, ids, labels = small_gpt(dropout=0.5, label_dropout=0.0), torch.randint(11, (2, 2, 3, 3)), torch.tensor([0, 1])
    assert torch.equal(model(ids, labels)[0], model(ids, labels)[0])
    assert not torch.allclose(model.train()(ids, labels)[0], model(ids, labels)[0])


def test_gpt_loss_is_the_mean_cross_entropy():
    model, ids = small_gpt(), torch.randint(11, (2, 2, 3, 3))
    with torch.no_grad():
        logits, loss = model(ids, torch.tensor([0, 1]))
    by_hand = [-math.log(math.exp(logits[b, i, p, ids[b, i].flatten()[p]]) / sum(map(math.exp, logits[b, i, p].tolist())))
               for b in range(2) for i in range(2) for p in range(9)]
    assert math.isclose(loss.item(), sum(by_hand) / len(by_hand), rel_tol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gpt_is_causal(k):
    """A changed code changes later logits, none before it, nor its own."""
    model, ids, labels = small_gpt(k, head_layers=0 if k == 1 else 2), torch.randint(11, (1, k, 3, 3)), torch.tensor([2])
    before = model(ids, labels)[0]
    for i, p in itertools.product(range(k), (0, 4, 7)):
        changed = ids.clone()
        changed[0, i].view(-1)[p] = (changed[0, i].view(-1)[p] + 1) % 11
        moved = (model(changed, labels)[0] - before).abs().amax(-1)[0] > 1e-6  # (k, positions)
        assert not moved[:, :p].any() and not moved[:i + 1, p].any()
        assert moved[i + 1:, p].all() and moved[:, p + 1].all()


def test_rotary_table():
    """Row half, column half, and a class token without query and key."""
    table = fqgan.rotary_table(4, 8)
    assert table.shape == (2, 17, 8) and not table[:, 0].any()
    row, column, x = 2, 3, torch.randn(1, 1, 1, 8)
    at = 1 + row * 4 + column
    turned = fqgan.rotate(x, table[:, at:at + 1]).flatten()
    for pair, angle in enumerate([row * 1.0, row * 10000 ** -0.5, column * 1.0, column * 10000 ** -0.5]):
        a, b = x.flatten()[2 * pair:2 * pair + 2]
        assert math.isclose(turned[2 * pair], a * math.cos(angle) - b * math.sin(angle), abs_tol=1e-6)
        assert math.isclose(turned[2 * pair + 1], b * math.cos(angle) + a * math.sin(angle), abs_tol=1e-6)
    assert not fqgan.rotate(x, table[:, :1]).any()


def uncached(model, labels, cfg_scale, temperature, top_k, top_p, generator):
    """Sampling as one would write it first: the whole model for every code."""
    c, null = model.config, torch.full_like(labels, model.config.num_classes)
    ids = torch.zeros(len(labels), c.k, c.grid**2, dtype=torch.long)
    for p, i in itertools.product(range(c.grid**2), range(c.k)):
        so_far = ids[:, :, :p + 1]
        logits = model(so_far, labels)[0][:, i, p]
        if cfg_scale[i] > 1:
            without = model(so_far, null)[0][:, i, p]
            logits = without + cfg_scale[i] * (logits - without)
        ids[:, i, p] = fqgan.sample(logits, temperature[i], top_k[i], top_p[i], generator)
    return ids.unflatten(2, (c.grid, c.grid))


@pytest.mark.parametrize("k, head_layers", [(1, 0), (1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_cached_sampling_is_uncached_sampling(k, head_layers, cfg_scale):
    model, labels = small_gpt(k, head_layers=head_layers), torch.tensor([0, 3, 3])
    knobs = [cfg_scale] * k, [1.0] * k, [0] * k, [1.0] * k
    with torch.no_grad():
        plain = uncached(model, labels, *knobs, torch.Generator().manual_seed(1))
    ours = model.generate(labels, cfg_scale, generator=torch.Generator().manual_seed(1))
    assert ours.shape == (3, k, 3, 3) and torch.equal(ours, plain)
    again = model.generate(labels, cfg_scale, generator=torch.Generator().manual_seed(1))
    other = model.generate(labels, cfg_scale, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again, ours) and not torch.equal(other, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_multiply_alike_and_leave_no_trace(dtype):
    """Of any number of rows, none included; also when sampling is broken off."""
    model = small_gpt(n_embd=64).to(dtype).train()
    for rows in (1, 3, 8, 300):
        x = torch.randn(rows, 1, 64).to(dtype)
        plain = [block.mlp(x) for block in model.trunk]
        with contextlib.suppress(KeyboardInterrupt), torch.no_grad(), fqgan.sampling(model, rows):
            assert not model.training
            assert dtype == torch.bfloat16 or not torch.backends.mkldnn.is_available() or "forward" in vars(model.trunk[0].mlp.w1), "packed at all"
            packed = [block.mlp(x) for block in model.trunk]
            raise KeyboardInterrupt
        assert all(torch.allclose(a, b, atol=1e-5 if dtype == torch.float32 else 2e-2) for a, b in zip(plain, packed))
        assert model.training and not any("forward" in vars(m) for m in model.modules())
    assert model.generate(torch.arange(0), cfg_scale=2.0).shape == (0, 2, 3, 3)


def test_knobs_of_each_code():
    model, labels = small_gpt(3), torch.arange(5)
    knobs = [1.0, 3.0, 1.5], [1.0, 0.0, 0.7], [0, 0, 4], [0.8, 1.0, 1.0]
    with torch.no_grad():
        plain = uncached(model, labels, *knobs, torch.Generator().manual_seed(1))
    assert torch.equal(model.generate(labels, *knobs, generator=torch.Generator().manual_seed(1)), plain)
    greedy = model.generate(labels, 2.0, temperature=0)
    assert torch.equal(greedy, model.generate(labels, 2.0, top_k=1)), "one code left is the likeliest"
    model.train()
    assert torch.equal(model.generate(labels, 2.0, temperature=0), greedy) and model.training, "dropout is off, the mode is given back"
    for bad in (dict(cfg_scale=[1.0, 2.0]), dict(temperature=-1), dict(top_p=0.0), dict(top_k=[1, 2, 3, 4]), dict(temperature=[1.0, math.nan, 1.0]), dict(cfg_scale=math.inf)):
        with pytest.raises(UserError, match=next(iter(bad))):
            model.generate(labels, **bad)
    assert torch.equal(model.generate(labels, 2.0, temperature=1e-45), greedy), "no overflow"
    with pytest.raises(UserError, match="labels run from 6"):
        model.generate(torch.tensor([6]))


def test_sample_one_token():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)

    def shares(**knobs):
        return torch.bincount(fqgan.sample(p, generator=torch.Generator().manual_seed(0), **knobs), minlength=4) / 4000
    assert torch.allclose(shares(), p[0].exp(), atol=0.03)
    assert torch.allclose(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert torch.allclose(shares(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03), "the one that crosses p is kept"
    assert torch.allclose(shares(temperature=0.5), F.normalize(p[0].exp() ** 2, p=1, dim=0), atol=0.03)
    assert shares(temperature=0)[0] == 1
    sharp = F.normalize(p[0].exp()[:2] ** 2, p=1, dim=0)  # 0.74, 0.26: of all four 0.68, 0.25: by that order top-p keeps one
    assert sharp[0] > 0.7 and shares(temperature=0.5, top_k=2, top_p=0.7)[0] == 1, "temperature, then top-k, then top-p of what is left"


def test_null_class_replaces_labels_in_training():
    model = small_gpt(1, label_dropout=0.5, dropout=0.0).train()
    ids = torch.randint(11, (1, 1, 3, 3)).expand(400, -1, -1, -1)
    labels = torch.full((400,), 2)
    logits = model(ids, labels)[0][:, 0, 0]
    null = model.eval()(ids[:1], torch.tensor([5]))[0][0, 0, 0]
    share = torch.isclose(logits, null, atol=1e-5).all(1).float().mean()
    assert 0.4 < share < 0.6


# -----------------------------------------------------------------------------
# Scripts


def test_both_scripts_make_what_they_say(trained, capsys):
    out = trained
    assert sorted(p.name for p in out.iterdir()) == ["gpt.1.pt", "gpt.pt", "gpt_log.csv", "gpt_log.png", "log.csv", "log.png", "recon.png", "samples.png", "tokenizer.1.pt", "tokenizer.pt",
                                                      "tokens_train.json", "tokens_train.npy", "tokens_val.json", "tokens_val.npy"]
    rows = log_of(out / "log.csv")
    assert [r["step"] for r in rows] == ["1", "2", "2", "3", "4", "4"] and float(rows[-1]["val_psnr"]) > 3
    assert all(math.isclose(float(r["loss"]), sum(float(r[n]) for n in ("reconstruct", "codebook", "commit", "entropy", "disentangle")), rel_tol=1e-3)
               for r in rows if r["loss"])
    assert Image.open(out / "log.png").size == (3 * 340, 4 * 200), "eleven figures: loss and its five terms, usage, perplexity, and three of the evaluation"
    model = fqgan.load_tokenizer(out / "tokenizer.pt")
    assert not model.training and model.config.k == 2 and Image.open(out / "recon.png").height > 4 * 96
    gpt, tokenizer, classes = sample.load_generator(out / "gpt.pt")
    assert gpt.config.num_classes == 10 and classes[4] == "star" and gpt.config.grid == 4
    data = load_data("shapes", 16, False)
    images = torch.stack([data[i][0] for i in range(8)])
    ids = model.encode(images)
    assert torch.equal(ids, tokenizer.encode(images)), "the GPT's checkpoint holds its tokenizer"
    tokens = np.load(out / "tokens_val.npy")
    assert tokens["ids"].dtype == np.uint8 and tokens["done"].all() and np.array_equal(tokens["ids"][:8, 0], ids.numpy())
    assert tokens["label"][:10].tolist() == list(range(10))


def plain_run(pairs, add_gradients, size):
    """
    Four steps of 8 in two halves, as the flags below ask for: two of warm-up to 1e-2, then half a cosine down to a tenth; gradients of a norm
    of at most 0.05. pairs: (module, optimizer); add_gradients(indices, step) those of half a batch. -> the first module's moving average.
    """
    ema, order = copy.deepcopy(pairs[0][0]), np.random.default_rng([0, 0]).permutation(size)
    for step, lr in enumerate((0.005, 0.01, 0.01, 0.0055)):
        for indices in order[8 * step:8 * step + 8].reshape(2, 4):
            add_gradients(indices.tolist(), step)
        for module, optimizer in pairs:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
            assert norm > 0.1 or not gradients, "else clipping is not tested"
            for g in gradients:
                g.mul_(0.05 / (norm + 1e-6))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.9, (step + 1) / (step + 11))
        for slow, fast in zip(ema.parameters(), pairs[0][0].parameters()):
            slow.data.mul_(decay).add_(fast.data, alpha=1 - decay)
    return ema.eval()


PLAIN_RUN = ["--warmup", 2, "--final-lr", 0.1, "--lr", 0.01, "--grad-clip", 0.05, "--ema", 0.9, "--accumulate", 2, "--workers", 0]


def moments(state):
    """An optimizer's state as one dict, its order that of the parameter groups."""
    return {f"{i} {n}": torch.as_tensor(t).float() for i, kept in state["state"].items() for n, t in kept.items()}


def assert_plain(state, pairs, names, ema):
    for (module, optimizer), (module_name, optimizer_name) in zip(pairs, names):
        assert nearly_same(state[module_name], module.state_dict()), module_name
        assert nearly_same(moments(state[optimizer_name]), moments(optimizer.state_dict())), optimizer_name
    assert nearly_same(state["ema"], ema.state_dict()) and not nearly_same(state["ema"], state["model"])


def test_training_the_tokenizer_is_its_plain_loop(tmp_path, monkeypatch):
    """Learning rate, accumulation, clipping, moving average, every term with its weight and its start; evaluated and loaded is the average."""
    class Distance(torch.nn.Module):  # stands in for LPIPS
        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3))

    monkeypatch.setattr(train_tokenizer, "LPIPS", Distance)
    call(train_tokenizer, "--k", 2, "--out", tmp_path, *TINY_RUN, *PLAIN_RUN, "--image-size", 24, "--perceptual-weight", 0.7, "--disc-weight", 0.5, "--disc-start", 2,
         "--entropy-final", 0.03, "--commit-weight", 0.4, "--disentangle-weight", 0.2, "--entropy-weight", 0.05, "--eval-every", 4)
    state, data = load(tmp_path / "tokenizer.pt"), load_data("shapes", 24, True)
    torch.manual_seed(0)
    model, disc = FQGAN(FQGANConfig(**state["config"])), fqgan.Discriminator()
    optimizers = [torch.optim.Adam(m.parameters(), betas=(0.9, 0.95), fused=True) for m in (model, disc)]

    def add_gradients(indices, step):
        images = torch.stack([data[i][0] for i in indices])
        painted, losses = model(images)
        losses["entropy"] = losses["entropy"] * 0.03 ** (step / 4)
        loss = sum(losses.values()) + 0.7 * Distance()(images, painted).mean()
        if step >= 2:
            loss = loss - 0.5 * disc(painted).mean()
        (loss / 2).backward(inputs=list(model.parameters()))
        if step >= 2:
            real, fake = disc(images), disc(painted.detach())
            (0.5 * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2).backward()

    pairs = list(zip((model, disc), optimizers))
    ema = plain_run(pairs, add_gradients, len(data))
    assert_plain(state, pairs, (("model", "optimizer"), ("discriminator", "disc_optimizer")), ema)
    loaded, held_out = fqgan.load_tokenizer(tmp_path / "tokenizer.pt"), load_data("shapes", 24, False)
    assert same(dict(loaded.state_dict()), state["ema"])
    images = torch.stack([held_out[i][0] for i in train_tokenizer.fixed_draw(held_out)[:16]])
    rows = log_of(tmp_path / "log.csv")
    assert math.isclose(float(rows[-1]["val_psnr"]), train_tokenizer.psnr(images, loaded.decode(loaded.encode(images))).mean(), rel_tol=1e-4)
    assert [float(r["lr"]) for r in rows if r["loss"]] == [0.005, 0.01, 0.01, 0.0055]


def test_training_the_gpt_is_its_plain_loop(tmp_path, trained):
    """Also the weight decay, of matrices only; evaluated and loaded is the average."""
    tokenizer = trained / "tokenizer.pt"
    call(train_gpt, "--out", tmp_path, "--tokenizer", tokenizer, *TINY_GPT_RUN, *PLAIN_RUN, "--label-dropout", 0, "--eval-every", 4, "--data", make_folder(tmp_path / "images"))
    state, tokens, held_out = load(tmp_path / "gpt.pt"), *(np.load(tmp_path / f"tokens_{part}.npy") for part in ("train", "val"))
    torch.manual_seed(0)
    fqgan.load_tokenizer(tokenizer)
    model = GPT(GPTConfig(**state["config"]))
    decayed, free = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=0.05), dict(params=free, weight_decay=0)], betas=(0.9, 0.95))

    def batch(records):
        return torch.from_numpy(records["ids"][:, 0].astype(np.int64)), torch.from_numpy(records["label"].astype(np.int64))

    def add_gradients(indices, step):
        (model(*batch(tokens[indices]))[1] / 2).backward()

    ema = plain_run([(model, optimizer)], add_gradients, len(tokens))
    assert_plain(state, [(model, optimizer)], [("model", "optimizer")], ema)
    loaded = fqgan.load_gpt(tmp_path / "gpt.pt")
    assert same(dict(loaded.state_dict()), state["ema"])
    rows = log_of(tmp_path / "gpt_log.csv")
    expected = loaded(*batch(held_out[train_tokenizer.fixed_draw(held_out)[:16]]))[1].item()
    assert math.isclose(float(rows[-1]["val_loss"]), expected, rel_tol=1e-4) and not math.isclose(float(rows[-1]["val_loss_1"]), expected, rel_tol=1e-6)


def test_steps_follow_from_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer.Run, "loop", lambda run, *_: (_ for _ in ()).throw(UserError(f"{run.steps_total} steps")))
    with pytest.raises(UserError, match="^7500 steps"):
        call(train_tokenizer, "--out", tmp_path, *as_flags(SMALL), "--device", "cpu", "--batch-size", 8, "--epochs", 3)


def interrupted_after(monkeypatch, saves):
    """Makes the run die right after its n-th checkpoint, as a power cut would."""
    save, left = train_tokenizer.save_checkpoint, itertools.count(saves - 1, -1)

    def save_and_die(*args, **options):
        save(*args, **options)
        if next(left) == 0:
            raise KeyboardInterrupt
    monkeypatch.setattr(train_tokenizer, "save_checkpoint", save_and_die)


def training_rows(path):
    """A log's rows without those of evaluations, which a run that dies between checkpoint and evaluation leaves out."""
    return [{n: v for n, v in row.items() if v} for row in log_of(path) if row["loss"]]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[n], b[n]) for n in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("script, options", [
    (train_tokenizer, ["--k", 2, "--image-size", 24, "--disc-weight", 0.5, "--disc-start", 2, "--ema", 0.9, "--accumulate", 2, "--log-every", 3, "--warmup", 2, "--final-lr", 0.1]),
    (train_gpt, ["--ema", 0.9, "--dropout", 0.1, "--crops", 2])])
def test_resumed_is_unbroken(script, options, tmp_path, trained, monkeypatch):
    """Weights, both optimizers, moving average, log of training: to the bit, also when the log's window was cut in two."""
    if script is train_gpt:
        options = [*options, "--tokenizer", trained / "tokenizer.pt", "--data", make_folder(tmp_path / "images")]
    name, log = ("tokenizer.pt", "log.csv") if script is train_tokenizer else ("gpt.pt", "gpt_log.csv")
    flags = [*(TINY_RUN if script is train_tokenizer else TINY_GPT_RUN), *options]
    call(script, "--out", tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(patch, 1)
        call(script, "--out", tmp_path / "cut", *flags)
    (tmp_path / "cut" / log).open("a").write("3,0.1\n")  # a row written after the checkpoint that the run goes back to
    call(script, "--out", tmp_path / "cut", "--resume")
    whole, cut = (load(tmp_path / f / name) for f in ("whole", "cut"))
    for part in whole.keys() - {"settings"}:
        assert same(whole[part], cut[part]), part
    assert training_rows(tmp_path / "whole" / log) == training_rows(tmp_path / "cut" / log) and "val" in (tmp_path / "cut" / log).read_text()


def test_resume_and_overwrite(tmp_path, trained):
    flags = ["--k", 1, "--out", tmp_path, *TINY_RUN]
    call(train_tokenizer, *flags)
    before = (tmp_path / "tokenizer.pt").read_bytes()
    for argv, message in [(flags, "--resume continues that run, --overwrite replaces it"),
                          (["--out", tmp_path, "--resume"], "already at step 4 of 4"),
                          ([*flags, "--resume", "--lr", 0.5], r"--lr 0.002 \(now 0.5\)"),
                          (["--out", tmp_path / "none", "--resume"], "no tokenizer checkpoint at")]:
        with pytest.raises(UserError, match=message):
            call(train_tokenizer, *argv)
    assert (tmp_path / "tokenizer.pt").read_bytes() == before, "nothing is overwritten unless told so"
    call(train_tokenizer, "--out", tmp_path, "--resume", "--overwrite", "--steps", 6)
    assert load(tmp_path / "tokenizer.pt")["step"] == 6
    with pytest.raises(UserError, match=r"made with --epochs 40.0 \(now 0.003\), --steps 6 \(now 0\): leave"):  # and nothing of a preset that nobody named
        call(train_tokenizer, "--out", tmp_path, "--resume", "--epochs", 0.003)
    call(train_tokenizer, "--out", tmp_path, "--resume", "--overwrite", "--epochs", 0.003)
    assert load(tmp_path / "tokenizer.pt")["step"] == 8 and load(tmp_path / "tokenizer.pt")["settings"]["image_size"] == 16
    with pytest.raises(UserError, match="a run goes on with the model that it began with"):
        call(train_tokenizer, "--out", tmp_path, "--resume", "--overwrite", "--init", trained / "tokenizer.pt")
    call(train_tokenizer, *flags, "--overwrite")
    assert load(tmp_path / "tokenizer.pt")["step"] == 4


def weights(path):
    return load(path)["model"]


def nearly_same(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=2e-5) for n in a)


def same_moments(*paths):
    """Whether two runs' optimizers have seen the same gradients: within 2 % of the largest."""
    for x, y in zip(*(load(path)["optimizer"]["state"].values() for path in paths), strict=True):
        if not torch.allclose(x["exp_avg"], y["exp_avg"], atol=0.02 * x["exp_avg"].abs().max().item()):
            return False
    return True


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_one(ranks, tmp_path):
    """
    The same global batch gives the same weights and, which would show a factor that Adam hides, the same moments; also in two parts a rank. Off
    for it is what is computed on a rank's own batch: the entropy of the mean assignment (as in the official code) and the discriminator's BatchNorm.
    """
    flags = ["train_tokenizer.py", *TINY_RUN, "--k", 2, "--entropy-weight", 0, "--batch-size", 12, "--grad-clip", 0]  # 16 images to evaluate: not as many for each of 3
    call(train_tokenizer, *flags[1:], "--out", tmp_path / "one")
    shell(*flags, "--out", tmp_path / "many", "--accumulate", 2, ranks=ranks)
    assert same_moments(*(tmp_path / n / "tokenizer.pt" for n in ("one", "many")))
    assert nearly_same(*(weights(tmp_path / n / "tokenizer.pt") for n in ("one", "many")))
    rows = [log_of(tmp_path / n / "log.csv") for n in ("one", "many")]
    assert len(rows[0]) == len(rows[1])
    for x, y in zip(*rows):  # the codes' counts are added up over the ranks
        assert x["step"] == y["step"] and all(math.isclose(float(x[n]), float(y[n]), rel_tol=0.05) for n in x if x[n])

    gpt = ["train_gpt.py", *TINY_GPT_RUN, "--tokenizer", tmp_path / "one" / "tokenizer.pt", "--label-dropout", 0, "--batch-size", 12, "--grad-clip", 0, "--data", make_folder(tmp_path / "images")]
    call(train_gpt, *gpt[1:], "--out", tmp_path / "one")
    shell(*gpt, "--out", tmp_path / "many", "--accumulate", 2, ranks=ranks)
    rows = [log_of(tmp_path / n / "gpt_log.csv") for n in ("one", "many")]
    assert all(math.isclose(float(x["val_loss"]), float(y["val_loss"]), rel_tol=1e-4) for x, y in zip(*rows, strict=True) if x["val_loss"])
    assert same_moments(*(tmp_path / n / "gpt.pt" for n in ("one", "many")))
    assert np.array_equal(*(np.load(tmp_path / n / "tokens_train.npy") for n in ("one", "many"))), "each encodes its share"
    assert nearly_same(*(weights(tmp_path / n / "gpt.pt") for n in ("one", "many")))


def test_sharded_over_ranks_is_one_process(tmp_path, trained):
    """FSDP: the same weights and moving average; its checkpoint goes on in one process, and one process's with it."""
    flags = ["train_gpt.py", *TINY_GPT_RUN, "--tokenizer", trained / "tokenizer.pt", "--label-dropout", 0, "--ema", 0.9, "--accumulate", 2, "--eval-images", 15, "--data", make_folder(tmp_path / "images")]
    folders = one, sharded = tmp_path / "one", tmp_path / "sharded"
    call(train_gpt, *flags[1:], "--out", one)
    told = shell(*flags, "--out", sharded, "--fsdp", ranks=2)
    assert nearly_same(*(weights(f / "gpt.pt") for f in folders)) and (sharded / "samples.png").is_file()
    assert nearly_same(*(load(f / "gpt.pt")["ema"] for f in folders))
    for a, b in zip(*(load(f / "gpt.pt")["optimizer"]["state"].values() for f in folders), strict=True):
        assert nearly_same(a, b)
    (one / "gpt.pt").rename(one / "swapped.pt")
    (sharded / "gpt.pt").rename(one / "gpt.pt")
    (one / "swapped.pt").rename(sharded / "gpt.pt")
    more = ["--resume", "--overwrite", "--steps", 6]
    call(train_gpt, "--out", one, *more, "--no-fsdp")
    told = shell("train_gpt.py", "--out", sharded, *more, "--fsdp", "--eval-images", 1, ranks=2)
    assert "resumed on 2 processes, begun on 1: the same batches" in told.stdout
    assert nearly_same(*(weights(f / "gpt.pt") for f in folders)) and fqgan.load_gpt(sharded / "gpt.pt")


def test_one_failing_rank_ends_all(tmp_path):
    """With its line, at once, not after the others have waited for it in vain."""
    (tmp_path / "fail.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + """
import os, train_tokenizer
from fqgan import UserError
def fail(*_):
    raise UserError("a disk has gone")
if os.environ["RANK"] == "1":
    train_tokenizer.Run.update = fail
train_tokenizer.cli(train_tokenizer.main)
""")
    began = time.time()
    told = shell(tmp_path / "fail.py", *TINY_RUN, "--out", tmp_path / "out", ranks=2, check=False)
    assert told.returncode != 0 and "fail.py: a disk has gone" in told.stderr and time.time() - began < 60


def test_two_ranks_with_an_adversary_then_one(tmp_path):
    """Two discriminator passes before one backward pass, on two processes; then taken up by a single one."""
    first = shell("train_tokenizer.py", *TINY_RUN, "--out", tmp_path, "--image-size", 24, "--disc-weight", 0.5, "--disc-start", 1, "--accumulate", 2, ranks=2)
    assert "step 1/" in first.stdout and first.stdout.count("| discriminator") == 3, "on from the second step"
    call(train_tokenizer, "--out", tmp_path, "--resume", "--overwrite", "--steps", 6)
    state = load(tmp_path / "tokenizer.pt")
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["discriminator"].values())


@pytest.mark.parametrize("ranks, workers, kind", [(0, 2, signal.SIGINT), (2, 0, signal.SIGTERM)])
def test_a_signal_saves_and_the_run_goes_on(ranks, workers, kind, tmp_path):
    """Also where the whole process group gets it: workers, the launcher and all ranks."""
    flags = ["train_tokenizer.py", "--k", "2", "--out", tmp_path, *TINY_RUN, "--steps", 100000, "--eval-every", 100000, "--workers", workers]
    process = subprocess.Popen(shell_words(ranks, *flags), cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=SHELL)
    for line in process.stdout:
        if line.startswith("step 3/"):
            os.killpg(process.pid, kind)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and (ranks or process.returncode == 130 and err == "") and "--resume goes on from here" in out, err
    state = load(tmp_path / "tokenizer.pt")
    assert state["step"] >= 3
    call(train_tokenizer, "--out", tmp_path, "--resume", "--overwrite", "--steps", state["step"] + 2)


def test_token_cache(tmp_path, trained):
    """Cut off, it is finished; of another tokenizer, data or number of crops, it is refused."""
    flags = [*TINY_GPT_RUN, "--tokenizer", trained / "tokenizer.pt", "--out", tmp_path, "--data", make_folder(tmp_path / "images")]
    call(train_gpt, *flags)
    whole = np.load(tmp_path / "tokens_train.npy")
    assert len(whole) == 108
    cut = np.load(tmp_path / "tokens_train.npy", mmap_mode="r+")
    cut[50:] = 0
    cut["label"][0] = 77
    cut.flush()
    os.truncate(tmp_path / "tokens_train.npy", (tmp_path / "tokens_train.npy").stat().st_size - 80 * whole.itemsize - whole.itemsize // 2)
    note = tmp_path / "tokens_train.json"
    note.write_text(json.dumps({n: v for n, v in json.loads(note.read_text()).items() if n != "whole"}))
    (tmp_path / "gpt.pt").unlink()
    call(train_gpt, *flags)
    finished = np.load(tmp_path / "tokens_train.npy")
    assert np.array_equal(finished[1:], whole[1:]) and finished["label"][0] == 77, "what was there is not made again"
    model = load(trained / "tokenizer.pt")
    model["model"]["post_quant_conv.bias"] += 1e-3
    torch.save(model, tmp_path / "other.pt")
    for change, message in ((["--crops", 2], "another crops"), (["--data", "shapes"], "another .*data"), (["--tokenizer", tmp_path / "other.pt"], "another tokenizer:")):
        (tmp_path / "gpt.pt").unlink(missing_ok=True)
        with pytest.raises(UserError, match=message):
            call(train_gpt, *flags, *change)
    first = tmp_path / "images" / "class 0" / "000.png"
    renamed = first.rename(first.with_name("0.png"))
    with pytest.raises(UserError, match="another names:"):
        call(train_gpt, *flags)
    renamed.rename(first)
    call(train_gpt, *flags, "--crops", 2, "--overwrite")
    two = np.load(tmp_path / "tokens_train.npy")
    assert two["ids"].shape[1] == 2 and np.array_equal(two["ids"][:, 0], whole["ids"][:, 0]) and (two["ids"][:, 1] != two["ids"][:, 0]).any()
    (tmp_path / "gpt.pt").unlink()
    os.truncate(tmp_path / "tokens_train.npy", 1000)
    with pytest.raises(UserError, match="tokens_train.npy cannot be read .*: delete it, and it is made anew"):
        call(train_gpt, *flags, "--crops", 2)
    tokens = train_gpt.Tokens.__new__(train_gpt.Tokens)
    vars(tokens).update(records=two)
    drawn = {next(view for view in (0, 1) if np.array_equal(tokens[5, f"0 {epoch}"][0], two["ids"][5, view])) for epoch in range(30)}
    assert drawn == {0, 1} and np.array_equal(tokens[5][0], two["ids"][5, 0]), "training sees every view"


def test_knobs_and_classes_reach_the_model(tmp_path, trained, monkeypatch):
    asked, plain = [], GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda model, labels, *knobs: asked.append((labels.tolist(), *knobs[:-1])) or plain(model, labels, *knobs))
    call(sample, "--gpt", trained / "gpt.pt", "--device", "cpu", "--out", tmp_path / "grid.png", "--classes", "star,0", "--n", 3, "--batch-size", 2,
         "--cfg-scale", 3, "--temperature", "0.7,0.8", "--top-k", "5,8", "--top-p", 0.9)
    assert asked == [([4, 0], 3.0, [0.7, 0.8], [5, 8], 0.9), ([4], 3.0, [0.7, 0.8], [5, 8], 0.9)]


def test_sample_grid_and_files(tmp_path, trained, capsys):
    flags = ["--gpt", trained / "gpt.pt", "--device", "cpu", "--dtype", "float32"]
    call(sample, *flags, "--out", tmp_path / "grid.jpg", "--classes", "star,0", "--n", 6, "--top-k", "5,8")
    assert Image.open(tmp_path / "grid.jpg").height == 4 + 2 * 100
    files = tmp_path / "files"
    call(sample, *flags, "--out", files, "--n", 23, "--batch-size", 5)
    names = sorted(p.name for p in files.glob("*.png"))
    assert len(names) == 23 and names[12] == "000012_class2.png"
    pixels = {n: (files / n).read_bytes() for n in names}
    for n in names[7:9]:
        (files / n).unlink()
    capsys.readouterr()
    call(sample, *flags, "--out", files, "--n", 23, "--batch-size", 5, "--npz", tmp_path / "all.npz")
    assert "4 of 5 batches are there" in capsys.readouterr().out
    assert pixels == {n: (files / n).read_bytes() for n in names}, "made again, they come out the same"
    packed = np.load(tmp_path / "all.npz")["arr_0"]
    Image.new("RGB", (24, 16)).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match="odd.png is 24x16, the first 16x16: remove it"):
        sample.pack(tmp_path / "odd.npz", [files / names[0], tmp_path / "odd.png"])
    assert packed.shape == (23, 16, 16, 3) and packed.dtype == np.uint8 and np.array_equal(packed[12], np.asarray(Image.open(files / names[12])))
    with pytest.raises(UserError, match=r"samples made with --gpt-file .* \(now "):
        os.utime(trained / "gpt.pt", ns=(0, state := (trained / "gpt.pt").stat().st_mtime_ns + 1))
        call(sample, *flags, "--out", files, "--n", 23, "--batch-size", 5)
    os.utime(trained / "gpt.pt", ns=(0, state - 1))
    with pytest.raises(UserError, match=r"samples made with --seed 0 \(now 1\)"):
        call(sample, *flags, "--out", files, "--n", 23, "--batch-size", 5, "--seed", 1)
    ranks = shell("sample.py", *flags, "--out", tmp_path / "ranks", "--count", 23, "--batch-size", 5, ranks=2)
    assert pixels == {p.name: p.read_bytes() for p in (tmp_path / "ranks").glob("*.png")}, "no gaps, no doubles, the same pictures"


def test_checkpoints_that_cannot_be_used(tmp_path, trained):
    good = (trained / "tokenizer.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    state = load(trained / "tokenizer.pt")
    torch.save(state | {"config": state["config"] | {"codebook_size": 64}}, tmp_path / "other.pt")
    torch.save(state | {"config": state["config"] | {"colour": "red"}}, tmp_path / "newer.pt")
    torch.save(state | {"config": state["config"] | {"teacher_widths": torch.zeros(1).expand(10**7, 10**6)}}, tmp_path / "endless.pt")
    torch.save({n: state[n] for n in state.keys() - {"config"}}, tmp_path / "bare.pt")

    torch.save({"kind": "tokenizer", "model": Hostile(tmp_path / "touched")}, tmp_path / "hostile.pt")
    for name, message in (("cut", "damaged, cut off"), ("text", "damaged"), ("list", "not a tokenizer checkpoint"), ("other", "do not fit"),
                          ("newer", "do not fit"), ("endless", "do not fit"), ("bare", "do not fit"), ("hostile", "damaged"), ("missing", "python train_tokenizer.py")):
        with pytest.raises(UserError, match=message) as error:
            fqgan.load_tokenizer(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)
    for name in ("newer", "endless", "bare", "hostile"):
        with pytest.raises(UserError):
            call(train_tokenizer, "--init", tmp_path / f"{name}.pt", "--out", tmp_path / "out")
    assert not (tmp_path / "touched").exists() and not (tmp_path / "out" / "tokenizer.pt").exists()
    state = load(trained / "gpt.pt")
    endless = state["tokenizer"] | {"config": state["tokenizer"]["config"] | {"teacher_widths": torch.zeros(1).expand(10**7, 10**6)}}
    for changed, message in (({"tokenizer": endless}, "no config of plain values"), ({"config": state["config"] | {"grid": 1000}}, "at most 256")):
        torch.save(state | changed, tmp_path / "gpt.pt")
        with pytest.raises(UserError, match=message):
            sample.load_generator(tmp_path / "gpt.pt")
    with pytest.raises(UserError, match="not a tokenizer checkpoint but a gpt's"):
        fqgan.load_tokenizer(trained / "gpt.pt")
    with pytest.raises(UserError, match="not a gpt checkpoint but a tokenizer's"):
        fqgan.load_gpt(trained / "tokenizer.pt")


def test_checkpoints_before_the_newest_are_kept(tmp_path):
    for step in range(5):
        train_tokenizer.save_checkpoint(tmp_path / "x.pt", {"step": step}, keep=2)
    assert {p.name: load(p)["step"] for p in tmp_path.iterdir()} == {"x.pt": 4, "x.1.pt": 3, "x.2.pt": 2}


def test_what_is_not_finite_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    """One bad step is named and changes no weight; ten in a row, not ten in all, end the run with the checkpoint before them intact."""
    from_step, plain = {3}, fqgan.disentangle_loss
    steps = itertools.count()
    monkeypatch.setattr(fqgan, "disentangle_loss", lambda q: plain(q) * (math.nan if next(steps) in from_step else 1))
    flags = ["--k", 2, *TINY_RUN, "--steps", 6, "--eval-every", 100]
    after = []
    with monkeypatch.context() as patch:
        update = train_tokenizer.Run.update
        patch.setattr(train_tokenizer.Run, "update", lambda run, *pairs: (update(run, *pairs), after.append(copy.deepcopy(pairs[0][0].state_dict()))))
        call(train_tokenizer, *flags, "--out", tmp_path / "once")
    assert capsys.readouterr().out.count("left out: disentangle not finite") == 1
    assert [same(dict(a), dict(b)) for a, b in zip(after, after[1:])] == [False, False, True, False, False], "the fourth step changes nothing, the others do"
    assert all(math.isfinite(float(r["loss"])) for r in log_of(tmp_path / "once" / "log.csv") if r["loss"] and r["step"] != "4")

    steps, from_step = itertools.count(), range(1, 60, 2)
    call(train_tokenizer, *flags, "--out", tmp_path / "often", "--steps", 24)
    steps, from_step = itertools.count(), range(2, 1000)
    with pytest.raises(UserError, match="10 steps in a row were not finite, step 12 the last: try a smaller --lr; the last checkpoint is from before them"):
        call(train_tokenizer, *flags, "--out", tmp_path / "ever", "--steps", 100, "--eval-every", 2)
    assert all(t.isfinite().all() for t in load(tmp_path / "ever" / "tokenizer.pt")["model"].values())


def test_float16_scales_its_gradients_and_resumes(tmp_path):
    flags = ["--k", 2, *TINY_RUN, "--dtype", "float16", "--steps", 4]
    call(train_tokenizer, *flags, "--out", tmp_path)
    state = load(tmp_path / "tokenizer.pt")
    assert state["scaler"]["scale"] > 1 and all(t.isfinite().all() for t in state["model"].values())
    call(train_tokenizer, "--out", tmp_path, "--resume", "--overwrite", "--steps", 5)


def test_collapsed_codebooks_are_said(capsys):
    """A run that has lost a codebook goes on without an error: the log must tell."""
    run = type("Run", (train_tokenizer.Run,), {"__init__": lambda self: None, "gather_window": lambda self: None, "write_row": lambda *_: None})()
    vars(run).update(step=10, log_every=10, steps_total=20, window={"counts": torch.tensor([[64, *[0] * 39], [9] * 40, [9] * 3 + [0] * 37])}, rank=0, first=0, batch_size=1, clock=0.0)
    run.log()
    assert "sub-codebook 1 has collapsed: perplexity 1.0" in (text := capsys.readouterr().out) and "sub-codebook 2" not in text
    assert "sub-codebook 3 is dying: perplexity 3.0" in text


def test_writing_fails_with_the_last_checkpoint_intact(tmp_path, monkeypatch):
    train_tokenizer.save_checkpoint(tmp_path / "x.pt", {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        train_tokenizer.save_checkpoint(tmp_path / "x.pt", {"step": 2})
    assert load(tmp_path / "x.pt") == {"step": 1} and len(list(tmp_path.iterdir())) == 1


def parser_of(script):
    """The parser of a script's command line."""
    class Found(Exception):
        pass

    def stop(parser, *_):
        raise Found(parser)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(train_tokenizer.Parser, "parse_args", stop)
        call(script)
    return found.value.args[0]


def test_the_commands_of_the_readme_are_valid(monkeypatch, tmp_path):
    """Their flags are known and fit each other; nothing is run."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sh\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    commands = [c.split("#")[0].replace("$seed", "0").replace('"${@:2}"', "").split() for block in blocks for line in block.splitlines() for c in line.split("&&")]
    found, scripts = collections.Counter(), {f"{s.__name__}.py": s for s in (train_tokenizer, train_gpt, sample, evaluate)}
    for words in commands:
        if words[:1] == ["row"]:  # of the study: a name, and flags of the tokenizer
            words[:2] = ["train_tokenizer.py"]
        name = next((w for w in words if w in scripts), None)
        argv = words[words.index(name) + 1:] if name else []
        if name in ("sample.py", "evaluate.py"):
            parser_of(scripts[name]).parse_args(argv)
            found[name] += 1
        elif name:
            config = FQGANConfig if name == "train_tokenizer.py" else GPTConfig
            if "--init" in argv:
                torch.save({"model": PublishedTokenizer(2).state}, argv[argv.index("--init") + 1])
            monkeypatch.setattr(sys, "argv", [name, *argv])
            groups = (train_tokenizer.StartConfig,) if name == "train_tokenizer.py" else (train_gpt.TokenConfig,)
            settings, _ = train_tokenizer.parse("", scripts[name].PRESETS, "tokenizer", config, train_tokenizer.TrainConfig, *groups)
            train_tokenizer.pick(config, settings)
            found[name] += 1
    assert len(found) == 4 and found.total() >= 20


@pytest.mark.parametrize("script, argv, message", [
    (train_tokenizer, ["--k", "0"], "k is 0"),
    (train_tokenizer, ["--k", "three"], "argument --k: invalid int value: 'three'"),
    (train_tokenizer, ["--preset", "huge"], "invalid choice: 'huge'"),
    (train_tokenizer, ["--image-size", "30"], "not divisible by downsample 4: 28 is"),
    (train_tokenizer, ["--image-size", "16", "--disc-weight", "1"], "too small for the discriminator"),
    (train_tokenizer, ["--image-size", "8", "--perceptual-weight", "1"], "too small for LPIPS: 16 or more"),
    (train_tokenizer, ["--data", "nowhere"], "no such folder"),
    (train_tokenizer, ["--batch-size", "30000"], "20000 images are fewer than one batch"),
    (train_tokenizer, ["--batch-size", "9", "--accumulate", "2"], "not divisible"),
    (train_tokenizer, ["--lr", "-1"], "--lr is -1.0"),
    (train_tokenizer, ["--dtype", "int8"], "choose float32, bfloat16, float16 or auto"),
    (train_tokenizer, ["--device", "tpu9"], "not usable here"),
    (train_tokenizer, ["--k", "2", "--colour", "red"], "unrecognized arguments: --colour red"),
    (train_tokenizer, ["--channel-mult", "1,x"], "argument --channel-mult: invalid whole_numbers value: '1,x'"),
    (train_gpt, [], "python train_tokenizer.py"),
    (train_gpt, ["--crops", "3"], "choose 1, 2 or 10"),
    (train_gpt, ["--tokenizer", "README.md"], "README.md cannot be read as a checkpoint"),
    (sample, ["--gpt", "nothing.pt"], "python train_gpt.py"),
    (sample, ["--n", "0"], "at least 1"),
    (sample, ["--top-k", "a"], "argument --top-k: invalid"),
    (evaluate, [], "no tokenizer checkpoint at out/tokenizer.pt: `python train_tokenizer.py` makes one"),
    (evaluate, ["--real", "a"], "--real and --fake go together"),
    (evaluate, ["--real", "a", "--fake", "b"], "no such file or folder"),
    (evaluate, ["--n", "0"], "at least 1"),
    (evaluate, ["--out", "results"], "name a picture"),
    (evaluate, ["--json", "nowhere/f.json"], "there is no folder nowhere"),
    (evaluate, ["--real", "a", "--fake", "b", "--n", "5"], "say nothing of")])
def test_a_mistake_gets_one_line(script, argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("hello")
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        train_tokenizer.cli(script.main)
    assert isinstance(stop.value.code, str) and message in stop.value.code and "\n" not in stop.value.code
    assert not [p for p in tmp_path.rglob("*.pt")], "nothing is written"


def test_out_of_memory_gets_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    with pytest.raises(SystemExit, match="^train_gpt.py: out of memory .CUDA out of memory. Tried[^\n]*: give a smaller --batch-size, .* .a tokenizer also takes --recompute.$"):
        train_tokenizer.cli(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has")))


def test_pictures_keep_their_shape(tmp_path):
    train_tokenizer.save_grid(tmp_path / "grid.png", [("a", torch.ones(2, 3, 20, 40)), ("b", -torch.ones(1, 3, 20, 40))])
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert pixels.shape[0] == 4 + 2 * (60 + 4) and (pixels[:, -60] == 255).all() and (pixels[4 + 64:-4, -220] == 0).all(), "three times 20 x 40, in two rows"


def test_more_mistakes(tmp_path, trained):
    (tmp_path / "file").write_text("x")
    for script, argv, message in [
            (train_tokenizer, ["--out", tmp_path / "file"], "cannot be made into a folder"),
            (sample, ["--gpt", trained / "gpt.pt", "--classes", "10"], "no class '10'; there are 0 to 9"),
            (sample, ["--gpt", trained / "gpt.pt", "--cfg-scale", "1,2,3"], "cfg_scale has 3 values; give one, or 2"),
            (sample, ["--gpt", trained / "tokenizer.pt"], "not a gpt checkpoint")]:
        with pytest.raises(UserError, match=message):
            call(script, *argv)
    call(train_tokenizer, "--k", 3, "--out", tmp_path / "k3", *TINY_RUN)
    with pytest.raises(UserError, match="trained for k 2, the tokenizer .* has k 3"):
        call(sample, "--gpt", trained / "gpt.pt", "--tokenizer", tmp_path / "k3" / "tokenizer.pt")
    result = shell("train_tokenizer.py", "--k", 0, check=False)
    assert result.returncode == 1 and result.stderr == "train_tokenizer.py: k is 0; it must be at least 1\n" and result.stdout == ""


# -----------------------------------------------------------------------------
# Published files: made up here in the published format, and run by the format's description instead of by our modules

G32 = dict(num_groups=32, eps=1e-6)


class Published:
    """Random weights under published names; `norm`, `conv`, ... are what the description says of a name."""

    def __init__(self):
        self.state = {}

    def add(self, name, *shape, bias=True):
        self.state[f"{name}.weight"] = torch.randn(shape) * (0.5 / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.2) + (len(shape) == 1)
        if bias:
            self.state[f"{name}.bias"] = 0.1 * torch.randn(shape[0])

    def get(self, name):
        return self.state[f"{name}.weight"], self.state.get(f"{name}.bias")

    def norm(self, name, x):
        return F.group_norm(x, weight=self.state[f"{name}.weight"], bias=self.state[f"{name}.bias"], **G32)

    def res(self, name, x):
        h = F.conv2d(F.silu(self.norm(f"{name}.norm1", x)), *self.get(f"{name}.conv1"), padding=1)
        h = F.conv2d(F.silu(self.norm(f"{name}.norm2", h)), *self.get(f"{name}.conv2"), padding=1)
        return h + (F.conv2d(x, *self.get(f"{name}.nin_shortcut")) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attn(self, name, x):
        q, k, v = (F.conv2d(self.norm(f"{name}.norm", x), *self.get(f"{name}.{n}")).flatten(2) for n in "qkv")
        y = v @ ((q.transpose(1, 2) @ k) / q.shape[1] ** 0.5).softmax(2).transpose(1, 2)
        return x + F.conv2d(y.view(x.shape), *self.get(f"{name}.proj_out"))

    def transformer(self, name, x, blocks, act=F.gelu):
        W = x.shape[-1]
        for i in range(blocks):
            n = f"{name}.{i}"
            h = F.layer_norm(x, (W,), *self.get(f"{n}.ln_1"))
            heads = 8 if act is F.gelu else W // 64
            q, k, v = F.linear(h, self.state[f"{n}.attn.in_proj_weight"], self.state[f"{n}.attn.in_proj_bias"]).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            y = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
            x = x + F.linear(y.transpose(1, 2).flatten(2), *self.get(f"{n}.attn.out_proj"))
            h = act(F.linear(F.layer_norm(x, (W,), *self.get(f"{n}.ln_2")), *self.get(f"{n}.mlp.c_fc")))
            x = x + F.linear(h, *self.get(f"{n}.mlp.c_proj"))
        return x

    def add_res(self, name, c_in, c_out):
        for part, shape in dict(norm1=(c_in,), conv1=(c_out, c_in, 3, 3), norm2=(c_out,), conv2=(c_out, c_out, 3, 3), **{"nin_shortcut": (c_out, c_in, 1, 1)} if c_in != c_out else {}).items():
            self.add(f"{name}.{part}", *shape)

    def add_attn(self, name, c):
        self.add(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            self.add(f"{name}.{part}", c, c, 1, 1)

    def add_blocks(self, name, W, n):
        for i in range(n):
            for part, shape in {"ln_1": (W,), "ln_2": (W,), "attn.out_proj": (W, W), "mlp.c_fc": (4 * W, W), "mlp.c_proj": (W, 4 * W)}.items():
                self.add(f"{name}.{i}.{part}", *shape)
            self.state |= {f"{name}.{i}.attn.in_proj_weight": torch.randn(3 * W, W) / W**0.5, f"{name}.{i}.attn.in_proj_bias": 0.1 * torch.randn(3 * W)}


class PublishedTokenizer(Published):
    def __init__(self, k, widths=(32, 32, 64), W=64, z=32, V=64, d=8, grid=4, depth=2):
        super().__init__()
        self.depth = depth
        torch.manual_seed(k)
        self.branches = {1: [""], 2: ["_vis", "_sem"], 3: ["_vis", "_sem_mid", "_sem_high"]}[k]
        self.adapters = {1: [None], 2: ["visual_head", "semantic_head"], 3: ["visual_head", "semantic_head_mid", "semantic_head_high"]}[k]
        self.heads = {1: {}, 2: {"feat_pred_head": 48}, 3: {"mid_sem_feat_pred": 24, "high_sem_feat_pred": 48}}[k]
        self.L, top, self.grid = len(widths), widths[-1], grid
        for side, inputs, blocks in (("encoder", [(widths[0], widths[0]), *zip(widths, widths[1:])], 2), ("decoder", [(top, top), *zip(widths[::-1], widths[-2::-1])], 3)):
            self.add(f"{side}.conv_in", *((widths[0], 3, 3, 3) if side == "encoder" else (top, z, 3, 3)))
            for level, (c_in, c_out) in enumerate(inputs):
                for i in range(blocks):
                    self.add_res(f"{side}.conv_blocks.{level}.res.{i}", c_in if i == 0 else c_out, c_out)
                    if level == (self.L - 1 if side == "encoder" else 0):
                        self.add_attn(f"{side}.conv_blocks.{level}.attn.{i}", c_out)
                if level < self.L - 1:
                    self.add(f"{side}.conv_blocks.{level}.{'down' if side == 'encoder' else 'up'}sample.conv", c_out, c_out, 3, 3)
            self.add_res(f"{side}.mid.0", top, top)
            self.add_attn(f"{side}.mid.1", top)
            self.add_res(f"{side}.mid.2", top, top)
        for b, adapter in zip(self.branches, self.adapters):
            if adapter:
                name = f"encoder.{adapter}.0"
                self.state[f"{name}.positional_embedding"] = torch.randn(grid**2, W)
                self.add(f"{name}.ln_pre", W)
                self.add(f"{name}.ln_post", W)
                self.add_blocks(f"{name}.transformer", W, depth)
            self.add(f"encoder.norm_out{b}", top)
            self.add(f"encoder.conv_out{b}", z, top, 3, 3)
            self.add(f"quant_conv{b}", d, z, 1, 1)
            self.add(f"quantize{b}.embedding", V, d, bias=False)
            self.state[f"quantize{b}.codebook_used"] = torch.zeros(65536)
        for head, width in self.heads.items():
            self.state |= {f"{head}.class_embedding": torch.randn(1, width), f"{head}.positional_embedding": torch.randn(grid**2 + 1, width)}
            for part, shape in {"upscale.0": (width, d), "upscale.2": (width, width), "ln_pre": (width,), "ln_post": (width,)}.items():
                self.add(f"{head}.{part}", *shape)
            self.add_blocks(f"{head}.transformer", width, 3)
        self.add("post_quant_conv", z, k * d, 1, 1)
        self.add("decoder.norm_out", widths[0])
        self.add("decoder.conv_out", 3, widths[0], 3, 3)

    def levels(self, side, x, blocks):
        for level in range(self.L):
            for i in range(blocks):
                x = self.res(f"{side}.conv_blocks.{level}.res.{i}", x)
                if f"{side}.conv_blocks.{level}.attn.{i}.q.weight" in self.state:
                    x = self.attn(f"{side}.conv_blocks.{level}.attn.{i}", x)
            if level < self.L - 1 and side == "encoder":
                x = F.conv2d(F.pad(x, (0, 1, 0, 1)), *self.get(f"{side}.conv_blocks.{level}.downsample.conv"), stride=2)
            elif level < self.L - 1:
                x = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), *self.get(f"{side}.conv_blocks.{level}.upsample.conv"), padding=1)
        return x

    def mid(self, side, x):
        return self.res(f"{side}.mid.2", self.attn(f"{side}.mid.1", self.res(f"{side}.mid.0", x)))

    def vectors(self, images):
        x, found = self.mid("encoder", self.levels("encoder", F.conv2d(images, *self.get("encoder.conv_in"), padding=1), 2)), []
        for b, adapter in zip(self.branches, self.adapters):
            h = x
            if adapter:
                name = f"encoder.{adapter}.0"
                t = x.flatten(2).transpose(1, 2) + self.state[f"{name}.positional_embedding"]
                t = self.transformer(f"{name}.transformer", F.layer_norm(t, t.shape[2:], *self.get(f"{name}.ln_pre")), self.depth)
                h = F.layer_norm(t, t.shape[2:], *self.get(f"{name}.ln_post")).transpose(1, 2).reshape(x.shape)
            h = F.conv2d(F.silu(self.norm(f"encoder.norm_out{b}", h)), *self.get(f"encoder.conv_out{b}"), padding=1)
            found.append(F.conv2d(h, *self.get(f"quant_conv{b}")))
        return found

    def codes(self):
        return [F.normalize(self.state[f"quantize{b}.embedding.weight"], dim=1) for b in self.branches]

    def encode(self, images):
        return torch.stack([torch.cdist(F.normalize(h.float(), dim=1).permute(0, 2, 3, 1), codes).argmin(-1) for h, codes in zip(self.vectors(images), self.codes())], 1)

    def decode(self, ids):
        return self.paint([codes[ids[:, i]].permute(0, 3, 1, 2) for i, codes in enumerate(self.codes())])

    def paint(self, codes):
        x = F.conv2d(F.conv2d(torch.cat(codes, 1), *self.get("post_quant_conv")), *self.get("decoder.conv_in"), padding=1)
        x = self.levels("decoder", self.mid("decoder", x), 3)
        return F.conv2d(F.silu(self.norm("decoder.norm_out", x)), *self.get("decoder.conv_out"), padding=1)

    def feature(self, head, quantized):
        x = F.linear(F.relu(F.linear(quantized.flatten(2).transpose(1, 2), *self.get(f"{head}.upscale.0"))), *self.get(f"{head}.upscale.2"))
        x = torch.cat([self.state[f"{head}.class_embedding"].expand(len(x), 1, -1), x], 1) + self.state[f"{head}.positional_embedding"]
        x = self.transformer(f"{head}.transformer", F.layer_norm(x, x.shape[2:], *self.get(f"{head}.ln_pre")), 3)
        return F.layer_norm(x, x.shape[2:], *self.get(f"{head}.ln_post"))[:, 0]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_published_tokenizers(k, tmp_path):
    """Same ids, same pixels, same predicted features, from the file as its authors write it."""
    made = PublishedTokenizer(k)
    torch.save({"model": {n: torch.zeros_like(t) for n, t in made.state.items()}, "ema": made.state, "steps": 3, "optimizer": {"state": {}},
                "args": argparse.Namespace(image_size=256, vq_model="VQ-16")}, tmp_path / "published.pt")
    model = fqgan.load_tokenizer(tmp_path / "published.pt")
    c = model.config
    assert (c.k, c.codebook_size, c.codebook_dim, c.downsample, c.adapter_depth) == (k, 64, 8, 4, 2 if k > 1 else 0)
    assert c.image_size == (16 if k > 1 else 256) and len(model.state_dict()) == sum(
        not n.endswith("codebook_used") for n in made.state) - 4 * sum(".q." in n for n in made.state) // 2, "q, k, v are one layer here"
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    ids = made.encode(images)
    assert torch.equal(model.encode(images), ids) and len(ids.unique()) > 5
    assert torch.allclose(model.decode(ids), made.decode(ids), atol=1e-4)
    for (head, width), branch in zip(made.heads.items(), model.branches[1:]):
        z = torch.randn(2, 8, 4, 4)
        assert torch.allclose(branch.head(z), made.feature(head, z), atol=1e-4) and branch.head(z).shape == (2, width)
    torch.save({"model": made.state}, tmp_path / "plain.pt")
    assert torch.equal(fqgan.load_tokenizer(tmp_path / "plain.pt").encode(images), ids)
    broken = {n: t for n, t in made.state.items() if "decoder.mid.0" not in n}
    torch.save({"model": broken}, tmp_path / "broken.pt")
    with pytest.raises(UserError, match="broken.pt: weights and config do not fit"):
        fqgan.load_tokenizer(tmp_path / "broken.pt")
    with pytest.raises(UserError, match="not a gpt checkpoint but a tokenizer's"):
        fqgan.load_gpt(tmp_path / "published.pt")


class PublishedGPT(Published):
    def __init__(self, k, D=128, V=40, classes=6, trunk=2, head=1):
        super().__init__()
        torch.manual_seed(k)
        self.k, self.D, self.ends = k, D, [f"_{i + 1}" for i in range(k)] if k > 1 else [""]
        self.state["cls_embedding.embedding_table.weight"] = torch.randn(classes + 1, D)
        for end in self.ends:
            self.add(f"tok_embeddings{end}", V, D, bias=False)
            self.add(f"output{end}", V, D, bias=False)
        if k > 1:
            self.add("aggregation_layer", D, k * D)
        self.blocks = [f"layers.{i}" for i in range(trunk)], [f"ar_head.{i}" for i in range(head if k > 1 else 0)]
        for n in itertools.chain(*self.blocks):
            hidden = math.ceil(8 * D // 3 / 256) * 256
            for part, shape in {"attention.wqkv": (3 * D, D), "attention.wo": (D, D), "feed_forward.w1": (hidden, D), "feed_forward.w3": (hidden, D), "feed_forward.w2": (D, hidden),
                                "attention_norm": (D,), "ffn_norm": (D,)}.items():
                self.add(f"{n}.{part}", *shape, bias=False)
        self.add("norm", D, bias=False)

    def rms(self, name, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.state[f"{name}.weight"]

    @functools.cache
    def turns(self, grid, e):
        table = torch.zeros(grid**2 + 1, e // 2, dtype=torch.complex64)
        for p, j in itertools.product(range(grid**2), range(e // 4)):
            for half, at in ((0, p // grid), (e // 4, p % grid)):
                table[1 + p, half + j] = complex(math.cos(at * 10000 ** (-2 * j / (e / 2))), math.sin(at * 10000 ** (-2 * j / (e / 2))))
        return table

    def turn(self, x, grid):
        """x (B,T,heads,e), complex numbers in place of pairs"""
        z = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2))) * self.turns(grid, x.shape[-1])[:x.shape[1], None]
        return torch.view_as_real(z).flatten(-2).to(x.dtype)

    def block(self, n, x, grid):
        B, T, D = x.shape
        q, k, v = F.linear(self.rms(f"{n}.attention_norm", x), self.state[f"{n}.attention.wqkv.weight"]).chunk(3, -1)
        q, k, v = self.turn(q.view(B, T, -1, 64), grid).transpose(1, 2), self.turn(k.view(B, T, -1, 64), grid).transpose(1, 2), v.view(B, T, -1, 64).transpose(1, 2)
        scores = (q @ k.transpose(2, 3) / 8).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + F.linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D), self.state[f"{n}.attention.wo.weight"])
        h, w = self.rms(f"{n}.ffn_norm", x), {i: self.state[f"{n}.feed_forward.w{i}.weight"] for i in (1, 2, 3)}
        return x + F.linear(F.silu(F.linear(h, w[1])) * F.linear(h, w[3]), w[2])

    def logits(self, ids, labels, grid):
        """ids (B,k,P) of the positions so far, the last one perhaps not known -> (B,k,P,V)"""
        embedded = [self.state[f"tok_embeddings{end}.weight"][ids[:, i]] for i, end in enumerate(self.ends)]
        x = torch.cat(embedded, -1)
        x = F.linear(x, *self.get("aggregation_layer")) if self.k > 1 else x
        x = torch.cat([self.state["cls_embedding.embedding_table.weight"][labels][:, None], x[:, :-1]], 1)
        for n in self.blocks[0]:
            x = self.block(n, x, grid)
        x = torch.stack([x, *embedded[:-1]], 2)
        flat = x.flatten(0, 1)
        for n in self.blocks[1]:
            flat = self.block(n, flat, grid)
        x = self.rms("norm", flat).view(x.shape)
        return torch.stack([F.linear(x[:, :, i], self.state[f"output{end}.weight"]) for i, end in enumerate(self.ends)], 1)

    def greedy(self, labels, grid, scale):
        """One code after the other, each by the whole model."""
        ids = torch.zeros(len(labels), self.k, grid**2, dtype=torch.long)
        for p, i in itertools.product(range(grid**2), range(self.k)):
            given = ids[:, :, :p + 1]
            cond, null = (self.logits(given, l, grid)[:, i, p] for l in (labels, torch.full_like(labels, 6)))
            ids[:, i, p] = (null + scale * (cond - null)).argmax(-1)
        return ids.view(len(labels), self.k, grid, grid)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_published_gpts(k, tmp_path):
    """Same logits, same greedy samples, in every wrapper that the scripts write."""
    made = PublishedGPT(k)
    extra = {"layers.0.attention.kv_cache.k_cache": torch.zeros(2, 2)}
    torch.save({"model": made.state | extra, "steps": 1, "args": argparse.Namespace(image_size=48, downsample_size=16, gpt_model="GPT-B")}, tmp_path / "0.pt")
    torch.save({"ema": made.state, "model": {n: torch.zeros_like(t) for n, t in made.state.items()}}, tmp_path / "1.pt")
    torch.save({n: t.bfloat16().float() for n, t in made.state.items()}, tmp_path / "2.pt")
    torch.save({"module": made.state}, tmp_path / "3.pt")
    models = [fqgan.load_gpt(tmp_path / f"{i}.pt", grid=None if i == 0 else 3) for i in range(4)]
    ids, labels = torch.randint(0, 40, (2, k, 3, 3)), torch.tensor([1, 4])
    expected = made.logits(ids.flatten(2), labels, 3)
    for model in (models[0], models[1], models[3]):
        assert model.config.grid == 3 and model.config.n_head == 2 and model.config.num_classes == 6 and model.config.head_layers == (k > 1)
        assert torch.allclose(model(ids, labels)[0], expected, atol=1e-4)
    assert torch.allclose(models[2](ids, labels)[0], expected, atol=1.0) and fqgan.load_gpt(tmp_path / "3.pt").config.grid == 16
    assert torch.equal(models[0].generate(labels, cfg_scale=2.0, temperature=0), made.greedy(labels, 3, 2.0))
    torch.save({"model": {"cls_embedding.cap_proj.fc1.weight": torch.zeros(2)}}, tmp_path / "t2i.pt")
    with pytest.raises(UserError, match="text-conditional"):
        fqgan.load_gpt(tmp_path / "t2i.pt")


def test_sampling_and_training_from_published_files(tmp_path, monkeypatch):
    torch.save({"model": PublishedTokenizer(2).state}, tmp_path / "tokenizer.pt")
    torch.save({"model": PublishedGPT(2, V=64).state, "args": argparse.Namespace(image_size=64, downsample_size=16)}, tmp_path / "gpt.pt")
    flags = ["--gpt", tmp_path / "gpt.pt", "--tokenizer", tmp_path / "tokenizer.pt", "--device", "cpu"]
    call(sample, *flags, "--out", tmp_path / "grid.png", "--n", 6)
    assert Image.open(tmp_path / "grid.png").height == 4 + 6 * 100
    with pytest.raises(UserError, match="holds no tokenizer: name it with --tokenizer"):
        call(sample, "--gpt", tmp_path / "gpt.pt", "--device", "cpu")
    folder = make_folder(tmp_path / "images")
    call(train_gpt, "--tokenizer", tmp_path / "tokenizer.pt", "--data", folder, "--out", tmp_path / "own", *TINY_GPT_RUN, "--crops", 10)
    assert fqgan.load_gpt(tmp_path / "own" / "gpt.pt").config.vocab_size == 64
    with pytest.raises(UserError, match="does not say what it was trained on"):
        call(evaluate, "--tokenizer", tmp_path / "tokenizer.pt", "--device", "cpu")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: (_ for _ in ()).throw(OSError("no route to host")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    call(evaluate, "--tokenizer", tmp_path / "tokenizer.pt", "--device", "cpu", "--data", folder, "--json", tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text()).keys() >= {"probe_1", "probe_2"}
    with pytest.raises(UserError, match="holds weights, not a run: it cannot be resumed, but --init starts from it"):
        call(train_tokenizer, "--out", tmp_path, "--resume")
    call(train_tokenizer, "--init", tmp_path / "tokenizer.pt", "--out", tmp_path / "tuned", "--disc-weight", 0, "--perceptual-weight", 0, *TINY_RUN[len([*as_flags(SMALL)]):], "--steps", 1, "--lr", 0)
    before, after = (fqgan.load_tokenizer(tmp_path / n) for n in ("tokenizer.pt", "tuned/tokenizer.pt"))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(before.encode(images), after.encode(images)), "it starts from the published weights"
    with pytest.raises(UserError, match="--init .* does not fit"):
        call(train_tokenizer, "--init", tmp_path / "tokenizer.pt", "--out", tmp_path / "other", *TINY_RUN, "--codebook-size", 16, "--disc-weight", 0, "--perceptual-weight", 0)


# -----------------------------------------------------------------------------
# Teachers


def test_representation_loss_is_infonce():
    torch.manual_seed(0)
    predicted, features = torch.randn(2, 5, 7).unbind()
    cosine = torch.stack([torch.stack([F.cosine_similarity(p, f, dim=0) for f in features]) for p in predicted])
    expected = -torch.stack([cosine[i, i] - cosine[i].exp().sum().log() for i in range(5)]).mean()
    assert torch.allclose(fqgan.representation_loss(predicted, features), expected)
    shifted = fqgan.representation_loss(predicted[2:4], features, first=2)
    assert torch.allclose(shifted, -torch.stack([cosine[i, i] - cosine[i].exp().sum().log() for i in (2, 3)]).mean())
    assert fqgan.representation_loss(predicted[:1], features[:1]) == 0, "a batch of one has nothing to tell apart"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit, which OpenAI's files need
def test_clip_teacher(tmp_path):
    """A made-up CLIP archive and state dict, run by the format's description."""
    torch.manual_seed(0)
    made, W, P, grid = Published(), 128, 32, 7
    made.add("visual.conv1", W, 3, P, P, bias=False)
    made.add("visual.ln_pre", W)
    made.add("visual.ln_post", W)
    made.add_blocks("visual.transformer.resblocks", W, 2)
    made.state |= {"visual.class_embedding": torch.randn(W), "visual.positional_embedding": torch.randn(grid**2 + 1, W), "visual.proj": torch.randn(W, 16),
                   "transformer.resblocks.0.ln_1.weight": torch.ones(3), "positional_embedding": torch.zeros(2, 2), "logit_scale": torch.tensor(1.0)}
    made.state = {n: t.half() if "ln_" not in n else t for n, t in made.state.items()}
    torch.save(made.state, tmp_path / "clip.pt")
    teacher = fqgan.load_teacher("clip_vitb16", tmp_path / "clip.pt")
    made.state = {n: t.float() for n, t in made.state.items()}
    images = torch.rand(2, 3, 50, 50) * 2 - 1
    pick = [i * 50 // 224 for i in range(224)]
    x = images[:, :, pick][..., pick] / 2 + 0.5
    x = (x - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    x = F.conv2d(x, made.state["visual.conv1.weight"], stride=P).flatten(2).transpose(1, 2)
    x = torch.cat([made.state["visual.class_embedding"].expand(2, 1, -1), x], 1) + made.state["visual.positional_embedding"]
    x = F.layer_norm(x, (W,), *made.get("visual.ln_pre"))
    x = made.transformer("visual.transformer.resblocks", x, 2, act=lambda h: h * torch.sigmoid(1.702 * h))
    assert torch.allclose(teacher(images), x[:, 0], atol=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training

    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in made.state.items():
                at, (*path, last) = self, name.split(".")
                for part in path:
                    at.add_module(part, getattr(at, part, torch.nn.Module())) if not hasattr(at, part) else None
                    at = getattr(at, part)
                at.register_buffer(last, tensor)

        def forward(self, x):
            return x
    torch.jit.save(torch.jit.script(Archive()), tmp_path / "archive.pt")
    assert torch.equal(fqgan.load_teacher("clip_vitb16", tmp_path / "archive.pt")(images), teacher(images))
    with pytest.raises(UserError, match="does not hold the teacher clip_vitl14"):
        torch.save({"visual.conv1.weight": torch.zeros(2)}, tmp_path / "broken.pt")
        fqgan.load_teacher("clip_vitl14", tmp_path / "broken.pt")

    torch.save({"visual.conv1.weight": Hostile(tmp_path / "touched")}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match="does not hold the teacher clip_vitb16"):
        fqgan.load_teacher("clip_vitb16", tmp_path / "hostile.pt")
    assert not (tmp_path / "touched").exists()
    with pytest.raises(UserError, match="no teacher vgg: there are clip_vitb16"):
        fqgan.load_teacher("vgg")


def test_dinov2_teacher(tmp_path):
    torch.manual_seed(0)
    W, state, names = 128, {}, dict(norm1=1, norm2=1, ls1=0, ls2=0)
    made = Published()
    made.add("patch_embed.proj", W, 3, 14, 14)
    made.add("norm", W)
    for i in range(2):
        for part, shape in {"norm1": (W,), "norm2": (W,), "attn.qkv": (3 * W, W), "attn.proj": (W, W), "mlp.fc1": (4 * W, W), "mlp.fc2": (W, 4 * W)}.items():
            made.add(f"blocks.{i}.{part}", *shape)
        made.state |= {f"blocks.{i}.ls{j}.gamma": torch.rand(W) for j in (1, 2)}
    made.state |= {"cls_token": torch.randn(1, 1, W), "pos_embed": torch.randn(1, 1370, W), "mask_token": torch.zeros(1, W)}
    torch.save(made.state, tmp_path / "dinov2.pth")
    teacher = fqgan.load_teacher("dinov2_vits14", tmp_path / "dinov2.pth")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    pick = [i * 32 // 224 for i in range(224)]
    x = (images[:, :, pick][..., pick] / 2 + 0.5 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = F.conv2d(x, *made.get("patch_embed.proj"), stride=14).flatten(2).transpose(1, 2)
    table = made.state["pos_embed"]
    grid = F.interpolate(table[:, 1:].view(1, 37, 37, W).permute(0, 3, 1, 2), scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 256, W)
    x = torch.cat([made.state["cls_token"].expand(2, -1, -1), x], 1) + torch.cat([table[:, :1], grid], 1)
    for i in range(2):
        q, k, v = (t.view(2, 257, 2, 64).transpose(1, 2) for t in F.linear(F.layer_norm(x, (W,), *made.get(f"blocks.{i}.norm1"), eps=1e-6), *made.get(f"blocks.{i}.attn.qkv")).chunk(3, -1))
        y = ((q @ k.transpose(2, 3) / 8).softmax(-1) @ v).transpose(1, 2).reshape(2, 257, W)
        x = x + made.state[f"blocks.{i}.ls1.gamma"] * F.linear(y, *made.get(f"blocks.{i}.attn.proj"))
        y = F.linear(F.gelu(F.linear(F.layer_norm(x, (W,), *made.get(f"blocks.{i}.norm2"), eps=1e-6), *made.get(f"blocks.{i}.mlp.fc1"))), *made.get(f"blocks.{i}.mlp.fc2"))
        x = x + made.state[f"blocks.{i}.ls2.gamma"] * y
    assert torch.allclose(teacher(images), F.layer_norm(x, (W,), *made.get("norm"), eps=1e-6)[:, 0], atol=1e-4)


class Own(torch.nn.Module):
    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit, which OpenAI's files need
def test_a_teacher_of_ones_own(tmp_path, capsys):
    """TorchScript and torch.export; the loss is on, said, and only in the supervised sub-codebook; heads go where the teacher goes."""
    torch.jit.save(torch.jit.script(Own()), tmp_path / "own.pt")
    torch.export.save(torch.export.export(Own(), (torch.zeros(3, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("B")},)), tmp_path / "own.pt2")
    images = torch.rand(5, 3, 16, 16)
    for name in ("own.pt", "own.pt2"):
        assert torch.allclose(fqgan.load_teacher(str(tmp_path / name))(images), Own()(images))
    call(train_tokenizer, "--k", 3, "--out", tmp_path, *TINY_RUN, "--teachers", tmp_path / "own.pt")
    assert "representation by" in capsys.readouterr().out
    rows = [r for r in log_of(tmp_path / "log.csv") if r["loss"]]
    assert all(0 < float(r["representation"]) < 0.5 * math.log(8) + 0.5 for r in rows)
    model = fqgan.load_tokenizer(tmp_path / "tokenizer.pt").train()
    assert [b.head is not None for b in model.branches] == [False, False, True] and model.config.teacher_widths == (48,)
    losses = model(images, [Own()(images)])[1]
    losses["representation"].backward()
    assert [any(p.grad is not None and p.grad.any() for p in b.parameters()) for b in model.branches] == [False, False, True]
    for argv, message in [(["--teachers", "nothing"], "no teacher nothing"), (["--k", 1, "--teachers", f"{tmp_path}/own.pt,{tmp_path}/own.pt2"], "2 teachers are more than k=1")]:
        with pytest.raises(UserError, match=message):
            call(train_tokenizer, "--out", tmp_path / "other", *TINY_RUN, *argv)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit, which OpenAI's files need
def test_global_negatives_on_two_ranks_are_one_process(tmp_path):
    torch.jit.save(torch.jit.script(Own()), tmp_path / "own.pt")
    flags = ["train_tokenizer.py", *TINY_RUN, "--k", 2, "--entropy-weight", 0, "--teachers", tmp_path / "own.pt", "--global-negatives", "--steps", 2]
    call(train_tokenizer, *flags[1:], "--out", tmp_path / "one")
    two = shell(*flags, "--out", tmp_path / "two", ranks=2)
    assert nearly_same(*(weights(tmp_path / n / "tokenizer.pt") for n in ("one", "two")))


def test_fetch(tmp_path, monkeypatch):
    """Once, checked; a copy that was damaged is fetched again; nothing partial stays."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "v1").mkdir()
    source = tmp_path / "v1" / "x.pth"
    source.write_bytes(b"weights")
    url, digest = source.as_uri(), hashlib.sha256(b"weights").hexdigest()
    path = fqgan.fetch(url, digest[:8])
    assert path != source and path.read_bytes() == b"weights"
    source.write_bytes(b"else")
    assert fqgan.fetch(url, digest) == path and path.read_bytes() == b"weights"  # not fetched again
    path.write_bytes(b"weig")
    with pytest.raises(UserError, match=f"invalid hash value.*put it at {path}"):
        fqgan.fetch(url, digest)
    source.write_bytes(b"weights")
    assert fqgan.fetch(url, digest).read_bytes() == b"weights"
    source.write_bytes(b"else")
    path.unlink()
    with pytest.raises(UserError, match="invalid hash value"):
        fqgan.fetch(url, digest)
    assert not list(path.parent.iterdir())
    with pytest.raises(UserError, match=f"no file at nowhere.pth; what belongs there is {url}"):
        fqgan.fetch(url, digest, local="nowhere.pth")


# -----------------------------------------------------------------------------
# Evaluation


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    a, b = rng.random(6) + 0.1, rng.random(6) + 0.1
    mu = rng.standard_normal((2, 6))
    expected = ((mu[0] - mu[1]) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    assert math.isclose(evaluate.frechet_distance(mu[0], np.diag(a), mu[1], np.diag(b)), expected, rel_tol=1e-9)
    v, w = rng.standard_normal((2, 6))  # of rank one: tr (vv' ww')^(1/2) = |v'w|
    expected = v @ v + w @ w - 2 * abs(v @ w)
    assert math.isclose(evaluate.frechet_distance(mu[0], np.outer(v, v), mu[0], np.outer(w, w)), expected, rel_tol=1e-6)
    x, y = (np.cov(rng.standard_normal((40, 30)) @ rng.standard_normal((30, 30)), rowvar=False) for _ in range(2))
    expected = np.trace(x) + np.trace(y) - 2 * np.trace(scipy.linalg.sqrtm(x @ y)).real
    assert math.isclose(evaluate.frechet_distance(np.zeros(30), x, np.zeros(30), y), expected, rel_tol=1e-6)
    few = np.cov(rng.standard_normal((10, 30)), rowvar=False)  # of rank 9
    assert abs(evaluate.frechet_distance(np.ones(30), few, np.ones(30), few)) < 1e-6
    with pytest.raises(UserError, match="other shapes"):
        evaluate.frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(UserError, match="not finite"):
        evaluate.frechet_distance(np.zeros(3), np.eye(3), np.full(3, np.nan), np.eye(3))


def test_inception_score_of_known_distributions():
    sure = 100 * F.one_hot(torch.arange(1000) % 8, 8).float()
    assert math.isclose(evaluate.inception_score(sure)[0], 8, rel_tol=1e-6) and evaluate.inception_score(sure)[1] == 0
    assert math.isclose(evaluate.inception_score(torch.zeros(50, 8))[0], 1, rel_tol=1e-9)
    mean, deviation = evaluate.inception_score(torch.cat([sure[:800], sure[:1].expand(400, 8)]).numpy(), split_size=800)
    assert math.isclose(mean, (8 + 1) / 2, rel_tol=1e-6) and math.isclose(deviation, 3.5, rel_tol=1e-6), "runs in order, the last one shorter"


def test_precision_recall_on_toy_manifolds():
    line = torch.arange(10.0)[:, None]  # every reach is 1.0, at the ends 2.0 (k=2)
    assert evaluate.precision_recall(line, line, k=2) == (1, 1)
    assert evaluate.precision_recall(line, line + 1000, k=2) == (0, 0)
    half = torch.cat([line[:5], line[:5] + 1000])
    assert evaluate.precision_recall(line, half, k=2) == (0.5, 0.7), "0 to 4, and with the reach of 2 of the last one 5 and 6"
    copies = line[:1].repeat(10, 1)
    assert evaluate.precision_recall(line, copies, k=2) == (1, 0.1), "collapsed: all within, little covered; a reach of 0 still covers its own place"
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 5, generator=rng), 1.5 * torch.randn(50, 5, generator=rng)
    d = torch.cdist(a.double(), a.double()).sort(1).values[:, 3]
    assert math.isclose(evaluate.precision_recall(a, b)[0], float((torch.cdist(b.double(), a.double()) <= d).any(1).double().mean()))
    with pytest.raises(UserError, match="more than 3 images in both sets; there are 60 and 3"):
        evaluate.precision_recall(a, b[:3])


def test_psnr_and_ssim_of_known_pairs():
    flat = torch.zeros(1, 3, 16, 16)
    assert math.isclose(float(train_tokenizer.psnr(flat, flat + 10 / 127.5)), 20 * math.log10(255 / 10), rel_tol=1e-5)
    x, y = torch.rand(2, 2, 3, 12, 11).mul(2).sub(1).unbind()
    assert torch.allclose(evaluate.ssim(x, x), torch.ones(2), atol=1e-5)
    a, b = (fqgan.to_uint8(i).double().numpy() for i in (x, y))
    expected = np.zeros(2)
    for n, c, i, j in itertools.product(range(2), range(3), range(12 - 6), range(11 - 6)):
        p, q = (z[n, c, i:i + 7, j:j + 7].ravel() for z in (a, b))
        cov = np.cov(p, q)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        expected[n] += (2 * p.mean() * q.mean() + c1) * (2 * cov[0, 1] + c2) / ((p.mean()**2 + q.mean()**2 + c1) * (cov[0, 0] + cov[1, 1] + c2)) / (3 * 6 * 5)
    assert np.allclose(evaluate.ssim(x, y).numpy(), expected, atol=1e-4)
    with pytest.raises(UserError, match="7x7"):
        evaluate.ssim(x[..., :6], y[..., :6])


def test_what_codes_tell():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 16, (2, 100_000))
    assert abs(evaluate.mutual_information(a, a) - 4) < 1e-3
    assert abs(evaluate.mutual_information(a, (a + 3) // 2 % 8) - 3) < 1e-3, "half of the codes, told apart in pairs"
    assert evaluate.mutual_information(a, b) < 0.01 and abs(evaluate.mutual_information(a, a ^ (b & 1)) - 3) < 0.01
    labels = torch.arange(600) % 5
    vectors = F.normalize(torch.randn(5, 12), dim=1)
    told = vectors[labels] + 0.1 * torch.randn(600, 12)
    assert evaluate.linear_probe(told[:400], labels[:400], told[400:], labels[400:]) > 0.95
    assert evaluate.linear_probe(torch.randn(400, 12), labels[:400], torch.randn(200, 12), labels[400:]) < 0.4
    assert evaluate.linear_probe(torch.ones(400, 12), labels[:400], torch.ones(200, 12), labels[400:]) <= 0.2


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Made-up weights in the published file's format."""
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({n: t for n, t in net.state_dict().items() if "num_batches_tracked" not in n}, path)
    return path


def test_inception_differs_from_torchvision_where_it_should(inception_file):
    assert len(load(inception_file)) == 472
    network = evaluate.Inception(inception_file)
    images = torch.randint(0, 256, (2, 3, 40, 31), dtype=torch.uint8)
    resized = evaluate.tf1_resize(images.float())
    for row, column in [(0, 0), (298, 298), (100, 37), (150, 200)]:  # TensorFlow 1: source = i * in / out, the upper neighbour inside the picture
        y, x = row * 40 / 299, column * 31 / 299
        i, j, u, v = int(y), int(x), y - int(y), x - int(x)
        i2, j2 = min(i + 1, 39), min(j + 1, 30)
        expected = (1 - u) * ((1 - v) * images[..., i, j] + v * images[..., i, j2]) + u * ((1 - v) * images[..., i2, j] + v * images[..., i2, j2])
        assert torch.allclose(resized[..., row, column], expected, atol=1e-2)
    assert torch.equal(evaluate.tf1_resize(resized), resized)

    units = {}
    for name in ("Mixed_5b", "Mixed_6b", "Mixed_7b", "Mixed_7c"):
        block = getattr(network.net, name)
        block.register_forward_hook(lambda block, inputs, output, name=name: units.update({name: (inputs[0], output)}))
    network.net.Conv2d_1a_3x3.register_forward_hook(lambda block, inputs, output: units.update(first=inputs[0]))
    features, logits = network(images)
    assert torch.allclose(units.pop("first"), (resized - 128) / 128), "not torchvision's own normalization"
    for name, (given, made) in units.items():
        pool = F.max_pool2d(given, 3, 1, 1) if name == "Mixed_7c" else F.avg_pool2d(given, 3, 1, 1, count_include_pad=False)
        unit = getattr(network.net, name).branch_pool
        plain = F.relu(unit.bn(F.conv2d(pool, unit.conv.weight)))
        assert torch.allclose(made[:, -plain.shape[1]:], plain, atol=1e-5), name
    assert torch.allclose(features, units["Mixed_7c"][1].mean((2, 3)), atol=1e-5) and features.shape == (2, 2048)
    weights = load(inception_file)
    assert torch.allclose(logits, features @ weights["fc.weight"].T, atol=1e-5), "without the bias"


class Bent(torch.nn.Module):
    """Stands in for the network: images -> features and logits that are quick to make."""

    def forward(self, images):
        x = images.float().flatten(1) / 255
        x = torch.cat([x, x.square()], 1)
        return F.pad(x, (0, 2048 - x.shape[1])), x[:, :7]


def test_streamed_statistics_are_those_of_the_whole():
    images = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8)
    features = evaluate.Features(Bent(), every=3)
    for numbers in torch.randperm(50).split(7):  # in any order
        features.add(numbers, images[numbers])
    made, (whole, logits) = features.finish(), Bent()(images)
    assert np.allclose(made["mu"], whole.double().mean(0)) and np.allclose(made["sigma"], np.cov(whole.double().numpy(), rowvar=False), atol=1e-12)
    assert np.array_equal(made["features"], whole[::3]) and np.array_equal(made["logits"], logits[::3])
    with pytest.raises(UserError, match="1 image has no covariance"):
        single = evaluate.Features(Bent())
        single.add([0], images[:1])
        single.finish()


def images_folder(path, n, size=(16, 16), seed=0):
    path.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return pixels


def test_sets_of_images(tmp_path, monkeypatch, capsys):
    """A folder, an .npz stored or compressed: the same images, the same statistics, kept beside the set until it changes."""
    pixels = images_folder(tmp_path / "folder", 12)
    np.savez(tmp_path / "stored.npz", other=np.arange(3), arr_0=pixels)
    np.savez_compressed(tmp_path / "small.npz", arr_0=pixels)
    sets = [evaluate.open_set(tmp_path / name) for name in ("folder", "stored.npz", "small.npz")]
    assert isinstance(sets[1].items, np.memmap), "not read into memory"
    for images in sets:
        assert len(images) == 12 and all(np.array_equal(images[i][1].permute(1, 2, 0), pixels[i]) for i in range(12))
    options, network = type("Options", (), dict(batch_size=5, device="cpu")), Bent()
    network.last = torch.zeros(1)
    made = [evaluate.reference(images, network, options, every=1) for images in sets]
    assert all(np.allclose(made[0][n], m[n]) for m in made for n in m)
    capsys.readouterr()
    again = evaluate.reference(sets[0], network, options, every=1)
    assert "from " in capsys.readouterr().out and all(np.array_equal(again[n], made[0][n]) for n in again)
    Image.fromarray(255 - pixels[3]).save(tmp_path / "folder" / "003.png")
    other = evaluate.reference(evaluate.open_set(tmp_path / "folder"), network, options, every=1)
    assert "from " not in capsys.readouterr().out and not np.allclose(other["mu"], made[0]["mu"])
    for file in tmp_path.glob("folder.*.npz"):
        file.write_bytes(file.read_bytes()[:1000])
    evaluate.reference(evaluate.open_set(tmp_path / "folder"), network, options, every=1)
    assert "made again" in capsys.readouterr().out
    np.savez(tmp_path / "mixed.npz", arr_0=pixels, mu=np.ones(2048), sigma=np.eye(2048))
    adm = evaluate.reference(evaluate.open_set(tmp_path / "mixed.npz"), network, options, every=1)
    assert np.array_equal(adm["mu"], np.ones(2048)) and adm["features"].shape == (12, 2048), "ADM's files: their statistics, their images"


@pytest.mark.parametrize("make, message", [
    (lambda path: path.mkdir(), "holds no image"),
    (lambda path: None, "no such file or folder"),
    (lambda path: np.savez(path, images=np.zeros(3)), "holds images; expected arr_0"),
    (lambda path: np.savez(path, arr_0=np.zeros((2, 3, 8, 8))), "arr_0 is float64"),
    (lambda path: np.savez(path, arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "holds no images"),
    (lambda path: np.savez(path, mu=np.zeros(3), sigma=np.eye(4)), "expected .D,. and .D, D."),
    (lambda path: (path.mkdir(), (path / "a.png").write_bytes(b"")), "a.png' cannot be read"),
    (lambda path: (images_folder(path, 3), Image.new("RGB", (9, 16)).save(path / "z.png")), "z.png' is 9x16, the first of its set 16x16"),
    (lambda path: path.write_bytes(b"PK not really"), "cannot be read")])
def test_sets_that_cannot_be_used(make, message, tmp_path):
    path = tmp_path / "set.npz"
    make(path)
    with pytest.raises(UserError, match=message):
        list(evaluate.open_set(path).batches(4))


def test_evaluate_a_tokenizer(tmp_path, trained, monkeypatch, capsys):
    """What has no weights is n/a with its reason, the rest is measured."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: (_ for _ in ()).throw(OSError("no route to host")))
    call(evaluate, "--tokenizer", trained / "tokenizer.pt", "--device", "cpu", "--n", 50, "--json", tmp_path / "figures.json", "--out", tmp_path / "e.png")
    text, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert figures["rfid"] is None and "pt_inception" in figures["missing"]["rfid"] and "no route to host" in figures["missing"]["lpips"] and "n/a" in text
    assert {"psnr", "ssim", "usage_1", "perplexity_2", "probe_1", "mutual_information_1_2", "mutual_information_1_2_by_chance"} <= figures.keys()
    assert Image.open(tmp_path / "e.png").height == 4 + 4 * 100
    maps = np.asarray(Image.open(tmp_path / "e_codes.png").convert("L"))
    assert maps.shape == (640 + 2 * 18, 2 * (640 + 18) + 18) and (maps[:, :650] < 255).mean() > 0.001 and (maps[:, 670:] < 255).mean() > 0.001, "patches on both maps"
    model, data = fqgan.load_tokenizer(trained / "tokenizer.pt"), load_data("shapes", 16, False)
    images = torch.stack([data[i][0] for i in train_tokenizer.fixed_draw(data)[:50]])
    ids = model.encode(images)
    assert math.isclose(figures["psnr"], float(train_tokenizer.psnr(images, model.decode(ids)).mean()), rel_tol=1e-4)
    assert figures["usage_1"] == len(ids[:, 0].unique()) / 32
    assert math.isclose(figures["ssim"], evaluate.ssim(images, (train_tokenizer.to_uint8(model.decode(ids)).float() / 127.5 - 1)).mean(), rel_tol=1e-4)
    assert math.isclose(figures["perplexity_2"], train_tokenizer.usage(torch.bincount(ids[:, 1].flatten(), minlength=32))[1], rel_tol=1e-4)
    assert math.isclose(figures["mutual_information_1_2"], evaluate.mutual_information(*(ids[:, i].flatten().numpy() for i in (0, 1))), rel_tol=1e-6)

    call(evaluate, "--tokenizer", trained / "tokenizer.pt", "--device", "cpu", "--n", 1, "--out", tmp_path / "figures.json" / "e.png")
    assert "one image has no covariance" in (text := capsys.readouterr().out) and "no picture" in text and "linear probe" in text, "what can be measured, is"
    for i, name in enumerate(("a", "b")):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(4, i), sigma=np.eye(4))
    call(evaluate, "--real", tmp_path / "a.npz", "--fake", tmp_path / "b.npz", "--json", tmp_path / "figures.json")
    assert math.isclose(json.loads((tmp_path / "figures.json").read_text())["fid"], 4), "two files of statistics need no network"
    images_folder(tmp_path / "few", 3)
    monkeypatch.chdir(tmp_path / "few")
    call(evaluate, "--tokenizer", trained / "tokenizer.pt", "--device", "cpu", "--data", ".", "--out", tmp_path / "e.png")
    assert "the data has no classes" in capsys.readouterr().out


def plain_fid(*features):
    return evaluate.frechet_distance(*(f(x.double().numpy()) for x in features for f in (lambda x: x.mean(0), functools.partial(np.cov, rowvar=False))))


def plain_tokenizer_figures(figures, path, folder, inception_file):
    """LPIPS and rFID of six images, each against the function that defines it."""
    model, data, network = fqgan.load_tokenizer(path), load_data(folder / "real", 16, False), evaluate.Inception(inception_file)
    images = torch.stack([data[i][0] for i in range(6)])
    painted = train_tokenizer.to_uint8(model.decode(model.encode(images)))
    assert math.isclose(figures["lpips"], fqgan.LPIPS(folder / "vgg16.pth", folder / "vgg.pth")(images, painted / 127.5 - 1).mean(), rel_tol=1e-3)
    assert math.isclose(figures["rfid"], plain_fid(network(train_tokenizer.to_uint8(images))[0], network(painted)[0]), rel_tol=1e-3)


def test_evaluate_ranks_agree_and_sets_compare(tmp_path, trained, inception_file):
    """With made-up weights: two processes give one's figures, and the same set twice has a distance of 0."""
    torch.manual_seed(0)
    torch.save(torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]).state_dict(prefix="features."), tmp_path / "vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}, tmp_path / "vgg.pth", _use_new_zipfile_serialization=False)
    weights = ["--inception", inception_file, "--vgg", tmp_path / "vgg16.pth", "--lpips", tmp_path / "vgg.pth"]
    flags = ["evaluate.py", "--device", "cpu", "--batch-size", 3, "--dtype", "float32", *weights]
    pixels = images_folder(tmp_path / "real", 6)
    modes = {"tokenizer": ["--tokenizer", trained / "tokenizer.pt", "--count", 6, "--data", tmp_path / "real"],
             "gpt": ["--gpt", trained / "gpt.pt", "--count", 6, "--real", tmp_path / "real"]}
    for mode, extra in modes.items():
        call(evaluate, *flags[1:], *extra, "--json", tmp_path / f"{mode}0", "--out", tmp_path / "picture.png")
        made = shell(*flags, *extra, "--json", tmp_path / f"{mode}2", "--out", tmp_path / "picture.png", ranks=2)
        one, two = (json.loads((tmp_path / f"{mode}{ranks}").read_text()) for ranks in (0, 2))
        assert one.keys() == two.keys() and all(one[n] == two[n] or math.isclose(one[n], two[n], rel_tol=1e-4) for n in one if n != "missing"), (one, two)
        assert {"tokenizer": {"lpips", "rfid", "psnr"}, "gpt": {"fid", "inception_score", "precision", "recall"}}[mode] <= {n for n in one if one[n] is not None}
        if mode == "tokenizer":
            plain_tokenizer_figures(one, trained / "tokenizer.pt", tmp_path, inception_file)
    fakes = images_folder(tmp_path / "fake", 5, seed=1)
    call(evaluate, "--real", tmp_path / "real", "--fake", tmp_path / "fake", "--device", "cpu", *weights, "--json", tmp_path / "other", "--out", tmp_path / "picture.png")
    other, network = json.loads((tmp_path / "other").read_text()), evaluate.Inception(inception_file)
    (real, _), (fake, logits) = (network(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (pixels, fakes))
    expected = [plain_fid(real, fake), *evaluate.precision_recall(real.numpy(), fake.numpy()), *evaluate.inception_score(logits.numpy())]
    assert np.allclose([other[n] for n in ("fid", "precision", "recall", "inception_score", "inception_score_deviation")], expected, rtol=1e-3)
    np.savez(tmp_path / "fake.npz", arr_0=pixels)
    call(evaluate, "--real", tmp_path / "real", "--fake", tmp_path / "fake.npz", "--device", "cpu", *weights, "--json", tmp_path / "same", "--out", tmp_path / "picture.png")
    with pytest.raises(UserError, match="no file at nowhere.pth"):
        call(evaluate, "--real", tmp_path / "real", "--fake", tmp_path / "fake.npz", "--device", "cpu", "--inception", "nowhere.pth")
    same = json.loads((tmp_path / "same").read_text())
    assert abs(same["fid"]) < 1e-4 and same["precision"] == same["recall"] == 1


def test_lpips_against_its_formula(tmp_path):
    torch.manual_seed(0)
    features = torchvision.models.vgg16(weights=None, init_weights=False).features
    torch.save({f"features.{n}": t for n, t in features.state_dict().items()} | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(lin, tmp_path / "vgg.pth", _use_new_zipfile_serialization=False)
    distance = fqgan.LPIPS(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    x, y = torch.rand(2, 2, 3, 32, 32).mul(2).sub(1).unbind()
    expected, maps = torch.zeros(2), [(i - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1) for i in (x, y)]
    for n, layer in enumerate(features[:30]):
        maps = [layer(m) for m in maps]
        if n in (3, 8, 15, 22, 29):
            a, b = (m / (m.square().sum(1, keepdim=True).sqrt() + 1e-10) for m in maps)
            expected += ((a - b).square() * lin[f"lin{(3, 8, 15, 22, 29).index(n)}.model.1.weight"][0]).sum(1).mean((1, 2))
    assert torch.allclose(distance(x, y), expected, rtol=1e-4) and torch.equal(distance(x, x), torch.zeros(2))
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        for p in distance.features.parameters():
            p.zero_()  # all features 0: the plain form's gradient would be NaN
    distance(flat, y[:1]).sum().backward()
    assert flat.grad.isfinite().all() and not any(p.requires_grad for p in distance.train().parameters())
    with pytest.raises(UserError, match="does not hold the weights that belong there"):
        fqgan.LPIPS(tmp_path / "vgg.pth", tmp_path / "vgg.pth")


# -----------------------------------------------------------------------------
# Speed: what the fast paths gain over plain ones


def plain_quantizer(z, codes):
    """Every formula as it is written, the whole matrix of assignments at once: (straight-through vectors, the sum of the losses)."""
    unit, codes = F.normalize(z.float(), dim=1), F.normalize(codes, dim=1)
    flat = unit.permute(0, 2, 3, 1).flatten(0, 2)
    distance = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
    chosen = codes[distance.argmin(1)]
    p = (-distance / 0.01).softmax(1)
    mean = p.mean(0)
    entropy = -(p * (p + 1e-5).log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    z_q = chosen.view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    return unit + (z_q - unit).detach(), F.mse_loss(chosen, flat.detach()) + 0.25 * F.mse_loss(flat, chosen.detach()) + 0.03 * entropy


def plain_tokenizer(k=3):
    """A model of the published size, run as its description reads, and its forward pass in training: images -> (reconstruction, loss)."""
    made = PublishedTokenizer(k, widths=(128, 128, 256, 256, 512), W=512, z=256, V=16384, grid=16, depth=6)

    def forward(images):
        quantized, losses = zip(*(plain_quantizer(z, made.state[f"quantize{b}.embedding.weight"]) for b, z in zip(made.branches, made.vectors(images))))
        reconstruction = made.paint(quantized)
        disentangle = [(F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).square().mean() for a, b in itertools.combinations(quantized, 2)]
        return reconstruction, sum(losses) + 0.1 * sum(disentangle) / len(disentangle) + F.mse_loss(reconstruction, images)

    return made, forward


def benchmarks():
    """row -> {way: a function that prepares it and returns (the work to time, how often)}; the first way is the plain one."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)

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

    def frechet(plain):
        a, b = (np.cov(np.random.default_rng(seed).standard_normal((4096, 2048)) @ np.diag(np.linspace(0.1, 2, 2048)), rowvar=False) for seed in (0, 1))
        return (lambda: np.trace(scipy.linalg.sqrtm(a @ b)).real) if plain else lambda: evaluate.frechet_distance(np.zeros(2048), a, np.zeros(2048), b), 1

    def quantizer(plain=False, tokens=4096, codes=16384, k=1):
        modules = [Quantizer(codes, 8) for _ in range(k)]

        def work(tokens=tokens):
            z = torch.randn(1, 8, tokens, 1, requires_grad=True)
            training(lambda: sum(plain_quantizer(z, m.codebook)[1] if plain else sum(m(z)[2].values()) for m in modules), [m.codebook for m in modules])()
        work(64)  # what is loaded and set up once is not counted
        return work, 2

    def tokenizer_step(plain=False, dtype="float32", k=3, size=256, batch=2):
        images, disc = torch.rand(batch, 3, size, size) * 2 - 1, fqgan.Discriminator()
        if plain:
            made, forward = plain_tokenizer(k)
            parameters = [t.requires_grad_() for t in made.state.values()]
        else:
            model = FQGAN(FQGANConfig(k=k, image_size=size, recompute=True)).train()
            parameters = [*model.parameters()]

            def forward(images):
                reconstruction, losses = model(images)
                return reconstruction, sum(losses.values())

        def loss():
            reconstruction, value = forward(images)
            disc.requires_grad_(False)
            value = value - 0.5 * disc(reconstruction).float().mean()
            disc.requires_grad_(True)
            return value + 0.5 * fqgan.hinge_loss(disc(images), disc(reconstruction.detach()))
        return training(loss, [*parameters, *disc.parameters()], dtype), 1

    def coding(direction, plain=False, dtype="float32", n=2):
        model = plain_tokenizer()[0] if plain else FQGAN(FQGANConfig()).eval()
        images, ids = torch.rand(n, 3, 256, 256), torch.randint(0, 16384, (n, 3, 16, 16))
        return inference((lambda: model.encode(images)) if direction == "encode" else (lambda: model.decode(ids)), dtype), 2

    def gpt_step(plain=False, dtype="float32"):
        ids, labels = torch.randint(0, 16384, (2, 3, 16, 16)), torch.tensor([1, 2])
        if plain:
            made = PublishedGPT(3, D=1024, V=16384, classes=1000, trunk=24, head=3)
            parameters = [t.requires_grad_() for t in made.state.values()]
            return training(lambda: F.cross_entropy(made.logits(ids.flatten(2), labels, 16).float().flatten(0, 2), ids.flatten()), parameters, dtype), 1
        model = GPT(GPTConfig(dropout=0.0)).train()
        return training(lambda: model(ids, labels)[1], [*model.parameters()], dtype), 1

    def gpt_sampling(plain=False, dtype="float32"):
        if plain:
            fqgan.sampling = lambda *_: contextlib.nullcontext()
        model = GPT(GPTConfig(grid=8)).eval().to(train_tokenizer.DTYPES[dtype])
        return lambda: model.generate(torch.arange(4), cfg_scale=2.0), 1

    def small_sampling(cached):
        model = GPT(GPTConfig(k=3, vocab_size=256, num_classes=10, grid=16, n_layer=6, n_head=3, n_embd=192, head_layers=1, dropout=0.0)).eval()
        labels = torch.arange(4)
        return torch.no_grad()((lambda: model.generate(labels, cfg_scale=2.0)) if cached else lambda: uncached(model, labels, *([x] * 3 for x in (2.0, 1.0, 0, 1.0)), None)), 1

    def ten_crops(plain):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375)).save(file, "jpeg")
        source = type("Source", (), {"__len__": lambda _: 1, "__getitem__": lambda *_: (Image.open(io.BytesIO(file.getvalue())), 0)})()
        data = fqgan.ImageData(source, ["one"], 256, False, "")

        def one(i):
            image = fqgan.crop_square(fqgan.upright_rgb(source[0][0]), 256, views=10)[i]
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)
        return (lambda: torch.stack([one(i) for i in range(10)])) if plain else lambda: data.crops(0, views=10), 20

    part = functools.partial
    both = "float32", "bfloat16"

    def against_plain(make, *args):
        return {f"plain, {d}": part(make, *args, plain=True, dtype=d) for d in both} | {f"ours, {d}": part(make, *args, dtype=d) for d in both}

    return {
        "Frechet distance, 2048x2048": {"scipy.linalg.sqrtm": part(frechet, True), "ours": part(frechet, False)},
        "ten crops of a JPEG of 500x375": {"each by itself": part(ten_crops, True), "ours": part(ten_crops, False)},
        "quantizer, 4,096 tokens x 16,384 codes": {"plain": part(quantizer, plain=True), "ours": quantizer},
        "FQGAN-Triple 16x, training step of 2": against_plain(tokenizer_step),
        "FQGAN-Triple 16x, encoding 2 images": against_plain(coding, "encode"),
        "FQGAN-Triple 16x, decoding 2 images": against_plain(coding, "decode"),
        "FAR-Base, training step of 2": against_plain(gpt_step),
        "FAR-Base, 64 positions x 4 images, guided": against_plain(gpt_sampling),
        "GPT of 3.5 M, 256 positions x 4 images, guided": {"uncached": part(small_sampling, False), "ours": part(small_sampling, True)},
        "quantizers, 4,096 tokens, by codes": {f"{v:,}": part(quantizer, codes=v) for v in (1024, 4096, 16384, 65536, 262144)},
        "quantizer, 16,384 codes, by tokens": {f"{n:,}": part(quantizer, tokens=n) for n in (1024, 4096, 16384)},
        "quantizers, 4,096 tokens x 16,384 codes, by k": {f"{k}": part(quantizer, k=k) for k in (1, 2, 4, 8)},
        "training step of 1 at 256x256, by k": {f"{k}": part(tokenizer_step, k=k, batch=1) for k in (1, 2, 4, 8)},
        "training step of 1, k=3, by image size": {f"{s}": part(tokenizer_step, size=s, batch=1) for s in (64, 128, 256, 512)},
    }


def bench(chosen="", way=None):
    """`python test_fqgan.py --bench [WORD]`: the rows with that word in their name; each way in a process of its own."""
    import resource
    if way:
        work, times = benchmarks()[chosen][way]()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()  # the first time counts for memory alone
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        for _ in range(times):
            work()
        return print(json.dumps([(time.perf_counter() - began) / times, (peak - before) / 1e6, peak / 1e6]))
    for name, ways in benchmarks().items():
        if chosen not in name:
            continue
        for i, way in enumerate(ways):
            made = subprocess.run([sys.executable, __file__, "--bench", name, way], capture_output=True, text=True)
            seconds, grown, peak = json.loads(made.stdout) if made.returncode == 0 else sys.exit(made.stderr)
            first = (seconds, peak) if i == 0 else first
            print(f"{name if i == 0 else '':48s} {way:18s} {seconds:7.2f} s {grown:6.2f} GB more {peak:6.2f} GB in all" + (f" {seconds / first[0]:6.2f} of the time {peak / first[1]:6.2f} of the memory" if i else ""), flush=True)


# -----------------------------------------------------------------------------
# Faults: `python test_fqgan.py --faults`: what the quick tests do once, many times, seeded


def damaged(data, rng):
    """Bytes cut off, bits flipped, a stretch overwritten, or all at once."""
    data = bytearray(data)
    for kind in rng.choice(("cut", "flip", "zero"), size=rng.integers(1, 3), replace=False):
        if kind == "cut":
            del data[rng.integers(0, len(data)):]
        elif data:
            at = rng.integers(0, len(data))
            if kind == "flip":
                for i in rng.integers(0, len(data), rng.integers(1, 20)):
                    data[i] ^= 1 << int(rng.integers(0, 8))
            else:
                data[at:at + 64] = bytes(min(64, len(data) - at))
    return bytes(data)


def memory():
    """The most that this process has taken so far, in MB."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000


def faults_images(folder, rng, n=10_000):
    """Damaged images are read or refused, nothing else: no crash, no memory beyond a bound."""
    def saved(image, end):
        file = io.BytesIO()
        image.save(file, end)
        return file.getvalue()

    noise = Image.fromarray(rng.integers(0, 256, (40, 33, 3), dtype=np.uint8))
    whole = [saved(noise, end) for end in ("png", "jpeg", "gif", "bmp", "webp", "tiff")]
    claim = bytearray(whole[0])
    claim[16:24] = struct.pack(">II", 60_000, 60_000)  # a header of sizes that the file does not have
    claim[29:33] = struct.pack(">I", zlib.crc32(claim[12:29]))
    odd = [bytes(claim), b"", b"not an image", saved(Image.new("1", (12_000, 12_000)), "png"), saved(Image.new("1", (20_000, 20_000)), "png"),
           saved(Image.new("L", (1, 60_000)), "png"), saved(Image.new("L", (60_000, 1)), "png")]  # bombs and strips among them
    read, before = 0, memory()
    for i in range(n):
        path = folder / f"{i % 7}\n\"'\udcff{rng.choice(('.png', '.jpg', '.gif', '.bmp', '.webp', '.tif'))}"  # the ending is right one time in six
        path.write_bytes(odd[i // 100 % len(odd)] if i % 100 == 0 else damaged(whole[i % len(whole)], rng))
        data = fqgan.ImageData(type("One", (), {"samples": [(path, 0)], "__len__": lambda self: 1, "__getitem__": fqgan.Folder.__getitem__})(), ["x"], 16, True, "one")
        before_it = read
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(UserError), warnings.catch_warnings(action="ignore"):
            assert data[0][0].shape == (3, 16, 16)
            read += 1
        assert data.unreadable == (read == before_it)
        path.unlink()
    assert memory() - before < 1500, "an image of 12,000 x 12,000 pixels takes 430 MB, and its half while it is scaled"
    return f"{n} damaged images: {read} could be read all the same, {n - read} were refused; {memory() - before} MB of memory"


def faults_checkpoints(folder, rng, n=1000):
    """Mutated checkpoints of tokenizers and GPTs load or are refused in one line; what they carry is never run."""
    call(train_tokenizer, "--k", 2, "--out", folder / "run", *TINY_RUN)
    call(train_gpt, "--out", folder / "run", *TINY_GPT_RUN)
    makes = [(folder / "run" / "tokenizer.pt", fqgan.load_tokenizer), (folder / "run" / "gpt.pt", sample.load_generator)]
    loaded, path, touched, before = 0, folder / "mutated.pt", folder / "touched", memory()
    for i in range(n):
        good, read = makes[i // 2 % 2]
        if i % 2:
            path.write_bytes(damaged(good.read_bytes(), rng))
        else:
            mutated = {n: part for n, part in load(good).items() if n in ("kind", "config", "model", "settings", "classes", "tokenizer")}
            holder = mutated["tokenizer"] if "tokenizer" in mutated and rng.random() < 0.5 else mutated
            part = holder[rng.choice(("config", "model"))]
            name = rng.choice(list(part))
            absurd = ["text", None, -1, 10**9, 1.5, math.nan, [], {}, torch.zeros(3), torch.zeros(1).expand(10**6, 10**6), torch.zeros((), dtype=torch.int8), Hostile(touched)]
            if rng.random() < 0.2:
                del part[name]
            else:
                part[name] = absurd[rng.integers(len(absurd))]
            torch.save(mutated, path, _use_new_zipfile_serialization=i % 8 < 4)
        try:
            read(path)
            loaded += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert not touched.exists() and memory() - before < 500
    return f"{n} mutated checkpoints: {loaded} could be loaded all the same, {n - loaded} were refused in one line; {memory() - before} MB of memory"


def faults_kills(folder, rng, n=30):
    """A run killed at random moments, also while it writes, and resumed each time ends as one never killed."""
    flags = [*TINY_RUN, "--k", 2, "--steps", 2000, "--eval-every", 1, "--log-every", 3]
    call(train_tokenizer, *flags, "--out", folder / "whole")
    kills, writing, done = 0, 0, False
    while not done:
        resume = ["--resume"] if (folder / "cut" / "tokenizer.pt").exists() else flags
        process = subprocess.Popen([sys.executable, "train_tokenizer.py", *map(str, resume), "--out", str(folder / "cut")], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(4 + 2 * rng.random() if kills < n else 600)
            done = True
            assert process.returncode == 0, process.stderr.read()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            writing += (folder / "cut" / ".tokenizer.pt.tmp").exists()
    assert kills == n, f"the run was over after {kills} kills"
    a, b = (load(folder / name / "tokenizer.pt") for name in ("whole", "cut"))
    assert all(same(a[part], b[part]) for part in a.keys() - {"settings"}) and training_rows(folder / "whole" / "log.csv") == training_rows(folder / "cut" / "log.csv")
    return f"{kills} kills, {writing} of them while a checkpoint was written: weights, optimizer and log of training to the bit those of a run never killed"


def faults_flags(folder, rng, n=300):
    """Every script's flags fuzzed within their types: a run or one line."""
    def offline(*_, **__):
        raise OSError("offline")
    torch.hub.download_url_to_file = offline
    images, out = make_folder(folder / "images", each=10), folder / "trained"
    call(train_tokenizer, "--k", 2, "--out", out, *TINY_RUN, "--data", images)
    call(train_gpt, "--out", out, *TINY_GPT_RUN)
    few = ["--n", 4, "--batch-size", 2, "--device", "cpu"]
    scripts = {  # flags that come before the fuzzed ones, and those that come after them
        train_tokenizer: ([*TINY_RUN, "--k", 2, "--data", images], ["--steps", 1, "--overwrite", "--out", folder / "fuzz"]),
        train_gpt: ([*TINY_GPT_RUN, "--tokenizer", out / "tokenizer.pt"], ["--steps", 1, "--overwrite", "--out", folder / "fuzz"]),
        sample: (["--gpt", out / "gpt.pt", *few], ["--out", folder / "grid.png"]),
        evaluate: (["--tokenizer", out / "tokenizer.pt", "--data", images, *few], ["--json", folder / "e.json"])}
    never = {"help", "out", "npz", "json", "preset", "resume", "tensorboard", "compile", "workers", "steps", "epochs"}
    texts = ("", "none", "shapes", "x", "\udcff", str(images), str(out / "gpt.pt"))
    values = {int: (-1, 0, 1, 2, 3, 4, 8, 12), float: (-1.0, 0.0, 0.3, 1.0, 2.0, 1e9, math.nan, math.inf), None: texts, str: texts}
    ran = collections.Counter()
    for i in range(n):
        script = list(scripts)[i % len(scripts)]
        actions = [a for a in parser_of(script)._actions if a.dest not in never]
        argv = []
        for action in rng.choice(actions, rng.integers(1, 4), replace=False):
            pool = [] if action.nargs == 0 else action.choices or values.get(action.type, ("", "1", "1,2", "0,1", "-1,1", "0.5", "nan"))
            argv += [rng.choice(action.option_strings)] + ([str(pool[rng.integers(len(pool))])] if len(pool) else [])
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                call(script, *scripts[script][0], *argv, *scripts[script][1])
            ran[script.__name__] += 1
        except UserError as error:
            assert "\n" not in str(error), argv
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{script.__name__} {argv} ends in {type(error).__name__}: {error}") from error
    return f"{n} command lines of {len(scripts)} scripts: {ran.total()} ran ({', '.join(f'{k} {v}' for k, v in ran.items())}), {n - ran.total()} were refused in one line"


def faults(word=""):
    for fault in (f for f in (faults_checkpoints, faults_images, faults_flags, faults_kills) if word in f.__name__):
        began = time.time()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            told = fault(Path(folder), np.random.default_rng(0))
        print(f"{told} ({time.time() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    chosen = {"--bench": bench, "--faults": faults}.get("".join(sys.argv[1:2])) or sys.exit(__doc__)
    chosen(*sys.argv[2:])
