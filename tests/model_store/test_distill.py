"""`boomerang distill` and `evaluate` from end to end on a tiny teacher: what comes out is a pair that loads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model_store.distill.start import source_name
from model_store.pair import open_pair
from model_store.weight_form import WeightForm
from server.cli import main
from server.offline import OfflineEngine
from tests.api.tiny import ROOT, make_pair


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("distill"))[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text((ROOT / "docs" / "architecture.md").read_text())
    return file


FORMS = [
    [], ["--store-rank", "8", "--int8"], ["--rank", "6", "--schedule", "warmup_stable_decay"],
    ["--recipe", "published", "--order", "last"], ["--tokens", "0", "--no-warm-start"],
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_distil_load_evaluate(teacher, text, tmp_path, form):
    out = tmp_path / "student"
    small = ["--tokens", "1500", "--row-tokens", "64", "--batch-rows", "4", "--calibration-rows", "4"]
    small += ["--device", "cpu"]
    assert main(["distill", "--teacher", str(teacher), "--data", str(text), "--out", str(out), *small, *form]) == 0
    pair = open_pair(teacher, out)
    assert pair.elasticity.sizes[-1] == 6 and len(pair.elasticity.sizes) > 1
    loaded = pair.load(WeightForm(torch.float32))
    assert all(np.isfinite(tensor).all() for tensor in loaded.tensors())
    held_out = tmp_path / "held_out.txt"
    held_out.write_text((ROOT / "LICENSE").read_text())
    windows = ["--windows", "2", "--window-tokens", "64", "--dtype", "float32"]
    arguments = ["evaluate", "--teacher", str(teacher), "--student", str(out), "--text", str(held_out), *windows]
    assert main([*arguments, "--report", str(tmp_path / "report"), "--compare-orders"]) == 0
    stored = json.loads((out / "quality.json").read_text())
    sizes = stored["sizes"]
    assert stored["orders"].keys() == {"last_to_first", "first_to_last"}
    assert all(rows.keys() == sizes.keys() for rows in stored["orders"].values())
    assert set(sizes) == {str(size) for size in pair.elasticity.sizes}
    assert sizes["6"]["kl"] == pytest.approx(0.0, abs=1e-6) and sizes[str(pair.elasticity.sizes[0])]["kl"] > 0
    assert {path.suffix for path in (tmp_path / "report").iterdir()} == {".md", ".svg", ".html"}


def test_a_student_may_start_from_another(teacher, text, tmp_path, capsys):
    common = ["--teacher", str(teacher), "--data", str(text), "--row-tokens", "64", "--batch-rows", "4"]
    common += ["--device", "cpu", "--calibration-rows", "4", "--store-rank", "8", "--no-warm-start"]
    assert main(["distill", *common, "--tokens", "1500", "--order", "first", "--out", str(tmp_path / "a")]) == 0
    common += ["--start-from", str(tmp_path / "a"), "--order", "start", "--licence", "CC0-1.0"]
    assert main(["distill", *common, "--tokens", "0", "--out", str(tmp_path / "b")]) == 0
    first, second = (load_file(tmp_path / name / "student_lowrank.safetensors") for name in "ab")
    name = "model.layers.0.mlp.down_proj.lora_"
    a, b = (file[f"{name}B"].float() @ file[f"{name}A"].float() for file in (first, second))
    assert a.norm() > 0 and (a - b).norm() < 0.02 * a.norm()
    a, b = (json.loads((tmp_path / name / "pair.json").read_text()) for name in "ab")
    assert b["start_from"] == ["a"] and b["thresholds"] == a["thresholds"]
    assert b["licence"] == "CC0-1.0" and "licence" not in a  # goes into the model cards of exports
    assert source_name(Path("run") / "checkpoints" / "checkpoint-9") == "run/checkpoints/checkpoint-9"
    assert main(["distill", *common, "--tokens", "0", "--keep", "0,2,3,5", "--out", str(tmp_path / "c")]) == 1
    assert "--order start" in capsys.readouterr().err


def test_row_sizes_train_the_layers_of_these_sizes_alone(teacher, text, tmp_path, capsys):
    common = ["distill", "--teacher", str(teacher), "--data", str(text), "--row-tokens", "64", "--batch-rows", "4"]
    common += ["--device", "cpu", "--calibration-rows", "4", "--no-warm-start"]
    common += ["--pure-share", "0", "--order-noise", "0"]
    assert main([*common, "--tokens", "0", "--order", "last", "--out", str(tmp_path / "a")]) == 0
    common += ["--start-from", str(tmp_path / "a"), "--order", "start", "--tokens", "1500"]
    changed = {}
    for sizes in ("5L", "5L,4"):
        out = tmp_path / sizes
        assert main([*common, "--row-sizes", sizes, "--out", str(out)]) == 0
        before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "a", out))
        changed[sizes] = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert len(changed["5L"]) == 1 and changed["5L"] < changed["5L,4"] and len(changed["5L,4"]) == 2
    for wrong in (["--row-sizes", "6"], ["--row-sizes", "4,x"], ["--row-sizes", "4", "--small-bias", "2"]):
        assert main([*common, *wrong, "--out", str(tmp_path / "b")]) in (1, 2)
        assert "--row-sizes" in capsys.readouterr().err


def test_evaluate_refuses_text_that_was_trained_on(teacher, text, capsys):
    student = teacher.parent / "student"
    arguments = ["evaluate", "--teacher", str(teacher), "--student", str(student), "--text", str(text)]
    arguments += ["--windows", "1", "--window-tokens", "64", "--training-data", str(text), "--no-store"]
    assert main(arguments) == 1
    assert "13-word runs" in capsys.readouterr().err


def test_the_teacher_answers_bare_prompts_through_our_engine(teacher, text, tmp_path, monkeypatch):
    calls = []
    generate = OfflineEngine.generate
    heard = lambda self, *asked: calls.append((asked, generate(self, *asked))) or calls[-1][1]  # noqa: E731
    monkeypatch.setattr(OfflineEngine, "generate", heard)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(5)))
    small = ["--tokens", "1000", "--row-tokens", "64", "--batch-rows", "4", "--calibration-rows", "4"]
    small += ["--device", "cpu", "--self-generate", "3", "--answer-tokens", "8", "--order", "last"]
    small += ["--out", str(tmp_path / "student")]
    assert main(["distill", "--teacher", str(teacher), "--data", str(text), str(prompts), *small]) == 0
    ((size, asked, most, temperature), answers) = calls[0]
    assert (size, len(asked), most, temperature) == (6, 3, 8, 1.0)
    assert all(0 < len(answer) <= 8 for answer in answers)


def test_what_is_measured_later_is_added_to_what_is_known(teacher, text, tmp_path):
    shutil.copytree(teacher.parent / "student", tmp_path / "student")
    arguments = ["evaluate", "--teacher", str(teacher), "--student", str(tmp_path / "student"), "--sizes", "4,6"]
    assert main([*arguments, "--text", str(text), "--windows", "1", "--window-tokens", "64"]) == 0
    assert main([*arguments, "--speed"]) == 0
    sizes = json.loads((tmp_path / "student" / "quality.json").read_text())["sizes"]
    assert all(row["kl"] >= 0 and row["tokens_per_second"] > 0 for row in sizes.values())


def test_a_processor_without_bfloat16_multiplies_rounded_weights_in_float32(teacher, text, tmp_path, monkeypatch):
    found = {}
    for capable in (False, True):
        monkeypatch.setattr("model_store.distill.processes.has_bf16", lambda on_cpu, capable=capable: capable)
        student = shutil.copytree(teacher.parent / "student", tmp_path / str(capable))
        arguments = ["evaluate", "--teacher", str(teacher), "--student", str(student), "--sizes", "4"]
        assert main([*arguments, "--text", str(text), "--windows", "4", "--window-tokens", "64"]) == 0
        found[capable] = json.loads((student / "quality.json").read_text())
    assert found[False]["measured"]["products"] == "float32" and "products" not in found[True]["measured"]
    narrow, wide = (found[capable]["sizes"]["4"] for capable in (True, False))
    assert narrow["kl"] != wide["kl"] == pytest.approx(narrow["kl"], rel=0.05)
    assert wide["perplexity"] == pytest.approx(narrow["perplexity"], rel=0.02)


def test_evaluate_lets_our_engine_answer_chat_prompts(teacher, tmp_path, capsys):
    chat = tmp_path / "chat.txt"
    chat.write_text("Hello?\nWhat is a fox?\n")
    student = teacher.parent / "student"
    arguments = ["evaluate", "--teacher", str(teacher), "--student", str(student), "--chat", str(chat), "--speed"]
    assert main([*arguments, "--max-new-tokens", "12", "--sizes", "4,6", "--report", str(tmp_path), "--no-store"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert "chat KL" in (tmp_path / "quality.html").read_text()
