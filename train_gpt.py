"""
Trains the factorized GPT on a tokenizer's codes into out/gpt.pt; beside it out/samples.png, to look at, and
out/gpt_log.csv. The images are encoded once, into out/tokens_train.npy and out/tokens_val.npy.

$ python train_gpt.py                                                   # after `python train_tokenizer.py --k 3`
$ torchrun --nproc-per-node=8 train_gpt.py --data imagenet/ --preset far-b --crops 10
"""

import copy
import hashlib
import json
import math
import random
import signal
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from fqgan import (
    FQGAN, FQGANConfig, GPT, GPTConfig, UserError, all_reduce, autocast, barrier,
    build_model, check, check_settings, cli, data_name, data_parts, duration, fixed_sample,
    flag, init_distributed, leave_signals_to_main, load_checkpoint, load_tokenizer,
    one_line, parse_flags, pick, pick_dtype, print0, rank, read_log, resumed_settings,
    save_checkpoint, save_grid, step_seed, training_batches, world_size, write_log)

# -----------------------------------------------------------------------------
# Settings: defaults, over them a preset, then the command line

# The defaults are the paper's recipe (section 4.1) and FAR-Base. The learning rate is the paper's: 2e-4; the authors'
# script has 1e-4. cifar10 is this project's own.
PRESETS = {
    "tiny": dict(
        n_layer=6, n_head=3, n_embd=192, head_layers=1, dropout=0.0, steps=1200, batch_size=32, lr=2e-3, warmup=100,
        final_lr=0.0, workers=0, eval_every=600),
    "cifar10": dict(
        n_layer=8, n_head=4, n_embd=256, head_layers=1, dropout=0.0, class_everywhere=True, muon=True, crops=2,
        cfg_scale=2.0, steps=1800, batch_size=64, lr=2e-3, warmup=100, final_lr=0.0, workers=0, eval_every=900),
    "far-b": dict(recompute=True),
    "far-l": dict(n_layer=36, n_head=20, n_embd=1280, head_layers=4, recompute=True),
}

@dataclass
class TrainConfig:
    """What a run needs besides its model."""

    tokenizer: str = flag("", "the tokenizer's checkpoint; empty: tokenizer.pt in --out")
    data: str = flag("", "`shapes`, a folder, or a torchvision name; empty: the tokenizer's")
    out: str = flag("out", "folder for checkpoint, token cache, gpt_log.csv and samples.png")
    crops: int = flag(1, "views of each image: 1, 2 (and mirrored), 10 (5 places, mirrored)")
    cfg_scale: float = flag(1.5, "guidance of the sample pictures")
    steps: int = flag(1_501_368, "optimizer steps; 300 epochs of ImageNet are 1501368")
    batch_size: int = flag(256, "images a step, over all processes")
    accumulate: int = flag(1, "micro-batches a step is computed in, to save memory")
    lr: float = flag(2e-4, "learning rate")
    warmup: int = flag(0, "steps over which the learning rate rises from 0")
    final_lr: float = flag(1.0, "share of the learning rate at the end of a cosine decay; 1: none")
    muon: bool = flag(False, "train the blocks' matrices with Muon, and start their outputs at zero")
    weight_decay: float = flag(0.05, "weight decay of matrices")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 for no limit")
    ema: float = flag(0.0, "decay of a moving average of the weights, used in their place")
    seed: int = flag(0, "seed of weights, order of data, views and dropout")
    device: str = flag("auto", "cuda, mps, cpu, ...; auto: the best there is")
    dtype: str = flag("auto", "float32, bfloat16, float16; auto: bfloat16 where it is fast")
    compile: bool = flag(False, "compile the model")
    workers: int = flag(8, "processes that load data; 0: none besides the main one")
    log_every: int = flag(50, "steps between progress lines, each with that step's loss")
    eval_every: int = flag(2500, "steps between evaluations, each with a checkpoint")
    eval_images: int = flag(2000, "held-out images to evaluate on, at most")
    keep: bool = flag(False, "keep every evaluation's checkpoint, as gpt_STEP.pt")
    resume: bool = flag(False, "continue the run in --out exactly where it stopped")
    overwrite: bool = flag(False, "replace another run's checkpoint in --out")

# what the checkpoint's tensors were made with: a resumed run cannot change it, but its rate, batch size or seed
FIXED = {f.name for f in fields(GPTConfig) if f.name != "recompute"}
FIXED |= {"preset", "tokenizer", "crops", "muon", "ema", "weight_decay"}

# -----------------------------------------------------------------------------
# The token cache

