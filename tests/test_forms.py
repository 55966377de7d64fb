"""Settings that choose how a pair runs: `--low-rank` and `--speculative-size`."""

from __future__ import annotations

import json

import pytest
import torch

from model_store.pair import open_pair
from model_store.weight_form import WeightForm
from server.commands.bench import LatencyOptions, run_latency
from server.commands.sizes import speed_file
from server.config import Settings
from server.forms import weight_form
from server.loading import speculation
from server.offline import OfflineEngine
from tests.api import tiny
from tests.model_store.test_lowrank import write_student
from tests.tiny_pairs import make_model, make_pair


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """An ordinary pair and a low-rank one."""
    folder = tmp_path_factory.mktemp("pairs")
    make_model("llama", 6, seed=1, tied=True).save_pretrained(folder / "low_rank" / "teacher")
    write_student(folder / "low_rank" / "student", folder / "low_rank" / "teacher", quantise=True)
    low_rank = open_pair(folder / "low_rank" / "teacher", folder / "low_rank" / "student")
    return open_pair(*make_pair(folder)), low_rank


def test_low_rank(pairs):
    ordinary, low_rank = pairs
    assert not weight_form(Settings(), ordinary).low_rank
    with pytest.raises(ValueError, match="--low-rank on: this student is not kept as"):
        weight_form(Settings(low_rank="on"), ordinary)
    sizes = low_rank.elasticity.sizes
    forms = [WeightForm(torch.float32, low_rank=keep) for keep in (False, True)]
    expanded, kept = (low_rank.union_bytes(sizes, form) for form in forms)
    assert kept < expanded
    for changes, expected in (
        ({}, False),
        ({"low_rank": "on"}, True),
        ({"memory_budget": expanded}, False),
        ({"memory_budget": expanded - 1}, True),
        ({"memory_budget": expanded - 1, "low_rank": "off"}, False),
    ):
        assert weight_form(Settings(dtype="float32", **changes), low_rank) == forms[expected]
    by_form = [low_rank.size_table(form)[0]["weight_bytes"] for form in forms]
    assert by_form[0] < by_form[1]  # the smallest size reads whole teacher layers, and the factors


def test_speculative_size(pairs):
    pair, dial = pairs[0], {"precision_dial": "on", "exact": "on"}
    for text, size in (("off", None), ("auto", 4), ("4L", 4), ("5", 5), ("student", 4)):
        assert speculation(Settings(speculative_size=text), pair) == (size, None)
    for text, found in (("q4", (None, 4)), ("teacher-q5", (None, 5)), ("5L-q4", (5, 4)), ("4L-exact", (4, 16))):
        assert speculation(Settings(speculative_size=text, **dial), pair) == found
    wrong = [
        ("teacher", "it can guess for none"),
        ("7L", "sizes are"),
        ("x", "not a size"),
        ("q4", "precisions are exact"),
    ]
    wrong += [("teacher-exact", "it can guess for none"), ("qx", "not a precision")]
    for text, message in wrong:
        with pytest.raises(ValueError, match=f"--speculative-size: .*({message})"):
            speculation(Settings(speculative_size=text), pair)


def test_bench_latency_measures_the_form_that_was_asked_for(pairs, tmp_path):
    ordinary, low_rank = pairs
    arguments = LatencyOptions(
        sizes="5L", batch_sizes="1", input_len=4, output_len=2, repeats=1, json_=str(tmp_path / "out")
    )

    def settings_of(pair, **changes):
        common = {"dtype": "float32", "device": "cpu", "executor": "torch", "store": str(tmp_path), "page_size": 8}
        return Settings(teacher=str(pair.teacher_path), student=str(pair.student_path), **common, **changes)

    files = set()
    for form in ("on", "off"):
        settings = settings_of(low_rank, low_rank=form)
        assert run_latency(arguments, settings) == 0
        assert json.loads((tmp_path / "out").read_text())["low_rank"] is (form == "on")
        files.add(speed_file(str(tmp_path), low_rank, weight_form(settings, low_rank)))
    assert len(files) == 2 and all(file.is_file() for file in files)
    with pytest.raises(ValueError, match="--low-rank on: this student is not kept as"):
        run_latency(arguments, settings_of(ordinary, low_rank="on"))


def test_the_engine_without_a_server_keeps_to_the_budget(tmp_path):
    pair = open_pair(*tiny.make_pair(tmp_path))
    budget = pair.union_bytes((4, 5), WeightForm(torch.float32))
    settings = Settings(dtype="float32", device="cpu", executor="torch", memory_budget=budget, kv_cache_memory=1 << 20)
    engine = OfflineEngine(pair, settings, 32)
    assert len(engine.generate(5, [[1, 2, 3]], 2)[0]) in (1, 2)
    for size, reason in ((6, "budget"), (7, "no such size")):
        with pytest.raises(ValueError, match=f"{size}L cannot answer: .*{reason}"):
            engine.generate(size, [[1, 2, 3]], 2)
