"""
Trains the factorized GPT on a tokenizer's codes into out/gpt.pt; beside it out/samples.png, and out/gpt_log.csv with its curves in out/gpt_log.png.
The images are encoded once, into out/tokens_train.npy and out/tokens_val.npy.

$ python train_gpt.py                                                    # after `python train_tokenizer.py --k 3`
$ torchrun --nproc-per-node=8 train_gpt.py --tokenizer out/tokenizer.pt --data imagenet/ --preset far-b --crops 10
"""

import copy
import hashlib
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from fqgan import FQGAN, GPT, FQGANConfig, GPTConfig, build, explained, flag, load_tokenizer, require
from train_tokenizer import Run, TrainConfig, cli, data_name, duration, load_parts, parse, per_code, pick, save_grid, write_json

# The far presets are the paper's recipe (sec. 4.1 and the official training script).
FAR = dict(epochs=300.0, batch_size=256, lr=1e-4)
PRESETS = {
    "tiny": dict(n_layer=6, n_head=3, n_embd=192, head_layers=1, dropout=0.0, steps=1200, batch_size=32, lr=2e-3, warmup=100,
                 final_lr=0.0, workers=0, eval_every=600),
    "far-b": FAR,
    "far-l": FAR | dict(n_layer=36, n_head=20, n_embd=1280, head_layers=4),
}


@dataclass
class TokenConfig:
    tokenizer: str = flag("", "the tokenizer's checkpoint; empty: tokenizer.pt in --out")
    crops: int = flag(1, "views of each training image: 1 (center), 2 (and its mirror image), 10 (five places, mirrored)")
    cfg_scale: float = flag(1.5, "guidance of the sample pictures")
    fsdp: bool = flag(False, "shard weights, gradients and optimizer state over the processes (FSDP2), for a GPT that does not fit one device")


