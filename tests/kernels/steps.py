"""What the tests of both kernel executors share: random pairs of odd shapes, steps of mixed sizes, the comparison."""

from __future__ import annotations

import numpy as np
import torch

from model_store.arrays import Array, device_of, in_torch, to_numpy
from model_store.assembly import Elasticity
from model_store.int8 import Int8Matrix, quantise
from model_store.loaded import LoadedPair
from model_store.spec import ModelSpec
from model_store.weights import MATRICES, EndWeights, LayerWeights
from server.core.batch import ForwardBatch, Segment
from server.core.executor import Executor
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
# What the kernels for CUDA lack, or compute as they compute the others: windows, angles and norms of their own.
_TYPES = ("sliding_attention", "sliding_attention", "full_attention")
MORE_FAMILIES = {
    "gemma3_text": {"activation": "gelu_tanh", "qk_norm": True, "norm_after": True, "norm_offset": 1.0, "head_dim": 24,
                    "embedding_scale": 3.0, "sliding_window": 21, "layer_types": _TYPES * 3,
                    "local_inv_freq": ()},
    "olmo2": {"qk_norm": True, "qk_norm_of_all": True, "norm_before": False, "norm_after": True},
    "smollm3": {"unrotated_layers": (1, 4), "sliding_window": 37, "embedding_scale": 3.0, "residual_scale": 0.4,
                "logit_scale": 0.7},
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
    } | (FAMILIES | MORE_FAMILIES)[family] | changes  # fmt: skip
    fields.setdefault("rotary_dim", fields["head_dim"])
    if "local_inv_freq" in fields:
        fields["local_inv_freq"] = tuple(0.4**i for i in range(fields["rotary_dim"] // 2))
    spec = ModelSpec(**fields)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, around: float = 0.0, scale: float = 0.1) -> np.ndarray:
        return to_numpy((around + scale * torch.randn(*shape, generator=generator)).to(dtype))

    e, qkv = spec.hidden_size, spec.q_size + 2 * spec.kv_size
    up = spec.intermediate_size * (2 if spec.gated_mlp else 1)
    has_bias = spec.norm == "layer"

    one, widths = 1.0 - spec.norm_offset, spec.qk_norm_widths
    before, after = spec.norm_before, spec.norm_after

    def layer(index: int) -> LayerWeights:
        return LayerWeights(
            attn_norm_weight=draw(e, around=one) if before else None, attn_norm_bias=draw(e) if has_bias else None,
            qkv_weight=draw(qkv, e), qkv_bias=draw(qkv) if spec.qkv_bias else None,
            q_norm_weight=draw(widths[0], around=one) if spec.qk_norm else None,
            k_norm_weight=draw(widths[1], around=one) if spec.qk_norm else None,
            o_weight=draw(e, spec.q_size), o_bias=draw(e) if spec.o_bias else None,
            mlp_norm_weight=draw(e, around=one) if before else None, mlp_norm_bias=draw(e) if has_bias else None,
            up_weight=draw(up, e), up_bias=draw(up) if spec.mlp_bias else None,
            down_weight=draw(e, spec.intermediate_size), down_bias=draw(e) if spec.mlp_bias else None,
            post_attn_norm_weight=draw(e, around=one) if after else None,
            post_mlp_norm_weight=draw(e, around=one) if after else None,
            window=spec.window(index % spec.num_layers), rope=spec.rope(index % spec.num_layers),
        )  # fmt: skip

    def end() -> EndWeights:
        embed = draw(spec.vocab_size, e, scale=1.0)
        return EndWeights(
            embed=embed, head=embed, final_norm_weight=draw(e, around=one),
            final_norm_bias=draw(e) if has_bias else None,
            positions=draw(spec.max_position_embeddings, e) if spec.learned_positions else None,
        )  # fmt: skip

    return LoadedPair(
        name="tiny", spec=spec, elasticity=elasticity, sizes=elasticity.sizes,
        layers={i: layer(i) for i in range(elasticity.num_global_layers)}, ends={"teacher": end(), "student": end()},
    )  # fmt: skip


def quantised(pair: LoadedPair) -> LoadedPair:
    """The pair with int8 matrices, as `Pair.load` makes them."""

    def rounded(matrix: Array) -> Int8Matrix:
        int8 = quantise(to_numpy(matrix))
        return int8 if isinstance(matrix, np.ndarray) else in_torch(int8, matrix.device)

    for layer in {id(layer): layer for layer in pair.layers.values()}.values():
        for name in MATRICES:
            setattr(layer, name, rounded(getattr(layer, name)))
    for end in {id(end): end for end in pair.ends.values()}.values():
        end.embed = end.head = rounded(end.head)
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
            program=tuple(program), embed_cut=cut(elasticity.embed_threshold, sizes[rows]),
            norm_cut=cut(elasticity.norm_threshold, sizes[rows]), head_cut=cut(elasticity.head_threshold, sizes[rows]),
            logits_rows=start[1:] - 1, logits_start=np.arange(len(rows) + 1, dtype=np.int32),
        ))  # fmt: skip
        done[rows] += advance
    return batches


def logits_of(portable: TorchExecutor, steps: list[ForwardBatch]) -> list[np.ndarray]:
    """Step by step, those of all rows."""
    portable.allocate_kv(steps[0].block_tables.size)
    return [portable.logits(portable.forward(batch), int(batch.logits_start[batch.head_cut])) for batch in steps]


def assert_same_logits(
    executor: Executor, portable: TorchExecutor | list[np.ndarray], steps: list[ForwardBatch], tolerance: float
) -> None:
    """Of every row the logits differ by less than `tolerance` of their norm from the portable executor's, which many
    tests ask for once (`logits_of`)."""
    wanted = logits_of(portable, steps) if isinstance(portable, TorchExecutor) else portable
    executor.allocate_kv(steps[0].block_tables.size)
    for batch, expected in zip(steps, wanted, strict=True):
        num_teacher = int(batch.logits_start[batch.head_cut])
        hidden = executor.forward(batch)
        got = executor.logits(hidden, num_teacher)
        assert executor.greedy(hidden, num_teacher) == got.argmax(-1).tolist()
        # Rows that are not where the step left them.
        copy = hidden[np.arange(len(hidden))]
        assert bool((executor.logits(copy, num_teacher) == got).all()) or device_of(got) == "cuda"
        error = np.linalg.norm(to_numpy(got) - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() < tolerance, error
