"""
Tests of tools/convert.py. Published files are made up here in the published format, and run by the format's description
instead of by our modules.

$ python -m pytest -q tools/test_convert.py
"""

import argparse
import functools
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fqgan
import sample
from fqgan import FQGAN, FQGANConfig
from test_fqgan import Hostile, call, refused, same, uniform
from tools import convert

def converted(source, *flags):
    """What a published file becomes: its path"""
    out = source.with_name(f"ours_{source.name}")
    out.unlink(missing_ok=True)
    call(convert, source, out, *flags)
    return out

# -----------------------------------------------------------------------------
# Networks as their descriptions read

def attention(q, k, v, heads, causal=False):
    """The formula itself: (B,T,C) three times -> (B,T,C)"""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if causal:
        future = torch.ones(scores.shape[2:]).triu(1).bool()
        scores = scores.masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

class Published:
    """Networks as their description reads, of random weights under published names: made where they are first used."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.state = {}

    def weight(self, name, *shape, mean=0.0, std=None):
        if name not in self.state:
            std = std or 0.5 / math.prod(shape[1:]) ** 0.5
            self.state[name] = mean + std * torch.randn(shape)
        return self.state[name]

    def bias(self, name, n):
        return self.weight(f"{name}.bias", n, std=0.1)

    def scale(self, name, n):
        return self.weight(f"{name}.weight", n, mean=1.0, std=0.2)

    def linear(self, name, x, width, bias=True):
        weight = self.weight(f"{name}.weight", width, x.shape[-1])
        return F.linear(x, weight, self.bias(name, width) if bias else None)

    def conv(self, name, x, width, size=3, bias=True, **options):
        weight = self.weight(f"{name}.weight", width, x.shape[1], size, size)
        return F.conv2d(x, weight, self.bias(name, width) if bias else None, **options)

    def layer_norm(self, name, x, eps=1e-5):
        width = x.shape[-1]
        return F.layer_norm(x, (width,), self.scale(name, width), self.bias(name, width), eps)

    def group_norm(self, name, x):
        width = x.shape[1]
        return F.group_norm(x, 32, self.scale(name, width), self.bias(name, width), eps=1e-6)

    def res(self, name, x, width):
        h = F.silu(self.group_norm(f"{name}.norm1", x))
        h = self.conv(f"{name}.conv1", h, width, padding=1)
        h = F.silu(self.group_norm(f"{name}.norm2", h))
        h = self.conv(f"{name}.conv2", h, width, padding=1)
        if x.shape[1] != width:
            x = self.conv(f"{name}.nin_shortcut", x, width, 1)
        return x + h

    def attn(self, name, x):
        width = x.shape[1]
        h = self.group_norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, width, 1).flatten(2).mT for part in "qkv")
        h = attention(q, k, v, heads=1).mT.reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", h, width, 1)

    def transformer(self, name, x, blocks, heads=8, activation=F.gelu):
        W = x.shape[-1]
        for n in (f"{name}.{i}" for i in range(blocks)):
            in_proj = self.weight(f"{n}.attn.in_proj_weight", 3 * W, W, std=W**-0.5)
            in_bias = self.weight(f"{n}.attn.in_proj_bias", 3 * W, std=0.1)
            q, k, v = F.linear(self.layer_norm(f"{n}.ln_1", x), in_proj, in_bias).chunk(3, -1)
            x = x + self.linear(f"{n}.attn.out_proj", attention(q, k, v, heads), W)
            h = self.linear(f"{n}.mlp.c_fc", self.layer_norm(f"{n}.ln_2", x), 4 * W)
            x = x + self.linear(f"{n}.mlp.c_proj", activation(h), W)
        return x

    def vit(self, name, x, blocks):
        x = x + self.weight(f"{name}.positional_embedding", *x.shape[1:], std=1)
        x = self.transformer(f"{name}.transformer", self.layer_norm(f"{name}.ln_pre", x), blocks)
        return self.layer_norm(f"{name}.ln_post", x)

PUBLISHED_BRANCHES = {  # k: (how names end, adapter, feature head, the head's width) of each sub-codebook
    1: [("", None, None, 0)],
    2: [("_vis", "visual_head", None, 0), ("_sem", "semantic_head", "feat_pred_head", 48)],
    3: [("_vis", "visual_head", None, 0), ("_sem_mid", "semantic_head_mid", "mid_sem_feat_pred", 24),
        ("_sem_high", "semantic_head_high", "high_sem_feat_pred", 48)],
}

class PublishedTokenizer(Published):
    """FQGAN's; for k=1 LlamaGen's."""

    def __init__(self, k, widths=(32, 32, 64), z=32, V=64, d=8, grid=4, depth=2):
        super().__init__(seed=k)
        self.parts = PUBLISHED_BRANCHES[k]
        self.branches = [ending for ending, *_ in self.parts]
        self.heads = {head: width for *_, head, width in self.parts if head}
        self.widths = widths
        self.z = z
        self.V = V
        self.d = d
        self.depth = depth
        size = grid * 2 ** (len(widths) - 1)
        quantized = self.vectors(torch.zeros(1, 3, size, size))  # this and what follows makes the weights
        self.decode_vectors(quantized)
        for head in self.heads:
            self.feature(head, quantized[0])
        for ending in self.branches:
            self.codes(ending)
            self.state[f"quantize{ending}.codebook_used"] = torch.zeros(65536)

    def levels(self, side, x, widths, blocks, attended):
        for level, width in enumerate(widths):
            name = f"{side}.conv_blocks.{level}"
            for i in range(blocks):
                x = self.res(f"{name}.res.{i}", x, width)
                if level == attended:
                    x = self.attn(f"{name}.attn.{i}", x)
            if level < len(widths) - 1:
                if side == "encoder":
                    x = self.conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), width, stride=2)
                else:
                    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                    x = self.conv(f"{name}.upsample.conv", doubled, width, padding=1)
        return x

    def middle(self, side, x):
        width = x.shape[1]
        x = self.res(f"{side}.mid.0", x, width)
        x = self.attn(f"{side}.mid.1", x)
        return self.res(f"{side}.mid.2", x, width)

    def vectors(self, images):
        """-> what the k quantizers are given: a list of (B,d,h,w)"""
        x = self.conv("encoder.conv_in", images, self.widths[0], padding=1)
        x = self.levels("encoder", x, self.widths, blocks=2, attended=len(self.widths) - 1)
        x = self.middle("encoder", x)
        found = []
        for ending, adapter, *_ in self.parts:
            h = x
            if adapter:
                h = self.vit(f"encoder.{adapter}.0", x.flatten(2).mT, self.depth).mT.reshape(x.shape)
            h = F.silu(self.group_norm(f"encoder.norm_out{ending}", h))
            h = self.conv(f"encoder.conv_out{ending}", h, self.z, padding=1)
            found.append(self.conv(f"quant_conv{ending}", h, self.d, 1))
        return found

    def codes(self, ending):
        return F.normalize(self.weight(f"quantize{ending}.embedding.weight", self.V, self.d), dim=1)

    def encode(self, images):
        ids = []
        for ending, z in zip(self.branches, self.vectors(images)):
            unit = F.normalize(z.float(), dim=1).permute(0, 2, 3, 1)
            distance = torch.cdist(unit, self.codes(ending))
            ids.append(distance.argmin(-1))
        return torch.stack(ids, 1)

    def decode(self, ids):
        codes = [self.codes(ending)[ids[:, i]] for i, ending in enumerate(self.branches)]
        return self.decode_vectors([each.permute(0, 3, 1, 2) for each in codes])

    def decode_vectors(self, quantized):
        x = self.conv("post_quant_conv", torch.cat(quantized, 1), self.z, 1)
        x = self.middle("decoder", self.conv("decoder.conv_in", x, self.widths[-1], padding=1))
        x = self.levels("decoder", x, self.widths[::-1], blocks=3, attended=0)
        x = F.silu(self.group_norm("decoder.norm_out", x))
        return self.conv("decoder.conv_out", x, 3, padding=1)

    def feature(self, head, quantized):
        width = self.heads[head]
        x = F.relu(self.linear(f"{head}.upscale.0", quantized.flatten(2).mT, width))
        x = self.linear(f"{head}.upscale.2", x, width)
        first = self.weight(f"{head}.class_embedding", 1, width, std=1).expand(len(x), 1, -1)
        return self.vit(head, torch.cat([first, x], 1), 3)[:, 0]

class PublishedGPT(Published):
    """FAR's; for k=1 LlamaGen's."""

    def __init__(self, k, D=128, V=40, classes=6, trunk=2, head=1):
        super().__init__(seed=k)
        self.k = k
        self.D = D
        self.V = V
        self.classes = classes
        self.ends = [f"_{i + 1}" for i in range(k)] if k > 1 else [""]
        self.trunk = [f"layers.{i}" for i in range(trunk)]
        self.head = [f"ar_head.{i}" for i in range(head)] if k > 1 else []
        self.logits(torch.zeros(1, k, 1, dtype=torch.long), torch.tensor([0]), grid=1)  # makes the weights

    def rms(self, name, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.scale(name, self.D)

    @functools.cache
    def turns(self, grid):
        """A row of 32 complex numbers for each position: zeros for the class; else by its row, then by its column."""
        frequency = 10000 ** (-torch.arange(16) / 16)
        position = torch.arange(max(grid**2, self.k))[:, None]
        angles = torch.cat([position // grid * frequency, position % grid * frequency], 1)
        return F.pad(torch.polar(torch.ones_like(angles), angles), (0, 0, 1, 0))

    def turn(self, x, grid):
        """x (B,T,D), its pairs turned as complex numbers; 64 numbers a head"""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 32, 2)))
        turned = pairs * self.turns(grid)[:x.shape[1], None]
        return torch.view_as_real(turned).flatten(2).to(x.dtype)

    def block(self, name, x, grid):
        h = self.linear(f"{name}.attention.wqkv", self.rms(f"{name}.attention_norm", x), 3 * self.D, bias=False)
        q, k, v = h.chunk(3, -1)
        h = attention(self.turn(q, grid), self.turn(k, grid), v, self.D // 64, causal=True)
        x = x + self.linear(f"{name}.attention.wo", h, self.D, bias=False)
        h = self.rms(f"{name}.ffn_norm", x)
        hidden = math.ceil(8 * self.D // 3 / 256) * 256
        gate = F.silu(self.linear(f"{name}.feed_forward.w1", h, hidden, bias=False))
        h = gate * self.linear(f"{name}.feed_forward.w3", h, hidden, bias=False)
        return x + self.linear(f"{name}.feed_forward.w2", h, self.D, bias=False)

    def logits(self, ids, labels, grid):
        """ids (B,k,P) of the positions so far, the last one perhaps not known -> (B,k,P,V)"""
        tables = [self.weight(f"tok_embeddings{end}.weight", self.V, self.D) for end in self.ends]
        embedded = [table[ids[:, i]] for i, table in enumerate(tables)]
        x = torch.cat(embedded, -1)
        if self.k > 1:
            x = self.linear("aggregation_layer", x, self.D)
        classes = self.weight("cls_embedding.embedding_table.weight", self.classes + 1, self.D, std=1)
        x = torch.cat([classes[labels][:, None], x[:, :-1]], 1)
        for name in self.trunk:
            x = self.block(name, x, grid)
        x = torch.stack([x, *embedded[:-1]], 2).flatten(0, 1)
        for name in self.head:
            x = self.block(name, x, grid)
        x = self.rms("norm", x).unflatten(0, (len(ids), -1))
        logits = [self.linear(f"output{end}", x[:, :, i], self.V, bias=False) for i, end in enumerate(self.ends)]
        return torch.stack(logits, 1)

    def greedy(self, labels, grid, scale):
        """One code after the other, each by the whole model."""
        ids = torch.zeros(len(labels), self.k, grid**2, dtype=torch.long)
        null = torch.full_like(labels, self.classes)
        for p, i in itertools.product(range(grid**2), range(self.k)):
            given = ids[:, :, :p + 1]
            logits, without = (self.logits(given, rows, grid)[:, i, p] for rows in (labels, null))
            ids[:, i, p] = (without + scale * (logits - without)).argmax(-1)
        return ids.unflatten(2, (grid, grid))

def like_zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}

# -----------------------------------------------------------------------------
# Tokenizers and GPTs

@pytest.mark.parametrize("k, downsample, tensors, heads", [
    (1, 16, 344, 0), (1, 8, 300, 0), (2, 16, 552, 46), (2, 8, 508, 46), (3, 16, 683, 92), (3, 8, 639, 92)])
def test_as_many_tensors_as_the_published_files(k, downsample, tensors, heads):
    """
    The made-up files have as many. Our models lack the feature heads, each sub-codebook's codebook_used, and 4 tensors
    for each of 7 attention blocks, whose q, k and v are one layer here.
    """
    widths = (128, 128, 256, 256, 512) if downsample == 16 else (128, 256, 256, 512)
    with torch.device("meta"):
        made = PublishedTokenizer(k, widths, z=256, V=16384, grid=256 // downsample, depth=6)
        model = FQGAN(FQGANConfig(k=k, downsample=downsample, adapter_depth=6 if k > 1 else 0))
    assert len(made.state) == tensors and len(model.state_dict()) == tensors - heads - k - 7 * 4
    assert model.post_quant_conv.weight.shape == (256, 8 * k, 1, 1)

@pytest.mark.parametrize("k", [1, 2, 3])
def test_published_tokenizers(k, tmp_path):
    """Same ids, same pixels, same predicted features, from the file as its authors write it."""
    made = PublishedTokenizer(k)
    contents = {"model": like_zeros(made.state), "ema": made.state, "steps": 3, "optimizer": {"state": {}}}
    contents["args"] = argparse.Namespace(image_size=256, vq_model="VQ-16")
    torch.save(contents, tmp_path / "published.pt")
    with refused("`python tools/convert.py .*published.pt tokenizer.pt`"):
        fqgan.load_tokenizer(tmp_path / "published.pt")
    model = fqgan.load_tokenizer(converted(tmp_path / "published.pt"))
    c = model.config
    assert (c.k, c.codebook_size, c.codebook_dim, c.downsample) == (k, 64, 8, 4)
    assert (c.adapter_depth, c.image_size) == ((2, 16) if k > 1 else (0, 256))
    fused = sum(".q." in name for name in made.state)  # q, k, v are one layer here
    assert len(model.state_dict()) == len(made.state) - k - 2 * fused

    images = uniform(3, 3, 16, 16)
    ids = made.encode(images)
    assert torch.equal(model.encode(images), ids) and len(ids.unique()) > 5
    assert torch.allclose(model.decode(ids), made.decode(ids), atol=1e-4)
    quantized = torch.randn(2, 8, 4, 4)
    for (head, width), branch in zip(made.heads.items(), model.branches[1:]):
        predicted = branch.feature_head(quantized)
        assert predicted.shape == (2, width)
        assert torch.allclose(predicted, made.feature(head, quantized), atol=1e-4)
    torch.save({"model": made.state}, tmp_path / "plain.pt")
    again = fqgan.load_tokenizer(converted(tmp_path / "plain.pt"))
    assert same(again.state_dict(), model.state_dict())
    with refused("not a gpt checkpoint but a tokenizer's"):
        fqgan.load_gpt(tmp_path / "ours_plain.pt")
    with refused("ours_plain.pt exists"):
        call(convert, tmp_path / "plain.pt", tmp_path / "ours_plain.pt")
    with refused("is one of ours already"):
        call(convert, tmp_path / "ours_plain.pt", tmp_path / "again.pt")

@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("wrap", [
    lambda state, args: {"model": state | {"layers.0.attention.kv_cache.k_cache": torch.zeros(2, 2)}, "args": args},
    lambda state, args: {"ema": state, "model": like_zeros(state)},
    lambda state, args: {"module": state},
    lambda state, args: {"state_dict": state, "args": argparse.Namespace()},
    lambda state, args: state,
], ids=["args", "ema", "module", "state_dict", "bare"])
def test_published_gpts(k, wrap, tmp_path):
    """Same logits, same greedy samples, in every wrapper that the scripts write."""
    made = PublishedGPT(k)
    assert len(made.state) == (4 + 2 * k + 7 * 3 if k > 1 else 4 + 7 * 2)
    contents = wrap(made.state, argparse.Namespace(image_size=48, downsample_size=16, gpt_model="GPT-B"))
    torch.save(contents, tmp_path / "gpt.pt")
    says_its_grid = hasattr(contents.get("args"), "image_size")
    model = fqgan.load_gpt(converted(tmp_path / "gpt.pt", *([] if says_its_grid else ["--grid", 3])))
    c = model.config
    assert (c.grid, c.n_head, c.num_classes, c.head_layers) == (3, 2, 6, int(k > 1))
    ids = torch.randint(0, 40, (2, k, 3, 3))
    labels = torch.tensor([1, 4])
    assert torch.allclose(model(ids, labels)[0], made.logits(ids.flatten(2), labels, 3), atol=1e-4)
    assert torch.equal(model.generate(labels, cfg_scale=2.0, temperature=0), made.greedy(labels, 3, 2.0))
    assert says_its_grid or fqgan.load_gpt(converted(tmp_path / "gpt.pt")).config.grid == 16
    if k == 2:  # with the tokenizer of its own file
        torch.save(PublishedTokenizer(2, V=40, grid=3).state, tmp_path / "tokenizer.pt")
        flags = ["--tokenizer", converted(tmp_path / "tokenizer.pt"), "--n", 6, "--device", "cpu"]
        call(sample, "--gpt", converted(tmp_path / "gpt.pt", "--grid", 3), "--npz", tmp_path / "s.npz", *flags)

@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("made, load_model", [
    (PublishedTokenizer(2), fqgan.load_tokenizer), (PublishedGPT(2), fqgan.load_gpt),
])
def test_published_names_with_a_wrappers_prefix(made, load_model, prefix, tmp_path):
    """As DistributedDataParallel and torch.compile leave it: was no checkpoint at all."""
    torch.save({"model": made.state}, tmp_path / "plain.pt")
    torch.save({"model": {prefix + name: t for name, t in made.state.items()}}, tmp_path / "prefixed.pt")
    plain, prefixed = [load_model(converted(tmp_path / name)) for name in ("plain.pt", "prefixed.pt")]
    assert same(plain.state_dict(), prefixed.state_dict())

def without(state, part):
    return {name: tensor for name, tensor in state.items() if part not in name}

TOKENIZER_1 = PublishedTokenizer(1).state

@pytest.mark.parametrize("state, message", [
    (without(TOKENIZER_1, "decoder.mid.0"), "broken.pt does not fit"),
    (without(TOKENIZER_1, "encoder.conv_blocks"), "broken.pt"),  # of a downsample of 0.5
    (TOKENIZER_1 | {"quantize.embedding.weight": torch.zeros(3)}, "broken.pt"),
    ({"cls_embedding.cap_proj.fc1.weight": torch.zeros(2)}, "broken.pt is a text-conditional GPT"),
])
def test_published_files_that_cannot_be_used(state, message, tmp_path):
    torch.save({"model": state}, tmp_path / "broken.pt")
    with refused(message):
        converted(tmp_path / "broken.pt")
    assert not (tmp_path / "ours_broken.pt").exists()

# -----------------------------------------------------------------------------
# Teachers

def seen_by_teachers(images, mean, std):
    """(B,3,s,s) in [-1,1] -> (B,3,224,224): the nearest pixels, normalized"""
    rows, columns = [torch.arange(224) * side // 224 for side in images.shape[2:]]
    images = images[:, :, rows][..., columns] / 2 + 0.5
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

def run_clip(made, images, W=128, patch=32):
    x = seen_by_teachers(images, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    x = made.conv("visual.conv1", x, W, patch, bias=False, stride=patch).flatten(2).mT
    first = made.weight("visual.class_embedding", W, std=1).expand(len(x), 1, -1)
    x = torch.cat([first, x], 1)
    x = made.layer_norm("visual.ln_pre", x + made.weight("visual.positional_embedding", *x.shape[1:], std=1))
    x = made.transformer("visual.transformer.resblocks", x, 2, W // 64, lambda h: h * torch.sigmoid(1.702 * h))
    return x[:, 0]

def archive(state):
    """The state dict as a module that TorchScript can save, as OpenAI's files are."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, tensor)
    return torch.jit.script(root)

