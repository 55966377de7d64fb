"""The native executor against the portable one: random layers of odd shapes, mixed sizes, chunks and shuffled pages."""

import dataclasses

import numpy as np
import pytest
import torch

from model_store.assembly import Elasticity
from model_store.int8 import dense, quantise
from model_store.loaded import LoadedPair
from model_store.spec import ModelSpec
from model_store.weights import EndWeights, LayerWeights, quantise_layer
from server.engine.batch import ForwardBatch, Segment
from server.engine.config import EngineConfig
from server.kernels.cpu.build import VARIANTS
from server.kernels.cpu.executor import create
from server.kernels.cpu.library import VARIANT_VARIABLE
from server.model.torch_executor import TorchExecutor

PAGE, MAX_BLOCKS = 8, 40
# What differs from a Llama-like model with 6 query and 2 KV heads of 20 channels; no dimension is a multiple of 16.
FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 24},
    "gpt_neox": {"norm": "layer", "activation": "gelu", "gated_mlp": False, "parallel_residual": True,
                 "num_kv_heads": 6, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "rotary_dim": 6},
    "gpt2": {"norm": "layer", "activation": "gelu_tanh", "gated_mlp": False, "num_kv_heads": 6, "qkv_bias": True,
             "o_bias": True, "mlp_bias": True, "rotary_dim": 0, "learned_positions": True},
}  # fmt: skip


def make_pair(family: str, dtype: torch.dtype, elasticity: Elasticity | None = None, **changes) -> LoadedPair:
    """Random weights; `changes` are fields of the ModelSpec."""
    elasticity = elasticity or Elasticity.last_to_first(6, (0, 2, 4, 5))
    fields = {
        "family": family, "num_layers": elasticity.num_teacher_layers, "hidden_size": 70, "intermediate_size": 106,
        "num_heads": 6, "num_kv_heads": 2, "head_dim": 20, "vocab_size": 331, "norm": "rms", "norm_eps": 1e-5,
        "activation": "silu", "gated_mlp": True, "parallel_residual": False, "qk_norm": False, "qkv_bias": False,
        "o_bias": False, "mlp_bias": False, "rope_theta": 1e4, "max_position_embeddings": 320,
        "tie_word_embeddings": True, "attention_scale": 0.2,
    } | FAMILIES[family] | changes  # fmt: skip
    fields.setdefault("rotary_dim", fields["head_dim"])
    spec = ModelSpec(**fields)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, around: float = 0.0, scale: float = 0.1) -> torch.Tensor:
        return (around + scale * torch.randn(*shape, generator=generator)).to(dtype)

    e, d, qkv = spec.hidden_size, spec.head_dim, spec.q_size + 2 * spec.kv_size
    up = spec.intermediate_size * (2 if spec.gated_mlp else 1)
    has_bias = spec.norm == "layer"

    def layer() -> LayerWeights:
        return LayerWeights(
            attn_norm_weight=draw(e, around=1.0), attn_norm_bias=draw(e) if has_bias else None,
            qkv_weight=draw(qkv, e), qkv_bias=draw(qkv) if spec.qkv_bias else None,
            q_norm_weight=draw(d, around=1.0) if spec.qk_norm else None,
            k_norm_weight=draw(d, around=1.0) if spec.qk_norm else None,
            o_weight=draw(e, spec.q_size), o_bias=draw(e) if spec.o_bias else None,
            mlp_norm_weight=draw(e, around=1.0), mlp_norm_bias=draw(e) if has_bias else None,
            up_weight=draw(up, e), up_bias=draw(up) if spec.mlp_bias else None,
            down_weight=draw(e, spec.intermediate_size), down_bias=draw(e) if spec.mlp_bias else None,
        )  # fmt: skip

    def end() -> EndWeights:
        embed = draw(spec.vocab_size, e, scale=1.0)
        return EndWeights(
            embed=embed, head=embed, final_norm_weight=draw(e, around=1.0),
            final_norm_bias=draw(e) if has_bias else None,
            positions=draw(spec.max_position_embeddings, e) if spec.learned_positions else None,
        )  # fmt: skip

    return LoadedPair(
        name="tiny", spec=spec, elasticity=elasticity, sizes=elasticity.sizes,
        layers={i: layer() for i in range(elasticity.num_global_layers)}, ends={"teacher": end(), "student": end()},
    )  # fmt: skip


def quantised(pair: LoadedPair) -> LoadedPair:
    """The pair with int8 matrices, as `Pair.load` makes them."""
    for layer in pair.layers.values():
        quantise_layer(layer)
    for end in {id(end): end for end in pair.ends.values()}.values():
        end.embed = end.head = quantise(end.head)
    return pair


