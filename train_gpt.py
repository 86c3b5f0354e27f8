"""
Trains the factorized GPT on a tokenizer's codes into out/gpt.pt; beside it out/samples.png, to look at, and
out/gpt_log.csv. The images are encoded first, into out/tokens_train.npy and out/tokens_val.npy.

$ python train_gpt.py                                                   # after `python train_tokenizer.py --k 3`
$ torchrun --nproc-per-node=8 train_gpt.py --data imagenet/ --preset far-b
"""

import math
import os
import random
import shlex
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, ten_crop

from fqgan import (
    all_reduce, append_row, autocast, barrier, batches_of_this_rank, build_model, catch_signals, center_crop, check,
    check_compiler, cli, duration, flag, FQGAN, FQGANConfig, from_settings, from_uint8, GPT, GPTConfig, ignore_signals,
    load_checkpoint, load_train_and_held_out, lock_output, lr_factor, on_any_rank, parse_flags, pick_dtype, print0,
    rank, refuse_output_inside_data, resumed_settings, save_checkpoint, save_grid, setup_device, shuffled_range,
    training_batches, warn_if_unwritable, world_size)

# -----------------------------------------------------------------------------
# Settings

# A plain run is the first preset. Flags that neither the command line nor the preset gives have the defaults of the
# two configs, which are the paper's recipe (section 4.1) and FAR-Base. The learning rate is the paper's: 2e-4; the
# authors' script has 1e-4. tiny and cifar10 are this project's own.
TINY = dict(
    n_layer=6, n_head=3, n_embd=192, head_layers=1, dropout=0.0, class_everywhere=True, muon=True,
    steps=900, batch_size=32, lr=2e-3, warmup=100, final_lr=0.0, workers=0, eval_every=450)
PRESETS = {
    "tiny": TINY,
    "cifar10": dict(TINY, crops=2, cfg_scale=2.0, steps=5000, lr=3e-3, eval_every=2500),
    "far-b": dict(crops=10),
    "far-l": dict(crops=10, n_layer=36, n_head=20, n_embd=1280, head_layers=4),
}

@dataclass
class TrainConfig:
    """What a run needs besides its model."""

    tokenizer: str = flag("", "the tokenizer's checkpoint; empty: tokenizer.pt in --out")
    data: str = flag("", "`shapes`, a folder, cifar10 or cifar100; empty: the tokenizer's")
    out: str = flag("out", "folder for checkpoint, tokens, gpt_log.csv and samples.png")
    crops: int = flag(1, "views of each image: 1, 2 (and mirrored), 10 (5 places, mirrored)", at_least=1)
    cfg_scale: float = flag(1.5, "guidance of the sample pictures")
    steps: int = flag(1_501_368, "optimizer steps; 300 epochs of ImageNet are 1501368", at_least=1)
    batch_size: int = flag(256, "images a step, over all processes", at_least=1)
    accumulate: int = flag(1, "micro-batches a step is computed in, to save memory", at_least=1)
    lr: float = flag(2e-4, "learning rate")
    warmup: int = flag(0, "steps over which the learning rate rises from 0")
    final_lr: float = flag(1.0, "share of the learning rate at the end of a cosine decay; 1: none")
    muon: bool = flag(False, "train the blocks' matrices with Muon, and start their outputs at zero")
    weight_decay: float = flag(0.05, "weight decay of matrices")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 for no limit")
    seed: int = flag(0, "seed of weights, order of data, views and dropout")
    device: str = flag("auto", "cuda, mps, cpu, ...; auto: the best there is")
    dtype: str = flag("auto", "float32, bfloat16, float16; auto: bfloat16 where it is fast")
    compile: bool = flag(False, "compile the model")
    workers: int = flag(8, "processes that load images; 0: none besides the main one")
    log_every: int = flag(50, "steps between progress lines, each with that step's loss", at_least=1)
    eval_every: int = flag(2500, "steps between evaluations, each with a checkpoint", at_least=1)
    eval_images: int = flag(2000, "held-out images to evaluate on, at most", at_least=1)
    resume: bool = flag(False, "continue the run in --out exactly where it stopped")
    overwrite: bool = flag(False, "replace another run's checkpoint in --out")

# -----------------------------------------------------------------------------
# Tokens: all images are encoded once, before training

