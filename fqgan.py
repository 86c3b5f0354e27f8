"""
FQGAN in one file: a factorized visual tokenizer, and the autoregressive model that generates its tokens.

A convolutional encoder feeds k transformer adapters. Each has a codebook of its own, and the decoder rebuilds
the image from all k codes of a position. A GPT learns to generate the codes. The paper comes first: quantizers,
its heart, then all from image to codes and back, and the GPT; after it networks that only training needs, data,
checkpoints, and what the scripts share.

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
import itertools
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import unicodedata
import warnings
from collections import namedtuple
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

class UserError(ValueError):
    """A mistake that the user can correct. The scripts print its message as one line and exit with 1."""

def check(condition, message):
    if not condition:
        raise UserError(message)

# -----------------------------------------------------------------------------
# Quantizers and their losses

class Quantizer(nn.Module):
    """
    One sub-codebook (section 3.1), l2-normalized as in LlamaGen: vectors and codes are compared at unit length, where
    the nearest code has the largest cosine. It computes in float32, since in bfloat16 one random vector in fifteen
    finds another code.

    A quantizer of another kind needs the same three methods; which losses it has is its own affair.
    """

    def __init__(self, codebook_size, codebook_dim, commit_weight=0.25, entropy_weight=0.03, entropy_temperature=0.01):
        super().__init__()
        self.commit_weight = commit_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.codebook = nn.Parameter(F.normalize(torch.rand(codebook_size, codebook_dim) - 0.5, dim=-1))

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
            chunks = to_vectors(z).split(chunk_size(codes))
            ids = torch.cat([(chunk @ codes.T).argmax(1) for chunk in chunks])
        return ids.view(len(z), *z.shape[2:])

    def forward(self, z):
        """z (B,d,h,w) of any length -> (z_q (B,d,h,w) of unit length, ids (B,h,w), dict of weighted losses)"""
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)
            codes = F.normalize(self.codebook.float(), dim=-1)

            if self.entropy_weight:  # it compares all vectors with all codes, and so finds the nearest ones, too
                entropy, ids = entropy_loss(to_vectors(z), codes, self.entropy_temperature)
                ids = ids.view(len(z), *z.shape[2:])
            else:
                entropy = z.new_zeros(())
                ids = self.nearest(z)
            z_q = codes[ids].permute(0, 3, 1, 2)
            losses = {
                "codebook": F.mse_loss(z_q, z.detach()),  # moves the codes to the vectors
                "commit": self.commit_weight * F.mse_loss(z, z_q.detach()),  # the vectors to the codes
                "entropy": self.entropy_weight * entropy,  # sharpens and spreads the choices
            }
        z_q = z + (z_q - z).detach()  # straight-through: the value of z_q, the gradient of z
        return z_q, ids, losses

def to_vectors(z):
    """(B,d,h,w) -> (B*h*w, d)"""
    return z.permute(0, 2, 3, 1).flatten(0, 2)

def chunk_size(codes):
    """How many vectors are compared with all codes (V,d) at a time, so that memory does not grow with both."""
    entries = 2**18 if codes.device.type == "cpu" else 2**26  # what fits a CPU's cache; 256 MB on a GPU
    return max(16, entries // len(codes))

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
        call it        g_ij / n. The -1 is left out: the next line subtracts whatever is the same for all j
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
            logsumexp = top - p.gather(1, nearest).log()  # since log p_ij = s_ij - logsumexp(s_i)
            yield rows, s, p, logsumexp, nearest

    @staticmethod
    def forward(ctx, z, codes, temperature):
        entropy = 0
        p_sum = 0
        ids = torch.empty(len(z), dtype=torch.long, device=z.device)  # many small ones would fragment the memory
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
    k codes (B,d,h,w) -> how alike two sub-codebooks' codes are, from 0 (uncorrelated) to 1 (the same but for a
    rotation), mean over pairs. Linear CKA, https://arxiv.org/abs/1905.00414. It is not in the paper, whose loss makes
    the codes of a pair orthogonal; but then a code may still always come with the same orthogonal one.
    """
    losses = []
    with torch.autocast(quantized[0].device.type, enabled=False):
        vectors = [to_vectors(z_q.float()) for z_q in quantized]
        centered = [v - v.mean(0) for v in vectors]
        for a, b in itertools.combinations(centered, 2):
            scale = (a.T @ a).norm() * (b.T @ b).norm()
            losses.append((a.T @ b).square().sum() / (scale + 1e-6))
    return torch.stack(losses).mean() if losses else vectors[0].new_zeros(())

