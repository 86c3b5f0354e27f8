"""
FQGAN in one file: a factorized visual tokenizer and the autoregressive model that generates its tokens.

A convolutional encoder feeds k transformer adapters; each has its own small codebook; the decoder paints the image out
of all k codes of a position; a GPT learns to generate the codes. Read in the order of the file: data, transformer blocks,
the tokenizer, the networks that only its training needs, the GPT with its sampling, files (ours and published ones).

Sources:
1) FQGAN: Bai et al., Factorized Visual Tokenization and Generation, https://arxiv.org/abs/2411.16681
   sec. 3.2: factorized quantization, disentanglement, representation learning; sec. 3.3: the GPT's head
2) VQGAN: Esser et al., Taming Transformers, https://arxiv.org/abs/2012.09841 (encoder, decoder, adversarial loss)
3) LlamaGen: Sun et al., https://arxiv.org/abs/2406.06525 (l2-normalized codes of dimension 8; the GPT's trunk, 2-D rotary positions, guidance)
4) MAGVIT-v2: Yu et al., https://arxiv.org/abs/2310.05737 (the entropy loss)
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import math
import os
import random
import re
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# -----------------------------------------------------------------------------
# Errors


class UserError(ValueError):
    """A mistake the user can mend: the scripts print its message as one line and exit with 1."""


def require(condition, message):
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def explained(message, advice=""):
    """Any error inside becomes a UserError of one line: the message, the error's kind and beginning, the advice."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{message} ({type(error).__name__}: {' '.join(str(error).split())[:160]}){advice}") from None


# -----------------------------------------------------------------------------
# Data


def outlines():
    """The figures of Shapes, as complex numbers, y downwards: a polygon within the square from -1-1j to 1+1j, and what is cut out of it."""
    def turn(n, inner=1.0):  # n points round the circle, the first one up; every second one at the radius `inner`
        return np.exp(2j * np.pi * (np.arange(n) / n - 0.25)) * np.where(np.arange(n) % 2, inner, 1.0)

    circle, t = turn(96), np.linspace(0, 2 * np.pi, 96, endpoint=False)
    heart = 16 * np.sin(t) ** 3 + 1j * (-13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t))
    arm = np.array([-0.36 - 1j, 0.36 - 1j, 0.36 - 0.36j])
    return {
        "circle": [0.9 * circle],
        "square": [0.8 * np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j])],
        "triangle": [turn(3) + 0.2j],
        "diamond": [0.72 * turn(4).real + 1j * turn(4).imag],
        "star": [turn(10, 0.42)],
        "cross": [0.95 * np.concatenate([arm * 1j**quarter for quarter in range(4)])],
        "ring": [0.95 * circle, 0.5 * circle],
        "heart": [heart / 17 - 0.1j],
        "moon": [0.95 * circle, 0.5 + 0.8 * circle],
        "arrow": [np.array([-1 - 0.3j, 0.1 - 0.3j, 0.1 - 0.8j, 1, 0.1 + 0.8j, 0.1 + 0.3j, -1 + 0.3j])]}


class Shapes:
    """
    The built-in data set: ten flat figures of random size and place, seven colours on six soft backgrounds. Item `i` is always the same
    figure, of class i % 10, whatever the size it is rendered at; training and held-out items are drawn from different seeds.
    """

    figures = outlines()
    classes = list(figures)
    colours = [(214, 40, 57), (240, 120, 20), (250, 196, 20), (38, 150, 80), (20, 140, 170), (40, 70, 190), (130, 60, 170)]
    backgrounds = [(250, 240, 225), (225, 238, 250), (228, 245, 228), (250, 228, 232), (238, 230, 248), (236, 236, 236)]

    def __init__(self, size, train):
        self.size, self.train = size, train

    def __len__(self):
        return 20_000 if self.train else 2_000

    def __getitem__(self, index):
        label = index % len(self.classes)
        rng = random.Random(f"{'train' if self.train else 'held-out'} {index}")
        radius = rng.uniform(0.24, 0.42)  # of the image's side
        center = rng.uniform(radius + 0.02, 0.98 - radius) + 1j * rng.uniform(radius + 0.02, 0.98 - radius)
        figure, ground = (Image.new("RGB", (self.size,) * 2, rng.choice(colours)) for colours in (self.colours, self.backgrounds))
        fine = 8 * self.size  # anti-aliasing: drawn 8 times as large, then averaged
        mask = Image.new("L", (fine, fine))
        for polygon, fill in zip(self.figures[self.classes[label]], (255, 0)):
            ImageDraw.Draw(mask).polygon([(p.real, p.imag) for p in (center + radius * polygon) * fine], fill=fill)
        return Image.composite(figure, ground, mask.reduce(8)), label


def upright_rgb(image):
    """Any PIL image as 8-bit RGB: EXIF rotation applied, 16 bits scaled to 8, transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop_square(image, size, rng=None, views=1):
    """
    A list of size x size crops of a PIL image: the shorter side is scaled to `size` as ADM does it, halved by box averages while it is twice
    as long or longer, then bicubic, and the center taken.
    With `rng` one, of a random 0.8 to 1.0 of the shorter side (of a small image more, so that nothing is learned from blur), flipped half the
    time. Else of `views` 1 the center; of 2 its mirror image too; of 10, as LlamaGen's, of the central square at 1.1 times the size the center
    and four corners, and then their mirror images.
    Source: Dhariwal and Nichol, https://arxiv.org/abs/2105.05233.
    """
    short = int(1.1 * size) if views == 10 else size
    if rng:
        short = rng.randint(size, max(size, min(math.ceil(size / 0.8), *image.size)))
    if max(image.size) > 8 * min(image.size):  # the middle of a strip, which would grow endless when it is scaled
        image = ImageOps.fit(image, [min(side, 8 * min(image.size)) for side in image.size])
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    if rng:
        corners, mirrored = [[rng.randint(0, side - size) for side in image.size]], [rng.random() < 0.5]
    else:
        places = [(0, 0), (-1, -1), (1, -1), (-1, 1), (1, 1)] if views == 10 else [(0, 0)]  # from the center
        corners = [[(side - size + way * (short - size)) // 2 for side, way in zip(image.size, place)] for place in places]
        mirrored = [False, True][:views]
    crops = [image.crop((left, top, left + size, top + size)) for left, top in corners]
    return [ImageOps.mirror(crop) if mirror else crop for mirror in mirrored for crop in crops]


class ImageData(torch.utils.data.Dataset):
    """
    Items are (image (3,H,W) float in [-1, 1], label int). The index may be a pair (index, draw): the random crop is a
    function of both, so that any step of a run can be repeated without the steps before it.

    An image that cannot be read is named once on stderr and replaced by the next one that can; more than 1 % of
    all, if more than one, raise UserError. `unreadable` counts them, over all worker processes.
    """

    def __init__(self, source, classes, image_size, augment, origin):
        self.source, self.classes, self.image_size, self.augment, self.origin = source, classes, image_size, augment, origin
        self.failed = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        index, draw = index if isinstance(index, tuple) else (index, "")
        images, label = self.crops(index, rng=random.Random(f"{index} {draw}") if self.augment else None)
        return images[0], label

    @property
    def unreadable(self):
        return int(self.failed.sum())

    def crops(self, index, **options):
        """All that crop_square with these options makes of item `index`: (images (n,3,H,W), label)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        for i in ((index + step) % len(self) for step in range(len(self))):
            if self.failed[i]:
                continue
            try:
                image, label = self.source[i]
                images = np.stack(crop_square(upright_rgb(image), self.image_size, **options))
                return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1), int(label)
            except Exception as error:  # PIL raises a dozen kinds
                self.failed[i] = True
                name = self.source.samples[i][0] if hasattr(self.source, "samples") else f"item {i}"
                print(f"skipped, unreadable: {str(name)!r} ({error})", file=sys.stderr)
            if self.unreadable > max(1, 0.01 * len(self)):
                break
        raise UserError(f"{self.unreadable} of {len(self)} images of {self.origin} cannot be read (named above), "
                        "more than 1 %: mend or remove them")


