"""Rows of several widths in one step, from one copy: the native kernels give what the torch executor gives."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from model_store.arrays import address, to_numpy
from model_store.dual import DualMatrix
from model_store.int8 import is_plain
from model_store.loaded import LoadedPair
from model_store.nested import WIDTHS, NestedMatrix, nest
from model_store.weights import MATRICES
from server.core.batch import ForwardBatch
from server.core.width import EXACT
from server.kernels.cpu.build import VARIANTS
from server.model import linear
from server.model.torch_executor import TorchExecutor
from tests.kernels.steps import FAMILIES, PAGE, make_pair, make_steps
from tests.kernels.test_codes import EXACT as EXACTLY
from tests.kernels.test_codes import MIXED, SHAPE, STEPS, in_codes, native_of

ALL = (*sorted(WIDTHS), EXACT)


def dual(pair: LoadedPair, keeps_exact: bool = True) -> LoadedPair:
    """The pair with nested codes beside its matrices, or in their place; what is shared stays shared."""
    done: dict[int, DualMatrix | NestedMatrix] = {}

    def both(matrix):
        if id(matrix) not in done:
            nested = nest(matrix if is_plain(matrix) else matrix.dense(np.float32))
            done[id(matrix)] = DualMatrix(matrix, nested) if keeps_exact else nested
        return done[id(matrix)]

    for layer in {id(layer): layer for layer in pair.layers.values()}.values():
        for name in MATRICES:
            setattr(layer, name, both(getattr(layer, name)))
    for end in {id(end): end for end in pair.ends.values()}.values():
        end.embed = end.head = both(end.head)
    pair.widths = ALL if keeps_exact else ALL[:-1]
    return pair


def with_widths(batch: ForwardBatch, widths: tuple[int, ...], turn: int) -> ForwardBatch:
    """Widths in turn, from wide to narrow within a size, as `build_batch` sorts them."""
    rows = [widths[(turn + row) % len(widths)] for row in range(batch.num_requests)]
    for size in set(batch.sizes.tolist()):
        of = np.flatnonzero(batch.sizes == size)
        for row, width in zip(of, sorted((rows[i] for i in of), reverse=True), strict=True):
            rows[row] = width
    return dataclasses.replace(batch, widths=np.array(rows, np.uint8))


def assert_same(native, portable, steps: list[ForwardBatch], tolerance: float) -> None:
    for each in (native, portable):
        each.allocate_kv(steps[0].block_tables.size)
    for batch in steps:
        num_teacher, widths = int(batch.logits_start[batch.head_cut]), batch.widths_of(batch.logits_start)
        hidden = native.forward(batch)
        got = native.logits(hidden, num_teacher, widths)
        assert native.greedy(hidden, num_teacher, widths) == got.argmax(-1).tolist()
        got = to_numpy(got)
        expected = portable.logits(portable.forward(batch), num_teacher, widths)
        error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() < tolerance, (batch.widths, error)


@pytest.fixture
def unrounded(monkeypatch):
    """Activations as floats on both sides: rounding them is chaotic, so that only then can depths be compared."""
    monkeypatch.setattr(linear, "round_activations", lambda x: x.float())


@pytest.mark.parametrize("keeps_exact", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_steps_of_every_family(family, keeps_exact, monkeypatch, unrounded):
    """Every depth at every width, alone and mixed, prompts in chunks and in many rows."""
    widths = ALL if keeps_exact else ALL[:-1]
    native = native_of(
        dual(make_pair(family, torch.float32, **SHAPE), keeps_exact), "", monkeypatch, exact_activations=True
    )
    assert native.widths == widths
    portable = TorchExecutor(dual(make_pair(family, torch.float32, **SHAPE), keeps_exact), page_size=PAGE)
    counts = [*STEPS, [213, 50, 0, 90, 1], *[[1] * 5] * len(widths)]
    steps = make_steps(native._pair.elasticity, counts)
    assert_same(native, portable, [with_widths(batch, widths, turn) for turn, batch in enumerate(steps)], EXACTLY)


@pytest.mark.parametrize("width", ALL)
def test_a_step_of_one_width_is_that_of_a_server_of_that_width(width, monkeypatch):
    """The same numbers as from the pair loaded at that width alone; embeddings are always read exactly.

    Bit by bit with codes. Plain products alone add to the residual in another order, and bfloat16 rounds behind it.
    """
    make = lambda: make_pair("llama", torch.bfloat16, tie_word_embeddings=False, **SHAPE)  # noqa: E731
    native, alone = native_of(dual(make()), "", monkeypatch), make()
    for layer in alone.layers.values():
        for name in MATRICES if width != EXACT else ():
            setattr(layer, name, nest(getattr(layer, name)).at(width))
    alone = native_of(alone, "", monkeypatch)
    for each in (native, alone):
        each.allocate_kv(10000)
    for batch in make_steps(native._pair.elasticity, STEPS):
        batch.widths = np.full(batch.num_requests, width, np.uint8)
        one, other = native.forward(batch), alone.forward(batch)
        difference = np.linalg.norm(one - other)
        assert difference == 0 if width != EXACT else difference < 0.01 * np.linalg.norm(other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_a_row_do_not_depend_on_the_widths_beside_it(variant, monkeypatch):
    native = native_of(dual(make_pair("llama", torch.float32, **SHAPE)), variant, monkeypatch)
    x = np.random.default_rng(1).standard_normal((60, 256), np.float32)
    alone = {width: native.logits(x, 60, np.full(60, width, np.uint8)) for width in ALL}
    assert np.array_equal(alone[6], alone[8]) and not np.array_equal(alone[4], alone[8])  # heads keep more bits
    for num_rows in (2, 5, 12, 60):
        widths = np.array([ALL[row % 7 % len(ALL)] for row in range(num_rows)], np.uint8)
        mixed = native.logits(x[:num_rows], num_rows, widths)
        for row, width in enumerate(widths.tolist()):
            if width == EXACT:  # floats, whose order of summation depends on the number of rows
                np.testing.assert_allclose(mixed[row], alone[width][row], rtol=1e-5, atol=1e-4)
            else:
                assert np.array_equal(mixed[row], alone[width][row])
    assert np.array_equal(native.logits(x, 60), alone[EXACT])


def test_codes_of_a_file_are_the_exact_form(monkeypatch, unrounded):
    """Fused tensors of several types, whose parts the exact rows go through, beside one run of nested codes."""
    make = lambda: dual(in_codes(make_pair("llama", torch.float32, **SHAPE), MIXED))  # noqa: E731
    native, portable = native_of(make(), "", monkeypatch, exact_activations=True), TorchExecutor(make(), page_size=PAGE)
    counts = [[213, 150, 141, 90, 60], [1, 2, 40, 29, 1], [1] * 5]
    steps = make_steps(portable.elasticity, counts)
    assert_same(native, portable, [with_widths(batch, ALL, turn) for turn, batch in enumerate(steps)], EXACTLY)


@pytest.mark.parametrize("keeps_exact", [True, False])
def test_all_sizes_and_widths_together_are_one_copy_of_each_form(keeps_exact, monkeypatch):
    """What lies in memory is one copy of the exact form and one of the nested codes, panels filled up; nothing else."""
    shape = SHAPE | {"vocab_size": 352}
    pair = dual(make_pair("llama", torch.bfloat16, **shape), keeps_exact)
    codes = {address(matrix.nested.codes if keeps_exact else matrix.codes): matrix for matrix in
             (getattr(layer, name) for layer in pair.layers.values() for name in MATRICES)}  # fmt: skip
    heads = {id(end.head): end.head for end in pair.ends.values()}
    num_weights = sum(math.prod(m.shape) for m in (*codes.values(), *heads.values()))
    native = native_of(pair, "", monkeypatch)
    arenas = {id(arena): arena for arena in (native._weights._arena, native._nested._arena)}.values()
    assert len(arenas) == 1 + keeps_exact
    tensors = [t for matrix in (*codes.values(), *heads.values()) for t in matrix.tensors() if t.size]
    assert all(any(np.shares_memory(t, arena) for arena in arenas) for t in tensors)
    nested = num_weights * (32 + 1 + 8) / 32
    exact = native._weights.num_bytes() if keeps_exact else 0
    assert exact <= 1.1 * 1.5 * num_weights  # twelve bits and what they need
    assert native._nested.num_bytes() == pytest.approx(nested)
    per_weight = [native.bytes_per_weight_at(width) for width in native.widths]
    assert per_weight == sorted(per_weight) and 0.59 < per_weight[0] < 0.7
