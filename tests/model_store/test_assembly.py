"""Sizes and layer paths, against the published cutting rule written down independently."""

import itertools
import sys
import time

import pytest

from model_store.assembly import AssemblyError, Elasticity

QWEN3_4B = (36, (*range(0, 35, 2), 35))
PYTHIA = (32, (*range(0, 31, 2), 31))
LLAMA_3B = (28, (0, *range(1, 28, 2)))
DISTILGPT2 = (12, (0, 2, 4, 7, 9, 11))
DEFAULT = (30, (*range(0, 29, 2), 29))
INNER_ONE = (10, (0, 2, 3, 5, 6, 9))  # one-layer blocks in the middle and at the end


def published_layers(num_teacher: int, kept: tuple[int, ...], k: int, from_last: bool) -> list[int]:
    """The cut of dcml-lab/boomerang-distillation (patching/utils.py, get_layer_cutoffs), in global layer ids."""
    pairs = list(itertools.pairwise(kept))
    if from_last:
        cuts = [(i + 1, b) for i, (a, b) in enumerate(pairs) if b - a > 1]
        student, teacher = cuts[-(k + 1)] if k + 1 <= len(cuts) else (0, 0)
        return [num_teacher + i for i in range(student)] + list(range(teacher, num_teacher))
    cuts = [(i, a) for i, (a, b) in enumerate(pairs) if b - a > 1]
    student, teacher = cuts[k] if k < len(cuts) else (len(kept), num_teacher)
    return list(range(teacher)) + [num_teacher + i for i in range(student, len(kept))]


@pytest.mark.parametrize("num_teacher, kept", [QWEN3_4B, PYTHIA, LLAMA_3B, DISTILGPT2, DEFAULT, INNER_ONE])
@pytest.mark.parametrize("from_last", [True, False])
def test_every_published_k_is_one_of_our_sizes(num_teacher, kept, from_last):
    elasticity = (Elasticity.last_to_first if from_last else Elasticity.first_to_last)(num_teacher, kept)
    num_blocks = sum(station.num_layers > 1 for station in elasticity.stations)
    assert len(elasticity.sizes) == num_blocks + 1
    assert elasticity.sizes[0] == len(kept) and elasticity.sizes[-1] == num_teacher
    for k in range(1, num_blocks + 1):
        size = elasticity.sizes[k]  # the published code's `num_layers_to_patch = k`
        path = elasticity.path(size)
        assert list(path.layers) == published_layers(num_teacher, kept, k, from_last)
        full = size == num_teacher
        ends = ("teacher" if full else "student", "teacher", "teacher")
        if not from_last:
            ends = ("teacher", "teacher" if full else "student", "teacher" if full else "student")
        assert (path.embed_from, path.norm_from, path.head_from) == ends
    student = elasticity.path(len(kept))
    assert list(student.layers) == [num_teacher + i for i in range(len(kept))]
    assert (student.embed_from, student.norm_from, student.head_from) == ("student",) * 3


@pytest.mark.parametrize("num_teacher, kept, count", [(*QWEN3_4B, 18), (*PYTHIA, 16), (*LLAMA_3B, 14), (*DEFAULT, 15)])
def test_published_pairs_have_every_depth(num_teacher, kept, count):
    for order in (Elasticity.last_to_first, Elasticity.first_to_last):
        assert order(num_teacher, kept).sizes == tuple(range(len(kept), num_teacher + 1))
        assert len(order(num_teacher, kept).sizes) == count


def test_a_block_of_three_leaves_out_a_size():
    assert Elasticity.last_to_first(*DISTILGPT2).sizes == (6, 7, 8, 10, 11, 12)
    assert Elasticity.first_to_last(*DISTILGPT2).sizes == (6, 7, 8, 10, 11, 12)
    with pytest.raises(KeyError):
        Elasticity.last_to_first(*DISTILGPT2).path(9)


def test_thresholds_of_qwen3():
    elasticity = Elasticity.last_to_first(*QWEN3_4B)
    # Stations 0..16 have two layers; the one-layer stations 17 and 18 ride with station 16, the first to be patched.
    assert elasticity.thresholds == (*range(36, 19, -1), 20, 20)
    assert Elasticity(*QWEN3_4B, elasticity.thresholds).path(25) == elasticity.path(25)


def test_any_nested_order():
    elasticity = Elasticity.from_order(12, DISTILGPT2[1], [2, 0, 4, 1, 3])
    assert elasticity.thresholds == (9, 11, 8, 12, 10, 10)
    assert elasticity.sizes == (6, 8, 9, 10, 11, 12)
    assert elasticity.path(8).layers == (12, 13, 4, 5, 6, 15, 16, 17)
    for small, large in itertools.pairwise(elasticity.sizes):
        below, above = elasticity.path(small).teacher_stations, elasticity.path(large).teacher_stations
        assert all(b or not a for a, b in zip(below, above, strict=True))  # nested


def test_ends_have_thresholds_of_their_own():
    elasticity = Elasticity(6, (0, 2, 4, 5), (6, 5, 5, 5), embed_threshold=5, norm_threshold=6, head_threshold=6)
    path = elasticity.path(5)
    assert (path.embed_from, path.norm_from, path.head_from) == ("teacher", "student", "student")
    assert path.layers == (6, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "num_teacher, kept, thresholds, message",
    [
        (6, (1, 3, 5), (6, 5, 4), "layer 0"),
        (6, (0, 4, 2), (6, 5, 4), "not ascending"),
        (6, (0, 2, 6), (6, 5, 4), "not ascending"),
        (3, (0, 1, 2), (3, 3, 3), "fewer layers"),
        (6, (), (), "0 thresholds for 1 stations"),
        (6, (), (5,), "size of 5 layers a path of 6"),
        (6, (0, "2", 4), (6, 5, 4), "whole numbers"),
        (6, (0, 2, 4), (6, 5), "2 thresholds for 3 stations"),
        (6, (0, 2, 4), (6, 5, 3), "not between 4 and 6"),
        (6, (0, 2, 4), (7, 5, 4), "not between 4 and 6"),
        (6, (0, 2, 4), (6, 4, 4), "size of 4 layers a path of 5"),
        (6, (0, 2, 4), (5, 5, 5), "size of 5 layers a path of 6"),
        (6, (0, 2, 4), (6, 5, True), "whole numbers"),
    ],
)
def test_what_does_not_interlock_is_refused(num_teacher, kept, thresholds, message):
    with pytest.raises(AssemblyError, match=message):
        Elasticity(num_teacher, kept, thresholds)


def test_orders_must_name_every_block_once():
    with pytest.raises(AssemblyError, match="every block"):
        Elasticity.from_order(6, (0, 2, 4), [0, 1])


def test_a_path_is_looked_up_in_microseconds():
    elasticity = Elasticity.last_to_first(*QWEN3_4B)
    start = time.perf_counter()
    for _ in range(10_000):
        elasticity.path(27)
    assert (time.perf_counter() - start) / 10_000 < 20e-6  # a dictionary look-up: about 0.1 us when the machine is idle
    assert elasticity.path(27) is elasticity.path(27)


def test_no_torch_is_imported():
    import subprocess

    code = "import sys, model_store.assembly; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
