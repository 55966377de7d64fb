"""Matrices in the codes of a GGUF file: its blocks as they are, from import to kernel.

A row is a run of blocks. Every type here is codes in groups of 16 or 32 inputs with a scale each, and for some a
minimum: weight = scale * code + minimum, exactly what the `gguf` package's `dequantize` gives (layouts: llama.cpp's
ggml-common.h).

N = output channels, K = inputs, G = groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CODES_FILE = "codes.safetensors"  # of a checkpoint folder: blocks by tensor, their types in the metadata
ACTIVATION_BLOCK = 32  # inputs that share a scale when activations are rounded to 8 bits


@dataclass(frozen=True, slots=True)
class Groups:
    """codes int8 [N, G, group], scale float32 [N, G], minimum float32 [N, G] or None."""

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """float32 [N, K]."""
        values = self.codes * self.scale[..., None]
        if self.minimum is not None:
            values = values + self.minimum[..., None]
        return values.flatten(1)


def _half(data: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block [N, blocks, bytes] -> float32 [N, blocks]."""
    return data[..., at : at + 2].contiguous().view(torch.float16)[..., 0].float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes -> [..., 2n]: all low halves, then all high ones."""
    return torch.cat((data & 15, data >> 4), dim=-1)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """32 bits in 4 bytes -> [..., 32] of 0 or 16."""
    return ((data[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2) << 4


def _q4_0(b: torch.Tensor) -> Groups:
    return Groups(_nibbles(b[..., 2:]).to(torch.int8) - 8, _half(b, 0))


def _q4_1(b: torch.Tensor) -> Groups:
    return Groups(_nibbles(b[..., 4:]).to(torch.int8), _half(b, 0), _half(b, 2))


def _q5_0(b: torch.Tensor) -> Groups:
    return Groups((_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])).to(torch.int8) - 16, _half(b, 0))


def _q5_1(b: torch.Tensor) -> Groups:
    return Groups((_nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])).to(torch.int8), _half(b, 0), _half(b, 2))


def _q8_0(b: torch.Tensor) -> Groups:
    return Groups(b[..., 2:].contiguous().view(torch.int8), _half(b, 0))


def _k_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight 6-bit scales and minima in 12 bytes, of Q4_K and Q5_K, times those of the block -> float32 [N, 8 blocks]"""
    low, middle, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), dim=-1)
    minimum = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), dim=-1)
    return ((_half(b, 0)[..., None] * scale).flatten(1), -(_half(b, 2)[..., None] * minimum).flatten(1))


def _q4_k(b: torch.Tensor) -> Groups:
    codes = _nibbles(b[..., 16:].unflatten(-1, (4, 32)))
    return Groups(codes.reshape(len(b), -1, 32).to(torch.int8), *_k_scales(b))


def _q5_k(b: torch.Tensor) -> Groups:
    codes = _nibbles(b[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)  # [..., 8, 32]
    bits = (b[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    return Groups((codes | bits << 4).reshape(len(b), -1, 32).to(torch.int8), *_k_scales(b))


def _q6_k(b: torch.Tensor) -> Groups:
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64))).flatten(-2)  # 256 codes in order
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = ((b[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts) & 3).flatten(-3)
    scale = _half(b, 208)[..., None] * b[..., 192:208].contiguous().view(torch.int8)
    return Groups(((low | high << 4).to(torch.int8) - 32).reshape(len(b), -1, 16), scale.flatten(1))


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of GGUF: inputs and bytes of a block, and what the blocks [N, blocks, bytes] of a matrix mean."""

    name: str
    inputs: int
    num_bytes: int
    groups: Callable[[torch.Tensor], Groups]


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
    """Rows of one type: blocks uint8 [N, bytes of a row]."""

    blocks: torch.Tensor
    type: BlockType

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.blocks), self.blocks.shape[1] // self.type.num_bytes * self.type.inputs))

    def groups(self) -> Groups:
        return self.type.groups(self.blocks.unflatten(1, (-1, self.type.num_bytes)))


@dataclass(slots=True, eq=False)
class CodedMatrix:
    """[N, K] in codes: runs of rows, each of a type of its own (a fused matrix has those of the file's tensors)."""

    parts: tuple[CodedRows, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(len(part.blocks) for part in self.parts), self.parts[0].shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].blocks.dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].blocks.device

    @property
    def nbytes(self) -> int:
        return sum(part.blocks.nbytes for part in self.parts)

    @property
    def kind(self) -> str:
        """Its types, as logs and tables say it: "Q4_K", "Q4_K + Q6_K"."""
        return " + ".join(dict.fromkeys(part.type.name for part in self.parts))

    def tensors(self) -> Iterator[torch.Tensor]:
        return (part.blocks for part in self.parts)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain matrix; in float32 exactly the file's values."""
        return torch.cat([part.groups().dense() for part in self.parts]).to(dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` [T] as float32 [T, K]."""
        if len(self.parts) == 1:
            part = self.parts[0]
            return CodedRows(part.blocks[ids], part.type).groups().dense()
        return self.dense(torch.float32)[ids]

    def to(self, device: torch.device | str) -> CodedMatrix:
        return CodedMatrix(tuple(CodedRows(part.blocks.to(device), part.type) for part in self.parts))


def stacked(matrices: list[CodedMatrix]) -> CodedMatrix:
    """One below the other; neighbours of one type become one run."""
    runs: list[list[CodedRows]] = []
    for part in (part for matrix in matrices for part in matrix.parts):
        if runs and runs[-1][0].type is part.type:
            runs[-1].append(part)
        else:
            runs.append([part])
    return CodedMatrix(tuple(CodedRows(torch.cat([p.blocks for p in run]), run[0].type) for run in runs))


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """[T, K] -> float32: each block of 32 inputs of a row in 255 steps of its largest magnitude / 127, as the integer
    kernels take them. Blocks of zeros stay zeros."""
    padded = F.pad(x.float(), (0, -x.shape[-1] % ACTIVATION_BLOCK))
    blocks = padded.unflatten(-1, (-1, ACTIVATION_BLOCK))
    most = blocks.abs().amax(dim=-1, keepdim=True)
    steps = (blocks * torch.where(most > 0, 127.0 / most, 0.0)).round()
    return (steps * (most / 127.0)).flatten(-2)[..., : x.shape[-1]]


def q8_0(matrix: torch.Tensor) -> CodedMatrix:
    """The nearest Q8_0 matrix to [N, K] of floats, K a multiple of 32: ggml's rounding, the scale rounded first."""
    groups = matrix.float().unflatten(1, (-1, 32))
    scale = (groups.abs().amax(dim=-1) / 127.0).to(torch.float16)
    wide = scale.float()[..., None]
    codes = torch.where(wide > 0, groups / wide, 0.0).round().clamp(-127, 127).to(torch.int8)
    blocks = torch.cat((scale[..., None].view(torch.uint8), codes.view(torch.uint8)), dim=-1)
    return CodedMatrix((CodedRows(blocks.flatten(1), BLOCK_TYPES["Q8_0"]),))
