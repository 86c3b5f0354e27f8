"""
Trains the factorized tokenizer into out/tokenizer.pt; beside it out/recon.png, to look at, and out/log.csv.

$ python train_tokenizer.py --k 3                                                # built-in shapes, minutes on a laptop
$ python train_tokenizer.py --data photos/ --preset fqgan-ds16 --accumulate 8    # the paper's recipe, on one GPU
$ torchrun --nproc-per-node=8 train_tokenizer.py --data imagenet/ --preset fqgan-ds16
"""

import copy
import math
import signal
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fqgan import (
    Discriminator, FQGAN, FQGANConfig, LPIPS, RandomFeatures, TEACHERS, UserError, all_reduce,
    autocast, check, check_settings, cli, code_usage, data_parts, duration, fixed_sample, flag,
    hinge_loss, init_distributed, leave_signals_to_main, load_checkpoint, load_teacher,
    load_tokenizer, one_line, parse_flags, pick, pick_dtype, print0, psnr, rank,
    rank0_first, read_log, reconstruction_rows, resumed_settings, save_checkpoint,
    save_grid, step_seed, training_batches, world_size, write_log)

# -----------------------------------------------------------------------------
# Settings: defaults, over them a preset, then the model flags of --init, then the command line

# The defaults are the paper's recipe (section 4.1 and the official training script); fqgan-ds16 and -ds8 are its two
# resolutions. cifar10 is this project's own.
TINY = dict(
    image_size=32, downsample=4, patch_size=2, codebook_size=256,
    channels=32, channel_mult=(2, 3), res_blocks=1, norm_groups=4, z_channels=64,
    adapter_depth=1, adapter_width=96, adapter_heads=3, entropy_final=0.03,
    disc_weight=0.0, perceptual_weight=0.0, teachers="none",
    steps=1600, batch_size=32, lr=2e-3, warmup=100, final_lr=0.0,
    workers=0, log_every=50, eval_every=800)
PRESETS = {
    "tiny": TINY,
    "cifar10": dict(TINY, data="cifar10", perceptual="random", perceptual_weight=0.75, steps=3200),
    "fqgan-ds16": dict(downsample=16, recompute=True),
    "fqgan-ds8": dict(downsample=8, recompute=True),
}
# by k; 3: for 3 or more
PAPER_TEACHERS = {1: "none", 2: "clip_vitl14", 3: "dinov2_vits14,clip_vitb16"}
TEACHERS_HELP = (
    "frozen models that supervise the last sub-codebooks, with commas between: "
    f"{', '.join(TEACHERS)}, or files; none; or paper: the paper's for this k")

@dataclass
class TrainConfig:
    """What a run needs besides its model."""

    data: str = flag("shapes", "`shapes`, a folder of images, or a torchvision name such as cifar10")
    out: str = flag("out", "folder for the checkpoint, log.csv and recon.png")
    teachers: str = flag("paper", TEACHERS_HELP)
    init: str = flag("", "a checkpoint to start from: its weights, shape and loss weights")
    steps: int = flag(200_183, "optimizer steps; 40 epochs of ImageNet are 200183")
    batch_size: int = flag(256, "images a step, over all processes")
    accumulate: int = flag(1, "micro-batches a step is computed in; batch statistics are theirs")
    lr: float = flag(2e-4, "learning rate")
    disc_lr: float = flag(2e-4, "learning rate of the discriminator")
    warmup: int = flag(0, "steps over which the learning rates rise from 0")
    final_lr: float = flag(1.0, "share of the learning rates at the end of a cosine decay; 1: none")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 for no limit")
    ema: float = flag(0.0, "decay of a moving average of the weights, used in their place")
    seed: int = flag(0, "seed of weights, order of data and crops")
    device: str = flag("auto", "cuda, mps, cpu, ...; auto: the best there is")
    dtype: str = flag("auto", "float32, bfloat16, float16; auto: bfloat16 where it is fast")
    compile: bool = flag(False, "compile the model")
    workers: int = flag(8, "processes that load data; 0: none besides the main one")
    log_every: int = flag(50, "steps between progress lines, each with that step's losses")
    eval_every: int = flag(2500, "steps between evaluations, each with a checkpoint")
    eval_images: int = flag(2000, "held-out images to evaluate on, at most")
    keep: bool = flag(False, "keep every evaluation's checkpoint, as tokenizer_STEP.pt")
    resume: bool = flag(False, "continue the run in --out exactly where it stopped")
    overwrite: bool = flag(False, "replace another run's checkpoint in --out")

