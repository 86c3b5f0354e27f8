"""
Tests of tools/study.py.

$ python -m pytest -q tools/test_study.py
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fqgan import FQGANConfig, GPTConfig, parse_flags
from test_fqgan import HERE, command_line
from tools import study
import train_gpt
import train_tokenizer

def test_the_picture_is_of_the_table():
    with open(HERE / "assets" / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert study.picture(rows) == (HERE / "assets" / "study.svg").read_text()
    of_another_k = dict(rows[0], row="5x256")
    without_gpt = dict(rows[0], row="6x256", nats_a_position="")
    picture = study.picture([*rows, of_another_k, without_gpt])
    assert ">5x256<" in picture and "6x256" not in picture

def test_flags_of_all_rows():
    """They are those of the two scripts, and no row lacks its own."""
    tokenizer_flags, gpt_flags = [" ".join(flags) for flags in zip(*study.RECIPES.values())]
    for flags in study.TOKENIZERS.values():
        with command_line(train_tokenizer, *tokenizer_flags.split(), *flags.split()):
            given = parse_flags("", train_tokenizer.PRESETS, FQGANConfig, train_tokenizer.TrainConfig)
        FQGANConfig(k=given["k"])
    for name, flags in study.GPTS.values():
        assert name in study.TOKENIZERS
        with command_line(train_gpt, *gpt_flags.split(), *flags.split()):
            parse_flags("", train_gpt.PRESETS, GPTConfig, train_gpt.TrainConfig)
    assert {(steps, name) for steps, name, _ in study.ROWS} <= {(s, n) for s in study.RECIPES for n in study.GPTS}

def test_what_is_missing_is_run(tmp_path, monkeypatch):
    """Rows that the table has are left out, and those without their teacher; bits are means over pairs."""
    monkeypatch.chdir(tmp_path)
    Path("assets").mkdir()
    rows = [(800, "2x512 both", 0), (800, "2x512", 0), (3200, "2x512", 0), (3200, "2x512", 1)]
    monkeypatch.setattr(study, "ROWS", rows)
    figures = dict(psnr=20.0, rfd=1.0, named=0.5, ssim=0.9, mutual_information_1_2=2.5, probe_all=0.75)
    figures |= dict(mutual_information_1_2_by_chance=9.0, usage_1=1.0, usage_2=0.5, probe_1=0.25, probe_2=0.5)
    for seed in range(2):
        out = Path(study.folder_of("2x512", 3200, seed))
        out.mkdir(parents=True)
        (out / "figures.json").write_text(json.dumps(figures))
    commands = []

    def run(command):
        commands.append(command.split()[0])
        Path("study/2x512-3200-0/samples.json").write_text('{"fd": 7.0, "named": 0.25}')
        Path("study/2x512-3200-0/gpt_log.csv").write_text("val_loss,val_loss_1,val_loss_2\n9,9,9\n3,2,4\n")

    monkeypatch.setattr(study, "run", run)
    with open("assets/study.csv", "w", newline="") as file:
        table = csv.DictWriter(file, study.COLUMNS)
        table.writeheader()
        table.writerow({"row": "2x512", "steps": 800, "seed": 0})
    study.run_missing_rows("data", 0, 1)
    _, first, second = study.read_table()
    assert commands == ["train_gpt.py", "sample.py", "evaluate.py"]
    expected = dict(steps="3200", psnr="20.0", usage="0.75", shared_bits="2.5", probes="0.250 0.500", probe_all="0.75")
    assert expected.items() <= first.items() and expected.items() <= second.items()
    assert (first["nats_a_position"], first["fd"], first["named_samples"]) == ("6.0", "7.0", "0.25")
    assert second["seed"] == "1" and second["fd"] == ""
    study.run_missing_rows("data", 0, 1)
    assert len(study.read_table()) == 3