@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit, which OpenAI's files need
def test_clip_teacher(tmp_path):
    """A made-up CLIP archive and state dict, of half precision but for the norms, run by the format's description."""
    made = Published()
    images = uniform(2, 3, 50, 50)
    run_clip(made, images)  # makes the weights
    made.layer_norm("visual.ln_post", torch.zeros(1, 128))
    made.weight("visual.proj", 128, 16)
    made.scale("transformer.resblocks.0.ln_1", 3)  # the text half's
    made.state["logit_scale"] = torch.tensor(1.0)
    published = {name: t if "ln_" in name else t.half() for name, t in made.state.items()}
    made.state = {name: t.float() for name, t in published.items()}
    torch.save(published, tmp_path / "clip.pt")
    call(convert, "clip_vitb16", tmp_path / "clip.pt2", "--weights", tmp_path / "clip.pt")
    teacher = fqgan.load_teacher(tmp_path / "clip.pt2")
    assert torch.allclose(teacher(images), run_clip(made, images), atol=1e-4)
    assert torch.allclose(teacher(images[:1, :, :, :30]), run_clip(made, images[:1, :, :, :30]), atol=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters())
    torch.jit.save(archive(published), tmp_path / "archive.pt")
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in training
        assert torch.allclose(teacher(images), run_clip(made, images), atol=0.2)
    call(convert, "clip_vitb16", tmp_path / "again.pt2", "--weights", tmp_path / "archive.pt")
    assert torch.equal(fqgan.load_teacher(tmp_path / "again.pt2")(images), teacher(images))

