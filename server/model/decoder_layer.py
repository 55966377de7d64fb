"""The one decoder layer, for every family: a ModelSpec says which parts it has, LayerWeights hold its tensors.

T = tokens, E = hidden, H = query heads, K = KV heads, D = head dim, I = MLP width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from model_store.spec import ModelSpec
from model_store.weights import LayerWeights
from server.model.attention import AttentionBackend, Lane


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, spec: ModelSpec) -> torch.Tensor:
    """RMSNorm or LayerNorm over the last dimension, in float32 inside."""
    if spec.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, spec.norm_eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + spec.norm_eps)
    return wide.to(x.dtype) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first cos.shape[-1] channels of each head, halves convention. x [T, heads, D]."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def mlp(x: torch.Tensor, weights: LayerWeights, spec: ModelSpec) -> torch.Tensor:
    up = F.linear(x, weights.up_weight, weights.up_bias)
    if spec.gated_mlp:
        gate, up = up.chunk(2, dim=-1)
        hidden = _activate(gate, spec.activation) * up
    else:
        hidden = _activate(up, spec.activation)
    return F.linear(hidden, weights.down_weight, weights.down_bias)


def attend(
    x: torch.Tensor, weights: LayerWeights, spec: ModelSpec, backend: AttentionBackend, layer: int, lane: Lane
) -> torch.Tensor:
    """x [T, E] normed -> attention output [T, E]; writes the KV of `layer`."""
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    qkv = F.linear(x, weights.qkv_weight, weights.qkv_bias).view(-1, heads + 2 * kv_heads, dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    if spec.qk_norm:
        q = norm(q, weights.q_norm_weight, None, spec)
        k = norm(k, weights.k_norm_weight, None, spec)
    if lane.cos is not None:
        q, k = rotate(q, lane.cos, lane.sin), rotate(k, lane.cos, lane.sin)
    attended = backend.forward(q, k, v, layer, lane).reshape(-1, heads * dim)
    return F.linear(attended, weights.o_weight, weights.o_bias)


def decoder_layer(
    x: torch.Tensor, weights: LayerWeights, spec: ModelSpec, backend: AttentionBackend, layer: int, lane: Lane
) -> torch.Tensor:
    """One layer over the rows of a lane. x [T, E] -> [T, E]; `layer` is the global id its KV lives under."""
    normed = norm(x, weights.attn_norm_weight, weights.attn_norm_bias, spec)
    attended = attend(normed, weights, spec, backend, layer, lane)
    if spec.parallel_residual:
        normed = norm(x, weights.mlp_norm_weight, weights.mlp_norm_bias, spec)
        return x + attended + mlp(normed, weights, spec)
    x = x + attended
    return x + mlp(norm(x, weights.mlp_norm_weight, weights.mlp_norm_bias, spec), weights, spec)


def _activate(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
