"""
FQGAN in one file: a factorized visual tokenizer, and the autoregressive model that generates its tokens.

A convolutional encoder feeds k transformer adapters. Each has a codebook of its own, and the decoder rebuilds
the image from all k codes of a position. A GPT learns to generate the codes. Read the file in its order; the
last section, "Running", is what the scripts share, and can be left out.

Sources:
1) FQGAN: Bai et al., Factorized Visual Tokenization and Generation, https://arxiv.org/abs/2411.16681
   section 3.2: factorized quantization, disentanglement, representation learning; section 3.3: the GPT and its head
2) VQGAN: Esser et al., Taming Transformers, https://arxiv.org/abs/2012.09841: encoder, decoder, adversarial loss
3) LlamaGen: Sun et al., https://arxiv.org/abs/2406.06525: l2-normalized codes, the GPT's trunk, 2-D rotary positions
4) MAGVIT-v2: Yu et al., https://arxiv.org/abs/2310.05737: the entropy loss
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import inspect
import itertools
import math
import os
import random
import re
import signal
import sys
import warnings
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torchvision.transforms import functional as TF

# -----------------------------------------------------------------------------
# Errors

class UserError(ValueError):
    """A mistake that the user can correct. The scripts print its message as one line and exit with 1."""

def check(condition, message):
    if not condition:
        raise UserError(message)

def one_line(error):
    """The kind of an exception and the beginning of its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

# -----------------------------------------------------------------------------
# Tokenizer: config

def flag(default, help):
    """A config field whose explanation is also the help text of its command-line flag."""
    return field(default=default, metadata={"help": help})

CHANNEL_MULTS = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 1, 2, 2, 4)}

@dataclass
class FQGANConfig:
    """The tokenizer's shape and loss weights. The defaults are the paper's FQGAN-Triple at 16x."""

    k: int = flag(3, "sub-codebooks: 2 is FQGAN-Dual, 3 FQGAN-Triple; 1 with --adapter-depth 0 is VQGAN")
    codebook_size: int = flag(16384, "codes in each sub-codebook")
    codebook_dim: int = flag(8, "dimension of a code")
    image_size: int = flag(256, "side of the square images, in pixels")
    downsample: int = flag(16, "pixels that a code stands for along each side; a power of two")
    patch_size: int = flag(1, "side of the patches of pixels that are gathered into channels first")
    channels: int = flag(128, "channels of the convolutions at the finest stage")
    channel_mult: tuple[int, ...] = flag((), "channels of each stage, times --channels; empty: as published")
    res_blocks: int = flag(2, "residual blocks in a stage of the encoder; the decoder has one more")
    norm_groups: int = flag(32, "groups of GroupNorm; with few channels in each, an image's mean color is lost")
    z_channels: int = flag(256, "channels between the convolutions and the quantizers")
    adapter_depth: int = flag(6, "transformer blocks in each sub-codebook's adapter; 0 for no adapters")
    adapter_width: int = flag(512, "width of the adapters")
    adapter_heads: int = flag(8, "attention heads of the adapters")
    recompute: bool = flag(False, "compute norms and activations again in the backward pass, to save memory")
    commit_weight: float = flag(0.25, "weight of the commitment loss")
    entropy_weight: float = flag(0.03, "weight of the entropy loss")
    entropy_final: float = flag(1.0, "share of --entropy-weight that its exponential decay ends at")
    entropy_temperature: float = flag(0.01, "softmax temperature of the entropy loss")
    disentangle_weight: float = flag(0.1, "weight of the disentanglement loss")
    decorrelate_weight: float = flag(0.0, "weight of the decorrelation loss, which is not the paper's")
    representation_weight: float = flag(0.5, "weight of the representation loss of each teacher")
    perceptual: str = flag("lpips", "features that the perceptual loss compares: lpips (VGG-16's), random")
    perceptual_weight: float = flag(1.0, "weight of the perceptual loss; 0 for none")
    disc_weight: float = flag(0.5, "weight of the adversarial losses; 0 for no discriminator")
    disc_start: int = flag(20_000, "step from which the adversarial losses are on")
    teacher_widths: tuple[int, ...] = ()  # of the features that supervise the last sub-codebooks

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            low = 0 if f.name in ("adapter_depth", "disc_start") else 1
            check(f.type is not int or value >= low, f"{f.name} is {value}; it must be at least {low}")
        check(self.perceptual in ("lpips", "random"), f"perceptual is {self.perceptual!r}; choose lpips or random")
        for name in ("entropy_temperature", "entropy_final"):
            check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        check(self.downsample.bit_count() == 1 < self.downsample, f"downsample {self.downsample} is not a power of two")
        check(self.downsample % self.patch_size == 0,
              f"downsample {self.downsample} must be a multiple of patch_size {self.patch_size}")
        divisible = max(1, self.image_size // self.downsample) * self.downsample
        check(self.image_size == divisible,
              f"image_size {self.image_size} is not divisible by downsample {self.downsample}: {divisible} is")

        factor = self.downsample // self.patch_size
        num_stages = factor.bit_length()
        self.channel_mult = tuple(self.channel_mult) or CHANNEL_MULTS.get(factor, ())
        self.teacher_widths = tuple(self.teacher_widths)
        num_given = len(self.channel_mult)
        check(num_given == num_stages,
              f"channel_mult {self.channel_mult} names {num_given} stages; there are {num_stages}")
        check(min(self.channel_mult) > 0, f"channel_mult is {self.channel_mult}; each must be above 0")
        check(self.channels % self.norm_groups == 0,
              f"channels {self.channels} must be a multiple of norm_groups {self.norm_groups}")
        divisor = math.lcm(self.norm_groups, self.adapter_heads)
        check(self.adapter_depth == 0 or self.adapter_width % divisor == 0,
              f"adapter_width {self.adapter_width} must be a multiple of norm_groups {self.norm_groups} "
              f"and of adapter_heads {self.adapter_heads}")
        num_teachers = len(self.teacher_widths)
        check(num_teachers <= self.k, f"{num_teachers} teachers are more than k={self.k} sub-codebooks")
        check(self.k > 1 or not self.decorrelate_weight, "decorrelate_weight needs two sub-codebooks or more: k is 1")

    @property
    def grid(self):
        return self.image_size // self.downsample

# -----------------------------------------------------------------------------
# Tokenizer: quantizers and their losses

class Quantizer(nn.Module):
    """
    One sub-codebook (section 3.1), l2-normalized as in LlamaGen: vectors and codes are compared at unit length, where
    the nearest code has the largest cosine. Always in float32: in bfloat16 one random vector in fifteen finds another
    code. A quantizer of another kind needs the methods below, `last_ids`, which training counts, and `codebook` (V,d)
    to load published files.
    """

    def __init__(self, codebook_size, codebook_dim, commit_weight=0.25, entropy_weight=0.03, entropy_temperature=0.01):
        super().__init__()
        self.commit_weight = commit_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.codebook = nn.Parameter(F.normalize(torch.rand(codebook_size, codebook_dim) - 0.5, dim=-1))
        self.last_ids = None

    def lookup(self, ids):
        """ids (B,h,w) -> codes of unit length (B,d,h,w)"""
        codes = F.embedding(ids, self.codebook.float())
        return F.normalize(codes, dim=-1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def nearest(self, z):
        """z (B,d,h,w) of any length -> ids (B,h,w)"""
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)
            codes = F.normalize(self.codebook.float(), dim=-1)
            ids = nearest_codes(to_vectors(z), codes)
        return ids.view(len(z), *z.shape[2:])

    def forward(self, z):
        """z (B,d,h,w) of any length -> (z_q (B,d,h,w) of unit length, ids (B,h,w), dict of weighted losses)"""
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)
            codes = F.normalize(self.codebook.float(), dim=-1)

            # nearest code
            if self.entropy_weight:
                entropy, ids = entropy_loss(to_vectors(z), codes, self.entropy_temperature)
            else:
                entropy = z.new_zeros(())
                ids = nearest_codes(to_vectors(z), codes)
            ids = ids.view(len(z), *z.shape[2:])
            z_q = codes[ids].permute(0, 3, 1, 2)

            losses = {
                "codebook": F.mse_loss(z_q, z.detach()),  # moves the codes to the vectors
                "commit": self.commit_weight * F.mse_loss(z, z_q.detach()),  # the vectors to the codes
                "entropy": self.entropy_weight * entropy,  # sharpens and spreads the choices
            }
        self.last_ids = ids
        z_q = z + (z_q - z).detach()  # straight-through: the value of z_q, the gradient of z
        return z_q, ids, losses

def to_vectors(z):
    """(B,d,h,w) -> (B*h*w, d)"""
    return z.permute(0, 2, 3, 1).flatten(0, 2)

