"""The native CPU executor: one call into C++ runs a whole step.

Weights are packed once at load, teacher and student tensors exist once (packing.py). The hidden state is float32;
products take bfloat16 or float32 operands with float32 sums.

T = tokens of the step, S = rows whose logits are wanted, E = hidden, V = vocabulary.
"""

from __future__ import annotations

import ctypes
import logging
from bisect import bisect_left
from collections.abc import Collection
from functools import lru_cache

import numpy as np

from model_store.arrays import BFLOAT16, FLOAT32, address
from model_store.blocks import Part
from model_store.dual import exact_of, head_width, nested_of
from model_store.int8 import Matrix
from model_store.loaded import LoadedPair
from model_store.weight_form import Storage
from model_store.weights import MATRICES, EndWeights, LayerWeights
from server.core.batch import ForwardBatch, Segment
from server.core.config import EngineConfig
from server.core.executor import Draw, Executor
from server.core.width import EXACT
from server.kernels.cpu import library
from server.kernels.cpu.differences import PackedDifferences
from server.kernels.cpu.packing import (
    TYPES,
    PackedWeights,
    angle_tables,
    end_table,
    layer_table,
    source_of,
    twelve_bit_bytes,
)
from server.kernels.memory import can_give_back, give_back, zero_bytes
from server.kernels.threads import available_threads

logger = logging.getLogger(__name__)

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_HEAD_WIDTHS = np.array([head_width(width) for width in range(EXACT + 1)], np.uint8)
_MAX_HEAD_DIM = 1024  # kMostHeadDim of attention.h
_NO_SAVES, _NO_RESTORES = np.zeros((0, 3), np.int32), np.zeros((0, 2), np.int32)


def create(pair: LoadedPair, config: EngineConfig) -> NativeExecutor | str:
    """The executor, or the reason why this pair or this machine cannot have it."""
    if pair.device != "cpu":
        return f"runs on cpu, not on {pair.device}"
    assert isinstance(pair.ends["teacher"].final_norm_weight, np.ndarray), "arrays, as `Pair.load` gives them"
    if pair.dtype not in (BFLOAT16, FLOAT32):
        return f"takes bfloat16 or float32, not {pair.dtype}"
    if pair.spec.head_dim > _MAX_HEAD_DIM:
        return f"takes heads of up to {_MAX_HEAD_DIM} channels, not {pair.spec.head_dim}"
    chosen = library.choose()
    if isinstance(chosen, list):
        return "; ".join(chosen)
    return NativeExecutor(pair, config, *chosen)