# what the checkpoint's tensors were made with: a resumed run cannot change it, but its rates, batch size or seed
FIXED = {f.name for f in fields(FQGANConfig) if f.name != "recompute"}
FIXED |= {"preset", "teachers", "init", "ema"}

# -----------------------------------------------------------------------------
# Helpers

def teacher_width(teacher, name, image_size, device):
    try:
        with torch.no_grad():
            _, width = teacher(torch.zeros(2, 3, image_size, image_size, device=device)).shape
    except Exception as error:
        raise UserError(f"--teachers {name}: does not turn images (2, 3, {image_size}, {image_size}) into features "
                        f"(2, D) ({one_line(error)})") from None
    return width

def load_init(model, init, path):
    """Loads another tokenizer's weights; a feature head that it lacks, or that is of another teacher, starts anew."""
    own = model.state_dict()
    weights = {}
    for name, tensor in init.state_dict().items():
        fits = name in own and own[name].shape == tensor.shape
        is_head = ".feature_head." in name
        if fits or not is_head:  # others that do not fit are an error below
            weights[name] = tensor
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"--init {path}: does not fit the model that the flags describe "
                        f"({one_line(error)})") from None
    others = [name for name in missing + unexpected if ".feature_head." not in name]
    check(not others,
          f"--init {path}: does not fit the model that the flags describe: {len(others)} weights differ")

@torch.no_grad()
def evaluate(model, data, args, device):
    """PSNR (dB, mean over images), and each sub-codebook's usage and perplexity, on --eval-images of `data`."""
    config = model.config
    indices = fixed_sample(len(data))[:args.eval_images][rank()::world_size()]
    size = args.batch_size // (args.accumulate * world_size())
    batches = [indices[i:i + size] for i in range(0, len(indices), size)]
    total = torch.zeros(2, device=device)  # sum of PSNR, number of images
    counts = torch.zeros(config.k, config.codebook_size, dtype=torch.long, device=device)
    loader = DataLoader(data, batch_sampler=batches, num_workers=args.workers,
                        worker_init_fn=leave_signals_to_main)
    # in float32, whatever the model trains in
    for images, _ in loader:
        images = images.to(device)
        ids = model.encode(images)
        total[0] += psnr(images, model.decode(ids)).sum()
        total[1] += len(images)
        for i in range(config.k):
            counts[i] += torch.bincount(ids[:, i].flatten(), minlength=config.codebook_size)
    all_reduce(total)
    usage, perplexity = code_usage(all_reduce(counts))
    return float(total[0] / total[1]), usage.tolist(), perplexity.tolist()

def joined(values, form):
    return " ".join(format(value, form) for value in values)

# -----------------------------------------------------------------------------

