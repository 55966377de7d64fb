"""The native CPU executor: one call into C++ runs a whole step.

Weights are used where they lie (row-major, as loaded), so teacher and student tensors exist once. The hidden state is
float32; products take bfloat16 or float32 operands with float32 sums.

T = tokens of the step, S = rows whose logits are wanted, E = hidden, V = vocabulary.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
import torch.nn.functional as F

from model_store.pair import LoadedPair
from model_store.weights import EndWeights, LayerWeights
from server.engine.batch import ForwardBatch
from server.engine.config import EngineConfig
from server.kernels.cpu import build, library
from server.kernels.cpu.arena import move_to_huge_pages

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_FIELDS = {
    "attn_norm_w": "attn_norm_weight", "attn_norm_b": "attn_norm_bias", "qkv_w": "qkv_weight", "qkv_b": "qkv_bias",
    "q_norm_w": "q_norm_weight", "k_norm_w": "k_norm_weight", "o_w": "o_weight", "o_b": "o_bias",
    "mlp_norm_w": "mlp_norm_weight", "mlp_norm_b": "mlp_norm_bias", "up_w": "up_weight", "up_b": "up_bias",
    "down_w": "down_weight", "down_b": "down_bias",
}  # fmt: skip


def create(pair: LoadedPair, config: EngineConfig) -> NativeExecutor | str:
    """The executor, or the reason why this pair or this machine cannot have it."""
    embed = pair.ends["teacher"].embed
    if embed.device.type != "cpu":
        return f"runs on cpu, not on {embed.device.type}"
    if embed.dtype not in (torch.bfloat16, torch.float32):
        return f"takes bfloat16 or float32, not {embed.dtype}"
    if config.quantization:
        return f"does not do --quantization {config.quantization}"
    if pair.low_rank:
        return "does not run low-rank differences"
    if missing := library.missing_instructions():
        return f"the processor lacks {', '.join(missing)}"
    try:
        lib = library.load()
    except (build.BuildError, OSError) as error:
        return f"not built: {error}"
    return NativeExecutor(pair, config, lib)


class NativeExecutor:
    """Implements `server.model.executor.Executor`."""

    name = "native"
    shared_stations: frozenset[int] = frozenset()

    def __init__(self, pair: LoadedPair, config: EngineConfig, lib: ctypes.CDLL) -> None:
        spec = self.spec = pair.spec
        self.layers, self.ends = pair.layers, pair.ends
        self.dtype = pair.ends["teacher"].embed.dtype
        self.device = torch.device("cpu")
        self.page_size = config.page_size
        self.num_threads = torch.get_num_threads()  # follows OMP_NUM_THREADS and --num-threads
        self._lib = lib
        move_to_huge_pages(
            tensor for part in (*pair.layers.values(), *pair.ends.values()) for tensor in part.tensors()
        )
        inv_freq, factor = spec.rope_inv_freq() if spec.rotary_dim else (torch.zeros(0), 1.0)
        angles = torch.outer(torch.arange(config.max_model_len, dtype=torch.float32), inv_freq)
        self._cos = (angles.cos() * factor).contiguous()
        self._sin = (angles.sin() * factor).contiguous()
        num_layers = pair.elasticity.num_teacher_layers + len(pair.elasticity.stations)
        table = (library.Layer * num_layers)()
        for index, weights in pair.layers.items():
            table[index] = _pointers(weights)
        description = library.Spec(
            hidden=spec.hidden_size, intermediate=spec.intermediate_size, num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, vocab=spec.vocab_size,
            layer_norm=spec.norm == "layer", activation=_ACTIVATIONS[spec.activation], gated=spec.gated_mlp,
            parallel_residual=spec.parallel_residual, rotary_dim=spec.rotary_dim, page_size=config.page_size,
            is_bf16=self.dtype == torch.bfloat16, eps=spec.norm_eps, scale=spec.attention_scale,
            cos=self._cos.data_ptr(), sin=self._sin.data_ptr(),
        )  # fmt: skip
        self._engine = lib.bs_create(ctypes.byref(description), table, num_layers, self.num_threads)
        self.k_pages: torch.Tensor | None = None
        self.v_pages: torch.Tensor | None = None

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self._lib.bs_destroy(self._engine)
            self._engine = None

    def describe(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"native C++ on cpu, {name}, {self.num_threads} threads, pages of {self.page_size} tokens"

    def page_bytes(self) -> int:
        return 2 * self.spec.num_kv_heads * self.page_size * self.spec.head_dim * self.dtype.itemsize

    def allocate_kv(self, num_pages: int) -> None:
        shape = (num_pages, self.spec.num_kv_heads, self.page_size, self.spec.head_dim)
        self.k_pages = torch.empty(shape, dtype=self.dtype)
        self.v_pages = torch.empty(shape, dtype=self.dtype)

    def kv_tensors(self) -> tuple[torch.Tensor, ...]:
        """What holds KV; the first dimension is the page."""
        return self.k_pages, self.v_pages

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        hidden = self._embed(batch)
        program = np.array([segment[:3] for segment in batch.program], np.int32)
        tables = batch.block_tables
        step = library.Step(
            num_tokens=batch.num_tokens, num_requests=batch.num_requests, num_segments=len(program),
            program=program.ctypes.data, positions=batch.positions.ctypes.data,
            query_start=batch.query_start.ctypes.data, slots=batch.slots.ctypes.data,
            block_tables=tables.ctypes.data, layer_stride=tables.strides[0] // 4, slot_stride=tables.strides[1] // 4,
            k_pages=self.k_pages.data_ptr(), v_pages=self.v_pages.data_ptr(), hidden=hidden.data_ptr(),
        )  # fmt: skip
        self._lib.bs_step(self._engine, ctypes.byref(step))
        rows = hidden[torch.from_numpy(batch.logits_rows)]  # a copy: the norm below is in place
        split = int(batch.logits_start[batch.norm_cut])
        self._by_side(rows, split, self._final_norm)
        return rows

    def logits(self, hidden: torch.Tensor, num_teacher: int) -> torch.Tensor:
        out = torch.empty(len(hidden), self.spec.vocab_size, dtype=torch.float32)

        def head(rows: torch.Tensor, end: EndWeights, start: int) -> None:
            bias = end.head_bias.data_ptr() if end.head_bias is not None else None
            target = out[start:].data_ptr()
            self._lib.bs_head(self._engine, rows.data_ptr(), len(rows), end.head.data_ptr(), bias, target)

        self._by_side(hidden.contiguous(), num_teacher, head)
        return out

    def draw(self, logits: torch.Tensor, draws: list[tuple[float, float, float, int, float]]) -> list[int]:
        """One token per row of float32 logits [S, V]; per row (temperature, top_p, min_p, top_k, uniform number)."""
        logits = logits.contiguous()
        rows = (library.Draw * len(draws))(
            *(
                library.Draw(uniform=uniform, temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
                for temperature, top_p, min_p, top_k, uniform in draws
            )
        )
        tokens = np.empty(len(draws), np.int32)
        self._lib.bs_draw(self._engine, logits.data_ptr(), len(draws), rows, tokens.ctypes.data)
        return tokens.tolist()

    # --- parts

    def _embed(self, batch: ForwardBatch) -> torch.Tensor:
        ids = torch.from_numpy(batch.input_ids)
        positions = torch.from_numpy(batch.positions)
        hidden = torch.empty(batch.num_tokens, self.spec.hidden_size)

        def embed(rows: torch.Tensor, end: EndWeights, start: int) -> None:
            out = hidden[start : start + len(rows)]
            out.copy_(F.embedding(rows, end.embed))
            if end.positions is not None:
                out += F.embedding(positions[start : start + len(rows)], end.positions)

        self._by_side(ids, int(batch.query_start[batch.embed_cut]), embed)
        return hidden

    def _final_norm(self, rows: torch.Tensor, end: EndWeights, start: int) -> None:
        bias = end.final_norm_bias.data_ptr() if end.final_norm_bias is not None else None
        self._lib.bs_norm(self._engine, rows.data_ptr(), len(rows), end.final_norm_weight.data_ptr(), bias)

    def _by_side(self, rows: torch.Tensor, split: int, apply) -> None:
        """apply(rows, end weights, first row) on [:split] with the teacher's ends, on [split:] with the student's."""
        teacher, student = self.ends["teacher"], self.ends["student"]
        if teacher is student:
            split = len(rows)
        if split:
            apply(rows[:split], teacher, 0)
        if split < len(rows):
            apply(rows[split:], student, split)


def _pointers(weights: LayerWeights) -> library.Layer:
    values = {}
    for name, field in _FIELDS.items():
        tensor = getattr(weights, field)
        if tensor is not None:
            assert tensor.is_contiguous()
            values[name] = tensor.data_ptr()
    return library.Layer(**values)
