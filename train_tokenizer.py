"""
Trains the factorized tokenizer into out/tokenizer.pt; beside it out/recon.png, to look at, and out/log.csv.

$ python train_tokenizer.py --k 3                                                # built-in shapes, minutes on a laptop
$ python train_tokenizer.py --data photos/ --preset fqgan-ds16 --accumulate 8    # the paper's recipe, on one GPU
$ torchrun --nproc-per-node=8 train_tokenizer.py --data imagenet/ --preset fqgan-ds16
"""

import math
import random
import shlex
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.functional import pil_to_tensor

from fqgan import (
    all_reduce, append_row, autocast, barrier, batches_of_this_rank, catch_signals, check, check_compiler, cli,
    code_usage, Discriminator, duration, flag, FQGAN, FQGANConfig, from_settings, from_uint8, hinge_loss,
    ignore_signals, load_checkpoint, load_teacher, load_train_and_held_out, lock_output, LPIPS, lr_factor, on_any_rank,
    one_line, parse_flags, pick_dtype, print0, psnr, random_crop, RandomFeatures, rank, reconstruction_rows,
    refuse_output_inside_data, resumed_settings, save_checkpoint, save_grid, setup_device, Shapes, shuffled_range,
    training_batches, UserError, warn_if_unwritable, world_size)

# -----------------------------------------------------------------------------
# Settings

# A plain run is the first preset. Flags that neither the command line nor the preset gives have the defaults of the
# two configs, which are the paper's recipe (section 4.1 and the official training script); fqgan-ds16 and -ds8 are its
# two resolutions. tiny and cifar10 are this project's own: see the README.
SMALL = dict(
    image_size=32, downsample=4, patch_size=2, codebook_size=256,
    channels=32, channel_mult=(2, 3), res_blocks=1, norm_groups=4, z_channels=64,
    adapter_depth=1, adapter_width=96, adapter_heads=3, entropy_weight=0.01, entropy_final=0.03,
    disc_weight=0.0, perceptual_weight=0.0, teachers="none",
    steps=1600, batch_size=32, warmup=100, final_lr=0.0,
    workers=0, log_every=50, eval_every=800)
PRESETS = {
    "tiny": dict(SMALL, pool=(1, 2, 4), disentangle_weight=0.0, decorrelate_weight=0.6, lr=3e-3),
    "cifar10": dict(SMALL, data="cifar10", perceptual="random", perceptual_weight=0.75, lr=7e-3, steps=3200),
    "fqgan-ds16": dict(downsample=16),
    "fqgan-ds8": dict(downsample=8),
}
PAPER_TEACHERS = {
    1: "none",
    2: "teachers/clip_vitl14.pt2",
    3: "teachers/dinov2_vits14.pt2,teachers/clip_vitb16.pt2",  # also with more than three sub-codebooks
}

@dataclass
class TrainConfig:
    """What a run needs besides its model."""

    data: str = flag("shapes", "`shapes`, a folder of images, cifar10 or cifar100")
    out: str = flag("out", "folder for the checkpoint, log.csv and recon.png")
    teachers: str = flag("paper", "files of frozen networks that supervise the last sub-codebooks, "
                         "with commas between; none; or paper: the paper's for this k")
    init: str = flag("", "a checkpoint to start from: its weights, shape and loss weights")
    entropy_final: float = flag(1.0, "share of --entropy-weight at the end of its exponential decay", at_least=1e-9)
    perceptual: str = flag("lpips", "features that the perceptual loss compares: lpips (VGG-16's), random")
    perceptual_weight: float = flag(1.0, "weight of the perceptual loss; 0 for none")
    disc_weight: float = flag(0.5, "weight of the adversarial losses; 0 for no discriminator")
    disc_start: int = flag(20_000, "step from which the adversarial losses are on")
    steps: int = flag(200_183, "optimizer steps; 40 epochs of ImageNet are 200183", at_least=1)
    batch_size: int = flag(256, "images a step, over all processes", at_least=1)
    accumulate: int = flag(1, "micro-batches a step is computed in; batch statistics are theirs", at_least=1)
    lr: float = flag(2e-4, "learning rate")
    disc_lr: float = flag(2e-4, "learning rate of the discriminator")
    warmup: int = flag(0, "steps over which the learning rates rise from 0")
    final_lr: float = flag(1.0, "share of the learning rates at the end of a cosine decay; 1: none")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 for no limit")
    seed: int = flag(0, "seed of weights, order of data and crops")
    device: str = flag("auto", "cuda, mps, cpu, ...; auto: the best there is")
    dtype: str = flag("auto", "float32, bfloat16, float16; auto: bfloat16 where it is fast")
    compile: bool = flag(False, "compile the model")
    workers: int = flag(8, "processes that load data; 0: none besides the main one")
    log_every: int = flag(50, "steps between progress lines, each with that step's losses", at_least=1)
    eval_every: int = flag(2500, "steps between evaluations, each with a checkpoint", at_least=1)
    eval_images: int = flag(2000, "held-out images to evaluate on, at most", at_least=1)
    resume: bool = flag(False, "continue the run in --out exactly where it stopped")
    overwrite: bool = flag(False, "replace another run's checkpoint in --out")

