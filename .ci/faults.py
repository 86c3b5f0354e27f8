"""
What the tests do once, done many times from a seed: kills, damaged files, strange flags.

$ python .ci/faults.py                # all four
$ python .ci/faults.py kills          # or one of checkpoints, images, flags, kills
"""

import collections
import contextlib
import io
import math
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import evaluate
import fqgan
import sample
import train_gpt
import train_tokenizer
from fqgan import UserError
from test_fqgan import (
    TINY_GPT_RUN, TINY_RUN, Hostile, call, load, load_models, log_of, make_folder, same, shell_words)

def damaged(data, rng):
    """A copy of the bytes that is cut off, has flipped bits, has a stretch of zeros, or two of these."""
    data = bytearray(data)
    for kind in rng.choice(("cut", "flip", "zero"), size=rng.integers(1, 3), replace=False):
        if not data:
            break
        start = rng.integers(0, len(data))
        if kind == "cut":
            del data[start:]
        elif kind == "zero":
            data[start:start + 64] = bytes(min(64, len(data) - start))
        else:
            for i in rng.integers(0, len(data), rng.integers(1, 20)):
                data[i] ^= 1 << int(rng.integers(0, 8))
    return bytes(data)

def peak_memory():
    """The most that this process has taken so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000

def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()

def images(folder, rng, n=10_000):
    """Damaged images are read or refused, nothing else: no crash, and no more memory than a large image takes."""
    noise = Image.fromarray(rng.integers(0, 256, (40, 33, 3), dtype=np.uint8))
    whole = [encoded(noise, kind) for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff")]
    claim = bytearray(whole[0])
    claim[16:24] = struct.pack(">II", 60_000, 60_000)  # a header of sizes that the file does not have
    claim[29:33] = struct.pack(">I", zlib.crc32(claim[12:29]))
    odd = [bytes(claim), b"", b"not an image"]
    for mode, size in (("1", (12_000,) * 2), ("1", (20_000,) * 2), ("L", (1, 60_000)), ("L", (60_000, 1))):
        odd.append(encoded(Image.new(mode, size), "png"))
    read = 0
    before = peak_memory()
    for i in range(n):
        ending = rng.choice(("png", "jpg", "gif", "bmp", "webp", "tif"))  # right one time in six
        path = folder / f"{i % 7}\n\"'\udcff.{ending}"
        contents = damaged(whole[i % len(whole)], rng)
        if i % 100 == 0:
            contents = odd[i // 100 % len(odd)]
        path.write_bytes(contents)
        source = fqgan.ImageData(fqgan.Folder(folder), 16, "one image")
        data = train_tokenizer.TrainingItems(source)
        try:
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
                assert data[fqgan.Draw(0, "0")][0].shape == (3, 16, 16)
            read += 1
            assert not source.failed.any()
        except UserError:
            assert source.failed.all()
        path.unlink()
    grown = peak_memory() - before
    assert grown < 1500, "12,000 x 12,000 pixels take 430 MB, and half as much again while they are scaled"
    return f"{n} damaged images: {read} were read all the same, {n - read} were refused; {grown} MB more memory"

def checkpoints(folder, rng, n=1000):
    """Mutated checkpoints load or are refused in one line; what they carry is never run."""
    call(train_tokenizer, "--k", 2, "--out", folder / "run", *TINY_RUN)
    call(train_gpt, "--out", folder / "run", *TINY_GPT_RUN)
    kinds = [("tokenizer.pt", fqgan.load_tokenizer), ("gpt.pt", load_models)]
    path = folder / "mutated.pt"
    touched = folder / "touched"
    absurd = [
        "text", None, -1, 10**9, 1.5, math.nan, [], {}, Hostile(touched),
        torch.zeros(3), torch.zeros(1).expand(10**6, 10**6), torch.zeros((), dtype=torch.int8),
    ]
    loaded = 0
    before = peak_memory()
    for i in range(n):
        name, read = kinds[i // 2 % 2]
        good = folder / "run" / name
        if i % 2:
            path.write_bytes(damaged(good.read_bytes(), rng))
        else:
            contents = load(good)
            holder = contents
            if "tokenizer" in contents and rng.random() < 0.5:
                holder = contents["tokenizer"]
            changed = holder[rng.choice(("config", "model"))]
            name = rng.choice(list(changed))
            changed[name] = absurd[rng.integers(len(absurd))]
            if rng.random() < 0.2:
                del changed[name]
            torch.save(contents, path, _use_new_zipfile_serialization=i % 8 < 4)
        try:
            read(path)
            loaded += 1
        except UserError as error:
            assert "\n" not in str(error)
    grown = peak_memory() - before
    assert not touched.exists() and grown < 500
    return f"{n} mutated checkpoints: {loaded} loaded all the same, {n - loaded} got one line; {grown} MB more memory"

def kills(folder, rng, n=30, steps=2000):
    """A run that is killed at random moments, also while it writes, and resumed each time ends as one never killed."""
    flags = [*TINY_RUN, "--k", 2, "--steps", steps, "--eval-every", 1, "--log-every", 3]
    call(train_tokenizer, *flags, "--out", folder / "whole")
    killed = 0
    writing = 0
    while True:
        begun = (folder / "cut" / "tokenizer.pt").exists()
        words = shell_words(0, "train_tokenizer.py", *(["--resume"] if begun else flags), "--out", folder / "cut")
        process = subprocess.Popen(words, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(4 + 2 * rng.random() if killed < n else 600)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            writing += any((folder / "cut").glob(".tokenizer.pt*"))
    assert process.returncode == 0, process.stderr.read()
    assert killed == n, f"the run was over after {killed} kills"
    whole, cut = (load(folder / name / "tokenizer.pt") for name in ("whole", "cut"))
    assert all(same(whole[part], cut[part]) for part in whole.keys() - {"settings"})
    rows = [{row["step"]: row for row in log_of(folder / name / "log.csv")} for name in ("whole", "cut")]
    assert all(rows[0][step] == row for step, row in rows[1].items()), "the last row of each step counts"
    assert len(rows[0]) - len(rows[1]) <= n, "a kill after a checkpoint may take its row"
    return f"{killed} kills, {writing} of them while a checkpoint was written: to the bit like a run never killed"

def actions_of(script):
    """A script's flags, as argparse has them."""
    actions = []

    def stop(parser):
        actions.extend(parser._actions)
        raise UserError("no run")

    with mock.patch.object(fqgan.Parser, "parse_args", stop), contextlib.suppress(UserError):
        call(script)
    return actions

