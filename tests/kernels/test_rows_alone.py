"""A row of a step gets the very numbers that it gets alone, to the last bit: what verified guesses rest on."""

import dataclasses

import numpy as np
import pytest
import torch

from model_store.assembly import Elasticity
from server.core.batch import ForwardBatch
from server.core.config import EngineConfig
from server.kernels.cpu.build import VARIANTS
from server.kernels.cpu.executor import NativeExecutor, create
from server.kernels.cpu.library import VARIANT_VARIABLE
from tests.kernels.steps import PAGE, make_pair, make_steps, quantised

# Whole panels, and depths beyond one piece of a panel: many sums, which other orders would round otherwise.
SHAPE = {"hidden_size": 96, "intermediate_size": 1290, "head_dim": 32}


def native(kind: str, variant: str, monkeypatch, **config) -> NativeExecutor:
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    pair = make_pair("llama", torch.float32 if kind == "float32" else torch.bfloat16, **SHAPE)
    pair = quantised(pair) if kind == "int8" else pair
    values = {"max_model_len": 320, "page_size": PAGE, "num_threads": 2, "compress_weights": kind == "compressed"}
    executor = create(pair, EngineConfig(speculative_width=4, **values | config))
    if isinstance(executor, str):
        pytest.skip(executor)
    executor.allocate_kv(100_000)
    return executor


def rows_of(batch: ForwardBatch, chosen: list[int]) -> ForwardBatch:
    """Some rows of a step in which each has one token; all are of the largest size."""
    rows, count = np.array(chosen), len(chosen)
    index = np.arange(count + 1, dtype=np.int32)
    program = tuple(segment._replace(start=0, stop=count) for segment in batch.program)
    return dataclasses.replace(
        batch, requests=[None] * count, sizes=batch.sizes[rows], input_ids=batch.input_ids[rows],
        positions=batch.positions[rows], query_start=index, context_lens=batch.context_lens[rows],
        slots=batch.slots[rows], program=program, embed_cut=count, norm_cut=count, head_cut=count,
        logits_rows=index[:-1], logits_start=index,
    )  # fmt: skip


def guesses(batch: ForwardBatch, request: int, count: int) -> ForwardBatch:
    """The step in which a request decodes, with `count` guesses after its token, each a row."""
    rows = np.arange(count + 1, dtype=np.int32)
    one = rows_of(batch, [request] * (count + 1))
    return dataclasses.replace(
        one, input_ids=(one.input_ids + 7 * rows).astype(np.int32) % 331, positions=one.positions + rows,
        context_lens=one.context_lens + rows,
    )  # fmt: skip


def bits(executor: NativeExecutor, batch: ForwardBatch) -> np.ndarray:
    return executor.logits(executor.forward(batch), batch.num_requests).view(np.uint32)


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "compressed", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_beside_others_and_as_guesses(kind, kv, variant, monkeypatch):
    """Contexts of several parts; guesses across the end of a page; all of them beside the others."""
    executor = native(kind, variant, monkeypatch, kv_cache_dtype=kv)
    elasticity = Elasticity.last_to_first(6, (0, 2, 4, 5))
    lengths = [3, 5, 17, 150, 230]
    prompts, step = make_steps(elasticity, [lengths, [1] * 5], sizes=(6,) * 5)
    executor.forward(prompts)
    alone = [bits(executor, rows_of(step, [row])) for row in range(5)]
    for chosen in ([0, 1], [2, 3, 4], [4, 3, 2, 1, 0]):
        together = bits(executor, rows_of(step, chosen))
        assert (together == np.concatenate([alone[row] for row in chosen])).all(), chosen
    for request in (1, 2, 3, 4):
        rows = guesses(step, request, 4)
        one_by_one = [bits(executor, rows_of(rows, [i])) for i in range(5)]
        assert (bits(executor, rows) == np.concatenate(one_by_one)).all(), request


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "compressed", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_every_number_of_rows(kind, variant, monkeypatch):
    """Few rows and so many that a compressed panel is widened; with tiles those that do without."""
    executor = native(kind, variant, monkeypatch)
    most = 32 if variant.startswith("amx") else 90
    hidden = np.random.default_rng(0).standard_normal((most, 96)).astype(np.float32)
    step = make_steps(Elasticity.last_to_first(6, (0, 2, 4, 5)), [[1]], sizes=(6,))[0]
    executor.forward(step)
    alone = np.concatenate([executor.logits(hidden[i : i + 1], 1) for i in range(most)])
    for count in (*range(2, 14), 24, 31, 32, 73, 90):
        if count <= most:
            assert (executor.logits(hidden[:count], count) == alone[:count]).all(), count