class Folder:
    """A folder as a source of PIL images: of class folders (images beside them are not taken), or flat (one class). Files stay closed until asked for."""

    suffixes = {*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif"}

    def __init__(self, path):
        require(path.is_dir(), f"{path} is a file; --data takes a folder of images, or of class folders")
        folders = self.class_folders(path) or [path]
        self.classes = [folder.name for folder in folders]
        self.samples = [(p, label) for label, folder in enumerate(folders) for p in self.files(folder)]
        where = f"the folders in {path} hold" if folders != [path] else f"{path} holds"
        require(self.samples, f"{where} no image (looked for .jpg, .jpeg, .png, .webp, ...)")

    @classmethod
    def files(cls, path):
        """The images below a folder in the order of their names, hidden ones left out."""
        return [p for p in sorted(path.rglob("*"))
                if p.suffix.lower() in cls.suffixes and p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)]

    @staticmethod
    def class_folders(path):
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        with Image.open(path) as image:
            image.load()
        return image, label


def load_data(name_or_path, image_size, train):
    """
    A data set of (image (3,H,W) in [-1, 1], label int) with `.classes`, center-cropped, or with `train` randomly (shapes never).

    `name_or_path`: "shapes"; a folder of class folders or of images; a name of torchvision.datasets in lower case,
    downloaded into torch.hub's cache. Of a folder with `train` and `val` inside, these are the two parts; of another,
    every tenth file by name is held out. Where there is nothing to hold out (under 100 images, a torchvision set without
    parts) both are the whole. `.origin` says in words what was taken. Raises UserError where there is nothing to load.
    """
    if name_or_path == "shapes":
        return ImageData(Shapes(image_size, train), Shapes.classes, image_size, False, f"shapes, {'training' if train else 'held-out'} part")
    path = Path(os.path.expanduser(name_or_path))
    if path.exists():
        parts = path / "train", path / "val"
        if all(p.is_dir() for p in parts):
            names = [[p.name for p in Folder.class_folders(part)] for part in parts]
            require(names[0] == names[1], f"{parts[0]} and {parts[1]} hold different class folders ({len(names[0])} and {len(names[1])})")
            source, origin = Folder(parts[not train]), f"{parts[not train]}"
        else:
            source, origin = Folder(path), f"{path}, all of it (too few to hold any out)"
            if len(source) >= 100:
                source.samples = [s for i, s in enumerate(source.samples) if (i % 10 == 9) != train]
                origin = f"{path}, {'all but every' if train else 'every'} tenth file"
        return ImageData(source, source.classes, image_size, train, origin)

    make = {n.lower(): getattr(torchvision.datasets, n) for n in torchvision.datasets.__all__}.get(str(name_or_path).lower())
    takes = inspect.signature(make).parameters if make else ()
    require("root" in takes, f"--data {name_or_path}: no such folder, and torchvision has no data set of that name "
                             "(it has cifar10, stl10, imagenette, flowers102, ...); `shapes` needs nothing")
    splits = ("train", "trainval") if train else ("val", "test")
    parts = [{"train": train}] if "train" in takes else [{"split": name} for name in splits if "split" in takes] or [{}]
    options = {"root": Path(torch.hub.get_dir()) / "datasets"} | ({"download": True} if "download" in takes else {})
    for part in parts:
        with (explained(f"--data {name_or_path}: torchvision could not get its part {part}", "; download it elsewhere and give its folder"),
              contextlib.suppress(ValueError)):  # its parts have other names
            source = make(**options, **part)
            break
    else:
        raise UserError(f"--data {name_or_path}: torchvision's {make.__name__} has none of the parts {parts}")
    with explained(f"--data {name_or_path}: torchvision's {make.__name__} does not list its classes", "; save its images as a folder"):
        classes = getattr(source, "classes", None) or [str(i) for i in range(int(max(getattr(source, "labels", getattr(source, "targets", [])))) + 1)]
    return ImageData(source, [c if isinstance(c, str) else ", ".join(c) for c in classes], image_size, train,
                     f"torchvision's {make.__name__}, {part or 'the whole'}")


def to_uint8(images):
    """[-1, 1] to 0..255, as the official scripts write images: clamp(127.5 x + 128), cut to whole numbers."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


# -----------------------------------------------------------------------------
# Transformer blocks, for adapters and GPT alike


def rotary_table(grid, head_dim):
    """
    (2, 1 + grid^2, head_dim): cos, and sin as (-sin, sin) for each pair, of the class token and then the grid, row by row. The first
    half of the interleaved pairs turns by the row, the other by the column. The class token's are zeros, as in the official
    code: it turns query and key into zero vectors, so that every position attends to the class with a score of 0.
    """
    frequency = 10000.0 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))  # (head_dim/4)
    angle = torch.arange(grid)[:, None] * frequency
    angle = torch.cat([angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)], 1)  # (grid^2, head_dim/2)
    cos, sin = angle.cos().repeat_interleave(2, 1), torch.stack([-angle.sin(), angle.sin()], 2).flatten(1)
    return F.pad(torch.stack([cos, sin]), (0, 0, 1, 0))


def rotate(x, table):
    """Turns the pairs (a, b) of x (..., T, e) into (a cos - b sin, b cos + a sin), in the precision of table (2, T, e)."""
    cos, sin = table
    return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin  # flip: (a, b) -> (b, a)


def training_layout(x):
    """
    A map or a kernel, in training on CPUs with its channels last in memory: convolutions (oneDNN's, on x86) then take up to a quarter less time, and
    pass the layout on. Not in encoding: GroupNorm loses digits in it where a group's mean is far above its spread, enough for other codes.
    """
    return x.contiguous(memory_format=torch.channels_last if x.device.type == "cpu" and torch.is_grad_enabled() else torch.contiguous_format)


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, C) -> (B, T, C); causal, rotary and cached where the GPT asks for it."""

    def __init__(self, width, heads, bias=True, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def forward(self, x, rotary=None, cache=None, at=0):
        """rotary: a table for rotate. cache (2,B,heads,length,e): keys and values; its first `at` positions are filled, and x (T = 1) adds its own."""
        B, T, C = x.shape
        qk, (v,) = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).split([2, 1])
        q, k = qk if rotary is None else rotate(qk, rotary)  # (B, heads, T, e) each, as v is
        if cache is not None:
            cache[0, :, :, at:at + T], cache[1, :, :, at:at + T] = k, v
            k, v = cache[:, :, :, :at + T]
        # in training on CPUs at least float32: under bfloat16 the backward pass of PyTorch's CPU kernel takes several times as long
        dtype = torch.promote_types(v.dtype, torch.float32) if x.device.type == "cpu" and torch.is_grad_enabled() else v.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=self.causal and T > 1)
        return self.proj(y.to(v.dtype).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, width, activation=F.gelu):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = -(-int(8 * width / 3) // 256) * 256  # rounded up to a multiple of 256
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A pre-norm transformer block; `dropout` falls on both branches' outputs."""

    def __init__(self, width, attn, mlp, norm=nn.LayerNorm, dropout=0.0):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp, self.dropout = norm(width), attn, norm(width), mlp, nn.Dropout(dropout)

    def forward(self, x, **attention_options):
        x = x + self.dropout(self.attn(self.norm1(x), **attention_options))
        return x + self.dropout(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """
    A vision transformer over a map (B,C,h,w), whose vectors `stem` makes into tokens; its learned positions fix the grid.
    -> a map (B,width,h,w); or, with `class_token`, one token more in front, that one's output (B,width).
    """

    def __init__(self, width, depth, heads, positions, stem, class_token=False, activation=F.gelu, eps=1e-5):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=eps)
        self.stem = stem
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(1, width)) if class_token else None
        self.positions = nn.Parameter(width**-0.5 * torch.randn(positions + class_token, width))
        self.norm_pre, self.norm_post = norm(width), norm(width)
        self.blocks = nn.Sequential(*(Block(width, Attention(width, heads), MLP(width, activation), norm) for _ in range(depth)))

    def forward(self, x):
        h, w = x.shape[2:]
        x = self.stem(x.flatten(2).transpose(1, 2))  # (B, h*w, width), row by row
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.norm_post(self.blocks(self.norm_pre(x + self.positions)))
        return x[:, 0] if self.class_embedding is not None else training_layout(x.transpose(1, 2).unflatten(2, (h, w)))