def representation_loss(predicted, features):
    """
    InfoNCE: each prediction (B,D) is to find its own among a teacher's features (B,D), the other images of the
    micro-batch being the negatives. Cosines without temperature, as in the official code. Section 3.2.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        cosine = F.normalize(predicted.float(), dim=1) @ F.normalize(features.float(), dim=1).T
    return F.cross_entropy(cosine, torch.arange(len(cosine), device=cosine.device))

# -----------------------------------------------------------------------------
# Tokenizer: config

def flag(default, help, at_least=0):
    """A config field, with the help text of its command-line flag, which takes no number below at_least."""
    return field(default=default, metadata={"help": help, "at_least": at_least})

# downsample / patch_size: channels of each stage; those of 8 and 16 are the published models'
CHANNEL_MULTS = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 1, 2, 2, 4)}

@dataclass
class FQGANConfig:
    """The tokenizer's shape, and the weights of its own losses. The defaults are the paper's FQGAN-Triple at 16x."""

    k: int = flag(3, "sub-codebooks: 2 is FQGAN-Dual, 3 FQGAN-Triple; 1 with --adapter-depth 0 is VQGAN", at_least=1)
    codebook_size: int = flag(16384, "codes in each sub-codebook", at_least=1)
    codebook_dim: int = flag(8, "dimension of a code", at_least=1)
    image_size: int = flag(256, "side of the square images, in pixels", at_least=1)
    downsample: int = flag(16, "pixels that a code stands for along each side; a power of two", at_least=2)
    patch_size: int = flag(1, "side of the patches of pixels that are gathered into channels first", at_least=1)
    channels: int = flag(128, "channels of the convolutions at the finest stage", at_least=1)
    channel_mult: tuple[int, ...] = flag((), "channels of each stage, times --channels; empty: by --downsample")
    res_blocks: int = flag(2, "residual blocks in a stage of the encoder; the decoder has one more", at_least=1)
    norm_groups: int = flag(32, "groups of GroupNorm; few channels in each lose an image's mean color", at_least=1)
    pool: tuple[int, ...] = flag((), "sides of the squares of positions that share a code, by sub-codebook; else 1")
    z_channels: int = flag(256, "channels between the convolutions and the quantizers", at_least=1)
    adapter_depth: int = flag(6, "transformer blocks in each sub-codebook's adapter; 0 for no adapters")
    adapter_width: int = flag(512, "width of the adapters", at_least=1)
    adapter_heads: int = flag(8, "attention heads of the adapters", at_least=1)
    recompute: bool = flag(False, "compute norms and activations again in the backward pass, to save memory")
    commit_weight: float = flag(0.25, "weight of the commitment loss")
    entropy_weight: float = flag(0.03, "weight of the entropy loss")
    entropy_temperature: float = flag(0.01, "softmax temperature of the entropy loss", at_least=1e-9)
    disentangle_weight: float = flag(0.1, "weight of the disentanglement loss")
    decorrelate_weight: float = flag(0.0, "weight of the decorrelation loss, which is not the paper's")
    representation_weight: float = flag(0.5, "weight of the representation loss of each teacher")
    teacher_widths: tuple[int, ...] = ()  # of the features that supervise the last sub-codebooks

    def __post_init__(self):
        check(self.k >= 1, f"k is {self.k}; it must be at least 1")
        check(self.downsample.bit_count() == 1, f"downsample {self.downsample} is not a power of two")
        check(self.downsample % self.patch_size == 0,
              f"downsample {self.downsample} must be a multiple of patch_size {self.patch_size}")
        nearest_size = max(1, self.image_size // self.downsample) * self.downsample
        check(self.image_size == nearest_size,
              f"image_size {self.image_size} is not divisible by downsample {self.downsample}: {nearest_size} is")
        factor = self.downsample // self.patch_size
        self.channel_mult = tuple(self.channel_mult) or CHANNEL_MULTS.get(factor, ())
        self.pool = tuple(self.pool)
        self.teacher_widths = tuple(self.teacher_widths)
        check(len(self.channel_mult) == factor.bit_length() and min(self.channel_mult) >= 1,
              f"channel_mult {self.channel_mult} must name {factor.bit_length()} stages, by whole numbers")
        for name in ("channels", "adapter_width"):
            check(getattr(self, name) % self.norm_groups == 0,
                  f"{name} {getattr(self, name)} must be a multiple of norm_groups {self.norm_groups}")
        check(self.adapter_width % self.adapter_heads == 0,
              f"adapter_width {self.adapter_width} must be a multiple of adapter_heads {self.adapter_heads}")
        check(len(self.teacher_widths) <= self.k,
              f"{len(self.teacher_widths)} teachers are more than k={self.k} sub-codebooks")

    @property
    def grid(self):
        return self.image_size // self.downsample

# -----------------------------------------------------------------------------
# Transformer blocks, of the adapters and the GPT

def rotary_table(grid, head_dim, device):
    """
    The table (2, 1 + grid^2, head_dim) of rotate(): cosines, then sines, which for each pair are (-sin, sin). First
    comes the class token, then the grid's positions, row by row. The first half of the pairs turns by a position's row,
    the second by its column. The class token's cosines and sines are both 0, as in the official code: its query and key
    become 0, and so does every attention score with it.
    """
    frequency = 10000.0 ** (-torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2))  # (head_dim/4)
    angle = torch.arange(grid, device=device)[:, None] * frequency  # (grid, head_dim/4)
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

def conv_layout(x):
    """
    A map (B,C,h,w) in the memory layout that convolutions like: in training on a CPU channels last, up to a quarter
    faster. Not in encoding: GroupNorm loses digits in that layout, and images of one color would find other codes.
    """
    if x.device.type == "cpu" and torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()

class Attention(nn.Module):
    """Multi-head self-attention: (B, T, C) -> (B, T, C). In the GPT causal and rotary, in sampling also cached."""

    def __init__(self, width, heads, bias=True, causal=False):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.proj = nn.Linear(width, width, bias)

    def forward(self, x, rotary=None, cache=None, position=None, mask=None):
        """
        cache (2, B, heads, length, e) holds keys and values. With it x is one token, which writes its own key and value
        at `position` (1) and attends to the positions that mask (1, length) allows.
        """
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, e)
        q, k = qkv[:2] if rotary is None else rotate(qkv[:2], rotary)
        v = qkv[2]
        if cache is not None:
            cache[0].index_copy_(2, position, k.to(cache.dtype))  # the rotary table has made k float32
            cache[1].index_copy_(2, position, v.to(cache.dtype))
            k, v = cache
        dtype = v.dtype
        if x.device.type == "cpu" and torch.is_grad_enabled():
            # under bfloat16 the backward pass of PyTorch's CPU kernel takes several times as long
            dtype = torch.promote_types(dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            is_causal = self.causal and cache is None
            y = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, is_causal=is_causal)
        y = y.to(v.dtype).transpose(1, 2).reshape(B, T, C)
        return self.proj(y)

class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = 256 * math.ceil(int(8 * width / 3) / 256)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

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

    def __init__(self, width, depth, heads, num_positions, proj_in, class_token=False):
        super().__init__()
        scale = width**-0.5
        self.proj_in = proj_in
        self.class_embedding = nn.Parameter(scale * torch.randn(1, width)) if class_token else None
        self.pos_embed = nn.Parameter(scale * torch.randn(num_positions + class_token, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.Sequential()
        for _ in range(depth):
            attn = Attention(width, heads)
            nn.init.xavier_uniform_(attn.qkv.weight)  # as nn.MultiheadAttention, which the official code uses
            nn.init.zeros_(attn.qkv.bias)
            nn.init.zeros_(attn.proj.bias)
            self.blocks.append(Block(width, attn, MLP(width)))
        self.norm_post = nn.LayerNorm(width)

    def forward(self, x):
        h, w = x.shape[2:]
        x = self.proj_in(x.flatten(2).transpose(1, 2))  # (B, h*w, width), row by row
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1)
        x = self.blocks(self.norm_pre(x + self.pos_embed))
        x = self.norm_post(x)
        if self.class_embedding is not None:
            return x[:, 0]
        return conv_layout(x.transpose(1, 2).unflatten(2, (h, w)))

# -----------------------------------------------------------------------------
# Tokenizer: the convolutional encoder and decoder of VQGAN

class GroupNorm(nn.GroupNorm):
    def __init__(self, channels, config):
        super().__init__(config.norm_groups, channels, eps=1e-6)

    def forward(self, x):
        if x.device.type == "cpu":
            return super().forward(x)
        # keeps bfloat16 maps in bfloat16, where autocast would return float32; the statistics are float32 either way
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, config):
        super().__init__()
        self.norm1 = GroupNorm(c_in, config)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(c_out, config)
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
        self.norm = GroupNorm(channels, config)
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
    Doubles every pixel along both sides, then a 3x3 convolution; as one transposed convolution, with 4/9 of the
    multiplications. Along one side, with pixels x[i] and weights (a, b, c):

        out[2i]     = a x[i-1] + (b + c) x[i]
        out[2i + 1] = (a + b) x[i] + c x[i+1]

    So x[i] goes into out[2i-1] to out[2i+2] with the weights c, b + c, a + b, a. That is a transposed convolution of
    stride 2, whose kernel is (c, b, a, 0) + (0, c, b, a).
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        weight = self.conv.weight.transpose(0, 1).flip(2, 3)  # (C_in, C_out, 3, 3)
        weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
        weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))  # (C_in, C_out, 4, 4)
        return F.conv_transpose2d(x, conv_layout(weight), self.conv.bias, stride=2, padding=1)

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
        self.norm_out = GroupNorm(c_in, config)
        self.conv_out = nn.Conv2d(c_in, 3 * config.patch_size**2, 3, padding=1)
        self.patch = nn.PixelShuffle(config.patch_size)

    def forward(self, x):
        x = self.stages(self.mid(self.conv_in(x)))
        x = F.silu(self.norm_out(x))
        return self.patch(self.conv_out(x))

# -----------------------------------------------------------------------------
# Tokenizer: the whole

class Branch(nn.Module):
    """
    One sub-codebook's own part, section 3.2: shared features (B,C,h,w) -> vectors (B,d,h,w) for its quantizer. First
    the adapter, then what ends VQGAN's encoder: norm_out, conv_out, quant_conv. FQGAN calls quantizer and feature_head.
    """

    def __init__(self, c_in, config, pool, teacher_width):
        super().__init__()
        self.pool = pool
        positions = config.grid**2
        width = c_in
        self.adapter = nn.Identity()
        if config.adapter_depth:
            width = config.adapter_width
            proj_in = nn.Linear(c_in, width) if c_in != width else nn.Identity()
            self.adapter = ViT(width, config.adapter_depth, config.adapter_heads, positions, proj_in)
        self.norm_out = GroupNorm(width, config)
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
        z = self.quant_conv(self.conv_out(F.silu(h)))
        if self.pool > 1:  # not the paper's: a square of positions has one vector, the mean of theirs
            h, w = z.shape[2:]
            side = min(self.pool, max(h, w))
            squares = F.avg_pool2d(z, side, ceil_mode=True)
            z = F.interpolate(squares, scale_factor=side, mode="nearest-exact")[..., :h, :w]
        return z

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
        # teachers supervise the last sub-codebooks; the first ones have none: 0
        teacher_widths = (0,) * (config.k - len(config.teacher_widths)) + config.teacher_widths
        pools = (config.pool + (1,) * config.k)[:config.k]
        self.branches = nn.ModuleList()
        for pool, teacher_width in zip(pools, teacher_widths):
            self.branches.append(Branch(channels, config, pool, teacher_width))
        self.post_quant_conv = nn.Conv2d(config.k * config.codebook_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def encode_vectors(self, images):
        """images (B,3,H,W) -> what the k quantizers are given: a list of (B,d,h,w)"""
        c = self.config
        H, W = images.shape[-2:]
        check(not c.adapter_depth or H == W == c.image_size,
              f"images are {W}x{H}; the adapters' positions are for {c.image_size}x{c.image_size}")
        check(H % c.downsample == W % c.downsample == 0, f"images are {W}x{H}, not divisible by {c.downsample}")
        features = self.encoder(conv_layout(images))
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
        adds them, and counts the codes chosen: they are left in last_ids (B,k,h,w).
        """
        quantized = []
        chosen = []
        losses = {}
        for branch, z in zip(self.branches, self.encode_vectors(images)):
            z_q, ids, branch_losses = branch.quantizer(z)
            quantized.append(z_q)
            chosen.append(ids)
            for name, loss in branch_losses.items():
                losses[name] = losses.get(name, 0) + loss
        self.last_ids = torch.stack(chosen, 1)
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
    num_classes: int = 1000  # without the null class, which stands for "no class given"
    grid: int = 16  # positions along each side of the image
    n_layer: int = flag(24, "blocks of the trunk", at_least=1)
    n_head: int = flag(16, "attention heads", at_least=1)
    n_embd: int = flag(1024, "width", at_least=1)
    head_layers: int = flag(3, "blocks of the head over the k codes of a position; 0 for k linear classifiers")
    dropout: float = flag(0.1, "dropout on the trunk's input and on the output of every attention and MLP")
    label_dropout: float = flag(0.1, "share of labels replaced by the null class in training, for guidance")
    class_everywhere: bool = flag(False, "add the class to the trunk's input at every position")

    def __post_init__(self):
        check(self.n_embd % (4 * self.n_head) == 0,
              f"n_embd {self.n_embd} must be a multiple of 4 x n_head {self.n_head}: rotary pairs for rows and columns")
        check(max(self.dropout, self.label_dropout) < 1, "dropout and label_dropout must be below 1")
        check(self.grid <= 256, f"grid is {self.grid}; it must be at most 256")
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

        # initialization: with outputs of 0, the loss starts at ln(vocab_size); norms stay at 1
        for name, p in self.named_parameters():
            if name.startswith("outputs") or name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def block(self):
        c = self.config
        attn = Attention(c.n_embd, c.n_head, bias=False, causal=True)
        mlp = SwiGLU(c.n_embd)
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
        rotary = rotary_table(c.grid, c.n_embd // c.n_head, x.device)  # float32, whatever the weights are
        for block in self.trunk:
            x = block(x, rotary=rotary[:, :P])

        # head: the trunk's output, then every code of the position but the last
        if self.head:
            x = torch.stack([x, *embedded[:-1]], 2).flatten(0, 1)  # (B*P, k, D)
            for block in self.head:
                # rows 0 to k-1 of the trunk's table, as in the official code: row 0, of zeros, is the trunk's output's
                x = block(x, rotary=rotary[:, :k])
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
    def generate(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_power=0.0):
        """
        labels (B,) -> ids (B,k,h,w), sampled code by code with cached keys and values. Each of the five
        sampling parameters is one number, or k of them. cfg_scale 1 is no guidance, which takes half the
        time; temperature 0 takes the likeliest code; top_k 0 and top_p 1 leave all codes in. Where a
        share t of the positions is done, the guidance is 1 + (cfg_scale - 1) (p + 1) t^p, p being
        cfg_power: constant for 0, growing for more, in the mean about cfg_scale. Linear growth is Muse's,
        https://arxiv.org/abs/2301.00704, though there cfg_scale is the last value.
        """
        c = self.config
        B = len(labels)
        check(bool(((0 <= labels) & (labels <= c.num_classes)).all()),
              f"labels must be from 0 to {c.num_classes} (the last for no class)")
        cfg_scale = self.one_for_each_code("cfg_scale", cfg_scale)
        temperature = self.one_for_each_code("temperature", temperature)
        top_k = self.one_for_each_code("top_k", top_k)
        top_p = self.one_for_each_code("top_p", top_p)
        cfg_power = self.one_for_each_code("cfg_power", cfg_power)
        check(0 < min(top_p) and max(top_p) <= 1, f"top_p is {top_p}; it must be in (0, 1]")
        was_training = self.training
        self.eval()

        guided = any(scale != 1 for scale in cfg_scale)
        if guided:  # the first half of every batch below is with the class, the second without
            labels = torch.cat([labels, torch.full_like(labels, c.num_classes)])
        head_dim = c.n_embd // c.n_head
        rotary = rotary_table(c.grid, head_dim, labels.device)
        class_token = self.class_embedding(labels)[:, None]
        x = class_token.clone()  # the trunk's input (B or 2B, 1, D), which every step replaces
        # step() below changes these tensors in place, and none of them grows: so repeat() can record it on a GPU
        trunk_caches = [x.new_zeros(2, len(x), c.n_head, c.grid**2, head_dim) for _ in self.trunk]
        # not cleared from one position to the next: the mask hides what the last position has left
        head_caches = [x.new_zeros(2, len(x), c.n_head, c.k, head_dim) for _ in self.head]
        ids = labels.new_empty(B, c.k, c.grid**2)
        position = labels.new_zeros(1)
        places = torch.arange(c.k, device=x.device)  # in the head
        head_mask = places <= places[:, None]
        all_finite = torch.ones((), dtype=torch.bool, device=labels.device)
        done = torch.linspace(0, 1, c.grid**2, device=x.device)  # the share of positions done, at each
        guidance = [1 + (scale - 1) * (power + 1) * done**power for scale, power in zip(cfg_scale, cfg_power)]

        def step():
            """All codes of a position."""
            # the trunk takes one step
            h = x
            turn = rotary.index_select(1, position)
            mask = torch.arange(c.grid**2, device=x.device)[None] <= position
            for block, cache in zip(self.trunk, trunk_caches):
                h = block(h, rotary=turn, cache=cache, position=position, mask=mask)
            trunk_output = h

            # the head takes k, each given the code before it
            embedded = []
            for i in range(c.k):
                h = embedded[-1] if self.head and i > 0 else trunk_output  # without a head, all from the trunk
                place = slice(i, i + 1)
                for block, cache in zip(self.head, head_caches):
                    h = block(h, rotary=rotary[:, place], cache=cache, position=places[place], mask=head_mask[place])
                logits = self.outputs[i](self.norm(h))[:, 0].float()  # (B or 2B, vocab_size)
                if guided:
                    logits, null = logits.chunk(2)
                    if cfg_scale[i] != 1:
                        logits = null + guidance[i].index_select(0, position) * (logits - null)
                all_finite.logical_and_(logits.isfinite().all())
                code = sample_token(logits, temperature[i], top_k[i], top_p[i], generator)
                ids[:, i].index_copy_(1, position, code[:, None])
                embedded.append(self.token_embeddings[i](code.repeat(2 if guided else 1))[:, None])

            # the next input of the trunk
            tokens = self.token_proj(torch.cat(embedded, -1))
            x.copy_(tokens + class_token if c.class_everywhere else tokens)
            position.add_(1)

        repeat(step, c.grid**2, x.device, generator)
        self.train(was_training)
        check(all_finite, f"the logits are not finite in {x.dtype}: sample with another --dtype, such as float32")
        return ids.unflatten(2, (c.grid, c.grid))

    def one_for_each_code(self, name, value):
        """A sampling parameter, given as one number or k of them, as a list of k."""
        k = self.config.k
        values = list(value) if isinstance(value, (list, tuple)) else [value] * k
        check(len(values) == k, f"{name} has {len(values)} values; give one, or {k}, one for each code of a position")
        check(all(0 <= v < 1e30 for v in values), f"{name} is {value}; it must be a finite number of at least 0")
        return values

def repeat(step, times, device, generator=None):
    """
    Calls step(), which changes tensors in place. On a GPU its second call is recorded as a CUDA graph, whose kernels
    are launched together from then on: one after the other, they would wait for Python.
    """
    if device.type != "cuda":
        for _ in range(times):
            step()
        return
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    step()
    with torch.cuda.graph(graph):  # records the kernels without running them: replay() does
        step()
    for _ in range(times - 1):
        graph.replay()

def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B, V) -> ids (B,): temperature, then top-k, then top-p, which keeps the id that crosses p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / max(temperature, 1e-5)  # less would overflow
    if 1 <= top_k < logits.shape[-1]:
        top, indices = logits.topk(int(top_k))  # exactly k of them, also where logits are equal
        logits = torch.full_like(logits, -math.inf).scatter(-1, indices, top)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        p_before = p.cumsum(-1) - p
        ordered = ordered.masked_fill(p_before > top_p, -math.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    # with E ~ Exp(1) for every id, the argmax of p / E is id j with probability p_j (Gumbel-max without logarithms);
    # torch.multinomial does the same, but waits for the GPU
    p = logits.softmax(-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)

# -----------------------------------------------------------------------------
# Networks that only the tokenizer's training needs

class PerceptualDistance(nn.Module):
    """Images (B,3,H,W) in [-1,1] twice -> (B,): the squared distance of their features, averaged over positions."""

    def forward(self, images, others):
        distance = 0
        for (a, weight), (b, _) in zip(self.feature_maps(images), self.feature_maps(others)):
            difference = (a - b).square() * weight
            distance = distance + difference.sum(1).mean((1, 2))
        return distance

class LPIPS(PerceptualDistance):
    """
    The distance in VGG-16's features after five of its ReLUs, of unit length at each position, weighted by channel.
    Frozen, and without dropout. vgg: torchvision's VGG-16 weights, lin: LPIPS v0.1's; fetched once when not given;
    UserError where they cannot be had. Source: Zhang et al., https://arxiv.org/abs/1801.03924, equation 1.
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
        load_weights(self.features, cached_download(*self.vgg_file, local=vgg), r"features\.(.+)")
        load_weights(self.lin, cached_download(*self.lin_file, local=lin), r"lin(\d)\.model\.1\.(weight)")
        self.eval().requires_grad_(False)

    def feature_maps(self, images):
        """Yields the five feature maps (B,C,h,w), each with the weights of its channels."""
        weights = iter(self.lin)
        x = conv_layout(self.normalize(images))
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.layers:
                yield F.normalize(x.float(), dim=1, eps=1e-10), next(weights).weight

class RandomFeatures(PerceptualDistance):
    """
    LPIPS without a download: the distance in the features of four convolutions with random weights, always the same,
    each normalized by the statistics of its batch. This project's own.
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
        x = conv_layout(images)
        for conv in self.convs:
            x = F.batch_norm(conv(x), None, None, training=True)
            x = F.leaky_relu(x, 0.2)
            yield F.normalize(x.float(), dim=1), 1

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

def load_teacher(path):
    """
    A frozen module, images (B,3,H,W) in [-1,1] -> features (B,D), from a TorchScript (.pt) or torch.export (.pt2) file
    saved on any device. UserError where it cannot be read.
    """
    path = Path(path)
    command = shlex.join(["python", "tools/convert.py", path.stem, str(path)])
    check(path.is_file(), f"no network at {path}; CLIP's and DINOv2's are made by `{command}`")
    try:
        with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
            if path.suffix == ".pt2":
                teacher = torch.export.load(path).module()
                # it asserts the types and the device that it was exported with
                for module in filter(lambda m: isinstance(m, torch.fx.GraphModule), teacher.modules()):
                    for node in module.graph.nodes:
                        if node.target == torch.ops.aten._assert_tensor_metadata.default:
                            module.graph.erase_node(node)
                    module.recompile()
            else:
                teacher = torch.jit.load(path, map_location="cpu").float().eval()
    except Exception as error:
        raise UserError(f"{path} is no TorchScript or torch.export file ({one_line(error)})") from None
    for p in teacher.parameters():  # TorchScript has no requires_grad_ for the whole
        p.requires_grad_(False)
    return teacher

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
        (255, 226, 178), (178, 214, 250), (190, 234, 186), (250, 190, 200), (214, 192, 246), (212, 212, 212)]

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
    """Any PIL image of 8 bits as upright RGB: transparency is laid on white."""
    image.load()
    image.getexif()
    image.info.pop("exif", None)  # the orientation has been read; exif_transpose would fail on other, damaged tags
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 12 bits in 16, for example; PIL's own conversion would clip at 255
        raise ValueError(f"its values (mode {image.mode}) have no known range; save 8 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")

