"""Matrices in nested codes: one 8-bit parent per weight that is read at 8, 6, 5 or 4 bits, from the same bytes.

A group of 32 inputs has one affine grid of 256 cells from its least to its largest weight (zero included). A code is
the cell a weight falls in; its upper b bits are the cell of a grid 2^(8-b) times as coarse, so that a reader of fewer
bits reads fewer planes of the same codes. Weights are read as *centres* of cells: taking the lower edge instead (plain
truncation of int8) shifts every weight by half a cell, and four bits are then useless. The grids of all widths share
the place of zero; each width has a scale per group, fitted to what the product should give:

    weight = scale_b * (2^(8-b) * (code_b + 1/2) - zero)

N = output channels, K = inputs, G = K / 32 groups, W = widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from model_store.arrays import Array, as_type, float32, need_torch, to_numpy, to_torch
from model_store.quantized import Groups

if TYPE_CHECKING:
    import torch

WIDTHS = (8, 6, 5, 4)
GROUP = 32
_CELLS = 256
_DAMPING = 0.02  # of the mean diagonal, towards the unfitted scale: few tokens know little of some directions
_ROWS_AT_ONCE = 1 << 24  # elements of [rows, K] that are fitted together


@dataclass(slots=True, eq=False)
class NestedMatrix:
    """codes uint8 [N, K], zero uint8 [N, G] in cells of the 8-bit grid, scales float16 [W, N, G] by `WIDTHS`.

    `width` is what `groups`, `dense` and `rows` read; other widths share the tensors (`at`).
    """

    codes: Array
    zero: Array
    scales: Array
    width: int = WIDTHS[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        return self.codes.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all widths together."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def kind(self) -> str:
        return f"nested codes at {self.width} bits"

    def tensors(self) -> Iterator[Array]:
        return iter((self.codes, self.zero, self.scales))

    def at(self, width: int) -> NestedMatrix:
        """The same tensors read at `width` bits."""
        return NestedMatrix(self.codes, self.zero, self.scales, width)

    def groups(self, width: int | None = None) -> Groups:
        """Codes of `width` bits with the scale and minimum of each group: what an integer kernel multiplies."""
        width = width or self.width
        dropped = 8 - width
        scale = float32(self.scales[WIDTHS.index(width)])
        codes = (self.codes >> dropped).reshape(len(self.codes), -1, GROUP)
        return Groups(codes, scale * 2.0**dropped, scale * (2.0**dropped / 2 - float32(self.zero)))

    def dense(self, dtype: np.dtype | torch.dtype) -> Array:
        return as_type(self.groups().dense(), dtype)

    def rows(self, ids: Array) -> Array:
        """Rows `ids` [T] as float32 [T, K]."""
        part = NestedMatrix(self.codes[ids], self.zero[ids], self.scales[:, ids], self.width)
        return part.groups().dense()


def can_nest_width(width: int) -> bool:
    """Whether rows of so many inputs are whole groups; others stay as they are."""
    return width % GROUP == 0


def nested_bytes(num_rows: int, width: int) -> int:
    """Bytes of a NestedMatrix [num_rows, width] in memory, all widths together."""
    return num_rows * (width // GROUP) * (GROUP + 1 + 2 * len(WIDTHS))


def bytes_in_memory() -> float:
    """Bytes of one weight, all widths together."""
    return nested_bytes(1, GROUP) / GROUP


def bytes_read(bits: int) -> float:
    """Bytes of one weight that a product at so many bits reads: its code, its share of zero's place and of a scale."""
    return bits / 8 + 3 / GROUP


# A head decides tokens directly and is read once a step: it keeps more bits than the layers.
HEAD_BITS = {8: 8, 6: 8, 5: 6, 4: 6}


def nest(matrix: Array, gram: torch.Tensor | None = None) -> NestedMatrix:
    """The nested codes of [N, K] floats, in arrays or tensors as those are.

    `gram` is X^T X [K, K] of inputs X the matrix has met: scales are then fitted jointly per row, so that the error of
    the *product* is least, (w - w') gram (w - w')^T; without it, that of the weights. Codes are the same either way.
    """
    if isinstance(matrix, np.ndarray):
        made = nest(to_torch(matrix), gram)
        return NestedMatrix(to_numpy(made.codes), to_numpy(made.zero), to_numpy(made.scales))
    torch = need_torch("nesting")
    num_rows, width = matrix.shape
    codes = torch.empty(matrix.shape, dtype=torch.uint8)
    zero = torch.empty(num_rows, width // GROUP, dtype=torch.uint8)
    scales = torch.empty(len(WIDTHS), num_rows, width // GROUP, dtype=torch.float16)
    per_row = width if gram is None else width * (width // GROUP)
    step = max(_ROWS_AT_ONCE // per_row, 1)
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        groups = matrix[part].float().unflatten(1, (-1, GROUP))
        low = groups.amin(2).clamp_max(0)
        scale = ((groups.amax(2).clamp_min(0) - low) / _CELLS).clamp(2.0**-24, 65504).half().float()
        zero[part] = place = (-low / scale).round().clamp(0, _CELLS - 1).to(torch.uint8)
        cells = (groups / scale[..., None] + place[..., None]).floor().clamp(0, _CELLS - 1)
        codes[part] = cells.flatten(1).to(torch.uint8)
        for i, bits in enumerate(WIDTHS):
            coarse = 2.0 ** (8 - bits)
            read = ((cells / coarse).floor() + 0.5) * coarse - place[..., None].float()  # in cells
            read = read * scale[..., None]
            factor = _fit(groups, read) if gram is None else _fit_products(groups, read, gram)
            scales[i, part] = (scale * factor).clamp(2.0**-24, 65504).half()
    return NestedMatrix(codes, zero, scales)


def _fit(groups: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """[n, G] factors f with the least |w - f w'|^2 of each group; 1 where a group reads as zero."""
    torch = need_torch("nesting")
    square = (read * read).sum(2)
    return torch.where(square > 0, (groups * read).sum(2) / square.clamp_min(1e-30), 1.0)


def _fit_products(groups: torch.Tensor, read: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """[n, G] factors f of all groups of a row together, with the least (w - f w') gram (w - f w')^T.

    The normal equations of least squares: A f = b with A[i, j] = w'_i gram_ij w'_j and b[i] = w'_i (gram w)_i.
    """
    torch = need_torch("nesting")
    num_rows, num_groups, _ = groups.shape
    wanted = (groups.flatten(1) @ gram).unflatten(1, (num_groups, GROUP))
    right = (read * wanted).sum(2)
    left = torch.empty(num_rows, num_groups, num_groups)
    for j in range(num_groups):
        through = (read[:, j] @ gram[j * GROUP : (j + 1) * GROUP]).unflatten(1, (num_groups, GROUP))
        left[:, j] = (read * through).sum(2)
    damping = left.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30) * _DAMPING
    left.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    return torch.linalg.solve(left, right + damping[:, None])