def chunk_size(codes):
    """How many vectors are compared with all codes (V,d) at a time."""
    entries = 2**18 if codes.device.type == "cpu" else 2**26  # a CPU's cache, 256 MB of a GPU
    return max(16, entries // len(codes))

@torch.no_grad()
def nearest_codes(vectors, codes):
    """vectors (n,d) and codes (V,d), all of unit length -> the number of each vector's nearest code (n,)"""
    chunks = vectors.split(chunk_size(codes))
    return torch.cat([(chunk @ codes.T).argmax(1) for chunk in chunks])

class EntropyLoss(torch.autograd.Function):
    """
    MAGVIT-v2's entropy penalty: mean entropy of the soft assignments, minus the entropy of their mean.
    z (n,d) and codes (V,d), all of unit length -> (loss, each vector's nearest code (n,), which the same pass finds).

    In plain PyTorch, with |z - c|^2 = 2 - 2 z.c and the constant left out:

        s = 2 / temperature * z @ codes.T                     # (n, V)
        p = s.softmax(1)
        m = p.mean(0)                                         # (V,)
        loss = -(p * p.log()).sum(1).mean() + (m * (m + 1e-5).log()).sum()

    Here the (n, V) matrices exist a few rows at a time and are computed again in the backward pass, so that memory does
    not grow with n. The derivative, written out:

        loss by p_ij   (-log p_ij - 1 + log(m_j + 1e-5) + m_j / (m_j + 1e-5)) / n
                       where log p_ij = s_ij - logsumexp(s_i)
        call it        g_ij / n, without the -1: what is constant along j has no effect on the next line
        loss by s_i    p_i * (g_i - p_i.g_i) / n              # the softmax's Jacobian
        loss by z      2 / temperature * (loss by s) @ codes
        loss by codes  2 / temperature * (loss by s).T @ z
    """

    @staticmethod
    def assignments(z, codes, temperature):
        """Yields a slice of r rows of z, s (r,V), p (r,V), logsumexp(s) (r,1), nearest code (r,1)."""
        scaled_codes = codes.T * (2 / temperature)
        size = chunk_size(codes)
        for first in range(0, len(z), size):
            rows = slice(first, first + size)
            s = z[rows] @ scaled_codes
            p = s.softmax(1)
            top, nearest = s.max(1, keepdim=True)
            logsumexp = top - p.gather(1, nearest).log()  # without a second exp
            yield rows, s, p, logsumexp, nearest

    @staticmethod
    def forward(ctx, z, codes, temperature):
        entropy = 0
        p_sum = 0
        ids = torch.empty(len(z), dtype=torch.long, device=z.device)  # a list would fragment the memory
        for rows, s, p, logsumexp, nearest in EntropyLoss.assignments(z, codes, temperature):
            entropy = entropy + (logsumexp.squeeze(1) - torch.linalg.vecdot(p, s)).sum()  # -(p * log p).sum()
            p_sum = p_sum + p.sum(0)
            ids[rows] = nearest.squeeze(1)
        m = p_sum / len(z)
        ctx.save_for_backward(z, codes, m)
        ctx.mark_non_differentiable(ids)
        ctx.temperature = temperature
        return entropy / len(z) + (m * (m + 1e-5).log()).sum(), ids

    @staticmethod
    def backward(ctx, grad, _):
        z, codes, m = ctx.saved_tensors
        m_term = (m + 1e-5).log() + m / (m + 1e-5)
        grad_z = torch.empty_like(z)
        grad_codes = torch.zeros_like(codes)
        with torch.autocast(z.device.type, enabled=False):  # it may be on where backward() is called
            for rows, s, p, logsumexp, _ in EntropyLoss.assignments(z, codes, ctx.temperature):
                g = s.neg_().add_(m_term).add_(logsumexp)
                grad_s = g.sub_(torch.linalg.vecdot(p, g)[:, None]).mul_(p)
                torch.mm(grad_s, codes, out=grad_z[rows])
                grad_codes.addmm_(grad_s.T, z[rows])
        scale = grad * 2 / (ctx.temperature * len(z))
        return grad_z * scale, grad_codes * scale, None

entropy_loss = EntropyLoss.apply

def disentangle_loss(quantized):
    """k codes (B,d,h,w) -> mean squared cosine over all pairs of sub-codebooks; 0 for k=1. Section 3.2."""
    unit = [F.normalize(z_q.float(), dim=1) for z_q in quantized]
    losses = [(a * b).sum(1).square().mean() for a, b in itertools.combinations(unit, 2)]
    return torch.stack(losses).mean() if losses else unit[0].new_zeros(())

def decorrelation_loss(quantized):
    """
    k codes (B,d,h,w), k > 1 -> how much of one sub-codebook's code a linear map tells by another's, 0 to 1, mean over
    pairs: linear CKA (https://arxiv.org/abs/1905.00414). Not the paper's, whose orthogonal codes may still repeat each
    other: a code may always come with the same orthogonal one.
    """
    losses = []
    with torch.autocast(quantized[0].device.type, enabled=False):
        vectors = [to_vectors(z_q.float()) for z_q in quantized]
        centered = [v - v.mean(0) for v in vectors]
        for a, b in itertools.combinations(centered, 2):
            scale = (a.T @ a).norm() * (b.T @ b).norm()
            losses.append((a.T @ b).square().sum() / (scale + 1e-6))
    return torch.stack(losses).mean()

def representation_loss(predicted, features):
    """
    InfoNCE: each prediction (B,D) is to find its own among a teacher's features (B,D), the other images of the
    micro-batch being the negatives. Cosines without temperature, as in the official code. Section 3.2.
    """
    cosine = F.normalize(predicted.float(), dim=1) @ F.normalize(features.float(), dim=1).T
    return F.cross_entropy(cosine, torch.arange(len(cosine), device=cosine.device))

# -----------------------------------------------------------------------------
# Transformer blocks, of the adapters and the GPT

def rotary_table(grid, head_dim):
    """
    (2, 1 + grid^2, head_dim): cosines, and sines as (-sin, sin) for each pair, of the class token and the
    grid, row by row. The first half of the pairs turns by the row, the second by the column. The class
    token's entries are zeros, as in the official code: every position attends to it with a score of 0.
    """
    frequency = 10000.0 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))  # (head_dim/4)
    angle = torch.arange(grid)[:, None] * frequency  # (grid, head_dim/4)
    rows = angle.repeat_interleave(grid, 0)
    columns = angle.repeat(grid, 1)
    angle = torch.cat([rows, columns], 1)  # (grid^2, head_dim/2)
    cos = angle.cos().repeat_interleave(2, 1)
    sin = torch.stack([-angle.sin(), angle.sin()], 2).flatten(1)
    return F.pad(torch.stack([cos, sin]), (0, 0, 1, 0))

def rotate(x, table):
    """Turns the pairs (a, b) of x (..., T, e) into (a cos - b sin, b cos + a sin), by a table (2, T, e)."""
    cos, sin = table
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (a, b) -> (b, a)
    return x * cos + swapped * sin

def to_channels_last(x):
    """In training on CPUs, a map with its channels last in memory: convolutions are up to a quarter faster."""
    # not in encoding: GroupNorm loses digits in this layout, and images of one color find other codes
    if x.device.type == "cpu" and torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()

class Attention(nn.Module):
    """Multi-head self-attention: (B, T, C) -> (B, T, C). In the GPT it is causal, rotary and cached."""

    def __init__(self, width, heads, bias=True, causal=False):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.proj = nn.Linear(width, width, bias)

    def forward(self, x, rotary=None, cache=None, position=0):
        """cache (2, B, heads, length, e): keys and values of `position` tokens; x, one token, adds its own."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, e)
        q, k = qkv[:2] if rotary is None else rotate(qkv[:2], rotary)
        v = qkv[2]
        if cache is not None:
            cache[0, :, :, position] = k[:, :, 0]
            cache[1, :, :, position] = v[:, :, 0]
            k, v = cache[:, :, :, :position + 1]
        dtype = v.dtype
        if x.device.type == "cpu" and torch.is_grad_enabled():
            # under bfloat16 the backward pass of PyTorch's CPU kernel takes several times as long
            dtype = torch.promote_types(dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            is_causal = self.causal and cache is None
            y = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=is_causal)
        y = y.to(v.dtype).transpose(1, 2).reshape(B, T, C)
        return self.proj(y)

class MLP(nn.Module):
    def __init__(self, width, activation=F.gelu):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.activation = activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))

class SwiGLU(nn.Module):
    def __init__(self, width, recompute=False):
        super().__init__()
        self.recompute = recompute
        hidden = 256 * math.ceil(int(8 * width / 3) / 256)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        if self.recompute and torch.is_grad_enabled():  # keep two of the four hidden maps
            return checkpoint(self.gated, self.w1(x), self.w3(x), use_reentrant=False, preserve_rng_state=False)
        return self.gated(self.w1(x), self.w3(x))

    def gated(self, gate, h):
        return self.w2(F.silu(gate) * h)

class Block(nn.Module):
    """A pre-norm transformer block; dropout acts on the outputs of attention and MLP."""

    def __init__(self, width, attn, mlp, norm=nn.LayerNorm, dropout=0.0):
        super().__init__()
        self.norm1 = norm(width)
        self.attn = attn
        self.norm2 = norm(width)
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, **attention_options):
        x = x + self.dropout(self.attn(self.norm1(x), **attention_options))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x

class ViT(nn.Module):
    """A vision transformer: a map (B,C,h,w) -> (B,width,h,w), or the output of its class token (B,width)."""

    def __init__(self, width, depth, heads, num_positions, proj_in, class_token=False, activation=F.gelu, eps=1e-5):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=eps)
        scale = width**-0.5
        self.proj_in = proj_in
        self.class_embedding = nn.Parameter(scale * torch.randn(1, width)) if class_token else None
        self.pos_embed = nn.Parameter(scale * torch.randn(num_positions + class_token, width))
        self.norm_pre = norm(width)
        self.blocks = nn.Sequential()
        for _ in range(depth):
            attn = Attention(width, heads)
            nn.init.xavier_uniform_(attn.qkv.weight)  # as nn.MultiheadAttention, which the official code uses
            nn.init.zeros_(attn.qkv.bias)
            nn.init.zeros_(attn.proj.bias)
            self.blocks.append(Block(width, attn, MLP(width, activation), norm))
        self.norm_post = norm(width)

    def forward(self, x):
        h, w = x.shape[2:]
        x = self.proj_in(x.flatten(2).transpose(1, 2))  # (B, h*w, width), row by row
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.blocks(self.norm_pre(x + self.pos_embed))
        x = self.norm_post(x)
        if self.class_embedding is not None:
            return x[:, 0]
        return to_channels_last(x.transpose(1, 2).unflatten(2, (h, w)))

# -----------------------------------------------------------------------------
# Tokenizer: the convolutional encoder and decoder of VQGAN

def group_norm(channels, config):
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)

class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, config):
        super().__init__()
        self.norm1 = group_norm(c_in, config)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out, config)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.recompute = config.recompute

    def forward(self, x):
        if self.recompute and torch.is_grad_enabled():
            # keep what the convolutions return, compute the rest again in the backward pass
            context_fn = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
            return checkpoint(self.residual, x, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)
        return self.residual(x)

    def residual(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h

class AttnBlock(nn.Module):
    """Self-attention with one head over all positions of a feature map."""

    def __init__(self, channels, config):
        super().__init__()
        self.norm = group_norm(channels, config)
        self.attn = Attention(channels, heads=1)

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, h*w, C)
        h = self.attn(h).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + h

class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # at the right and the bottom only, as VQGAN

class Upsample(nn.Module):
    """
    Doubles every pixel along both sides, then a 3x3 convolution; as one transposed convolution, with 4/9
    of the multiplications. Along one side, with the weights (a, b, c) and the pixels ... x y z ...:

        doubled   x  x  y  y  z  z
        outputs         ^ a x + b y + c y = a x + (b + c) y
                           ^ a y + b y + c z = (a + b) y + c z

    so y adds (c, b + c, a + b, a) times itself to four outputs in a row: a transposed convolution of
    stride 2 with that kernel, which is (c, b, a) plus itself shifted by one.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        weight = self.conv.weight.transpose(0, 1).flip(2, 3)  # (C_in, C_out, 3, 3)
        weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
        weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))  # (C_in, C_out, 4, 4)
        return F.conv_transpose2d(x, to_channels_last(weight), self.conv.bias, stride=2, padding=1)

