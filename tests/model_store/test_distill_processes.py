"""Runs of `distill` that several processes share, and runs that are cut short and resumed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.cli import main
from tests.api.tiny import ROOT, make_pair

WATCHED = Path(__file__).with_name("watched_distill.py")
SMALL = ["--row-tokens", "64", "--calibration-rows", "4", "--device", "cpu", "--loss-on", "all"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("processes"))[0]


@pytest.fixture(scope="module")
def names(teacher, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "train.txt"
    text.write_text((ROOT / "docs" / "architecture.md").read_text())
    return ["--teacher", str(teacher), "--data", str(text), *SMALL]


def run_watched(launcher, notes, arguments):
    """Run `distill` in processes of their own, without bfloat16, and return what each of them noted."""
    notes.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, *launcher, str(WATCHED), str(notes), *arguments]
    done = subprocess.run(command, cwd=notes, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(file) for file in sorted(notes.iterdir())], done


def distance(a, b):
    return sum(float((a[name].float() - b[name].float()).square().sum()) for name in a) ** 0.5


def test_two_processes_train_what_one_does_with_twice_the_rows(names, tmp_path):
    # Every row runs the student and every position counts, so that a step does not depend on who runs which row.
    arguments = [*names, "--tokens", "1536", "--pure-share", "1", "--position-share", "1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = ["--out", str(tmp_path / "pair"), "--batch-rows", "4"]
    (first, second), done = run_watched(launcher, tmp_path / "two", [*arguments, *out])
    (alone,), _ = run_watched([], tmp_path / "one", [*arguments, "--out", str(tmp_path / "alone"), "--batch-rows", "8"])

    assert len(first["rows"]) == len(second["rows"]) == len(alone["rows"]) == 3  # steps: --tokens of all processes
    assert set(first["drawn"]) == set(second["drawn"]) == {8}
    for a, b, both in zip(first["rows"], second["rows"], alone["rows"], strict=True):
        assert {*map(tuple, a.tolist()), *map(tuple, b.tolist())} == {*map(tuple, both.tolist())}
    assert first["thresholds"] == second["thresholds"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    moved = distance(alone["start"], alone["weights"])
    assert moved > 0 and distance(first["weights"], alone["weights"]) < 0.01 * moved

    assert not second["wrote"] and first["wrote"] == alone["wrote"] != []
    assert done.stdout.count("wrote ") == 1 and done.stderr.count(" rows of 64 tokens") == 1
    curve = [json.loads(line) for line in (tmp_path / "pair" / "training_curve.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in curve] == [512, 1024, 1536]


@pytest.mark.parametrize("form", [[], ["--rank", "6", "--schedule", "linear"]], ids=["whole", "rank"])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(names, tmp_path, form):
    arguments = ["distill", *names, "--tokens", "1024", "--batch-rows", "4", "--save-steps", "2", *form]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "cut" / "checkpoints")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-4")  # as if stopped after its second step
    assert main([*arguments, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "training_curve.jsonl").read_text().splitlines()]
    assert steps == [3, 4]
    file = "student_lowrank.safetensors" if form else "model.safetensors"
    whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    whole, resumed = (json.loads((tmp_path / name / "pair.json").read_text()) for name in ("whole", "cut"))
    assert whole["thresholds"] == resumed["thresholds"]


def test_a_run_cut_short_before_its_first_checkpoint_is_fitted_again(names, tmp_path):
    """The order is kept before training begins, the fit is not: it must not be taken for done."""
    arguments = ["distill", *names, "--tokens", "0", "--warm-start", "--order", "last"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "checkpoints" / "order.json", tmp_path / "cut" / "checkpoints")
    assert main([*arguments, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