def resize_shorter(image, short):
    """Scales the shorter side to `short` as ADM (https://arxiv.org/abs/2105.05233): halved by boxes, then bicubic."""
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
    """
    A square of 0.8 to 1.0 of the shorter side, mirrored half the time. A small image is not enlarged for it: there the
    share is nearer to 1.
    """
    largest = min(math.ceil(size / 0.8), *image.size)
    image = resize_shorter(image, rng.randint(size, max(size, largest)))
    left = rng.randint(0, image.width - size)
    top = rng.randint(0, image.height - size)
    crop = image.crop((left, top, left + size, top + size))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop

def to_uint8(images):
    """[-1, 1] to 0..255, as the official scripts write images: fractions are cut off"""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)

def from_uint8(images):
    """0..255 to [-1, 1]"""
    return images.float() / 127.5 - 1

IMAGE_ENDINGS = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".avif")
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")

def normalize_unicode(name):
    """A name as it is typed: macOS takes letters like é apart."""
    return unicodedata.normalize("NFC", name)

def without_hidden(names):
    names = sorted(names, key=normalize_unicode)
    return [name for name in names if not name.startswith(".") and name not in SYSTEM_FOLDERS]

def visible_folders(path):
    return [name for name in without_hidden(os.listdir(path)) if os.path.isdir(os.path.join(path, name))]