class Stage(nn.Module):
    """Residual blocks at one resolution, each with attention at the lowest one; then the next resolution."""

    def __init__(self, c_in, c_out, num_blocks, config, attention, resample):
        super().__init__()
        widths = [c_in] + [c_out] * (num_blocks - 1)
        self.res = nn.ModuleList(ResBlock(width, c_out, config) for width in widths)
        self.attn = nn.ModuleList(AttnBlock(c_out, config) if attention else nn.Identity() for _ in widths)
        self.resample = resample(c_out)

    def forward(self, x):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.resample(x)

def mid_block(channels, config):
    return nn.Sequential(ResBlock(channels, channels, config), AttnBlock(channels, config),
                         ResBlock(channels, channels, config))

class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, C, h, w), the features that all adapters share."""

    def __init__(self, config):
        super().__init__()
        self.patch = nn.PixelUnshuffle(config.patch_size)
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, config.channels, 3, padding=1)
        self.stages = nn.Sequential()
        c_in = config.channels
        for i, mult in enumerate(config.channel_mult):
            is_lowest = i == len(config.channel_mult) - 1
            resample = nn.Identity if is_lowest else Downsample
            self.stages.append(Stage(c_in, config.channels * mult, config.res_blocks, config, is_lowest, resample))
            c_in = config.channels * mult
        self.mid = mid_block(c_in, config)

    def forward(self, x):
        x = self.conv_in(self.patch(x))
        return self.mid(self.stages(x))

class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, H, W)"""

    def __init__(self, config):
        super().__init__()
        c_in = config.channels * config.channel_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, c_in, 3, padding=1)
        self.mid = mid_block(c_in, config)
        self.stages = nn.Sequential()
        for i, mult in reversed(list(enumerate(config.channel_mult))):
            is_lowest = i == len(config.channel_mult) - 1
            resample = nn.Identity if i == 0 else Upsample
            self.stages.append(Stage(c_in, config.channels * mult, config.res_blocks + 1, config, is_lowest, resample))
            c_in = config.channels * mult
        self.norm_out = group_norm(c_in, config)
        self.conv_out = nn.Conv2d(c_in, 3 * config.patch_size**2, 3, padding=1)
        self.patch = nn.PixelShuffle(config.patch_size)

    def forward(self, x):
        x = self.stages(self.mid(self.conv_in(x)))
        x = F.silu(self.norm_out(x))
        return self.patch(self.conv_out(x))

# -----------------------------------------------------------------------------
# Tokenizer: the whole

class Branch(nn.Module):
    """Features (B,C,h,w) -> a sub-codebook's vectors (B,d,h,w); its quantizer and feature head. Section 3.2."""

    def __init__(self, c_in, config, teacher_width=0):
        super().__init__()
        positions = config.grid**2
        width = c_in
        self.adapter = nn.Identity()
        if config.adapter_depth:  # there is no skip around it
            width = config.adapter_width
            proj_in = nn.Linear(c_in, width) if c_in != width else nn.Identity()
            self.adapter = ViT(width, config.adapter_depth, config.adapter_heads, positions, proj_in)
        self.norm_out = group_norm(width, config)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.quantizer = Quantizer(config.codebook_size, config.codebook_dim, config.commit_weight,
                                   config.entropy_weight, config.entropy_temperature)
        self.feature_head = None
        if teacher_width:  # predicts a teacher's features from the codes
            proj_in = nn.Sequential(nn.Linear(config.codebook_dim, teacher_width), nn.ReLU(),
                                    nn.Linear(teacher_width, teacher_width))
            heads = math.gcd(8, teacher_width)
            self.feature_head = ViT(teacher_width, 3, heads, positions, proj_in, class_token=True)

    def forward(self, features):
        h = self.norm_out(self.adapter(features))
        return self.quant_conv(self.conv_out(F.silu(h)))