# -----------------------------------------------------------------------------
# Tokenizer: config


def flag(default, help):
    """A config field whose explanation is also the help of its command-line flag."""
    return field(default=default, metadata={"help": help})


@dataclass
class FQGANConfig:
    """The tokenizer's shape and loss weights. The defaults are the paper's FQGAN-Triple at 16x."""

    k: int = flag(3, "number of sub-codebooks: 2 is FQGAN-Dual, 3 FQGAN-Triple; 1 with --adapter-depth 0 is VQGAN")
    codebook_size: int = flag(16384, "codes in each sub-codebook")
    codebook_dim: int = flag(8, "numbers in a code")
    image_size: int = flag(256, "side of the square images, in pixels")
    downsample: int = flag(16, "pixels a code stands for, along each side; a power of two")
    patch_size: int = flag(1, "above 1, pixels are first gathered into channels, patch by patch: a cheap stem")
    channels: int = flag(128, "width of the convolutions at the finest level")
    channel_mult: tuple[int, ...] = flag((), "width of each level in units of channels; empty: as published, 1,1,2,2,4 at 16x")
    res_blocks: int = flag(2, "residual blocks in a level of the encoder; the decoder has one more")
    norm_groups: int = flag(32, "groups of the normalizations; with few channels in each, an image's mean colour is lost")
    z_channels: int = flag(256, "channels between the convolutions and the quantizers")
    adapter_depth: int = flag(6, "transformer blocks in each sub-codebook's adapter; 0 for no adapters")
    adapter_width: int = flag(512, "width of the adapters")
    adapter_heads: int = flag(8, "attention heads of the adapters")
    recompute: bool = flag(False, "training keeps what convolutions return and computes norms and activations again: less memory")
    commit_weight: float = flag(0.25, "weight of the commitment loss")
    entropy_weight: float = flag(0.03, "weight of the entropy loss")
    entropy_final: float = flag(1.0, "share of --entropy-weight that an exponential decay over the run ends at; 1 for no decay")
    entropy_temperature: float = flag(0.01, "softmax temperature of the entropy loss")
    disentangle_weight: float = flag(0.1, "weight of the disentanglement loss")
    representation_weight: float = flag(0.5, "weight of the representation loss of each teacher")
    perceptual_weight: float = flag(1.0, "weight of LPIPS; 0 for none")
    disc_weight: float = flag(0.5, "weight of the adversarial losses; 0 for no discriminator")
    disc_start: int = flag(20_000, "step from which the adversarial losses are on")
    teacher_widths: tuple[int, ...] = ()  # of the features that supervise the last sub-codebooks; follows from the teachers

    def __post_init__(self):
        for f in fields(self):
            low = 0 if f.name in ("adapter_depth", "disc_start") else 1
            require(f.type is not int or getattr(self, f.name) >= low, f"{f.name} is {getattr(self, f.name)}; it must be at least {low}")
        require(self.downsample > 1 and self.downsample.bit_count() == 1 and self.downsample % self.patch_size == 0,
                f"downsample {self.downsample} must be a power of two, and a multiple of patch_size {self.patch_size}")
        require(self.image_size % self.downsample == 0,
                f"image_size {self.image_size} is not divisible by downsample {self.downsample}: "
                f"{max(1, self.image_size // self.downsample) * self.downsample} is")
        levels = (self.downsample // self.patch_size).bit_length()
        self.channel_mult = tuple(self.channel_mult) or (1, *((1,) * levels + (2, 2, 4))[4:])  # 1,2,2,4 at 8x; 1,1,2,2,4 at 16x
        self.teacher_widths = tuple(self.teacher_widths)
        require(len(self.teacher_widths) <= self.k, f"{len(self.teacher_widths)} teachers are more than k={self.k} sub-codebooks")
        require(len(self.channel_mult) == levels,
                f"channel_mult {self.channel_mult} names {len(self.channel_mult)} levels; "
                f"downsample {self.downsample} with patch_size {self.patch_size} has {levels}")
        require(all(m > 0 and self.channels * m % self.norm_groups == 0 for m in (1, *self.channel_mult)),
                f"channels {self.channels} x {self.channel_mult} must be multiples of norm_groups {self.norm_groups}")
        require(self.adapter_depth == 0 or self.adapter_width % math.lcm(self.norm_groups, self.adapter_heads) == 0,
                f"adapter_width {self.adapter_width} must be a multiple of norm_groups {self.norm_groups} and of adapter_heads {self.adapter_heads}")
        for name in ("entropy_temperature", "entropy_final"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def grid(self):
        return self.image_size // self.downsample


# -----------------------------------------------------------------------------
# Tokenizer: the convolutional encoder and decoder of VQGAN


def group_norm(channels, config):
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, config):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in, config), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out, config), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.recompute = config.recompute

    def forward(self, x):
        if self.recompute and torch.is_grad_enabled():
            keep_convolutions = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
            return checkpoint(self.add_residual, x, use_reentrant=False, preserve_rng_state=False, context_fn=keep_convolutions)
        return self.add_residual(x)

    def add_residual(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions of a feature map, one head."""

    def __init__(self, channels, config):
        super().__init__()
        self.norm, self.attn = group_norm(channels, config), Attention(channels, heads=1)

    def forward(self, x):
        h = self.attn(self.norm(x).flatten(2).transpose(1, 2))  # (B, h*w, C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


def downsample(c):
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))  # at right and bottom only, as VQGAN


class Upsample(nn.Module):
    """Every pixel doubled along both sides, then a 3x3 convolution: as one transposed convolution, 4/9 of the multiplications."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        weight = self.conv.weight.transpose(0, 1).flip(2, 3)
        kernel = sum(F.pad(weight, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1))  # 4x4: weights that meet the same pixel, added
        return F.conv_transpose2d(x, training_layout(kernel), self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention at the lowest; then the change of resolution."""

    def __init__(self, c_in, c_out, blocks, attend, resample, config):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, config) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out, config) if attend else nn.Identity() for _ in range(blocks))
        self.resample = resample(c_out)

    def forward(self, x):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.resample(x)


def middle(c, config):
    return nn.Sequential(ResBlock(c, c, config), AttnBlock(c, config), ResBlock(c, c, config))


def encoder(config):
    """(B, 3, H, W) -> (B, C, h, w), the features that all adapters share."""
    widths = [config.channels * m for m in config.channel_mult]
    last = len(widths) - 1
    return nn.Sequential(OrderedDict(
        patch=nn.PixelUnshuffle(config.patch_size),
        conv_in=nn.Conv2d(3 * config.patch_size**2, config.channels, 3, padding=1),
        levels=nn.Sequential(*(Level(c_in, c_out, config.res_blocks, i == last, nn.Identity if i == last else downsample, config)
                               for i, (c_in, c_out) in enumerate(zip([config.channels] + widths, widths)))),
        mid=middle(widths[-1], config)))


def decoder(config):
    """(B, z_channels, h, w) -> (B, 3, H, W)"""
    widths = [config.channels * m for m in reversed(config.channel_mult)]
    last = len(widths) - 1
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(config.z_channels, widths[0], 3, padding=1),
        mid=middle(widths[0], config),
        levels=nn.Sequential(*(Level(c_in, c_out, config.res_blocks + 1, i == 0, nn.Identity if i == last else Upsample, config)
                               for i, (c_in, c_out) in enumerate(zip(widths[:1] + widths, widths)))),
        norm_out=group_norm(widths[-1], config),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 3 * config.patch_size**2, 3, padding=1),
        patch=nn.PixelShuffle(config.patch_size)))


# -----------------------------------------------------------------------------
# Tokenizer: quantizers and their losses


class Quantizer(nn.Module):
    """
    One sub-codebook. Vectors and codes are compared on the unit sphere, where the nearest code is the one of the
    largest cosine; the stored codes need not be of unit length (sec. 3.1; l2-normalized codes: LlamaGen, sec. 2.1).

    Always computed in float32: in bfloat16, one random vector in fifteen finds another code.
    """

    def __init__(self, codebook_size, codebook_dim, commit_weight=0.25, entropy_weight=0.03, entropy_temperature=0.01):
        super().__init__()
        self.commit_weight, self.entropy_weight, self.temperature = commit_weight, entropy_weight, entropy_temperature
        self.codebook = nn.Parameter(F.normalize(torch.rand(codebook_size, codebook_dim) - 0.5, dim=-1))
        # how often each code was chosen in training, until the training script takes the counts and sets them to zero
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.long), persistent=False)

    def lookup(self, ids):
        """ids (B,h,w) -> unit vectors (B,d,h,w)"""
        return F.normalize(F.embedding(ids, self.codebook.float()), dim=-1).permute(0, 3, 1, 2)

    def on_the_sphere(self, z):
        """z (B,d,h,w) of any length -> (z of unit length, its vectors (n,d), the codes (V,d))"""
        z = F.normalize(z.float(), dim=1)
        return z, z.permute(0, 2, 3, 1).flatten(0, 2), F.normalize(self.codebook.float(), dim=-1)

    @torch.no_grad()
    def nearest(self, z):
        """z (B,d,h,w) of any length -> ids (B,h,w)"""
        with torch.autocast(z.device.type, enabled=False):
            _, vectors, codes = self.on_the_sphere(z)
            return search(vectors, codes).view(z.shape[0], *z.shape[2:])

    def forward(self, z):
        """
        z (B,d,h,w) of any length -> (z_q (B,d,h,w) of unit length, ids (B,h,w), losses)

        losses, each with its weight in it: `codebook` moves the codes to the vectors, `commit` the vectors to the
        codes, `entropy` sharpens each choice while it spreads the choices over the codebook.
        """
        with torch.autocast(z.device.type, enabled=False):
            z, vectors, codes = self.on_the_sphere(z)
            entropy, ids = entropy_loss(vectors, codes, self.temperature) if self.entropy_weight else (z.new_zeros(()), search(vectors, codes))
            ids = ids.view(z.shape[0], *z.shape[2:])
            z_q = codes[ids].permute(0, 3, 1, 2)
            losses = {
                "codebook": F.mse_loss(z_q, z.detach()),
                "commit": self.commit_weight * F.mse_loss(z, z_q.detach()),
                "entropy": self.entropy_weight * entropy,
            }
        if self.training:
            self.counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
        return z + (z_q - z).detach(), ids, losses  # straight-through: the value of z_q, the gradient of z


def rows_at_once(codes):
    """How many vectors are compared with all codes (V,d) at a time: the (rows, V) matrix fits a CPU's cache, or takes 256 MB of a GPU."""
    return max(16, (2**18 if codes.device.type == "cpu" else 2**26) // len(codes))


@torch.no_grad()
def search(vectors, codes):
    """vectors (n,d) and codes (V,d) of unit length -> the number of each vector's nearest code (n,)"""
    return torch.cat([(rows @ codes.T).argmax(1) for rows in vectors.split(rows_at_once(codes))])


class Entropy(torch.autograd.Function):
    """
    Mean entropy of the soft assignments p = softmax(-|z - code|^2 / temperature), minus the entropy of their mean: MAGVIT-v2's entropy penalty.
    z (n,d) and codes (V,d) of unit length -> (scalar, each vector's nearest code (n,), which the same pass finds). The (n,V) assignments
    exist a few rows at a time and are computed again for the backward pass: memory does not grow with n.
    """

    @staticmethod
    def chunks(z, codes, temperature):
        """Yields, some rows of z at a time: the rows (r,d), logits (r,V), p = softmax(logits); logsumexp and argmax of the logits, (r,1) each."""
        scaled = codes.T * (2 / temperature)  # |z - code|^2 = 2 - 2 cosine
        for rows in z.split(rows_at_once(codes)):
            logits = rows @ scaled
            p, (top, nearest) = logits.softmax(1), logits.max(1, keepdim=True)
            yield rows, logits, p, top - p.gather(1, nearest).log(), nearest  # logsumexp without a second exp

    @staticmethod
    def forward(ctx, z, codes, temperature):
        entropy, total = 0, 0
        ids = torch.empty(len(z), dtype=torch.long, device=z.device)  # not a list: small tensors between large ones fragment the memory
        for (_, logits, p, log_sum, nearest), found in zip(Entropy.chunks(z, codes, temperature), ids.split(rows_at_once(codes))):
            entropy = entropy + (log_sum.squeeze(1) - torch.linalg.vecdot(p, logits)).sum()
            total = total + p.sum(0)
            found.copy_(nearest.squeeze(1))
        mean = total / len(z)
        ctx.save_for_backward(z, codes, mean)
        ctx.mark_non_differentiable(ids)
        ctx.temperature = temperature
        return entropy / len(z) + (mean * (mean + 1e-5).log()).sum(), ids  # 1e-5 keeps the log finite

    @staticmethod
    def backward(ctx, gradient, _):
        z, codes, mean = ctx.saved_tensors
        mean_term = (mean + 1e-5).log() + mean / (mean + 1e-5)
        gradient_z, gradient_codes = torch.empty_like(z), torch.zeros_like(codes)
        with torch.autocast(z.device.type, enabled=False):  # it may be on where backward() is called
            for (rows, logits, p, log_sum, _), rows_gradient in zip(Entropy.chunks(z, codes, ctx.temperature), gradient_z.split(rows_at_once(codes))):
                slope = logits.neg_().add_(mean_term).add_(log_sum)  # mean_term - log p, the derivative by p but for a constant
                slope.sub_(torch.linalg.vecdot(p, slope)[:, None]).mul_(p)
                torch.mm(slope, codes, out=rows_gradient)
                gradient_codes.addmm_(slope.T, rows)
        scale = gradient * 2 / (ctx.temperature * len(z))
        return gradient_z * scale, gradient_codes * scale, None


entropy_loss = Entropy.apply


def disentangle_loss(quantized):
    """Mean squared cosine between the codes (B,d,h,w) that k sub-codebooks choose for a position, over all pairs; 0 for k=1. Sec. 3.2."""
    unit = [F.normalize(q.float(), dim=1) for q in quantized]
    pairs = [(a * b).sum(1).square().mean() for i, a in enumerate(unit) for b in unit[:i]]
    return sum(pairs) / len(pairs) if pairs else unit[0].new_zeros(())


def representation_loss(predicted, features, first=0):
    """
    InfoNCE on cosines, without temperature: each prediction (B,D) is to find its own among the features (N,D), which
    are the B from number `first` on; with N = B the others of the batch are the negatives. Sec. 3.2, "Representation Learning".
    """
    cosine = F.normalize(predicted.float(), dim=1) @ F.normalize(features.float(), dim=1).T
    return F.cross_entropy(cosine, torch.arange(first, first + len(predicted), device=cosine.device))


# -----------------------------------------------------------------------------
# Tokenizer: the whole


class Branch(nn.Module):
    """
    One sub-codebook: from the shared features (B,C,h,w) to its vectors (B,d,h,w), with its quantizer and, where a teacher supervises it,
    the head that predicts the teacher's features (B,D) from its codes. Sec. 3.2.
    """

    def __init__(self, c_in, config, teacher_width):
        super().__init__()
        width = config.adapter_width if config.adapter_depth else c_in
        self.adapter, self.head = nn.Identity(), None
        if config.adapter_depth:  # no skip around it
            stem = nn.Linear(c_in, width) if c_in != width else nn.Identity()
            self.adapter = ViT(width, config.adapter_depth, config.adapter_heads, config.grid**2, stem)
        self.norm_out, self.conv_out = group_norm(width, config), nn.Conv2d(width, config.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.quantizer = Quantizer(config.codebook_size, config.codebook_dim, config.commit_weight,
                                   config.entropy_weight, config.entropy_temperature)
        if teacher_width:
            stem = nn.Sequential(nn.Linear(config.codebook_dim, teacher_width), nn.ReLU(), nn.Linear(teacher_width, teacher_width))
            self.head = ViT(teacher_width, 3, math.gcd(8, teacher_width), config.grid**2, stem, class_token=True)

    def forward(self, features):
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.adapter(features)))))


