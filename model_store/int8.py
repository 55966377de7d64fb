"""Matrices as int8 with one scale per output channel: symmetric, rounded to nearest, weights only.

N = output channels, K = inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model_store.dual import DualMatrix, exact_of
from model_store.nested import NestedMatrix
from model_store.quantized import CodedMatrix

_SCALE_BYTES = 4
# Values that are converted at a time: on a CPU the float32 between fits the second-level cache.
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 18, 1 << 25


@dataclass(slots=True, eq=False)
class Int8Matrix:
    """values[n] * scale[n] is row n. Row 0 to N-1 of `values` int8 [N, K], `scale` float32 [N]."""

    values: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain matrix, rounded once."""
        return (self.values.float() * self.scale[:, None]).to(dtype)


Factor = torch.Tensor | Int8Matrix  # of a low-rank term
Matrix = Factor | CodedMatrix | NestedMatrix | DualMatrix


def quantise(matrix: torch.Tensor) -> Int8Matrix:
    """The nearest int8 matrix to [N, K] of floats, on the same device. Rows of zeros get the scale 0."""
    num_rows, width = matrix.shape
    most = matrix.abs().amax(dim=1).float()
    inverse = torch.where(most > 0, 127.0 / most, 0.0)
    values = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    rows = max((_CPU_BLOCK if matrix.device.type == "cpu" else _DEVICE_BLOCK) // width, 1)
    for start in range(0, num_rows, rows):
        block = slice(start, start + rows)
        wide = matrix[block].to(torch.float32, copy=True)
        values[block] = wide.mul_(inverse[block, None]).round_()
    return Int8Matrix(values, most / 127.0)


def dense(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    matrix = exact_of(matrix)
    return matrix.to(dtype) if isinstance(matrix, torch.Tensor) else matrix.dense(dtype)


def tensors_of(value: Matrix | None) -> Iterator[torch.Tensor]:
    """What a field of weights holds in memory."""
    if isinstance(value, Int8Matrix):
        yield from (value.values, value.scale)
    elif isinstance(value, CodedMatrix | NestedMatrix | DualMatrix):
        yield from value.tensors()
    elif value is not None:
        yield value


def int8_bytes(num_rows: int, width: int) -> int:
    """Bytes of an Int8Matrix of this shape."""
    return num_rows * (width + _SCALE_BYTES)