class FQGAN(nn.Module):
    """
    The tokenizer: images (B,3,H,W) in [-1,1] <-> ids (B,k,h,w). Along k stands the low-level sub-codebook first, then
    those that a teacher supervises.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        channels = config.channels * config.channel_mult[-1]
        teacher_widths = (0,) * (config.k - len(config.teacher_widths)) + config.teacher_widths
        self.branches = nn.ModuleList(Branch(channels, config, width) for width in teacher_widths)
        self.post_quant_conv = nn.Conv2d(config.k * config.codebook_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def encode_vectors(self, images):
        """images (B,3,H,W) -> what the k quantizers are given: a list of (B,d,h,w)"""
        c = self.config
        H, W = images.shape[-2:]
        check(not c.adapter_depth or H == W == c.image_size,
              f"images are {W}x{H}; the adapters' positions are for {c.image_size}x{c.image_size}")
        check(H % c.downsample == W % c.downsample == 0, f"images are {W}x{H}, not divisible by {c.downsample}")
        features = self.encoder(to_channels_last(images))
        return [branch(features) for branch in self.branches]

    def decode_vectors(self, quantized):
        """list of k codes (B,d,h,w) -> images (B,3,H,W) float32"""
        h = self.post_quant_conv(torch.cat(quantized, 1))
        return self.decoder(h).contiguous().float()

    @torch.no_grad()
    def encode(self, images):
        """images (B,3,H,W) in [-1,1] -> ids (B,k,h,w) int64"""
        vectors = self.encode_vectors(images)
        ids = [branch.quantizer.nearest(z) for branch, z in zip(self.branches, vectors)]
        return torch.stack(ids, 1)

    @torch.no_grad()
    def decode(self, ids, only=None):
        """ids (B,k,h,w) -> images (B,3,H,W), about [-1,1]. only: sub-codebooks to use; other codes are 0."""
        check(ids.ndim == 4 and ids.shape[1] == self.config.k,
              f"ids have shape {tuple(ids.shape)}, expected (B, {self.config.k}, h, w)")
        quantized = []
        for i, branch in enumerate(self.branches):
            codes = branch.quantizer.lookup(ids[:, i])
            quantized.append(codes if only is None or i in only else torch.zeros_like(codes))
        return self.decode_vectors(quantized)

    def forward(self, images, teacher_features=()):
        """
        images (B,3,H,W), each teacher's features (B,D) -> (reconstruction (B,3,H,W), losses): scalars by name, with
        their weights in them, to be added up. Perceptual and adversarial losses need other networks: train_tokenizer.py
        adds them.
        """
        quantized = []
        losses = {}
        for branch, z in zip(self.branches, self.encode_vectors(images)):
            z_q, _, branch_losses = branch.quantizer(z)
            quantized.append(z_q)
            for name, loss in branch_losses.items():
                losses[name] = losses.get(name, 0) + loss
        losses["disentangle"] = self.config.disentangle_weight * disentangle_loss(quantized)
        if self.config.decorrelate_weight:
            losses["decorrelate"] = self.config.decorrelate_weight * decorrelation_loss(quantized)

        if teacher_features:  # the last sub-codebooks are supervised
            loss = 0
            n = len(teacher_features)
            for branch, z_q, target in zip(self.branches[-n:], quantized[-n:], teacher_features):
                loss = loss + representation_loss(branch.feature_head(z_q), target)
            losses["representation"] = self.config.representation_weight * loss

        reconstruction = self.decode_vectors(quantized)
        losses["reconstruct"] = F.mse_loss(reconstruction, images)
        return reconstruction, losses

# -----------------------------------------------------------------------------
# GPT

@dataclass
class GPTConfig:
    """The factorized autoregressive model's shape. The defaults are FAR-Base with three sub-codebooks at 16x."""

    # these follow from tokenizer and data
    k: int = 3  # codes at each position
    vocab_size: int = 16384  # codes in each sub-codebook
    num_classes: int = 1000  # without the null class, which stands for none
    grid: int = 16  # positions along each side of the image
    n_layer: int = flag(24, "blocks of the trunk")
    n_head: int = flag(16, "attention heads")
    n_embd: int = flag(1024, "width")
    head_layers: int = flag(3, "blocks of the head over the k codes of a position; 0 for k linear classifiers")
    dropout: float = flag(0.1, "dropout on the trunk's input and on the output of every attention and MLP")
    label_dropout: float = flag(0.1, "share of labels replaced by the null class in training, for guidance")
    class_everywhere: bool = flag(False, "add the class to the trunk's input at every position")
    recompute: bool = flag(False, "compute the MLPs' activations again in the backward pass, to save memory")

    def __post_init__(self):
        for name in ("k", "vocab_size", "num_classes", "grid", "n_layer", "n_head", "n_embd", "head_layers"):
            low = 0 if name == "head_layers" else 1
            check(getattr(self, name) >= low, f"{name} is {getattr(self, name)}; it must be at least {low}")
        for name in ("dropout", "label_dropout"):
            check(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        check(self.grid <= 256, f"grid is {self.grid}; it must be at most 256")
        check(self.n_embd % (4 * self.n_head) == 0,
              f"n_embd {self.n_embd} must be a multiple of 4 x n_head {self.n_head}: rotary pairs for rows and columns")
        num_rows = 1 + self.grid**2  # of the rotary table
        check(self.k <= num_rows, f"k={self.k} codes are more than the {num_rows} rotary positions of grid {self.grid}")

class GPT(nn.Module):
    """
    FAR, section 3.3. The trunk, a LLaMA-style transformer, runs over positions: its input is the class,
    then for each position a projection of the k codes there. The head, a small causal transformer, runs
    over the k codes of a position: its input is the trunk's output, then the codes' embeddings. Without a
    head, k linear layers read the trunk's output: LlamaGen's GPT (k=1), or the baseline of table 4.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.class_embedding = nn.Embedding(config.num_classes + 1, D)  # the last row is the null class
        self.token_embeddings = nn.ModuleList(nn.Embedding(config.vocab_size, D) for _ in range(config.k))
        self.token_proj = nn.Linear(config.k * D, D) if config.k > 1 else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.trunk = nn.ModuleList(self.block() for _ in range(config.n_layer))
        self.head = nn.ModuleList(self.block() for _ in range(config.head_layers))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.outputs = nn.ModuleList(nn.Linear(D, config.vocab_size, bias=False) for _ in range(config.k))
        self.register_buffer("rotary", rotary_table(config.grid, D // config.n_head), persistent=False)

        # initialization: with outputs of 0, the loss starts at ln(vocab_size); norms stay at 1
        for name, p in self.named_parameters():
            if name.startswith("outputs") or name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def block(self):
        c = self.config
        attn = Attention(c.n_embd, c.n_head, bias=False, causal=True)
        mlp = SwiGLU(c.n_embd, c.recompute)
        return Block(c.n_embd, attn, mlp, functools.partial(nn.RMSNorm, eps=1e-5), c.dropout)

    def forward(self, ids, labels):
        """
        ids (B,k,h,w), labels (B,) -> (logits (B,k,h*w,vocab_size) float32, mean cross-entropy). Equations 6, 7.
        In training mode the logits are None: those of one sub-codebook at a time are enough for the loss.
        """
        c = self.config
        ids = ids.flatten(2)
        B, k, P = ids.shape
        if self.training and c.label_dropout:
            is_dropped = torch.rand(B, device=labels.device) < c.label_dropout
            labels = labels.masked_fill(is_dropped, c.num_classes)

        # trunk: the class, then every position but the last
        embedded = [table(ids[:, i]) for i, table in enumerate(self.token_embeddings)]  # k of (B, P, D)
        tokens = self.token_proj(torch.cat(embedded, -1))
        class_token = self.class_embedding(labels)[:, None]  # (B, 1, D)
        if c.class_everywhere:
            tokens = tokens + class_token
        x = torch.cat([class_token, tokens[:, :-1]], 1)  # (B, P, D)
        x = self.dropout(x)
        for block in self.trunk:
            x = block(x, rotary=self.rotary[:, :P])

        # head: the trunk's output, then every code of the position but the last
        if self.head:
            x = torch.stack([x, *embedded[:-1]], 2).flatten(0, 1)  # (B*P, k, D)
            for block in self.head:
                # rows 0 to k-1 of the same table, as in the official code: the trunk's output has the zeros
                x = block(x, rotary=self.rotary[:, :k])
            x = x.view(B, P, k, -1)
        else:
            x = x[:, :, None].expand(-1, -1, k, -1)
        x = self.norm(x)

        all_logits = []
        loss = 0
        for i, output in enumerate(self.outputs):
            logits = output(x[:, :, i]).float()  # (B, P, vocab_size)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), ids[:, i].flatten()) / k
            if not self.training:
                all_logits.append(logits)
        return torch.stack(all_logits, 1) if all_logits else None, loss

    @torch.no_grad()
    def generate(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """
        labels (B,) -> ids (B,k,h,w), sampled code by code with cached keys and values. Each of the four
        sampling parameters is one number, or k of them. cfg_scale 1 is no guidance, which takes half the
        time; temperature 0 takes the likeliest code; top_k 0 and top_p 1 leave all codes in.
        """
        c = self.config
        B = len(labels)
        if B:
            first, last = labels.aminmax()
            check(0 <= first and last <= c.num_classes,
                  f"labels run from {first} to {last}, expected 0 to {c.num_classes} (the last for no class)")
        cfg_scale = self.one_for_each_code("cfg_scale", cfg_scale)
        temperature = self.one_for_each_code("temperature", temperature)
        top_k = self.one_for_each_code("top_k", top_k)
        top_p = self.one_for_each_code("top_p", top_p)
        check(0 < min(top_p) and max(top_p) <= 1, f"top_p is {top_p}; it must be in (0, 1]")
        check(all(v == int(v) for v in top_k), f"top_k is {top_k}; it must be a whole number")

        guided = any(scale != 1 for scale in cfg_scale)
        if guided:  # the first half of every batch below is with the class, the second without
            labels = torch.cat([labels, torch.full_like(labels, c.num_classes)])
        head_dim = c.n_embd // c.n_head
        rotary = rotary_table(c.grid, head_dim).to(labels.device)  # float32, whatever the weights are
        class_token = self.class_embedding(labels)[:, None]
        x = class_token  # (B or 2B, 1, D), as every x below
        trunk_caches = [x.new_empty(2, len(x), c.n_head, c.grid**2, head_dim) for _ in self.trunk]
        head_caches = [x.new_empty(2, len(x), c.n_head, c.k, head_dim) for _ in self.head]
        ids = labels.new_empty(B, c.k, c.grid**2)

        with packed_weights(self, len(labels)):
            for position in range(c.grid**2):
                # the trunk takes one step
                for block, cache in zip(self.trunk, trunk_caches):
                    x = block(x, rotary=rotary[:, position:position + 1], cache=cache, position=position)
                trunk_output = x

                # the head takes k, each given the code before it
                embedded = []
                for i in range(c.k):
                    x = trunk_output if i == 0 or not self.head else embedded[-1]
                    for block, cache in zip(self.head, head_caches):
                        x = block(x, rotary=rotary[:, i:i + 1], cache=cache, position=i)
                    logits = self.outputs[i](self.norm(x))[:, 0].float()  # (B or 2B, vocab_size)
                    if guided:
                        logits, null = logits.chunk(2)
                        if cfg_scale[i] != 1:
                            logits = null + cfg_scale[i] * (logits - null)
                    code = sample_token(logits, temperature[i], top_k[i], top_p[i], generator)
                    ids[:, i, position] = code
                    embedded.append(self.token_embeddings[i](code.repeat(1 + guided))[:, None])

                # the next input of the trunk
                x = self.token_proj(torch.cat(embedded, -1))
                if c.class_everywhere:
                    x = x + class_token
        return ids.unflatten(2, (c.grid, c.grid))

    def one_for_each_code(self, name, value):
        """A sampling parameter, given as one number or k of them, as a list of k."""
        k = self.config.k
        values = list(value) if isinstance(value, (list, tuple)) else [value] * k
        check(len(values) == k, f"{name} has {len(values)} values; give one, or {k}, one for each code of a position")
        check(all(0 <= v < 1e30 for v in values), f"{name} is {value}; it must be a finite number of at least 0")
        return values

def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B, V) -> ids (B,): temperature, then top-k, then top-p, which keeps the id that crosses p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / max(temperature, 1e-5)  # less would overflow
    if 0 < top_k < logits.shape[-1]:
        top, indices = logits.topk(int(top_k))  # exactly k of them, also where logits are equal
        logits = torch.full_like(logits, -math.inf).scatter(-1, indices, top)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        p_before = p.cumsum(-1) - p
        ordered = ordered.masked_fill(p_before > top_p, -math.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

@contextlib.contextmanager
def packed_weights(model, rows):
    """
    For sampling: eval mode; and on a CPU, copies of the linear layers' weights in oneDNN's own order, for
    about `rows` inputs at a time. With so few the time goes into reading weights, and these are read up to
    twice as fast. Where PyTorch lacks the (private) operators, the layers stay as they are.
    """
    was_training = model.training
    model.eval()
    weight = model.trunk[0].attn.qkv.weight
    layers = []
    if rows and weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        with contextlib.suppress(AttributeError, RuntimeError):  # no such operator, or not for this type
            for layer in layers:
                packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
                forward = functools.partial(torch.ops.mkldnn._linear_pointwise, W=packed, B=layer.bias,
                                            attr="none", scalars=[], algorithm="")
                forward(weight.new_zeros(1, layer.in_features))
                layer.forward = forward
        yield
    finally:
        model.train(was_training)
        for layer in layers:
            vars(layer).pop("forward", None)

# -----------------------------------------------------------------------------
# Networks that only the tokenizer's training needs

def feature_distance(maps, others, weights):
    """Two series of feature maps (B,C,h,w), and weights of each one's channels (or one number) -> (B,)"""
    distance = 0
    for a, b, weight in zip(maps, others, weights):
        difference = (a - b).square() * weight
        distance = distance + difference.sum(1).mean((1, 2))
    return distance

class LPIPS(nn.Module):
    """
    Perceptual distance: images (B,3,H,W) in [-1,1] twice -> (B,). VGG-16's features after five of its ReLUs, of unit
    length at each position; their squared difference, weighted by channel, averaged over positions. Frozen, and without
    dropout. vgg: torchvision's VGG-16 weights, lin: LPIPS v0.1's; fetched once when not given; UserError where they
    cannot be had. Source: Zhang et al., https://arxiv.org/abs/1801.03924, equation 1.
    """

    layers = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # VGG-16's ReLUs that are compared: place, channels
    vgg_file = ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
    lin_file = ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
                "a78928a0af1e5f0f")

    def __init__(self, vgg=None, lin=None):
        super().__init__()
        self.normalize = torchvision.transforms.Normalize((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        self.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])[:30]
        self.lin = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in self.layers.values())
        load_weights(self.features, fetch(*self.vgg_file, local=vgg), r"features\.(.+)")
        load_weights(self.lin, fetch(*self.lin_file, local=lin), r"lin(\d)\.model\.1\.(weight)")
        self.eval().requires_grad_(False)

    def feature_maps(self, images):
        """Yields the five feature maps, of unit length over the channels."""
        x = to_channels_last(self.normalize(images))
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.layers:
                yield F.normalize(x.float(), dim=1, eps=1e-10)

    def forward(self, images, others):
        weights = [lin.weight for lin in self.lin]
        return feature_distance(self.feature_maps(images), self.feature_maps(others), weights)

class RandomFeatures(nn.Module):
    """
    A perceptual distance without a download: LPIPS's, in the features of four convolutions with random weights, always
    the same, each normalized by the statistics of its batch. images (B,3,H,W) in [-1,1] twice -> (B,).
    """

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList()
        generator = torch.Generator().manual_seed(0)
        for c_in, c_out, stride in ((3, 64, 1), (64, 128, 2), (128, 256, 2), (256, 256, 2)):
            conv = nn.utils.skip_init(nn.Conv2d, c_in, c_out, 3, stride, padding=1, bias=False)
            nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5), generator=generator)  # as nn.Conv2d starts
            self.convs.append(conv)
        self.requires_grad_(False)

    def feature_maps(self, images):
        """Yields the four feature maps, of unit length over the channels."""
        x = to_channels_last(images)
        for conv in self.convs:
            x = F.batch_norm(conv(x), None, None, training=True)
            x = F.leaky_relu(x, 0.2)
            yield F.normalize(x.float(), dim=1)

    def forward(self, images, others):
        weights = [1] * len(self.convs)
        return feature_distance(self.feature_maps(images), self.feature_maps(others), weights)

class Discriminator(nn.Module):
    """PatchGAN (https://arxiv.org/abs/1611.07004): images (B,3,H,W) -> logits (B,1,h,w) of 70x70 patches."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for c_in, c_out, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers.append(nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(c_out))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        layers.append(nn.Conv2d(512, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, images):
        return self.main(images)

def hinge_loss(real, fake):
    """The discriminator's loss: logits of real images are pushed above 1, those of fake ones below -1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)