class FQGAN(nn.Module):
    """
    The factorized tokenizer: images (B,3,H,W) in [-1,1] <-> ids (B,k,h,w) in [0, codebook_size).
    Along k: the low-level sub-codebook first, then those that a teacher supervises.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        c = config.channels * config.channel_mult[-1]
        widths = (0,) * (config.k - len(config.teacher_widths)) + config.teacher_widths
        self.branches = nn.ModuleList(Branch(c, config, width) for width in widths)
        self.post_quant_conv = nn.Conv2d(config.k * config.codebook_dim, config.z_channels, 1)
        self.decoder = decoder(config)
        self.initialize()

    def initialize(self):
        """
        linear layers                N(0, 0.02), biases 0
        convolutions, stems          PyTorch's own: smaller stems would drown in the positions
        positions, class embeddings  N(0, 1/sqrt(width)), in ViT
        codes                        uniform, then unit length, in Quantizer
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "stem" not in name:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def vectors(self, images):
        """images (B,3,H,W) -> what the k quantizers are given: a list of (B,d,h,w)"""
        size, c = tuple(images.shape[-2:]), self.config
        require(not c.adapter_depth or size == (c.image_size,) * 2,
                f"images are {size[0]}x{size[1]}, the adapters' positions are for {c.image_size}x{c.image_size}")
        require(all(s % c.downsample == 0 for s in size), f"images are {size[0]}x{size[1]}, not divisible by the downsample {c.downsample}")
        features = self.encoder(training_layout(images))
        return [branch(features) for branch in self.branches]

    def paint(self, quantized):
        """list of k (B,d,h,w) -> images (B,3,H,W), contiguous whatever layout the maps have"""
        return self.decoder(self.post_quant_conv(torch.cat(quantized, 1))).contiguous().float()

    @torch.no_grad()
    def encode(self, images):
        """images (B,3,H,W) in [-1,1] -> ids (B,k,h,w) int64"""
        return torch.stack([b.quantizer.nearest(z) for b, z in zip(self.branches, self.vectors(images))], 1)

    @torch.no_grad()
    def decode(self, ids, only=None):
        """
        ids (B,k,h,w) -> images (B,3,h*downsample,w*downsample), about [-1,1], not clamped.
        `only`: indices of the sub-codebooks whose codes are used, the others being left out (set to zero).
        """
        require(ids.ndim == 4 and ids.shape[1] == self.config.k, f"ids have shape {tuple(ids.shape)}, expected (B, {self.config.k}, h, w)")
        codes = [b.quantizer.lookup(ids[:, i]) for i, b in enumerate(self.branches)]
        return self.paint([c if only is None or i in only else torch.zeros_like(c) for i, c in enumerate(codes)])

    def forward(self, images, features=(), first=0):
        """
        images (B,3,H,W) -> (reconstruction (B,3,H,W), losses): scalars with their weights in them, to be summed.
        features: (N,D) of each teacher; the rows from `first` on are those of these images, the rest are other processes' and serve as
        negatives only.
        The perceptual and adversarial terms need other networks and are added by the training script.
        """
        quantized, _, losses = zip(*(b.quantizer(z) for b, z in zip(self.branches, self.vectors(images))))
        losses = {name: sum(each[name] for each in losses) for name in losses[0]}
        losses["disentangle"] = self.config.disentangle_weight * disentangle_loss(quantized)
        if features:
            heads = [branch.head for branch in self.branches if branch.head]
            losses["representation"] = self.config.representation_weight * sum(
                representation_loss(head(q), target, first) for head, q, target in zip(heads, quantized[-len(heads):], features))
        reconstruction = self.paint(quantized)
        losses["reconstruct"] = F.mse_loss(reconstruction, images)
        return reconstruction, losses


