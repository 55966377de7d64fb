"""The nonlinearity between the two products of an MLP, gated or not.

T = rows, I = MLP width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from server.kernels.cuda.runtime import INTERPRETED

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit(do_not_specialize=["num_rows"])
def activation_kernel(
    up_ptr, out_ptr, num_rows, width, KIND: tl.constexpr, IS_GATED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    rows = rows[:, None].to(tl.int64)
    row_width = 2 * width if IS_GATED else width
    x = tl.load(up_ptr + rows * row_width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if KIND == 0:
        y = x * tl.sigmoid(x)
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if IS_GATED:
        y *= tl.load(up_ptr + rows * row_width + width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * width + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


def activate(up: torch.Tensor, *, kind: str, is_gated: bool) -> torch.Tensor:
    """up [T, 2I] (gate, then up) or [T, I] -> [T, I]."""
    num_rows, width = up.shape
    width //= 2 if is_gated else 1
    out = up.new_empty(num_rows, width)
    if not num_rows:
        return out
    rows, columns = (16, triton.next_power_of_2(width)) if INTERPRETED else (1, 1024)
    activation_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(width, columns))](
        up, out, num_rows, width, KIND=KINDS[kind], IS_GATED=is_gated, ROWS=rows, COLUMNS=columns, num_warps=4
    )
    return out
