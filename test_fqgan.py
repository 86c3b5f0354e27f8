"""
Tests of behavior: every loss against its plain formula, cached sampling against uncached, a resumed run against an
unbroken one, two processes against one, bad input against its one line. Nothing is downloaded.

$ python -m pytest -q test_fqgan.py
"""

import contextlib
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
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import default_collate

import evaluate
import fqgan
from fqgan import FQGAN, GPT, FQGANConfig, GPTConfig, Quantizer, UserError, disentangle_loss, load_data
import sample
import train_gpt
import train_tokenizer

torch.set_num_threads(1)  # the models are small: threads would only wait for each other
HERE = Path(__file__).parent
# the smallest tokenizer and GPT that have every part: seconds, not minutes
SMALL = dict(image_size=16, downsample=4, patch_size=2, channels=32, channel_mult=(1, 1), res_blocks=1, z_channels=32,
             codebook_size=32, codebook_dim=4, adapter_depth=1, adapter_width=32, adapter_heads=2)
SMALL_GPT = dict(n_layer=2, n_head=2, n_embd=32, head_layers=1)
FEW_STEPS = dict(steps=4, batch_size=8, eval_every=2, eval_images=16, log_every=1, dtype="float32", device="cpu")

# -----------------------------------------------------------------------------
# Helpers

def as_flags(values):
    """dict(disc_start=2, channel_mult=(1, 2)) -> --disc-start 2 --channel-mult 1,2, as words"""
    flags = []
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flags += ["--" + name.replace("_", "-"), text]
    return flags

TINY_RUN = as_flags(SMALL | FEW_STEPS)
TINY_GPT_RUN = as_flags(SMALL_GPT | FEW_STEPS)

@contextlib.contextmanager
def command_line(script, *argv):
    """sys.argv as in `python SCRIPT ARGV`; signals are handled afterwards as they were before."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as after:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        for number in fqgan.ENDING_SIGNALS:
            after.callback(signal.signal, number, signal.getsignal(number))
        yield

def call(script, *argv):
    """Runs a script's main() in this process."""
    with command_line(script, *argv):
        script.main()

def call_cli(script, *argv):
    """As a process of its own would run it: mistakes become one line."""
    with command_line(script, *argv):
        fqgan.cli(script.main)

SHELL = os.environ | {"OMP_NUM_THREADS": "1"}

def shell_words(ranks, *argv):
    launcher = ["-u"]
    if ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, *map(str, argv)]

def shell(*argv, ranks=0, env=SHELL):
    """Runs a script as a person would, in a process of its own, or in one for each rank."""
    words = shell_words(ranks, *argv)
    return subprocess.run(words, cwd=HERE, text=True, capture_output=True, timeout=240, env=env)

@contextlib.contextmanager
def refused(message):
    """What is done inside must end in a UserError of one line that fits the pattern `message`."""
    with pytest.raises(UserError, match=message) as error:
        yield
    assert "\n" not in str(error.value)

class Hostile:
    """Unpickled without weights_only, it runs a command."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)

load = functools.partial(torch.load, weights_only=True)

def log_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))

def same(a, b):
    """To the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def assert_close(a, b, atol=2e-5):
    """Of tensors, and of dicts of them."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)

def all_finite(state):
    """Of a dict of tensors."""
    finite = [tensor.isfinite().all() for tensor in state.values()]
    return all(finite)

def contents(folder):
    """name -> bytes"""
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}

def uniform(*shape):
    """Random numbers in [-1, 1], as images are."""
    return torch.rand(shape) * 2 - 1

def images_like(config, n=2):
    return uniform(n, 3, config.image_size, config.image_size)

def small_tokenizer(**options):
    torch.manual_seed(0)
    return FQGAN(FQGANConfig(**SMALL | options)).eval()

def small_gpt(k=2, **options):
    torch.manual_seed(0)
    config = GPTConfig(**dict(k=k, vocab_size=11, num_classes=5, grid=3) | SMALL_GPT | options)
    model = GPT(config).eval()
    for output in model.outputs:  # they start at zero: nothing to compare
        torch.nn.init.normal_(output.weight, std=0.5)
    return model

def save_noise(path, n, size=(20, 24), seed=0):
    """n noise images 000.png, 001.png, ... of size (height, width) in a new folder -> their pixels (n,H,W,3)"""
    path.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return pixels

def make_folder(root, each=60):
    """Class folders "class 0" and "class 1" of noise images."""
    for label in range(2):
        save_noise(root / f"class {label}", each, seed=label)
    return root

@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Nothing is in torch.hub's cache, and nothing can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no route to host")))

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with the tokenizer and the GPT that the two scripts make of the first `shapes` in a few steps."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fqgan.Shapes, "__len__", lambda shapes: 2000 if shapes.train else 200)
        call(train_tokenizer, "--k", 2, "--out", out, *TINY_RUN)
        call(train_gpt, "--out", out, *TINY_GPT_RUN)
    return out

@pytest.fixture(scope="session")
def own_network(tmp_path_factory):
    """A network's file, as --teachers and --features take it: images of 16x16 -> 48 features."""
    path = tmp_path_factory.mktemp("network") / "own.pt2"
    any_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Pooled(), (torch.zeros(3, 3, 16, 16),), dynamic_shapes=any_batch)
    torch.export.save(program, path)
    return path

# -----------------------------------------------------------------------------
# Tokenizer

def test_vectors_of_flat_images_are_exact():
    """With channels last, GroupNorm is off by 1e-4 on images of one color: enough to find other codes."""
    options = dict(k=2, image_size=32, patch_size=1, channel_mult=(1, 2, 4), adapter_width=64)
    images = torch.tensor([1.0, -0.5]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    with torch.no_grad():
        found = small_tokenizer(**options).encode_vectors(images)
        exact = small_tokenizer(**options).double().encode_vectors(images.double())
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, exact))

@pytest.fixture(params=[(1, 4), (2, 8), (3, 16), (5, 4)], ids=str)
def tokenizer(request):
    """Of any k and downsample, of 16 codes, on images of 32 pixels."""
    k, downsample = request.param
    return small_tokenizer(k=k, downsample=downsample, image_size=32, patch_size=1, channel_mult=(),
                           codebook_size=16, codebook_dim=8, adapter_width=64)

def test_tokenizer_encodes_and_decodes(tokenizer):
    images = images_like(tokenizer.config)
    k = tokenizer.config.k
    grid = 32 // tokenizer.config.downsample
    ids = tokenizer.encode(images)
    assert ids.shape == (2, k, grid, grid) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < 16
    whole = tokenizer.decode(ids)
    assert torch.allclose(whole, tokenizer(images)[0], atol=1e-4), "forward in eval mode is encode, then decode"
    tokenizer.encode(-images)
    assert torch.equal(tokenizer.last_ids, ids), "training counts them, and not those of an evaluation"
    assert torch.equal(tokenizer.decode(ids, only=range(k)), whole)
    first = tokenizer.decode(ids, only=[0])
    others = torch.cat([ids[:, :1], (ids[:, 1:] + 1) % 16], 1)
    assert torch.equal(tokenizer.decode(others, only=[0]), first), "of the first sub-codebook alone"
    assert k == 1 or not torch.equal(first, whole)
    with refused(rf"shape \(2, {k + 1}, {grid}, {grid}\), expected \(B, {k}, h, w\)"):
        tokenizer.decode(torch.cat([ids, ids[:, :1]], 1))

def test_losses_of_all_sub_codebooks_train_every_weight(tokenizer):
    """Each is the sum over sub-codebooks, with its weight."""
    options = dict(commit_weight=0.3, entropy_weight=0.2, entropy_temperature=0.5)
    model = FQGAN(dataclasses.replace(tokenizer.config, disentangle_weight=0.7, **options))
    images = images_like(model.config)
    reconstruction, losses = model(images)
    assert reconstruction.shape == images.shape
    expected = {"reconstruct": F.mse_loss(reconstruction, images), "codebook": 0, "commit": 0, "entropy": 0}
    chosen = []
    for branch, z in zip(model.branches, model.encode_vectors(images)):
        quantizer = Quantizer(16, 8, **options)
        quantizer.load_state_dict(branch.quantizer.state_dict())
        z_q, _, each = quantizer(z)
        chosen.append(z_q)
        for name, loss in each.items():
            expected[name] += loss
    expected["disentangle"] = 0.7 * disentangle_loss(chosen)
    assert_close(losses, expected, atol=1e-6)
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]

@pytest.mark.parametrize("mult", [(1, 2, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4), (1, 1, 1, 2, 2, 4)])
def test_published_widths_are_the_default(mult):
    assert FQGANConfig(downsample=2 ** (len(mult) - 1)).channel_mult == mult

def test_without_adapters_any_size_is_taken():
    model = small_tokenizer(k=1, adapter_depth=0)
    assert model.encode(torch.zeros(1, 3, 24, 40)).shape == (1, 1, 6, 10)
    with refused("16x18, not divisible"):
        model.encode(torch.zeros(1, 3, 18, 16))
    with refused("24x24; .* positions are for 16x16"):
        small_tokenizer(k=1).encode(torch.zeros(1, 3, 24, 24))

def plain_entropy(distance, temperature):
    """MAGVIT-v2's: distances (n,V) -> mean entropy of the soft assignments, minus the entropy of their mean"""
    p = torch.softmax(-distance / temperature, 1)
    mean = p.mean(0)
    return -(p * p.log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()

def test_quantizer_against_its_definition():
    torch.manual_seed(0)
    quantizer = Quantizer(50, 6, commit_weight=0.3, entropy_weight=0.05, entropy_temperature=0.1)
    quantizer.codebook.data *= torch.rand(50, 1) + 0.5  # stored codes are of any length
    quantizer.double()
    z = (3 * torch.randn(2, 6, 3, 4)).double().requires_grad_()
    z_q, ids, losses = quantizer(z)

    flat = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, 6), dim=1)
    codes = F.normalize(quantizer.codebook, dim=1)
    distance = (flat[:, None] - codes[None]).square().sum(-1)
    nearest = codes[distance.argmin(1)]
    assert torch.equal(ids.flatten(), distance.argmin(1))
    assert torch.allclose(z_q.permute(0, 2, 3, 1).reshape(-1, 6).double(), nearest, atol=1e-6)
    expected = {"codebook": (nearest - flat.detach()).square().mean(),
                "commit": 0.3 * (nearest.detach() - flat).square().mean(),
                "entropy": 0.05 * plain_entropy(distance, 0.1)}
    for name, value in expected.items():
        assert torch.allclose(losses[name].double(), value, rtol=1e-4), name
        for leaf in (z, quantizer.codebook):
            ours, = torch.autograd.grad(losses[name], leaf, retain_graph=True, allow_unused=True)
            plain, = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)
            assert (ours is None) == (plain is None), f"{name} must move what its formula moves, and nothing else"
            assert ours is None or torch.allclose(ours, plain, rtol=1e-3, atol=1e-7), name

    pull = torch.randn_like(z_q)  # straight-through: the gradient at z_q is that at the normalized z
    ours, = torch.autograd.grad((z_q * pull).sum(), z, retain_graph=True)
    plain, = torch.autograd.grad((F.normalize(z, dim=1) * pull).sum(), z)
    assert torch.allclose(ours, plain.to(ours.dtype), atol=1e-6)

def test_entropy_in_chunks_is_the_plain_entropy():
    torch.manual_seed(0)
    leaves = [torch.randn(n, 8, dtype=torch.double, requires_grad=True) for n in (100, 2**14)]  # in chunks of 16
    z, codes = (F.normalize(leaf, dim=1) for leaf in leaves)
    distance = torch.cdist(z, codes).square()
    loss, ids = fqgan.entropy_loss(z, codes, 0.05)
    plain = plain_entropy(distance, 0.05)
    assert torch.allclose(loss, plain)
    assert torch.equal(ids, distance.argmin(1))
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(gradients, torch.autograd.grad(plain, leaves)):
        assert torch.allclose(a, b, atol=1e-9)

def test_a_square_of_positions_shares_a_code():
    """The mean of its vectors is quantized; at the edges of the grid there may be smaller ones."""
    config = dict(k=4, image_size=32, adapter_depth=0)
    images = uniform(2, 3, 32, 32)
    plain = small_tokenizer(**config).encode_vectors(images)
    tokenizer = small_tokenizer(**config, pool=(1, 4, 100, 3))
    pooled = tokenizer.encode_vectors(images)
    ids = tokenizer.encode(images)
    for i, size in enumerate((1, 4, 100, 3)):
        for y, x in itertools.product(range(0, 8, size), range(0, 8, size)):
            square = (..., slice(y, y + size), slice(x, x + size))
            mean = plain[i][square].mean((2, 3), keepdim=True)
            assert torch.allclose(pooled[i][square], mean.expand_as(pooled[i][square]), atol=1e-6)
            assert torch.equal(ids[:, i][square], ids[:, i, y, x, None, None].expand_as(ids[:, i][square]))
    assert small_tokenizer(k=1, pool=(1, 2, 8)).encode(uniform(1, 3, 16, 16)).shape == (1, 1, 4, 4)

def test_codes_are_searched_in_float32_under_autocast():
    """In bfloat16 one vector in fifteen finds another code: a GPT would learn wrong tokens."""
    torch.manual_seed(0)
    quantizer = Quantizer(1024, 8)
    z = torch.randn(2, 8, 32, 32)
    ids = quantizer(z)[1]
    bare = Quantizer(1024, 8, entropy_weight=0)
    bare.load_state_dict(quantizer.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found in (quantizer(z)[1], quantizer.nearest(z), bare(z)[1]):
            assert torch.equal(found, ids)
    vectors = F.normalize(z, dim=1).permute(0, 2, 3, 1).reshape(-1, 8)
    codes = F.normalize(quantizer.codebook, dim=1)
    rounded = (vectors.bfloat16() @ codes.bfloat16().T).argmax(1)
    assert (rounded != ids.flatten()).any()

def test_disentangle_loss():
    """Squared: opposite is not orthogonal."""
    chosen = torch.randn(4, 2, 5, 3, 3, dtype=torch.double)
    squares = [F.cosine_similarity(a, b, dim=1).square() for a, b in itertools.combinations(chosen, 2)]
    assert math.isclose(disentangle_loss(chosen), torch.stack(squares).mean(), rel_tol=1e-5)
    assert disentangle_loss(chosen[:1]) == 0

def test_decorrelation_loss():
    """As CKA is defined: of linearly related codes 1, also where they are orthogonal."""
    x, y = torch.randn(2, 5, 4, 10, 10) + 1
    x[:, 2:] = 0
    assert math.isclose(fqgan.decorrelation_loss([x, x.flip(1)]), 1, rel_tol=1e-4)
    vectors = [fqgan.to_vectors(z).double() for z in (x + y, y, x)]
    grams = [(v - v.mean(0)) @ (v - v.mean(0)).T for v in vectors]
    cka = [(a * b).sum() / (a.norm() * b.norm()) for a, b in itertools.combinations(grams, 2)]
    assert math.isclose(fqgan.decorrelation_loss([x + y, y, x]), sum(cka) / 3, rel_tol=1e-4)

    model = small_tokenizer(k=2, decorrelate_weight=0.5).train()
    losses = model(images_like(model.config))[1]
    losses["decorrelate"].backward()
    assert 0 < losses["decorrelate"] <= 0.5 and model.branches[0].quant_conv.weight.grad.any()

def test_representation_loss_is_infonce():
    torch.manual_seed(0)
    predicted, features = torch.randn(2, 5, 7)
    cosine = F.cosine_similarity(predicted[:, None], features[None], dim=2)
    log_sum = cosine.exp().sum(1).log()
    assert torch.allclose(fqgan.representation_loss(predicted, features), (log_sum - cosine.diag()).mean())
    assert fqgan.representation_loss(predicted[:1], features[:1]) == 0, "a batch of one has nothing to tell apart"

def test_teachers_supervise_the_last_sub_codebooks():
    """Each with its own features; none reaches a sub-codebook without a teacher."""
    model = small_tokenizer(k=3, teacher_widths=(24, 48))
    images = images_like(model.config, 5)
    features = [torch.randn(5, 24), torch.randn(5, 48)]
    expected = 0
    for branch, z, target in zip(model.branches[1:], model.encode_vectors(images)[1:], features):
        predicted = branch.feature_head(branch.quantizer(z)[0])
        expected += model.config.representation_weight * fqgan.representation_loss(predicted, target)
    assert torch.allclose(model(images, features)[1]["representation"], expected, atol=1e-6)
    model.train()(images, features)[1]["representation"].backward()
    for i, branch in enumerate(model.branches):
        gradients = [p.grad for p in branch.parameters() if p.grad is not None]
        assert any(gradient.any() for gradient in gradients) == (branch.feature_head is not None) == (i > 0)

def test_adversary():
    disc = fqgan.Discriminator()
    assert disc(torch.randn(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert sorted(disc.state_dict())[:2] == ["main.0.bias", "main.0.weight"] and "main.11.weight" in disc.state_dict()
    images = torch.zeros(1, 3, 256, 256, requires_grad=True)
    disc.eval()(images)[0, 0, 15, 15].backward()
    for dims in ((0, 1, 3), (0, 1, 2)):
        places = images.grad.abs().sum(dims).nonzero()
        assert places.max() - places.min() + 1 == 70, "a logit sees 70x70 pixels"
    loss = fqgan.hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0]))
    assert loss == 0.5 * ((0 + 1) / 2 + (0 + 2) / 2)

