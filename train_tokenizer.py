"""
Trains the factorized tokenizer into out/tokenizer.pt; beside it out/recon.png, and out/log.csv with its curves in out/log.png.

$ python train_tokenizer.py --k 3                                                  # built-in shapes, minutes on a laptop
$ python train_tokenizer.py --data photos/ --preset fqgan-ds16 --accumulate 8      # the paper's recipe, on one GPU
$ torchrun --nproc-per-node=8 train_tokenizer.py --data imagenet/ --preset fqgan-ds16
"""

import argparse
import contextlib
import copy
import csv
import gc
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from fqgan import (LPIPS, TEACHERS, FQGAN, Discriminator, FQGANConfig, UserError, explained, flag, hinge_loss, load_checkpoint, load_data,
                   load_teacher, require, to_uint8)

# The fqgan presets are the paper's recipe (sec. 4.1 and the official training script), which is the flags' defaults.
PRESETS = {
    "tiny": dict(image_size=32, downsample=4, patch_size=2, channels=32, channel_mult=(2, 3), res_blocks=1, norm_groups=4, z_channels=64,
                 codebook_size=256, adapter_depth=1, adapter_width=96, adapter_heads=3, entropy_final=0.03,
                 disc_weight=0.0, perceptual_weight=0.0, teachers="none",
                 steps=1600, batch_size=32, lr=2e-3, warmup=100, final_lr=0.0, workers=0, log_every=50, eval_every=800),
    "fqgan-ds16": dict(downsample=16, recompute=True),
    "fqgan-ds8": dict(downsample=8, recompute=True),
}


# -----------------------------------------------------------------------------
# What all scripts share: errors, flags, devices, files, figures


def cli(main):
    """Runs a script's main(); a UserError becomes one line on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # all end together, and what main() left of the group is gone before it: else its threads may outlive Python
            gc.collect()
            dist.destroy_process_group()
        return
    except UserError as error:  # a data loader's worker sends its whole traceback along: keep the last line
        end = f"{Path(sys.argv[0]).name}: {str(error).strip().splitlines()[-1].removeprefix('fqgan.UserError: ')}"
    except OSError as error:  # a full disk, a read-only folder, ...
        end = f"{Path(sys.argv[0]).name}: {error}"
    except torch.OutOfMemoryError as error:
        end = (f"{Path(sys.argv[0]).name}: out of memory ({str(error).splitlines()[0][:160]}): give a smaller --batch-size, or in training "
               "a larger --accumulate (a tokenizer also takes --recompute)")
    except KeyboardInterrupt:
        end = 130
    sys.exit(end)  # not above: here the failed main() is gone, and with it the processes that loaded its data


class Parser(argparse.ArgumentParser):
    """argparse with its complaints cut to one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def start(device="auto", seed=0):
    """
    One start-up for every machine. Under torchrun joins the process group (nccl on GPUs, else gloo).

    Returns (device, rank, world size), the device being the best there is of cuda, mps and cpu unless named.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    torch.set_flush_denormal(True)  # CPUs take a hundred times as long over the softmax's tiniest numbers
    torch.manual_seed(seed % 2**63)
    return device, rank, world


def one_first(make):
    """make(), by one process of a machine before the others: what is to be downloaded, it fetches for all."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    made = make()
    if dist.is_initialized() and first:
        dist.barrier()
    return made


def load_parts(name, image_size):
    """load_data's training part and held-out part."""
    def load():
        return [load_data(name, image_size, train) for train in (True, False)]
    return load() if Path(name).exists() else one_first(load)


def data_name(given, model, path):
    """The --data that is given, or what the loaded model at `path` was trained on."""
    require(given or model.trained_on, f"{path} does not say what it was trained on: name the images with --data")
    return given or model.trained_on