class Teacher(ViT):
    """CLIP's or DINOv2's vision transformer: images (B,3,H,W) in [-1,1] -> class token (B,width)."""

    def __init__(self, width, depth, patch_size, grid, clip):
        super().__init__(width, depth, width // 64, grid**2, nn.Identity(), class_token=True,
                         activation=quick_gelu if clip else F.gelu, eps=1e-5 if clip else 1e-6)
        self.image_size = grid * patch_size
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size, bias=not clip)
        normalize = torchvision.transforms.Normalize
        if clip:
            self.norm_post = nn.Identity()  # FQGAN takes CLIP's class token before the final norm
            self.normalize = normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        else:
            self.norm_pre = nn.Identity()
            self.normalize = normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def forward(self, images):
        images = F.interpolate(images, self.image_size, mode="nearest") / 2 + 0.5  # as the official code resizes
        patches = self.patch_embed(self.normalize(images))
        return super().forward(patches).float()

CLIP_URL = "https://openaipublic.azureedge.net/clip/models"
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2"
TEACHERS = {  # name: (URL, the beginning of its SHA-256)
    "clip_vitb16": (f"{CLIP_URL}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
                    "5806e77cd80f8b59"),
    "clip_vitl14": (f"{CLIP_URL}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
                    "b8cca3fd41ae0c99"),
    "dinov2_vits14": (f"{DINOV2_URL}/dinov2_vits14/dinov2_vits14_pretrain.pth", "b938bf1bc15cd2ec"),
    "dinov2_vitb14": (f"{DINOV2_URL}/dinov2_vitb14/dinov2_vitb14_pretrain.pth", "0b8b82f85de91b42"),
}

def load_teacher(name, weights=None):
    """
    A frozen module, images (B,3,H,W) in [-1,1] -> features (B,D). name: one of TEACHERS, from the local file `weights`
    or else fetched once; or the path of any model, a TorchScript (.pt) or torch.export (.pt2) file. Raises UserError
    where it cannot be had.
    """
    path = fetch(*TEACHERS[name], local=weights) if name in TEACHERS else Path(name)
    check(path.is_file(), f"no teacher {name}: there are {', '.join(TEACHERS)}, or give a TorchScript or .pt2 file")
    try:
        with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
            if name in TEACHERS:
                teacher = published_teacher(path, clip=name.startswith("clip"))
            elif path.suffix == ".pt2":
                teacher = torch.export.load(path).module()
            else:
                teacher = torch.jit.load(path, map_location="cpu").float().eval()
    except Exception as error:
        raise UserError(f"{path} does not hold the teacher {name} ({one_line(error)})") from None
    for p in teacher.parameters():  # TorchScript has no requires_grad_ for the whole
        p.requires_grad_(False)
    return teacher

def published_teacher(path, clip):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError:  # OpenAI's files are TorchScript archives
        state = torch.jit.load(path, map_location="cpu").state_dict()
    state = clip_weights(state) if clip else dinov2_weights(state)
    width, _, patch_size, _ = state["patch_embed.weight"].shape
    depth = count(state, r"blocks\.(\d+)")
    teacher = Teacher(width, depth, patch_size, math.isqrt(len(state["pos_embed"])), clip)
    teacher.load_state_dict(state)
    return teacher.eval()

# -----------------------------------------------------------------------------
# Data: the built-in shapes

def regular_polygon(n, inner_radius=1.0):
    """n points of the unit circle as complex numbers, from the top on; every second one at inner_radius."""
    angle = 2 * np.pi * (np.arange(n) / n - 0.25)
    radius = np.where(np.arange(n) % 2, inner_radius, 1.0)
    return radius * np.exp(1j * angle)

def shape_outlines():
    """name -> polygons in [-1, 1] (complex, y pointing down): the shape, and what is cut out of it"""
    circle = regular_polygon(96)
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    heart_x = 16 * np.sin(t) ** 3
    heart_y = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    arm = np.array([-0.36 - 1j, 0.36 - 1j, 0.36 - 0.36j])
    return {
        "circle": [0.9 * circle],
        "square": [0.8 * np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j])],
        "triangle": [regular_polygon(3) + 0.2j],
        "diamond": [np.array([-1j, 0.72, 1j, -0.72])],
        "star": [regular_polygon(10, 0.42)],
        "cross": [0.95 * np.concatenate([arm, 1j * arm, -arm, -1j * arm])],
        "ring": [0.95 * circle, 0.5 * circle],
        "heart": [(heart_x + 1j * heart_y) / 17 - 0.1j],
        "moon": [0.95 * circle, 0.5 + 0.8 * circle],
        "arrow": [np.array([-1 - 0.3j, 0.1 - 0.3j, 0.1 - 0.8j, 1, 0.1 + 0.8j, 0.1 + 0.3j, -1 + 0.3j])],
    }

class Shapes:
    """Ten shapes of random size and place, as PIL images. Item i is always the same image, of class i % 10."""

    outlines = shape_outlines()
    classes = list(outlines)
    colors = [
        (214, 40, 57), (240, 120, 20), (250, 196, 20), (38, 150, 80), (20, 140, 170), (40, 70, 190), (130, 60, 170)]
    backgrounds = [
        (250, 240, 225), (225, 238, 250), (228, 245, 228), (250, 228, 232), (238, 230, 248), (236, 236, 236)]

    def __init__(self, image_size, train):
        self.image_size = image_size
        self.train = train

    def __len__(self):
        return 20_000 if self.train else 2_000

    def __getitem__(self, index):
        label = index % len(self.classes)
        part = "train" if self.train else "held-out"
        rng = random.Random(f"{part} {index}")
        radius = rng.uniform(0.24, 0.42)  # as a share of the image's side
        center = rng.uniform(radius + 0.02, 0.98 - radius) + 1j * rng.uniform(radius + 0.02, 0.98 - radius)
        size = (self.image_size, self.image_size)
        shape = Image.new("RGB", size, rng.choice(self.colors))
        background = Image.new("RGB", size, rng.choice(self.backgrounds))

        # anti-aliasing: the mask is drawn 8 times as large, then averaged
        large = 8 * self.image_size
        mask = Image.new("L", (large, large))
        for polygon, fill in zip(self.outlines[self.classes[label]], (255, 0)):
            points = (center + radius * polygon) * large
            ImageDraw.Draw(mask).polygon([(p.real, p.imag) for p in points], fill=fill)
        return Image.composite(shape, background, mask.reduce(8)), label

# -----------------------------------------------------------------------------
# Data: images from files

def to_rgb(image):
    """Any PIL image as upright 8-bit RGB: 16-bit values are scaled to 8 bits, transparency is laid on white."""
    is_16_bit = image.mode.startswith("I;16") or image.format == "PPM" and image.mode == "I"
    turn = Image.Transpose  # by hand: ImageOps.exif_transpose fails where another EXIF tag is damaged
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
             6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    orientation = image.getexif().get(0x112)
    if orientation in turns:
        image = image.transpose(turns[orientation])
    if is_16_bit:  # PIL's own conversion would clip at 255
        values = np.asarray(image) / 257
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its 32-bit values (mode {image.mode}) have no known range; save 8 or 16 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")

def resize_shorter(image, short):
    """Scales the shorter side to `short` as ADM (https://arxiv.org/abs/2105.05233): halved by boxes, then bicubic."""
    longest = 8 * min(image.size)
    if max(image.size) > longest:  # a strip, scaled as a whole, might fill the memory: use its middle
        image = ImageOps.fit(image, [min(side, longest) for side in image.size])
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)

def center_crop(image, size):
    image = resize_shorter(image, size)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

def random_crop(image, size, rng):
    """A square, 0.8 to 1.0 of the shorter side (of a small image more), mirrored half the time."""
    largest = min(math.ceil(size / 0.8), *image.size)
    image = resize_shorter(image, rng.randint(size, max(size, largest)))
    left = rng.randint(0, image.width - size)
    top = rng.randint(0, image.height - size)
    crop = image.crop((left, top, left + size, top + size))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop

def crop_views(image, size, views):
    """A list of crops: the center; for views=2 also its mirror image; for 10 those of LlamaGen."""
    if views == 10:  # corners and center of a slightly larger square, and their mirror images
        square = center_crop(image, int(1.1 * size))
        return list(TF.ten_crop(square, size))
    crop = center_crop(image, size)
    return [crop, ImageOps.mirror(crop)][:views]

def to_uint8(images):
    """[-1, 1] to 0..255, as the official scripts write images: fractions are cut off"""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)

def from_uint8(images):
    """0..255 to [-1, 1]"""
    return images.float() / 127.5 - 1

IMAGE_ENDINGS = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".avif")
SYSTEM_FOLDERS = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "thumbnails"}

def visible(names):
    """Names of folders -> sorted, without hidden ones and those that operating systems make."""
    return sorted(name for name in names if not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS)

def visible_folders(path):
    return visible(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))

def list_images(path):
    """All images below a folder -> (sorted paths, number of other files), without hidden and system ones."""
    images = []
    num_others = 0
    entered = set()
    for folder, subfolders, files in os.walk(path, followlinks=True):
        real_path = os.path.realpath(folder)
        is_inside = os.path.islink(folder) and real_path.startswith(os.path.join(os.path.realpath(path), ""))
        if real_path in entered or is_inside:  # links may form a cycle, or lead to what is visited anyway
            subfolders.clear()
            continue
        entered.add(real_path)
        subfolders[:] = visible(subfolders)
        files = [os.path.join(folder, name) for name in files if not name.startswith(".")]
        images_here = [file for file in files if file.lower().endswith(IMAGE_ENDINGS)]
        images += images_here
        num_others += len(files) - len(images_here)
    return sorted(images), num_others

class Folder:
    """
    (PIL image, label) of a folder of class folders, or of a flat folder of images, which is one class.
    A folder without images is no class, and images beside class folders are left out, as `notes` says.
    """

    def __init__(self, path):
        images, num_others = list_images(path)
        check(images, f"{path} holds no image (looked for .jpg, .jpeg, .png, .webp, ...)")
        self.root = os.path.join(path, "")
        inner_folders = [os.path.dirname(image.removeprefix(self.root)) for image in images]
        class_names = [folder.split(os.sep)[0] for folder in inner_folders]  # "" beside the class folders
        self.classes = sorted(set(class_names) - {""})
        if self.classes:
            labels = {name: label for label, name in enumerate(self.classes)}
            self.samples = [(image, labels[name]) for image, name in zip(images, class_names) if name]
        else:
            self.classes = [Path(path).resolve().name]
            self.samples = [(image, 0) for image in images]
        self.notes = ""
        if len(self.samples) < len(images):
            self.notes += f"; {len(images) - len(self.samples)} images beside its class folders are not taken"
        if num_others:
            self.notes += f"; {num_others} other files are not taken"

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        with Image.open(path) as image:
            image.load()
        return image, label