# -----------------------------------------------------------------------------
# Helpers

class TrainingItems(Dataset):
    """An ImageData as training sees it: a Draw gives a random crop, but of shapes the whole."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, draw):
        if isinstance(self.data.source, Shapes):
            return self.data[draw.index]
        image, label = self.data.read(draw.index)  # a whole PIL image
        crop = random_crop(image, self.data.image_size, random.Random(draw.seed))
        return from_uint8(pil_to_tensor(crop)), label

def feature_width(teacher, path, image_size, device):
    try:
        with torch.no_grad():
            _, width = teacher(torch.zeros(2, 3, image_size, image_size, device=device)).shape
    except Exception as error:
        raise UserError(f"--teachers {path}: does not turn images (2, 3, {image_size}, {image_size}) into features "
                        f"(2, D) ({one_line(error)})") from None
    return width

def load_init(model, weights, path):
    """Loads another tokenizer's weights. Feature heads start anew: this run's teachers may be others."""
    weights = {name: tensor for name, tensor in weights.items() if ".feature_head." not in name}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if ".feature_head." not in name]
        check(not missing and not unexpected, f"{len(missing + unexpected)} weights have other names")
    except Exception as error:
        raise UserError(f"--init {path}: does not fit the model of these flags ({one_line(error)})") from None

@torch.no_grad()
def evaluate(model, data, args, device):
    """PSNR (dB, mean over images), and how often each sub-codebook's codes are chosen, on --eval-images of `data`."""
    config = model.config
    part = Subset(data, shuffled_range(len(data))[:args.eval_images])
    batches = batches_of_this_rank(len(part), args.batch_size // (args.accumulate * world_size()))
    total = torch.zeros(2, device=device)  # sum of PSNR, number of images
    counts = torch.zeros(config.k, config.codebook_size, dtype=torch.long, device=device)
    loader = DataLoader(part, batch_sampler=batches, num_workers=args.workers, worker_init_fn=ignore_signals)
    # in float32, whatever the model trains in
    for images, _ in loader:
        images = images.to(device)
        ids = model.encode(images)
        total[0] += psnr(images, model.decode(ids)).sum()
        total[1] += len(images)
        count_codes(counts, ids)
    all_reduce(total)
    return float(total[0] / total[1]), all_reduce(counts)

def count_codes(counts, ids):
    """Adds to counts (k,V) the choices ids (B,k,h,w)."""
    ids = ids.transpose(0, 1).flatten(1)
    counts.scatter_add_(1, ids, torch.ones_like(ids))

def by_codebook(name, values):
    """-> {"NAME_1": first value, ...}"""
    return {f"{name}_{i + 1}": value for i, value in enumerate(values)}

def joined(values, form):
    return " ".join(format(value, form) for value in values)

# -----------------------------------------------------------------------------

def main():
    # settings
    flags = parse_flags(__doc__, PRESETS, FQGANConfig, TrainConfig)  # those that are given
    path = Path(flags.get("out", "out")) / "tokenizer.pt"
    state = {}  # the checkpoint that is resumed
    init = {}  # the one of --init
    if flags.get("resume"):
        state = load_checkpoint(path, "tokenizer")
        settings = resumed_settings(state, path, flags)  # the checkpoint's, and of the flags the few that may differ
    else:
        if flags.get("init"):
            init = load_checkpoint(flags["init"], "tokenizer")
        # later ones win: the preset, the config of --init (not its teachers), flags; what none gives has its default
        settings = PRESETS[flags.get("preset", "tiny")] | init.get("config", {}) | {"teacher_widths": ()} | flags
    # each config takes the fields that are its own
    args = from_settings(TrainConfig, settings)
    config = from_settings(FQGANConfig, settings)
    check(args.perceptual in ("lpips", "random"), f"--perceptual {args.perceptual}: choose lpips or random")
    check(not args.perceptual_weight or config.image_size >= 16,
          f"--image-size {config.image_size} is too small for the perceptual loss: 16 or more, "
          "or --perceptual-weight 0")
    check(not args.disc_weight or config.image_size >= 24,
          f"--image-size {config.image_size} is too small for the discriminator: 24 or more, "
          "or --disc-weight 0")
    refuse_output_inside_data(path, args.data)

    # processes
    device = setup_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.compile:
        check_compiler()
    num_parts = world_size() * args.accumulate
    check(args.batch_size % num_parts == 0,
          f"--batch-size {args.batch_size} is not divisible by {world_size()} processes "
          f"x --accumulate {args.accumulate}")
    if rank() == 0:
        lock_output(path, must_be_new=not state and not args.overwrite)

    # data, teachers, perceptual loss
    train_data, val_data = load_train_and_held_out(args.data, config.image_size)
    check(len(train_data) >= args.batch_size,
          f"{train_data.description} are fewer than one batch; give a smaller --batch-size")
    names = PAPER_TEACHERS[min(config.k, 3)] if args.teachers == "paper" else args.teachers
    names = [name for name in names.split(",") if name not in ("", "none")]
    teachers = [load_teacher(name).to(device) for name in names]
    widths = [feature_width(teacher, name, config.image_size, device) for teacher, name in zip(teachers, names)]
    config = replace(config, teacher_widths=tuple(widths))
    perceptual = None
    if args.perceptual_weight:
        perceptual = LPIPS() if args.perceptual == "lpips" else RandomFeatures()
        perceptual.to(device)

    # model and optimizers; the same first weights whatever was drawn before
    torch.manual_seed(args.seed % 2**63)
    model = FQGAN(config).to(device)
    if init:
        load_init(model, init["model"], args.init)
    adam = dict(betas=(0.9, 0.95), fused=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, **adam)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}  # what a checkpoint holds
    disc = None
    if args.disc_weight:
        disc = Discriminator().to(device)
        disc_optimizer = torch.optim.Adam(disc.parameters(), lr=args.disc_lr, **adam)
        parts |= {"disc": disc, "disc_optimizer": disc_optimizer}

    # resume
    step = state.get("step", 0)
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        old_args = replace(args, steps=state["settings"]["steps"])
        if args.steps != old_args.steps:
            print0(f"all schedules are now those of {args.steps} steps: the learning rate goes on at "
                   f"{args.lr * lr_factor(step, args):.2g} in place of {args.lr * lr_factor(step, old_args):.2g}")
    elif rank() == 0:
        with warn_if_unwritable(path.with_name("log.csv")) as log:
            log.unlink(missing_ok=True)
    del state, init  # a large model's would stay in memory

    def save():
        contents = {name: part.state_dict() for name, part in parts.items()}
        contents |= {"kind": "tokenizer", "config": asdict(config), "settings": asdict(args), "step": step}
        save_checkpoint(path, contents)

    # before the first step, so that a full disk is known at once
    if rank() == 0:
        save()

    # what the training step calls: model, discriminator, batches
    parallel_model = torch.compile(model) if args.compile else model
    parallel_disc = disc
    if world_size() > 1:
        parallel_model = DistributedDataParallel(parallel_model, broadcast_buffers=False)
        parallel_disc = DistributedDataParallel(disc, broadcast_buffers=False) if disc else None
    micro_batches = training_batches(len(train_data), args.seed, step, args.steps, args.batch_size, args.accumulate)
    loader = DataLoader(TrainingItems(train_data), batch_sampler=micro_batches, num_workers=args.workers,
                        worker_init_fn=ignore_signals, pin_memory=device.type == "cuda",
                        prefetch_factor=4 if args.workers else None)
    batches = iter(loader)

    # say what is about to happen
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"FQGAN: k={config.k} sub-codebooks of {config.codebook_size} codes, "
           f"{config.grid}x{config.grid} positions, {millions:.1f} M parameters")
    print0(f"data: {train_data.description}")
    print0(f"held out: {val_data.description}")
    print0(f"steps {step} to {args.steps} of {args.batch_size} images, "
           f"{world_size()} x {device.type}, {dtype}")
    weights = asdict(config) | asdict(args)
    names = ("commit", "entropy", "disentangle", "representation", "perceptual", "disc")
    off = [name for name in names if not weights[f"{name}_weight"]]
    if args.disc_weight and args.disc_start >= args.steps:
        off.append("disc (--disc-start is not before --steps)")
    if not teachers and config.representation_weight:
        off.append("representation (no --teachers)")
    if teachers and args.batch_size == num_parts:
        off.append("representation (in micro-batches of one image there is no other to tell it from)")
    print0(f"losses that are off: {', '.join(off) or 'none'}")

    signals = catch_signals()  # a list: empty until Ctrl-C or a signal that ends the job
    counts = torch.zeros(config.k, config.codebook_size, dtype=torch.long, device=device)  # of codes, for the log
    num_skipped = 0  # steps in a row that were not finite
    first_step, start_time = step, time.time()
    stopping = False

    while step < args.steps and not stopping:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_factor(step, args)
        if disc:
            for group in disc_optimizer.param_groups:
                group["lr"] = args.disc_lr * lr_factor(step, args)
        entropy_decay = args.entropy_final ** (step / args.steps)
        adversarial = disc is not None and step >= args.disc_start

        step_losses = {}
        step_disc_loss = torch.zeros((), device=device)
        for micro_step in range(args.accumulate):
            images, _ = next(batches)
            images = images.to(device, non_blocking=True)
            if world_size() > 1:  # ranks exchange gradients in the last backward pass only
                parallel_model.require_backward_grad_sync = micro_step == args.accumulate - 1
                if disc:
                    parallel_disc.require_backward_grad_sync = micro_step == args.accumulate - 1

            # the tokenizer's loss: a sum of losses that have their weights in them
            with autocast(device, dtype):
                with torch.no_grad():
                    features = [teacher(images).float() for teacher in teachers]
                reconstruction, losses = parallel_model(images, features)
                if "entropy" in losses:
                    losses["entropy"] = entropy_decay * losses["entropy"]
                if perceptual:
                    losses["perceptual"] = args.perceptual_weight * perceptual(images, reconstruction).mean()
                if adversarial:
                    disc.requires_grad_(False)  # the tokenizer learns from it; it does not learn itself here
                    losses["adversarial"] = -args.disc_weight * disc(reconstruction).float().mean()
                    disc.requires_grad_(True)
            loss = sum(losses.values()) / args.accumulate
            scaler.scale(loss).backward()

            # the discriminator's
            if adversarial:
                with autocast(device, dtype):
                    real = parallel_disc(images)
                    fake = parallel_disc(reconstruction.detach())
                    disc_loss = args.disc_weight * hinge_loss(real, fake) / args.accumulate
                scaler.scale(disc_loss).backward()
                step_disc_loss += disc_loss.detach()

            # for the log
            for name, value in losses.items():
                step_losses[name] = step_losses.get(name, 0) + value.detach() / args.accumulate
            count_codes(counts, model.last_ids)

        # each network steps, unless its own gradient is not finite
        all_finite = True
        updates = [(model, optimizer)]
        if adversarial:
            updates.append((disc, disc_optimizer))
        for module, module_optimizer in updates:
            scaler.unscale_(module_optimizer)
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip or math.inf)
            if norm.isfinite():
                scaler.step(module_optimizer)
            else:
                all_finite = False
            module_optimizer.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        num_skipped = 0 if all_finite else num_skipped + 1
        if num_skipped:
            bad = [name for name, value in step_losses.items() if not value.isfinite()]
            print0(f"step {step} left out: {', '.join(bad) or 'a gradient'} not finite")
            check(num_skipped < 50, f"{num_skipped} steps in a row were not finite: begin again with a smaller --lr")
        stopping = on_any_rank(signals, device)
        evaluating = step % args.eval_every == 0 or step == args.steps
        logging = step % args.log_every == 0 or evaluating

        if logging:
            values = all_reduce(torch.stack([*step_losses.values(), step_disc_loss])) / world_size()
            *loss_values, disc_value = values.tolist()
            terms = [f"{name} {value:.4f}" for name, value in zip(step_losses, loss_values)]
            text = f"loss {sum(loss_values):.4f} = {' + '.join(terms)}"
            if adversarial:
                text += f" | discriminator {disc_value:.3f}"
            usage, perplexity = code_usage(all_reduce(counts))
            counts.zero_()
            text += f" | codes used {joined(100 * usage, '.0f')} %"
            for i in range(config.k):
                if perplexity[i] < 2 or usage[i] < 0.1:
                    text += f" | sub-codebook {i + 1} is dying: perplexity {perplexity[i]:.1f}"
            speed = (step - first_step) * args.batch_size / (time.time() - start_time)
            left = duration((args.steps - step) * args.batch_size / speed)
            print0(f"step {step}/{args.steps}  {text} | {speed:.0f} images/s, {left} left")

        # checkpoint, then evaluation
        if rank() == 0 and (evaluating or stopping):
            save()
        val_psnr = None
        val_usage = val_perplexity = [None] * config.k
        if evaluating:
            val_psnr, val_counts = evaluate(model.eval(), val_data, args, device)
            val_usage, val_perplexity = code_usage(val_counts)
            print0(f"step {step}/{args.steps}  held out: PSNR {val_psnr:.2f} dB, {int(val_counts[0].sum())} positions, "
                   f"codes used {joined(100 * val_usage, '.1f')} %, perplexity {joined(val_perplexity, '.0f')}")
            if rank() == 0:
                images = [val_data[i][0] for i in shuffled_range(len(val_data))[:10]]
                with warn_if_unwritable(path.with_name("recon.png")) as picture:
                    save_grid(picture, reconstruction_rows(model, torch.stack(images).to(device)))
            model.train()

        # log
        if logging and rank() == 0:
            row = {"step": step, "lr": optimizer.param_groups[0]["lr"], "loss": sum(loss_values)}
            row |= dict(zip(step_losses, loss_values))
            if disc:
                row.setdefault("adversarial", 0.0)  # a column also before --disc-start
                row["discriminator"] = disc_value
            row |= by_codebook("usage", usage) | by_codebook("perplexity", perplexity)
            row |= {"val_psnr": val_psnr}
            row |= by_codebook("val_usage", val_usage) | by_codebook("val_perplexity", val_perplexity)
            append_row(path.with_name("log.csv"), row)

    if stopping and step < args.steps:
        print0(f"stopped at step {step} of {args.steps}; all is in {path}: --resume continues")
        barrier()  # when one rank ends, torchrun ends the others: so wait until all have written
        raise KeyboardInterrupt
    print0(f"done in {duration(time.time() - start_time)}: {path}, {path.with_name('recon.png')} (look at it), "
           f"{path.with_name('log.csv')}")
    print0("next: python train_gpt.py" + (f" --out {shlex.quote(args.out)}" if args.out != "out" else "")
           + (" (with its own --preset)" if flags.get("preset", "tiny") != "tiny" else ""))

if __name__ == "__main__":
    cli(main)
