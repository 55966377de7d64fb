"""Products with weights that may be int8, in torch operations that every device has.

T = rows, N = outputs, K = inputs.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from model_store.arrays import FLOAT32, to_torch
from model_store.dual import DualMatrix, at_width, exact_of, nested_of
from model_store.int8 import Int8Matrix, Matrix
from model_store.nested import NestedMatrix
from model_store.quantized import ACTIVATION_BLOCK, CodedMatrix

# Up to so many rows torch's own int8 operation on CPU (bfloat16) is faster than converting the weights; measured. It
# reads whole vectors of a row, and crashes where its width is not a multiple of them.
_FEW_ROWS, _VECTOR = 8, 32


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """[T, K] -> float32: each block of 32 inputs of a row in 255 steps of its largest magnitude / 127, as the integer
    kernels take them. Blocks of zeros stay zeros."""
    padded = F.pad(x.float(), (0, -x.shape[-1] % ACTIVATION_BLOCK))
    blocks = padded.unflatten(-1, (-1, ACTIVATION_BLOCK))
    most = blocks.abs().amax(dim=-1, keepdim=True)
    steps = (blocks * torch.where(most > 0, 127.0 / most, 0.0)).round()
    return (steps * (most / 127.0)).flatten(-2)[..., : x.shape[-1]]


def linear(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None, widths: np.ndarray | None = None
) -> torch.Tensor:
    """x [T, K] -> x W^T + b [T, N]. `widths` uint8 [T]: bits that each row reads; None: all at the widest.

    Of int8 weights a plain copy lives while it is multiplied with, at most: their values are exact in every type, and
    the sums are scaled in float32. With codes activations are rounded to 8 bits by blocks, as the integer kernels do.
    """
    if widths is not None and len(widths) and nested_of(weight) is not None:
        runs = np.unique(widths).tolist()
        if len(runs) > 1:
            out = x.new_empty(len(x), weight.shape[0])
            for width in runs:
                rows = torch.from_numpy(widths == width)
                out[rows] = linear(x[rows], at_width(weight, width), bias)
            return out
        weight = at_width(weight, runs[0])
    elif isinstance(weight, DualMatrix):
        weight = weight.exact
    if isinstance(weight, CodedMatrix | NestedMatrix):
        out = F.linear(round_activations(x), _float32(weight))
        return (out if bias is None else out + bias).to(x.dtype)
    assert not isinstance(weight, DualMatrix)
    if not isinstance(weight, Int8Matrix):
        return F.linear(x, weight, bias)
    is_small = len(x) <= _FEW_ROWS and x.shape[1] % _VECTOR == 0
    if is_small and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Its scales are of the type of x, too coarse: they are all 1 here.
        sums = torch._weight_int8pack_mm(x.contiguous(), weight.values, x.new_ones(len(weight.values)))
    else:
        sums = F.linear(x, weight.values.to(x.dtype))
    out = sums * weight.scale
    return (out if bias is None else out + bias).to(x.dtype)


def embed(ids: torch.Tensor, weight: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Rows `ids` of [V, E] -> [T, E], at the widest: one row of a matrix costs nothing."""
    weight = exact_of(weight)
    assert not isinstance(weight, DualMatrix)
    if isinstance(weight, CodedMatrix):
        return to_torch(weight.rows(ids.numpy())).to(dtype)
    if isinstance(weight, NestedMatrix):
        return weight.rows(ids).to(dtype)
    if not isinstance(weight, Int8Matrix):
        return F.embedding(ids, weight)
    return (weight.values[ids] * weight.scale[ids, None]).to(dtype)


def _float32(weight: CodedMatrix | NestedMatrix) -> torch.Tensor:
    """Codes of a file are on the host."""
    if isinstance(weight, CodedMatrix):
        return to_torch(weight.dense(FLOAT32))
    return weight.dense(torch.float32)
