"""Causal attention for training on CPUs: two matrix products and a softmax.

At rows of a few hundred tokens PyTorch's fused CPU attention spends four times as long in its backward pass as these
products, which run on the matrix units (AMX). Needs T x T scores per head, so it is for short rows.

B = rows, H = query heads, G = key/value heads, T = tokens, D = head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

_NAME = "boomerang_matmul"
_LONGEST = 1024


def matmul_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0, **unused: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """[B, H, T, D] and [B, G, T, D] to [B, T, H, D], as transformers' attention functions; padding is not supported."""
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    rows = query.reshape(batch * key.shape[1], groups * length, size)
    keys, values = key.reshape(-1, length, size), value.reshape(-1, length, size)
    future = torch.full((length, length), float("-inf"), dtype=rows.dtype, device=rows.device).triu(1)
    if attention_mask is not None:  # of a sliding window: the same for all rows and heads
        future = attention_mask[0, 0].to(rows.dtype)
    future = future.repeat(groups, 1).expand(len(rows), -1, -1)
    scores = torch.baddbmm(future, rows, keys.transpose(1, 2), alpha=scale)
    out = torch.bmm(scores.softmax(-1), values)
    return out.view(batch, heads, length, size).transpose(1, 2), None


def use_matmul_attention(teacher: PreTrainedModel, row_tokens: int) -> None:
    """Make the teacher's layers, and students copied from them, use it if it pays."""
    if teacher.device.type == "cpu" and row_tokens <= _LONGEST and teacher.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, matmul_attention)
        teacher.set_attn_implementation(_NAME)
