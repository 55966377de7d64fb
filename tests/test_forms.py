"""Settings that choose how a pair runs: `--low-rank` and `--speculative-size`."""

from __future__ import annotations

import pytest
import torch

from model_store.pair import open_pair
from server.config import Settings
from server.launch import keeps_low_rank, speculative_size
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
    assert not keeps_low_rank(Settings(), ordinary, torch.float32)
    with pytest.raises(ValueError, match="--low-rank on: this student is not kept as"):
        keeps_low_rank(Settings(low_rank="on"), ordinary, torch.float32)
    sizes = low_rank.elasticity.sizes
    expanded = low_rank.union_bytes(sizes, torch.float32)
    assert low_rank.union_bytes(sizes, torch.float32, low_rank=True) < expanded
    for settings, expected in (
        (Settings(), False),
        (Settings(low_rank="on"), True),
        (Settings(memory_budget=expanded), False),
        (Settings(memory_budget=expanded - 1), True),
        (Settings(memory_budget=expanded - 1, low_rank="off"), False),
    ):
        assert keeps_low_rank(settings, low_rank, torch.float32) is expected
    by_form = [low_rank.size_table(torch.float32, form)[0]["weight_bytes"] for form in (False, True)]
    assert by_form[0] < by_form[1]  # the smallest size reads whole teacher layers, and the factors


def test_speculative_size(pairs):
    pair = pairs[0]
    for text, size in (("off", None), ("auto", 4), ("4L", 4), ("5", 5), ("student", 4)):
        assert speculative_size(Settings(speculative_size=text), pair) == size
    for text, message in (("teacher", "it can guess for none"), ("7L", "sizes are"), ("x", "not a size")):
        with pytest.raises(ValueError, match=f"--speculative-size: .*({message})"):
            speculative_size(Settings(speculative_size=text), pair)