@pytest.mark.parametrize("config, options, message", [
    (FQGANConfig, dict(k=0), "k is 0"),
    (FQGANConfig, dict(image_size=250), "250 is not divisible by downsample 16: 240 is"),
    (FQGANConfig, dict(downsample=12), "power of two"),
    (FQGANConfig, dict(channels=100), "a multiple of norm_groups 32"),
    (FQGANConfig, dict(channel_mult=(1, 2)), "must name 5 stages"),
    (FQGANConfig, dict(adapter_heads=7), "adapter_heads 7"),
    (FQGANConfig, dict(downsample=4, patch_size=8), "multiple of patch_size 8"),
    (FQGANConfig, dict(k=1, teacher_widths=(8, 8)), "2 teachers are more than k=1"),
    (GPTConfig, dict(n_embd=100), "multiple of 4 x n_head"),
    (GPTConfig, dict(dropout=1.0), "must be below 1"),
    (GPTConfig, dict(k=3, grid=1), "k=3 codes are more than"),
    (GPTConfig, dict(grid=1000), "at most 256"),
])
def test_config_refuses(config, options, message):
    with refused(message):
        config(**options)

def test_recomputing_changes_nothing(monkeypatch):
    recomputed = Mock(side_effect=fqgan.checkpoint)
    monkeypatch.setattr(fqgan, "checkpoint", recomputed)
    gradients = []
    for recompute in (False, True):
        model = small_tokenizer(k=3, recompute=recompute).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sum(model(images_like(model.config))[1].values())
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert recomputed.called == recompute
    assert same(*gradients)

@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.compile, about checkpointing
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer, recompute", "gpt"])
def test_models_compile_as_one_graph(name):
    """Nothing falls back to Python, which would be silent and slow; losses and gradients are the same."""
    if name == "gpt":
        model = small_gpt(dropout=0.0, label_dropout=0.0)
        arguments = random_batch(model)
    else:
        model = small_tokenizer(k=2, recompute="recompute" in name)
        arguments = [images_like(model.config)]
    plain = model.train()(*arguments)[1]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(*arguments)[1]
    assert_close(compiled, plain)
    losses = [each if name == "gpt" else sum(each.values()) for each in (plain, compiled)]
    gradients = [torch.autograd.grad(loss, [*model.parameters()]) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)

def test_no_image_changes_sides(tmp_path):
    """With one file more, all held-out images were among those that a run had been trained on."""
    def parts():
        both = fqgan.load_train_and_held_out(tmp_path, 16)
        train, held_out = [{path for path, _ in data.source.samples} for data in both]
        assert not train & held_out
        return train, held_out

    make_folder(tmp_path, each=100)
    train, held_out = parts()
    assert len(train | held_out) == 200 and 8 <= len(held_out) <= 32
    save_noise(tmp_path / "another class", 50)
    (tmp_path / "class 0" / "000.png").rename(tmp_path / "class 1" / "a first one.png")
    new_train, new_held_out = parts()
    assert not train & new_held_out and not held_out & new_train and len(new_train | new_held_out) == 250

def test_a_few_images_that_hold_none_out(tmp_path):
    """Evaluated on what it is trained on, and so said."""
    names = [name for name in map("{:03d}.png".format, range(30)) if not fqgan.held_out_by_name(name)]
    train, held_out = fqgan.load_train_and_held_out(tree(tmp_path, *names[:4]), 8)
    assert len(train) == len(held_out) == 4 and "too few to hold any out" in held_out.description

def test_names_are_composed(tmp_path):
    """macOS writes an accent as a letter of its own: such a class could not be asked for, and was in other parts."""
    typed = "caf\u00e9"
    stored = "cafe\u0301"
    assert load_data(tree(tmp_path, f"{stored}/a.png", "the/a.png"), 8, True).classes == [typed, "the"]
    assert sample.class_indices(f"{typed},{stored}", [typed, "the"]) == [0, 0]
    for i in range(99):
        assert fqgan.held_out_by_name(f"{typed}/{i}") == fqgan.held_out_by_name(f"{stored}/{i}")

# -----------------------------------------------------------------------------
# Data

def test_shapes():
    train, held_out = fqgan.load_train_and_held_out("shapes", 32)
    assert (len(train), len(held_out)) == (20_000, 2_000)
    image, label = train[13]
    assert image.shape == (3, 32, 32) and image.min() >= -1 and image.max() <= 1 and image.dtype == torch.float32
    assert train.classes[label] == "diamond" and len(set(train.classes)) == 10
    assert torch.equal(load_data("shapes", 32, True)[13][0], image), "the same item is the same picture, always"
    seen = {train[i][0].numpy().tobytes() for i in range(1000)}
    others = {held_out[i][0].numpy().tobytes() for i in range(300)}
    assert len(seen) == 1000 and not seen & others
    large, _ = load_data("shapes", 64, True)[13]
    difference = F.avg_pool2d(image, 4) - F.avg_pool2d(large, 8)
    assert difference.abs().max() < 0.1, "rendered at another size it is the same figure"
    with pytest.raises(IndexError):
        train[len(train)]

RED = Image.new("RGB", (40, 20), (200, 30, 40))
MIDDLE = np.full((20, 40), 128)
FORMATS = {  # file's name: (image, the color of its center)
    "rgb.png": (RED, (200, 30, 40)),
    "gray.png": (RED.convert("L"), (82, 82, 82)),
    "palette.png": (RED.convert("P", palette=Image.Palette.ADAPTIVE), (200, 30, 40)),
    "cmyk.jpg": (RED.convert("CMYK"), (200, 30, 40)),
    "transparent.png": (Image.new("RGBA", (40, 20), (200, 30, 40, 0)), (255, 255, 255)),
    "16bit.png": (Image.fromarray(np.uint16(257 * MIDDLE)), None),
    "16bit.pgm": (Image.fromarray(np.uint16(257 * MIDDLE)), None),
    "32bit.tiff": (Image.fromarray(np.int32(MIDDLE)), None),
    "float.tiff": (Image.fromarray(np.float32(MIDDLE / 256)), None),
    "ending.jfif": (RED, (200, 30, 40)),
    "ending.avif": (RED, (200, 30, 40)),
}

@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_image_becomes_rgb(name, tmp_path, capsys):
    """More than 8 bits, for whose range there is no rule, came out black (12 bits in 16): refused by name."""
    image, expected = FORMATS[name]
    image.save(tmp_path / name)
    data = load_data(tmp_path, 16, False)
    assert len(data) == 1 and data.classes == ["images"]
    if expected is None:
        with refused("1 images of .* cannot be read"):
            data[0]
        assert re.search(f"{name}.* no known range; save 8 bits", capsys.readouterr().err)
    else:
        center = fqgan.to_uint8(data[0][0])[:, 8, 8].int()
        assert (center - torch.tensor(expected)).abs().max() <= 12, center

@pytest.mark.parametrize("tags, is_turned", [
    ([(0x0112, 3, 6)], True), ([(0x0112, 3, 6), (0x0128, 4, 70_000)], True), ([(0x0112, 4, 70_000)], False)])
def test_exif_orientation(tags, is_turned, tmp_path):
    """By tag 0x112 alone: writing all of EXIF again fails where another tag's value is outside its type."""
    image = Image.new("RGB", (20, 40), "blue")
    image.paste("white", (0, 0, 20, 20))  # the upper half; orientation 6: to be turned clockwise by 90 degrees
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, kind, value in tags:
        exif += struct.pack("<HHII", tag, kind, 1, value)
    image.save(tmp_path / "turned.jpg", quality=95, exif=exif + bytes(4))
    pixels = fqgan.to_uint8(load_data(tmp_path, 16, False)[0][0])
    first, last = (pixels[0, 8, 1], pixels[0, 8, 14]) if is_turned else (pixels[0, 14, 8], pixels[0, 1, 8])
    assert first < 60 and last > 200, "what was above is to the right after the turn"
    with Image.open(tmp_path / "turned.jpg") as opened:
        assert fqgan.to_rgb(opened).size == ((40, 20) if is_turned else (20, 40))

TINY_PNG = io.BytesIO()
Image.new("RGB", (8, 8)).save(TINY_PNG, "png")

def tree(root, *names):
    """A file at each of these paths, an image if its name says so; a folder where a name ends with a slash."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(TINY_PNG.getvalue() if name.endswith(".png") else b"")
    return root

@pytest.mark.parametrize("names, message", [
    (["train/cat/a.png", "train/dog/a.png", "val/cat/a.png"], "different class folders"),
    (["train/cat/a.png", "val/dog/a.png"], "different class folders"),
    (["train/cat/a.png", "train/dog/a.png"], "holds one of train and val"),  # was a class of that name
    (["val/cat/a.png", "more/cat/a.png"], "holds one of train and val"),
    (["empty/"], "holds no image"),
    (["__MACOSX/._a.png", ".hidden/a.png"], "holds no image"),
])
def test_folders_that_cannot_be_used(names, message, tmp_path):
    with refused(message):
        fqgan.load_train_and_held_out(tree(tmp_path, *names), 8)

SYSTEM = ["lost+found/", ".thumbnails/a.png", "__MACOSX/._a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png"]

@pytest.mark.parametrize("parts, names, classes, size, said", [
    # a folder without images is no class: samples of it were generated and measured
    (["train", "val"], ["cat/a.png", "cat/._a.png", "dog/a.png", "dog/@eaDir/a/b.png", "other/notes.txt", *SYSTEM],
     ["cat", "dog"], 2, "2 images of 2 classes"),
    (["TRAIN", "Test"], ["a.png", "b.png", "c.heic", "d.txt", *SYSTEM],
     ["images"], 2, "without 2 other files: 2 images of 1 classes"),
    (["Training", "validation"], ["cat/deep/er/a.png", "cat/b.png", "cat/c.txt", "dog/deep/a.png"],
     ["cat", "dog"], 3, "1 other files: 3 images"),
    # trained on the two images of an inner folder, without a word of the others
    (["train", "valid"], ["inner/a.png", "inner/b.png", "1.png", "2.png", "3.png"],
     ["inner"], 2, "without 3 other files: 2 images"),
])
def test_what_is_taken_and_what_is_said(parts, names, classes, size, said, tmp_path):
    """Two folders of such names are the parts: they were two classes, and the test images were trained on."""
    for part in parts:
        tree(tmp_path / part, *names)
    for part, data in zip(parts, fqgan.load_train_and_held_out(tmp_path, 8)):
        assert data.classes == classes and len(data) == size
        assert re.search(f"/{part}, .*{said}", data.description)
        assert all(f"/{part}/" in path for path, _ in data.source.samples)

def test_links(tmp_path):
    """A class folder may be a link; a link to a folder above is a cycle, and two cycles took for ever."""
    tree(tmp_path, "store/cats/a.png", "data/dog/a.png", "data/dog/b/c.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "data" / "up").symlink_to("..")
    (tmp_path / "data" / "here").symlink_to(".")
    for name in ("loop", "b/loop"):
        (tmp_path / "data" / "dog" / name).symlink_to(tmp_path / "data" / "dog")
    source = fqgan.Folder(tmp_path / "data")
    assert source.classes == ["cat", "dog"] and [label for _, label in source.samples] == [0, 1, 1]

ROWS, COLUMNS = np.indices((100, 200), dtype=np.uint8)
PLANE = Image.fromarray(np.stack([COLUMNS, ROWS, 0 * ROWS], 2))  # red tells a pixel's column, green its row

def edges(crop):
    """Of a crop of PLANE: the original's column at its left and right, and its row at top and bottom."""
    pixels = np.asarray(crop, float)
    assert pixels.shape == (50, 50, 3)
    found = [pixels[:, 0, 0], pixels[:, -1, 0], pixels[0, :, 1], pixels[-1, :, 1]]
    return np.mean(found, 1)

def test_crops_are_where_llamagen_takes_them(tmp_path):
    """The center and its mirror image; of the central square at 55 pixels the center and corners, and theirs."""
    assert np.allclose(edges(fqgan.center_crop(PLANE, 50)), [50, 149, 0, 99], atol=2)
    PLANE.save(tmp_path / "a.png")
    data = load_data(tmp_path, 50, False)

    def views(n):
        images, label = train_gpt.Views(data, n)[0]
        assert images.shape == (n, 3, 50, 50) and label == 0
        return [edges(image) for image in fqgan.to_uint8(images).permute(0, 2, 3, 1).numpy()]

    assert np.allclose(views(2), [[50, 149, 0, 99], [149, 50, 0, 99]], atol=2)
    assert np.allclose(views(1), [[50, 149, 0, 99]], atol=2)
    ten = views(10)
    for x, y in [(54.5, 4.5), (50, 0), (59, 0), (50, 9), (59, 9)]:
        for left, right in ((x, x + 90), (x + 90, x)):
            distance = abs(np.stack(ten) - [left, right, y, y + 90]).max(1)
            assert (distance < 3).sum() == 1, "a pixel of the crop is 1.8 of the original"

def test_random_crops_are_anywhere():
    crops = [fqgan.random_crop(PLANE, 50, random.Random(i)) for i in range(300)]
    left, right, top, _ = np.transpose([*map(edges, crops)])
    widths = abs(right - left)
    assert 77 <= widths.min() <= 83 and 95 <= widths.max() <= 101, "0.8 to 1.0 of the shorter side"
    assert 0.4 < (right < left).mean() < 0.6, "mirrored"
    assert min(left.min(), right.min()) < 15 and max(left.max(), right.max()) > 185 and top.max() > 12
    small = np.asarray(fqgan.random_crop(PLANE.resize((55, 52)), 50, random.Random(0)))
    assert np.ptp(small[:, :, 0]) > 170, "a small image is not enlarged: nothing is learned from blur"