class ImageData(torch.utils.data.Dataset):
    """
    A data set of (image (3,H,W) in [-1, 1], label int). An index may be a pair (index, epoch): the random
    crop depends on these two alone, so that a resumed run sees what an unbroken one does.

    An image that cannot be read is named once on stderr, and the next one takes its place; UserError if
    they are more than 1 % of the `whole_size` images that this is a part of.
    """

    def __init__(self, source, classes, image_size, augment, description, whole_size=None):
        self.source, self.classes, self.description = source, classes, description
        self.image_size, self.augment = image_size, augment
        self.max_unreadable = max(1, (whole_size or len(source)) // 100)
        self.failed = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # shared with loader processes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        index, epoch = index if isinstance(index, tuple) else (index, "")
        image, label = self.read(index)
        if self.augment:
            crop = random_crop(image, self.image_size, random.Random(f"{index} {epoch}"))
        else:
            crop = center_crop(image, self.image_size)
        return from_uint8(TF.pil_to_tensor(crop)), label

    def views(self, index, num_views):
        """(all of crop_views of an image (num_views,3,H,W), label)"""
        image, label = self.read(index)
        crops = crop_views(image, self.image_size, num_views)
        pixels = torch.stack([TF.pil_to_tensor(crop) for crop in crops])
        return from_uint8(pixels), label

    @property
    def unreadable(self):
        return int(self.failed.sum())

    def read(self, index):
        """(RGB image, label) of an item, or of the next one that can be read."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        for i in range(index, index + len(self)):
            i = i % len(self)
            if self.failed[i]:
                continue
            try:
                image, label = self.source[i]
                return to_rgb(image), int(label)
            except Exception as error:  # PIL raises many kinds
                self.failed[i] = True
                name = self.source.samples[i][0] if hasattr(self.source, "samples") else f"item {i}"
                print(f"skipped {name!r}, which cannot be read: {error}", file=sys.stderr)
            if self.unreadable > self.max_unreadable:
                break
        raise UserError(f"{self.unreadable} images of {self.description} cannot be read, more than 1 %; see above")

    def fingerprint(self):
        """A digest of which images these are and in which order, by the names of a folder's files."""
        text = f"{self.description} {len(self)}"
        if isinstance(self.source, Folder):
            text = "\n".join(path.removeprefix(self.source.root) for path, _ in self.source.samples)
        digest = hashlib.sha256(os.fsencode(text))
        return digest.hexdigest()

def load_data(name_or_path, image_size, train):
    """
    The ImageData of "shapes", of a folder of class folders or images, or of a data set of torchvision, by
    its name, downloaded into torch.hub's cache. Center crops, or with `train` random ones (not of shapes).

    A folder that holds `train` and `val` (or the like) has these two parts; of any other every tenth file
    is held out. Under 100 images, or in a torchvision set without parts, both parts are the whole.
    """
    if name_or_path == "shapes":
        description = "shapes, training part" if train else "shapes, held-out part"
        return ImageData(Shapes(image_size, train), Shapes.classes, image_size, False, description)
    path = os.path.expanduser(name_or_path)
    if os.path.exists(path):
        return load_folder(path, image_size, train)
    return load_torchvision(str(name_or_path), image_size, train)

TRAINING_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "valid", "validation", "test")

def load_folder(path, image_size, train):
    check(os.path.isdir(path), f"{path} is a file; --data takes a folder of images, or of class folders")
    folders = {name.lower(): os.path.join(path, name) for name in visible_folders(path)}
    names = [name for name in TRAINING_NAMES + HELD_OUT_NAMES if name in folders]
    if names:  # of its two parts, training first
        check(names[0] in TRAINING_NAMES and names[1:] and names[1] in HELD_OUT_NAMES,
              f"{path} holds {' and '.join(names)}: call its two parts train and val, or rename the class")
        training, held_out = [folders[name] for name in names[:2]]
        check(visible_folders(training) == visible_folders(held_out),
              f"{training} and {held_out} hold different class folders")
        source = Folder(training if train else held_out)
        others = sorted(folders.keys() - set(names[:2]))
        if others:
            source.notes += f"; {', '.join(others)} beside the two parts not taken"
        return ImageData(source, source.classes, image_size, train, source.root + source.notes)

    source = Folder(path)
    whole_size = len(source)
    part = "all of it (too few to hold any out)"
    if whole_size >= 100:
        part = "all but every tenth file" if train else "every tenth file"
        source.samples = [s for i, s in enumerate(source.samples) if (i % 10 != 9) == train]
    return ImageData(source, source.classes, image_size, train, f"{path}, {part}{source.notes}", whole_size)

def load_torchvision(name, image_size, train):
    makers = {maker.lower(): getattr(torchvision.datasets, maker) for maker in torchvision.datasets.__all__}
    make = makers.get(name.lower())
    takes = inspect.signature(make).parameters if make else ()
    check("root" in takes, f"--data {name}: no such folder, and no data set of torchvision, such as cifar10")
    options = {"root": Path(torch.hub.get_dir()) / "datasets"}
    if "download" in takes:
        options["download"] = True
    parts = [{}]  # the options that select a part: the first ones that the data set knows are taken
    if "train" in takes:
        parts = [{"train": train}]
    elif "split" in takes:
        parts = [{"split": split} for split in (("train", "trainval") if train else ("val", "test"))]
    for part in parts:
        try:
            source = make(**options, **part)
            break
        except ValueError:  # no such split
            source = None
        except Exception as error:
            raise UserError(f"--data {name}: cannot be downloaded ({one_line(error)}); give a folder") from None
    classes = getattr(source, "classes", None)
    check(classes, f"--data {name}: has no part {parts}, or no list of classes; save it as a folder")
    classes = [c if isinstance(c, str) else ", ".join(c) for c in classes]
    return ImageData(source, classes, image_size, train, f"torchvision's {make.__name__} {part or ''}".strip())

def training_batches(size, batch_size, seed, steps, first_step=0, rank=0, world_size=1, accumulate=1):
    """
    Yields this rank's micro-batches, `accumulate` a step: lists of (index, epoch), indices below `size`.
    Each epoch has its own permutation; batches may straddle epochs. The order depends on seed and step
    alone: a run can be resumed at any step, on any number of ranks.
    """
    epoch = None
    micro_size = batch_size // (world_size * accumulate)
    for step in range(first_step, steps):
        items = []
        for position in range(step * batch_size + rank, (step + 1) * batch_size, world_size):
            if position // size != epoch:
                epoch = position // size
                order = np.random.default_rng([seed, epoch]).permutation(size)
            items.append((int(order[position % size]), f"{seed} {epoch}"))
        for i in range(0, len(items), micro_size):
            yield items[i:i + micro_size]

# -----------------------------------------------------------------------------
# Checkpoints: ours

def load_tokenizer(path, device="cpu"):
    """A trained FQGAN in eval mode, from a file of ours, or one that FQGAN's or LlamaGen's authors published."""
    return build_model(FQGAN, FQGANConfig, load_checkpoint(path, "tokenizer"), path, device)

def load_gpt(path, device="cpu", grid=None):
    """A trained GPT in eval mode: ours, FAR's or LlamaGen's. grid: for files that do not store it."""
    return build_model(GPT, GPTConfig, load_checkpoint(path, "gpt"), path, device, grid=grid or 16)

def load_checkpoint(path, kind):
    """The dict that train_tokenizer.py or train_gpt.py saved; of a published file its kind, config and model."""
    check(Path(path).is_file(), f"no {kind} checkpoint at {path}: `python train_{kind}.py` makes one")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold one, of plain values
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # its message is pages long, and advises to load without weights_only
        raise UserError(f"{path} cannot be read as a checkpoint: it is damaged, cut off, or something else") from None
    if not isinstance(contents, dict):
        contents = {}
    if "kind" not in contents:
        contents = published_checkpoint(contents, path)
    found = contents.get("kind")
    other = f" but a {found}'s" if found else ""
    check(found == kind, f"{path} is not a {kind} checkpoint{other}")
    return contents

def build_model(model_class, config_class, state, path, device="cpu", **defaults):
    """A checkpoint's model (its moving average, if any) in eval mode; `trained_on` is its run's --data."""
    try:
        config = state["config"]
        is_plain = config and all(isinstance(value, (int, float, str, list, tuple)) for value in config.values())
        check(is_plain, "it has no config of plain values")
        config = config_class(**defaults | config)
        weights = state.get("ema") or state["model"]
        sizes = ("k", "n_layer", "head_layers", "adapter_depth", "res_blocks")
        num_blocks = sum(getattr(config, name, 0) for name in sizes)
        check(num_blocks <= len(weights), "its config describes more blocks than it has weights")
        with torch.device("meta"):  # absurd sizes are refused before they take memory
            model_class(config).load_state_dict(weights, assign=True)
        model = model_class(config)
        model.load_state_dict(weights)
        model.trained_on = state.get("settings", {}).get("data")
    except Exception as error:
        raise UserError(f"{path} does not fit this version of the code: weights and config disagree, or it was written "
                        f"by an older version ({one_line(error)})") from None
    return model.to(device).eval()

def fetch(url, sha256, local=None):
    """The path of `local`, or of a copy in torch.hub's cache, downloaded unless its SHA-256 begins as given."""
    if local:
        check(Path(local).is_file(), f"no file at {local}; what belongs there is {url}")
        return Path(local)
    path = Path(torch.hub.get_dir()) / "checkpoints" / "-".join(url.split("/")[-2:])
    if path.is_file():
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256):
                return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256)  # under another name until its digest is right
    except Exception as error:
        raise UserError(f"{url} cannot be downloaded ({one_line(error)}); put it at {path}") from None
    return path

def load_weights(module, path, pattern="(.+)"):
    """Loads a file's tensors whose names fit the pattern; its groups make up their names in `module`."""
    try:
        state = {}
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
            if match := re.fullmatch(pattern, name):
                state[".".join(match.groups())] = tensor
        module.load_state_dict(state)
    except Exception as error:
        raise UserError(f"{path} does not hold the weights that belong there ({one_line(error)})") from None

# -----------------------------------------------------------------------------
# Checkpoints: published ones. Each table gives pieces of the published names, and ours.