class Views(Dataset):
    """Items are (views of an image (n,3,H,W), label): its center; for n=2 the mirror image too; for 10 LlamaGen's."""

    def __init__(self, data, num_views):
        self.data = data
        self.num_views = num_views

    def __getitem__(self, index):
        image, label = self.data.read(index)
        size = self.data.image_size
        if self.num_views == 10:  # corners and center of a slightly larger square, and their mirror images
            crops = ten_crop(center_crop(image, int(1.1 * size)), size)
        else:
            crop = center_crop(image, size)
            crops = [crop, ImageOps.mirror(crop)][:self.num_views]
        return from_uint8(torch.stack([pil_to_tensor(crop) for crop in crops])), label

@torch.no_grad()
def encode(path, data, tokenizer, num_views, args, device):
    """
    Writes the codes of a data set to a .npy file, which gets its name when it is complete. An image is one record: its
    label and its ids (views, k, h, w). Every rank encodes its share, in float32.
    """
    c = tokenizer.config
    ids_type = np.min_scalar_type(c.codebook_size - 1)
    record_type = np.dtype([("label", np.int32), ("ids", ids_type, (num_views, c.k, c.grid, c.grid))])
    tmp = path.with_name(f".{path.name}.tmp")
    print0(f"encoding {data.description}")
    if rank() == 0:
        records = np.lib.format.open_memmap(tmp, "w+", record_type, (len(data),))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a crash while the map is written
            with open(tmp, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, records.offset + records.nbytes)
    barrier()
    records = np.load(tmp, mmap_mode="r+")
    size = max(1, 64 // num_views)
    batches = batches_of_this_rank(len(data), size)
    start_time = told = time.time()
    loader = DataLoader(Views(data, num_views), batch_sampler=batches, num_workers=args.workers,
                        worker_init_fn=ignore_signals)
    for i, (images, labels) in enumerate(loader):
        ids = tokenizer.encode(images.flatten(0, 1).to(device))  # (batch * views, k, h, w)
        batch = slice(batches[i].start, batches[i].stop)
        records["ids"][batch] = ids.unflatten(0, (-1, num_views)).cpu().numpy()
        records["label"][batch] = labels
        if time.time() > told + 60:
            told = time.time()
            left = (told - start_time) * (len(batches) / (i + 1) - 1)
            print0(f"encoded {i + 1} of {len(batches)} batches, {duration(left)} left")
    records.flush()
    barrier()
    if rank() == 0:
        tmp.replace(path)
    barrier()

def read_tokens(path):
    """The memory-mapped records of a file that is whole, else None."""
    try:
        return np.load(path, mmap_mode="r")
    except (EOFError, OSError, ValueError):
        return None

def get_batch(records, indices, views, device):
    """indices: of B records; views: which view of each, or one number for all -> (ids (B,k,h,w) int64, labels (B,))"""
    ids = torch.from_numpy(records["ids"][indices, views].astype(np.int64))
    labels = torch.from_numpy(records["label"][indices].astype(np.int64))
    if device.type == "cuda":
        ids, labels = ids.pin_memory(), labels.pin_memory()
    return ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)

# -----------------------------------------------------------------------------
# Helpers