# -----------------------------------------------------------------------------
# Networks that only the tokenizer's training needs


class LPIPS(nn.Module):
    """
    Perceptual distance: images (B,3,H,W) in [-1,1] twice -> (B,). VGG-16's features after five of its ReLUs, to unit length
    at each position; the squared difference weighted by channel, averaged over positions. Frozen, and without dropout.

    vgg: torchvision's VGG-16 weights, lin: LPIPS v0.1's; each fetched once when not given. UserError where they cannot be had.
    Source: Zhang et al., https://arxiv.org/abs/1801.03924, eq. 1.
    """

    taps = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # the ReLUs of VGG-16 whose output is taken, and its channels
    vgg_file = ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
    lin_file = ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth", "a78928a0af1e5f0f")

    def __init__(self, vgg=None, lin=None):
        super().__init__()
        self.normalize = torchvision.transforms.Normalize((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        self.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])[:30]
        self.lin = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in self.taps.values())
        read_weights(self.features, fetch(*self.vgg_file, local=vgg), r"features\.(.+)")
        read_weights(self.lin, fetch(*self.lin_file, local=lin), r"lin(\d)\.model\.1\.(weight)")
        self.eval().requires_grad_(False)

    def maps(self, images):
        """Yields the five feature maps, of unit length over the channels."""
        x = training_layout(self.normalize(images))
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                yield F.normalize(x.float(), dim=1, eps=1e-10)

    def forward(self, images, others):
        return sum(((a - b).square() * lin.weight).sum(1).mean((1, 2)) for a, b, lin in zip(self.maps(images), self.maps(others), self.lin))


class Discriminator(nn.Sequential):
    """PatchGAN: images (B,3,H,W) -> (B,1,h,w), a judgement for each overlapping patch of 70 pixels. Isola et al., arXiv 1611.07004, sec. 3.2.2."""

    def __init__(self):
        main = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for c_in, c_out, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            main += [nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, inplace=True)]
        super().__init__(OrderedDict(main=nn.Sequential(*main, nn.Conv2d(512, 1, 4, padding=1))))  # named as in published files
        for module in self.main:
            if not isinstance(module, nn.LeakyReLU):
                nn.init.normal_(module.weight, 0.0 if isinstance(module, nn.Conv2d) else 1.0, 0.02)