def test_images_are_resized_as_adm_does_it():
    """Halved by box averages, then bicubic."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    expected = np.float32(noise.reduce(2).reduce(2))
    for resize in (fqgan.resize_shorter, fqgan.center_crop):
        assert np.allclose(np.float32(resize(noise, 50)), expected, atol=2)
    strip = Image.new("RGB", (3, 100))
    assert fqgan.center_crop(strip, 16).size == (16, 16)
    assert fqgan.random_crop(strip, 16, random.Random(0)).size == (16, 16)

def test_training_crops_are_drawn_and_repeatable(tmp_path):
    """From the seed and the place in training alone; what is held out is seen by its center."""
    items = train_tokenizer.TrainingItems(load_data(make_folder(tmp_path, each=2), 16, True))

    def crop(place):
        return items[fqgan.Draw(1, f"0 {place}")][0].numpy().tobytes()

    assert crop(7) == crop(7) and len(set(map(crop, range(9)))) > 5, "an image is cropped otherwise in each epoch"
    shapes = load_data("shapes", 16, True)
    assert torch.equal(train_tokenizer.TrainingItems(shapes)[fqgan.Draw(3, "0 0")][0], shapes[3][0])

def test_unreadable_images(tmp_path, capsys):
    """Ten, of however few, may be: 2 of 300, both held out, ended a run at its first evaluation."""
    save_noise(tmp_path / "f", 300)
    data = load_data(tmp_path / "f", 16, True)
    paths = [Path(path) for path, _ in data.source.samples]
    paths[7].write_bytes(paths[7].read_bytes()[:60])
    for _ in range(2):
        assert torch.equal(data[7][0], data[8][0]), "the next image stands in"
    assert data.failed.sum() == 1 and capsys.readouterr().err.count(paths[7].name) == 1, "named once"
    for path in paths[20:29]:
        path.write_bytes(b"not an image")
    list(map(data.__getitem__, range(40)))
    assert data.failed.sum() == 10
    paths[40].write_bytes(b"")
    with refused("too many, see above"):
        data[40]
    with pytest.raises(UserError, match="too many") as error:  # raised in a worker process, it arrives as one line
        list(torch.utils.data.DataLoader(load_data(tmp_path / "f", 16, True), 10, num_workers=1))
    assert str(error.value).strip().splitlines()[-1].startswith("fqgan.UserError: ")

def test_cifar(monkeypatch):
    def made(root, train, download):
        assert download
        return fqgan.Shapes(16, train)

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", made)
    train, held_out = fqgan.load_train_and_held_out("cifar100", 16)
    assert train.source.train and not held_out.source.train
    assert train.classes == fqgan.Shapes.classes and train[1][1] == 1

def test_order_is_the_same_on_any_number_of_ranks(monkeypatch):
    def batches(rank=0, world_size=1, first_step=0, accumulate=1):
        monkeypatch.setattr(fqgan, "rank", lambda: rank)
        monkeypatch.setattr(fqgan, "world_size", lambda: world_size)
        return list(fqgan.training_batches(10, 3, first_step, 9, 4, accumulate))

    one = batches()
    assert [sorted(a + b) for a, b in zip(batches(0, 2), batches(1, 2))] == [sorted(batch) for batch in one]
    assert batches(first_step=5) == one[5:], "taken up at step 5"
    micro = batches(accumulate=2)
    assert [a + b for a, b in zip(micro[::2], micro[1::2])] == one
    order, seeds = zip(*itertools.chain(*one))
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    assert len(set(seeds)) == 36, "crops are drawn anew in each epoch"

def test_pixels_and_numbers():
    """As the official scripts write images: clamp(127.5 x + 128), cut to whole numbers."""
    images = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert fqgan.to_uint8(images).tolist() == [0, 0, 128, 255, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    numbers = fqgan.from_uint8(levels)
    assert torch.equal(fqgan.to_uint8(numbers), levels) and (numbers.min(), numbers.max()) == (-1, 1)

# -----------------------------------------------------------------------------
# GPT

def random_batch(model, n=2):
    """-> (ids, labels)"""
    c = model.config
    return torch.randint(c.vocab_size, (n, c.k, c.grid, c.grid)), torch.randint(c.num_classes, (n,))

@pytest.mark.parametrize("head_layers", [0, 1])
def test_gpt_starts_at_the_entropy_of_a_guess(head_layers):
    model = GPT(GPTConfig(k=3, vocab_size=11, num_classes=5, grid=3, **SMALL_GPT | dict(head_layers=head_layers)))
    batch = random_batch(model)
    model(*batch)[1].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    logits, loss = model.eval()(*batch)
    assert logits.shape == (2, 3, 9, 11) and logits.dtype == torch.float32
    assert math.isclose(loss.item(), math.log(11), rel_tol=1e-5)

def test_dropout_is_on_in_training_only():
    model = small_gpt(dropout=0.5, label_dropout=0.0)
    batch = random_batch(model)
    assert same(model(*batch), model(*batch))
    assert not torch.allclose(model.train()(*batch)[1], model(*batch)[1])
    x = torch.randn(2, 3, model.config.n_embd)
    for block in (*model.trunk, *model.head):
        block.dropout.p = 1.0
        assert torch.equal(block(x), x), "of attention and of MLP all is dropped"

def test_gpt_loss_is_the_mean_cross_entropy():
    """In training too, where it may be computed without all logits at once; its gradients with it."""
    model = small_gpt(dropout=0.0, label_dropout=0.0)
    ids, labels = random_batch(model)
    logits, loss = model(ids, labels)
    chosen = logits.softmax(-1).gather(-1, ids.flatten(2)[..., None])
    expected = -chosen.log().mean()
    trained = model.train()(ids, labels)[1]
    assert torch.allclose(loss, expected, rtol=1e-5) and torch.allclose(trained, expected, rtol=1e-5)
    gradients = [torch.autograd.grad(each, [*model.parameters()]) for each in (trained, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)

def test_null_class_replaces_labels_in_training():
    model = small_gpt(label_dropout=0.5)
    seen = []
    model.class_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].tolist()))
    ids, _ = random_batch(model, 400)
    labels = torch.full((400,), 2)
    model.train()(ids, labels)
    model.eval()(ids, labels)
    assert set(seen[0]) == {2, 5} and 160 < seen[0].count(5) < 240 and seen[1] == [2] * 400

def test_class_at_every_position():
    """The class is in the input of every position: it moves each one's logits also where attention to it is cut."""
    model = small_gpt(class_everywhere=True)
    for block in model.trunk:
        torch.nn.init.zeros_(block.attn.proj.weight)
    ids, _ = random_batch(model, 1)
    logits = [model(ids, torch.tensor([label]))[0] for label in (1, 2)]
    assert (logits[0] != logits[1]).any(-1).all()
    model.config.class_everywhere = False
    logits = [model(ids, torch.tensor([label]))[0] for label in (1, 2)]
    assert (logits[0] != logits[1]).any(-1)[0, :, 0].all() and torch.equal(logits[0][:, :, 1:], logits[1][:, :, 1:])

# -----------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def uncached(model, labels, cfg_scale, temperature, top_k, top_p, generator, cfg_power=(0, 0, 0)):
    """Sampling as one would write it first: the whole model for every code. Of each parameter k values."""
    c = model.config
    null = torch.full_like(labels, c.num_classes)
    ids = torch.zeros(len(labels), c.k, c.grid**2, dtype=torch.long)
    for p, i in itertools.product(range(c.grid**2), range(c.k)):
        so_far = ids[:, :, :p + 1]
        logits = model(so_far, labels)[0][:, i, p]
        if cfg_scale[i] != 1:
            without = model(so_far, null)[0][:, i, p]
            growth = [1, 2 * p / (c.grid**2 - 1), 3 * (p / (c.grid**2 - 1)) ** 2][cfg_power[i]]
            logits = without + (1 + (cfg_scale[i] - 1) * growth) * (logits - without)
        ids[:, i, p] = fqgan.sample_token(logits, temperature[i], top_k[i], top_p[i], generator)
    return ids.unflatten(2, (c.grid, c.grid))

def seeded(seed):
    return torch.Generator().manual_seed(seed)

@pytest.mark.parametrize("k, head_layers", [(1, 0), (1, 1), (2, 1), (3, 2), (3, 0)])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5, 0.0, 0.3, 0.5, 0.99])
def test_cached_sampling_is_uncached_sampling(k, head_layers, cfg_scale):
    """A scale below 1 was taken for 1."""
    model = small_gpt(k, head_layers=head_layers, class_everywhere=k == 3)
    labels = torch.tensor([0, 3, 3])
    plain = uncached(model, labels, [cfg_scale] * k, [1.0] * k, [0] * k, [1.0] * k, seeded(1))
    ids = model.generate(labels, cfg_scale, generator=seeded(1))
    assert ids.shape == (3, k, 3, 3) and torch.equal(ids, plain)
    assert torch.equal(model.generate(labels, cfg_scale, generator=seeded(1)), ids)
    assert not torch.equal(model.generate(labels, cfg_scale, generator=seeded(2)), ids)

def test_positions_are_turned_in_float32(monkeypatch):
    """Judging its own draws in bfloat16 (--best-of), the GPT turned by other angles than in drawing them."""
    turned = Mock(side_effect=fqgan.rotate)
    monkeypatch.setattr(fqgan, "rotate", turned)
    model = small_gpt(2).bfloat16()
    model(*random_batch(model))
    model.generate(torch.arange(3))
    assert {call.args[1].dtype for call in turned.call_args_list} == {torch.float32}

@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")
def test_a_gpu_gives_what_a_cpu_gives():
    """Positions are replayed there, each with its own random numbers; autocast would make maps float32."""
    model = small_gpt(3)
    labels = torch.arange(5)
    expected = model.generate(labels, 2.0, temperature=0)
    model.cuda()
    assert torch.equal(model.generate(labels.cuda(), 2.0, temperature=0).cpu(), expected)
    for output in model.outputs:
        torch.nn.init.zeros_(output.weight)  # all codes are equally likely
    ids = model.generate(labels.cuda(), generator=torch.Generator("cuda").manual_seed(1))
    assert len(ids[:, 0].flatten(1).unique(dim=1)[0]) == 9, "no position repeats another"
    norm = fqgan.GroupNorm(64, FQGANConfig()).cuda()
    x = torch.randn(2, 64, 5, 5, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), F.group_norm(x.float(), 32, eps=1e-6), atol=0.03)

def test_sampling_under_autocast():
    """Keys were cast to the cache's type, values were not: an error."""
    with torch.autocast("cpu", torch.bfloat16):
        assert small_gpt(2).generate(torch.arange(3)).shape == (3, 2, 3, 3)

