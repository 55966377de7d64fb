"""The one decoder layer, for every family: a ModelSpec says which parts it has, LayerWeights hold its tensors.

T = tokens, E = hidden, H = query heads, K = KV heads, D = head dim, I = MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model_store.int8 import Matrix
from model_store.lowrank import LowRankTerm
from model_store.spec import ModelSpec
from model_store.weights import LayerWeights
from server.model.attention import Lane, TorchAttention
from server.model.linear import linear


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, spec: ModelSpec, eps: float | None = None
) -> torch.Tensor:
    """RMSNorm or LayerNorm over the last dimension, in float32 inside; `eps`: another one than the model's."""
    eps = spec.norm_eps if eps is None else eps
    if spec.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if spec.norm_offset:
        return (wide * (weight.float() + spec.norm_offset)).to(x.dtype)
    return wide.to(x.dtype) * weight


def stream_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, spec: ModelSpec
) -> torch.Tensor:
    """Norm of the hidden state; as it is where a layer has none there."""
    return x if weight is None else norm(x, weight, bias, spec, spec.stream_eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first cos.shape[-1] channels of each head, halves convention. x [T, heads, D]."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@dataclass(slots=True)
class Rows:
    """Rows [start, stop) of a segment: one KV layer, one set of norms, perhaps low-rank terms."""

    start: int
    stop: int
    layer: int  # global id their KV lives under
    lane: Lane
    attn_norm_weight: torch.Tensor | None
    mlp_norm_weight: torch.Tensor | None
    terms: dict[str, list[LowRankTerm]] | None = None
    widths: np.ndarray | None = None  # uint8 [stop - start], bits that each row reads; None: all at the widest

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.start : self.stop]


def project(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, name: str, rows: list[Rows]) -> torch.Tensor:
    """x W^T + b for all rows in one product, plus `b (a x)` where rows have such terms."""
    widths = [part.widths for part in rows if part.widths is not None]
    out = linear(x, weight, bias, np.concatenate(widths) if widths else None)
    for part in rows:
        for term in part.terms[name] if part.terms else ():
            part.of(out)[:, term.start : term.stop] += linear(linear(part.of(x), term.a), term.b)
    return out


def mlp(x: torch.Tensor, weights: LayerWeights, spec: ModelSpec, rows: list[Rows]) -> torch.Tensor:
    up = project(x, weights.up_weight, weights.up_bias, "up", rows)
    if spec.gated_mlp:
        gate, up = up.chunk(2, dim=-1)
        hidden = _activate(gate, spec.activation) * up
    else:
        hidden = _activate(up, spec.activation)
    return project(hidden, weights.down_weight, weights.down_bias, "down", rows)


def attend(
    x: torch.Tensor, weights: LayerWeights, spec: ModelSpec, backend: TorchAttention, rows: list[Rows]
) -> torch.Tensor:
    """x [T, E] normed -> attention output [T, E]; writes the KV of every part under its own layer."""
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    qkv = project(x, weights.qkv_weight, weights.qkv_bias, "qkv", rows).view(-1, heads + 2 * kv_heads, dim)
    attended = []
    for part in rows:
        q, k, v = part.of(qkv).split((heads, kv_heads, kv_heads), dim=1)
        if weights.q_norm_weight is not None and weights.k_norm_weight is not None:
            q, k = (
                norm(x.reshape(len(x), -1, len(own)), own, None, spec).view(x.shape)  # each head, or all of them
                for x, own in ((q, weights.q_norm_weight), (k, weights.k_norm_weight))
            )
        if weights.rope in part.lane.rotary:
            turn = part.lane.rotary[weights.rope]
            q, k = rotate(q, *turn), rotate(k, *turn)
        attended.append(backend.forward(q, k, v, part.layer, part.lane, weights.window).reshape(-1, heads * dim))
    return project(_joined(attended), weights.o_weight, weights.o_bias, "o", rows)


def decoder_layer(
    x: torch.Tensor, weights: LayerWeights, spec: ModelSpec, backend: TorchAttention, rows: list[Rows]
) -> torch.Tensor:
    """One layer over the rows of a segment. x [T, E] -> [T, E]."""

    def attn_norm() -> torch.Tensor:
        return _joined([stream_norm(part.of(x), part.attn_norm_weight, weights.attn_norm_bias, spec) for part in rows])

    def mlp_norm(x: torch.Tensor) -> torch.Tensor:
        return _joined([stream_norm(part.of(x), part.mlp_norm_weight, weights.mlp_norm_bias, spec) for part in rows])

    def after(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x if weight is None else norm(x, weight, None, spec)

    attended = after(attend(attn_norm(), weights, spec, backend, rows), weights.post_attn_norm_weight)
    if spec.parallel_residual:
        return x + attended + mlp(mlp_norm(x), weights, spec, rows)
    x = x + attended
    return x + after(mlp(mlp_norm(x), weights, spec, rows), weights.post_mlp_norm_weight)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _activate(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