def hinge_loss(real, fake):
    """The discriminator's: judgements of real images pushed above 1, of fake ones below -1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


class Teacher(ViT):
    """
    CLIP's or DINOv2's vision transformer, frozen: images (B,3,H,W) in [-1,1] -> its class token (B,width); CLIP's before the
    final norm, DINOv2's after it. Images are resized to its resolution by nearest neighbours, as in the official code.
    """

    def __init__(self, width, depth, patch, grid, clip):
        activation, eps = ((lambda x: x * torch.sigmoid(1.702 * x)), 1e-5) if clip else (F.gelu, 1e-6)
        super().__init__(width, depth, width // 64, grid**2, nn.Identity(), True, activation, eps)
        self.size, self.patch = grid * patch, nn.Conv2d(3, width, patch, patch, bias=not clip)
        if clip:
            self.norm_post = nn.Identity()
            self.normalize = torchvision.transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        else:
            self.norm_pre = nn.Identity()
            self.normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def forward(self, images):
        images = F.interpolate(images, self.size, mode="nearest") / 2 + 0.5
        return super().forward(self.patch(self.normalize(images))).float()


CLIP, DINOV2 = "https://openaipublic.azureedge.net/clip/models", "https://dl.fbaipublicfiles.com/dinov2"
TEACHERS = {  # name: (address, SHA-256 or its beginning)
    "clip_vitb16": (f"{CLIP}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt", "5806e77cd80f8b59"),
    "clip_vitl14": (f"{CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt", "b8cca3fd41ae0c99"),
    "dinov2_vits14": (f"{DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth", "b938bf1bc15cd2ec"),
    "dinov2_vitb14": (f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth", "0b8b82f85de91b42")}


def load_teacher(name, weights=None):
    """
    A frozen module, images (B,3,H,W) in [-1,1] -> features (B,D): one of TEACHERS, from a local file `weights` or else fetched once; or
    any model of one's own, a TorchScript file or a torch.export one (.pt2). Raises UserError where it cannot be had.
    """
    path = fetch(*TEACHERS[name], local=weights) if name in TEACHERS else Path(name)
    require(path.is_file(), f"no teacher {name}: there are {', '.join(TEACHERS)}, or give a TorchScript or .pt2 file")
    with explained(f"{path} does not hold the teacher {name}"), warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        if name not in TEACHERS:
            teacher = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path, map_location="cpu").eval()
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except RuntimeError:  # OpenAI's files are TorchScript archives
                state = torch.jit.load(path, map_location="cpu").state_dict()
            clip = name.startswith("clip")
            state = clip_weights(state) if clip else dinov2_weights(state)
            width, _, patch, _ = state["patch.weight"].shape
            teacher = Teacher(width, count(state, r"blocks\.(\d+)"), patch, math.isqrt(len(state["positions"])), clip).eval()
            teacher.load_state_dict(state)
    for p in teacher.parameters():
        p.requires_grad_(False)
    return teacher


# -----------------------------------------------------------------------------
# GPT


@dataclass
class GPTConfig:
    """The factorized autoregressive model's shape. The defaults are the paper's FAR-Base over FQGAN-Triple at 16x."""

    k: int = 3  # codes at each position; this and the next three follow from tokenizer and data: they have no flags
    vocab_size: int = 16384  # codes in each sub-codebook
    num_classes: int = 1000  # one more, the null class, stands for none
    grid: int = 16  # positions along each side of the image
    n_layer: int = flag(24, "blocks of the trunk")
    n_head: int = flag(16, "attention heads")
    n_embd: int = flag(1024, "width")
    head_layers: int = flag(3, "blocks of the head over the k codes of a position; 0 with k=1 is LlamaGen's GPT")
    dropout: float = flag(0.1, "dropout on the trunk's input and on every branch of a block")
    label_dropout: float = flag(0.1, "share of labels replaced by the null class in training, for guidance")

    def __post_init__(self):
        for name in ("k", "vocab_size", "num_classes", "grid", "n_layer", "n_head", "n_embd"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        require(self.n_embd % (4 * self.n_head) == 0,
                f"n_embd {self.n_embd} must be a multiple of 4 x n_head {self.n_head}: rotary pairs for rows and columns")
        require(self.head_layers >= (self.k > 1), f"head_layers is {self.head_layers}; with k={self.k} it must be at least {int(self.k > 1)}")
        require(self.grid <= 256, f"grid is {self.grid}; it must be at most 256")  # its table is in no checkpoint, to be compared with
        require(self.k <= 1 + self.grid**2, f"k={self.k} codes are more than the {1 + self.grid**2} rotary positions of a {self.grid}x{self.grid} grid")
        for name in ("dropout", "label_dropout"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; it must be in [0, 1)")


class GPT(nn.Module):
    """
    FAR, sec. 3.3: a LLaMA-style trunk over positions, then for each position a small causal transformer, the head,
    over its k codes. The trunk's input at a position is the projected concatenation of the position before's k codes; at the first, the class.
    """

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.n_embd
        norm = functools.partial(nn.RMSNorm, eps=1e-5)
        self.class_embedding = nn.Embedding(config.num_classes + 1, D)  # the last row is the null class
        self.token_embeddings = nn.ModuleList(nn.Embedding(config.vocab_size, D) for _ in range(config.k))
        self.aggregate = nn.Linear(config.k * D, D) if config.k > 1 else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.trunk, self.head = (
            nn.ModuleList(Block(D, Attention(D, config.n_head, bias=False, causal=True), SwiGLU(D), norm, config.dropout) for _ in range(n))
            for n in (config.n_layer, config.head_layers))
        self.norm = norm(D)
        self.outputs = nn.ModuleList(nn.Linear(D, config.vocab_size, bias=False) for _ in range(config.k))
        self.register_buffer("rotary", rotary_table(config.grid, D // config.n_head), persistent=False)
        self.initialize()

    def initialize(self):
        """
        linear layers and embeddings  N(0, 0.02)        outputs  0, so that the loss starts at ln(vocab_size)
        biases                        0                 norms    1
        """
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.zeros_(p) if name.startswith("outputs") else nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, labels):
        """
        ids (B,k,h,w), labels (B,) -> (logits (B, k, h*w, vocab_size) float32, loss: mean cross-entropy of all k codes).
        Teacher-forced: the logits of a code depend on the codes before it alone. Eq. 6 and 7.
        """
        c, ids = self.config, ids.flatten(2)
        B, k, P = ids.shape
        if self.training and c.label_dropout:
            labels = labels.masked_fill(torch.rand(B, device=labels.device) < c.label_dropout, c.num_classes)
        embedded = [table(ids[:, i]) for i, table in enumerate(self.token_embeddings)]  # k of (B, P, D)
        x = torch.cat([self.class_embedding(labels)[:, None], self.aggregate(torch.cat(embedded, -1))[:, :-1]], 1)
        x = self.dropout(x)
        for block in self.trunk:
            x = block(x, rotary=self.rotary[:, :P])
        x = torch.stack([x, *embedded[:-1]], 2).flatten(0, 1)  # (B*P, k, D)
        for block in self.head:  # rows 0 to k-1 of the same table, as in the official code: row 0, all zeros, falls on the trunk's output
            x = block(x, rotary=self.rotary[:, :k])
        x = self.norm(x).view(B, P, k, -1)
        logits = torch.stack([output(x[:, :, i]) for i, output in enumerate(self.outputs)], 1).float()  # (B, k, P, V)
        return logits, F.cross_entropy(logits.flatten(0, 2), ids.flatten())

    @torch.no_grad()
    def generate(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """
        labels (B,) -> ids (B,k,h,w), sampled code by code with cached keys and values.

        Each knob is one number, or k of them. cfg_scale above 1 guides: logits = null + scale * (class - null), for
        which every sample runs twice; temperature 0 takes the likeliest code; top_k 0 and top_p 1 leave all codes in.
        generator: a torch.Generator on the model's device. Raises UserError for a label or a knob out of range.
        """
        c, B = self.config, len(labels)
        low, high = (int(labels.min()), int(labels.max())) if B else (0, 0)
        require(0 <= low <= high <= c.num_classes, f"labels run from {low} to {high}, expected 0 to {c.num_classes - 1}, or {c.num_classes} for none")
        knobs = {"cfg_scale": cfg_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        for name, value in knobs.items():
            knobs[name] = list(value) if isinstance(value, (list, tuple)) else [value] * c.k
            require(len(knobs[name]) == c.k, f"{name} has {len(knobs[name])} values; give one, or {c.k}, one for each code of a position")
            require(all(0 <= v < 1e30 for v in knobs[name]), f"{name} is {value}; it must be a finite number of at least 0")
        require(0 < min(knobs["top_p"]) <= max(knobs["top_p"]) <= 1, f"top_p is {top_p}; it must be in (0, 1]")
        guided = max(knobs["cfg_scale"]) > 1
        ids = labels.new_empty(B, c.k, c.grid**2)
        labels = torch.cat([labels, torch.full_like(labels, c.num_classes)]) if guided else labels
        x = self.class_embedding(labels)[:, None]  # (B, 1, D), guided (2B, 1, D); and so is every x below
        rotary = rotary_table(c.grid, c.n_embd // c.n_head).to(x.device)  # float32; self.rotary is cast with the weights
        caches = {block: x.new_empty(2, len(x), c.n_head, length, c.n_embd // c.n_head)
                  for blocks, length in ((self.trunk, c.grid**2), (self.head, c.k)) for block in blocks}
        with sampling(self, len(x)):
            for p in range(c.grid**2):
                for block in self.trunk:
                    x = block(x, rotary=rotary[:, p:p + 1], cache=caches[block], at=p)
                embedded = []
                for i in range(c.k):
                    for block in self.head:
                        x = block(x, rotary=rotary[:, i:i + 1], cache=caches[block], at=i)
                    logits = self.outputs[i](self.norm(x))[:, 0].float()
                    if guided:
                        logits, null = logits.chunk(2)
                        if knobs["cfg_scale"][i] > 1:
                            logits = null + knobs["cfg_scale"][i] * (logits - null)
                    ids[:, i, p] = sample(logits, knobs["temperature"][i], knobs["top_k"][i], knobs["top_p"][i], generator)
                    x = self.token_embeddings[i](ids[:, i, p].repeat(1 + guided))[:, None]
                    embedded.append(x)
                x = self.aggregate(torch.cat(embedded, -1))
        return ids.unflatten(2, (c.grid, c.grid))


@contextlib.contextmanager
def sampling(model, rows):
    """
    Eval mode while sampling. On a CPU, linear layers then use copies of their weights packed in oneDNN's own order, for about `rows` inputs at a
    time: with so few the time goes into reading weights, and packed ones are read faster, up to twice in float32.
    """
    was_training, weight = model.training, model.trunk[0].attn.qkv.weight
    packable = (rows and type(weight) is nn.Parameter and weight.device.type == "cpu"  # another type where --fsdp has sharded it
                and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
                and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    layers = [m for m in model.modules() if packable and isinstance(m, nn.Linear) and "forward" not in vars(m)]  # else packed by the caller
    try:
        model.eval()
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            layer.forward = functools.partial(torch.ops.mkldnn._linear_pointwise, W=weight, B=layer.bias, attr="none", scalars=[], algorithm="")
        yield
    finally:
        model.train(was_training)
        for layer in layers:
            vars(layer).pop("forward", None)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B, V) -> one id each (B,). First temperature, then top-k, then top-p, which keeps the id that crosses p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / max(temperature, 1e-5)  # less would overflow
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(int(top_k)).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p > top_p, -math.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# -----------------------------------------------------------------------------
# Files: our checkpoints, published weights


def load_tokenizer(path, device="cpu"):
    """A trained FQGAN in eval mode: ours, or a published one of FQGAN's or LlamaGen's. UserError where the file holds none."""
    return build(FQGAN, FQGANConfig, load_checkpoint(path, "tokenizer"), path, device)


def load_gpt(path, device="cpu", grid=None):
    """A trained GPT in eval mode: ours, FAR's or LlamaGen's (class-conditional). grid: positions a side, for files that do not say theirs (else 16)."""
    return build(GPT, GPTConfig, load_checkpoint(path, "gpt"), path, device, grid=grid or 16)


def load_checkpoint(path, kind):
    """
    The dict that train_tokenizer.save_checkpoint wrote; of a published file, its `config` and `model` under our names.
    Raises UserError for a file that is missing, damaged or not of `kind`.
    """
    require(Path(path).is_file(), f"no {kind} checkpoint at {path}: `python train_{kind}.py` makes one")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold one, of plain values
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own text is pages long, and advises to load without weights_only
        raise UserError(f"{path} cannot be read as a checkpoint: it is damaged, cut off, or something else ({type(error).__name__})") from None
    contents = contents if isinstance(contents, dict) else {}
    if "kind" not in contents:
        contents = read_published(contents, path)
    found = contents.get("kind")
    require(found == kind, f"{path} is not a {kind} checkpoint" + (f" but a {found}'s" if isinstance(found, str) else ""))
    plain = (int, float, str, list, tuple)  # a tensor may be without end
    for part in (contents, contents.get("tokenizer", contents)):  # a GPT's file holds its tokenizer
        config = part.get("config") if isinstance(part, dict) else None
        require(isinstance(config, dict) and all(isinstance(value, plain) for value in config.values()),
                f"{path}: weights and config do not fit this version (it has no config of plain values)")
    return contents


def build(model_class, config_class, state, path, device="cpu", **defaults):
    """The model that a checkpoint's `config` (over `defaults`) and `ema` or `model` describe, in eval mode; `trained_on` is its run's --data."""
    with explained(f"{path}: weights and config do not fit this version"):
        config, weights = config_class(**defaults | state["config"]), state.get("ema") or state["model"]
        blocks = sum(getattr(config, name, 0) for name in ("k", "n_layer", "head_layers", "adapter_depth", "res_blocks"))
        require(blocks <= len(weights), f"{path}: its config describes more blocks than it has weights")
        with torch.device("meta"):  # a file with absurd sizes is refused before they take memory
            model_class(config).load_state_dict(weights, assign=True)
        model = model_class(config)
        model.load_state_dict(weights)
        model.trained_on = state.get("settings", {}).get("data")
    return model.to(device).eval()


def fetch(url, digest, local=None):
    """
    The path of a published file: `local` if given; else its copy in torch.hub's cache, downloaded if it is not there whole.
    digest: the file's SHA-256 or the beginning of it. Raises UserError where the file cannot be had.
    """
    if local:
        require(Path(local).is_file(), f"no file at {local}; what belongs there is {url}")
        return Path(local)
    path = Path(torch.hub.get_dir()) / "checkpoints" / "-".join(url.split("/")[-2:])
    if path.is_file():
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest().startswith(digest):
                return path
    with explained(f"{url} cannot be downloaded", f"; put it at {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest)  # under another name until it is whole and its digest is this one
    return path


def read_weights(module, path, names="(.+)"):
    """Loads a state dict from a file into `module`: the tensors whose whole name fits the pattern `names`, called by its groups."""
    with explained(f"{path} does not hold the weights that belong there"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        matches = ((re.fullmatch(names, name), tensor) for name, tensor in state.items())
        module.load_state_dict({".".join(match.groups()): tensor for match, tensor in matches if match})


# Names in the files of FQGAN, FAR, LlamaGen and CLIP, and ours. Pattern: replacement, applied one after the other.

BLOCK_NAMES = {r"ln_(\d)": r"norm\1", r"attn\.in_proj_": "attn.qkv.", r"attn\.out_proj": "attn.proj", r"mlp\.c_fc": "mlp.fc1", r"mlp\.c_proj": "mlp.fc2",
               "ln_p": "norm_p", "positional_embedding": "positions", r"transformer\.(resblocks\.)?": "blocks."}
TOKENIZER_NAMES = {r"conv_blocks\.": "levels.", "nin_shortcut": "shortcut", r"(down|up)sample\.": "resample.", r"proj_out\.": "attn.proj."}
GPT_NAMES = {
    r"^tok_embeddings(?:_(\d))?\.": lambda m: f"token_embeddings.{int(m[1] or 1) - 1}.", r"^output(?:_(\d))?\.": lambda m: f"outputs.{int(m[1] or 1) - 1}.",
    r"^cls_embedding\.embedding_table": "class_embedding", "^aggregation_layer": "aggregate", r"^layers\.": "trunk.", r"^ar_head\.": "head.",
    r"attention\.wqkv": "attn.qkv", r"attention\.wo": "attn.proj", r"feed_forward\.": "mlp.", "attention_norm": "norm1", "ffn_norm": "norm2"}


def rename(state, names):
    for pattern, replacement in names.items():
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state


def count(state, pattern):
    """One more than the highest number that a name of the state dict has where the pattern says; 0 for none."""
    return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in state) if m), default=-1)


def read_published(contents, path):
    """
    {"kind", "config", "model"} of a file as FQGAN's or LlamaGen's authors publish it, told by its keys; {} of any other.
    The moving average of the weights is taken where there is one. Raises UserError for a file that is nearly one.
    """
    state = next((contents[n] for n in ("ema", "model", "module", "state_dict") if isinstance(contents.get(n), dict) and contents[n]), contents)
    with explained(f"{path} looks like a published checkpoint, but cannot be used"):
        state = {n: t for n, t in state.items() if isinstance(t, torch.Tensor) and not re.search("codebook_used|freqs_cis|kv_cache|causal_mask", n)}
        require("cls_embedding.cap_proj.fc1.weight" not in state, f"{path} is a text-conditional GPT; only class-conditional ones are supported")
        if "encoder.conv_in.weight" in state and "post_quant_conv.weight" in state:
            return published_tokenizer(state)
        if "cls_embedding.embedding_table.weight" in state:
            return published_gpt(state, contents.get("args"))
    return {}


def published_tokenizer(state):
    names = TOKENIZER_NAMES | BLOCK_NAMES
    parts = [("(?:_vis)?", "visual_head", None),  # of each sub-codebook, whatever k: how its names end, its adapter, its feature head
             ("_sem(?:_mid)?", "semantic_head(?:_mid)?", "(?:feat_pred_head|mid_sem_feat_pred)"),
             ("_sem_high", "semantic_head_high", "high_sem_feat_pred")]
    for i, (ending, adapter, head) in enumerate(parts):
        names |= {rf"^encoder\.{adapter}\.0\.": f"branches.{i}.adapter.", rf"^encoder\.(norm|conv)_out{ending}\.": rf"branches.{i}.\1_out.",
                  rf"^quant_conv{ending}\.": f"branches.{i}.quant_conv.", rf"^quantize{ending}\.embedding\.weight": f"branches.{i}.quantizer.codebook"}
        if head:
            names |= {rf"^{head}\.upscale\.": f"branches.{i}.head.stem.", rf"^{head}\.": f"branches.{i}.head."}
    state = rename(state, names)
    for name in [n for n in state if re.search(r"\.q\.(weight|bias)$", n)]:  # three 1x1 convolutions are one linear layer
        place, kind = name.split(".q.")
        state[f"{place}.attn.qkv.{kind}"] = torch.cat([state.pop(f"{place}.{part}.{kind}") for part in "qkv"])
    state = {n: t.flatten(1) if t.ndim == 4 and ".attn." in n else t for n, t in state.items()}

    k, levels, channels = count(state, r"branches\.(\d+)"), count(state, r"encoder\.levels\.(\d+)"), len(state["encoder.conv_in.weight"])
    config = dict(
        k=k, downsample=2 ** (levels - 1), channels=channels, z_channels=len(state["post_quant_conv.weight"]),
        res_blocks=count(state, r"encoder\.levels\.0\.res\.(\d+)"),
        channel_mult=tuple(len(state[f"encoder.levels.{i}.res.0.conv1.weight"]) // channels for i in range(levels)),
        adapter_depth=count(state, r"branches\.0\.adapter\.blocks\.(\d+)"),
        teacher_widths=tuple(state[n].shape[1] for n in (f"branches.{i}.head.positions" for i in range(k)) if n in state))
    config["codebook_size"], config["codebook_dim"] = state["branches.0.quantizer.codebook"].shape
    if config["adapter_depth"]:
        positions, config["adapter_width"] = state["branches.0.adapter.positions"].shape
        config["image_size"] = math.isqrt(positions) * config["downsample"]
    return {"kind": "tokenizer", "config": config, "model": state}


def published_gpt(state, args):
    state = rename(state, GPT_NAMES)
    classes, width = state["class_embedding.weight"].shape
    config = dict(k=count(state, r"token_embeddings\.(\d+)"), vocab_size=len(state["outputs.0.weight"]), num_classes=classes - 1, n_embd=width,
                  n_layer=count(state, r"trunk\.(\d+)"), head_layers=count(state, r"head\.(\d+)"),
                  n_head=32 if width == 3200 else width // 64)  # LlamaGen-3B's heads have 100 numbers, all others' 64
    if hasattr(args, "downsample_size"):
        config["grid"] = int(args.image_size) // int(args.downsample_size)
    return {"kind": "gpt", "config": config, "model": state}


def clip_weights(state):
    state = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.") and n != "visual.proj" and "ln_post" not in n}
    state["class_embedding"] = state["class_embedding"][None]
    return rename(state, {"^conv1": "patch"} | BLOCK_NAMES)


def dinov2_weights(state):
    state = rename(state, {r"patch_embed\.proj": "patch", r"^norm\.": "norm_post.", r"ls1\.gamma": "attn.proj.scale", r"ls2\.gamma": "mlp.fc2.scale"})
    for name in [n for n in state if n.endswith(".scale")]:  # of a branch's output: as well put into the weights of its last layer
        layer, scale = name.removesuffix(".scale"), state.pop(name)
        state |= {f"{layer}.weight": scale[:, None] * state[f"{layer}.weight"], f"{layer}.bias": scale * state[f"{layer}.bias"]}
    first, table = state.pop("pos_embed")[0].split([1, 37**2])
    table = table.T.unflatten(1, (37, 37))[None]  # to 16x16, by a scale that is 0.1 off, as DINOv2's own code does it
    table = F.interpolate(table, scale_factor=(16 + 0.1) / 37, mode="bicubic")[0].flatten(1).T
    del state["mask_token"]
    return state | {"positions": torch.cat([first, table]), "class_embedding": state.pop("cls_token")[0]}
