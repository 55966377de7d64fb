"""The decoder layer of every family on the device: library products, Triton for everything between them.

Both residual sums are the epilogue of a product (`addmm_` with beta 1), so no kernel exists for them.

T = tokens, E = hidden, H = query heads, K = KV heads, D = head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model_store.spec import ModelSpec
from model_store.weights import LayerWeights
from server.kernels.cuda.activation import activate
from server.kernels.cuda.attention import Items, PagedAttention
from server.kernels.cuda.norm import norm
from server.kernels.cuda.rotary import rotate_and_write
from server.kernels.cuda.tables import DeviceTables


@dataclass(slots=True)
class Lane:
    """The rows that run a layer together. `positions` and `slots` int32 [T]; rows from `count` on are padding."""

    positions: torch.Tensor
    slots: torch.Tensor
    count: torch.Tensor  # int32 [1]
    items: tuple[Items, ...]
    first_token: int  # the token, as items count them, that is row 0


class Layers:
    """Weights of all layers, KV pages and what attention needs beside them."""

    def __init__(
        self, spec: ModelSpec, weights: dict[int, LayerWeights], attention: PagedAttention, tables: DeviceTables,
        max_positions: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.spec, self.weights, self.attention, self.tables = spec, weights, attention, tables
        inv_freq, factor = spec.rope_inv_freq() if spec.rotary_dim else (torch.zeros(1), 1.0)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inv_freq)
        self._cos = (angles.cos() * factor).to(device)
        self._sin = (angles.sin() * factor).to(device)
        self.k_pages: torch.Tensor | None = None  # [pages, K, P, D]
        self.v_pages: torch.Tensor | None = None

    def allocate(self, num_pages: int, page_size: int, dtype: torch.dtype) -> None:
        shape = (num_pages, self.spec.num_kv_heads, page_size, self.spec.head_dim)
        self.k_pages = self.v_pages = None  # an old pool goes first
        self.k_pages = torch.empty(shape, dtype=dtype, device=self._cos.device)
        self.v_pages = torch.empty(shape, dtype=dtype, device=self._cos.device)

    def run(self, x: torch.Tensor, layer: int, lane: Lane) -> None:
        """One layer over the rows of a lane: x [T, E], contiguous, becomes its output."""
        spec, weights = self.spec, self.weights[layer]
        normed = self._norm(x, weights.attn_norm_weight, weights.attn_norm_bias)
        qkv = F.linear(normed, weights.qkv_weight, weights.qkv_bias)
        q = rotate_and_write(
            qkv, self.k_pages, self.v_pages, self.tables[layer], lane.positions, lane.slots, lane.count, self._cos,
            self._sin, rotary_dim=spec.rotary_dim, num_heads=spec.num_heads, q_norm=weights.q_norm_weight,
            k_norm=weights.k_norm_weight, eps=spec.norm_eps,
        )  # fmt: skip
        attended = torch.empty_like(q)
        for items in lane.items:
            self.attention.run(
                q, attended, self.k_pages, self.v_pages, self.tables[layer], items, lane.first_token
            )
        if spec.parallel_residual:  # the MLP reads what attention has not been added to
            normed = self._norm(x, weights.mlp_norm_weight, weights.mlp_norm_bias)
        _add_product(x, attended.view(len(x), -1), weights.o_weight, weights.o_bias)
        if not spec.parallel_residual:
            normed = self._norm(x, weights.mlp_norm_weight, weights.mlp_norm_bias)
        up = F.linear(normed, weights.up_weight, weights.up_bias)
        hidden = activate(up, kind=spec.activation, is_gated=spec.gated_mlp)
        _add_product(x, hidden, weights.down_weight, weights.down_bias)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return norm(x, weight, bias, kind=self.spec.norm, eps=self.spec.norm_eps)


def _add_product(x: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    x.addmm_(rows, weight.t())
    if bias is not None:
        x.add_(bias)
