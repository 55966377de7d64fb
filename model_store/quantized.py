"""Matrices in the codes of a GGUF file: its blocks as they are, from import to kernel.

A row is a run of blocks. Every type here is codes in groups of 16 or 32 inputs with a scale each, and for some a
minimum: weight = scale * code + minimum, exactly what the `gguf` package's `dequantize` gives (layouts: llama.cpp's
ggml-common.h).

N = output channels, K = inputs, G = groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from model_store.arrays import FLOAT32, Array

CODES_FILE = "codes.safetensors"  # of a checkpoint folder: blocks by tensor, their types in the metadata
ACTIVATION_BLOCK = 32  # inputs that share a scale when activations are rounded to 8 bits


@dataclass(frozen=True, slots=True)
class Groups:
    """codes int8 [N, G, group], scale float32 [N, G], minimum float32 [N, G] or None."""

    codes: Array
    scale: Array
    minimum: Array | None = None

    def dense(self) -> Array:
        """float32 [N, K]."""
        values = self.codes * self.scale[..., None]
        if self.minimum is not None:
            values = values + self.minimum[..., None]
        return values.reshape(len(values), -1)


def _half(data: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block [N, blocks, bytes] -> float32 [N, blocks]."""
    return np.ascontiguousarray(data[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., 2n]: all low halves, then all high ones."""
    return np.concatenate((data & 15, data >> 4), axis=-1)


def _fifth_bits(data: np.ndarray) -> np.ndarray:
    """32 bits in 4 bytes -> [..., 32] of 0 or 16."""
    return _joined((data[..., None] >> np.arange(8, dtype=np.uint8)) & 1) << 4


def _joined(values: np.ndarray) -> np.ndarray:
    """The last two dimensions as one."""
    return values.reshape(*values.shape[:-2], -1)


def _split(values: np.ndarray, *shape: int) -> np.ndarray:
    """The last dimension as several."""
    return values.reshape(*values.shape[:-1], *shape)


def _q4_0(b: np.ndarray) -> Groups:
    return Groups(_nibbles(b[..., 2:]).astype(np.int8) - 8, _half(b, 0))


def _q4_1(b: np.ndarray) -> Groups:
    return Groups(_nibbles(b[..., 4:]).astype(np.int8), _half(b, 0), _half(b, 2))


def _q5_0(b: np.ndarray) -> Groups:
    return Groups((_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])).astype(np.int8) - 16, _half(b, 0))


def _q5_1(b: np.ndarray) -> Groups:
    return Groups((_nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])).astype(np.int8), _half(b, 0), _half(b, 2))


def _q8_0(b: np.ndarray) -> Groups:
    return Groups(b[..., 2:].view(np.int8), _half(b, 0))


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and minima in 12 bytes, of Q4_K and Q5_K, times those of the block -> float32 [N, 8 blocks]"""
    low, middle, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), axis=-1)
    minimum = np.concatenate((middle & 63, (high >> 4) | (middle >> 6 << 4)), axis=-1)
    return _rows(_half(b, 0)[..., None] * scale), -_rows(_half(b, 2)[..., None] * minimum)


def _rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _q4_k(b: np.ndarray) -> Groups:
    codes = _nibbles(_split(b[..., 16:], 4, 32))
    return Groups(codes.reshape(len(b), -1, 32).astype(np.int8), *_k_scales(b))