def run_dinov2(made, images, W=128):
    x = seen_by_teachers(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = made.conv("patch_embed.proj", x, W, 14, stride=14).flatten(2).mT
    first, table = made.weight("pos_embed", 1, 1370, W, std=1).split([1, 37**2], 1)
    table = table.mT.unflatten(2, (37, 37))
    table = F.interpolate(table, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic").flatten(2).mT
    first = first + made.weight("cls_token", 1, 1, W, std=1)
    x = torch.cat([first.expand(len(x), -1, -1), x + table], 1)
    for n in ("blocks.0", "blocks.1"):
        h = made.linear(f"{n}.attn.qkv", made.layer_norm(f"{n}.norm1", x, 1e-6), 3 * W)
        h = made.linear(f"{n}.attn.proj", attention(*h.chunk(3, -1), W // 64), W)
        x = x + made.weight(f"{n}.ls1.gamma", W, std=0.5) * h
        h = made.linear(f"{n}.mlp.fc1", made.layer_norm(f"{n}.norm2", x, 1e-6), 4 * W)
        h = made.linear(f"{n}.mlp.fc2", F.gelu(h), W)
        x = x + made.weight(f"{n}.ls2.gamma", W, std=0.5) * h
    return made.layer_norm("norm", x, 1e-6)[:, 0]

def test_dinov2_teacher(tmp_path):
    made = Published()
    images = uniform(2, 3, 32, 32)
    expected = run_dinov2(made, images)
    torch.save(made.state | {"mask_token": torch.zeros(1, 128)}, tmp_path / "dinov2.pth")
    call(convert, "dinov2_vits14", tmp_path / "dinov2.pt2", "--weights", tmp_path / "dinov2.pth")
    teacher = fqgan.load_teacher(tmp_path / "dinov2.pt2")
    assert torch.allclose(teacher(images), expected, atol=1e-4)

@pytest.mark.parametrize("name", ["broken.pt", "hostile.pt"])
@pytest.mark.parametrize("teacher", ["clip_vitl14", "dinov2_vits14"])
def test_teachers_that_cannot_be_used(name, teacher, tmp_path):
    torch.save({"visual.conv1.weight": torch.zeros(2)}, tmp_path / "broken.pt")
    torch.save({"visual.conv1.weight": Hostile(tmp_path / "touched")}, tmp_path / "hostile.pt")
    with refused(f"{name} does not hold {teacher}"):
        call(convert, teacher, tmp_path / "x.pt2", "--weights", tmp_path / name)
    assert not (tmp_path / "touched").exists()
    with refused("no file at vgg; networks by name: clip_vitb16"):
        call(convert, "vgg", tmp_path / "x.pt2")
