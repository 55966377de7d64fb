"""The decoder layer of every family on the device: library products, Triton for everything between them.

Both residual sums are the epilogue of a product (`addmm_` with beta 1), so no kernel exists for them.

T = tokens, E = hidden, H = query heads, K = KV heads, D = head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model_store.lowrank import LowRankDelta
from model_store.spec import ModelSpec, Rope
from model_store.weights import LayerWeights
from server.kernels.cuda.activation import activate
from server.kernels.cuda.attention import Items, PagedAttention
from server.kernels.cuda.linear import Factors, add_linear, add_low_rank, linear
from server.kernels.cuda.norm import norm
from server.kernels.cuda.rotary import rotate_and_write
from server.kernels.cuda.tables import DeviceTables
from server.kernels.cuda.widths import Runs


@dataclass(slots=True)
class Lane:
    """The rows that run a layer together. `positions` and `slots` int32 [T]; rows from `count` on are padding."""

    positions: torch.Tensor
    slots: torch.Tensor
    count: torch.Tensor  # int32 [1]
    items: tuple[Items, ...]
    first_token: int  # the token, as items count them, that is row 0
    split: torch.Tensor | None = None  # int32 [1]: rows from there on are the student's, in a lane of both
    runs: Runs = ()  # the widths at which rows read


@dataclass(slots=True)
class Difference:
    """A student layer that runs in its teacher layer's products."""

    attn_norm_weight: torch.Tensor
    mlp_norm_weight: torch.Tensor
    factors: dict[str, Factors]  # by "qkv", "o", "up", "down"

    @classmethod
    def of(cls, delta: LowRankDelta) -> Difference:
        factors = {name: Factors.of(terms, delta.attn_norm_weight.dtype) for name, terms in delta.terms.items()}
        return cls(delta.attn_norm_weight, delta.mlp_norm_weight, factors)


class Layers:
    """Weights of all layers, KV pages and what attention needs beside them."""

    def __init__(
        self, spec: ModelSpec, weights: dict[int, LayerWeights], attention: PagedAttention, tables: DeviceTables,
        max_positions: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.spec, self.weights, self.attention, self.tables = spec, weights, attention, tables
        self._angles: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}  # cos and sin
        for rope in {layer.rope for layer in weights.values()}:
            inv_freq, factor = (np.zeros(1, np.float32), 1.0) if rope == "none" else spec.rope_inv_freq(rope)
            angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), torch.from_numpy(inv_freq))
            self._angles[rope] = (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)
        self._device = device
        self._from_the_first = torch.zeros(1, dtype=torch.int32, device=device)
        self.k_pages = self.v_pages = torch.empty(0)  # [pages, K, P, D] once allocated

    def allocate(self, num_pages: int, page_size: int, dtype: torch.dtype) -> None:
        shape = (num_pages, self.spec.num_kv_heads, page_size, self.spec.head_dim)
        self.k_pages = self.v_pages = torch.empty(0)  # an old pool goes first
        self.k_pages = torch.empty(shape, dtype=dtype, device=self._device)
        self.v_pages = torch.empty(shape, dtype=dtype, device=self._device)

    def run(
        self, x: torch.Tensor, layer: int, lane: Lane, *, kv_layer: int | None = None, student: Difference | None = None
    ) -> None:
        """One layer over the rows of a lane: x [T, E], contiguous, becomes its output.

        K and V lie under `kv_layer` (default: the layer). `student`: what rows from the lane's split on (all of them,
        if it has none) differ in.
        """
        spec, weights = self.spec, self.weights[layer]
        table = self.tables[layer if kv_layer is None else kv_layer]
        split = self._from_the_first if lane.split is None else lane.split

        def normalise(name: str) -> torch.Tensor:
            own, bias = getattr(weights, f"{name}_weight"), getattr(weights, f"{name}_bias")
            if student is None:
                return norm(x, own, bias, kind=spec.norm, eps=spec.stream_eps)
            other = getattr(student, f"{name}_weight")
            return norm(x, own, bias, kind=spec.norm, eps=spec.stream_eps, other=other, split=split)

        def differ(out: torch.Tensor, rows: torch.Tensor, name: str) -> None:
            if student:
                add_low_rank(out, rows, student.factors[name], split)

        normed = normalise("attn_norm")
        qkv = linear(normed, weights.qkv_weight, weights.qkv_bias, runs=lane.runs)
        differ(qkv, normed, "qkv")
        q = rotate_and_write(
            qkv, self.k_pages, self.v_pages, table, lane.positions, lane.slots, lane.count, *self._angles[weights.rope],
            rotary_dim=0 if weights.rope == "none" else spec.rotary_dim, num_heads=spec.num_heads,
            q_norm=weights.q_norm_weight, k_norm=weights.k_norm_weight, eps=spec.norm_eps,
        )  # fmt: skip
        attended = torch.empty_like(q)
        for items in lane.items:
            self.attention.run(q, attended, self.k_pages, self.v_pages, table, items, lane.first_token)
        attended = attended.view(len(x), -1)
        if spec.parallel_residual:  # the MLP reads what attention has not been added to
            normed = normalise("mlp_norm")
        add_linear(x, attended, weights.o_weight, weights.o_bias, lane.runs)
        differ(x, attended, "o")
        if not spec.parallel_residual:
            normed = normalise("mlp_norm")
        up = linear(normed, weights.up_weight, weights.up_bias, runs=lane.runs)
        differ(up, normed, "up")
        hidden = activate(up, kind=spec.activation, is_gated=spec.gated_mlp)
        add_linear(x, hidden, weights.down_weight, weights.down_bias, lane.runs)
        differ(x, hidden, "down")
