"""RMSNorm and LayerNorm over rows, in float32 inside.

The residual is not added here: the product before it adds into the residual stream in its own epilogue (see layer.py),
which saves writing and reading a second array.

T = rows, E = hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from server.kernels.cuda.runtime import INTERPRETED


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["split_ptr"])
def norm_kernel(
    x_ptr, weight_ptr, bias_ptr, other_ptr, split_ptr, out_ptr, num_rows, width, eps,
    IS_LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SPLIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    in_row = columns < width
    mask = (rows < num_rows)[:, None] & in_row[None, :]
    offsets = rows[:, None].to(tl.int64) * width + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if IS_LAYER:
        mean = tl.sum(x, axis=1) / width
        x = tl.where(mask, x - mean[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) / width
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(variance + eps)[:, None]
    if HAS_SPLIT:
        other = tl.load(other_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
        is_other = rows[:, None] >= tl.load(split_ptr)
        y *= tl.where(is_other, other[None, :], weight[None, :])
    else:
        y *= weight[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


def num_warps(width: int) -> int:
    """For one row of `width` channels; with fewer, narrow models spill registers."""
    return min(max(width // 256, 1), 8)


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, kind: str, eps: float,
    out: torch.Tensor | None = None, other: torch.Tensor | None = None, split: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [T, E] contiguous -> [T, E]. `kind` is "rms" or "layer". Rows from split[0] on take the weight `other`."""
    num_rows, width = x.shape
    out = torch.empty_like(x) if out is None else out
    if not num_rows:
        return out
    rows, padded = 16 if INTERPRETED else 1, triton.next_power_of_2(width)
    norm_kernel[(triton.cdiv(num_rows, rows),)](
        x, weight, weight if bias is None else bias, weight if other is None else other,
        weight if split is None else split, out, num_rows, width, eps,
        IS_LAYER=kind == "layer", HAS_BIAS=bias is not None, HAS_SPLIT=other is not None, ROWS=rows, WIDTH=padded,
        num_warps=num_warps(padded),
    )  # fmt: skip
    return out