def visible_files(path):
    """Yields all files below a folder. Links to folders inside it are not followed: they may be cycles."""
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = without_hidden(subfolders)
        for name in without_hidden(files):
            yield os.path.join(folder, name)

def is_image(path):
    return path.lower().endswith(IMAGE_ENDINGS)

class Folder(torchvision.datasets.DatasetFolder):
    """
    (PIL image, label) of a folder of class folders, with images at any depth; or of a flat folder, which is one class
    (its folder is "", the root itself). A folder without images is no class.
    """

    def __init__(self, root):
        super().__init__(root, Image.open)
        check(self.samples, f"{root} holds no image (looked for .jpg, .jpeg, .png, .webp, ...)")

    def find_classes(self, root):
        folders = []
        for name in visible_folders(root):
            folder = os.path.join(root, name)
            leads_up = Path(root).resolve().is_relative_to(Path(folder).resolve())  # a link to where we are
            if not leads_up and any(map(is_image, visible_files(folder))):
                folders.append(name)
        if folders:
            return [normalize_unicode(name) for name in folders], {name: i for i, name in enumerate(folders)}
        return ["images"], {"": 0}

    def make_dataset(self, root, class_to_idx, **_):
        samples = []
        self.num_others = 0  # files that are not taken
        if "" not in class_to_idx:
            self.num_others = sum(os.path.isfile(os.path.join(root, name)) for name in without_hidden(os.listdir(root)))
        for folder, label in class_to_idx.items():
            files = list(visible_files(os.path.join(root, folder)))
            images = [(path, label) for path in files if is_image(path)]
            samples += images
            self.num_others += len(files) - len(images)
        return samples