VIT_NAMES = {  # branches.0.adapter.transformer.3.attn.in_proj_weight -> branches.0.adapter.blocks.3.attn.qkv.weight
    "positional_embedding": "pos_embed",
    "transformer.resblocks.": "blocks.",  # CLIP
    "transformer.": "blocks.",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm_post.",
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
TOKENIZER_NAMES = {  # encoder.conv_blocks.2.res.0.nin_shortcut.weight -> encoder.stages.2.res.0.shortcut.weight
    "conv_blocks.": "stages.",
    "nin_shortcut.": "shortcut.",
    "downsample.": "resample.",
    "upsample.": "resample.",
    "proj_out.": "attn.proj.",
}
BRANCH_NAMES = [  # FQGAN-Triple, FQGAN-Dual, LlamaGen: a branch's ending, its adapter, its feature head
    [("_vis", "visual_head", None), ("_sem_mid", "semantic_head_mid", "mid_sem_feat_pred"),
     ("_sem_high", "semantic_head_high", "high_sem_feat_pred")],
    [("_vis", "visual_head", None), ("_sem", "semantic_head", "feat_pred_head")],
    [("", None, None)],
]
GPT_NAMES = {  # layers.7.feed_forward.w1.weight -> trunk.7.mlp.w1.weight
    "cls_embedding.embedding_table.": "class_embedding.",
    "aggregation_layer.": "token_proj.",
    "layers.": "trunk.",
    "ar_head.": "head.",
    "attention.wqkv.": "attn.qkv.",
    "attention.wo.": "attn.proj.",
    "feed_forward.": "mlp.",
    "attention_norm.": "norm1.",
    "ffn_norm.": "norm2.",
}

def rename(state, prefixes, pieces):
    """A state dict under our names: the first prefix that fits is replaced, then all pieces in turn."""
    renamed = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        name = prefixes.get(prefix, "") + name.removeprefix(prefix)
        for published, ours in pieces.items():
            name = name.replace(published, ours)
        renamed[name] = tensor
    return renamed

def count(state, pattern):
    """How many numbers, from 0 on, the names of a state dict have in the place of the pattern's group."""
    matches = [re.match(pattern, name) for name in state]
    return max((int(match[1]) + 1 for match in matches if match), default=0)

def published_checkpoint(contents, path):
    """{"kind", "config", "model"} of a file as FQGAN's or LlamaGen's authors publish it; {} of any other."""
    state = contents
    for name in ("state_dict", "module", "model", "ema"):  # the last that is there
        if isinstance(contents.get(name), dict):
            state = contents[name]
    weights = {}
    for name, tensor in state.items():
        name = re.sub(r"^((module|_orig_mod)\.)+", "", str(name))  # prefixes of DDP and torch.compile
        if not re.search("codebook_used|freqs_cis|kv_cache|causal_mask", name):
            weights[name] = tensor
    check("cls_embedding.cap_proj.fc1.weight" not in weights,
          f"{path} is a text-conditional GPT; only class-conditional ones are supported")
    try:
        if "encoder.conv_in.weight" in weights and "post_quant_conv.weight" in weights:
            return published_tokenizer(weights)
        if "cls_embedding.embedding_table.weight" in weights:
            return published_gpt(weights, contents.get("args"))
    except Exception as error:
        raise UserError(f"{path} looks like a published checkpoint, but cannot be used ({one_line(error)})") from None
    return {}

def published_tokenizer(state):
    for branches in BRANCH_NAMES:
        if f"quantize{branches[-1][0]}.embedding.weight" in state:
            break
    prefixes = {}
    for i, (ending, adapter, feature_head) in enumerate(branches):
        prefixes |= {
            f"encoder.{adapter}.0.": f"branches.{i}.adapter.",
            f"encoder.norm_out{ending}.": f"branches.{i}.norm_out.",
            f"encoder.conv_out{ending}.": f"branches.{i}.conv_out.",
            f"quant_conv{ending}.": f"branches.{i}.quant_conv.",
            f"quantize{ending}.embedding.weight": f"branches.{i}.quantizer.codebook",
            f"{feature_head}.upscale.": f"branches.{i}.feature_head.proj_in.",
            f"{feature_head}.": f"branches.{i}.feature_head.",
        }
    state = rename(state, prefixes, VIT_NAMES | TOKENIZER_NAMES)

    # AttnBlock: the 1x1 convolutions q, k, v are one linear layer here
    for name in [name for name in state if re.search(r"\.q\.(weight|bias)$", name)]:
        block, _, kind = name.rsplit(".", 2)
        qkv = [state.pop(f"{block}.{part}.{kind}") for part in "qkv"]
        state[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
    for name, tensor in state.items():
        if ".attn." in name and tensor.ndim == 4:
            state[name] = tensor.flatten(1)

    # the config, read off names and shapes
    num_stages = count(state, r"encoder\.stages\.(\d+)")
    channels = len(state["encoder.conv_in.weight"])
    codebook_size, codebook_dim = state["branches.0.quantizer.codebook"].shape
    stage_channels = [len(state[f"encoder.stages.{i}.res.0.conv1.weight"]) for i in range(num_stages)]
    head_names = sorted(name for name in state if name.endswith("feature_head.pos_embed"))
    config = dict(
        k=len(branches), codebook_size=codebook_size, codebook_dim=codebook_dim, downsample=2 ** (num_stages - 1),
        channels=channels, channel_mult=tuple(c // channels for c in stage_channels),
        res_blocks=count(state, r"encoder\.stages\.0\.res\.(\d+)"),
        z_channels=len(state["post_quant_conv.weight"]),
        adapter_depth=count(state, r"branches\.0\.adapter\.blocks\.(\d+)"),
        teacher_widths=tuple(state[name].shape[1] for name in head_names))
    if config["adapter_depth"]:
        num_positions, config["adapter_width"] = state["branches.0.adapter.pos_embed"].shape
        config["image_size"] = math.isqrt(num_positions) * config["downsample"]
    return {"kind": "tokenizer", "config": config, "model": state}

def published_gpt(state, args):
    k = max(1, count(state, r"tok_embeddings_(\d+)") - 1)
    prefixes = {}
    for i in range(k):
        ending = f"_{i + 1}" if k > 1 else ""
        prefixes[f"tok_embeddings{ending}."] = f"token_embeddings.{i}."
        prefixes[f"output{ending}."] = f"outputs.{i}."
    state = rename(state, prefixes, GPT_NAMES)
    num_rows, width = state["class_embedding.weight"].shape
    config = dict(
        k=k, vocab_size=len(state["outputs.0.weight"]), num_classes=num_rows - 1, n_embd=width,
        n_layer=count(state, r"trunk\.(\d+)"), head_layers=count(state, r"head\.(\d+)"),
        n_head=32 if width == 3200 else width // 64)  # LlamaGen-3B's heads have 100 channels, all others' 64
    if hasattr(args, "downsample_size"):
        config["grid"] = int(args.image_size) // int(args.downsample_size)
    return {"kind": "gpt", "config": config, "model": state}

def clip_weights(state):
    """The vision half of CLIP's state dict under Teacher's names. visual.conv1.weight -> patch_embed.weight"""
    unused = ("visual.proj", "visual.ln_post.weight", "visual.ln_post.bias")
    state = {n: t for n, t in state.items() if n.startswith("visual.") and n not in unused}
    state = rename(state, {"visual.conv1.": "patch_embed.", "visual.": ""}, VIT_NAMES)
    state["class_embedding"] = state["class_embedding"][None]
    return state

def dinov2_weights(state):
    """DINOv2's state dict under Teacher's names. patch_embed.proj.weight -> patch_embed.weight"""
    names = {"norm.": "norm_post.", "patch_embed.proj.": "patch_embed.", "cls_token": "class_embedding"}
    state = rename(state, names, {})
    del state["mask_token"]
    state["class_embedding"] = state["class_embedding"][0]

    # LayerScale multiplies the output of attention or MLP: put it into the weights of their last layers
    for name in [name for name in state if name.endswith(".gamma")]:
        block, scale_name, _ = name.rsplit(".", 2)
        layer = f"{block}.attn.proj" if scale_name == "ls1" else f"{block}.mlp.fc2"
        scale = state.pop(name)
        state[f"{layer}.weight"] = scale[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = scale * state[f"{layer}.bias"]

    # positions, from 37x37 to 16x16 with a scale that is 0.1 off, as in DINOv2's own code
    first, table = state["pos_embed"][0].split([1, 37**2])
    table = table.T.unflatten(1, (37, 37))[None]  # (1, width, 37, 37)
    table = F.interpolate(table, scale_factor=(16 + 0.1) / 37, mode="bicubic")[0].flatten(1).T
    state["pos_embed"] = torch.cat([first, table])
    return state

# -----------------------------------------------------------------------------
# Running: what the scripts share. The models end here.

def cli(main):
    """Runs a script's main(): what the user can correct becomes one line and exit code 1, Ctrl-C 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for paths that the terminal cannot print
    try:
        main()
        if dist.is_initialized():
            barrier()
            dist.destroy_process_group()
        return
    except UserError as error:
        lines = str(error).strip().splitlines()  # from a loader process, with a traceback before the message
        message = lines[-1].removeprefix("fqgan.UserError: ")
    except torch.OutOfMemoryError as error:
        message = (f"out of memory ({one_line(error)}): give a smaller --batch-size, or in training a larger "
                   "--accumulate, or --recompute")
    except OSError as error:  # a full disk, a read-only folder, ...
        message = str(error)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")  # outside of `except`, which would keep the loaders alive

class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")

def int_tuple(text):
    return tuple(int(n) for n in text.split(",") if n)

def parse_flags(doc, presets, *config_classes):
    """Reads --preset and a flag for each field made by flag() -> (defaults, preset's values, given flags)."""
    parser = Parser(doc)
    parser.argument_default = argparse.SUPPRESS  # flags that are not given are left out
    first = next(iter(presets))
    parser.add_argument("--preset", choices=presets, help=f"values of flags that are not given (default: {first})")
    defaults = {}
    for f in sum(map(fields, config_classes), ()):
        if not f.metadata:
            continue
        defaults[f.name] = f.default
        shown = f"default: {presets[first].get(f.name, f.default)}"
        for preset, values in presets.items():
            if preset != first:
                shown += f"; {preset}: {values.get(f.name, f.default)}"
        help = f"{f.metadata['help']} ({shown})".replace("%", "%%")
        kind = {"type": f.type if f.type in (int, float, str) else int_tuple}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + f.name.replace("_", "-"), help=help, **kind)
    flags = vars(parser.parse_args())
    preset = flags.get("preset", first)
    return defaults, {"preset": preset, **presets[preset]}, flags

def pick(config_class, settings):
    """A config filled from a dict that holds more."""
    return config_class(**{f.name: settings[f.name] for f in fields(config_class) if f.name in settings})

def resumed_settings(checkpoint, path, defaults, flags, fixed):
    """A resumed run's settings: the checkpoint's, and over them flags that do not change the `fixed` ones."""
    saved = checkpoint.get("settings")
    check(saved, f"{path} holds weights, not a run: it cannot be resumed")
    for name in fixed & flags.keys():
        check(flags[name] == saved.get(name),
              f"--{name.replace('_', '-')} differs from the run in {path}: leave it out, or give another --out")
    return {**defaults, **saved, "overwrite": False, **flags}

def check_settings(settings):
    """Refuses numbers that no training run can have."""
    at_least = dict(steps=1, batch_size=1, accumulate=1, log_every=1, eval_every=1, eval_images=1, warmup=0, workers=0,
                    lr=0, disc_lr=0, final_lr=0, grad_clip=0, weight_decay=0, cfg_scale=0, ema=0, seed=0)
    for name, low in at_least.items():
        value = settings.get(name, low)
        high = 1 if name == "ema" else math.inf
        check(low <= value < high, f"--{name.replace('_', '-')} is {value}; it must be in [{low}, {high})")

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def init_distributed(device="auto", seed=0):
    """Every script's start -> the device. Under torchrun, joins the process group (nccl on GPUs, else gloo)."""
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({one_line(error)})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        check(not missing, f"WORLD_SIZE is set without {', '.join(missing)}: start with torchrun, or unset WORLD_SIZE")
        check(int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]), "RANK must be below WORLD_SIZE: use torchrun")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    torch.backends.cudnn.allow_tf32 = False  # float32 in full: codes and metrics depend on it
    torch.set_flush_denormal(True)  # CPUs take a hundred times as long over the softmax's tiniest numbers
    torch.manual_seed(seed % 2**63)
    return device

def barrier():
    if dist.is_initialized():
        dist.barrier()

def all_reduce(tensor):
    """Adds up a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def gather(item):
    """What each rank gives, as a list on rank 0; an empty list on the others."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size() if rank() == 0 else None
    dist.gather_object(item, items)
    return items or []

@contextlib.contextmanager
def rank0_first():
    """One process of each machine goes first through the block: it downloads what the others then find."""
    is_first = int(os.environ.get("LOCAL_RANK") or 0) == 0
    if not is_first:
        barrier()
    try:
        yield
    finally:
        if is_first:
            barrier()

def print0(*words):
    """Prints on rank 0. A run goes on without its output when that fails: a closed pipe, a full disk."""
    if rank() == 0:
        try:
            print(*words, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def step_seed(seed, step, rank):
    """The seed of a step's random numbers, whose state no checkpoint need hold."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:7], "little")

def leave_signals_to_main(worker_id):
    """For loader processes, which get the same signals: they work on while the main one ends its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: signal.alarm(120))  # end two minutes later

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

def pick_dtype(name, device):
    """A dtype by name; "auto": bfloat16 where the hardware has it (emulated it is several times slower)."""
    check(name == "auto" or name in DTYPES, f"--dtype {name}: choose {', '.join(DTYPES)} or auto")
    if name != "auto":
        return DTYPES[name]
    has_bf16 = False
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        features = torch.cpu.get_capabilities()
        has_bf16 = features.get("avx512_bf16") or features.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32

def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, which takes its place when the block ends: whole or not there."""
    tmp = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise

def save_checkpoint(path, contents):
    try:
        with atomic_write(path) as tmp, open(tmp, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {one_line(error)}; the last checkpoint is kept") from None

def read_log(path, last_step):
    """A log's rows up to a step, dicts of text. What is no row, as a power cut may leave, is dropped."""
    if not Path(path).exists():
        return []
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    rows = []
    for row in csv.DictReader(line for line in text.replace("\0", "").splitlines() if len(line) < 10_000):
        step = str(row.get("step"))
        if step.isdecimal() and int(step) <= last_step and None not in row:
            rows.append({name: value for name, value in row.items() if value})
    return rows

def write_log(path, rows):
    """Writes all rows, dicts of numbers: columns may come and go. Where that fails, the run goes on."""
    columns = {}
    for row in rows:
        columns |= row  # in the order in which they first occur
    try:
        with atomic_write(path) as tmp, open(tmp, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in rows:
                values = [row.get(name) for name in columns]
                writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values)
    except OSError as error:
        print0(f"{path} cannot be written: {one_line(error)}")

def fixed_sample(n):
    """range(n) in a random order, since folders come class by class, that is always the same."""
    return np.random.default_rng(0).permutation(n).tolist()

def rank_batches(total, batch_size):
    """This rank's share of range(total), in ranges: all ranks together have each number once."""
    batches = [range(i, min(i + batch_size, total)) for i in range(0, total, batch_size)]
    return batches[rank()::world_size()]

def data_parts(name, image_size):
    """(training part, held-out part) of load_data"""
    with rank0_first():
        train, held_out = [load_data(name, image_size, part) for part in (True, False)]
    check(train.classes == held_out.classes or len(train.classes) == len(held_out.classes) == 1,
          f"--data {name}: the classes of its two parts differ")
    return train, held_out

def data_name(given, model, path):
    """The --data that is given, or what the model loaded from `path` was trained on."""
    check(given or model.trained_on, f"{path} does not say what it was trained on: name the images with --data")
    return given or model.trained_on

def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

def psnr(images, others):
    """(B,3,H,W) in [-1,1] twice -> (B,) peak signal-to-noise ratio in dB, of the images in 8 bits"""
    difference = to_uint8(images).float() - to_uint8(others).float()
    error = difference.square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1e-4))

def code_usage(counts):
    """counts (..., V) of the choices of each code -> (share of codes chosen at all, perplexity), each (...)"""
    counts = counts.cpu().double()  # not every device has float64
    p = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return (counts > 0).double().mean(-1), torch.special.entr(p).sum(-1).exp()

def save_grid(path, rows, tile=96):
    """Draws rows of (label, images (n,3,H,W) in [-1,1]), enlarged by a whole factor to `tile` pixels or more."""
    height, width = rows[0][1].shape[2:]
    zoom = max(1, math.ceil(tile / width))
    height *= zoom
    width *= zoom
    font = ImageFont.load_default(14)
    left = 16 + math.ceil(max(font.getlength(label) for label, _ in rows))
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (left + columns * (width + 4), 4 + len(rows) * (height + 4)), "white")
    for i, (label, images) in enumerate(rows):
        top = 4 + i * (height + 4)
        ImageDraw.Draw(sheet).text((left - 10, top + height // 2), label, fill="black", font=font, anchor="rm")
        for j, image in enumerate(to_uint8(images).cpu()):
            enlarged = TF.to_pil_image(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + j * (width + 4), top))
    sheet.save(path)

@torch.no_grad()
def reconstruction_rows(tokenizer, images):
    """For save_grid: images, reconstructions, those by each sub-codebook alone, and those without it."""
    k = tokenizer.config.k
    ids = tokenizer.encode(images)
    rows = [("original", images), ("reconstruction", tokenizer.decode(ids))]
    if k > 1:
        for i in range(k):
            rows.append((f"codebook {i + 1} alone", tokenizer.decode(ids, only=[i])))
    if k > 2:
        for i in range(k):
            others = set(range(k)) - {i}
            rows.append((f"without {i + 1}", tokenizer.decode(ids, only=others)))
    return rows

def numbers(text):
    """"2" -> 2; "1.5,2" -> [1.5, 2], one for each code of a position"""
    values = [int(word) if word.isdecimal() else float(word) for word in text.split(",")]
    return values[0] if len(values) == 1 else values

def add_sampling_flags(parser):
    for name, kind, default, help in (
        ("--cfg-scale", numbers, 1.5, "guidance; 1 for none"),
        ("--temperature", numbers, 1.0, "below 1 likelier codes, 0 the likeliest"),
        ("--top-k", numbers, 0, "sample from the k likeliest codes only; 0: from all"),
        ("--top-p", numbers, 1.0, "sample from the likeliest codes that make up p"),
        ("--seed", int, 0, "another seed, other samples"),
        ("--batch-size", int, 64, "images at a time"),
        ("--device", str, "auto", "cuda, mps, cpu, ...; auto: the best there is"),
        ("--dtype", str, "auto", "of the GPT: float32, bfloat16, float16; auto: bfloat16 where the hardware has it"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{help} (default: {default})")

def class_indices(text, names):
    """"0,3" or "star,moon" -> class numbers. Names go before numbers; quotes protect commas in names."""
    picked = []
    for word in next(csv.reader([text], skipinitialspace=True)):
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

def load_generator(path, tokenizer_path=None, device="cpu", grid=None):
    """(GPT, tokenizer, class names). A GPT's checkpoint holds its tokenizer; tokenizer_path replaces it."""
    state = load_checkpoint(path, "gpt")
    check(tokenizer_path or "tokenizer" in state, f"{path} holds no tokenizer: name it with --tokenizer")
    gpt = build_model(GPT, GPTConfig, state, path, device, grid=grid or 16)
    if tokenizer_path:
        tokenizer = load_tokenizer(tokenizer_path, device)
    else:
        tokenizer = build_model(FQGAN, FQGANConfig, state["tokenizer"], path, device)
    g = gpt.config
    t = tokenizer.config
    source = tokenizer_path or path
    check(g.k == t.k, f"{path} was trained for k {g.k}, the tokenizer in {source} has k {t.k}")
    check(g.vocab_size == t.codebook_size,
          f"{path} was trained for {g.vocab_size} codes, the tokenizer in {source} has {t.codebook_size}")
    return gpt, tokenizer, state.get("classes") or [str(i) for i in range(g.num_classes)]

def generate_images(gpt, tokenizer, labels, batches, options):
    """Yields (batch, images (B,3,H,W), about [-1,1]) for each of `batches`, ranges of places in `labels`."""
    device = gpt.rotary.device
    gpt = gpt.to(pick_dtype(options.dtype, device))  # the decoder stays in float32
    for batch in batches:
        # a random state of its own: whichever process makes the batch, its images are the same
        generator = torch.Generator(device).manual_seed((options.seed * 1_000_003 + batch.start) % 2**63)
        ids = gpt.generate(labels[batch.start:batch.stop].to(device), options.cfg_scale, options.temperature,
                           options.top_k, options.top_p, generator)
        yield batch, tokenizer.decode(ids)