@torch.no_grad()
def evaluate(model, records, args, device):
    """Cross-entropy of each sub-codebook's codes, in nats, on --eval-images of the held-out images: (k)."""
    k = model.config.k
    indices = shuffled_range(len(records))[:args.eval_images]
    size = min(32, args.batch_size // (args.accumulate * world_size()))  # all logits at once take memory
    total = torch.zeros(k + 1, device=device)  # sums of the k cross-entropies, number of images
    for batch in batches_of_this_rank(len(indices), size):
        ids, labels = get_batch(records, indices[batch.start:batch.stop], 0, device)
        logits, _ = model(ids, labels)  # (B, k, h*w, vocab_size), in float32: no autocast
        losses = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(len(ids), k, -1)
        total[:k] += losses.mean(2).sum(0)
        total[k] += len(ids)
    all_reduce(total)
    return (total[:k] / total[k]).tolist()

@torch.no_grad()
def sample_rows(model, tokenizer, classes, args, device):
    """For save_grid: eight samples of each of the first ten classes."""
    generator = torch.Generator(device).manual_seed(args.seed % 2**63)
    rows = []
    for label, name in enumerate(classes[:10]):  # one class at a time: the caches of a large GPT take much memory
        labels = torch.full((8,), label, device=device)
        ids = model.generate(labels, args.cfg_scale, generator=generator)
        rows.append((name, tokenizer.decode(ids)))
    return rows

# -----------------------------------------------------------------------------

def main():
    # settings
    flags = parse_flags(__doc__, PRESETS, GPTConfig, TrainConfig)  # those that are given
    path = Path(flags.get("out", "out")) / "gpt.pt"
    state = {}  # the checkpoint that is resumed
    if flags.get("resume"):
        state = load_checkpoint(path, "gpt")
        settings = resumed_settings(state, path, flags)  # the checkpoint's, and of the flags the few that may differ
    else:
        # flags win over the preset; what neither gives has its default
        settings = PRESETS[flags.get("preset", "tiny")] | flags
    args = from_settings(TrainConfig, settings)
    check(args.crops in (1, 2, 10), f"--crops {args.crops}: choose 1, 2 or 10")

    # processes
    device = setup_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.compile:
        check_compiler()
    num_parts = world_size() * args.accumulate
    check(args.batch_size % num_parts == 0,
          f"--batch-size {args.batch_size} is not divisible by {world_size()} processes "
          f"x --accumulate {args.accumulate}")

    # tokenizer and its codes; a resumed run keeps those that it began with
    if state:
        tokenizer = build_model(FQGAN, FQGANConfig, state["tokenizer"], path, device)
        classes = state["classes"]
    else:
        tokenizer_path = args.tokenizer or path.with_name("tokenizer.pt")
        tokenizer_state = load_checkpoint(tokenizer_path, "tokenizer")
        tokenizer = build_model(FQGAN, FQGANConfig, tokenizer_state, tokenizer_path, device)
        args.data = args.data or tokenizer_state.get("settings", {}).get("data", "")
        check(args.data, f"{tokenizer_path} does not say what it was trained on: name the images with --data")
    refuse_output_inside_data(path, args.data)
    if rank() == 0:
        lock_output(path, must_be_new=not state and not args.overwrite)
    files = [path.with_name("tokens_train.npy"), path.with_name("tokens_val.npy")]
    encoding = not state or any(read_tokens(file) is None for file in files)
    if encoding:
        train_data, val_data = load_train_and_held_out(args.data, tokenizer.config.image_size)
        check(not state or classes == train_data.classes, f"{args.data} has other classes than the run in {path}")
        classes = train_data.classes
        check(len(train_data) >= args.batch_size,
              f"{train_data.description} are fewer than one batch; give a smaller --batch-size")
    settings |= dict(k=tokenizer.config.k, vocab_size=tokenizer.config.codebook_size, grid=tokenizer.config.grid,
                     num_classes=len(classes))
    config = from_settings(GPTConfig, settings)  # now, so that a wrong setting fails before the long encoding
    if encoding:
        if rank() == 0 and not state:
            path.unlink(missing_ok=True)  # the checkpoint of another run: it must not be resumed with these tokens
        encode(files[0], train_data, tokenizer, args.crops, args, device)
        encode(files[1], val_data, tokenizer, 1, args, device)
    train_tokens, val_tokens = [read_tokens(file) for file in files]

    # model and optimizers; the same first weights whatever was drawn before
    torch.manual_seed(args.seed % 2**63)
    model = GPT(config).to(device)
    if args.muon:  # every block starts as the identity
        for block in (*model.trunk, *model.head):
            torch.nn.init.zeros_(block.attn.proj.weight)
            torch.nn.init.zeros_(block.mlp.w2.weight)
    muon_matrices = []
    adamw_matrices = []
    vectors = []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif args.muon and name.startswith(("trunk.", "head.")):
            muon_matrices.append(p)
        else:
            adamw_matrices.append(p)
    groups = [dict(params=adamw_matrices, weight_decay=args.weight_decay), dict(params=vectors, weight_decay=0.0)]
    optimizers = {"optimizer": torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)}
    if muon_matrices:  # updates scaled to the size of AdamW's, so that the learning rate is the same
        optimizers["muon"] = torch.optim.Muon(muon_matrices, lr=args.lr, weight_decay=args.weight_decay,
                                              adjust_lr_fn="match_rms_adamw")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "scaler": scaler, **optimizers}  # what a checkpoint holds

    # resume
    step = state.get("step", 0)
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        old_args = replace(args, steps=state["settings"]["steps"])
        if args.steps != old_args.steps:
            print0(f"the schedule is now that of {args.steps} steps: the learning rate goes on at "
                   f"{args.lr * lr_factor(step, args):.2g} in place of {args.lr * lr_factor(step, old_args):.2g}")
    elif rank() == 0:
        with warn_if_unwritable(path.with_name("gpt_log.csv")) as log:
            log.unlink(missing_ok=True)
    del state  # a large model's would stay in memory

    def save():
        contents = {name: part.state_dict() for name, part in parts.items()}
        contents |= {"kind": "gpt", "config": asdict(config), "settings": asdict(args), "step": step}
        contents["classes"] = classes
        contents["tokenizer"] = {"config": asdict(tokenizer.config), "model": tokenizer.state_dict()}
        save_checkpoint(path, contents)

    # before the first step, so that a full disk is known at once
    if rank() == 0:
        save()

    # what the training step calls: model, batches
    parallel_model = torch.compile(model) if args.compile else model
    if world_size() > 1:
        parallel_model = DistributedDataParallel(parallel_model, broadcast_buffers=False)
    batches = training_batches(len(train_tokens), args.seed, step, args.steps, args.batch_size, args.accumulate)

    # say what is about to happen
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"GPT: {config.n_layer} blocks of width {config.n_embd}, {config.head_layers} in the head, k={config.k} "
           f"codes of {config.vocab_size} at {config.grid}x{config.grid} positions, {config.num_classes} classes, "
           f"{millions:.1f} M parameters")
    print0(f"{args.data}: {len(train_tokens)} training images, {len(val_tokens)} held out")
    print0(f"steps {step} to {args.steps} of {args.batch_size} images, {world_size()} x {device.type}, {dtype}")

    signals = catch_signals()  # a list: empty until Ctrl-C or a signal that ends the job
    num_skipped = 0  # steps in a row that were not finite
    first_step, start_time = step, time.time()
    stopping = False

    while step < args.steps and not stopping:
        lr = args.lr * lr_factor(step, args)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

        # forward and backward; dropout and dropped labels are drawn from the step's own seed, so that a resumed step
        # draws the same
        torch.manual_seed((args.seed * 1_000_003 + step * world_size() + rank()) % 2**63)
        step_loss = torch.zeros((), device=device)
        for micro_step in range(args.accumulate):
            draws = next(batches)
            views = [random.Random(draw.seed).randrange(args.crops) for draw in draws]
            ids, labels = get_batch(train_tokens, [draw.index for draw in draws], views, device)
            if world_size() > 1:  # ranks exchange gradients in the last backward pass only
                parallel_model.require_backward_grad_sync = micro_step == args.accumulate - 1
            with autocast(device, dtype):
                _, loss = parallel_model(ids, labels)
            loss = loss / args.accumulate
            scaler.scale(loss).backward()
            step_loss += loss.detach()

        # step, unless the gradient is not finite
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        is_finite = bool(norm.isfinite())
        if is_finite:
            for optimizer in optimizers.values():
                scaler.step(optimizer)
        model.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        num_skipped = 0 if is_finite else num_skipped + 1
        if num_skipped:
            print0(f"step {step} left out: the gradient is not finite")
            check(num_skipped < 50, f"{num_skipped} steps in a row were not finite: begin again with a smaller --lr")
        stopping = on_any_rank(signals, device)
        evaluating = step % args.eval_every == 0 or step == args.steps
        logging = step % args.log_every == 0 or evaluating

        if logging:
            value = float(all_reduce(step_loss) / world_size())
            speed = (step - first_step) * args.batch_size / (time.time() - start_time)
            left = duration((args.steps - step) * args.batch_size / speed)
            print0(f"step {step}/{args.steps}  cross-entropy {value:.4f} nats a code | {speed:.0f} images/s, "
                   f"{left} left")

        # checkpoint, then evaluation
        if rank() == 0 and (evaluating or stopping):
            save()
        val_loss = None
        val_losses = [None] * config.k
        if evaluating:
            val_losses = evaluate(model.eval(), val_tokens, args, device)
            val_loss = sum(val_losses) / config.k
            print0(f"step {step}/{args.steps}  held out: {val_loss:.4f} nats a code, of the sub-codebooks "
                   + " ".join(f"{each:.3f}" for each in val_losses))
            if rank() == 0:
                with warn_if_unwritable(path.with_name("samples.png")) as picture:
                    save_grid(picture, sample_rows(model, tokenizer, classes, args, device))
            model.train()

        # log
        if logging and rank() == 0:
            row = {"step": step, "lr": lr, "loss": value, "val_loss": val_loss}
            row |= {f"val_loss_{i + 1}": each for i, each in enumerate(val_losses)}
            append_row(path.with_name("gpt_log.csv"), row)

    if stopping and step < args.steps:
        print0(f"stopped at step {step} of {args.steps}; all is in {path}: --resume continues")
        barrier()  # when one rank ends, torchrun ends the others: so wait until all have written
        raise KeyboardInterrupt
    print0(f"done in {duration(time.time() - start_time)}: {path}, {path.with_name('samples.png')} (look at it), "
           f"{path.with_name('gpt_log.csv')}")
    print0("next: python sample.py" + (f" --gpt {shlex.quote(str(path))}" if args.out != "out" else ""))

if __name__ == "__main__":
    cli(main)
