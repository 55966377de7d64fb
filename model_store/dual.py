"""Matrices read at several widths: in nested codes alone, or as they were loaded with nested codes beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model_store.arrays import Array, dtype_of
from model_store.nested import HEAD_BITS, WIDTHS, NestedMatrix
from model_store.quantized import CodedMatrix

if TYPE_CHECKING:
    import numpy as np

    from model_store.int8 import Matrix


@dataclass(slots=True, eq=False)
class DualMatrix:
    """One matrix [N, K] in two forms: rows at WIDTHS read `nested`, all others `exact`."""

    exact: Array | CodedMatrix
    nested: NestedMatrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.exact.shape

    @property
    def dtype(self) -> np.dtype:
        return self.exact.dtype

    @property
    def nbytes(self) -> int:
        return self.exact.nbytes + self.nested.nbytes

    @property
    def kind(self) -> str:
        exact = self.exact.kind if isinstance(self.exact, CodedMatrix) else dtype_of(self.dtype).name
        return f"{exact} and nested codes"

    def tensors(self) -> Iterator[Array]:
        yield from self.exact.tensors() if isinstance(self.exact, CodedMatrix) else (self.exact,)
        yield from self.nested.tensors()


def exact_of(matrix: Matrix) -> Matrix:
    """The form in which the matrix was loaded."""
    return matrix.exact if isinstance(matrix, DualMatrix) else matrix


def nested_of(matrix: Matrix) -> NestedMatrix | None:
    """The nested codes of a matrix that has some."""
    if isinstance(matrix, DualMatrix):
        return matrix.nested
    return matrix if isinstance(matrix, NestedMatrix) else None


def at_width(matrix: Matrix, width: int) -> Matrix:
    """What a row of this width reads; a matrix without nested codes is read whole at every width."""
    nested = nested_of(matrix)
    return exact_of(matrix) if nested is None or width not in WIDTHS else nested.at(width)


def head_width(width: int) -> int:
    """What a row of this width reads of a head, which decides tokens directly."""
    return HEAD_BITS.get(width, width)