class NativeExecutor(Executor):
    """Takes over the pair: its matrices are packed in their place."""

    name = "native"
    can_draw = can_ring = can_change_student = True
    can_release = can_give_back()
    _kinds: str
    _weights: PackedWeights
    _engine: int | None = None  # the library's own

    def __init__(
        self, pair: LoadedPair, config: EngineConfig, variant: str, lib: ctypes.CDLL, passed_over: list[str],
        beside: NativeExecutor | None = None,
    ) -> None:  # fmt: skip
        """`beside`: one for the same teacher, whose packed weights it refers to."""
        spec = self.spec = pair.spec
        self.dtype = pair.dtype
        self.page_size = config.page_size
        if self.page_size % 32:
            logger.warning("pages of %d tokens take the memory of %d", self.page_size, -(-self.page_size // 32) * 32)
        self.variant, self._passed_over = variant, passed_over
        self.num_threads = config.num_threads or available_threads()
        self._lib, self._pair = lib, pair  # norms and biases are used where they lie
        self._has_two_ends = pair.ends["teacher"] is not pair.ends["student"]
        self.weight_form, self._kinds = pair.form, pair.kinds() if beside is None else beside._kinds
        self._weights = PackedWeights(
            pair, lib, self.num_threads, config.compress_weights, beside=None if beside is None else beside._weights
        )
        self.bytes_per_weight = self._weights.bytes_per_weight
        if self._weights.is_compressed:
            self.weight_form = pair.form.stored_as(Storage.TWELVE_BITS)
        self.widths, weight_type = pair.widths, self._weights.type
        self._nested = self._weights
        if len(self.widths) > 1:
            nested = None if beside is None else beside._nested
            self._nested, weight_type = self._weights.attach_nested(pair, nested), library.CODES
        self._differences = PackedDifferences(pair, lib, self.dtype, self.num_threads)
        self.shared_stations = pair.shared_stations
        self._num_teacher_layers = pair.elasticity.num_teacher_layers
        self._angles = angle_tables(spec, {layer.rope for layer in pair.layers.values()}, config.max_model_len)
        self._description = library.Spec(
            hidden=spec.hidden_size, intermediate=spec.intermediate_size, num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, vocab=spec.vocab_size,
            layer_norm=spec.norm == "layer", activation=_ACTIVATIONS[spec.activation], gated=spec.gated_mlp,
            parallel_residual=spec.parallel_residual, rotary_dim=spec.rotary_dim, page_size=config.page_size,
            type=TYPES[self.dtype], weight_type=weight_type,
            factor_type=TYPES[self._differences.dtype], exact_activations=config.exact_activations,
            kv_type=library.INT8 if config.kv_cache_dtype == "int8" else TYPES[self.dtype],
            wide_qk_norm=spec.qk_norm_of_all, rows_alone=config.speculates,
            eps=spec.norm_eps, stream_eps=spec.stream_eps, scale=spec.attention_scale, norm_offset=spec.norm_offset,
            input_scale=spec.input_scale,
        )  # fmt: skip
        num_layers = pair.elasticity.num_global_layers
        self._engine = library.create_engine(
            lib, ctypes.byref(self._description), layer_table(pair, self._weights, num_layers, self._angles),
            self._differences.table(num_layers), num_layers, end_table(pair, self._weights), self.num_threads,
        )  # fmt: skip
        self._has_int8_kv = config.kv_cache_dtype == "int8"
        self.k_pages = self.v_pages = np.zeros((0, 0), np.uint8)  # [pages, bytes of K or V of one]
        self.states = np.zeros((0, spec.hidden_size), np.float32)  # [state pages * page_size, E]
        self._layout = 0  # of the batch that `_step` describes

    def __del__(self) -> None:
        if self._engine is not None:
            self._lib.bs_destroy(self._engine)
            self._engine = None

    def beside(self, pair: LoadedPair, config: EngineConfig) -> NativeExecutor:
        own = NativeExecutor(pair, config, self.variant, self._lib, self._passed_over, self)
        own.k_pages, own.v_pages, own.states = self.k_pages, self.v_pages, self.states
        return own

    def describe(self) -> str:
        kind = str(self.weight_form)
        if self._weights.is_compressed:
            kind = f"{self.dtype}, weights compressed without loss to 12 bits"
        if self.weight_form.storage in (Storage.CODES, Storage.NESTED):
            kind = f"{self.dtype}, weights in codes ({self._kinds})"
        text = f"native C++ ({self.variant}) on cpu, {kind}, {self.num_threads} threads, "
        return f"{text}pages of {self.page_size} tokens{' in int8' if self._has_int8_kv else ''}"

    def matrix_bytes(self, num_rows: int, width: int) -> int:
        if self._weights.is_compressed:
            return twelve_bit_bytes(num_rows, width) + self.weight_form.bytes_beside(num_rows, width)
        return self.weight_form.matrix_bytes(num_rows, width)

    def bytes_per_weight_at(self, width: int) -> float:
        return self._weights.bytes_per_weight_at(width)

    def passed_over(self) -> list[str]:
        """Better variants of the kernels, and why they do not run here."""
        return self._passed_over

    def page_bytes(self) -> int:
        return sum(self._bytes_of_k_and_v())

    def _bytes_of_k_and_v(self) -> tuple[int, int]:
        k, v = (self._lib.bs_page_bytes(ctypes.byref(self._description), of_values) for of_values in (0, 1))
        return k, v

    def allocate_kv(self, num_pages: int) -> None:
        k, v = self._bytes_of_k_and_v()
        self.k_pages = zero_bytes(num_pages * k).reshape(num_pages, k)
        self.v_pages = zero_bytes(num_pages * v).reshape(num_pages, v)

    def state_page_bytes(self) -> int:
        """Bytes of the hidden states of one page of tokens."""
        return 4 * self.page_size * self.spec.hidden_size

    def allocate_states(self, num_pages: int) -> None:
        """Memory for hidden states that batches save and restore; like that of KV, had from the system on first use."""
        values = zero_bytes(num_pages * self.state_page_bytes()).view(np.float32)
        self.states = values.reshape(-1, self.spec.hidden_size)

    def kv_tensors(self) -> tuple[np.ndarray, ...]:
        return self.k_pages, self.v_pages

    def release(self, parts: Collection[Part]) -> int:
        matrices = [matrix for part in parts for _, matrix in self._matrices(part)]
        num_bytes = self._weights.release(matrices)
        if self._nested is not self._weights:
            num_bytes += self._nested.release([codes for matrix in matrices if (codes := nested_of(matrix))])
        plain = [source_of(matrix) for matrix in matrices if self._weights.of(matrix) is None]
        return num_bytes + sum(give_back(address(matrix), matrix.nbytes) for matrix in plain)

    def restore(self, part: Part, weights: LayerWeights | EndWeights) -> None:
        threads = max(self.num_threads // 2, 1)  # steps go on beside it
        for name, matrix in self._matrices(part):
            fresh = getattr(weights, name)
            if self._weights.of(matrix) is None:  # an embedding, read where it lies
                np.copyto(source_of(matrix), source_of(fresh))
                continue
            self._weights.restore(matrix, exact_of(fresh), threads)
            if self._nested is not self._weights and (codes := nested_of(fresh)) is not None:
                self._nested.restore(nested_of(matrix), codes, threads)

    def _matrices(self, part: Part) -> list[tuple[str, Matrix]]:
        """(field, matrix) of a part of the teacher."""
        if isinstance(part, int):
            return [(name, getattr(self._pair.layers[part], name)) for name in MATRICES]
        return [(part, getattr(self._pair.ends["teacher"], part))]

    def forward(self, batch: ForwardBatch) -> np.ndarray:
        if batch.layout == 0 or batch.layout != self._layout:
            self._lay_out(batch)
        step = self._step
        out = np.empty((len(batch.logits_rows), self.spec.hidden_size), np.float32)
        step.input_ids, step.positions = batch.input_ids.ctypes.data, batch.positions.ctypes.data
        step.out = address(out)
        widths = batch.widths_of(batch.query_start) if len(self.widths) > 1 else None
        step.widths = None if widths is None else widths.ctypes.data
        step.doorbell, self.doorbell = self.doorbell, -1
        self._lib.bs_step(self._engine, self._step_pointer)
        return out

    def _lay_out(self, batch: ForwardBatch) -> None:
        """Describe the step to the library, all but what differs between batches of one layout."""
        program = _program_table(batch.program, self._num_teacher_layers)
        tables = batch.block_tables
        num_rows = len(batch.logits_rows)
        embed_cut, norm_cut = int(batch.query_start[batch.embed_cut]), int(batch.logits_start[batch.norm_cut])
        if not self._has_two_ends:
            embed_cut, norm_cut = batch.num_tokens, num_rows
        saves, restores = _saves(batch), _restores(batch)
        self._step = library.Step(
            num_tokens=batch.num_tokens, num_requests=batch.num_requests, num_segments=len(program),
            num_rows=num_rows, embed_cut=embed_cut, norm_cut=norm_cut, program=program.ctypes.data,
            query_start=batch.query_start.ctypes.data, slots=batch.slots.ctypes.data,
            block_tables=tables.ctypes.data, layer_stride=tables.strides[0] // 4, slot_stride=tables.strides[1] // 4,
            num_saves=len(saves), num_restores=len(restores), saves=saves.ctypes.data, restores=restores.ctypes.data,
            states=self.states.ctypes.data, rows=batch.logits_rows.ctypes.data,
            k_pages=self.k_pages.ctypes.data, v_pages=self.v_pages.ctypes.data,
        )  # fmt: skip
        self._step_pointer = ctypes.byref(self._step)
        self._layout = batch.layout
        self._pointed_at = batch, program, saves, restores  # they live as long as the description

    def logits(self, hidden: np.ndarray, num_teacher: int, widths: np.ndarray | None = None) -> np.ndarray:
        num_rows, width, vocab = hidden.shape[0], self.spec.hidden_size, self.spec.vocab_size
        out = np.empty((num_rows, vocab), np.float32)
        hidden, read = np.ascontiguousarray(hidden), self._head_widths(widths)
        rows, target = address(hidden), address(out)
        for end, start, stop in self._sides(num_rows, num_teacher):
            at = None if read is None else read.ctypes.data + start
            self._lib.bs_head(self._engine, rows + 4 * width * start, at, stop - start, end, target + 4 * vocab * start)
        return out if self.spec.logit_scale == 1.0 else out * np.float32(self.spec.logit_scale)

    def _head_widths(self, widths: np.ndarray | None) -> np.ndarray | None:
        """Bits that each row reads of a head; None if all are read as they were loaded."""
        return None if widths is None or len(self.widths) == 1 else _HEAD_WIDTHS[widths]

    def greedy(self, hidden: np.ndarray, num_teacher: int, widths: np.ndarray | None = None) -> list[int]:
        """The likeliest token per row of `logits(hidden, num_teacher, widths)`, which are never written to memory.

        -1 for a row whose largest logit is not finite.
        """
        num_rows, width = hidden.shape[0], self.spec.hidden_size
        tokens = np.empty(num_rows, np.int32)
        hidden, read = np.ascontiguousarray(hidden), self._head_widths(widths)
        rows, target = address(hidden), address(tokens)
        for end, start, stop in self._sides(num_rows, num_teacher):
            at = None if read is None else read.ctypes.data + start
            self._lib.bs_greedy(self._engine, rows + 4 * width * start, at, stop - start, end, target + 4 * start)
        return tokens.tolist()

    def draw(self, logits: np.ndarray, draws: list[Draw]) -> list[int]:
        logits = np.ascontiguousarray(logits)
        rows = np.array(draws, library.DRAW)
        tokens = np.empty(len(draws), np.int32)
        self._lib.bs_draw(self._engine, address(logits), len(draws), rows.ctypes.data, tokens.ctypes.data)
        return tokens.tolist()

    def times(self) -> dict[str, float]:
        """Seconds spent in each part of the steps since the last call."""
        seconds = (ctypes.c_double * len(library.TIMES))()
        self._lib.bs_times(self._engine, seconds)
        return dict(zip(library.TIMES, seconds, strict=True))

    def _sides(self, num_rows: int, num_teacher: int) -> list[tuple[int, int, int]]:
        """(end, first row, end row) of the rows that take the teacher's and the student's ends."""
        split = num_teacher if self._has_two_ends else num_rows
        return [side for side in ((0, 0, split), (1, split, num_rows)) if side[1] < side[2]]


@lru_cache(maxsize=512)
def _program_table(program: tuple[Segment, ...], num_teacher_layers: int) -> np.ndarray:
    """[n, 5] of (layer, first request, end request, first of the difference's, layer of the difference)."""
    rows = [
        (layer, start, stop, stop if split is None else split, num_teacher_layers + station)
        for layer, start, stop, station, split in program
    ]
    return np.array(rows, np.int32)


def _saves(batch: ForwardBatch) -> np.ndarray:
    """[n, 3] of (segment before which to save, token, row of the states)."""
    if not batch.saves:
        return _NO_SAVES
    stations = [segment.station for segment in batch.program]
    parts = [
        np.stack((np.full(len(tokens), bisect_left(stations, station)), tokens, rows), axis=1)
        for station, tokens, rows in batch.saves
    ]
    return np.concatenate(parts, dtype=np.int32)


def _restores(batch: ForwardBatch) -> np.ndarray:
    """[n, 2] of (token, row of the states)."""
    if not batch.restores:
        return _NO_RESTORES
    parts = [np.stack((tokens, rows), axis=1) for _, tokens, rows in batch.restores]
    return np.concatenate(parts, dtype=np.int32)
