"""
Turns files that others have published into this project's, once.

$ python tools/convert.py fqgan_dual_ds16.pt out/dual16/tokenizer.pt              # FQGAN's and LlamaGen's tokenizers
$ python tools/convert.py c2i_L_384.pt out/llamagen/gpt.pt --grid 24              # FAR's and LlamaGen's GPTs
$ python tools/convert.py dinov2_vits14 teachers/dinov2_vits14.pt2                # CLIP's and DINOv2's networks
$ python tools/convert.py clip_vitb16 teachers/clip_vitb16.pt2 --weights ViT-B-16.pt

Tokenizers and GPTs are told apart by the names of their weights. A GPT's file holds no tokenizer: give the tokenizer's
to sample.py with --tokenizer. --grid is for GPTs that do not say how many positions a side has; 16 is assumed.
Networks are fetched once, unless a local file is named; they become torch.export files that take any number of images.
"""

import argparse
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fqgan import (
    FQGAN, FQGANConfig, GPT, GPTConfig, MLP, Parser, UserError, ViT, build_model, check, cli, cached_download, one_line,
    save_checkpoint)

# -----------------------------------------------------------------------------
# Names: each table gives pieces of the published names, and ours

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

# -----------------------------------------------------------------------------
# Tokenizers and GPTs

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

def published_gpt(state, args, grid):
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
        grid=grid, n_head=32 if width == 3200 else width // 64)  # LlamaGen-3B's heads have 100 channels, all others' 64
    if hasattr(args, "downsample_size"):
        config["grid"] = int(args.image_size) // int(args.downsample_size)
    return {"kind": "gpt", "config": config, "model": state}

def convert_checkpoint(path, out, grid):
    """A published tokenizer or GPT -> our checkpoint"""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # they hold one, of plain values
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise UserError(f"{path} cannot be read: it is damaged, cut off, or something else") from None
    contents = contents if isinstance(contents, dict) else {}
    check("kind" not in contents, f"{path} is one of ours already")
    state = contents
    for name in ("state_dict", "module", "model", "ema"):  # the last that is there
        if isinstance(contents.get(name), dict):
            state = contents[name]
    weights = {}
    for name, tensor in state.items():
        name = re.sub(r"^((module|_orig_mod)\.)+", "", str(name))  # prefixes of DDP and torch.compile
        if not re.search("codebook_used|freqs_cis|kv_cache|causal_mask", name):
            weights[name] = tensor
    is_tokenizer = "encoder.conv_in.weight" in weights and "post_quant_conv.weight" in weights
    check("cls_embedding.cap_proj.fc1.weight" not in weights,
          f"{path} is a text-conditional GPT; only class-conditional ones are supported")
    check(is_tokenizer or "cls_embedding.embedding_table.weight" in weights,
          f"{path} is no tokenizer or GPT as FQGAN's and LlamaGen's authors publish them")
    try:
        if is_tokenizer:
            state = published_tokenizer(weights)
        else:
            state = published_gpt(weights, contents.get("args"), grid)
    except Exception as error:
        raise UserError(f"{path} looks like a published checkpoint, but cannot be used ({one_line(error)})") from None
    classes = (FQGAN, FQGANConfig) if is_tokenizer else (GPT, GPTConfig)
    model = build_model(*classes, state, path)
    save_checkpoint(out, state | {"config": asdict(model.config)})
    print(f"{out}: {asdict(model.config)}")

# -----------------------------------------------------------------------------
# Teachers

class QuickMLP(MLP):
    """With CLIP's activation."""

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))

class Teacher(ViT):
    """CLIP's or DINOv2's vision transformer: images (B,3,H,W) in [-1,1] -> class token (B,width)."""

    def __init__(self, width, depth, patch_size, grid, clip):
        super().__init__(width, depth, width // 64, grid**2, nn.Identity(), class_token=True)
        self.image_size = grid * patch_size
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size, bias=not clip)
        if clip:
            self.norm_post = nn.Identity()  # FQGAN takes CLIP's class token before the final norm
            for block in self.blocks:
                block.mlp = QuickMLP(width)
            mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        else:
            self.norm_pre = nn.Identity()
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-6
            mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images):
        images = F.interpolate(images, self.image_size, mode="nearest") / 2 + 0.5  # as the official code resizes
        patches = self.patch_embed((images - self.mean) / self.std)
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

def convert_teacher(name, out, weights):
    """A published network, from the local file `weights` or fetched -> a torch.export file"""
    check(out.suffix == ".pt2", f"{out}: the name of a network must end in .pt2")
    path = cached_download(*TEACHERS[name], local=weights)
    is_clip = name.startswith("clip")
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except RuntimeError:  # OpenAI's files are TorchScript archives
            state = torch.jit.load(path, map_location="cpu").state_dict()
        state = clip_weights(state) if is_clip else dinov2_weights(state)
        width, _, patch_size, _ = state["patch_embed.weight"].shape
        depth = count(state, r"blocks\.(\d+)")
        teacher = Teacher(width, depth, patch_size, math.isqrt(len(state["pos_embed"])), is_clip)
        teacher.load_state_dict(state)
    except Exception as error:
        raise UserError(f"{path} does not hold {name} ({one_line(error)})") from None
    any_batch = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(teacher.eval(), (torch.zeros(2, 3, 256, 256),), dynamic_shapes=(any_batch,))
    tmp = out.with_name(f".{out.name}")
    torch.export.save(program, tmp)
    tmp.replace(out)
    print(f"{out}: images (B,3,H,W) in [-1,1] -> features (B,{width})")

# -----------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", metavar="IN", help=f"a published file, or one of {', '.join(TEACHERS)}")
    add("out", metavar="OUT", type=Path, help="what is written")
    add("--weights", metavar="FILE", help="a network's weights (default: fetched once)")
    add("--grid", type=int, default=16, help="positions along a side, where a GPT's file does not say (default: 16)")
    args = parser.parse_args()
    check(not args.out.exists(), f"{args.out} exists: name another file")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.source in TEACHERS:
        convert_teacher(args.source, args.out, args.weights)
    else:
        check(Path(args.source).is_file(), f"no file at {args.source}; networks by name: {', '.join(TEACHERS)}")
        convert_checkpoint(args.source, args.out, args.grid)

if __name__ == "__main__":
    cli(main)