def make_steps(
    elasticity: Elasticity, counts: list[list[int]], sizes: tuple[int, ...] = (6, 5, 5, 4, 4), vocab: int = 331,
    is_shared: bool = False,
) -> list[ForwardBatch]:  # fmt: skip
    """One batch per step; counts[step][request] tokens of requests of these sizes; pages in random order.

    `is_shared`: all stations run teacher and student rows together.
    """
    rng = np.random.default_rng(0)
    sizes = np.array(sizes, np.int32)
    shape = (elasticity.num_global_layers, len(sizes), MAX_BLOCKS)
    tables = rng.permutation(np.prod(shape)).astype(np.int32).reshape(shape)
    done = np.zeros(len(sizes), np.int32)
    batches = []

    def cut(threshold: int, sizes: np.ndarray) -> int:
        return int((sizes >= threshold).sum())

    for step in counts:
        rows = np.flatnonzero(step)
        advance = np.array(step, np.int32)[rows]
        start = np.concatenate([[0], np.cumsum(advance)]).astype(np.int32)
        program = []
        for station, threshold in zip(elasticity.stations, elasticity.thresholds, strict=True):
            split, first = cut(threshold, sizes[rows]), station.start
            if is_shared and split < len(rows):
                program.append(Segment(first, 0, len(rows), station.index, split))
                first += 1
            if split:
                program += [Segment(t, 0, split, station.index) for t in range(first, station.stop)]
            if split < len(rows) and not is_shared:
                program.append(Segment(elasticity.num_teacher_layers + station.index, split, len(rows), station.index))
        batches.append(ForwardBatch(
            requests=[None] * len(rows), sizes=sizes[rows],
            input_ids=rng.integers(0, vocab, start[-1]).astype(np.int32),
            positions=np.concatenate([np.arange(done[r], done[r] + step[r]) for r in rows]).astype(np.int32),
            query_start=start, context_lens=done[rows] + advance, slots=rows.astype(np.int32), block_tables=tables,
            program=program, embed_cut=cut(elasticity.embed_threshold, sizes[rows]),
            norm_cut=cut(elasticity.norm_threshold, sizes[rows]), head_cut=cut(elasticity.head_threshold, sizes[rows]),
            logits_rows=start[1:] - 1, logits_start=np.arange(len(rows) + 1, dtype=np.int32),
        ))  # fmt: skip
        done[rows] += advance
    return batches


def portable_of(pair: LoadedPair, page_size: int = PAGE) -> TorchExecutor:
    """In float32: what bfloat16 costs is the native executor's own error, not the difference of two errors."""
    for part in (*pair.layers.values(), *pair.ends.values()):
        for tensor in part.tensors():
            tensor.data = tensor.data.float()
    return TorchExecutor(pair, page_size=page_size)


def check_steps(native, portable: TorchExecutor, steps: list[ForwardBatch], tolerance: float) -> None:
    for executor in (native, portable):
        executor.allocate_kv(steps[0].block_tables.size)
    for batch in steps:
        num_teacher = int(batch.logits_start[batch.head_cut])
        hidden = native.forward(batch)
        got = native.logits(hidden, num_teacher)
        assert native.greedy(hidden, num_teacher) == got.argmax(dim=1).tolist()
        expected = portable.logits(portable.forward(batch), num_teacher)
        error = (got - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_logits_as_the_portable_executor(family, dtype, variant, monkeypatch):
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # threads must not disturb each other
    config = EngineConfig(page_size=PAGE, max_model_len=320)
    native = create(make_pair(family, dtype), config)
    if isinstance(native, str):
        pytest.skip(native)
    pair = make_pair(family, dtype)
    portable = portable_of(pair)
    # Whole prompts and chunks, short and beyond one block of the softmax; decode rows beside chunks; decode alone.
    steps = make_steps(pair.elasticity, [[3, 0, 7, 1, 0], [1, 29, 1, 130, 4], [1, 1, 1, 150, 1], [1, 2, 1, 1, 1]])
    check_steps(native, portable, steps, 1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("page_size", [PAGE, 32])  # part of a line of K at a time, and whole ones
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_many_rows_go_layer_by_layer_in_chunks(family, dtype, variant, page_size, monkeypatch):
    """Enough tokens that each thread takes rows, of requests whose chunks meet within pages, and beside them too few;
    whole panels and a depth that is cut in pieces, the last of which is not filled."""
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    changes = {"hidden_size": 96, "intermediate_size": 1290, "head_dim": 48 if family == "qwen3" else 32}
    native = create(make_pair(family, dtype, **changes), EngineConfig(page_size=page_size, max_model_len=320))
    if isinstance(native, str):
        pytest.skip(native)
    pair = make_pair(family, dtype, **changes)
    portable = portable_of(pair, page_size)
    steps = make_steps(pair.elasticity, [[213, 150, 141, 90, 60], [1, 2, 150, 229, 1], [1, 1, 1, 1, 1]])
    check_steps(native, portable, steps, 1e-4 if dtype == torch.float32 else 0.03)


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
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[1].norm()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_weights_are_the_rounded_ones(family, variant, monkeypatch):
    """Logits are those of a model whose matrices were rounded to 255 steps per output channel beforehand."""
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    native = create(quantised(make_pair(family, torch.bfloat16)), EngineConfig(page_size=32, max_model_len=320))
    if isinstance(native, str):
        pytest.skip(native)
    pair = quantised(make_pair(family, torch.bfloat16))
    for part in (*pair.layers.values(), *pair.ends.values()):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value is not None:
                setattr(part, field.name, dense(value, torch.float32))
    portable = TorchExecutor(pair, page_size=32)
    steps = make_steps(pair.elasticity, [[3, 0, 7, 1, 0], [1, 29, 1, 130, 4], [1, 1, 1, 50, 1]])
    for executor in (native, portable):
        executor.allocate_kv(steps[0].block_tables.size)
    for batch in steps:
        num_teacher = int(batch.logits_start[batch.head_cut])
        got = native.logits(native.forward(batch), num_teacher)
        expected = portable.logits(portable.forward(batch), num_teacher)
        assert ((got - expected).norm(dim=1) / expected.norm(dim=1)).max() < 0.03
