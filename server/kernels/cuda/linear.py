"""The products of a layer. Plain weights go to the library, weights in codes to the kernel of `coded_linear.py`.

The kernel here multiplies int8 weights, and the low-rank terms of a station's student rows: weights are widened to the
type of the activations in registers (int8 is exact in each), sums are float32 and scaled once.

T = rows, N = outputs, K = inputs, R = ranks of a group's terms together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from model_store.int8 import Factor, Int8Matrix, Matrix, dense, tensors_of
from model_store.lowrank import LowRankTerm
from server.kernels.cuda.coded_linear import coded_linear
from server.kernels.cuda.codes import DeviceCodes, Weight
from server.kernels.cuda.runtime import INTERPRETED
from server.kernels.cuda.widths import Runs, read_by

TERM_BLOCK = 64  # output channels of a low-rank term that one program adds to
_RANK_STEP = 16  # ranks are filled up with zeros to a multiple: columns that a program reads begin on whole vectors


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["split_ptr"])
def linear_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, blocks_ptr, split_ptr, num_rows, num_outputs, width, x_stride,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    HAS_SPLIT: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(1) * BLOCK_M
    begin = 0
    if HAS_SPLIT:
        begin = tl.load(split_ptr)  # rows before it are the teacher's: not read, not written
        if first_row + BLOCK_M <= begin:
            return
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = (rows < num_rows) & (rows >= begin)
    if HAS_BLOCKS:
        block = blocks_ptr + tl.program_id(0) * 4
        first, end = tl.load(block), tl.load(block + 1)
        x_ptr += tl.multiple_of(tl.load(block + 2), 16)
        num_inputs = tl.load(block + 3)
    else:
        first, end, num_inputs = tl.program_id(0) * BLOCK_N, num_outputs, width
    outputs = first + tl.arange(0, BLOCK_N)
    is_output = outputs < end
    inputs = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * x_stride + inputs[None, :]
    weight_ptrs = weight_ptr + outputs[None, :].to(tl.int64) * width + inputs[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptrs + start, mask=is_row[:, None], other=0.0)
            weight = tl.load(weight_ptrs + start, mask=is_output[None, :], other=0)
        else:
            is_input = start + inputs < num_inputs
            x = tl.load(x_ptrs + start, mask=is_row[:, None] & is_input[None, :], other=0.0)
            weight = tl.load(weight_ptrs + start, mask=is_output[None, :] & is_input[:, None], other=0)
        sums += tl.dot(x, weight.to(x.dtype), input_precision="ieee")
    if HAS_SCALE:
        sums *= tl.load(scale_ptr + outputs, mask=is_output, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    mask = is_row[:, None] & is_output[None, :]
    target = out_ptr + rows[:, None].to(tl.int64) * num_outputs + outputs[None, :]
    if ADD:
        sums += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, sums.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows, outputs and inputs of one turn of a program. Few rows: many narrow programs, to read weights at once."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, num_rows: int) -> Tiles:
        if INTERPRETED:
            return cls(max(min(triton.next_power_of_2(num_rows), 128), 16), 64, 64, 4, 1)
        if num_rows <= 16:
            return cls(16, 32, 128, 4, 4)
        if num_rows <= 64:
            return cls(triton.next_power_of_2(num_rows), 64, 64, 4, 4)
        return cls(128, 128, 64, 8, 3)


def _launch(
    x: torch.Tensor, weight: Matrix, out: torch.Tensor, *, bias: torch.Tensor | None = None, add: bool = False,
    blocks: torch.Tensor | None = None, split: torch.Tensor | None = None,
) -> None:  # fmt: skip
    num_rows, num_outputs = len(x), out.shape[1]
    if not num_rows:
        return
    assert isinstance(weight, torch.Tensor | Int8Matrix)
    values, scale = (weight.values, weight.scale) if isinstance(weight, Int8Matrix) else (weight, None)
    tiles, width = Tiles.of(num_rows), values.shape[1]
    columns = tiles.outputs if blocks is None else TERM_BLOCK
    programs = triton.cdiv(num_outputs, columns) if blocks is None else len(blocks)
    assert values.is_contiguous() and out.stride() == (num_outputs, 1) and x.stride(1) == 1
    linear_kernel[(programs, triton.cdiv(num_rows, tiles.rows))](
        x, values, values if scale is None else scale, values if bias is None else bias, out,
        values if blocks is None else blocks, values if split is None else split, num_rows, num_outputs, width,
        x.stride(0), HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, ADD=add, HAS_BLOCKS=blocks is not None,
        HAS_SPLIT=split is not None, EVEN=blocks is None and width % tiles.inputs == 0, BLOCK_M=tiles.rows,
        BLOCK_N=columns, BLOCK_K=tiles.inputs, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _multiply(
    x: torch.Tensor, weight: Weight, out: torch.Tensor, *, bias: torch.Tensor | None, add: bool = False
) -> None:
    if isinstance(weight, DeviceCodes):
        coded_linear(x, weight, out, bias=bias, add=add)
    else:
        _launch(x, weight, out, bias=bias, add=add)


def linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, out: torch.Tensor | None = None, runs: Runs = ()
) -> torch.Tensor:
    """x [T, K] -> x W^T + b [T, N], contiguous. `runs`: the widths at which rows read the matrix."""
    parts = read_by(weight, runs)
    if out is None:
        if len(parts) == 1 and isinstance(parts[0][1], torch.Tensor):
            return F.linear(x, parts[0][1], bias)
        out = x.new_empty(len(x), weight.shape[0])
    for rows, part in parts:
        if not isinstance(part, torch.Tensor):
            _multiply(x[rows], part, out[rows], bias=bias)
            continue
        torch.mm(x[rows], part.t(), out=out[rows])
        if bias is not None:
            out[rows] += bias
    return out


def add_linear(x: torch.Tensor, rows: torch.Tensor, weight: Weight, bias: torch.Tensor | None, runs: Runs = ()) -> None:
    """x [T, N] += rows [T, K] W^T + b."""
    for some, part in read_by(weight, runs):
        if not isinstance(part, torch.Tensor):
            _multiply(rows[some], part, x[some], bias=bias, add=True)
            continue
        x[some].addmm_(rows[some], part.t())
        if bias is not None:
            x[some].add_(bias)


@dataclass(frozen=True, slots=True)
class Factors:
    """The terms of one merged product: `a` of all of them one below the other, `b` by output channel.

    Ranks are padded, R and r count the zeros.
    """

    a: Factor  # [R, K]
    b: Factor  # [N, r], r of the term of the largest rank
    blocks: torch.Tensor  # int32 [n, 4]: outputs [first, end), the term's first row of `a`, its rank

    @classmethod
    def of(cls, terms: list[LowRankTerm], dtype: torch.dtype) -> Factors:
        """int8 factors stay int8. The terms become views of what is stacked here, so that nothing exists twice."""
        a, b = [term.a for term in terms], [term.b for term in terms]
        if not all(isinstance(factor, Int8Matrix) for factor in (*a, *b)):
            a, b = [dense(factor, dtype) for factor in a], [dense(factor, dtype) for factor in b]
        ranks = [-(-factor.shape[0] // _RANK_STEP) * _RANK_STEP for factor in a]
        padded = [_padded(factor, rank=rank) for factor, rank in zip(a, ranks, strict=True)]
        wide = [_padded(factor, width=max(ranks)) for factor in b]
        stacked = cls(_stack(padded), _stack(wide), _blocks(terms, ranks).to(next(tensors_of(a[0])).device))
        for term, factor, first in zip(terms, a, _starts(ranks), strict=True):
            term.a = _part(stacked.a, slice(first, first + factor.shape[0]))
            term.b = _part(stacked.b, slice(term.start, term.stop), slice(factor.shape[0]))
        return stacked


def add_low_rank(out: torch.Tensor, x: torch.Tensor, factors: Factors, split: torch.Tensor) -> None:
    """out [T, N] += b (a x) for the rows of x [T, K] from split[0] on."""
    between = x.new_empty(len(x), factors.a.shape[0])
    _launch(x, factors.a, between, split=split)
    _launch(between, factors.b, out, add=True, blocks=factors.blocks, split=split)


def _blocks(terms: list[LowRankTerm], ranks: list[int]) -> torch.Tensor:
    found = [
        (first, min(first + TERM_BLOCK, term.stop), start, rank)
        for term, rank, start in zip(terms, ranks, _starts(ranks), strict=True)
        for first in range(term.start, term.stop, TERM_BLOCK)
    ]
    return torch.tensor(found, dtype=torch.int32)


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _stack(parts: list[Factor]) -> Factor:
    """One below the other."""
    quantised = [part for part in parts if isinstance(part, Int8Matrix)]
    if quantised:
        values, scales = [part.values for part in quantised], [part.scale for part in quantised]
        return Int8Matrix(torch.cat(values), torch.cat(scales))
    return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])


def _padded(matrix: Factor, *, rank: int | None = None, width: int | None = None) -> Factor:
    """Filled up with zeros to `rank` rows and `width` columns."""
    rows, columns = matrix.shape
    more = (rank or rows) - rows
    missing = (0, (width or columns) - columns, 0, more)
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(F.pad(matrix.values, missing), F.pad(matrix.scale, (0, more)))
    return F.pad(matrix, missing)


def _part(matrix: Factor, rows: slice, columns: slice = slice(None)) -> Factor:
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(matrix.values[rows, columns], matrix.scale[rows])
    return matrix[rows, columns]