@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_all_positions_are_one_graph(k, cfg_scale, monkeypatch):
    """What a GPU records once and replays for every position: no shape and no number in it may change."""
    model = small_gpt(k, class_everywhere=k == 3)
    labels = torch.arange(5)
    expected = model.generate(labels, cfg_scale, temperature=0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def repeat(step, times, *_):
        step = torch.compile(step, backend=backend, fullgraph=True)
        for _ in range(times):
            step()

    monkeypatch.setattr(fqgan, "repeat", repeat)
    assert torch.equal(model.generate(labels, cfg_scale, temperature=0), expected)
    assert len(graphs) == 1

@pytest.mark.parametrize("cfg_scale, temperature, top_k, top_p, cfg_power", [
    ([1.0, 3.0, 1.5], [1.0, 0.0, 0.7], [0, 0, 4], [0.8, 1.0, 1.0], [0, 0, 0]),
    ([0.0, 0.5, 1.0], [1.0, 0.0, 0.7], [0, 0, 4], [0.8, 1.0, 1.0], [0, 0, 0]),
    ([2.0, 3.0, 4.0], [1.0] * 3, [0] * 3, [1.0] * 3, [1, 2, 0]),
])
def test_sampling_parameters_of_each_code(cfg_scale, temperature, top_k, top_p, cfg_power):
    """Guidance that grows begins with none; with a power of 1 the last one's is twice as far from 1 as the mean."""
    model = small_gpt(3)
    labels = torch.arange(5)
    parameters = cfg_scale, temperature, top_k, top_p
    plain = uncached(model, labels, *parameters, seeded(1), cfg_power)
    assert torch.equal(model.generate(labels, *parameters, seeded(1), cfg_power), plain)

def test_greedy_sampling():
    model = small_gpt(3, dropout=0.5)
    labels = torch.arange(5)
    greedy = model.generate(labels, 2.0, temperature=0)
    assert torch.equal(greedy, model.generate(labels, 2.0, top_k=1)), "one code left is the likeliest"
    assert torch.equal(greedy, model.generate(labels, 2.0, temperature=1e-45)), "no overflow"
    assert torch.equal(greedy, model.train().generate(labels, 2.0, temperature=0)), "dropout is off while sampling"
    assert model.generate(torch.arange(0), cfg_scale=2.0).shape == (0, 3, 3, 3)
    assert small_gpt(2, grid=1).generate(labels, 2.0, cfg_power=1).shape == (5, 2, 1, 1)

@pytest.mark.parametrize("options", [
    dict(cfg_scale=[1.0, 2.0]), dict(cfg_scale=math.inf), dict(temperature=-1), dict(temperature=[1.0, math.nan, 1.0]),
    dict(top_p=0.0), dict(top_k=[1, 2, 3, 4]), dict(cfg_power=-1),
    dict(labels=torch.tensor([6])), dict(labels=torch.tensor([-1]))])
def test_sampling_parameters_out_of_range(options):
    name, = options
    with refused("labels must be from 0 to 5" if name == "labels" else name):
        small_gpt(3).generate(**dict(labels=torch.tensor([1])) | options)

@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_overflow_are_said(temperature):
    """In float16: a traceback, and at temperature 0 black images and no word."""
    model = small_gpt().half()
    model.norm.weight.data *= 1000
    model.outputs[1].weight.data *= 1000
    with refused("not finite in torch.float16: sample with another --dtype"):
        model.generate(torch.arange(3), temperature=temperature)

def test_drawing_is_as_torch_draws():
    p = torch.randn(50, 300, generator=seeded(0))
    drawn = fqgan.sample_token(p, generator=seeded(1))
    assert torch.equal(drawn, torch.multinomial(p.softmax(-1), 1, generator=seeded(1))[:, 0])

@pytest.mark.parametrize("options, expected", [
    (dict(), [0.5, 0.3, 0.15, 0.05]),
    (dict(top_k=2), [0.625, 0.375, 0, 0]),
    (dict(top_p=0.6), [0.625, 0.375, 0, 0]),  # the one that crosses p is kept
    (dict(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),  # in proportion to the squares
    (dict(temperature=0), [1.0, 0, 0, 0]),
    # temperature, then top-k, then top-p of what is left: of the two 0.74 and 0.26; of all four it were 0.68 and 0.25
    (dict(temperature=0.5, top_k=2, top_p=0.7), [1.0, 0, 0, 0]),
])
def test_sample_one_token(options, expected):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    drawn = fqgan.sample_token(logits, generator=seeded(0), **options)
    shares = torch.bincount(drawn, minlength=4) / 4000
    expected = torch.tensor(expected)
    assert torch.allclose(shares, expected, atol=0.03) and not shares[expected == 0].any()

@pytest.mark.parametrize("top_k", [1, 7, 30, 100])
def test_exactly_k_codes_stay_with_equal_logits(top_k):
    """In bfloat16 many of 16,384 logits are equal: up to 107 codes stayed of 100, and of one there were several."""
    logits = torch.randn(2048, generator=seeded(0))
    logits[:150] = 20.0
    drawn = fqgan.sample_token(logits.expand(2000, -1), top_k=top_k, generator=seeded(0)).unique()
    assert len(drawn) == top_k and drawn.max() < 150

# -----------------------------------------------------------------------------
# Our checkpoints

def save_small(folder, k=2, data="shapes"):
    """tokenizer.pt and gpt.pt as the training scripts write them, of random weights"""
    tokenizer = small_tokenizer(k=k)
    gpt = small_gpt(k, vocab_size=32, num_classes=3, grid=4)
    inner = dict(kind="tokenizer", config=dataclasses.asdict(tokenizer.config), model=tokenizer.state_dict())
    run = dict(settings=dict(data=data), step=4)
    fqgan.save_checkpoint(folder / "tokenizer.pt", inner | run)
    state = dict(kind="gpt", config=dataclasses.asdict(gpt.config), model=gpt.state_dict())
    fqgan.save_checkpoint(folder / "gpt.pt", state | run | dict(tokenizer=inner, classes=["a", "b", "star"]))

def load_models(gpt, tokenizer=None):
    options = SimpleNamespace(gpt=gpt, tokenizer=tokenizer, dtype="float32", out="x.png", npz=None)
    return sample.load_models(options, torch.device("cpu"))

def test_another_tokenizer_is_said(tmp_path, capsys):
    """Of the same shape, it paints other codes: a Frechet distance of 2.7 became 128."""
    save_small(tmp_path)
    load_models(tmp_path / "gpt.pt", tmp_path / "tokenizer.pt")
    assert capsys.readouterr().out == ""
    state = load(tmp_path / "tokenizer.pt")
    state["model"]["post_quant_conv.bias"] += 1e-3
    torch.save(state, tmp_path / "other.pt")
    load_models(tmp_path / "gpt.pt", tmp_path / "other.pt")
    assert "other.pt is not the tokenizer whose codes" in capsys.readouterr().out

ENDLESS = dict(teacher_widths=torch.zeros(1).expand(10**7, 10**6))

@pytest.mark.parametrize("change, message", [
    (dict(config=dict(codebook_size=64)), "does not fit this version .*weights and config disagree"),
    (dict(config=dict(color="red")), "does not fit this version"),
    (dict(config=ENDLESS), "no config of plain values"),
    (dict(config=None), "no config of plain values"),
    (dict(config=dict(adapter_depth=10**9)), "more blocks than it has weights"),
    (dict(model=Hostile("touched")), "damaged"),
    (dict(kind="gpt"), "not a tokenizer checkpoint but a gpt's"),
    (None, "is not a tokenizer checkpoint"),
    (dict(kind=None), "not a tokenizer checkpoint; .* `python tools/convert.py x.pt tokenizer.pt`"),
])
def test_checkpoints_that_cannot_be_used(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_small(tmp_path)
    state = load("tokenizer.pt")
    if change and change.get("config"):
        change = dict(config=state["config"] | change["config"])
    torch.save(change and state | change, "x.pt")
    with refused(f"x.pt.* {message}"):
        fqgan.load_tokenizer("x.pt")
    assert not Path("touched").exists()

def test_generators_that_do_not_fit(tmp_path):
    save_small(tmp_path, k=3)
    (tmp_path / "tokenizer.pt").rename(tmp_path / "other.pt")
    save_small(tmp_path)
    state = load(tmp_path / "gpt.pt")
    bare = {name: part for name, part in state.items() if name != "tokenizer"}
    torch.save(bare, tmp_path / "gpt.pt")
    for tokenizer, message in [
        (None, "holds no tokenizer: name it with --tokenizer"),
        (tmp_path / "other.pt", "trained for k 2, the tokenizer has 3"),
    ]:
        with refused(message):
            load_models(tmp_path / "gpt.pt", tokenizer)

def test_writing_fails_with_the_last_checkpoint_intact(tmp_path, monkeypatch):
    fqgan.save_checkpoint(tmp_path / "x.pt", {"step": 1})
    monkeypatch.setattr(torch, "save", Mock(side_effect=OSError(28, "No space left on device")))
    with refused("cannot write .*x.pt.* No space left"):
        fqgan.save_checkpoint(tmp_path / "x.pt", {"step": 2})
    assert load(tmp_path / "x.pt") == {"step": 1} and len(list(tmp_path.iterdir())) == 1

class Pooled(torch.nn.Module):
    """A teacher of one's own."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit, which OpenAI's files need
def test_a_model_of_ones_own_as_teacher(tmp_path, own_network):
    """TorchScript and torch.export."""
    torch.jit.save(torch.jit.script(Pooled()), tmp_path / "own.pt")
    images = uniform(5, 3, 16, 16)
    for path in (tmp_path / "own.pt", own_network):
        assert torch.allclose(fqgan.load_teacher(path)(images), Pooled()(images))

@pytest.fixture(scope="session")
def lpips_files(tmp_path_factory):
    """Made-up weights of VGG-16 and of LPIPS, in their files' formats."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    vgg = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    torch.save(vgg.state_dict(prefix="features.") | {"classifier.0.weight": torch.zeros(1)}, folder / "vgg16.pth")
    channels = enumerate((64, 128, 256, 512, 512))
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in channels}
    torch.save(lin, folder / "vgg.pth", _use_new_zipfile_serialization=False)
    return folder / "vgg16.pth", folder / "vgg.pth"

def test_lpips_against_its_formula(lpips_files):
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    torch.nn.ModuleDict({"features": features}).load_state_dict(load(lpips_files[0]), strict=False)
    lin = iter(load(lpips_files[1]).values())
    distance = fqgan.LPIPS(*lpips_files)
    images, others = uniform(2, 2, 3, 32, 32)
    mean = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    std = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x = (torch.cat([images, others]) - mean) / std
    expected = 0
    for i, layer in enumerate(features[:30]):
        x = layer(x)
        if i in (3, 8, 15, 22, 29):
            length = x.square().sum(1, keepdim=True).sqrt()
            a, b = (x / (length + 1e-10)).chunk(2)
            weighted = (a - b).square() * next(lin)
            expected += weighted.sum(1).mean((1, 2))
    assert torch.allclose(distance(images, others), expected, rtol=1e-4)
    assert torch.equal(distance(images, images), torch.zeros(2))
    assert not any(p.requires_grad for p in distance.train().parameters())

    for p in distance.features.parameters():
        p.data.zero_()  # all features 0: the plain form's gradient would be NaN
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(flat, others[:1]).sum().backward()
    assert flat.grad.isfinite().all()
    with refused("does not hold the weights that belong there"):
        fqgan.LPIPS(lpips_files[1], lpips_files[1])

def test_random_features_against_their_formula():
    torch.manual_seed(1)
    distance = fqgan.RandomFeatures()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after), "the caller's random state is left alone"
    torch.manual_seed(2)
    assert same(fqgan.RandomFeatures().state_dict(), distance.state_dict()), "always the same weights"

    images, others = uniform(2, 3, 3, 16, 16)
    others.requires_grad_(True)
    expected = 0
    maps = [images, others]
    for conv in distance.convs:
        for i, x in enumerate(map(conv, maps)):
            deviation, mean = torch.std_mean(x, (0, 2, 3), correction=0, keepdim=True)
            maps[i] = F.leaky_relu((x - mean) / (deviation.square() + 1e-5).sqrt(), 0.2)
        a, b = [x / x.norm(dim=1, keepdim=True) for x in maps]
        expected += (a - b).square().sum(1).mean((1, 2))
    assert torch.allclose(distance(images, others), expected, rtol=1e-3)
    assert torch.equal(distance(images, images), torch.zeros(3))
    distance(images, others).sum().backward()
    assert others.grad.isfinite().all() and others.grad.any()
    assert not any(p.requires_grad for p in distance.train().parameters())

def test_fetch(tmp_path, monkeypatch):
    """Once, checked; a copy that was damaged is fetched again; nothing partial stays."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = tmp_path / "x.pth"
    digest = hashlib.sha256(b"weights").hexdigest()

    def fetched(published, **options):
        source.write_bytes(published)
        return fqgan.cached_download(source.as_uri(), digest[:8], **options)

    path = fetched(b"weights")
    assert path != source and path.read_bytes() == b"weights"
    assert fetched(b"else") == path and path.read_bytes() == b"weights", "not fetched again"
    path.write_bytes(b"weig")
    with refused(f"invalid hash value.*put it at {path}"):
        fetched(b"else")
    assert fetched(b"weights").read_bytes() == b"weights"
    path.unlink()
    with refused("invalid hash value"):
        fetched(b"else")
    assert not list(path.parent.iterdir())
    with refused(f"no file at nowhere.pth; what belongs there is {source.as_uri()}"):
        fetched(b"weights", local="nowhere.pth")

# -----------------------------------------------------------------------------
# Running: what the scripts share

@pytest.mark.parametrize("error, ending", [
    (UserError("k is 0"), "x.py: k is 0"),
    (UserError("Caught UserError in worker\nTraceback\nfqgan.UserError: 3 images"), "x.py: 3 images"),
    (OSError(28, "No space left on device"), r"x.py: \[Errno 28\] No space left on device"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"),
     r"x.py: out of memory: give a smaller --batch-size, .*--recompute\)"),
    (lambda: torch.empty(2**60), "x.py: out of memory.*"),  # on a CPU
    (lambda: np.empty(2**56), "x.py: out of memory.*"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                  "are out of shared memory. Please try to raise your shared memory limit."),
     "x.py: .*/dev/shm.*--workers 0"),
    (KeyboardInterrupt(), "130"),
])
def test_a_failing_script_says_one_line(error, ending, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/x.py"])
    main = Mock(side_effect=error) if isinstance(error, BaseException) else error
    with pytest.raises(SystemExit) as stop:
        fqgan.cli(main)
    assert re.fullmatch(ending, str(stop.value.code))

def test_flags_are_those_given(monkeypatch):
    """Presets and checkpoints fill in the others: defaults among them would overrule these."""
    presets = {"tiny": dict(k=4), "large": dict(k=5, channels=64)}
    given = dict(preset="large", k=2, channel_mult=(1, 2), image_size=64)
    monkeypatch.setattr(sys, "argv", ["x.py", *as_flags(given), "--no-recompute"])
    assert fqgan.parse_flags("", presets, FQGANConfig) == given | dict(recompute=False)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    assert fqgan.parse_flags("", presets, FQGANConfig) == {}

@pytest.mark.parametrize("cpu, dtype", [
    (dict(cpu_name="AMD EPYC", avx512_bf16=True), torch.bfloat16),
    (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=True), torch.bfloat16),
    (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=False), torch.float32),
    (dict(architecture="aarch64"), torch.float32)])
def test_auto_takes_the_faster_dtype(monkeypatch, cpu, dtype):
    """An Intel Xeon without AMX trained the quick start 1.35 times as long in its bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert fqgan.pick_dtype("auto", torch.device("cpu")) == dtype

def test_grids_keep_the_shape_of_images(tmp_path):
    rows = [("a", torch.ones(2, 3, 20, 40)), ("b", -torch.ones(1, 3, 20, 40))]
    fqgan.save_grid(tmp_path / "grid.png", rows)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert pixels.shape[0] == 4 + 2 * (60 + 4), "three times 20 x 40, in two rows"
    assert (pixels[:, -60] == 255).all() and (pixels[4 + 64:-4, -220] == 0).all()

def test_figures():
    flat = torch.zeros(1, 3, 16, 16)
    assert math.isclose(fqgan.psnr(flat, flat + 10 / 127.5), 20 * math.log10(255 / 10), rel_tol=1e-5)
    assert fqgan.psnr(flat, flat).isfinite(), "else a mean with one such image is infinite"
    counts = torch.tensor([[5, 5, 0, 0], [1, 1, 1, 1], [8, 0, 0, 0]])
    used, perplexity = fqgan.code_usage(counts)
    assert used.tolist() == [0.5, 1.0, 0.25] and np.allclose(perplexity, [2, 4, 1])
    few, _ = fqgan.code_usage(torch.tensor([16] * 8 + [0] * 2**14))
    assert few == 8 / 128, "of the codes that 128 tokens can reach: every line said that the sub-codebook was dying"
    order = fqgan.shuffled_range(100)
    assert sorted(order) == list(range(100)) != order and order == fqgan.shuffled_range(100)
    assert [fqgan.duration(seconds) for seconds in (7, 90.9, 5400)] == ["0:07", "1:30", "1.5 h"]

def test_class_names_and_numbers():
    """Names go before numbers: of "1" to "12", sorted as text, 10 is the folder "10", and 0 the first one, "1"."""
    for text, expected in [
        ("0,3", [0, 3]), ("star, moon", [1, 3]), ('"a, b",star', [2, 1]), ("star , moon", [1, 3])]:
        assert sample.class_indices(text, ["heart", "star", "a, b", "moon"]) == expected
    names = sorted(str(i) for i in range(1, 13))
    assert sample.class_indices("10", names) == [1] and sample.class_indices("0", names) == [0]
    for word in ("13", "star", "-1", ""):
        with refused(f"no class '{word}'; there are 0 to 11: 1, 10, 11, .*, ..."):
            sample.class_indices(f"1,{word}", names)

# -----------------------------------------------------------------------------
# Scripts: training

def test_both_scripts_make_what_they_say(trained):
    names = sorted(path.name for path in trained.iterdir() if not path.name.endswith(".lock"))
    made = "gpt.pt gpt_log.csv log.csv recon.png samples.png tokenizer.pt tokens_train.npy tokens_val.npy"
    assert names == made.split()
    rows = log_of(trained / "log.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["val_psnr"]) > 3 and [row["val_psnr"] > "" for row in rows] == [False, True, False, True]
    losses = ("reconstruct", "codebook", "commit", "entropy", "disentangle", "decorrelate")
    for row in rows:
        terms = [float(row[name]) for name in losses]
        assert math.isclose(float(row["loss"]), sum(terms), rel_tol=1e-3)

    assert Image.open(trained / "recon.png").height > 4 * 96
    gpt, tokenizer, classes = load_models(trained / "gpt.pt")
    assert gpt.config.num_classes == 10 and classes[4] == "star" and gpt.config.grid == 4
    own = load(trained / "tokenizer.pt")["model"]
    assert same(own, tokenizer.state_dict()), "the GPT's checkpoint holds its tokenizer"

def test_rows_of_the_picture():
    model = small_tokenizer(k=3)
    images = images_like(model.config)
    ids = model.encode(images)
    rows = dict(fqgan.reconstruction_rows(model, images))
    assert list(rows) == ["original", "1 alone", "1 to 2", "all 3", "2 alone", "3 alone"]
    assert torch.equal(rows["1 to 2"], model.decode(ids, only=[0, 1]))
    assert torch.equal(rows["3 alone"], model.decode(ids, only=[2]))

PLAIN_RUN = dict(warmup=2, final_lr=0.1, lr=0.004, grad_clip=0.05, accumulate=2, workers=0, eval_every=4)

def plain_run(parts, add_gradients, size):
    """
    The steps that PLAIN_RUN asks for, written out. parts: (module, optimizer, learning rate); add_gradients(indices,
    step) adds the gradients of half a batch.
    """
    order = np.random.default_rng([0, 0]).permutation(size)
    for step, schedule in enumerate((0.5, 1.0, 1.0, 0.55)):  # two steps of warm-up, then half a cosine
        for half in order[8 * step:8 * step + 8].reshape(2, 4):
            add_gradients(half.tolist(), step)
        for module, optimizer, lr in parts:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            squares = [g.square().sum() for g in gradients]
            norm = sum(squares) ** 0.5
            assert norm > 0.1 or not gradients, "else clipping is not tested"
            for g in gradients:
                g.mul_(0.05 / (norm + 1e-6))
            for group in optimizer.param_groups:
                group["lr"] = schedule * lr
            optimizer.step()
            optimizer.zero_grad()

def test_training_the_tokenizer_is_its_plain_loop(tmp_path, monkeypatch):
    """Learning rates, accumulation, clipping, every term with its weight and its start."""
    monkeypatch.setattr(train_tokenizer, "RandomFeatures", torch.nn.L1Loss)  # theirs lets roundings grow
    losses = dict(
        perceptual="random", perceptual_weight=0.7, disc_weight=0.5, disc_start=2, disc_lr=0.0005,
        entropy_final=0.03, entropy_weight=0.05, commit_weight=0.4, disentangle_weight=0.2,
        decorrelate_weight=0.0,  # of codes that hardly differ it is a quotient of roundings
    )
    flags = as_flags(SMALL | FEW_STEPS | PLAIN_RUN | losses | dict(k=2, image_size=24))
    call(train_tokenizer, "--out", tmp_path, *flags)
    state = load(tmp_path / "tokenizer.pt")
    data, held_out = fqgan.load_train_and_held_out("shapes", 24)
    torch.manual_seed(0)
    model = FQGAN(FQGANConfig(**state["config"]))
    disc = fqgan.Discriminator()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=True)
    disc_optimizer = torch.optim.Adam(disc.parameters(), betas=(0.9, 0.95), fused=True)
    disc_losses = []  # clipping and Adam hide their weight
    def add_gradients(indices, step):
        images, _ = default_collate([data[i] for i in indices])
        reconstruction, losses = model(images)
        losses["entropy"] = losses["entropy"] * 0.03 ** (step / 4)
        loss = sum(losses.values()) + 0.7 * F.l1_loss(images, reconstruction)
        if step >= 2:
            loss = loss - 0.5 * disc(reconstruction).mean()
        (loss / 2).backward(inputs=list(model.parameters()))
        if step >= 2:
            real = disc(images)
            fake = disc(reconstruction.detach())
            hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            disc_losses.append(0.5 * hinge / 2)
            disc_losses[-1].backward()

    plain_run([(model, optimizer, 0.004), (disc, disc_optimizer, 0.0005)], add_gradients, len(data))
    assert_close(state["model"], model.state_dict())
    assert_close(state["disc"], disc.state_dict())
    assert_close(state["optimizer"]["state"], optimizer.state_dict()["state"], atol=1e-6)
    assert_close(state["disc_optimizer"]["state"], disc_optimizer.state_dict()["state"], atol=1e-6)

    loaded = fqgan.load_tokenizer(tmp_path / "tokenizer.pt")
    images, _ = items_of(held_out, 16)
    decoded = loaded.decode(loaded.encode(images))
    expected = fqgan.psnr(images, decoded).mean()
    rows = log_of(tmp_path / "log.csv")
    assert math.isclose(float(rows[-1]["val_psnr"]), expected, rel_tol=1e-4)
    assert [float(row["lr"]) for row in rows] == [0.002, 0.004, 0.004, 0.0022]
    assert math.isclose(float(rows[-1]["discriminator"]), sum(disc_losses[-2:]).item(), rel_tol=1e-4)

def test_training_the_gpt_is_its_plain_loop(tmp_path, trained):
    """Also the weight decay, of matrices only, and which view of an image is drawn."""
    folder = make_folder(tmp_path / "images")
    flags = [*TINY_GPT_RUN, *as_flags(PLAIN_RUN), "--no-muon", "--label-dropout", 0, "--crops", 2, "--data", folder]
    call(train_gpt, "--out", tmp_path, "--tokenizer", trained / "tokenizer.pt", *flags)
    state = load(tmp_path / "gpt.pt")
    tokens, held_out = (np.load(tmp_path / f"tokens_{part}.npy") for part in ("train", "val"))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**state["config"]))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=0.05), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def loss_of(model, records, views=0):
        ids = torch.from_numpy(records["ids"][np.arange(len(records)), views].astype(np.int64))
        return model(ids, torch.from_numpy(records["label"].astype(np.int64)))[1]

    order = np.random.default_rng([0, 0]).permutation(len(tokens)).tolist()

    def add_gradients(indices, step):
        views = [random.Random(f"0 {order.index(i)}").randrange(2) for i in indices]  # by the place in training
        (loss_of(model, tokens[indices], views) / 2).backward()

    plain_run([(model, optimizer, 0.004)], add_gradients, len(tokens))
    assert_close(state["model"], model.state_dict())
    assert_close(state["optimizer"]["state"], optimizer.state_dict()["state"], atol=1e-6)
    loaded = fqgan.load_gpt(tmp_path / "gpt.pt")
    row = log_of(tmp_path / "gpt_log.csv")[-1]
    expected = loss_of(loaded, held_out[fqgan.shuffled_range(len(held_out))[:16]]).item()
    assert math.isclose(float(row["val_loss"]), expected, rel_tol=1e-4)
    assert not math.isclose(float(row["val_loss_1"]), expected, rel_tol=1e-6), "of one sub-codebook, not the mean"

