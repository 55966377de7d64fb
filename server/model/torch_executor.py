"""The portable executor: any device torch has, float32, bfloat16 or float16.

T = tokens of the step, S = rows whose logits are wanted, E = hidden, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
import torch.nn.functional as F

from model_store.arrays import in_torch, to_numpy, to_torch
from model_store.blocks import Part
from model_store.dual import head_width
from model_store.lowrank import LowRankDelta
from model_store.pair import LoadedPair
from model_store.spec import Rope
from model_store.weight_form import Storage
from model_store.weights import MATRICES, EndWeights, LayerWeights
from server.core.batch import ForwardBatch, Segment
from server.core.config import EngineConfig
from server.core.executor import Executor
from server.model.attention import Lane, TorchAttention
from server.model.decoder_layer import Rows, decoder_layer, stream_norm
from server.model.int8_attention import Int8Attention
from server.model.linear import embed, linear

Owner = LayerWeights | EndWeights


class TorchExecutor(Executor):
    """Runs the step's program layer by layer with torch operations."""

    name = "torch"
    can_release = can_change_student = True

    def __init__(self, pair: LoadedPair, *, page_size: int, kv_cache_dtype: str = "auto") -> None:
        self._loaded, pair = pair, pair.in_torch()
        self.spec = pair.spec
        self.layers = pair.layers
        self.low_rank: dict[int, LowRankDelta] = pair.low_rank
        self.weight_form, self._kinds, self.widths = pair.form, pair.kinds(), pair.widths
        self.elasticity = pair.elasticity
        self.shared_stations = pair.shared_stations
        self.ends: dict[str, EndWeights] = pair.ends
        self.dtype = self.ends["teacher"].final_norm_weight.dtype
        self.device = self.ends["teacher"].final_norm_weight.device
        self.page_size = page_size
        self.attention = (Int8Attention if kv_cache_dtype == "int8" else TorchAttention)(
            page_size=page_size,
            scale=self.spec.attention_scale,
            num_heads=self.spec.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
        )
        self.states = torch.empty(0)  # [state pages * page_size, E] once allocated
        ropes: set[Rope] = {layer.rope for layer in pair.layers.values()} - {"none"} if self.spec.rotary_dim else set()
        self._frequencies = {rope: self.spec.rope_inv_freq(rope) for rope in ropes}

    def beside(self, pair: LoadedPair, config: EngineConfig) -> TorchExecutor:
        own = TorchExecutor(pair, page_size=self.page_size, kv_cache_dtype=config.kv_cache_dtype)
        own.attention, own.states = self.attention, self.states
        return own

    def describe(self) -> str:
        kinds = f" ({self._kinds})" if self.weight_form.storage is Storage.CODES else ""
        pages = f"pages of {self.page_size} tokens{self.attention.kind}"
        return f"torch on {self.device}, {self.weight_form}{kinds}, {pages}"

    def page_bytes(self) -> int:
        return self.page_size * self.attention.token_bytes(self.dtype)

    def allocate_kv(self, num_pages: int) -> None:
        self.attention.allocate(num_pages, self.dtype, self.device)

    def state_page_bytes(self) -> int:
        """Bytes of the hidden states of one page of tokens."""
        return self.page_size * self.spec.hidden_size * self.dtype.itemsize

    def allocate_states(self, num_pages: int) -> None:
        """Memory for hidden states that batches save and restore."""
        shape = (num_pages * self.page_size, self.spec.hidden_size)
        self.states = torch.empty(shape, dtype=self.dtype, device=self.device)

    def release(self, parts: Collection[Part]) -> int:
        num_bytes, seen = 0, set()
        for part in parts:
            own, loaded, names = self._place(part)
            for name in names:
                matrix = getattr(own, name)
                if matrix is not None and id(matrix) not in seen:
                    num_bytes += matrix.nbytes
                    seen.add(id(matrix))
            for name in names:
                setattr(own, name, None)
                setattr(loaded, name, None)
            del matrix
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return num_bytes

    def restore(self, part: Part, weights: LayerWeights | EndWeights) -> None:
        own, loaded, names = self._place(part)
        converted = in_torch(weights, self.device)
        for name in names:
            setattr(loaded, name, getattr(weights if self.device.type == "cpu" else converted, name))
            setattr(own, name, getattr(converted, name))

    def _place(self, part: Part) -> tuple[Owner, Owner, tuple[str, ...]]:
        """What has the matrices of a part of the teacher, here and as it was loaded (on a CPU the two share memory);
        and in which fields: a tied head goes with its embedding."""
        if isinstance(part, int):
            return self.layers[part], self._loaded.layers[part], MATRICES
        teacher = self.ends["teacher"]
        is_tied = teacher.embed is teacher.head
        return teacher, self._loaded.ends["teacher"], ("embed", "head") if is_tied else (part,)

    def kv_tensors(self) -> tuple[torch.Tensor, ...]:
        return self.attention.tensors()

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        hidden = self._embed(batch)
        for restore in batch.restores:
            hidden[self._index(restore.tokens)] = self.states[self._index(restore.rows)]
        lanes: dict[tuple[int, int], Lane] = {}
        saves = list(batch.saves)
        for segment in batch.program:
            while saves and saves[0].station <= segment.station:
                save = saves.pop(0)
                self.states[self._index(save.rows)] = hidden[self._index(save.tokens)]
            rows = self._rows(batch, segment, lanes)
            tokens = batch.tokens(segment.start, segment.stop)
            weights = self.layers[segment.layer]
            hidden[tokens] = decoder_layer(hidden[tokens], weights, self.spec, self.attention, rows)
        wanted = hidden[self._index(batch.logits_rows)]
        split = int(batch.logits_start[batch.norm_cut])
        return self._by_side(wanted, split, self._final_norm)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, num_teacher: int, widths: np.ndarray | None = None) -> np.ndarray:
        return to_numpy(self._logits(hidden, num_teacher, widths))

    @torch.inference_mode()
    def greedy(self, hidden: torch.Tensor, num_teacher: int, widths: np.ndarray | None = None) -> list[int]:
        values, tokens = self._logits(hidden, num_teacher, widths).max(dim=-1)
        return tokens.masked_fill(~values.isfinite(), -1).tolist()

    # --- parts

    def _logits(self, hidden: torch.Tensor, num_teacher: int, widths: np.ndarray | None) -> torch.Tensor:
        read = None if widths is None else np.array([head_width(int(width)) for width in widths], np.uint8)

        def head(rows: torch.Tensor, end: EndWeights) -> torch.Tensor:
            return linear(hidden[rows], end.head, end.head_bias, None if read is None else read[rows.numpy()])

        return self._by_side(torch.arange(len(hidden)), num_teacher, head).float() * self.spec.logit_scale

    def _index(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows.astype(np.int64)).to(self.device)

    def _embed(self, batch: ForwardBatch) -> torch.Tensor:
        ids = self._index(batch.input_ids)
        split = int(batch.query_start[batch.embed_cut])
        hidden = self._by_side(ids, split, lambda rows, end: embed(rows, end.embed, self.dtype))
        if self.spec.input_scale != 1.0:
            hidden = hidden * self.spec.input_scale
        if self.spec.learned_positions:
            positions = self._index(batch.positions)
            hidden = hidden + self._by_side(positions, split, _positions)
        return hidden

    def _rows(self, batch: ForwardBatch, segment: Segment, lanes: dict[tuple[int, int], Lane]) -> list[Rows]:
        """The segment's teacher and student rows, those that there are."""
        split = segment.stop if segment.split is None else segment.split
        student = self.elasticity.student_layer(segment.station)
        rows: list[Rows] = []
        for layer, start, stop in ((segment.layer, segment.start, split), (student, split, segment.stop)):
            if start == stop:
                continue
            lane = lanes.get((start, stop)) or lanes.setdefault((start, stop), self._lane(batch, start, stop))
            first = lane.tokens.start - int(batch.query_start[segment.start])
            delta = self.low_rank.get(layer)
            norms, terms = (self.layers[layer], None) if delta is None else (delta, delta.terms)
            last = first + lane.tokens.stop - lane.tokens.start
            rows.append(Rows(first, last, layer, lane, norms.attn_norm_weight, norms.mlp_norm_weight, terms))
            widths = batch.widths_of(batch.query_start) if len(self.widths) > 1 else None
            rows[-1].widths = None if widths is None else widths[lane.tokens]
        return rows

    def _lane(self, batch: ForwardBatch, start: int, stop: int) -> Lane:
        lane = self.attention.prepare(batch, start, stop)
        positions = torch.from_numpy(batch.positions[lane.tokens]).to(self.device, torch.float32)
        for rope, (inv_freq, factor) in self._frequencies.items():
            angles = torch.outer(positions, to_torch(inv_freq, self.device))
            angles = torch.cat((angles, angles), dim=-1)[:, None]  # halves convention
            cos, sin = ((turn * factor).to(self.dtype) for turn in (angles.cos(), angles.sin()))
            lane.rotary[rope] = cos, sin
        return lane

    def _final_norm(self, rows: torch.Tensor, end: EndWeights) -> torch.Tensor:
        return stream_norm(rows, end.final_norm_weight, end.final_norm_bias, self.spec)

    def _by_side(
        self, rows: torch.Tensor, split: int, apply: Callable[[torch.Tensor, EndWeights], torch.Tensor]
    ) -> torch.Tensor:
        """apply(rows, end weights) on [:split] with the teacher's ends and on [split:] with the student's."""
        teacher, student = self.ends["teacher"], self.ends["student"]
        if split == len(rows) or teacher is student:
            return apply(rows, teacher)
        if split == 0:
            return apply(rows, student)
        return torch.cat((apply(rows[:split], teacher), apply(rows[split:], student)))


def _positions(rows: torch.Tensor, end: EndWeights) -> torch.Tensor:
    assert end.positions is not None, "a model with learned positions has them"
    return F.embedding(rows, end.positions)