class Tokens(torch.utils.data.Dataset):
    """
    The codes of a data set, one record an image: `label`, `ids` (crops, k, h, w) in the smallest integer type that
    fits, and last `done`, which a record that is cut off lacks. Items are (ids (k,h,w) int64, label); of the crops, the
    one that the draw of (index, draw) picks.

    A .npy file, memory-mapped, with the fingerprint of the tokenizer and of the images' names in a .json beside it. Encoding that was cut
    off goes on where it stopped; a file made with another tokenizer or other images is refused, or with `overwrite` made anew.
    Under torchrun every rank encodes its share, into one file on a disk that all of them see.
    """

    def __init__(self, path, data, tokenizer, crops, run):
        self.origin, c = data.origin, tokenizer.config
        kind = np.dtype([("label", np.int32), ("ids", np.min_scalar_type(c.codebook_size - 1), (crops, c.k, c.grid, c.grid)), ("done", np.bool_)])
        weights = hashlib.sha256()
        for name, tensor in sorted(tokenizer.state_dict().items()):
            weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        names = "\n".join(str(s[0]) for s in getattr(data.source, "samples", []))
        made_of = {"tokenizer": weights.hexdigest(), "data": data.origin, "images": len(data), "image_size": c.image_size, "crops": crops,
                   "names": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()}
        note = path.with_suffix(".json")
        if run.rank == 0:
            try:
                known = json.loads(note.read_text()) if path.is_file() else None
            except (OSError, ValueError):  # none, or cut off while it was written
                known = None
            other = [n for n in made_of if known and known.get(n) != made_of[n]]
            require(not other or run.overwrite, f"{path} was made with another {' and '.join(other)}: --overwrite encodes again, --out FOLDER leaves it alone")
            if other or not known:
                note.unlink(missing_ok=True)
                np.lib.format.open_memmap(path, "w+", kind, (len(data),)).flush()
                reserve(path)
                write_json(note, made_of)
        if run.world > 1:
            dist.barrier()
        whole = json.loads(note.read_text()).get("whole")
        with explained(f"{path} cannot be read", ": delete it, and it is made anew"):
            self.path, self.records = path, np.load(path, mmap_mode="r" if whole else "r+")  # r+ would fill up a file that was cut off
        if not whole:
            self.encode(data, tokenizer, crops, run)
            missing = int((~self.records["done"]).sum())
            require(not missing, f"{path}: {missing} images are not encoded: are all processes writing to one disk?")
            if run.rank == 0:
                write_json(note, made_of | {"whole": True})

    def __getstate__(self):  # a process that loads data maps the file itself
        return vars(self) | {"records": None}

    def __setstate__(self, state):
        vars(self).update(state, records=np.load(state["path"], mmap_mode="r"))

    @torch.no_grad()
    def encode(self, data, tokenizer, crops, run):
        share = np.array_split(np.arange(len(data)), run.world)[run.rank]  # ranks write to stretches of the file of their own
        todo = share[~self.records["done"][share]].tolist()
        if todo:
            run.say(f"encoding {data.origin}: {len(todo) * run.world} of {len(data)} images x {crops}")
        views, began = Views(data, crops), time.time()
        size = max(1, min(64, run.batch_size // run.world) // crops)
        batches = [todo[i:i + size] for i in range(0, len(todo), size)]
        for n, (batch, (images, labels)) in enumerate(zip(batches, run.loader(views, batches))):
            with run.autocast():
                ids = tokenizer.encode(images.flatten(0, 1).to(run.device)).cpu().numpy()
            self.records["ids"][batch] = ids.reshape(len(batch), crops, *ids.shape[1:])
            self.records["label"][batch] = labels
            self.records["done"][batch] = True
            if (n + 1) % max(1, len(batches) // 10) == 0 and time.time() > began + 60:
                self.records.flush()
                run.say(f"encoded {n + 1} of {len(batches)} batches, {duration((time.time() - began) * (len(batches) / (n + 1) - 1))} left")
        self.records.flush()
        if run.world > 1:
            dist.barrier()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        index, draw = index if isinstance(index, tuple) else (index, "")
        record = self.records[index]
        view = random.Random(f"{index} {draw}").randrange(len(record["ids"])) if draw else 0
        return torch.from_numpy(record["ids"][view].astype(np.int64)), int(record["label"])


def reserve(path):
    """Takes the disk space that a file made by open_memmap will need: a full disk then is an OSError now, not the process's death later."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class Views(torch.utils.data.Dataset):
    """Items are (all the crops of an image (crops,3,H,W), label)."""

    def __init__(self, data, crops):
        self.data, self.crops = data, crops

    def __getitem__(self, index):
        return self.data.crops(index, views=self.crops)


@torch.no_grad()
def evaluate(model, tokens, run):
    """Cross-entropy in nats per code, of each sub-codebook and their mean, on eval_images held-out images, in figures and in words."""
    total = torch.zeros(model.config.k + 1, device=run.device)
    for ids, labels in run.evaluation_batches(tokens):
        with run.autocast():
            logits, _ = model(ids, labels)
        each = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(len(ids), model.config.k, -1)
        total += torch.cat([each.mean(2).sum(0), total.new_tensor([len(ids)])])
    if run.world > 1:
        dist.all_reduce(total)
    losses = total[:-1] / total[-1]
    return ({"val_loss": float(losses.mean())} | per_code("val_loss", losses),
            f"cross-entropy {losses.mean():.4f} nats a code, of the sub-codebooks {' '.join(f'{x:.3f}' for x in losses.tolist())}")


def save_samples(model, tokenizer, classes, cfg_scale, run, columns=8, most=10):
    """A row of samples for each of the first `most` classes."""
    if run.rank and not isinstance(model, FSDPModule):  # whose processes hold each other's weights
        return
    shown = range(min(most, len(classes)))
    labels = torch.tensor([c for c in shown for _ in range(columns)], device=run.device)
    ids = model.generate(labels, cfg_scale, generator=torch.Generator(run.device).manual_seed(run.seed % 2**63))
    with torch.no_grad(), run.autocast():
        images = torch.cat([tokenizer.decode(row) for row in ids.split(columns)])
    if run.rank == 0:
        save_grid(run.path.parent / "samples.png", [(classes[c], images[c * columns:(c + 1) * columns]) for c in shown])


def main():
    settings, checkpoint = parse(__doc__, PRESETS, "gpt", GPTConfig, TrainConfig, TokenConfig)
    require(settings["crops"] in (1, 2, 10), f"--crops {settings['crops']}: choose 1, 2 or 10")
    require(0 <= settings["cfg_scale"] < math.inf, f"--cfg-scale {settings['cfg_scale']}: it must be a finite number of at least 0")
    run = Run(settings, checkpoint, "gpt", log="gpt_log.csv")
    require(run.world > 1 or not settings["fsdp"], "--fsdp shards the model over several processes: start them with torchrun, or add --no-fsdp")
    if checkpoint:  # a GPT goes on with the tokenizer whose codes it speaks
        tokenizer = build(FQGAN, FQGANConfig, checkpoint["tokenizer"], run.path, run.device)
    else:
        path = settings["tokenizer"] or run.path.parent / "tokenizer.pt"
        tokenizer = load_tokenizer(path, run.device)
        settings["data"] = data_name(settings["data"], tokenizer, path)
    t = tokenizer.config
    sources = load_parts(settings["data"], t.image_size)
    classes = sources[0].classes
    config = pick(GPTConfig, settings | dict(k=t.k, vocab_size=t.codebook_size, grid=t.grid, num_classes=len(classes)))

    model = GPT(config)
    ema = copy.deepcopy(model).eval().requires_grad_(False) if run.ema else None
    for m in filter(None, (model, ema)):
        run.shard(m, [*m.trunk, *m.head]) if settings["fsdp"] else m.to(run.device)
    matrices, vectors = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.05), dict(params=vectors, weight_decay=0.0)],
                                  lr=run.lr, betas=(0.9, 0.95), fused=True)
    run.track(model=model, ema=ema, optimizer=optimizer)
    run.prepare(sources[0])
    run.say(f"GPT: {config.n_layer} blocks of width {config.n_embd}, {config.head_layers} in the head, k={config.k} codes of {config.vocab_size} "
            f"at {config.grid}x{config.grid} positions, {config.num_classes} classes, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    tokens, held_out = (Tokens(run.path.parent / f"tokens_{name}.npy", data, tokenizer, crops, run)
                        for name, data, crops in zip(("train", "val"), sources, (settings["crops"], 1)))
    run.describe(tokens, held_out)
    parallel_model = run.parallel(model)

    for _ in run.loop(tokens, [optimizer]):
        for ids, labels in run.micro_batches():
            with run.autocast():
                loss = parallel_model(ids, labels)[1]
            run.backward({"cross_entropy": loss})
            run.record({"cross_entropy": loss})
        run.update((model, optimizer))
        run.average(ema, model)
        run.log()

        if run.due:
            best = ema or model
            run.milestone(best, lambda: evaluate(best, held_out, run), lambda: save_samples(best, tokenizer, classes, settings["cfg_scale"], run),
                          config=asdict(config), classes=classes, tokenizer={"config": asdict(t), "model": tokenizer.state_dict()})
    run.finish(f"{run.path}, {run.path.parent / 'samples.png'} (look at it), {run.path.parent / 'gpt_log.csv'}",
               "python sample.py" + (f" --gpt {run.path}" if run.out != "out" else ""))


if __name__ == "__main__":
    cli(main)