@pytest.mark.parametrize("lr", [0.0, 0.01])
def test_muon(lr, tmp_path, trained):
    """It has the matrices of trunk and head, AdamW all the rest; the outputs of the blocks start at zero."""
    flags = [*TINY_GPT_RUN, *as_flags(PLAIN_RUN | dict(lr=lr)), "--muon", "--data", make_folder(tmp_path / "images")]
    call(train_gpt, "--out", tmp_path, "--tokenizer", trained / "tokenizer.pt", *flags)
    state = load(tmp_path / "gpt.pt")
    torch.manual_seed(0)
    before = GPT(GPTConfig(**state["config"])).state_dict()
    hidden = [name for name, p in before.items() if name.startswith(("trunk", "head")) and p.ndim > 1]
    assert len(hidden) == 15 == len(state["muon"]["state"])  # five in each of three blocks
    assert len(state["optimizer"]["state"]) == len(before) - 15
    for name in hidden:
        now = state["model"][name]
        if name.endswith(("attn.proj.weight", "mlp.w2.weight")):
            assert now.any() == (lr > 0), name
        else:
            assert torch.equal(now, before[name]) == (lr == 0), name

@pytest.mark.parametrize("script, name, log", [
    (train_tokenizer, "tokenizer.pt", "log.csv"), (train_gpt, "gpt.pt", "gpt_log.csv")])
def test_resumed_is_unbroken(script, name, log, tmp_path, trained, monkeypatch):
    """Weights, both optimizers and the log's last row of each step to the bit; a GPT asks for its tokens alone."""
    flags = as_flags(SMALL | FEW_STEPS | dict(
        k=2, image_size=24, disc_weight=0.5, disc_start=2, accumulate=2, log_every=3, warmup=2, final_lr=0.1))
    if script is train_gpt:
        flags = [*TINY_GPT_RUN, "--dropout", 0.1, "--crops", 2, "--muon"]
        flags += ["--tokenizer", trained / "tokenizer.pt", "--data", make_folder(tmp_path / "images")]
    call(script, "--out", tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "save_grid", Mock(side_effect=KeyboardInterrupt))  # after the checkpoint of step 2
        call(script, "--out", tmp_path / "cut", *flags)
    if (tmp_path / "cut" / log).exists():
        with open(tmp_path / "cut" / log, "a") as file:
            file.write("3,0\n")  # later than what is kept
    if script is train_gpt:
        shutil.rmtree(tmp_path / "images")
    call(script, "--out", tmp_path / "cut", "--resume")
    whole, cut = (load(tmp_path / folder / name) for folder in ("whole", "cut"))
    for part in whole.keys() - {"settings"}:
        assert same(whole[part], cut[part]), part
    rows = [{row["step"]: row for row in log_of(tmp_path / folder / log)} for folder in ("whole", "cut")]
    assert rows[0]["4"] == rows[1]["4"] and rows[0].get("3") == rows[1].get("3")

def test_resume_and_overwrite(tmp_path, trained, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    before = (run / "tokenizer.pt").read_bytes()
    start = ["--k", 2, "--out", run, *TINY_RUN]
    resume = ["--out", run, "--resume"]
    for argv, message in [
        (start, "--resume continues that run, --overwrite replaces it"),
        (resume, "already at step 4 of 4"),
        ([*resume, "--steps", 3], "already at step 4 of 3"),
        ([*resume, "--steps", 6, "--k", 1], "--k does not go with --resume"),
        ([*resume, "--steps", 6, "--lr", 0.5], "--lr does not go with --resume"),
        ([*resume, "--steps", 6, "--init", trained / "tokenizer.pt"], "--init"),
        (["--out", tmp_path / "none", "--resume"], "no tokenizer checkpoint at"),
    ]:
        with refused(message):
            call(train_tokenizer, *argv)
    assert (run / "tokenizer.pt").read_bytes() == before, "nothing is overwritten unless told so"
    capsys.readouterr()
    call(train_tokenizer, *resume, "--steps", 6, "--log-every", 2)
    assert "schedules are now those of 6 steps" in capsys.readouterr().out
    state = load(run / "tokenizer.pt")
    assert state["step"] == 6 and state["config"]["image_size"] == 16
    call(train_tokenizer, *start, "--overwrite")
    assert load(run / "tokenizer.pt")["step"] == 4
    assert [row["step"] for row in log_of(run / "log.csv")] == ["1", "2", "3", "4"]
    state["model"].popitem()
    torch.save(state, run / "tokenizer.pt")
    with pytest.raises(SystemExit, match="does not fit this version of the code, or other teachers .*Missing key"):
        call_cli(train_tokenizer, *resume, "--steps", 7)

def test_a_run_starts_from_another(tmp_path, trained):
    """Its shape and weights, with other rates; flags go first."""
    start = ["--init", trained / "tokenizer.pt", "--out", tmp_path, *as_flags(FEW_STEPS | dict(steps=1, lr=0))]
    call(train_tokenizer, *start, "--entropy-weight", 0.5)
    before, after = [load(folder / "tokenizer.pt") for folder in (trained, tmp_path)]
    assert same(before["model"], after["model"]) and after["config"] == before["config"] | dict(entropy_weight=0.5)
    with refused("--init .* does not fit"):
        call(train_tokenizer, *start, "--overwrite", "--codebook-size", 16)

def test_a_second_run_is_kept_out(tmp_path):
    """Two runs in one folder: both said "done", and one was lost."""
    words = shell_words(0, "train_tokenizer.py", "--k", 1, *TINY_RUN, "--steps", 10**6, "--out", tmp_path)
    process = subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, text=True, env=SHELL)
    try:
        next(process.stdout)
        for argv in (["--resume"], [*TINY_RUN, "--overwrite"]):
            with refused("another run is writing"):
                call(train_tokenizer, "--out", tmp_path, *argv)
    finally:
        process.kill()
        process.communicate()
    call(train_tokenizer, "--out", tmp_path, "--resume", "--steps", load(tmp_path / "tokenizer.pt")["step"] + 1)

@pytest.mark.parametrize("script, argv", [
    (train_tokenizer, ["--out", "photos"]),
    (train_tokenizer, ["--out", "photos/new/run"]),
    (train_gpt, ["--out", "photos/run", "--tokenizer", "tokenizer.pt"]),
    (sample, ["--gpt", "gpt.pt", "--out", "photos/samples"]),
    (sample, ["--gpt", "gpt.pt", "--npz", "photos/s.npz"]),
    (evaluate, ["--real", "photos", "--fake", "photos", "--json", "photos/class 0/m.json"]),
    (evaluate, ["--tokenizer", "tokenizer.pt", "--out", "photos/e.png"]),
])
def test_nothing_is_written_among_the_images(script, argv, tmp_path, monkeypatch):
    """`out` became a class with recon.png in it; a flat folder lost all photographs."""
    monkeypatch.chdir(tmp_path)
    before = sorted(make_folder(Path("photos"), each=20).rglob("*"))
    save_small(tmp_path, data="photos")
    flags = ["--data", "photos", *TINY_RUN] if script is train_tokenizer else []
    with refused("lies in photos, where the images are"):
        call(script, *argv, *flags)
    assert sorted(Path("photos").rglob("*")) == before

def test_tokens(tmp_path, trained):
    """
    Each new run encodes, in float32 whatever the GPT trains in; a resumed one takes what it began with, but encodes
    again what was cut off.
    """
    path = tmp_path / "tokens_train.npy"
    folder = make_folder(tmp_path / "images")
    flags = [*TINY_GPT_RUN, "--tokenizer", trained / "tokenizer.pt", "--out", tmp_path, "--steps", 1, "--data", folder]
    call(train_gpt, *flags, "--dtype", "bfloat16")
    tokenizer = fqgan.load_tokenizer(trained / "tokenizer.pt")
    data, held_out = fqgan.load_train_and_held_out(folder, 16)
    for part, name in ((held_out, "tokens_val.npy"), (data, "tokens_train.npy")):
        one = np.load(tmp_path / name)
        images, labels = default_collate(list(part))
        assert one["ids"].dtype == np.uint8 and np.array_equal(one["label"], labels)
        assert np.array_equal(one["ids"][:, 0], tokenizer.encode(images))

    for image, _ in data.source.samples:  # edited under the same name
        Image.open(image).rotate(90).save(image)
    call(train_gpt, *flags, "--overwrite", "--crops", 2)
    two = np.load(path)["ids"]
    assert two.shape[1] == 2 and not np.array_equal(two[:, 0], one["ids"][:, 0])
    whole = path.read_bytes()
    for steps, size in ((2, 1000), (3, 0)):
        os.truncate(path, size)
        call(train_gpt, "--out", tmp_path, "--resume", "--steps", steps)
        assert path.read_bytes() == whole
    batch, labels = train_gpt.get_batch(np.load(path, mmap_mode="r"), [5, 3], [1, 0], torch.device("cpu"))
    assert np.array_equal(batch, [two[5, 1], two[3, 0]]) and labels.tolist() == [data[5][1], data[3][1]]

