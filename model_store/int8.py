"""Matrices as int8 with one scale per output channel: symmetric, rounded to nearest, weights only.

N = output channels, K = inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from model_store.arrays import Array, as_type, float32
from model_store.dual import DualMatrix, exact_of
from model_store.nested import NestedMatrix
from model_store.quantized import CodedMatrix

if TYPE_CHECKING:
    import torch

_SCALE_BYTES = 4
_BLOCK = 1 << 18  # values that are converted at a time: the float32 between fits the second-level cache


@dataclass(slots=True, eq=False)
class Int8Matrix:
    """values[n] * scale[n] is row n. Row 0 to N-1 of `values` int8 [N, K], `scale` float32 [N]."""

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def dense(self, dtype: np.dtype | torch.dtype) -> Array:
        """The plain matrix, rounded once; of tensors in torch's `dtype`."""
        return as_type(float32(self.values) * self.scale[:, None], dtype)


Factor = Array | Int8Matrix  # of a low-rank term
Matrix = Factor | CodedMatrix | NestedMatrix | DualMatrix
_CODES = (Int8Matrix, CodedMatrix, NestedMatrix)


def is_plain(matrix: Matrix) -> bool:
    """Whether it is an array or a tensor of floats."""
    return not isinstance(matrix, (*_CODES, DualMatrix))


def quantise(matrix: np.ndarray) -> Int8Matrix:
    """The nearest int8 matrix to [N, K] of floats. Rows of zeros get the scale 0."""
    num_rows, width = matrix.shape
    values, scale = np.empty(matrix.shape, np.int8), np.empty(num_rows, np.float32)
    rows = max(_BLOCK // width, 1)
    for start in range(0, num_rows, rows):
        block = slice(start, start + rows)
        wide = matrix[block].astype(np.float32)
        most = np.abs(wide).max(axis=1)
        wide *= np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)[:, None]
        values[block] = np.rint(wide, out=wide)
        scale[block] = most / np.float32(127)
    return Int8Matrix(values, scale)


def dense(matrix: Matrix, dtype: Any) -> Array:
    """The plain matrix, of tensors in torch's `dtype`."""
    matrix = exact_of(matrix)
    return matrix.dense(dtype) if isinstance(matrix, _CODES) else as_type(matrix, dtype)


def tensors_of(value: Matrix | None) -> Iterator[Array]:
    """What a field of weights holds in memory, in whatever form an executor has put it."""
    if isinstance(value, Int8Matrix):
        yield from (value.values, value.scale)
    elif value is not None:
        yield from value.tensors() if hasattr(value, "tensors") else (value,)


def int8_bytes(num_rows: int, width: int) -> int:
    """Bytes of an Int8Matrix of this shape."""
    return num_rows * (width + _SCALE_BYTES)
