"""The native executor against the portable one: random layers of odd shapes, mixed sizes, chunks and shuffled pages."""

import dataclasses
import functools
import os

import numpy as np
import pytest
import torch

from model_store.arrays import FLOAT32
from model_store.assembly import Elasticity
from model_store.int8 import dense
from model_store.loaded import LoadedPair
from server.core.config import EngineConfig
from server.kernels.cpu.build import VARIANTS
from server.kernels.cpu.executor import create
from server.kernels.cpu.library import VARIANT_VARIABLE
from server.model.torch_executor import TorchExecutor
from tests.kernels.steps import (
    FAMILIES,
    MORE_FAMILIES,
    PAGE,
    assert_same_logits,
    logits_of,
    make_pair,
    make_steps,
    quantised,
)


def portable_of(pair: LoadedPair, page_size: int = PAGE) -> TorchExecutor:
    """In float32: what bfloat16 costs is the native executor's own error, not the difference of two errors."""
    for part in (*pair.layers.values(), *{id(end): end for end in pair.ends.values()}.values()):
        for field in dataclasses.fields(part):
            if not isinstance(value := getattr(part, field.name), int | str | None):
                setattr(part, field.name, value.astype(np.float32))
    return TorchExecutor(pair, page_size=page_size)


# Tokens of each request, by step. Whole prompts and chunks, short and beyond one block of the softmax; decode rows
# beside chunks; decode alone.
MIXED = ((3, 0, 7, 1, 0), (1, 29, 1, 130, 4), (1, 1, 1, 150, 1), (1, 2, 1, 1, 1))
MANY = ((213, 150, 141, 90, 60), (1, 2, 150, 229, 1), (1, 1, 1, 1, 1))
ROUNDED = ((3, 0, 7, 1, 0), (1, 29, 1, 130, 4), (1, 1, 1, 50, 1))


@functools.cache
def expected(family: str, dtype: torch.dtype, counts: tuple, **changes) -> list[np.ndarray]:
    """What the portable executor computes: the same for every variant, form and size of pages of the native one."""
    pair = make_pair(family, dtype, **changes)
    return logits_of(portable_of(pair), make_steps(pair.elasticity, counts))


@functools.cache
def expected_of_int8(family: str) -> list[np.ndarray]:
    """Of the model whose matrices were rounded."""
    pair = quantised(make_pair(family, torch.bfloat16))
    for part in (*pair.layers.values(), *pair.ends.values()):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if not isinstance(value, int | str | None):
                setattr(part, field.name, dense(value, FLOAT32))
    return logits_of(TorchExecutor(pair, page_size=32), make_steps(pair.elasticity, ROUNDED))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "compressed"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_logits_as_the_portable_executor(family, kind, variant, monkeypatch):
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    # threads must not disturb each other
    config = EngineConfig(page_size=PAGE, max_model_len=320, compress_weights=kind == "compressed", num_threads=3)
    native = create(make_pair(family, dtype), config)
    if isinstance(native, str):
        pytest.skip(native)
    steps = make_steps(native._pair.elasticity, MIXED)
    assert_same_logits(native, expected(family, dtype, MIXED), steps, 1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("page_size", [PAGE, 32])  # part of a line of K at a time, and whole ones
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "compressed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", *MORE_FAMILIES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_many_rows_go_layer_by_layer_in_chunks(family, kind, variant, page_size, monkeypatch):
    """Enough tokens that each thread takes rows, of requests whose chunks meet within pages, and beside them too few;
    whole panels and a depth that is cut in pieces, the last of which is not filled: of the MLP, of the hidden state."""
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    changes = {"hidden_size": 96, "intermediate_size": 1290, "head_dim": 32}
    if family == "qwen3":
        changes = {"hidden_size": 608, "intermediate_size": 330, "head_dim": 48}
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    config = EngineConfig(page_size=page_size, max_model_len=320, compress_weights=kind == "compressed", num_threads=2)
    native = create(make_pair(family, dtype, **changes), config)
    if isinstance(native, str):
        pytest.skip(native)
    wanted, steps = expected(family, dtype, MANY, **changes), make_steps(native._pair.elasticity, MANY)
    assert_same_logits(native, wanted, steps, 1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("page_size", [PAGE, 32])
def test_scores_that_grow_along_a_row(page_size):
    """Attention of many queries measures weights by a row's first scores; far larger ones later are right too."""
    elasticity = Elasticity.last_to_first(2, (0,))
    changes = {"hidden_size": 96, "head_dim": 32, "attention_scale": 12.0}
    config = EngineConfig(page_size=page_size, max_model_len=320)
    prompt = np.random.default_rng(1).integers(0, 331, 200).astype(np.int32)
    logits = []
    for length in (200, 5):  # few tokens at a time are measured by their largest scores
        native = create(make_pair("llama", torch.bfloat16, elasticity, **changes), config)
        if isinstance(native, str):
            pytest.skip(native)
        steps = make_steps(elasticity, [[length]] * (200 // length), (2,))
        native.allocate_kv(steps[0].block_tables.size)
        for batch, ids in zip(steps, prompt.reshape(-1, length), strict=True):
            hidden = native.forward(dataclasses.replace(batch, input_ids=ids))
        logits.append(native.logits(hidden, int(batch.logits_start[batch.head_cut])))
    assert np.linalg.norm(logits[0] - logits[1]) < 0.05 * np.linalg.norm(logits[1])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_weights_are_the_rounded_ones(family, variant, monkeypatch):
    """Logits are those of a model whose matrices were rounded to 255 steps per output channel beforehand."""
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    native = create(quantised(make_pair(family, torch.bfloat16)), EngineConfig(page_size=32, max_model_len=320))
    if isinstance(native, str):
        pytest.skip(native)
    assert_same_logits(native, expected_of_int8(family), make_steps(native._pair.elasticity, ROUNDED), 0.03)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_doorbell_is_rung_once_by_the_step_that_was_asked_to(threads):
    """The event loop waits on it: not rung, answers would be late; rung twice, it would wake for nothing."""
    config = EngineConfig(page_size=PAGE, max_model_len=320, num_threads=threads)
    native = create(make_pair("llama", torch.float32), config)
    if isinstance(native, str):
        pytest.skip(native)
    batches = make_steps(make_pair("llama", torch.float32).elasticity, [[3, 2], [1, 1], [1, 1]])
    native.allocate_kv(4096)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        for index, batch in enumerate(batches):
            native.doorbell = bell if index == 1 else -1
            native.forward(batch)
            native.greedy(np.zeros((2, native.spec.hidden_size), np.float32), 2)
            if index == 1:
                assert os.eventfd_read(bell) == 1
            with pytest.raises(BlockingIOError):
                os.eventfd_read(bell)
    finally:
        os.close(bell)