def test_a_gpt_is_not_resumed_with_the_tokens_of_another(tmp_path, trained, monkeypatch):
    """A run that --overwrite began, and that ended while it encoded, left its tokens beside the last run's GPT."""
    run = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(train_gpt, "encode", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call(train_gpt, "--out", run, *TINY_GPT_RUN, "--overwrite")
    with refused("no gpt checkpoint"):
        call(train_gpt, "--out", run, "--resume", "--steps", 6)

def test_a_full_disk_is_no_bus_error(tmp_path, trained, monkeypatch):
    """As it was where tokens were written through a memory map."""
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        call(train_gpt, "--tokenizer", trained / "tokenizer.pt", "--out", tmp_path)

SEVERAL = """
import json, sys
sys.path.insert(0, {here!r})
import torch.distributed as dist
start = dist.init_process_group
dist.init_process_group = lambda *args, **options: dist.is_initialized() or start(*args, **options)
for script, *argv in json.loads(sys.argv[1]):
    sys.argv = [script, *argv]
    __import__(script).main()
    dist.barrier()
dist.destroy_process_group()
"""

def run_on_ranks(ranks, folder, *commands, env=SHELL):
    """Runs commands (script's name, flags...) one after the other in the same processes, whose start takes longest."""
    (folder / "several.py").write_text(SEVERAL.format(here=str(HERE)))
    words = [list(map(str, command)) for command in commands]
    told = shell(folder / "several.py", json.dumps(words), ranks=ranks, env=env)
    assert told.returncode == 0, told.stderr
    return told.stdout

def test_three_ranks_are_one(tmp_path):
    """
    The same global batch gives the same weights and, which would show a factor that Adam hides, the same moments.

    Off for it is what is computed over a rank's own batch: the entropy of the mean assignment, as in the official
    code, the decorrelation of its codes, and the discriminator's BatchNorm. 16 images are evaluated: not as many on
    each rank.

    The adversary has two discriminator passes before one backward pass; its run is then taken up by a single process.
    """
    one = tmp_path / "one"
    many = tmp_path / "many"
    equal = ["--batch-size", 12, "--grad-clip", 0]
    losses = dict(entropy_weight=0, disentangle_weight=0.1, decorrelate_weight=0)
    flags = [*TINY_RUN, *equal, "--k", 2, *as_flags(losses)]
    gpt_flags = [*TINY_GPT_RUN, *equal, "--no-muon", "--label-dropout", 0]
    gpt_flags += ["--tokenizer", one / "tokenizer.pt", "--data", make_folder(tmp_path / "images")]
    call(train_tokenizer, *flags, "--out", one)
    call(train_gpt, *gpt_flags, "--out", one)
    out = ["--out", many, "--accumulate", 2]
    adversary = as_flags(dict(out=tmp_path / "adversary", image_size=24, batch_size=12, disc_weight=0.5, disc_start=1))
    commands = [
        ["train_tokenizer", *flags, *out],
        ["train_gpt", *gpt_flags, *out],
        ["train_tokenizer", *TINY_RUN, *adversary, "--accumulate", 2],
    ]
    assert "step 1/" in run_on_ranks(3, tmp_path, *commands)
    for name in ("tokenizer.pt", "gpt.pt"):
        a, b = (load(folder / name) for folder in (one, many))
        assert_close(a["model"], b["model"])
        for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
            largest = x["exp_avg"].abs().max().item()
            assert_close(x["exp_avg"], y["exp_avg"], atol=0.02 * largest)
    assert np.array_equal(np.load(one / "tokens_train.npy"), np.load(many / "tokens_train.npy"))
    for name, tolerance in (("log.csv", 0.05), ("gpt_log.csv", 1e-4)):  # counts of codes are added up over the ranks
        for a, b in zip(log_of(one / name), log_of(many / name), strict=True):
            for column in a:
                close = a[column] == b[column] or math.isclose(float(a[column]), float(b[column]), rel_tol=tolerance)
                assert close, f"{name}: {column} is {a[column]} and {b[column]}"

    rows = log_of(tmp_path / "adversary" / "log.csv")
    assert [float(row["discriminator"]) > 0 for row in rows] == [False, True, True, True], "on from the second step"
    call(train_tokenizer, "--out", tmp_path / "adversary", "--resume", "--steps", 6)
    state = load(tmp_path / "adversary" / "tokenizer.pt")
    assert state["step"] == 6 and all_finite(state["disc"])

@pytest.mark.parametrize("error, ranks, workers, said", [
    ('fqgan.UserError("a disk has gone")', 2, 0, "fail.py: a disk has gone"),
    ('ZeroDivisionError("gone")', 0, 2, "ZeroDivisionError: gone"),
])
def test_an_error_ends_all_processes_at_once(error, ranks, workers, said, tmp_path):
    """With its line: the other ranks would wait for the failing one in vain, and Python two minutes for loaders."""
    (tmp_path / "fail.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import fqgan, train_tokenizer
def fail(*_):
    raise {error}
if os.environ.get("RANK", "1") == "1":
    fqgan.disentangle_loss = fail
fqgan.cli(train_tokenizer.main)
""")
    began = time.time()
    flags = [*TINY_RUN, "--workers", workers, "--out", tmp_path / "out"]
    told = shell(tmp_path / "fail.py", *flags, ranks=ranks)
    assert told.returncode == 1 and said in told.stderr and time.time() - began < 60

@pytest.mark.parametrize("number, ranks, workers, eval_every, closed", [
    (signal.SIGINT, 0, 2, 3, True), (signal.SIGHUP, 0, 0, 10**6, True), (signal.SIGTERM, 2, 0, 10**6, False)])
def test_a_signal_saves_and_the_run_goes_on(number, ranks, workers, eval_every, closed, tmp_path):
    """
    The whole process group gets it: loaders (the first time while the run evaluates), torchrun and all ranks.

    `| tee log` ends with the run's first word after Ctrl-C, and so does a closed terminal: it cost the checkpoint.
    """
    often = as_flags(dict(k=2, steps=10**5, eval_every=eval_every, eval_images=500, workers=workers))
    words = shell_words(ranks, "train_tokenizer.py", *TINY_RUN, *often, "--out", tmp_path)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def as_in_a_terminal():  # the tests themselves may run under nohup
        for each in fqgan.ENDING_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    process = subprocess.Popen(words, cwd=HERE, text=True, start_new_session=True, env=SHELL,
                               preexec_fn=as_in_a_terminal, **pipes)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    if closed:
        process.stdout.close()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode and (ranks or (process.returncode, err) == (130, "")), err
    assert closed or "--resume" in out
    step = load(tmp_path / "tokenizer.pt")["step"]
    assert step >= 3
    call(train_tokenizer, "--out", tmp_path, "--resume", "--steps", step + 1)

@pytest.mark.parametrize("full", [False, True])
def test_output_that_fails_does_not_end_a_run(full, tmp_path, monkeypatch):
    """`| head` closes the pipe; a disk may be full behind `> log`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full" if full else writer, "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        call(train_tokenizer, "--out", tmp_path, *TINY_RUN)
    assert load(tmp_path / "tokenizer.pt")["step"] == 4

def test_unprintable_paths_are_escaped(tmp_path, monkeypatch):
    """A terminal in plain ASCII ended the run with a traceback at the first line that named the folder."""
    folder = make_folder(tmp_path / "bilder-\xe4\u4e2d\udcff", each=10)
    output = io.BytesIO()
    terminal = io.TextIOWrapper(output, "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        call_cli(train_tokenizer, *TINY_RUN, "--steps", 1, "--out", tmp_path / "out", "--data", folder)
    assert rb"bilder-\xe4\u4e2d\udcff" in output.getvalue()

def test_what_is_not_finite_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    """One bad step is named and changes no weight; fifty in a row, not in all, end the run."""
    plain = fqgan.disentangle_loss
    path = tmp_path / "tokenizer.pt"
    flags = ["--k", 2, *TINY_RUN, "--eval-every", 1000, "--out", tmp_path, "--overwrite"]

    def weights_after(steps, bad_calls, *argv):
        calls = itertools.count()

        def sometimes_nan(quantized):
            return plain(quantized) * (math.nan if next(calls) in bad_calls else 1)

        monkeypatch.setattr(fqgan, "disentangle_loss", sometimes_nan)
        call(train_tokenizer, *flags, "--steps", steps, *argv)
        return load(path)["model"]

    constant = as_flags(dict(warmup=0, final_lr=1, entropy_final=1))
    three, four, five = [weights_after(steps, {3}, *constant) for steps in (3, 4, 5)]
    assert same(three, four) and not same(four, five), "the fourth step changes nothing"
    assert capsys.readouterr().out.count("step 4 left out: disentangle not finite") == 2
    weights_after(110, range(1, 200, 2))
    errors = [float(row["reconstruct"]) for row in log_of(tmp_path / "log.csv")]
    assert errors[-1] < 0.5 * errors[0], "it learns all the same"
    with refused("50 steps in a row were not finite.* smaller --lr"):
        weights_after(100, range(2, 1000))
    assert all_finite(load(path)["model"])

def test_a_gpt_leaves_out_what_is_not_finite(tmp_path, trained, monkeypatch, capsys):
    """Of both optimizers: a step of either would end its weights."""
    forward = GPT.forward
    calls = itertools.count()

    def once_nan(model, ids, labels):
        logits, loss = forward(model, ids, labels)
        return logits, loss * (math.nan if model.training and next(calls) == 2 else 1)

    monkeypatch.setattr(GPT, "forward", once_nan)
    flags = [*TINY_GPT_RUN, "--muon", "--data", make_folder(tmp_path / "images")]
    call(train_gpt, "--tokenizer", trained / "tokenizer.pt", "--out", tmp_path, *flags)
    assert re.findall(r"step (\d) left out", capsys.readouterr().out) == ["3"]
    state = load(tmp_path / "gpt.pt")
    assert all_finite(state["model"])
    assert {float(each["step"]) for each in state["optimizer"]["state"].values()} == {3}

def test_what_cannot_be_written_or_locked_ends_no_run(tmp_path, monkeypatch, capsys):
    """A viewer locks a picture, or a folder has its name; some file systems have no locks."""
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(37, "No locks available")))
    names = ("recon.png", "samples.png", "log.csv", "gpt_log.csv")
    for name in names:
        (tmp_path / name).mkdir()
    call(train_tokenizer, "--k", 2, "--out", tmp_path, *TINY_RUN, "--data", make_folder(tmp_path / "images"))
    call(train_gpt, "--out", tmp_path, *TINY_GPT_RUN)
    text = capsys.readouterr().out
    for name in names:
        assert re.search(f"/{name} cannot be written .*; the run goes on", text)
    assert "cannot be locked" in text and load(tmp_path / "gpt.pt")["step"] == 4

def test_a_folder_may_have_the_name_of_a_built_in_set(tmp_path, monkeypatch):
    """`--out shapes` could not be resumed."""
    monkeypatch.chdir(make_folder(tmp_path))
    for argv in (["--k", 1, *TINY_RUN], ["--resume", "--steps", 5]):
        call(train_tokenizer, "--out", "shapes", *argv)
    os.rename("class 0", "cifar10")
    assert len(load_data("./cifar10", 16, True)) < 100

def test_which_signals_are_caught():
    """What nohup ignores stays ignored; but not Ctrl-C, which shells ignore in the background. A second one ends."""
    with command_line(train_tokenizer):
        for number in fqgan.ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        caught = fqgan.catch_signals()
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

def test_usage_counts_whole_intervals(tmp_path, monkeypatch):
    """Every micro-batch since the last line, and none twice."""
    totals = []

    def listen(counts):
        totals.append(counts.sum(1).tolist())
        return fqgan.code_usage(counts)

    monkeypatch.setattr(train_tokenizer, "code_usage", listen)
    flags = as_flags(dict(k=2, accumulate=2, log_every=3, eval_every=4))
    call(train_tokenizer, "--out", tmp_path, *TINY_RUN, *flags)
    positions = 16
    assert totals == [[3 * 8 * positions] * 2, [8 * positions] * 2, [16 * positions] * 2], "step 3, step 4, held out"

def test_float16_scales_its_gradients_and_resumes(tmp_path):
    call(train_tokenizer, "--k", 2, *TINY_RUN, "--dtype", "float16", "--out", tmp_path)
    state = load(tmp_path / "tokenizer.pt")
    assert state["scaler"]["scale"] > 1 and all_finite(state["model"])
    applied = [float(each["step"]) for each in state["optimizer"]["state"].values()]
    assert max(applied, default=0) > 0, "steps were taken, not all left out"
    call(train_tokenizer, "--out", tmp_path, "--resume", "--steps", 5)

def test_collapsed_codebooks_are_said(tmp_path, monkeypatch, capsys):
    """A run that has lost a codebook goes on without an error: the log must tell."""
    counts = torch.tensor([[64] + [0] * 31, [9] * 32, [90] * 3 + [0] * 29])
    monkeypatch.setattr(train_tokenizer, "code_usage", Mock(return_value=fqgan.code_usage(counts)))
    call(train_tokenizer, "--k", 3, "--out", tmp_path, *TINY_RUN, "--steps", 1)
    text = capsys.readouterr().out
    assert "sub-codebook 1 is dying: perplexity 1.0" in text and "sub-codebook 2" not in text
    assert "sub-codebook 3 is dying: perplexity 3.0" in text

def test_an_adversary_that_never_starts_is_said(tmp_path, capsys):
    flags = [*TINY_RUN, "--image-size", 24, "--steps", 1, "--disc-weight", 0.5]
    for start in (0, 1):
        call(train_tokenizer, "--out", tmp_path / str(start), *flags, "--disc-start", start)
        assert ("disc (--disc-start is not before --steps)" in capsys.readouterr().out) == (start == 1)

def test_a_quantizer_without_an_entropy_loss_trains(tmp_path, monkeypatch):
    forward = Quantizer.forward

    def without_entropy(self, z):
        z_q, ids, losses = forward(self, z)
        del losses["entropy"]
        return z_q, ids, losses

    monkeypatch.setattr(Quantizer, "forward", without_entropy)
    call(train_tokenizer, "--out", tmp_path, *TINY_RUN, "--steps", 1)
    assert "entropy" not in log_of(tmp_path / "log.csv")[0]

def test_training_with_a_teacher(tmp_path, capsys, own_network):
    """The loss is on, said, and only in the supervised sub-codebook; its head goes where the teacher goes."""
    call(train_tokenizer, "--k", 3, "--out", tmp_path, *TINY_RUN, "--teachers", own_network)
    assert "representation (no" not in capsys.readouterr().out, "it is not among the losses that are off"
    values = [float(row["representation"]) for row in log_of(tmp_path / "log.csv")]
    torch.manual_seed(0)
    first = FQGAN(FQGANConfig(**load(tmp_path / "tokenizer.pt")["config"]))
    data = load_data("shapes", 16, True)
    images, _ = default_collate([data[i] for i in np.random.default_rng([0, 0]).permutation(len(data))[:8].tolist()])
    expected = first(images, [Pooled()(images)])[1]["representation"].item()
    assert len(values) == 4 and math.isclose(values[0], expected, rel_tol=1e-4)
    model = fqgan.load_tokenizer(tmp_path / "tokenizer.pt")
    assert model.config.teacher_widths == (48,)
    assert [branch.feature_head is not None for branch in model.branches] == [False, False, True]

    once = as_flags(FEW_STEPS | dict(steps=1, lr=0))
    call(train_tokenizer, "--init", tmp_path / "tokenizer.pt", "--out", tmp_path / "tuned", *once)
    tuned = fqgan.load_tokenizer(tmp_path / "tuned" / "tokenizer.pt")
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".feature_head." not in name}
    assert tuned.config.teacher_widths == () and same(kept, tuned.state_dict()), "without a teacher, without its head"

# -----------------------------------------------------------------------------
# Scripts: mistakes