class ImageData(torch.utils.data.Dataset):
    """
    A data set of (image (3,H,W) in [-1, 1], label int), center crops; `description` says what it is.

    An image that cannot be read is named once on stderr, and the next one takes its place; UserError if they are more
    than ten and 1 %, or all.
    """

    def __init__(self, source, image_size, description):
        self.source = source
        self.classes = source.classes
        self.image_size = image_size
        self.description = f"{description}: {len(source)} images"
        if self.classes:
            self.description += f" of {len(self.classes)} classes"
        self.max_failed = max(10, len(source) // 100)
        self.failed = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # shared with loader processes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.read(index)
        crop = center_crop(image, self.image_size)
        return from_uint8(TF.pil_to_tensor(crop)), label

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
            if self.failed.sum() > self.max_failed:
                break
        raise UserError(f"{self.failed.sum()} images of {self.description} cannot be read: too many, see above")

@functools.lru_cache(maxsize=2)
def epoch_order(size, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(size)

Draw = namedtuple("Draw", "index seed")  # which image, and the seed of its random crop or view

def training_batches(size, seed, first_step, steps, batch_size, accumulate):
    """
    Yields this rank's micro-batches of a set of `size` images, `accumulate` of them a step: lists of Draw. Training is
    one long stream of images, epoch after epoch, each in an order of its own. A step's part of it depends on seed and
    step alone, so that a run can be resumed at any step, on any number of ranks.
    """
    for step in range(first_step, steps):
        draws = []
        for stream_position in range(step * batch_size + rank(), (step + 1) * batch_size, world_size()):
            epoch, i = divmod(stream_position, size)
            draws.append(Draw(int(epoch_order(size, seed, epoch)[i]), f"{seed} {stream_position}"))
        micro_size = len(draws) // accumulate
        for i in range(0, len(draws), micro_size):
            yield draws[i:i + micro_size]

BUILT_IN = ("shapes", "cifar10", "cifar100")  # a folder of such a name is given as ./cifar10

def load_data(name_or_path, image_size, train):
    """
    The ImageData of "shapes"; of "cifar10" or "cifar100", downloaded into torch.hub's cache; or of a folder of class
    folders or images.

    A folder that holds `train` and `val` (or the like) has these two parts; one of `val` alone, the held-out part. Of
    any other about one image in ten is held out, by a hash of its name, so that a file that comes or goes moves no
    other. If that leaves a part empty, both are the whole.
    """
    part = "training part" if train else "held-out part"
    name = str(name_or_path)
    if name == "shapes":
        return ImageData(Shapes(image_size, train), image_size, f"shapes, {part}")
    if name not in BUILT_IN:
        path = Path(os.path.expanduser(name))
        check(name and path.exists(), f"--data {name}: no such folder; or choose {', '.join(BUILT_IN)}")
        return load_folder(path, image_size, train)
    make = getattr(torchvision.datasets, name.upper())
    try:
        with rank0_first():
            source = make(Path(torch.hub.get_dir()) / "datasets", train, download=True)
    except Exception as error:
        raise UserError(f"--data {name}: cannot be downloaded ({one_line(error)}); give a folder") from None
    return ImageData(source, image_size, f"torchvision's {make.__name__}, {part}")

def load_folder(path, image_size, train):
    check(path.is_dir(), f"{path} is a file; --data takes a folder of images, or of class folders")
    folders = {name.lower(): path / name for name in visible_folders(path)}
    training = [folders[name] for name in ("train", "training") if name in folders]
    held_out = [folders[name] for name in ("val", "valid", "validation", "test") if name in folders]
    if training or held_out:
        held_out_alone = len(held_out) == len(folders)  # is enough where nothing is trained
        check(held_out and (training or held_out_alone and not train),
              f"{path} holds one of train and val: name its two parts so, or rename the class")
        path = training[0] if train else held_out[0]
        source = Folder(path)
        part = "all of it"
    else:
        source = Folder(path)
        is_held_out = [held_out_by_name(os.path.relpath(image, path)) for image, _ in source.samples]
        part = "all of it: too few to hold any out"
        if 0 < sum(is_held_out) < len(is_held_out):
            part = "all but about every tenth, by name" if train else "about every tenth, by name"
            source.samples = [s for s, is_out in zip(source.samples, is_held_out) if is_out == (not train)]
    description = f"{path}, {part}"
    if source.num_others:
        description += f", without {source.num_others} other files"
    return ImageData(source, image_size, description)

def held_out_by_name(name):
    """True for about one name in ten, whatever other files there are."""
    digest = hashlib.sha256(os.fsencode(normalize_unicode(name).replace(os.sep, "/"))).digest()
    return int.from_bytes(digest[:4]) % 10 == 0

def load_train_and_held_out(name, image_size):
    """Both parts of load_data. UserError where their classes differ."""
    train, held_out = [load_data(name, image_size, is_train) for is_train in (True, False)]
    check(train.classes == held_out.classes, f"--data {name}: its two parts have different class folders")
    return train, held_out

# -----------------------------------------------------------------------------
# Checkpoints

def load_tokenizer(path, device="cpu"):
    """A trained FQGAN in eval mode."""
    return build_model(FQGAN, FQGANConfig, load_checkpoint(path, "tokenizer"), path, device)

def load_gpt(path, device="cpu"):
    """A trained GPT in eval mode."""
    return build_model(GPT, GPTConfig, load_checkpoint(path, "gpt"), path, device)

def load_checkpoint(path, kind):
    """The dict that train_tokenizer.py ("tokenizer") or train_gpt.py ("gpt") saved; UserError for any other file."""
    check(Path(path).is_file(), f"no {kind} checkpoint at {path}: `python train_{kind}.py` makes one")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold one, of plain values
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # its message is pages long, and advises to load without weights_only
        raise UserError(f"{path} cannot be read as a checkpoint: it is damaged, cut off, or something else") from None
    found = contents.get("kind") if isinstance(contents, dict) else None
    command = shlex.join(["python", "tools/convert.py", str(path), f"{kind}.pt"])
    check(found, f"{path} is not a {kind} checkpoint; a published one is turned into ours by `{command}`")
    check(found == kind, f"{path} is not a {kind} checkpoint but a {found}'s")
    return contents

def build_model(model_class, config_class, state, path, device="cpu"):
    """The model of a checkpoint, or of the tokenizer inside a GPT's, in eval mode."""
    try:
        config = state["config"]
        is_plain = config and all(isinstance(value, (int, float, str, list, tuple)) for value in config.values())
        check(is_plain, "it has no config of plain values")
        config = config_class(**config)
        sizes = ("k", "n_layer", "head_layers", "adapter_depth", "res_blocks")
        num_blocks = sum(getattr(config, name, 0) for name in sizes)
        check(num_blocks <= len(state["model"]), "its config describes more blocks than it has weights")
        with torch.device("meta"):  # no weights are drawn in vain, and absurd sizes take no memory
            model = model_class(config)
        model.load_state_dict(state["model"], assign=True)
    except Exception as error:
        raise UserError(f"{path} does not fit this version of the code: weights and config disagree, or it was written "
                        f"by an older version ({one_line(error)})") from None
    return model.float().to(device).eval()

def save_checkpoint(path, contents):
    """Writes a file that is whole or not there: until it is, the last one stays."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with open(tmp, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:
        tmp.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {one_line(error)}; the last checkpoint is kept") from None

def cached_download(url, sha256, local=None):
    """The path of `local`, or of a copy in torch.hub's cache, downloaded unless its SHA-256 begins as given."""
    if local:
        check(Path(local).is_file(), f"no file at {local}; what belongs there is {url}")
        return Path(local)
    path = Path(torch.hub.get_dir()) / "checkpoints" / "-".join(url.split("/")[-2:])
    with rank0_first():
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
    """Loads a file's tensors whose names match the pattern. Its groups, joined by dots, are their names in `module`."""
    try:
        state = {}
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
            if match := re.fullmatch(pattern, name):
                state[".".join(match.groups())] = tensor
        module.load_state_dict(state)
    except Exception as error:
        raise UserError(f"{path} does not hold the weights that belong there ({one_line(error)})") from None

def one_line(error):
    """The kind of an exception and the beginning of its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

# -----------------------------------------------------------------------------
# Running: what the scripts share

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
    except (UserError, OSError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        message = lines[-1]  # an error of a loader process is a traceback that ends with its message
    except (RuntimeError, MemoryError) as error:
        if "shared memory" in str(error):
            message = "loader processes need more shared memory than /dev/shm has: enlarge it, or give --workers 0"
        elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            message = ("out of memory: give a smaller --batch-size, or in training a larger --accumulate "
                       "(or a tokenizer's --recompute)")
        elif "loading state_dict" in str(error):  # of a resumed run
            message = f"the checkpoint does not fit this version of the code, or other teachers ({one_line(error)})"
        else:
            raise
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise another error
        for process in multiprocessing.active_children():  # loaders, for which Python would wait
            process.kill()
    sys.exit(f"{Path(sys.argv[0]).name}: {message.removeprefix('fqgan.UserError: ')}")

ENDING_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

def ignore_signals(worker_id):
    """For loader processes, which get the same signals as the main one: they must work on while it ends its step."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

def catch_signals():
    """-> a list to which Ctrl-C, and the signals that end a job, are added from now on. A second one ends at once."""
    caught = []

    def on_signal(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    for number in ENDING_SIGNALS:
        # what nohup ignores stays ignored; but not SIGINT, which shells ignore for all they start in the background
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, on_signal)
    return caught

class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")

def int_tuple(text):
    return tuple(int(n) for n in text.split(",") if n)

def parse_flags(doc, presets, *config_classes):
    """Reads --preset and a flag for each field made by flag() -> those that are given, a dict."""
    parser = Parser(doc)
    parser.argument_default = argparse.SUPPRESS  # flags that are not given are left out
    first = next(iter(presets))
    parser.add_argument("--preset", choices=presets, help=f"values of flags that are not given (default: {first})")
    with_flag = [f for f in sum(map(fields, config_classes), ()) if f.metadata]
    for f in with_flag:
        shown = "; ".join(f"{preset}: {values.get(f.name, f.default)}" for preset, values in presets.items())
        help = f"{f.metadata['help']} ({shown})".replace("%", "%%")
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": f.type if f.type in (int, float, str) else int_tuple}
        parser.add_argument("--" + f.name.replace("_", "-"), help=help, **kind)
    flags = vars(parser.parse_args())
    for f in with_flag:
        if f.type in (int, float) and f.name in flags:
            check(f.metadata["at_least"] <= flags[f.name] < math.inf,
                  f"--{f.name.replace('_', '-')} is {flags[f.name]}; it must be at least {f.metadata['at_least']}")
    return flags

def from_settings(config_class, settings):
    """A config filled from a dict that holds more."""
    return config_class(**{f.name: settings[f.name] for f in fields(config_class) if f.name in settings})

RESUME_FLAGS = {"resume", "out", "steps", "device", "workers", "log_every", "eval_every", "compile"}

def resumed_settings(state, path, flags):
    """The settings of the run in a checkpoint, and over them the few that a resumed run may change."""
    check("settings" in state, f"{path} holds weights, not a run: it cannot be resumed")
    for name in flags:
        check(name in RESUME_FLAGS,
              f"--{name.replace('_', '-')} does not go with --resume, which takes it from {path}")
    settings = state["settings"] | state["config"] | flags
    check(state["step"] < settings["steps"],
          f"{path} is already at step {state['step']} of {settings['steps']}; to go on, give a larger --steps")
    return settings

def lock_output(path, must_be_new):
    """
    Makes the folder of a checkpoint and locks it, so that no other run writes there until this process ends, however it
    ends. UserError if another run holds the lock, or if there is a checkpoint although the run must be new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        lock = os.open(path.with_name(f".{path.stem}.lock"), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {path}: name another --out") from None
        except OSError as error:  # of file systems without locks
            print0(f"{path} cannot be locked ({one_line(error)}): see that no other run writes there")
    check(not must_be_new or not path.exists(),
          f"{path} exists: --resume continues that run, --overwrite replaces it, --out FOLDER leaves it alone")

def refuse_output_inside_data(out, data):
    """Refuses to write into a folder whose images are read: what is written would become data."""
    folder = Path(os.path.expanduser(data or "")).resolve()
    check(not data or data in BUILT_IN or not folder.is_dir() or not Path(out).resolve().is_relative_to(folder),
          f"{out} lies in {data}, where the images are: choose another place for what is written")

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def setup_device(device="auto"):
    """Every script's start -> the device. Joins torchrun's process group, and sets how exactly PyTorch computes."""
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device).item()
    except Exception as error:
        raise UserError(f"--device {device}: not usable here ({one_line(error)})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    torch.backends.cudnn.allow_tf32 = False  # float32 in full: codes and metrics depend on it
    torch.set_float32_matmul_precision("highest")  # some containers' environment says otherwise
    torch.set_flush_denormal(True)  # CPUs take a hundred times as long over the softmax's tiniest numbers
    return device

def barrier():
    if dist.is_initialized():
        dist.barrier()

@contextlib.contextmanager
def rank0_first():
    """What is done with it rank 0 does before the others, which then find, for example, what it has downloaded."""
    try:
        if rank() > 0:
            barrier()
        yield
    finally:
        if rank() == 0:
            barrier()

def all_reduce(tensor):
    """Adds up a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def on_any_rank(value, device):
    """Whether it is true on one rank at least: a signal may reach one before another."""
    return all_reduce(torch.tensor(float(bool(value)), device=device)).item() > 0

def gather_on_rank0(item):
    """What each rank gives, as a list on rank 0; an empty list on the others."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size() if rank() == 0 else None
    dist.gather_object(item, items)
    return items or []

def print0(*words):
    """Prints on rank 0. A run goes on without its output when that fails: a closed pipe, a full disk."""
    if rank() == 0:
        try:
            print(*words, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

@contextlib.contextmanager
def warn_if_unwritable(path):
    """Yields the path of a picture or a log. If it cannot be written, a line says so, and the run goes on."""
    try:
        yield path
    except OSError as error:
        print0(f"{path} cannot be written ({one_line(error)}); the run goes on")

def pick_dtype(name, device):
    """A dtype by name; "auto": bfloat16 where it is faster than float32 (emulated it is several times slower)."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    check(name == "auto" or name in dtypes, f"--dtype {name}: choose {', '.join(dtypes)} or auto")
    if name != "auto":
        return dtypes[name]
    is_fast = False
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # PyTorch 2.9 has none
        is_intel = "Intel" in cpu.get("cpu_name", "")  # without AMX its float32 is nearly twice as fast as its bfloat16
        is_fast = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and not is_intel)
    return torch.bfloat16 if is_fast else torch.float32

def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

def lr_factor(step, args):
    """What the learning rates are multiplied with at a step: linear warm-up, cosine decay."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.final_lr + (1 - args.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

def check_compiler():
    """Without one torch.compile fails in the first step, in a hundred lines."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    check(shutil.which(name), f"--compile needs a C++ compiler, and there is no {name}: install it, or set CXX")

def append_row(path, row):
    """Adds a row, a dict, to a .csv file, which begins with the names of its columns."""
    with warn_if_unwritable(path), open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(row)
        values = [value if value is None or isinstance(value, int) else f"{value:.6g}" for value in row.values()]
        writer.writerow(values)

def shuffled_range(n):
    """range(n) in a random order, which is always the same: folders come class by class."""
    return np.random.default_rng(0).permutation(n).tolist()

def batches_of_this_rank(total, batch_size):
    """This rank's share of range(total), in ranges: all ranks together have each number once."""
    batches = [range(i, min(i + batch_size, total)) for i in range(0, total, batch_size)]
    return batches[rank()::world_size()]

def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

def psnr(images, others):
    """(B,3,H,W) in [-1,1] twice -> (B,) peak signal-to-noise ratio in dB, of the images in 8 bits"""
    difference = to_uint8(images).float() - to_uint8(others).float()
    error = difference.square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1e-4))