def main():
    # settings
    defaults, preset, flags = parse_flags(__doc__, PRESETS, FQGANConfig, TrainConfig)
    settings = {**defaults, **preset, **flags}
    path = Path(settings["out"]) / "tokenizer.pt"
    state, init = None, None
    if settings["resume"]:
        state = load_checkpoint(path, "tokenizer")
        settings = resumed_settings(state, path, defaults, flags, FIXED)
    elif settings["init"]:
        init = load_tokenizer(settings["init"])
        init_config = asdict(init.config)
        # these are the run's, not the model's
        del init_config["teacher_widths"], init_config["recompute"]
        settings = {**defaults, **preset, **init_config, **flags}
    check(state or settings["overwrite"] or not path.exists(),
          f"{path} exists: --resume continues that run, --overwrite replaces it, "
          "--out FOLDER leaves it alone")
    check_settings(settings)
    args = pick(TrainConfig, settings)
    config = pick(FQGANConfig, settings)
    check(not config.perceptual_weight or config.image_size >= 16,
          f"--image-size {config.image_size} is too small for the perceptual loss: 16 or more, "
          "or --perceptual-weight 0")
    check(not config.disc_weight or config.image_size >= 24,
          f"--image-size {config.image_size} is too small for the discriminator: 24 or more, "
          "or --disc-weight 0")

    # processes
    device = init_distributed(args.device, args.seed)
    dtype = pick_dtype(args.dtype, device)
    num_micro_batches = world_size() * args.accumulate
    check(args.batch_size % num_micro_batches == 0,
          f"--batch-size {args.batch_size} is not divisible by {world_size()} processes x "
          f"--accumulate {args.accumulate}")

    # teachers, perceptual loss, data
    names = PAPER_TEACHERS[min(config.k, 3)] if args.teachers == "paper" else args.teachers
    names = [name for name in names.split(",") if name not in ("", "none")]
    with rank0_first():
        teachers = [load_teacher(name).to(device) for name in names]
        perceptual = None
        if config.perceptual_weight:
            make_perceptual = LPIPS if config.perceptual == "lpips" else RandomFeatures
            perceptual = make_perceptual().to(device)
    widths = []
    for teacher, name in zip(teachers, names):
        widths.append(teacher_width(teacher, name, config.image_size, device))
    config = replace(config, teacher_widths=tuple(widths))
    train_data, val_data = data_parts(args.data, config.image_size)
    check(len(train_data) >= args.batch_size,
          f"{train_data.description}: {len(train_data)} images are fewer than one batch; "
          f"--batch-size {len(train_data)} or less would do")
    data_fingerprint = train_data.fingerprint() + val_data.fingerprint()
    path.parent.mkdir(parents=True, exist_ok=True)

    # model and optimizers
    torch.manual_seed(args.seed % 2**63)  # the same weights whatever was loaded before
    model = FQGAN(config).to(device)
    if init:
        load_init(model, init, args.init)
    ema = None
    if args.ema:
        ema = copy.deepcopy(model).eval().requires_grad_(False)
    disc = Discriminator().to(device) if config.disc_weight else None
    adam = dict(betas=(0.9, 0.95), fused=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, **adam)
    disc_optimizer = None
    if disc:
        disc_optimizer = torch.optim.Adam(disc.parameters(), lr=args.disc_lr, **adam)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # what a checkpoint holds
    parts = {"model": model, "ema": ema, "optimizer": optimizer,
             "disc": disc, "disc_optimizer": disc_optimizer}
    parts = {name: part for name, part in parts.items() if part is not None}

    # resume
    step = 0
    log = []
    if state:
        check(state["data_fingerprint"] == data_fingerprint,
              f"{args.data} does not hold the images that the run in {path} began with: "
              "others would be held out")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        step = state["step"]
        log = read_log(path.with_name("log.csv"), step)
        check(step < args.steps,
              f"{path} is already at step {step} of {args.steps}; to go on, give a larger --steps")
        del state

    # what the training step calls
    parallel_model = torch.compile(model) if args.compile else model
    parallel_disc = disc
    if world_size() > 1:
        parallel_model = DistributedDataParallel(parallel_model, broadcast_buffers=False)
        parallel_disc = DistributedDataParallel(disc, broadcast_buffers=False) if disc else None
    order = training_batches(len(train_data), args.batch_size, args.seed, args.steps, step,
                             rank(), world_size(), args.accumulate)
    loader = DataLoader(train_data, batch_sampler=order, num_workers=args.workers,
                        pin_memory=device.type == "cuda",
                        prefetch_factor=4 if args.workers else None,
                        worker_init_fn=leave_signals_to_main)
    batches = iter(loader)

    # say what is about to happen
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"FQGAN: k={config.k} sub-codebooks of {config.codebook_size} codes, "
           f"{config.grid}x{config.grid} positions, {millions:.1f} M parameters")
    print0(f"data: {train_data.description}: {len(train_data)} images")
    print0(f"held out: {val_data.description}: {len(val_data)} images")
    print0(f"steps {step} to {args.steps} of {args.batch_size} images, "
           f"{world_size()} x {device.type}, {dtype}")
    off = {}  # loss -> why
    for name in ("commit", "entropy", "disentangle", "representation", "perceptual", "disc"):
        if getattr(config, f"{name}_weight") == 0:
            off[name] = "its weight is 0"
    if config.k == 1:
        off["disentangle"] = "there is one sub-codebook"
    if not teachers:
        off["representation"] = "no --teachers"
    if disc and config.disc_start >= args.steps:
        off["disc"] = f"it starts at step {config.disc_start}"
    off = [f"{name} ({reason})" for name, reason in off.items()]
    print0(f"losses that are off: {', '.join(off) or 'none'}")

    # Ctrl-C and the signals that end a job: finish the step, save, and leave; a second one ends it at once
    signals = []
    def on_signal(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)

    # for the log: how often each code was chosen
    counts = torch.zeros(config.k, config.codebook_size, dtype=torch.long, device=device)
    num_skipped = 0  # steps in a row that were not finite
    first_step, start_time = step, time.time()
    stopping = False

    while step < args.steps and not stopping:
        # learning rates: linear warm-up, cosine decay
        progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
        lr_factor = args.final_lr + (1 - args.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        if step < args.warmup:
            lr_factor = (step + 1) / args.warmup
        for group in optimizer.param_groups:
            group["lr"] = lr_factor * args.lr
        if disc:
            for group in disc_optimizer.param_groups:
                group["lr"] = lr_factor * args.disc_lr

        # no random state to save: a resumed step draws the same
        torch.manual_seed(step_seed(args.seed, step, rank()))
        adversarial = disc is not None and step >= config.disc_start
        step_losses = {}
        for micro_step in range(args.accumulate):
            images, _ = next(batches)
            images = images.to(device, non_blocking=True)
            if world_size() > 1:  # ranks exchange gradients in the last backward pass only
                for part in (parallel_model, parallel_disc):
                    if part:
                        part.require_backward_grad_sync = micro_step == args.accumulate - 1

            # forward
            with autocast(device, dtype):
                with torch.no_grad():
                    features = [teacher(images).float() for teacher in teachers]
                # losses have their weights in them; the entropy's decays
                reconstruction, losses = parallel_model(images, features)
                losses["entropy"] = losses["entropy"] * config.entropy_final ** (step / args.steps)
                if perceptual:
                    distance = perceptual(images, reconstruction).mean()
                    losses["perceptual"] = config.perceptual_weight * distance
                if adversarial:
                    # the discriminator gets no gradient here, and so needs no DDP
                    disc.requires_grad_(False)
                    logits = disc(reconstruction).float()
                    losses["adversarial"] = -config.disc_weight * logits.mean()

            # backward
            loss = sum(losses.values()) / args.accumulate
            scaler.scale(loss).backward()
            if adversarial:  # the discriminator's own loss, on images and reconstructions
                disc.requires_grad_(True)
                with autocast(device, dtype):
                    real = parallel_disc(images)
                    fake = parallel_disc(reconstruction.detach())
                    losses["discriminator"] = config.disc_weight * hinge_loss(real, fake)
                scaler.scale(losses["discriminator"] / args.accumulate).backward()

            # for the log
            for name, loss in losses.items():
                step_losses[name] = step_losses.get(name, 0) + loss.detach() / args.accumulate
            for i, branch in enumerate(model.branches):
                ids = branch.quantizer.last_ids.flatten()
                counts[i] += torch.bincount(ids, minlength=config.codebook_size)

        # step, unless a gradient is not finite
        all_finite = True
        for module, module_optimizer in ((model, optimizer), (disc, disc_optimizer)):
            if module is None or (module is disc and not adversarial):
                continue
            scaler.unscale_(module_optimizer)
            max_norm = args.grad_clip or math.inf
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
            if norm.isfinite():
                scaler.step(module_optimizer)
            else:
                all_finite = False
            module_optimizer.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        if all_finite:
            num_skipped = 0
        else:
            num_skipped += 1
            # float16's scale takes some steps to be found
            limit = 30 if dtype == torch.float16 else 10
            bad = [name for name, loss in step_losses.items() if not loss.isfinite()]
            print0(f"step {step} left out: {', '.join(bad) or 'the gradient'} not finite")
            check(num_skipped < limit,
                  f"{num_skipped} steps in a row were not finite, step {step} the last: try a smaller --lr; "
                  "the last checkpoint is still good")
        if ema:
            decay = min(args.ema, step / (step + 10))  # smaller in the first steps
            with torch.no_grad():  # there are no buffers
                for average, p in zip(ema.parameters(), model.parameters()):
                    average.lerp_(p, 1 - decay)

        # a signal may reach one rank before another
        stopping = all_reduce(torch.tensor(len(signals), device=device)).item() > 0

        # log
        if step % args.log_every == 0 or step == args.steps:
            values = all_reduce(torch.stack([*step_losses.values()])) / world_size()
            row = dict(zip(step_losses, values.tolist()))
            disc_loss = row.pop("discriminator", None)
            usage, perplexity = code_usage(all_reduce(counts))
            counts.zero_()
            terms = [f"{name} {value:.4f}" for name, value in row.items()]
            text = f"loss {sum(row.values()):.4f} = {' + '.join(terms)}"
            if disc_loss is not None:
                text += f" | discriminator {disc_loss:.3f}"
            text += f" | codes used {joined(100 * usage, '.0f')} %"
            for i in range(config.k):
                if perplexity[i] < 2 or usage[i] < 0.1:
                    text += f" | sub-codebook {i + 1} is dying: perplexity {perplexity[i]:.1f}"
            speed = (step - first_step) * args.batch_size / (time.time() - start_time)
            left = duration((args.steps - step) * args.batch_size / speed)
            print0(f"step {step}/{args.steps}  {text} | {speed:.0f} images/s, {left} left")
            row = {"step": step, "lr": lr_factor * args.lr, "loss": sum(row.values()), **row}
            if disc_loss is not None:
                row["discriminator"] = disc_loss
            for i in range(config.k):
                row[f"usage_{i + 1}"] = float(usage[i])
                row[f"perplexity_{i + 1}"] = float(perplexity[i])
            log.append(row)
            if rank() == 0:
                write_log(path.with_name("log.csv"), log)

        # checkpoint, then evaluation
        if step % args.eval_every == 0 or step == args.steps or stopping:
            if rank() == 0:
                contents = {name: part.state_dict() for name, part in parts.items()}
                contents |= {"kind": "tokenizer", "config": asdict(config), "settings": settings,
                             "step": step, "scaler": scaler.state_dict(),
                             "data_fingerprint": data_fingerprint}
                save_checkpoint(path, contents)
                if args.keep:
                    save_checkpoint(path.with_stem(f"tokenizer_{step}"), contents)
            counts.zero_()  # as a resumed run starts: its log is the same
            if not stopping or step == args.steps:
                shown = ema or model.eval()
                value, usage, perplexity = evaluate(shown, val_data, args, device)
                print0(f"step {step}/{args.steps}  held out: PSNR {value:.2f} dB, codes used "
                       f"{joined([100 * u for u in usage], '.1f')} %, "
                       f"perplexity {joined(perplexity, '.0f')}")
                row = {"step": step, "val_psnr": value}
                for i in range(config.k):
                    row[f"val_usage_{i + 1}"] = usage[i]
                    row[f"val_perplexity_{i + 1}"] = perplexity[i]
                log.append(row)
                if rank() == 0:
                    write_log(path.with_name("log.csv"), log)
                    images = [val_data[i][0] for i in fixed_sample(len(val_data))[:10]]
                    rows = reconstruction_rows(shown, torch.stack(images).to(device))
                    save_grid(path.with_name("recon.png"), rows)
                model.train()

    if stopping and step < args.steps:
        print0(f"stopped at step {step} of {args.steps}; all is in {path}: --resume continues")
        raise KeyboardInterrupt
    print0(f"done in {duration(time.time() - start_time)}: {path}, {path.with_name('recon.png')} (look at it), "
           f"{path.with_name('log.csv')}")
    print0("next: python train_gpt.py" + (f" --out {args.out}" if args.out != "out" else ""))

if __name__ == "__main__":
    cli(main)