class Tokens(Dataset):
    """
    The codes of a data set, a memory-mapped .npy file with a record an image: its label, and its ids (views, k, h, w).
    Items are (ids (k,h,w) int64, label). An index may be a pair (index, epoch), which picks one of the views.
    """

    def __init__(self, path, description):
        self.path = path
        self.description = description
        try:
            self.records = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): delete it, and it is made again") from None

    def __reduce__(self):  # a loader process maps the file itself
        return Tokens, (self.path, self.description)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        index, epoch = index if isinstance(index, tuple) else (index, "")
        record = self.records[index]
        view = random.Random(f"{index} {epoch}").randrange(len(record["ids"])) if epoch else 0
        return torch.from_numpy(record["ids"][view].astype(np.int64)), int(record["label"])

class Views(Dataset):
    """Items are (all views of an image (views,3,H,W), label)."""

    def __init__(self, data, num_views):
        self.data = data
        self.num_views = num_views

    def __getitem__(self, index):
        return self.data.views(index, self.num_views)

def fingerprint(tokenizer, data, num_views):
    """What a token cache depends on."""
    digest = hashlib.sha256(f"{data.fingerprint()} {num_views}".encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

@torch.no_grad()
def load_tokens(path, data, tokenizer, num_views, args, device):
    """
    The token cache at `path`, encoded first if it is not there: in float32, every rank its share, into a temporary file
    that takes its name when it is whole. Raises UserError for a cache of another tokenizer, other images or
    another number of views.
    """
    meta = path.with_suffix(".json")
    key = json.dumps({"fingerprint": fingerprint(tokenizer, data, num_views)})
    is_there = path.exists() and meta.exists()
    is_same = is_there and meta.read_text() == key
    check(is_same or not is_there or args.overwrite,
          f"{path} was made with another tokenizer, other images or another --crops: --overwrite encodes again")
    barrier()  # all ranks have looked before one of them writes
    if is_same:
        return Tokens(path, data.description)

    c = tokenizer.config
    ids_type = np.min_scalar_type(c.codebook_size - 1)
    record_type = np.dtype([("label", np.int32), ("ids", ids_type, (num_views, c.k, c.grid, c.grid))])
    tmp = path.with_name(f".{path.name}.tmp")
    if rank() == 0:
        print0(f"encoding {data.description}: {len(data)} images x {num_views}")
        meta.unlink(missing_ok=True)
        np.lib.format.open_memmap(tmp, "w+", record_type, (len(data),))
    barrier()
    records = np.load(tmp, mmap_mode="r+")
    shares = np.array_split(np.arange(len(data)), world_size())
    indices = shares[rank()].tolist()
    size = max(1, 64 // num_views)
    batches = [indices[i:i + size] for i in range(0, len(indices), size)]
    start_time = told = time.time()
    loader = DataLoader(Views(data, num_views), batch_sampler=batches, num_workers=args.workers,
                        worker_init_fn=leave_signals_to_main)
    for i, (images, labels) in enumerate(loader):
        ids = tokenizer.encode(images.flatten(0, 1).to(device))  # (batch * views, k, h, w)
        records["ids"][batches[i]] = ids.unflatten(0, (-1, num_views)).cpu().numpy()
        records["label"][batches[i]] = labels
        if time.time() > told + 60:
            told = time.time()
            left = (told - start_time) * (len(batches) / (i + 1) - 1)
            print0(f"encoded {i + 1} of {len(batches)} batches, {duration(left)} left")
    records.flush()
    barrier()
    if rank() == 0:
        tmp.replace(path)
        meta.write_text(key)
    barrier()
    return Tokens(path, data.description)

# -----------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(model, tokens, args, device):
    """Cross-entropy of each sub-codebook's codes, in nats, on --eval-images of the held-out images: (k)."""
    k = model.config.k
    indices = fixed_sample(len(tokens))[:args.eval_images][rank()::world_size()]
    size = args.batch_size // (args.accumulate * world_size())
    batches = [indices[i:i + size] for i in range(0, len(indices), size)]
    total = torch.zeros(k + 1, device=device)  # sums of the k cross-entropies, number of images
    for ids, labels in DataLoader(tokens, batch_sampler=batches):
        ids = ids.to(device)
        logits, _ = model(ids, labels.to(device))  # (B, k, h*w, vocab_size), in float32: no autocast
        losses = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(len(ids), k, -1)
        total[:k] += losses.mean(2).sum(0)
        total[k] += len(ids)
    all_reduce(total)
    return (total[:k] / total[k]).tolist()

@torch.no_grad()
def save_samples(path, model, tokenizer, classes, args, device):
    """A row of eight samples for each of the first ten classes."""
    num_rows = min(10, len(classes))
    labels = torch.arange(num_rows, device=device).repeat_interleave(8)
    generator = torch.Generator(device).manual_seed(args.seed % 2**63)
    rows = []
    for name, row in zip(classes, labels.split(8)):  # at once, the cache of a large GPT takes more memory than training
        ids = model.generate(row, args.cfg_scale, generator=generator)
        rows.append((name, tokenizer.decode(ids)))
    save_grid(path, rows)

# -----------------------------------------------------------------------------

def main():
    # settings
    defaults, preset, flags = parse_flags(__doc__, PRESETS, GPTConfig, TrainConfig)
    settings = {**defaults, **preset, **flags}
    path = Path(settings["out"]) / "gpt.pt"
    state = None
    if settings["resume"]:
        state = load_checkpoint(path, "gpt")
        settings = resumed_settings(state, path, defaults, flags, FIXED)
    check(state or settings["overwrite"] or not path.exists(),
          f"{path} exists: --resume continues that run, --overwrite replaces it, --out FOLDER leaves it alone")
    check_settings(settings)
    args = pick(TrainConfig, settings)
    check(args.crops in (1, 2, 10), f"--crops {args.crops}: choose 1, 2 or 10")

    # processes
    device = init_distributed(args.device, args.seed)
    dtype = pick_dtype(args.dtype, device)
    num_micro_batches = world_size() * args.accumulate
    check(args.batch_size % num_micro_batches == 0,
          f"--batch-size {args.batch_size} is not divisible by {world_size()} processes x "
          f"--accumulate {args.accumulate}")

    # tokenizer and its codes
    if state:  # a run keeps the tokenizer whose codes it has learned
        tokenizer = build_model(FQGAN, FQGANConfig, state["tokenizer"], path, device)
    else:
        tokenizer_path = args.tokenizer or path.with_name("tokenizer.pt")
        tokenizer = load_tokenizer(tokenizer_path, device)
        args.data = settings["data"] = data_name(args.data, tokenizer, tokenizer_path)
    t = tokenizer.config
    train_data, val_data = data_parts(args.data, t.image_size)
    classes = train_data.classes
    settings |= dict(k=t.k, vocab_size=t.codebook_size, grid=t.grid, num_classes=len(classes))
    config = pick(GPTConfig, settings)
    check(len(train_data) >= args.batch_size,
          f"{train_data.description}: {len(train_data)} images are fewer than one batch; "
          f"--batch-size {len(train_data)} or less would do")
    path.parent.mkdir(parents=True, exist_ok=True)
    train_tokens = load_tokens(path.with_name("tokens_train.npy"), train_data, tokenizer, args.crops, args, device)
    val_tokens = load_tokens(path.with_name("tokens_val.npy"), val_data, tokenizer, 1, args, device)

    # model and optimizers
    torch.manual_seed(args.seed % 2**63)  # the same weights whatever was loaded before
    model = GPT(config).to(device)
    if args.muon:
        for block in (*model.trunk, *model.head):
            torch.nn.init.zeros_(block.attn.proj.weight)
            torch.nn.init.zeros_(block.mlp.w2.weight)
    ema = None
    if args.ema:
        ema = copy.deepcopy(model).eval().requires_grad_(False)
    hidden = []
    matrices = []
    vectors = []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif args.muon and name.startswith(("trunk.", "head.")):
            hidden.append(p)
        else:
            matrices.append(p)
    optimizers = {}
    if hidden:  # updates scaled to the size of AdamW's, so that the learning rate is the same
        optimizers["muon"] = torch.optim.Muon(hidden, lr=args.lr, weight_decay=args.weight_decay,
                                              adjust_lr_fn="match_rms_adamw")
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=vectors, weight_decay=0.0)]
    optimizers["optimizer"] = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "ema": ema, **optimizers}
    parts = {name: part for name, part in parts.items() if part is not None}  # what a checkpoint holds

    # resume
    step = 0
    log = []
    data_fingerprint = train_data.fingerprint() + val_data.fingerprint()
    if state:
        check(state["data_fingerprint"] == data_fingerprint,
              f"{args.data} does not hold the images that the run in {path} began with: others would be held out")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        step = state["step"]
        log = read_log(path.with_name("gpt_log.csv"), step)
        check(step < args.steps, f"{path} is already at step {step} of {args.steps}; to go on, give a larger --steps")
        del state

    # what the training step calls
    parallel_model = torch.compile(model) if args.compile else model
    if world_size() > 1:
        parallel_model = DistributedDataParallel(parallel_model, broadcast_buffers=False)
    order = training_batches(len(train_tokens), args.batch_size, args.seed, args.steps, step, rank(), world_size(),
                             args.accumulate)
    loader = DataLoader(train_tokens, batch_sampler=order, num_workers=args.workers, pin_memory=device.type == "cuda",
                        prefetch_factor=4 if args.workers else None, worker_init_fn=leave_signals_to_main)
    batches = iter(loader)

    # say what is about to happen
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"GPT: {config.n_layer} blocks of width {config.n_embd}, {config.head_layers} in the head, k={config.k} "
           f"codes of {config.vocab_size} at {config.grid}x{config.grid} positions, {config.num_classes} classes, "
           f"{millions:.1f} M parameters")
    print0(f"data: {train_data.description}: {len(train_data)} images")
    print0(f"held out: {val_data.description}: {len(val_data)} images")
    print0(f"steps {step} to {args.steps} of {args.batch_size} images, {world_size()} x {device.type}, {dtype}")

    # Ctrl-C and the signals that end a job: finish the step, save, and leave; a second one ends it at once
    signals = []
    def on_signal(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)

    num_skipped = 0  # steps in a row that were not finite
    first_step, start_time = step, time.time()
    stopping = False

    while step < args.steps and not stopping:
        # learning rate: linear warm-up, cosine decay
        progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
        lr = args.lr * (args.final_lr + (1 - args.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
        if step < args.warmup:
            lr = args.lr * (step + 1) / args.warmup
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

        # forward and backward
        torch.manual_seed(step_seed(args.seed, step, rank()))  # nothing to save: a resumed step draws the same
        step_loss = 0
        for micro_step in range(args.accumulate):
            ids, labels = next(batches)
            ids = ids.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            if world_size() > 1:  # ranks exchange gradients in the last backward pass only
                parallel_model.require_backward_grad_sync = micro_step == args.accumulate - 1
            with autocast(device, dtype):
                _, loss = parallel_model(ids, labels)
            scaler.scale(loss / args.accumulate).backward()
            step_loss = step_loss + loss.detach() / args.accumulate

        # step, unless the gradient is not finite
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        if norm.isfinite():
            for optimizer in optimizers.values():
                scaler.step(optimizer)
        model.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        if norm.isfinite():
            num_skipped = 0
        else:
            num_skipped += 1
            limit = 30 if dtype == torch.float16 else 10  # float16's scale takes some steps to be found
            print0(f"step {step} left out: the gradient is not finite")
            check(num_skipped < limit,
                  f"{num_skipped} steps in a row were not finite, step {step} the last: try a smaller --lr; "
                  "the last checkpoint is still good")
        if ema:
            decay = min(args.ema, step / (step + 10))  # smaller in the first steps
            with torch.no_grad():  # the only buffer is constant
                for average, p in zip(ema.parameters(), model.parameters()):
                    average.lerp_(p, 1 - decay)

        # a signal may reach one rank before another
        stopping = all_reduce(torch.tensor(len(signals), device=device)).item() > 0

        # log
        if step % args.log_every == 0 or step == args.steps:
            value = float(all_reduce(step_loss) / world_size())
            speed = (step - first_step) * args.batch_size / (time.time() - start_time)
            left = duration((args.steps - step) * args.batch_size / speed)
            print0(f"step {step}/{args.steps}  cross-entropy {value:.4f} nats a code | {speed:.0f} images/s, "
                   f"{left} left")
            log.append({"step": step, "lr": lr, "loss": value})
            if rank() == 0:
                write_log(path.with_name("gpt_log.csv"), log)

        # checkpoint, then evaluation
        if step % args.eval_every == 0 or step == args.steps or stopping:
            if rank() == 0:
                contents = {name: part.state_dict() for name, part in parts.items()}
                contents |= {"kind": "gpt", "config": asdict(config), "classes": classes, "settings": settings,
                             "tokenizer": {"config": asdict(t), "model": tokenizer.state_dict()},
                             "step": step, "scaler": scaler.state_dict(), "data_fingerprint": data_fingerprint}
                save_checkpoint(path, contents)
                if args.keep:
                    save_checkpoint(path.with_stem(f"gpt_{step}"), contents)
            if not stopping or step == args.steps:
                shown = ema or model.eval()
                losses = evaluate(shown, val_tokens, args, device)
                val_loss = sum(losses) / len(losses)
                print0(f"step {step}/{args.steps}  held out: {val_loss:.4f} nats a code, of the sub-codebooks "
                       + " ".join(f"{loss:.3f}" for loss in losses))
                row = {"step": step, "val_loss": val_loss}
                for i, loss in enumerate(losses):
                    row[f"val_loss_{i + 1}"] = loss
                log.append(row)
                if rank() == 0:
                    write_log(path.with_name("gpt_log.csv"), log)
                    save_samples(path.with_name("samples.png"), shown, tokenizer, classes, args, device)
                model.train()

    if stopping and step < args.steps:
        print0(f"stopped at step {step} of {args.steps}; all is in {path}: --resume continues")
        raise KeyboardInterrupt
    print0(f"done in {duration(time.time() - start_time)}: {path}, {path.with_name('samples.png')} (look at it), "
           f"{path.with_name('gpt_log.csv')}")
    print0("next: python sample.py" + (f" --gpt {path}" if args.out != "out" else ""))

if __name__ == "__main__":
    cli(main)
