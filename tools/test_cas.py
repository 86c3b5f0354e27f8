"""
Tests of tools/cas.py.

$ python -m pytest -q tools/test_cas.py
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_fqgan import call, refused, save_small
from tools import cas

def of_colors(n):
    """Images of one color and a little noise; four colors, four classes."""
    labels = torch.arange(n) % 4
    colors = torch.tensor([[40, 40, 200], [200, 40, 40], [40, 200, 40], [200, 200, 200]])
    images = colors[labels][:, :, None, None] + torch.randint(-40, 40, (n, 3, 16, 16))
    return images.to(torch.uint8), labels

def test_what_is_learned_from_samples_counts():
    """Right labels are learned; with shifted labels held-out images are not named."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    images, labels = of_colors(500)
    held_out = of_colors(200)
    assert cas.accuracy(cas.train(images, labels, 4, 6, device), *held_out, device) > 0.9
    wrong = (labels + 1) % 4
    assert cas.accuracy(cas.train(images, wrong, 4, 6, device), *held_out, device) < 0.1

def test_augmented_images_are_shifted_and_mirrored():
    """Each in its own way: all are found among the shifts of the padded image and its mirror image."""
    torch.manual_seed(0)
    image = torch.randn(1, 3, 12, 12)
    augmented = cas.augment(image.expand(40, -1, -1, -1))
    padded = F.pad(image, (4, 4, 4, 4), mode="reflect")
    shifts = padded.unfold(2, 12, 1).unfold(3, 12, 1)[0].permute(1, 2, 0, 3, 4).flatten(0, 1)
    found = [set((shifts == each).flatten(1).all(1).nonzero().flatten().tolist()) for each in augmented]
    mirrored = [set((shifts == each.flip(2)).flatten(1).all(1).nonzero().flatten().tolist()) for each in augmented]
    assert all(a or b for a, b in zip(found, mirrored))
    assert any(found) and any(mirrored) and len(set.union(*found, *mirrored)) > 20

@pytest.mark.parametrize("flags", [["samples.npz"], [], ["--tokenizer", "tokenizer.pt"]])
def test_cas_is_measured(flags, tmp_path, monkeypatch, capsys):
    """Of samples, of real images, of reconstructions (here of random weights, so that any share will do)."""
    monkeypatch.chdir(tmp_path)
    save_small(tmp_path)
    images, labels = of_colors(500)
    pixels = images.permute(0, 2, 3, 1).numpy()
    np.savez("samples.npz", arr_0=pixels, labels=labels, classes=list("abcd"))
    for i, (image, label) in enumerate(zip(pixels, labels)):
        folder = tmp_path / "images" / "abcd"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    call(cas, *flags, "--data", "images", "--image-size", 16, "--epochs", 12, "--device", "cpu")
    share = float(re.search(r"cas (\S+): learned from \d+ images", capsys.readouterr().out)[1])
    assert share > 0.9 or "--tokenizer" in flags

def test_cas_refuses_what_does_not_fit(tmp_path):
    arrays = dict(arr_0=np.zeros((300, 16, 16, 3), np.uint8), labels=np.zeros(300, np.int64))
    np.savez(tmp_path / "other.npz", **arrays, classes=np.array(["cat", "dog"]))
    np.savez(tmp_path / "bare.npz", arr_0=arrays["arr_0"])
    for argv, message in [
        (["other.npz"], "have different classes"), (["bare.npz"], "is no file of `sample.py --npz`"),
        (["missing.npz"], "is no file of"), (["--n", 100], "100 training images are too few"),
    ]:
        argv = [tmp_path / word if str(word).endswith(".npz") else word for word in argv]
        with refused(message):
            call(cas, *argv, "--data", "shapes", "--image-size", 16, "--device", "cpu")