def has_fast_bf16(device):
    """Whether bfloat16 is computed in hardware: on CPUs without it, emulation is several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capable = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))


@contextlib.contextmanager
def replacing(path, mark=""):
    """
    A hidden name beside `path` to write to. At the end of the block it takes the place of `path`, which is so never there in part.
    mark: makes the name this process's own, where several may write the same file.
    """
    whole = Path(path).with_name(f".{Path(path).name}{mark}.tmp")
    try:
        yield whole
        os.replace(whole, path)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise


def write_json(path, contents):
    with replacing(path) as whole:
        whole.write_text(json.dumps(contents, indent=1))


def save_checkpoint(path, contents, keep=0):
    """`path` always holds a whole checkpoint; the `keep` before it stay beside it, as NAME.1.pt, the youngest, and so on."""
    path = Path(path)
    older = [path.with_suffix(f".{i}{path.suffix}") for i in range(1, keep + 1)]
    try:
        with replacing(path) as whole:
            with open(whole, "wb") as file:
                torch.save(contents, file)
                file.flush()
                os.fsync(file.fileno())
            for i in reversed(range(1, keep)):
                if older[i - 1].exists():
                    os.replace(older[i - 1], older[i])
            if keep and path.exists():
                older[0].unlink(missing_ok=True)
                try:
                    os.link(path, older[0])
                except OSError:  # a file system without links
                    shutil.copyfile(path, older[0])
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {error}; the checkpoint before it is untouched") from None


def save_grid(path, rows, tile=96):
    """
    Writes rows of images as one picture. rows: list of (label, images (n,3,H,W) in [-1, 1]); the label stands to the
    left. Images narrower than `tile` pixels are enlarged by a whole factor without smoothing.
    """
    zoom, gap, font = max(1, -(-tile // rows[0][1].shape[-1])), 4, ImageFont.load_default(14)
    height, width = (side * zoom for side in rows[0][1].shape[-2:])
    margin = math.ceil(max(font.getlength(label) for label, _ in rows)) + 12
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (margin + (width + gap) * columns, gap + (height + gap) * len(rows)), "white")
    for r, (label, images) in enumerate(rows):
        top = gap + r * (height + gap)
        ImageDraw.Draw(sheet).text((margin - 6, top + height // 2), label, fill="black", font=font, anchor="rm")
        for c, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + c * (width + gap), top))
    sheet.save(path)


def save_curves(path, log_path):
    """Draws a log: a panel for each figure, the sub-codebooks' together, from its smallest to its largest value."""
    with open(log_path, newline="") as file:
        rows = list(csv.DictReader(file))
    panels = {}  # name -> the points of one curve or of several
    for name in rows[0].keys() - {"step", "lr"} if rows else ():
        points = [(int(r["step"]), float(r[name])) for r in rows if r[name] and math.isfinite(float(r[name]))]
        if points:
            panels.setdefault(name.rstrip("_0123456789"), {})[name] = points
    if not panels:
        return
    width, height, columns, fine = 340, 200, 3, 3  # drawn three times as large, then averaged: smooth lines
    sheet = Image.new("RGB", (fine * columns * width, fine * -(-len(panels) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12 * fine)
    colours = (38, 110, 190), (220, 90, 30), (40, 150, 80), (140, 70, 170)
    for i, name in enumerate(sorted(panels, key=lambda n: (n.startswith("val_"), n != "loss", n))):
        xs, ys = zip(*(point for points in panels[name].values() for point in points))
        left, right, low, high = min(xs), max(xs), min(ys), max(ys)
        x0, y0 = i % columns * width + 72, i // columns * height + 26
        x1, y1 = x0 + width - 86, y0 + height - 48
        draw.rectangle([fine * v for v in (x0, y0, x1, y1)], outline=(200, 200, 200), width=2)
        title = name.replace("_", " ")
        for j, (curve, points) in enumerate(sorted(panels[name].items())):
            at = [(fine * (x0 + (x1 - x0) * (x - left) / max(1, right - left)), fine * (y1 - (y1 - y0) * (y - low) / (high - low or 1))) for x, y in points]
            draw.line(at, fill=colours[j % 4], width=4)
            draw.circle(at[-1], 7, fill=colours[j % 4])  # the last point, or the only one
            if curve != name:  # a sub-codebook's: its number
                draw.text((fine * (x0 + 15 * j) + font.getlength(f"{title}  "), fine * (y0 - 8)), curve.rsplit("_", 1)[1], colours[j % 4], font, "ls")
        for x, y, text, anchor in ((x0, y0 - 8, title, "ls"), (x0 - 5, y0, f"{high:.3g}", "rt"), (x0 - 5, y1, f"{low:.3g}", "rb"),
                                   (x0, y1 + 5, str(left), "lt"), (x1, y1 + 5, f"step {right}", "rt")):
            draw.text((fine * x, fine * y), text, "black", font, anchor)
    sheet.reduce(fine).save(path)


def psnr(images, others):
    """(B,3,H,W) in [-1,1] twice -> (B,) peak signal-to-noise ratio in dB, of the images as 8-bit files hold them."""
    error = (to_uint8(images).float() - to_uint8(others).float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1e-4))


def usage(counts):
    """counts (..., V) of how often each code was chosen -> (share of codes chosen at all, perplexity), each (...)"""
    counts = counts.cpu()  # float64 is not to be had on every device
    p = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return (counts > 0).double().mean(-1), torch.special.entr(p).sum(-1).exp()


# -----------------------------------------------------------------------------
# What a training run is given


@dataclass
class TrainConfig:
    """What a training run needs besides its model; the tokenizer's and the GPT's alike."""

    data: str = flag("", "`shapes`, a folder of (class folders of) images, or a torchvision name such as cifar10; "
                     "empty: shapes, or for a GPT what its tokenizer saw")
    out: str = flag("out", "folder for the checkpoint, log.csv and pictures")
    steps: int = flag(0, "optimizer steps; 0: from --epochs")
    epochs: float = flag(40.0, "passes over the data, where --steps is 0")
    batch_size: int = flag(256, "images a step, over all processes and --accumulate")
    accumulate: int = flag(1, "micro-batches a step is computed in, one after the other, to save memory")
    lr: float = flag(2e-4, "learning rate")
    warmup: int = flag(0, "steps over which the learning rate rises from 0")
    final_lr: float = flag(1.0, "share of --lr that a cosine decay ends at; 1 for no decay")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 for no limit")
    ema: float = flag(0.0, "decay of an exponential moving average of the weights, evaluated and sampled from in their place; 0 for none")
    keep: int = flag(1, "whole checkpoints kept besides the newest")
    seed: int = flag(0, "seed of weights, order of data, crops and dropout")
    device: str = flag("auto", "cuda, mps, cpu, ...; auto: the best there is")
    dtype: str = flag("auto", "float32; bfloat16 or float16 (autocast, float16 with a gradient scaler); or auto: bfloat16 where the hardware has it")
    compile: bool = flag(False, "compile the model")
    workers: int = flag(8, "processes that load data; 0: none besides the main one")
    log_every: int = flag(50, "steps between progress lines and rows of log.csv")
    eval_every: int = flag(2500, "steps between evaluations, each with a picture and a checkpoint")
    eval_images: int = flag(2000, "held-out images to evaluate on, at most")
    resume: bool = flag(False, "continue the run in --out exactly where it stopped; flags not given are taken from it")
    overwrite: bool = flag(False, "replace another run's checkpoint in --out; with --resume: accept changed flags")
    tensorboard: bool = flag(False, "also write TensorBoard events to --out (needs the package tensorboard)")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A run may be resumed with other values of these without becoming another run.
FREE = {"out", "keep", "recompute", "fsdp", "device", "compile", "workers", "log_every", "eval_every", "eval_images", "resume", "overwrite", "tensorboard"}


def whole_numbers(text):
    return tuple(int(n) for n in text.split(",") if n)


def parse(doc, presets, kind, *groups):
    """
    The command line of a training script: a flag for every field of the dataclasses `groups` that has a help text, over the
    preset's values, over the defaults; with --resume, over the checkpoint's.

    Returns (settings dict, the checkpoint to resume or None).
    """
    parser = Parser(doc)
    first = next(iter(presets))
    parser.add_argument("--preset", choices=presets, default=argparse.SUPPRESS,
                        help=f"values for the flags that are not given; each may be overridden (default: {first})")
    every = {f.name: f for group in groups for f in fields(group) if f.metadata}
    for name, f in every.items():
        shown = "".join(f"; {p}: {values[name]}" for p, values in presets.items() if values.get(name, f.default) != f.default)
        options = dict(dest=name, default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {f.default}{shown})".replace("%", "%%"))
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif f.type in (int, float, str):
            options["type"] = f.type
        else:
            options["type"] = whole_numbers
        parser.add_argument("--" + name.replace("_", "-"), **options)
    given = vars(parser.parse_args())
    named = given.pop("preset", None)
    preset = presets.get(named, {})  # what was asked for; of the first preset, which nobody named, only what is lacking is taken
    if given.get("init"):  # shape and loss weights are the checkpoint's
        saved = load_checkpoint(given["init"], kind)["config"]
        with explained(f"--init {given['init']}: its config does not fit this version"):
            config = asdict(groups[0](**saved))
        preset = preset | {name: value for name, value in config.items() if name in every and name != "recompute"}
    if "epochs" in given:
        given.setdefault("steps", 0)
    settings = {name: f.default for name, f in every.items()} | presets[named or first] | preset | given

    path, checkpoint = Path(settings["out"]) / f"{kind}.pt", None
    if settings["resume"]:
        checkpoint = load_checkpoint(path, kind)
        saved = checkpoint.get("settings")
        require(saved, f"{path} holds weights, not a run: it cannot be resumed" + (", but --init starts from it" if kind == "tokenizer" else ""))
        changed = {n: v for n, v in (preset | given).items() if n not in FREE and saved.get(n) != v}
        require(not changed.keys() & {"init", "tokenizer"}, f"{path}: a run goes on with the model that it began with: leave out --init and --tokenizer")
        require(not changed or settings["overwrite"],
                f"{path} was made with " + ", ".join(f"--{n.replace('_', '-')} {saved.get(n)} (now {v})" for n, v in changed.items())
                            + ": leave these out to continue it, add --overwrite to continue with the new values, or choose another --out")
        settings |= {n: v for n, v in saved.items() if n in every and n not in given and n not in preset and n != "out"}
        settings |= {n: given.get(n, False) for n in ("resume", "overwrite")}
    elif path.exists() and not settings["overwrite"]:
        raise UserError(f"{path} exists: --resume continues that run, --overwrite replaces it, --out FOLDER leaves it alone")
    for name, low in dict(steps=0, batch_size=1, accumulate=1, warmup=0, workers=0, log_every=1, eval_every=1, eval_images=1,
                          lr=0, epochs=0, final_lr=0, grad_clip=0, ema=0, seed=0, keep=0).items():
        require(low <= settings[name] < math.inf, f"--{name.replace('_', '-')} is {settings[name]}; it must be a finite number of at least {low}")
    require(settings["dtype"] in ("auto", *DTYPES), f"--dtype {settings['dtype']}: choose {', '.join(DTYPES)} or auto")
    require(settings["ema"] < 1, f"--ema is {settings['ema']}; a decay is below 1, such as 0.999")
    return settings, checkpoint


def pick(group, settings):
    """The dataclass `group` filled from a dict that holds more."""
    return group(**{f.name: settings[f.name] for f in fields(group) if f.name in settings})


# -----------------------------------------------------------------------------
# The machinery of a run


class Order:
    """
    The endless order of training data, a batch sampler: every epoch a permutation of its own, cut into batches that may
    straddle epochs, each dealt to the ranks in turn. A function of (seed, step) alone, so that a run can be taken up
    at any step, on any number of ranks, and sees the same batches. Items are (index, draw), see ImageData.
    """

    def __init__(self, size, run):
        self.size, self.run, self.first = size, run, run.step

    def epoch(self, number):
        return np.random.default_rng([self.run.seed, number]).permutation(self.size)

    def __iter__(self):
        run, known = self.run, {}
        for step in range(self.first, run.steps_total):
            items = []
            for position in range(step * run.batch_size + run.rank, (step + 1) * run.batch_size, run.world):
                number, offset = divmod(position, self.size)
                if number not in known:
                    known = {n: known[n] for n in known if n >= number - 1} | {number: self.epoch(number)}
                items.append((int(known[number][offset]), f"{run.seed} {number}"))
            micro = len(items) // run.accumulate
            for i in range(run.accumulate):
                yield items[i * micro:(i + 1) * micro]


class Run:
    """
    The loop's machinery, the same for the tokenizer and the GPT: ranks, order of data, learning rate, log, checkpoints.

    Of `settings` it takes the fields of TrainConfig as attributes; `path` is the checkpoint's. The parts given to
    `track` (name -> anything with a state_dict) are what a checkpoint holds, and are restored when resuming.
    """

    def __init__(self, settings, checkpoint, kind, log="log.csv"):
        self.settings, self.checkpoint, self.kind = settings, checkpoint, kind
        vars(self).update({f.name: settings[f.name] for f in fields(TrainConfig)})
        self.device, self.rank, self.world = start(self.device, self.seed)
        if self.dtype == "auto":
            self.dtype = "bfloat16" if has_fast_bf16(self.device) else "float32"
        require(self.batch_size % (self.world * self.accumulate) == 0,
                f"--batch-size {self.batch_size} is not divisible by {self.world} processes x --accumulate {self.accumulate}")
        self.path = Path(self.out) / f"{kind}.pt"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be made into a folder ({error.strerror})") from None
        self.log_path = self.path.parent / log
        self.step, self.steps_total, self.began = 0, self.steps, time.time()
        self.parts, self.parallel_parts = {}, []
        self.asked = False  # this process got a signal
        self.interrupted = False  # all processes know of it, and the step is the last
        self.skipped = 0  # steps in a row that were not finite
        self.window = {}  # sums since the last log line, see record
        self.columns, self.events = [], None  # of log.csv, once this process has written to it; TensorBoard's
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "float16")
        if self.tensorboard and self.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.events = SummaryWriter(self.out)
            except ImportError:
                raise UserError("--tensorboard needs the package: pip install tensorboard") from None

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype], enabled=self.dtype != "float32")

    def track(self, **parts):
        self.parts = {name: part for name, part in (parts | {"scaler": self.scaler if self.scaler.is_enabled() else None}).items() if part is not None}
        if self.checkpoint:
            missing = [n for n in self.parts if n not in self.checkpoint]
            require(not missing, f"{self.path} does not hold {', '.join(missing)}: it was made without; it cannot be resumed with")
            for name, part in self.parts.items():
                with explained(f"{self.path}: {name} does not fit"):
                    state = self.checkpoint[name]
                    if isinstance(part, FSDPModule):
                        state = {n: sharded(state[n], like) for n, like in part.state_dict().items()}
                    if isinstance(part, torch.optim.Optimizer):  # before it is loaded, which moves it to the device
                        weights = [p for group in part.param_groups for p in group["params"]]
                        state = state | {"state": {i: {n: sharded(value, weights[i]) for n, value in kept.items()} for i, kept in state["state"].items()}}
                    part.load_state_dict(state)
            self.step, before = self.checkpoint["step"], self.checkpoint.get("world", self.world)
            if before != self.world:
                self.say(f"resumed on {self.world} processes, begun on {before}: the same batches in the same order, dealt anew; dropout and what is computed "
                         "over a process's own batch differ")
            self.window = {name: value.to(self.device) * (self.rank == 0) for name, value in self.checkpoint["window"].items()}
            self.checkpoint.clear()

    def shard(self, model, blocks):
        """
        Each process keeps a share of the model's weights, and so of gradients and optimizer state, and gathers those of one of `blocks` while it
        works in it (FSDP2). To be called before the optimizer is made. A checkpoint holds the whole tensors, as without.
        """
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else what is in no block stays gathered after an evaluation
        register_fsdp_forward_method(model, "generate")

    def parallel(self, module):
        """The module as the training step calls it: compiled if asked for, gradients averaged over the ranks."""
        called = torch.compile(module) if self.compile else module
        if self.world > 1 and not isinstance(module, FSDPModule):
            takes = inspect.signature(DistributedDataParallel).parameters  # renamed in PyTorch 2.15
            option = "forward_sync_buffers" if "forward_sync_buffers" in takes else "broadcast_buffers"
            called = DistributedDataParallel(called, **{option: False})
            self.parallel_parts.append(called)
        return called

    def loader(self, data, batches):
        return DataLoader(data, batch_sampler=batches, num_workers=self.workers, pin_memory=self.device.type == "cuda",
                          prefetch_factor=4 if self.workers else None, worker_init_fn=leave_signals_to_main)

    def to_device(self, batch):
        return [x.to(self.device, non_blocking=True) for x in batch]

    def prepare(self, data):
        """Settles the number of steps; refuses data that cannot fill a batch and runs that have nothing left to do."""
        require(len(data) >= self.batch_size, f"{data.origin}: {len(data)} images are fewer than one batch; --batch-size {len(data)} or less would do")
        self.steps_total = self.steps or max(1, math.ceil(self.epochs * len(data) / self.batch_size))
        require(self.step < self.steps_total,
                f"{self.path} is already at step {self.step} of {self.steps_total}: evaluate.py measures it; to train on, add --steps with a larger "
                "number and --overwrite")

    def describe(self, train, held_out):
        self.say(f"data: {train.origin}: {len(train)} images; held out: {held_out.origin}: {len(held_out)}")
        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        self.say(f"steps {self.step} to {self.steps_total} of {self.batch_size} images, {self.world} x {machine}, {self.dtype}"
                 + (", compiled" if self.compile else "") + (f", {self.accumulate} micro-batches" if self.accumulate > 1 else ""))

    def finish(self, made, following):
        if self.interrupted and self.step < self.steps_total:
            self.say(f"stopped at step {self.step} of {self.steps_total}; all is in {self.path}: --resume goes on from here")
            raise KeyboardInterrupt
        made = f"{self.path} alone, not evaluated" if self.interrupted else made
        self.say(f"done in {duration(time.time() - self.began)}: {made}\nnext: {following}")

    def evaluation_batches(self, data):
        """This rank's share of eval_images of `data`, drawn at random but always the same, on the device."""
        draw = fixed_draw(data)[:self.eval_images]
        if any(isinstance(part, FSDPModule) for part in self.parts.values()):  # whose processes must make as many batches
            draw = draw[:len(draw) // self.world * self.world] or draw[:1] * self.world
        share = draw[self.rank::self.world]
        size = max(1, self.batch_size // (self.world * self.accumulate))
        return map(self.to_device, self.loader(data, [share[i:i + size] for i in range(0, len(share), size)]))

    # -- the loop

    def learning_rate(self, step):
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps_total - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))

    def loop(self, data, optimizers):
        """Yields the number of each step that is still to do, with learning rates and random state set for it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)
        self.batches = iter(self.loader(data, Order(len(data), self)))
        self.first, self.clock = self.step, time.time()
        try:
            while self.step < self.steps_total and not self.interrupted:
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = self.learning_rate(self.step)
                # every step has its own random state: nothing to save, nothing that an evaluation could disturb
                digest = hashlib.sha256(f"{self.seed} {self.step} {self.rank}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:7], "little"))
                asked = torch.tensor(int(self.asked), device=self.device)  # a signal may reach one rank before another
                if self.world > 1:
                    dist.all_reduce(asked, dist.ReduceOp.MAX)
                self.interrupted, self.losses = bool(asked), {}
                self.step += 1
                yield self.step - 1
        finally:
            self.batches = None  # ends the processes that load data

    def interrupt(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say("\nstopping after the next step; once more to stop at once")

    def micro_batches(self):
        """This step's batches on the device; ranks exchange gradients in the last one's backward pass only."""
        for i in range(self.accumulate):
            for part in self.parallel_parts:  # a sharded model exchanges them every time: whole gradients might not fit
                part.require_backward_grad_sync = i == self.accumulate - 1
            yield self.to_device(next(self.batches))

    def backward(self, losses):
        """The gradients of losses (name -> scalar, weights included) of a micro-batch, added to those of the step's others."""
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0) + loss.detach()
        self.scaler.scale(sum(losses.values()) / self.accumulate).backward()

    def update(self, *pairs):
        """
        The step of each (module, optimizer); left out, with the name of what is not finite, where a gradient is not. After ten such steps
        in a row (thirty in float16, whose scale has to be found) the run ends with UserError: the last checkpoint is from before them.
        """
        finite = True
        for module, optimizer in pairs:
            self.scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), self.grad_clip or math.inf)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # the same on all ranks
            if norm.isfinite():
                self.scaler.step(optimizer)
            finite &= bool(norm.isfinite())
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.skipped = 0 if finite else self.skipped + 1
        if not finite:
            bad = [name for name, loss in self.losses.items() if not loss.isfinite()]
            self.say(f"step {self.step} left out: {', '.join(bad) or 'the gradient'} not finite"
                     + (" (float16's scale is being found)" if self.dtype == "float16" and not bad else ""))
        require(self.skipped < (30 if self.dtype == "float16" else 10),
                f"{self.skipped} steps in a row were not finite, step {self.step} the last: try a smaller --lr; "
                "the last checkpoint is from before them")

    def average(self, ema, module):
        """Moves the moving average towards the module's weights; the decay is smaller in the first steps."""
        if ema is not None:
            decay = min(self.ema, self.step / (self.step + 10))
            with torch.no_grad():
                for slow, fast in zip(ema.parameters(), module.parameters()):
                    slow.lerp_(fast, 1 - decay)

    @property
    def due(self):
        """Whether this step ends with an evaluation and a checkpoint."""
        return self.step % self.eval_every == 0 or self.step == self.steps_total or self.interrupted

    # -- log and checkpoints

    def record(self, losses, counts=None):
        """
        Adds a micro-batch to the window that the next log line sums up: losses (name -> scalar tensor) to be averaged,
        counts of chosen codes (k, V) to be added up. No device is made to wait for it.
        """
        for name, value in losses.items():
            value = value.detach().float()
            pair = torch.stack([value.nan_to_num(0, 0, 0), value.isfinite().float()])  # sum and number
            self.window[name] = self.window[name] + pair if name in self.window else pair
        if counts is not None:
            self.window["counts"] = self.window["counts"] + counts if "counts" in self.window else counts

    def gather_window(self):
        """Adds up the ranks' windows on rank 0 and empties the others'."""
        for name in sorted(self.window) if self.world > 1 else ():
            dist.all_reduce(self.window[name])
            self.window[name] *= self.rank == 0

    def log(self):
        """At the end of a step: every log_every steps the window becomes a progress line and a row of log.csv."""
        if self.step % self.log_every and self.step < self.steps_total:
            return
        self.gather_window()
        counts = self.window.pop("counts", None)
        means = {name: float(total / n) if n else math.nan for name, (total, n) in self.window.items()}
        self.window = {}
        if self.rank:
            return
        row = {"loss": sum(v for n, v in means.items() if n != "discriminator")} | means
        text = " + ".join(f"{name} {value:.4f}" for name, value in means.items() if name != "discriminator")
        text = f"loss {row['loss']:.4f} = {text}" + (f" | discriminator {means['discriminator']:.3f}" if "discriminator" in means else "")
        if counts is not None:
            share, perplexity = usage(counts)
            row |= per_code("usage", share) | per_code("perplexity", perplexity)
            text += f" | codes used {' '.join(f'{100 * s:.0f}' for s in share.tolist())} %"
            for i, (used, effective) in enumerate(zip(share.tolist(), perplexity.tolist())):
                if effective < 2 or used < 0.1:
                    text += f" | sub-codebook {i + 1} {'has collapsed' if effective < 2 else 'is dying'}: perplexity {effective:.1f}"
        speed = (self.step - self.first) * self.batch_size / (time.time() - self.clock)
        left = (self.steps_total - self.step) * self.batch_size / speed
        self.say(f"step {self.step}/{self.steps_total}  {text} | {speed:.0f} images/s, {duration(left)} left")
        self.write_row(row)

    def write_row(self, figures):
        if self.rank:
            return
        row = {"step": str(self.step), "lr": f"{self.learning_rate(self.step - 1):.6g}"} | {n: f"{v:.6g}" for n, v in figures.items()}
        try:
            if row.keys() <= set(self.columns):
                with open(self.log_path, "a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(row)
            else:  # the first row of this process, or one with new names: of an earlier run, keep the rows up to where it is resumed
                rows = list(csv.DictReader(open(self.log_path, newline=""))) if (self.columns or self.resume) and self.log_path.exists() else []
                rows = [r for r in rows if int(r["step"]) <= (self.step if self.columns else self.first)] + [row]
                self.columns = list(dict.fromkeys(name for r in rows for name in r if name))
                with replacing(self.log_path) as whole, open(whole, "w", newline="") as file:
                    writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
                    writer.writeheader()
                    writer.writerows(rows)
        except OSError as error:
            raise UserError(f"cannot write {self.log_path}: {error.strerror}") from None
        if self.events is not None:
            for name, value in figures.items():
                self.events.add_scalar(name, value, self.step)
            self.events.flush()

    def milestone(self, model, evaluate, paint, **extra):
        """
        What ends a step that is due: first the checkpoint with `extra`; then, with the model in eval mode, the figures of evaluate() -> (name ->
        number, the same in words) into log and output, and the picture that paint() saves. Of an interrupted run the checkpoint alone: there
        may be seconds left.
        """
        self.save(**extra)
        if self.interrupted:
            return
        was_training = model.training
        model.eval()
        figures, words = evaluate()
        self.write_row(figures)
        self.say(f"step {self.step}/{self.steps_total}  held out: {words}")
        paint()
        model.train(was_training)
        if self.rank == 0:
            save_curves(self.log_path.with_suffix(".png"), self.log_path)

    def save(self, **extra):
        """Writes the checkpoint: all tracked parts, where the run stands, its settings, and `extra`."""
        self.gather_window()

        def whole(value):  # of a sharded tensor all of it, on the first process
            if not isinstance(value, DTensor):
                return value
            value = value.full_tensor()
            return value.cpu() if self.rank == 0 else None

        parts = {name: tree_map(whole, part.state_dict()) for name, part in self.parts.items()}
        if self.rank == 0:
            save_checkpoint(self.path, keep=self.keep, contents=extra | parts | {"kind": self.kind, "settings": self.settings, "step": self.step,
                                                                                "world": self.world, "window": self.window})


def sharded(value, like):
    """A whole tensor as `like` is sharded, if it is and the tensor has its shape; anything else as it is."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) and value.shape == like.shape else value


def leave_signals_to_main(_):
    """In a process that loads data, of the group that gets a signal: it works on while the main one finishes its step, for two minutes at most."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(120) if hasattr(signal, "alarm") else None)


def fixed_draw(data):
    """The indices of `data` in an order that is random, since folders come class by class, and always the same."""
    return np.random.default_rng(0).permutation(len(data)).tolist()


def per_code(name, values):
    return {f"{name}_{i + 1}": float(v) for i, v in enumerate(values)}


def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# -----------------------------------------------------------------------------
# Training the tokenizer


@dataclass
class StartConfig:
    teachers: str = flag("paper", "frozen models that supervise the last sub-codebooks, with commas between: " + ", ".join(TEACHERS) + ", or files, see "
                         "load_teacher; none; or paper: clip_vitl14 for k=2, dinov2_vits14,clip_vitb16 for k of 3 and more")
    global_negatives: bool = flag(False, "the representation loss takes its negatives from all processes, not from a process's own batch")
    init: str = flag("", "a checkpoint, ours or a published one: the run starts from its weights, shape and loss weights; all else is the preset's")


PAPER_TEACHERS = [], ["clip_vitl14"], ["dinov2_vits14", "clip_vitb16"]  # for k of 1, 2, and 3 or more


def features_of(images, teachers, run, every_rank):
    """
    What the teachers say of the images: (a list of (N,D), the number of the first that is this process's), N being the batch of this
    process, or with every_rank of all.
    """
    with torch.no_grad(), run.autocast():
        features = [teacher(images).float().contiguous() for teacher in teachers]
    if not every_rank or run.world == 1:
        return features, 0
    gathered = [[torch.empty_like(f) for _ in range(run.world)] for f in features]
    for parts, mine in zip(gathered, features):
        dist.all_gather(parts, mine)
    return [torch.cat(parts) for parts in gathered], run.rank * len(images)


def width_of(teacher, name, size, device):
    with explained(f"--teachers {name}: does not turn images (2, 3, {size}, {size}) into features (2, D)"), torch.no_grad():
        _, width = teacher(torch.zeros(2, 3, size, size, device=device)).shape
        return width


def start_from(model, path):
    """Loads a checkpoint's weights; a feature head that is lacking, or of another teacher, starts anew."""
    state, own = load_checkpoint(path, "tokenizer"), model.state_dict()
    weights = {n: t for n, t in (state.get("ema") or state["model"]).items() if ".head." not in n or n in own and own[n].shape == t.shape}
    with explained(f"--init {path}: does not fit the model that the flags describe"):
        missing, unexpected = model.load_state_dict(weights, strict=False)
        others = [n for n in missing + unexpected if ".head." not in n]
        require(not others, f"--init {path}: does not fit the model that the flags describe ({len(others)} weights such as {others[:1]})")


def take_counts(model):
    """How often each code was chosen in training since the last call: (k, V)."""
    counts = torch.stack([b.quantizer.counts for b in model.branches])
    for branch in model.branches:
        branch.quantizer.counts.zero_()
    return counts


@torch.no_grad()
def evaluate(model, data, run):
    """PSNR (dB, mean over images) and each sub-codebook's usage and perplexity on eval_images of `data`, in figures and in words."""
    config, total = model.config, torch.zeros(2, device=run.device)
    counts = torch.zeros(config.k, config.codebook_size, dtype=torch.long, device=run.device)
    for images, _ in run.evaluation_batches(data):
        with run.autocast():
            ids = model.encode(images)
            total += torch.stack([psnr(images, model.decode(ids)).sum(), total.new_tensor(len(images))])
        for i in range(config.k):
            counts[i] += torch.bincount(ids[:, i].flatten(), minlength=config.codebook_size)
    if run.world > 1:
        dist.all_reduce(total)
        dist.all_reduce(counts)
    value, (share, perplexity) = float(total[0] / total[1]), usage(counts)
    return ({"val_psnr": value} | per_code("val_usage", share) | per_code("val_perplexity", perplexity),
            f"PSNR {value:.2f} dB, codes used {' '.join(f'{100 * s:.1f}' for s in share.tolist())} %, perplexity {' '.join(f'{p:.0f}' for p in perplexity.tolist())}")


@torch.no_grad()
def reconstruction_rows(model, images):
    """For save_grid: the images, their reconstructions, what each sub-codebook holds of them alone, and what is left without it."""
    ids, each = model.encode(images), range(model.config.k)
    rows = [("original", images), ("reconstruction", model.decode(ids))]
    rows += [(f"codebook {i + 1} alone", model.decode(ids, only=[i])) for i in each if model.config.k > 1]
    return rows + [(f"without {i + 1}", model.decode(ids, only=[j for j in each if j != i])) for i in each if model.config.k > 2]


def save_reconstructions(model, data, run):
    if run.rank == 0:
        images = torch.stack([data[i][0] for i in fixed_draw(data)[:10]]).to(run.device)
        save_grid(run.path.parent / "recon.png", reconstruction_rows(model, images))


def main():
    settings, checkpoint = parse(__doc__, PRESETS, "tokenizer", FQGANConfig, TrainConfig, StartConfig)
    config, names = pick(FQGANConfig, settings), settings["teachers"]
    names = PAPER_TEACHERS[min(config.k, 3) - 1] if names == "paper" else [n for n in names.split(",") if n and n != "none"]
    require(not config.perceptual_weight or config.image_size >= 16,
            f"--image-size {config.image_size} is too small for LPIPS: 16 or more, or --perceptual-weight 0")
    require(not config.disc_weight or config.image_size >= 24,
            f"--image-size {config.image_size} is too small for the discriminator: 24 or more, or --disc-weight 0")
    settings["data"] = settings["data"] or "shapes"
    run = Run(settings, checkpoint, "tokenizer")
    teachers = one_first(lambda: [load_teacher(name).to(run.device) for name in names])
    config = replace(config, teacher_widths=tuple(width_of(t, name, config.image_size, run.device) for t, name in zip(teachers, names)))
    lpips = one_first(LPIPS).to(run.device) if config.perceptual_weight else None
    train_data, held_out = load_parts(run.data, config.image_size)

    model = FQGAN(config).to(run.device)
    if settings["init"] and not checkpoint:
        start_from(model, settings["init"])
    ema = copy.deepcopy(model).eval().requires_grad_(False) if run.ema else None
    disc = Discriminator().to(run.device) if config.disc_weight else None
    optimizer, disc_optimizer = (torch.optim.Adam(m.parameters(), lr=run.lr, betas=(0.9, 0.95), fused=True) if m else None for m in (model, disc))
    run.track(model=model, ema=ema, optimizer=optimizer, discriminator=disc, disc_optimizer=disc_optimizer)
    run.prepare(train_data)
    parallel_model, parallel_disc = run.parallel(model), disc and run.parallel(disc)

    run.say(f"FQGAN: k={config.k} sub-codebooks of {config.codebook_size} codes, {config.grid}x{config.grid} positions, "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    run.describe(train_data, held_out)
    zero = "its weight is 0"
    terms = {  # name: why it is off, if it is
        "reconstruct": "", "codebook": "", "commit": "" if config.commit_weight else zero, "entropy": "" if config.entropy_weight else zero,
        "disentangle": "there is one sub-codebook" if config.k == 1 else "" if config.disentangle_weight else zero,
        f"adversarial from step {config.disc_start}" if disc else "adversarial":
            zero if not disc else "" if config.disc_start < run.steps_total else "the run ends before",
        "perceptual": "" if lpips else zero, f"representation by {', '.join(names)}" if names else "representation": "" if names else "no --teachers"}
    run.say(f"losses on: {', '.join(n for n, why in terms.items() if not why)}; off: {', '.join(f'{n} ({why})' for n, why in terms.items() if why)}")

    for step in run.loop(train_data, [o for o in (optimizer, disc_optimizer) if o]):
        adversarial = disc is not None and step >= config.disc_start
        for images, _ in run.micro_batches():
            features, first = features_of(images, teachers, run, settings["global_negatives"])
            with run.autocast():
                reconstruction, losses = parallel_model(images, features, first)
                if lpips:
                    losses["perceptual"] = config.perceptual_weight * lpips(images, reconstruction).mean()
                if "entropy" in losses:  # a quantizer of one's own may have none
                    losses["entropy"] = losses["entropy"] * config.entropy_final ** (step / run.steps_total)
                if adversarial:
                    disc.requires_grad_(False)
                    losses["adversarial"] = -config.disc_weight * disc(reconstruction).float().mean()
            run.backward(losses)
            if adversarial:
                disc.requires_grad_(True)
                with run.autocast():
                    losses["discriminator"] = config.disc_weight * hinge_loss(parallel_disc(images), parallel_disc(reconstruction.detach()))
                run.backward({"discriminator": losses["discriminator"]})
            run.record(losses, take_counts(model))
        run.update((model, optimizer), *[(disc, disc_optimizer)] * adversarial)
        run.average(ema, model)
        run.log()

        if run.due:
            best = ema or model
            run.milestone(best, lambda: evaluate(best, held_out, run), lambda: save_reconstructions(best, held_out, run), config=asdict(config))
    run.finish(f"{run.path}, {run.path.parent / 'recon.png'} (look at it), {run.path.parent / 'log.csv'}",
               "python train_gpt.py" + (f" --out {run.out}" if run.out != "out" else ""))


if __name__ == "__main__":
    cli(main)