def _q5_k(b: np.ndarray) -> Groups:
    codes = _nibbles(_split(b[..., 48:], 4, 32)).reshape(*b.shape[:-1], 8, 32)
    bits = (b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return Groups((codes | bits << 4).reshape(len(b), -1, 32).astype(np.int8), *_k_scales(b))


def _q6_k(b: np.ndarray) -> Groups:
    low = _joined(_nibbles(_split(b[..., :128], 2, 64)))  # 256 codes in order
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (_split(b[..., 128:192], 2, 1, 32) >> shifts) & 3
    high = high.reshape(low.shape)
    scale = _half(b, 208)[..., None] * b[..., 192:208].view(np.int8)
    return Groups(((low | high << 4).astype(np.int8) - 32).reshape(len(b), -1, 16), _rows(scale))


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of GGUF: inputs and bytes of a block, and what the blocks [N, blocks, bytes] of a matrix mean."""

    name: str
    inputs: int
    num_bytes: int
    groups: Callable[[np.ndarray], Groups]


BLOCK_TYPES = {
    t.name: t
    for t in (
        BlockType("Q4_0", 32, 18, _q4_0), BlockType("Q4_1", 32, 20, _q4_1), BlockType("Q5_0", 32, 22, _q5_0),
        BlockType("Q5_1", 32, 24, _q5_1), BlockType("Q8_0", 32, 34, _q8_0), BlockType("Q4_K", 256, 144, _q4_k),
        BlockType("Q5_K", 256, 176, _q5_k), BlockType("Q6_K", 256, 210, _q6_k),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class CodedRows:
    """Rows of one type: blocks uint8 [N, bytes of a row], in an array or, on a device, in a tensor."""

    blocks: Array
    type: BlockType

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.blocks), self.blocks.shape[1] // self.type.num_bytes * self.type.inputs

    def groups(self) -> Groups:
        return self.type.groups(_split(self.blocks, -1, self.type.num_bytes))


@dataclass(slots=True, eq=False)
class CodedMatrix:
    """[N, K] in codes: runs of rows, each of a type of its own (a fused matrix has those of the file's tensors)."""

    parts: tuple[CodedRows, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(part.blocks) for part in self.parts), self.parts[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].blocks.dtype

    @property
    def nbytes(self) -> int:
        return sum(part.blocks.nbytes for part in self.parts)

    @property
    def kind(self) -> str:
        """Its types, as logs and tables say it: "Q4_K", "Q4_K + Q6_K"."""
        return " + ".join(dict.fromkeys(part.type.name for part in self.parts))

    def tensors(self) -> Iterator[np.ndarray]:
        return (part.blocks for part in self.parts)

    def dense(self, dtype: np.dtype) -> np.ndarray:
        """The plain matrix; in float32 exactly the file's values."""
        return np.concatenate([part.groups().dense() for part in self.parts]).astype(dtype, copy=False)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows `ids` [T] as float32 [T, K]."""
        if len(self.parts) == 1:
            part = self.parts[0]
            return CodedRows(part.blocks[ids], part.type).groups().dense()
        return self.dense(FLOAT32)[ids]


def stacked(matrices: list[CodedMatrix]) -> CodedMatrix:
    """One below the other; neighbours of one type become one run."""
    runs: list[list[CodedRows]] = []
    for part in (part for matrix in matrices for part in matrix.parts):
        if runs and runs[-1][0].type is part.type:
            runs[-1].append(part)
        else:
            runs.append([part])
    return CodedMatrix(tuple(CodedRows(np.concatenate([p.blocks for p in run]), run[0].type) for run in runs))


def q5_1(matrix: np.ndarray) -> CodedMatrix:
    """A Q5_1 matrix near [N, K] of floats, K a multiple of 32; scales and minima are fitted (`_fit_rows`)."""
    groups = matrix.reshape(len(matrix), -1, 32)
    parts = [
        _fit_rows(groups[start : start + _ROWS_AT_ONCE].astype(np.float32, copy=False))
        for start in range(0, len(groups), _ROWS_AT_ONCE)
    ]
    codes, scale, minimum = map(np.concatenate, zip(*parts, strict=True))
    fifth = np.packbits(codes >> 4, axis=-1, bitorder="little")
    low = codes & 15
    nibbles = low[..., :16] | low[..., 16:] << 4
    blocks = np.concatenate([part.view(np.uint8) for part in (scale, minimum, fifth, nibbles)], axis=-1)
    return CodedMatrix((CodedRows(blocks.reshape(len(blocks), -1), BLOCK_TYPES["Q5_1"]),))


_MOST = 31  # a code of five bits
_FITS = 4  # the error falls by less than a hundredth afterwards
_ROWS_AT_ONCE = 64  # of which several copies stay in a cache


def _fit_rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of w [n, G, 32]: codes uint8 from 0 to 31, scale and minimum float16 [n, G, 1], with a small |w - scale c - m|^2.

    Codes for the extremes of a group come first; then by turns the best scale and minimum for the codes (a straight
    line by least squares), and the nearest codes for these.
    """
    low, mean = w.min(axis=-1, keepdims=True), w.mean(axis=-1, keepdims=True)
    scale, minimum = (
        ((w.max(axis=-1, keepdims=True) - low) / np.float32(_MOST)).astype(np.float16),
        low.astype(np.float16),
    )
    best = np.zeros(w.shape, np.uint8), np.zeros_like(scale), np.zeros_like(minimum)
    least = np.full(low.shape, np.inf, np.float32)
    for _ in range(_FITS):
        step, start = scale.astype(np.float32), minimum.astype(np.float32)
        codes = np.rint((w - start) / np.where(step == 0, np.float32(1), step)).clip(0, _MOST)
        error = np.square(w - codes * step - start).sum(axis=-1, keepdims=True)
        for kept, found in zip(best, (codes, scale, minimum), strict=True):
            np.copyto(kept, found, "unsafe", where=error < least)
        least = np.minimum(least, error)
        centre = codes.mean(axis=-1, keepdims=True)
        codes -= centre
        spread = np.square(codes).sum(axis=-1, keepdims=True)
        slope = (codes * w).sum(axis=-1, keepdims=True) / np.maximum(spread, np.float32(1e-30))
        scale = np.where(spread > 0, slope, step).astype(np.float16)
        minimum = (mean - scale.astype(np.float32) * centre).astype(np.float16)
    return best