def code_usage(counts):
    """
    counts (..., V), how often each code was chosen -> (usage, perplexity), each (...). Usage is the number of different
    codes chosen / min(V, n), since n choices cannot reach more than n codes.
    """
    counts = counts.cpu().double()  # not every device has float64
    total = counts.sum(-1, keepdim=True)
    reachable = total[..., 0].clamp(min=1, max=counts.shape[-1])
    perplexity = torch.special.entr(counts / total.clamp(min=1)).sum(-1).exp()
    return (counts > 0).double().sum(-1) / reachable, perplexity

def save_grid(path, rows):
    """Draws rows of (label, images (n,3,H,W) in [-1,1]), enlarged by a whole factor to 96 pixels or more."""
    height, width = rows[0][1].shape[2:]
    zoom = math.ceil(96 / width)
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
    """For save_grid: images, what the first sub-codebooks draw, one more a row, and what the others draw alone."""
    k = tokenizer.config.k
    ids = tokenizer.encode(images)
    rows = [("original", images)]
    for i in range(1, k):
        name = "1 alone" if i == 1 else f"1 to {i}"
        rows.append((name, tokenizer.decode(ids, only=range(i))))
    rows.append((f"all {k}" if k > 1 else "reconstruction", tokenizer.decode(ids)))
    for i in range(1, k):
        rows.append((f"{i + 1} alone", tokenizer.decode(ids, only=[i])))
    return rows
