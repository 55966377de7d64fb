"""Products with weights in codes, and rows of embeddings in codes: kernels for every form that `codes.py` has.

Codes pass from memory once and become numbers in registers. A code is not moved to the lowest bits of its word: the
input or the scale that it is multiplied with is made smaller instead, by a power of two. One row is multiplied in
float32 with the codes as they are, and a group's sum is scaled: weights are exactly the file's. For more rows tiles of
weights are scaled, rounded to the type of the activations and given to the tensor cores. Very many rows are the
library's.

T = rows, N = outputs, K = inputs, G = K / 32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from server.kernels.cuda.codes import CodeForm, CodeRun, DeviceCodes
from server.kernels.cuda.runtime import INTERPRETED

MOST_ROWS = 256  # of a product from codes: every tile of rows unpacks them again (an estimate, not measured)
WIDENED = 1 << 25  # weights that are plain at a time
MAX_SPLITS = 8
JOIN_COLUMNS = 1024


@triton.jit
def _read_bytes(low, high_ptr, at, mask, plane, HALF: tl.constexpr, BITS: tl.constexpr):
    """uint32 [n, g, 4]: in four bytes the codes of inputs 16 HALF + 4 b + q of each group; `low` is their plane there,
    `at` [n, g] where the others have them, `plane` the words of a plane."""
    codes = (low >> 4 * HALF) & 0x0F0F0F0F
    place = 2 * tl.arange(0, 4)[None, None, :]
    if BITS > 4:
        fifth = tl.load(high_ptr + at, mask=mask, other=0).to(tl.uint32, bitcast=True)
        codes = codes << 1 | (fifth[:, :, None] >> place + HALF) & 0x01010101
    if BITS > 5:
        sixth = tl.load(high_ptr + plane + at, mask=mask, other=0).to(tl.uint32, bitcast=True)
        codes = codes << 1 | (sixth[:, :, None] >> place + HALF) & 0x01010101
    if BITS > 6:
        last = tl.load(high_ptr + (2 + HALF) * plane + at, mask=mask, other=0).to(tl.uint32, bitcast=True)
        codes = codes << 2 | (last[:, :, None] >> place) & 0x03030303
    return codes


@triton.jit
def _read_scales(
    scale_ptr, minimum_ptr, block_scale_ptr, block_minimum_ptr, at, blocks, mask, HALF: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, CENTRE: tl.constexpr, HAS_MINIMUM: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, IS_NESTED: tl.constexpr,
):  # fmt: skip
    """float32 scale and offset [n, g]: weight = scale * code + offset."""
    at = at * (32 // GROUP)
    if GROUP == 16:
        at += HALF
    scale = tl.load(scale_ptr + at, mask=mask, other=0).to(tl.float32)
    if HAS_BLOCKS:
        scale *= tl.load(block_scale_ptr + blocks, mask=mask, other=0).to(tl.float32)
    if IS_NESTED:
        zero = tl.load(minimum_ptr + at, mask=mask, other=0).to(tl.float32)
        offset = scale * ((1 << (8 - BITS)) * 0.5 - zero)  # codes stand for the centres of their cells
        scale *= 1 << (8 - BITS)
    elif HAS_MINIMUM:
        offset = tl.load(minimum_ptr + at, mask=mask, other=0).to(tl.float32)
        if HAS_BLOCKS:
            offset *= tl.load(block_minimum_ptr + blocks, mask=mask, other=0).to(tl.float32)
    else:
        offset = scale * -CENTRE
    return scale, offset


@triton.jit(do_not_specialize=["num_rows"])
def coded_linear_kernel(
    x_ptr, low_ptr, high_ptr, scale_ptr, minimum_ptr, block_scale_ptr, block_minimum_ptr, bias_ptr, out_ptr,
    num_rows, num_outputs, width, x_stride, out_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, CENTRE: tl.constexpr, HAS_MINIMUM: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    IS_NESTED: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, ONE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr, OUTPUTS_LEFT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < num_outputs
    num_groups = width // 32
    quarter = tl.arange(0, 4)
    if ONE:
        partial = tl.zeros([BLOCK_N, GROUPS, 4], tl.float32)
    elif OUTPUTS_LEFT:
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    share = tl.cdiv(tl.cdiv(num_groups, GROUPS), tl.num_programs(2)) * GROUPS
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, num_groups)
    for first in tl.range(begin, end, GROUPS, num_stages=STAGES):
        groups = first + tl.arange(0, GROUPS)
        is_group = groups < end
        at = outputs[:, None].to(tl.int64) * num_groups + groups[None, :]
        blocks = outputs[:, None].to(tl.int64) * (width // 256) + groups[None, :] // 8
        mask = is_output[:, None] & is_group[None, :]
        words = at[:, :, None] * 4 + quarter[None, None, :]
        low = tl.load(low_ptr + words, mask=mask[:, :, None], other=0).to(tl.uint32, bitcast=True)
        inputs = groups[:, None] * 32 + quarter[None, :]
        if ONE:
            x_ptrs, x_mask = x_ptr + inputs, is_group[:, None]
        else:
            x_ptrs = x_ptr + rows[:, None, None].to(tl.int64) * x_stride + inputs[None, :, :]
            x_mask = is_row[:, None, None] & is_group[None, :, None]
        for half in tl.static_range(2):
            codes = _read_bytes(low, high_ptr, at, mask, num_outputs.to(tl.int64) * num_groups, half, BITS)
            if half == 0 or GROUP == 16:
                scale, offset = _read_scales(
                    scale_ptr, minimum_ptr, block_scale_ptr, block_minimum_ptr, at, blocks, mask, half,
                    BITS, GROUP, CENTRE, HAS_MINIMUM, HAS_BLOCKS, IS_NESTED,
                )  # fmt: skip
                if ONE:
                    products = tl.zeros([BLOCK_N, GROUPS, 4], tl.float32)
                    total = tl.zeros([GROUPS, 4], tl.float32)
            for byte in tl.static_range(4):
                code = (codes & (255 << 8 * byte)).to(tl.float32)  # times 256 ** byte
                x = tl.load(x_ptrs + 16 * half + 4 * byte, mask=x_mask, other=0.0)
                if ONE:
                    x = x.to(tl.float32)
                    products += (x * 256.0**-byte)[None, :, :] * code
                    total += x
                else:
                    weight = code * (scale * 256.0**-byte)[:, :, None] + offset[:, :, None]
                    weight = tl.reshape(weight.to(x.dtype), [BLOCK_N, GROUPS * 4])
                    x = tl.reshape(x, [BLOCK_M, GROUPS * 4])
                    if OUTPUTS_LEFT:
                        sums += tl.dot(weight, tl.trans(x), input_precision="ieee")
                    else:
                        sums += tl.dot(x, tl.trans(weight), input_precision="ieee")
            if ONE and (half == 1 or GROUP == 16):
                partial += products * scale[:, :, None] + total[None, :, :] * offset[:, :, None]
    if ONE:
        sums = tl.sum(tl.reshape(partial, [BLOCK_N, GROUPS * 4]), axis=1)[None, :]
    elif OUTPUTS_LEFT:
        sums = tl.trans(sums)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    mask = is_row[:, None] & is_output[None, :]
    first_row = tl.program_id(2) * num_rows  # of the sums of this share of the inputs
    target = out_ptr + (first_row + rows)[:, None].to(tl.int64) * out_stride + outputs[None, :]
    if ADD:
        sums += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def join_kernel(
    partial_ptr, bias_ptr, out_ptr, num_rows, num_outputs, out_stride,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [T, N] = or += the sum of partial [SPLITS, T, N], and bias."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < num_outputs
    sums = tl.zeros([COLUMNS], tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(partial_ptr + (split * num_rows + row) * num_outputs + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    target = out_ptr + row.to(tl.int64) * out_stride + columns
    if ADD:
        sums += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def coded_rows_kernel(
    ids_ptr, low_ptr, high_ptr, scale_ptr, minimum_ptr, block_scale_ptr, block_minimum_ptr, out_ptr,
    num_tokens, num_outputs, width,
    BITS: tl.constexpr, GROUP: tl.constexpr, CENTRE: tl.constexpr, HAS_MINIMUM: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    IS_NESTED: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    rows = tl.load(ids_ptr + tokens, mask=is_token, other=0).to(tl.int64)[:, None]
    num_groups = width // 32
    groups = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :]
    mask = is_token[:, None] & (groups < num_groups)
    at = rows * num_groups + groups
    quarter = tl.arange(0, 4)[None, None, :]
    low = tl.load(low_ptr + at[:, :, None] * 4 + quarter, mask=mask[:, :, None], other=0).to(tl.uint32, bitcast=True)
    target = out_ptr + tokens[:, None, None].to(tl.int64) * width + groups[:, :, None] * 32 + quarter
    for half in tl.static_range(2):
        codes = _read_bytes(low, high_ptr, at, mask, num_outputs.to(tl.int64) * num_groups, half, BITS)
        scale, offset = _read_scales(
            scale_ptr, minimum_ptr, block_scale_ptr, block_minimum_ptr, at, rows * (width // 256) + groups // 8, mask,
            half, BITS, GROUP, CENTRE, HAS_MINIMUM, HAS_BLOCKS, IS_NESTED,
        )  # fmt: skip
        for byte in tl.static_range(4):
            code = ((codes >> 8 * byte) & 255).to(tl.float32)
            weight = code * scale[:, :, None] + offset[:, :, None]
            tl.store(target + 16 * half + 4 * byte, weight.to(out_ptr.dtype.element_ty), mask=mask[:, :, None])


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows, outputs and groups of inputs of one turn of a program; they fit 99 KiB of shared memory, as GPUs with
    compute capability 8.6 and 8.9 have it.

    The eight products of a turn add to one sum. Triton takes them for chained ones, as attention has them: it gives all
    warps rows of the left operand, unless the right one has more columns, and every warp unpacks the other operand
    whole. So codes are to the right where there are more outputs than rows (a warp needs 16 rows or 8 columns, 32
    outputs give four warps work as columns only), and to the left in larger tiles. Two kinds of tensor cores differ.
    Capability 9.0 has wgmma from 64 rows, whose right operand all warps share; with codes to the left its loop is a
    tenth longer. Capabilities 10 and 11 have tensor memory from 64 rows, of which eight sums take too much.
    """

    rows: int
    outputs: int
    groups: int
    num_warps: int
    num_stages: int
    outputs_left: bool = False  # the product of a turn is W x^T

    @classmethod
    def of(cls, num_rows: int, item_bytes: int, major: int) -> Tiles:
        """`item_bytes`: of an activation; `major`: of the compute capability."""
        rows = max(triton.next_power_of_2(num_rows), 16)
        if INTERPRETED:
            return cls(1 if num_rows == 1 else min(rows, 128), 128, 8, 4, 1, rows > 16)
        if num_rows == 1:
            return cls(1, 32, 16, 4, 3)
        if rows == 16:
            return cls(16, 32, 8, 4, 4)
        rows, outputs_left = min(rows, 32 if major in (10, 11) else 128), major not in (9, 10, 11)
        if rows <= 64 or item_bytes > 2:
            return cls(min(rows, 64), 64, 4, 4, 4 if item_bytes <= 2 else 2, outputs_left)
        return cls(128, 128, 4, 8, 2, outputs_left)

    def splits(self, num_rows: int, num_outputs: int, width: int, num_processors: int) -> int:
        """Shares of the inputs, a power of two, so that a product of few rows and outputs fills the device."""
        programs = triton.cdiv(num_outputs, self.outputs)
        if num_rows > self.rows or self.rows > 64:
            return 1
        most = min(4 * num_processors // programs, triton.cdiv(width, 32 * self.groups) // 2, MAX_SPLITS)
        return 1 << max(most.bit_length() - 1, 0)


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the major number of the compute capability."""
    if device.type != "cuda":
        return 2, 8
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


def constants(form: CodeForm) -> dict[str, Any]:
    """What the kernels are compiled for, as they call it."""
    return {
        "BITS": form.bits, "GROUP": form.group, "CENTRE": form.centre, "HAS_MINIMUM": form.has_minimum,
        "HAS_BLOCKS": form.has_blocks, "IS_NESTED": form.is_nested,
    }  # fmt: skip


def _pointers(run: CodeRun) -> list[torch.Tensor]:
    """Planes and scales; what the form lacks is never read."""
    some = (run.high, run.scale, run.minimum, run.block_scale, run.block_minimum)
    return [run.low, *(run.low if tensor is None or not tensor.numel() else tensor for tensor in some)]


def coded_linear(
    x: torch.Tensor, weight: DeviceCodes, out: torch.Tensor, *, bias: torch.Tensor | None = None, add: bool = False
) -> None:
    """x [T, K] -> x W^T + b to `out` [T, N], or added to it. Columns of x and of `out` are contiguous."""
    assert x.stride(1) == out.stride(1) == 1
    multiply, start = _multiply if len(x) <= MOST_ROWS else _multiply_widened, 0
    for run in weight.parts if len(x) else ():
        part = slice(start, start := start + run.shape[0])
        multiply(x, run, out[:, part], None if bias is None else bias[part], add)


def _multiply(x: torch.Tensor, run: CodeRun, out: torch.Tensor, bias: torch.Tensor | None, add: bool) -> None:
    (num_rows, width), num_outputs = x.shape, out.shape[1]
    num_processors, major = _device(x.device)
    tiles = Tiles.of(num_rows, x.element_size(), major)
    splits = tiles.splits(num_rows, num_outputs, width, num_processors)
    sums = out if splits == 1 else x.new_empty(splits * num_rows, num_outputs, dtype=torch.float32)
    ends = {"HAS_BIAS": bias is not None, "ADD": add}
    bias = x if bias is None else bias
    grid = triton.cdiv(num_outputs, tiles.outputs), triton.cdiv(num_rows, tiles.rows), splits
    coded_linear_kernel[grid](
        x, *_pointers(run), bias, sums, num_rows, num_outputs, width, x.stride(0), sums.stride(0),
        **constants(run.form), **(ends if splits == 1 else dict.fromkeys(ends, False)), ONE=tiles.rows == 1,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, GROUPS=tiles.groups, STAGES=tiles.num_stages,
        OUTPUTS_LEFT=tiles.outputs_left, num_warps=tiles.num_warps,
    )  # fmt: skip
    if splits > 1:
        join_kernel[(triton.cdiv(num_outputs, JOIN_COLUMNS), num_rows)](
            sums, bias, out, num_rows, num_outputs, out.stride(0), **ends, SPLITS=splits, COLUMNS=JOIN_COLUMNS
        )


def _multiply_widened(x: torch.Tensor, run: CodeRun, out: torch.Tensor, bias: torch.Tensor | None, add: bool) -> None:
    """For many rows, which would unpack the codes again and again: the library's products with plain parts of them."""
    for ids in torch.arange(len(run.low), dtype=torch.int32, device=x.device).split(WIDENED // x.shape[1]):
        plain = x.new_empty(len(ids), x.shape[1])
        _read_rows(ids, run, plain)
        part, out = out[:, : len(ids)], out[:, len(ids) :]
        if add:
            part.addmm_(x, plain.t())
        else:
            torch.mm(x, plain.t(), out=part)
        if bias is not None:
            part += bias[: len(ids)]
            bias = bias[len(ids) :]


def coded_rows(ids: torch.Tensor, matrix: DeviceCodes, out: torch.Tensor) -> None:
    """Rows `ids` [T] of a matrix in one form to `out` [T, K], contiguous."""
    (run,) = matrix.parts
    _read_rows(ids, run, out)


def _read_rows(ids: torch.Tensor, run: CodeRun, out: torch.Tensor) -> None:
    num_outputs, width = run.shape
    assert out.is_contiguous()
    tokens, groups = (64, 32) if INTERPRETED else (1, 32)
    grid = triton.cdiv(len(ids), tokens), triton.cdiv(width // 32, groups)
    coded_rows_kernel[grid](
        ids, *_pointers(run), out, len(ids), num_outputs, width, **constants(run.form), TOKENS=tokens, GROUPS=groups
    )