def flags(folder, rng, n=300):
    """Every script's flags, fuzzed within their types, end in a run or in one line."""
    def offline(*_, **__):
        raise OSError("offline")

    torch.hub.download_url_to_file = offline
    data = make_folder(folder / "images", each=10)
    out = folder / "trained"
    call(train_tokenizer, "--k", 2, "--out", out, *TINY_RUN, "--data", data)
    call(train_gpt, "--out", out, *TINY_GPT_RUN)
    few = ["--n", 4, "--batch-size", 2, "--device", "cpu"]
    one_step = ["--steps", 1, "--overwrite", "--out", folder / "fuzz"]
    scripts = {  # the flags before the fuzzed ones, and those after them
        train_tokenizer: ([*TINY_RUN, "--k", 2, "--data", data], one_step),
        train_gpt: ([*TINY_GPT_RUN, "--tokenizer", out / "tokenizer.pt"], one_step),
        sample: (["--gpt", out / "gpt.pt", *few], ["--out", folder / "grid.png"]),
        evaluate: (["--tokenizer", out / "tokenizer.pt", "--data", data, *few], ["--json", folder / "e.json"]),
    }
    never = {"help", "out", "npz", "json", "preset", "resume", "compile", "workers", "steps", "save_stats"}
    texts = ("", "none", "shapes", "x", "\udcff", str(data), str(out / "gpt.pt"))
    values = {  # by flag or by type
        "dtype": ("auto", "float32", "bfloat16", "int8"),
        "device": ("auto", "cpu", "x"),
        int: (-1, 0, 1, 2, 3, 4, 8, 12),
        float: (-1.0, 0.0, 0.3, 1.0, 2.0, 1e9, math.nan, math.inf),
        str: texts,
        None: texts,
    }
    lists = ("", "1", "1,2", "0,1", "-1,1", "0.5", "nan")
    ran = collections.Counter()
    for i in range(n):
        script = list(scripts)[i % len(scripts)]
        actions = [action for action in actions_of(script) if action.dest not in never]
        argv = []
        for action in rng.choice(actions, rng.integers(1, 4), replace=False):
            argv.append(rng.choice(action.option_strings))
            if action.nargs != 0:
                pool = action.choices or values.get(action.dest) or values.get(action.type, lists)
                value = pool[rng.integers(len(pool))]
                argv.append(str(value))
        first, last = scripts[script]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                call(script, *first, *argv, *last)
            ran[script.__name__] += 1
        except UserError as error:
            assert "\n" not in str(error), argv
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{script.__name__} {argv} ends in {type(error).__name__}: {error}") from error
    told = ", ".join(f"{name} {times}" for name, times in ran.items())
    return f"{n} command lines of {len(scripts)} scripts: {ran.total()} ran ({told}), the others got one line"

def main():
    word = "".join(sys.argv[1:])
    for fault in (checkpoints, images, flags, kills):
        if word not in fault.__name__:
            continue
        began = time.time()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            told = fault(Path(folder), np.random.default_rng(0))
        print(f"{told} ({time.time() - began:.0f} s)", flush=True)

if __name__ == "__main__":
    main()