def test_the_commands_of_the_readme_are_valid(monkeypatch, tmp_path):
    """Their flags are known and fit each other: all get to where work would begin."""
    monkeypatch.chdir(tmp_path)
    scripts = dict(train_tokenizer=train_tokenizer, train_gpt=train_gpt, sample=sample, evaluate=evaluate)
    for script in scripts.values():
        monkeypatch.setattr(script, "setup_device", Mock(side_effect=InterruptedError))
    blocks = re.findall(r"```sh\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    commands = re.findall(r"(train_tokenizer|train_gpt|sample|evaluate)\.py([^\n&;#]*)", "".join(blocks))
    assert {name for name, _ in commands} == set(scripts) and len(commands) >= 18
    for name, flags in commands:
        with pytest.raises(InterruptedError):
            call(scripts[name], *flags.split())

@pytest.mark.parametrize("script, argv, message", [
    (train_tokenizer, "--k 0", "--k is 0; it must be at least 1"),
    (train_tokenizer, "--image-size 16 --disc-weight 1", "too small for the discriminator"),
    (train_tokenizer, "--image-size 8 --perceptual-weight 1", "too small for the perceptual loss: 16 or more"),
    (train_tokenizer, "--perceptual vgg", "--perceptual vgg: choose lpips or random"),
    (train_tokenizer, "--data nowhere", "no such folder; or choose shapes, cifar10, cifar100"),
    (train_tokenizer, "--data README.md", "is a file"),
    (train_tokenizer, "--data ~nobody's/x", "no such folder"),
    (train_tokenizer, "--batch-size 30000", "20000 images of 10 classes are fewer than one batch"),
    (train_tokenizer, "--batch-size 9 --accumulate 2", "not divisible"),
    (train_tokenizer, "--disc-lr nan", "--disc-lr is nan"),
    (train_tokenizer, "--dtype int8", "float32, bfloat16, float16"),
    (train_tokenizer, "--device tpu9", "not usable here"),
    (train_tokenizer, "--k 2 --color red", "unrecognized arguments: --color red"),
    (train_tokenizer, "--channel-mult 1,x", "argument --channel-mult: invalid"),
    (train_tokenizer, "--compile", r"--compile needs a C\+\+ compiler, and there is no no-such-compiler"),
    (train_tokenizer, "--out README.md", "File exists.*README.md"),
    (train_tokenizer, "--teachers nothing", "no network at nothing"),
    (train_tokenizer, "--preset fqgan-ds16",
     "no network at teachers/dinov2_vits14.pt2; .*`python tools/convert.py dinov2_vits14 teachers/dinov2_vits14.pt2`"),
    (train_gpt, "", "python train_tokenizer.py"),
    (train_gpt, "--crops 3", "1, 2 or 10"),
    (train_gpt, "--tokenizer README.md", "README.md cannot be read as a checkpoint"),
    (sample, "--gpt nothing.pt", "python train_gpt.py"),
    (sample, "--gpt TRAINED/gpt.pt --cfg-scale 1,2,3", "cfg_scale has 3 values; give one, or 2"),
    (sample, "--gpt TRAINED/gpt.pt --out photos", "photos holds images already"),
    (sample, "--n 0", "at least 1"),
    (sample, "--out x.pdf", "cannot write .pdf files"),
    (sample, "--npz x.png", "must end in .npz"),
    (sample, "--npz x.npz --out grid.png", "exclude each other"),
    (evaluate, "", "no tokenizer checkpoint at out/tokenizer.pt: `python train_tokenizer.py` makes one"),
    (evaluate, "--real a", "--real goes with --fake"),
    (evaluate, "--fake a", "--fake is measured against --real or --data"),
    (evaluate, "--real a --fake b", "[ab] is neither a folder nor an .npz file"),
    (evaluate, "--n 0", "at least 1"),
    (evaluate, "--json nowhere/f.json", "nowhere/f.json: there is no such folder"),
    (evaluate, "--real a --fake b --n 5", "--n does not apply"),
])
def test_a_mistake_gets_one_line(script, argv, message, tmp_path, monkeypatch, trained, capsys, offline):
    monkeypatch.chdir(tree(tmp_path, "README.md", "photos/a.png"))
    monkeypatch.setenv("CXX", "no-such-compiler")  # it was 92 lines of traceback
    argv = argv.replace("TRAINED", str(trained)).split()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call_cli(script, *argv)
    told = capsys.readouterr().err + str(end.value.code)
    assert re.search(message, told) and f"{script.__name__}.py: " in told
    assert not [*tmp_path.rglob("*.pt")], "nothing is written"

# -----------------------------------------------------------------------------
# Scripts: sampling

def test_sampling_flags_and_classes_reach_the_model(tmp_path, trained, monkeypatch):
    asked = []
    generate = GPT.generate

    def listen(model, labels, *parameters):
        asked.append((labels.tolist(), *parameters[:4], parameters[5]))
        return generate(model, labels, *parameters)

    monkeypatch.setattr(GPT, "generate", listen)
    flags = as_flags(dict(
        classes="star,0", n=3, batch_size=2, cfg_scale=3, temperature=(0.7, 0.8), top_k=(5, 8), top_p=0.9,
        cfg_power=1, best_of=2, npz=tmp_path / "x.npz"))
    call(sample, "--gpt", trained / "gpt.pt", "--device", "cpu", *flags)
    parameters = 3.0, [0.7, 0.8], [5, 8], 0.9, 1
    assert asked == [([4, 4, 0, 0], *parameters), ([4, 4], *parameters)]
    assert np.load(tmp_path / "x.npz")["labels"].tolist() == [4, 0, 4]

def test_sample_grid_folder_and_array(tmp_path, trained, on_two_ranks, capsys):
    """No gaps, no doubles, and the same pictures from one process and from two."""
    gpt = ["--gpt", trained / "gpt.pt"]
    call(sample, *gpt, "--out", tmp_path / "grid.png", "--classes", "star,0", "--n", 34)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.height == 4 + 4 * 100 and 16 * 100 < grid.width < 17 * 100 + 100, "200 of a class were one row"
    call(sample, *gpt, *SAMPLES, "--out", tmp_path / "files")
    text = capsys.readouterr().out
    assert "23 images of 10 classes" in text and text.splitlines()[-2].endswith(" 0 s left")
    call(sample, *gpt, *SAMPLES, "--npz", tmp_path / "all.npz")
    files = sorted((tmp_path / "files").iterdir())
    assert len(files) == 23 and files[12].name == "000012_triangle.png"
    assert contents(tmp_path / "files") == contents(on_two_ranks / "samples")
    array = dict(np.load(tmp_path / "all.npz"))
    assert array["arr_0"].shape == (23, 16, 16, 3) and array["arr_0"].dtype == np.uint8
    assert np.array_equal(array["arr_0"], [np.asarray(Image.open(file)) for file in files])
    assert array["labels"].tolist() == [i % 10 for i in range(23)] and array["classes"][4] == "star"
    np.testing.assert_equal(array, dict(np.load(on_two_ranks / "samples.npz")))

def test_best_of_several_draws():
    """The draw of whose class the GPT is surest, by Bayes' rule, of as many as were asked for."""
    model = small_gpt()
    labels = torch.tensor([0, 0, 0, 4, 4, 4])
    ids = torch.randint(11, (6, 2, 3, 3), generator=seeded(0))
    best = []
    for first in (0, 3):
        p = []
        for draw, label in zip(ids[first:first + 3], labels[first:first + 3]):
            losses = torch.stack([model(draw[None], torch.tensor([c]))[1] for c in range(5)])  # means over 18 codes
            p.append((-18 * losses).softmax(0)[label])
        best.append(first + torch.stack(p).argmax())
    assert best[0] > 0 or best[1] > 3, "it is not simply the first"
    assert torch.equal(sample.surest(model, ids, labels, 3), ids[torch.stack(best)])

@pytest.mark.parametrize("kind, whole, cut", [("--npz", "whole.npz", "cut.npz"), ("--out", "whole", "cut")])
def test_ctrl_c_loses_no_samples(kind, whole, cut, tmp_path, trained, monkeypatch):
    """What there is, is written; nothing is added to a folder that holds images."""
    monkeypatch.chdir(tmp_path)
    flags = ["--gpt", trained / "gpt.pt", "--device", "cpu", "--batch-size", 5, "--n", 23, kind]
    call(sample, *flags, whole)
    generate = GPT.generate
    calls = itertools.count(1)

    def press(*args):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return generate(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GPT, "generate", press)
        call(sample, *flags, cut)
    if kind == "--npz":
        for name in ("arr_0", "labels"):
            assert np.array_equal(np.load(cut)[name], np.load(whole)[name][:10])
        return
    assert len(contents(cut)) == 10 and contents(cut).items() < contents(whole).items()
    with refused("holds images already"):
        call(sample, *flags, cut)

def test_a_full_disk_is_known_before_sampling(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(sample.shutil, "disk_usage", lambda folder: Mock(free=3 * 10 * 16**2))
    flags = ["--gpt", trained / "gpt.pt", "--device", "cpu", "--npz", tmp_path / "s.npz", "--n"]
    call(sample, *flags, 9)
    with refused("10 images take 7680 bytes; .* has 7680 left"):
        call(sample, *flags, 10)

# -----------------------------------------------------------------------------
# Scripts: metrics

def plain_distance(real, fake):
    """The Frechet distance of two sets' features (N,D): the root's trace is the sum of X Y^T's singular values."""
    means = [features.double().mean(0) for features in (real, fake)]
    x = (real - means[0]) / (len(real) - 1) ** 0.5
    y = (fake - means[1]) / (len(fake) - 1) ** 0.5
    root_trace = torch.linalg.svdvals(x @ y.T).sum()
    return (means[0] - means[1]).square().sum() + x.square().sum() + y.square().sum() - 2 * root_trace

def test_frechet_distance():
    rng = np.random.default_rng(0)
    distance = evaluate.frechet_distance
    a, b = rng.random((2, 6)) + 0.1
    mu, nu = rng.standard_normal((2, 6))
    expected = ((mu - nu) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    assert math.isclose(distance(mu, np.diag(a), nu, np.diag(b)), expected, rel_tol=1e-9)
    for n in (2, 10, 40):  # of rank 1, of rank 9, of full rank
        x, y = rng.standard_normal((2, n, 30)) @ rng.standard_normal((2, 30, 30))
        found = distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
        assert math.isclose(found, plain_distance(torch.tensor(x), torch.tensor(y)), rel_tol=1e-6)
    for seed in range(20):  # near-equal statistics, of rank 9: rounding took them below zero
        few = np.cov(np.random.default_rng(seed).standard_normal((10, 30)), rowvar=False)
        assert 0 <= distance(np.ones(30), few, np.ones(30), few) < 1e-6
    with refused("shapes"):
        distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with refused("not finite"):
        distance(np.zeros(3), np.eye(3), np.full(3, np.nan), np.eye(3))

def test_inception_score_of_known_distributions():
    sure = 100 * F.one_hot(torch.arange(1000) % 8, 8).float()
    mean, deviation = evaluate.inception_score(sure)
    assert math.isclose(mean, 8, rel_tol=1e-6) and deviation == 0
    assert math.isclose(evaluate.inception_score(torch.zeros(50, 8))[0], 1, rel_tol=1e-9)
    two = torch.cat([sure[:800], sure[:1].expand(400, 8)])  # splits in order, the last one shorter
    mean, deviation = evaluate.inception_score(two.numpy(), split_size=800)
    assert math.isclose(mean, (8 + 1) / 2, rel_tol=1e-6) and math.isclose(deviation, 3.5, rel_tol=1e-6)

def test_precision_recall_on_toy_manifolds():
    line = torch.arange(10.0)[:, None]  # the radius of every point is 1, at the ends 2 (k=2)
    measure = evaluate.precision_recall
    assert measure(line, line, k=2) == (1, 1)
    assert measure(line, line + 1000, k=2) == (0, 0)
    half = torch.cat([line[:5], line[:5] + 1000])
    assert measure(line, half, k=2) == (0.5, 0.7), "0 to 4, and 5 and 6 within the radius of 2 of the last one"
    copies = line[:1].repeat(10, 1)
    assert measure(line, copies, k=2) == (1, 0.1), "collapsed: a radius of 0 still covers its own place"
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(60, 5, generator=rng)
    b = 1.5 * torch.randn(50, 5, generator=rng)
    radius = torch.cdist(a.double(), a.double()).sort(1).values[:, 3]
    inside = (torch.cdist(b.double(), a.double()) <= radius).any(1)
    assert math.isclose(measure(a, b)[0], inside.double().mean())
    with refused("more than 3 images in both sets"):
        measure(a, b[:3])

def test_ssim_is_its_formula():
    x, y = uniform(2, 2, 3, 12, 11)
    assert torch.allclose(evaluate.ssim(x, x), torch.ones(2), atol=1e-5)
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    p, q = [fqgan.to_uint8(z).double() for z in (x, y)]
    p, q = [z.unfold(2, 7, 1).unfold(3, 7, 1).flatten(4) for z in (p, q)]
    mean_p = p.mean(-1, keepdim=True)
    mean_q = q.mean(-1, keepdim=True)
    cov = ((p - mean_p) * (q - mean_q)).sum(-1, keepdim=True) / 48
    luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
    contrast = (2 * cov + c2) / (p.var(-1, keepdim=True) + q.var(-1, keepdim=True) + c2)
    assert torch.allclose(evaluate.ssim(x, y).double(), (luminance * contrast).mean((1, 2, 3, 4)), atol=1e-4)
    with refused("7x7"):
        evaluate.ssim(x[..., :6], y[..., :6])

def test_what_codes_tell():
    a, b = np.random.default_rng(0).integers(0, 16, (2, 100_000))
    bits = evaluate.mutual_information
    assert abs(bits(a, a) - 4) < 1e-3
    assert abs(bits(a, (a + 3) // 2 % 8) - 3) < 1e-3, "half of the codes, told apart in pairs"
    assert bits(a, b) < 0.01 and abs(bits(a, a ^ (b & 1)) - 3) < 0.01
    labels = torch.arange(600) % 5
    told = F.normalize(torch.randn(5, 12), dim=1)[labels] + 0.1 * torch.randn(600, 12)

    def probe(x):
        return evaluate.linear_probe(x[:400], labels[:400], x[400:], labels[400:])

    assert probe(told) > 0.95
    assert probe(torch.randn(600, 12)) < 0.4
    assert probe(torch.ones(600, 12)) <= 0.2

@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Made-up weights in the published file's format."""
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    state = {name: tensor for name, tensor in net.state_dict().items() if "num_batches_tracked" not in name}
    for name, tensor in state.items():
        if tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor)  # else the features of all images are alike
        elif ".bn." in name:
            tensor += 0.2 * torch.rand(len(tensor))
    state["fc.weight"] *= 20
    assert len(state) == 472
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path

def plain_inception(weights, x):
    """The graph of 2015-12-05: torchvision's, but averages do not count the padding, and the last one is a maximum."""
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    net.load_state_dict(weights)
    net.fc = torch.nn.Identity()
    average = functools.partial(F.avg_pool2d, count_include_pad=False)
    pools = iter([average] * 8 + [F.max_pool2d])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "avg_pool2d", lambda x, **options: next(pools)(x, **options))
        return net.eval()(x)

def test_inception_is_the_graph_of_2015(inception_file):
    """Its resize is TensorFlow 1's: source = i * in / out, without half a pixel's shift. Logits have no bias."""
    images = torch.randint(0, 256, (2, 3, 40, 31), dtype=torch.uint8)
    resized = evaluate.tf1_resize(images.float())
    for row, column in [(0, 0), (298, 298), (100, 37), (150, 200)]:
        v, i = math.modf(row * 40 / 299)
        u, j = math.modf(column * 31 / 299)
        rows = images[:, :, [int(i), min(int(i) + 1, 39)]]
        square = rows[:, :, :, [int(j), min(int(j) + 1, 30)]].float()
        weights = torch.tensor([[1 - v], [v]]) * torch.tensor([[1 - u, u]])
        assert torch.allclose(resized[..., row, column], (square * weights).sum((2, 3)), atol=1e-2)
    assert torch.equal(evaluate.tf1_resize(resized), resized)
    features, logits = evaluate.Inception(inception_file)(images)
    weights = load(inception_file)
    expected = plain_inception(weights, (resized - 128) / 128)
    assert features.shape == (2, 2048) and torch.allclose(features, expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(logits, expected @ weights["fc.weight"].T, rtol=1e-3, atol=1e-3)

# -----------------------------------------------------------------------------
# Scripts: evaluation

def test_sets_of_images(tmp_path):
    """A folder, class folders behind links (which were found empty), an .npz, one compressed: the same images."""
    pixels = save_noise(tmp_path / "folder", 12, (16, 16))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "class").symlink_to(tmp_path / "folder")
    np.savez(tmp_path / "stored.npz", other=np.arange(3), arr_0=pixels, mu=np.ones(2), sigma=np.eye(2))
    np.savez_compressed(tmp_path / "small.npz", arr_0=pixels)
    for name in ("folder", "linked", "stored.npz", "small.npz"):
        opened = evaluate.ImageSet(tmp_path / name)
        assert opened.sizes() == {16}
        assert np.array_equal([np.asarray(opened.source[i][0]) for i in range(12)], pixels), name
        assert bool(opened.saved) == (name == "stored.npz"), "ADM's files: statistics and images"

@pytest.mark.parametrize("make, message", [
    (lambda path: path.mkdir(), "holds no image"),
    (lambda path: None, "neither a folder nor an .npz file"),
    (lambda path: path.write_bytes(b"PK not really"), "neither a folder nor an .npz file"),
    (lambda path: np.savez(path, images=np.zeros(3)), "images.*expected"),
    (lambda path: np.savez(path, arr_0=np.zeros((2, 3, 8, 8))), "arr_0 is float64"),
    (lambda path: np.savez(path, arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "arr_0.*expected"),
    (lambda path: np.savez(path, mu=np.zeros(3), sigma=np.eye(4)), r"\(3,\).*\(4, 4\)"),
])
def test_sets_that_cannot_be_used(make, message, tmp_path):
    np.savez(tmp_path / "good.npz", mu=np.zeros(3), sigma=np.eye(3))
    make(tmp_path / "set.npz")
    with refused(message):
        call(evaluate, "--real", tmp_path / "good.npz", "--fake", tmp_path / "set.npz", "--device", "cpu")

def metrics_of(tmp_path, *argv):
    """What evaluate.py writes to --json."""
    call(evaluate, *argv, "--json", tmp_path / "metrics.json", "--device", "cpu")
    return json.loads((tmp_path / "metrics.json").read_text())

def items_of(data, n):
    """The first n of the random order that is always the same -> (images, labels)"""
    indices = fqgan.shuffled_range(len(data))[:n]
    return default_collate([data[i] for i in indices])

@torch.no_grad()
def test_evaluate_a_tokenizer(tmp_path, trained, offline, own_network, capsys):
    """What has no weights is n/a with its reason, the rest is measured."""
    flags = ["--tokenizer", trained / "tokenizer.pt", "--out", tmp_path / "e.png"]
    metrics = metrics_of(tmp_path, *flags, "--n", 50)
    assert metrics["rfid"] is None and "pt_inception" in metrics["missing"]["rfid"]
    assert "no route to host" in metrics["missing"]["lpips"]
    assert re.search("mutual information 1 2 .*rfid +n/a: ", capsys.readouterr().out, re.S)
    assert Image.open(tmp_path / "e.png").height == 4 + 4 * 100
    metrics |= metrics_of(tmp_path, *flags, "--n", 50, "--features", own_network)

    model = fqgan.load_tokenizer(trained / "tokenizer.pt")
    train, held_out = fqgan.load_train_and_held_out("shapes", 16)
    images, labels = items_of(held_out, 50)
    train_images, train_labels = items_of(train, 250)
    fitted = Pooled()(train_images), train_labels
    ids = model.encode(images)
    decoded = fqgan.from_uint8(fqgan.to_uint8(model.decode(ids)))
    first, second = ids.transpose(0, 1).flatten(1)
    entropy = torch.special.entr(second.bincount() / len(second)).sum()

    def vectors(ids):
        codes = [branch.quantizer.lookup(ids[:, i]) for i, branch in enumerate(model.branches)]
        return torch.stack(codes, 1).flatten(1)

    expected = dict(
        psnr=fqgan.psnr(images, decoded).mean(),
        ssim=evaluate.ssim(images, decoded).mean(),
        usage_1=len(first.unique()) / 32,
        perplexity_2=entropy.exp(),
        mutual_information_1_2=evaluate.mutual_information(first.numpy(), second.numpy()),
        probe_all=evaluate.linear_probe(vectors(model.encode(train_images)), train_labels, vectors(ids), labels),
        rfd=plain_distance(Pooled()(images), Pooled()(decoded)),
        named_real=evaluate.linear_probe(*fitted, Pooled()(images), labels),
        named=evaluate.linear_probe(*fitted, Pooled()(decoded), labels),
    )
    for name, value in expected.items():
        assert math.isclose(metrics[name], value, rel_tol=1e-4), name
    assert {"probe_1", "probe_2", "mutual_information_1_2_by_chance"} <= metrics.keys()
    one = metrics_of(tmp_path, *flags, "--n", 1)
    assert one["psnr"] > 0 and one["probe_1"] is not None, "what can be measured of one image, is"
    one = metrics_of(tmp_path, *flags, "--n", 1, "--features", own_network)
    assert one["psnr"] > 0 and one["rfd"] is None, "no network's weights, or too few images for its statistics"

def test_evaluate_without_training_images(tmp_path, trained, offline, own_network):
    """ImageNet's validation part is a twentieth of the whole. What is fitted to training images is n/a."""
    make_folder(tmp_path / "data" / "val", each=6)
    flags = ["--tokenizer", trained / "tokenizer.pt", "--out", tmp_path / "e.png", "--data", tmp_path / "data"]
    metrics = metrics_of(tmp_path, *flags, "--features", own_network)
    model = fqgan.load_tokenizer(trained / "tokenizer.pt")
    images, _ = items_of(load_data(tmp_path / "data", 16, False), 12)
    decoded = model.decode(model.encode(images))
    assert math.isclose(metrics["psnr"], fqgan.psnr(images, decoded).mean(), rel_tol=1e-5)
    assert "probe_1" not in metrics and "holds one of train and val" in metrics["missing"]["probe_all"]
    assert metrics["rfd"] > 0 and metrics["named"] is None and "no training images" in metrics["missing"]["named"]
    make_folder(tmp_path / "data", each=1)
    with refused("holds one of train and val"):  # val may be a class among others
        call(evaluate, *flags)

def test_what_is_missing_is_missed_before_anything_is_fetched(tmp_path, trained, offline):
    """A name mistyped cost a download of 600 MB; and two files of statistics asked for a network."""
    real = ["--real", HERE / "assets"]
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    stats = tmp_path / "stats.npz"
    for argv, message in [
        (["--tokenizer", tmp_path / "none.pt"], "no tokenizer checkpoint"),
        (["--tokenizer", trained / "tokenizer.pt", "--data", "none"], "no such folder"),
        (["--tokenizer", trained / "tokenizer.pt", "--out", tmp_path / "picture"], "name a .png file"),
        ([*real, "--fake", tmp_path / "none.npz"], "neither a folder nor an .npz"),
        ([*real, "--fake", HERE / "assets", "--out", tmp_path / "e.png"], "--out.* does not go with --fake"),
    ]:
        with refused(message):
            call(evaluate, *argv, "--device", "cpu")
    metrics_of(tmp_path, "--real", stats, "--fake", stats)
    torch.hub.download_url_to_file.assert_not_called()

def test_a_network_that_one_rank_lacks_is_used_by_none(monkeypatch):
    """The other ranks would wait for its features."""
    monkeypatch.setattr(evaluate, "on_any_rank", lambda value, device: True)
    network, reason = evaluate.loaded(Mock(), False, "cpu")
    assert network is None and reason

def test_bits_that_independent_codes_share_by_chance():
    """Also where squares of positions have one code: counted position by position, chance seemed half as large."""
    model = small_tokenizer(k=3, image_size=32, pool=(1, 2, 4))
    ids = torch.randint(0, 32, (50, 3, 8, 8))
    for i, pool in enumerate(model.config.pool):
        ids[:, i] = ids[:, i, ::pool, ::pool].repeat_interleave(pool, 1).repeat_interleave(pool, 2)
    figures = evaluate.code_figures(model, ids, torch.zeros(50), None)
    for pair in ("1_2", "1_3", "2_3"):
        bits = figures[f"mutual_information_{pair}"]
        assert math.isclose(bits, figures[f"mutual_information_{pair}_by_chance"], rel_tol=0.15), pair

@pytest.fixture(scope="session")
def six_images(tmp_path_factory, trained):
    """Flags of evaluate.py: for a tokenizer on six real images, and for six of a GPT's samples against these."""
    folder = tmp_path_factory.mktemp("six_images")
    for part in ("train", "val"):
        save_noise(folder / "real" / part, 6, (16, 16))
    call(sample, "--gpt", trained / "gpt.pt", "--n", 6, "--device", "cpu", "--npz", folder / "fake.npz")
    tokenizer = ["--tokenizer", trained / "tokenizer.pt", "--data", folder / "real", "--out", folder / "e.png"]
    return tokenizer, ["--fake", folder / "fake.npz", "--real", folder / "real" / "val"]

SAMPLES = ["--device", "cpu", "--dtype", "float32", "--batch-size", 5, "--count", 23]

@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory, trained, six_images, lpips_files, own_network):
    """
    A folder with metrics from one process, `tokenizer1.json`, and from two, `tokenizer2.json`: of a tokenizer, with and
    without networks, and of samples; and with samples from two processes.
    """
    folder = tmp_path_factory.mktemp("on_two_ranks")
    tokenizer, sets = six_images
    modes = {
        "tokenizer": [*tokenizer, "--features", own_network, "--vgg", lpips_files[0], "--lpips", lpips_files[1]],
        "sets": [*sets, "--features", own_network],
        "missing": tokenizer,
    }
    offline = {"TORCH_HOME": str(folder / "hub"), "https_proxy": "http://127.0.0.1:9"}
    samples = ["sample", "--gpt", trained / "gpt.pt", *SAMPLES]
    commands = [[*samples, "--out", folder / "samples"], [*samples, "--npz", folder / "samples.npz"]]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in offline.items():
            patch.setenv(name, value)
        for mode, flags in modes.items():
            flags = [*flags, "--device", "cpu", "--batch-size", 3, "--json"]
            call(evaluate, *flags, folder / f"{mode}1.json")
            commands.append(["evaluate", *flags, folder / f"{mode}2.json"])
    run_on_ranks(2, folder, *commands, env=SHELL | offline)
    return folder

@pytest.mark.parametrize("mode, missing", [
    ("tokenizer", ["named", "named_real"]), ("sets", ["named", "named_real"]), ("missing", ["rfid", "lpips"])])
def test_ranks_evaluate_alike(mode, missing, on_two_ranks):
    """Also where weights cannot be had: a rank that went on without them left the other one waiting."""
    one, two = (json.loads((on_two_ranks / f"{mode}{ranks}.json").read_text()) for ranks in (1, 2))
    assert one.keys() == two.keys() and list(one["missing"]) == missing
    for name in one.keys() - {"missing"}:
        assert one[name] == two[name] or math.isclose(one[name], two[name], rel_tol=1e-4), name

def test_evaluate_with_weights(tmp_path, trained, six_images, inception_file, lpips_files, own_network, monkeypatch):
    """What the functions that define the metrics give. Another network's distance is named FD, never FID."""
    distance = evaluate.frechet_distance

    def of_64_features(mu, sigma, nu, tau):  # of 2048 it takes long
        return distance(mu[:64], sigma[:64, :64], nu[:64], tau[:64, :64])

    monkeypatch.setattr(evaluate, "frechet_distance", of_64_features)
    tokenizer_flags, set_flags = six_images
    data = load_data(tokenizer_flags[3], 16, False)
    images = torch.stack([data[i][0] for i in range(6)])
    model = fqgan.load_tokenizer(trained / "tokenizer.pt")
    decoded = fqgan.to_uint8(model.decode(model.encode(images)))
    samples = torch.from_numpy(np.load(set_flags[1])["arr_0"]).permute(0, 3, 1, 2)
    inception = evaluate.Inception(inception_file)
    real, _ = inception(fqgan.to_uint8(images))
    fake, logits = inception(samples)
    score, deviation = evaluate.inception_score(logits)
    lpips = fqgan.LPIPS(*lpips_files)(images, fqgan.from_uint8(decoded)).mean()
    weights = ["--inception", inception_file, "--vgg", lpips_files[0], "--lpips", lpips_files[1]]

    def check(name, real, fake, **others):
        precision, recall = evaluate.precision_recall(real, fake)
        expected = {name: plain_distance(real[:, :64], fake[:, :64]), "precision": precision, "recall": recall}
        for figure, value in (expected | others).items():
            assert math.isclose(metrics[figure], value, rel_tol=1e-3, abs_tol=1e-6), figure

    metrics = metrics_of(tmp_path, *tokenizer_flags, *weights)
    check("rfid", real, inception(decoded)[0], lpips=lpips)
    assert "Inception" in metrics["protocol"] and "6 images" in metrics["protocol"]
    metrics = metrics_of(tmp_path, *set_flags, *weights)
    check("fid", real, fake, inception_score=score, inception_score_deviation=deviation)
    for part in ("Inception", "6 images", "fake.npz", "cropped to 16"):
        assert part in metrics["protocol"]
    metrics = metrics_of(tmp_path, *set_flags, "--features", own_network)
    check("fd", Pooled()(images), Pooled()(fqgan.from_uint8(samples)))
    assert "own.pt2" in metrics["protocol"] and not metrics.keys() & {"fid", "inception_score"}

def test_evaluate_two_sets(tmp_path, own_network, capsys):
    """A set and itself are 0 apart, never below; statistics that are kept stand for their images, and no others."""
    a = tmp_path / "a"
    b = tmp_path / "b"
    stats = tmp_path / "stats.npz"
    np.savez(tmp_path / "a.npz", arr_0=save_noise(a, 6, (16, 16)))
    save_noise(b, 5, (16, 16), seed=1)
    features = ["--features", own_network]
    itself = metrics_of(tmp_path, "--real", a, "--fake", tmp_path / "a.npz", *features)
    assert 0 <= itself["fd"] < 1e-6 and itself["precision"] == itself["recall"] == 1
    assert "-0.00" not in capsys.readouterr().out
    whole = metrics_of(tmp_path, "--fake", b, "--real", a, *features, "--save-stats", stats)
    kept = metrics_of(tmp_path, "--fake", b, "--real", stats, *features)
    assert math.isclose(kept["fd"], whole["fd"], rel_tol=1e-6) and whole["fd"] > 0.1
    assert np.load(stats)["count"] == 6
    for i in range(2):
        np.savez(tmp_path / f"{i}.npz", mu=np.full(4, i), sigma=np.eye(4))
    capsys.readouterr()
    statistics = metrics_of(tmp_path, "--real", tmp_path / "0.npz", "--fake", tmp_path / "1.npz")
    assert math.isclose(statistics["fd"], 4), "of which network they do not say, so it is not called FID"
    assert "0.npz does not say of which network" in capsys.readouterr().out
    statistics = metrics_of(tmp_path, "--real", stats, "--fake", stats)
    assert statistics["fd"] < 1e-6 and "Inception" not in statistics["protocol"], "they are of another network"

    # images and statistics in one file, as ADM's: with --features its images count, and nothing is said of the others
    np.savez(tmp_path / "both.npz", arr_0=np.load(tmp_path / "a.npz")["arr_0"], mu=np.zeros(4), sigma=np.eye(4))
    both = metrics_of(tmp_path, "--fake", b, "--real", tmp_path / "both.npz", *features)
    assert math.isclose(both["fd"], whole["fd"], rel_tol=1e-6)
    assert "does not say" not in capsys.readouterr().out
    assert both["protocol"].count("both.npz, cropped to 16: 6 images;") == 1

    np.savez(tmp_path / "names.npz", arr_0=np.zeros((6, 16, 16, 3), np.uint8), labels=["moon"] * 6)
    other = tmp_path / "other.pt2"  # another network of the same width
    torch.export.save(torch.export.load(own_network), other, extra_files={"x": "y"})
    for argv, message in [
        (["--real", a, "--inception", "nowhere.pth"], "no file at nowhere.pth"),
        (["--real", stats, "--features", other], "statistics of another network"),
        (["--real", stats, *features, "--image-size", 12], "statistics of images of another size than 12"),
        (["--real", stats, *features, "--save-stats", tmp_path / "again.npz"], "--save-stats is for images"),
        (["--data", "shapes", "--fake", tmp_path / "0.npz"], "give --image-size"),
        (["--real", tmp_path / "names.npz", *features], "labels do not fit arr_0: they are <U4"),
    ]:
        with refused(message):
            call(evaluate, "--fake", b, *argv, "--device", "cpu")

def test_sizes_of_two_sets(tmp_path, own_network):
    """The first file's size cropped all: a distance of .18 or .32, by which file that was."""
    for name, sizes in dict(small=[16], large=[20], mixed=[16, 20]).items():
        for size in sizes:
            save_noise(tmp_path / name / str(size), 5, (size, size + 4))

    def protocol(real, fake, *argv):
        flags = ["--real", tmp_path / real, "--fake", tmp_path / fake, "--features", own_network, *argv]
        return metrics_of(tmp_path, *flags)["protocol"]

    for pair in (("small", "large"), ("large", "small")):
        assert protocol(*pair).count("cropped to 16") == 2
    with refused(r"of .*mixed differ \(16, 20\): say with --image-size"):
        protocol("small", "mixed")
    assert protocol("small", "mixed", "--image-size", 16).count("cropped to 16") == 2

def test_inception_score_of_sorted_images():
    """5,001 images, sorted by class as a folder is, had a score of 5.0 or 5.4 in the place of 9.9."""
    logits = 100 * F.one_hot(torch.arange(10).repeat_interleave(1000), 10).float()
    real = evaluate.Statistics("", np.zeros(2), np.eye(2))
    for n in (10_000, 5_001, 40):
        kept = logits[:n] if n > 5001 else logits[torch.arange(n) * 10_000 // n]
        fake = evaluate.Statistics("", np.zeros(2), np.eye(2), logits=kept)
        network = SimpleNamespace(is_inception=True)
        assert evaluate.compare(real, fake, network, torch.device("cpu"))[0]["inception_score"] > 9.9
    assert evaluate.inception_score(logits)[0] < 6

@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit
@pytest.mark.parametrize("network, message", [
    (torch.nn.Identity(), r"gives \(6, 3, 16, 16\)"),
    (torch.nn.MaxPool2d(2, return_indices=True), "fails on images"),  # a pair
])
def test_a_network_whose_output_is_no_features(network, message, tmp_path):
    save_noise(tmp_path / "a", 6, (16, 16))
    torch.jit.trace(network, torch.zeros(2, 3, 16, 16)).save(tmp_path / "network.pt")
    flags = ["--real", tmp_path / "a", "--fake", tmp_path / "a", "--features", tmp_path / "network.pt"]
    with refused(message):
        call(evaluate, *flags, "--device", "cpu")

def test_samples_are_named(tmp_path, own_network):
    """By their labels, where the classes have the same names in the same order: others were compared by number."""
    images = np.random.default_rng(0).integers(0, 99, (40, 16, 16, 3), dtype=np.uint8)
    images[::2] += np.uint8([150, 0, 0])
    images[1::2] += np.uint8([0, 0, 150])
    labels = np.arange(40) % 2
    real = tmp_path / "real"
    for part, i in itertools.product(("train", "val"), range(40)):
        folder = real / part / ("red", "blue")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(folder / f"{i}.png")

    def measured(*reference, **arrays):
        np.savez(tmp_path / "fake.npz", arr_0=images, **arrays)
        return metrics_of(tmp_path, "--features", own_network, "--fake", tmp_path / "fake.npz", *reference)

    alike = measured("--data", real, labels=1 - labels, classes=["blue", "red"])
    assert alike["named"] == alike["named_real"] == 1 and alike["missing"] == {}
    assert "val, all of it: 40 images" in alike["protocol"] and "frequent" not in alike["protocol"]
    others = measured("--real", real / "val", labels=labels, classes=["red", "blue"])
    assert others["named"] is None and "the classes differ: red, blue; blue, red" in others["missing"]["named"]
    assert measured("--real", real / "val", labels=labels)["named"] == 0, "without names, by number"
    biased = measured("--real", real / "val", labels=0 * labels)
    assert biased["named"] == 0.5 and "not equally frequent" in biased["protocol"]
    flat = measured("--real", real / "val" / "red", labels=labels)
    assert "no labels" in flat["missing"]["named"] and "frequent" not in flat["protocol"]

def test_classes_that_are_missing_are_said():
    """Half of 1,000: no share differs by more than 0.001."""
    options = SimpleNamespace(features="own.pt2")
    for step, said in ((1, False), (2, True)):
        sets = [evaluate.Statistics("", None, None, labels=torch.arange(0, 1000, s), classes=[]) for s in (1, step)]
        assert ("not equally frequent" in evaluate.protocol_of(*sets, options)) == said

def test_a_file_of_images_and_statistics(tmp_path):
    """As ADM's: its statistics are those of its whole images; cropped ones have their own."""
    pixels = save_noise(tmp_path / "a", 5, (16, 16))
    np.savez(tmp_path / "both.npz", arr_0=pixels, mu=np.full(48, 7.0), sigma=np.eye(48))
    options = SimpleNamespace(batch_size=4, device=torch.device("cpu"))

    def network(images):
        features = Pooled()(fqgan.from_uint8(images))
        return features, features[:, :0]

    both = evaluate.ImageSet(tmp_path / "both.npz")
    whole, cropped = (evaluate.statistics_of_set(both, network, size, options) for size in (16, 12))
    assert (whole.mu == 7).all() and whole.features.shape == (5, 48)
    assert "with its own mu and sigma" in whole.description
    assert np.allclose(cropped.mu, cropped.features.double().mean(0)) and "its own mu" not in cropped.description
