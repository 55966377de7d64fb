"""Matrices in codes of few bits, as the kernels of `coded_linear.py` read them: made once at load, on the device.

Two sources: the blocks of a GGUF file (`model_store/quantized.py`), and nested codes (`model_store/nested.py`). In both
a weight is scale * code + offset by groups of inputs. The bits of codes lie in planes, so that a reader of few bits
leaves the other planes in memory. Of 32 inputs in a row, input 16 h + 4 b + q has

- its upper four bits in word q of the plane `low`, byte b, nibble h;
- its fifth bit in bit 8 b + 2 q + h of a word, its sixth bit in another one;
- its last two in bits 8 b + 2 q of word h of two.

One shift and one mask bring the codes of four inputs into the bytes of a word.

N = output channels, K = inputs, G = K / 32, S = groups with a scale of their own, of 16 or 32 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from model_store.arrays import to_torch
from model_store.int8 import Matrix
from model_store.nested import WIDTHS, NestedMatrix
from model_store.quantized import CodedMatrix, CodedRows

_AT_ONCE = 1 << 26  # codes that are unpacked together


@dataclass(frozen=True, slots=True)
class CodeForm:
    """What a kernel is compiled for."""

    bits: int  # of a code, unsigned
    group: int = 32  # inputs that share a scale
    centre: int = 0  # the code that stands for zero, where groups have no minimum
    has_minimum: bool = False
    has_blocks: bool = False  # scales and minima are small integers times those of a block of 256 inputs
    is_nested: bool = False  # what is kept of a group beside its scale is the place of zero, in cells of eight bits


@dataclass(frozen=True, slots=True, eq=False)
class CodeRun:
    """Rows [N, K] of one form."""

    form: CodeForm
    low: torch.Tensor  # int32 [N, G, 4]
    high: torch.Tensor  # int32 [planes, N, G]: fifth bit, sixth bit, last two of half 0 and of half 1
    scale: torch.Tensor  # float16, int8 or uint8 [N, S]
    minimum: torch.Tensor | None = None  # like `scale`; uint8 [N, S], the place of zero, if nested
    block_scale: torch.Tensor | None = None  # float16 [N, K / 256]
    block_minimum: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.low), 32 * self.low.shape[1]

    def tensors(self) -> Iterator[torch.Tensor]:
        parts = (self.low, self.high, self.scale, self.minimum, self.block_scale, self.block_minimum)
        return (part for part in parts if part is not None)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceCodes:
    """A matrix [N, K]: runs of rows, each of a form of its own."""

    parts: tuple[CodeRun, ...]

    @classmethod
    def of(cls, matrix: CodedMatrix, device: torch.device) -> DeviceCodes:
        return cls(tuple(_packed(part, device) for part in matrix.parts))

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        for part in self.parts:
            yield from part.tensors()


@dataclass(frozen=True, slots=True, eq=False)
class DeviceNested:
    """Nested codes [N, K]: one copy, read at any of WIDTHS."""

    low: torch.Tensor
    high: torch.Tensor
    zero: torch.Tensor  # uint8 [N, S]
    scales: torch.Tensor  # float16 [widths, N, S]
    width: int  # that is read where no other is asked for

    @classmethod
    def of(cls, matrix: NestedMatrix, device: torch.device) -> DeviceNested:
        codes, zero, scales = (to_torch(tensor, device) for tensor in matrix.tensors())
        parts = [planes(some, 8) for some in codes.split(_rows_at_once(codes.shape[1]))]
        return cls(*_joined(parts), zero, scales, matrix.width)

    def at(self, width: int) -> DeviceCodes:
        """What a row of this width reads."""
        width = width if width in WIDTHS else self.width
        scale = self.scales[WIDTHS.index(width)]
        return DeviceCodes((CodeRun(CodeForm(width, is_nested=True), self.low, self.high, scale, self.zero),))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.low), 32 * self.low.shape[1]

    @property
    def nbytes(self) -> int:
        """Of all widths together."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        return iter((self.low, self.high, self.zero, self.scales))


@dataclass(frozen=True, slots=True, eq=False)
class DeviceDual:
    """A matrix [N, K] in two forms, as `model_store/dual.py` has them."""

    exact: torch.Tensor | DeviceCodes
    nested: DeviceNested

    def at(self, width: int) -> torch.Tensor | DeviceCodes:
        """What a row of this width reads."""
        return self.nested.at(width) if width in WIDTHS else self.exact

    @property
    def shape(self) -> tuple[int, int]:
        return self.nested.shape

    @property
    def nbytes(self) -> int:
        return self.exact.nbytes + self.nested.nbytes

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.exact.tensors() if isinstance(self.exact, DeviceCodes) else (self.exact,)
        yield from self.nested.tensors()


Weight = Matrix | DeviceCodes | DeviceNested | DeviceDual


@dataclass(frozen=True, slots=True)
class _Fields:
    """Of rows of blocks [N, blocks, bytes]: codes uint8 [N, ...] in the order of inputs, and what `CodeRun` has."""

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None
    block_scale: torch.Tensor | None = None
    block_minimum: torch.Tensor | None = None


def _half(b: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block -> [N, blocks]."""
    return b[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(b: torch.Tensor, run: int) -> torch.Tensor:
    """Of every `run` bytes all low halves, then all high ones -> [..., runs, 2, run]."""
    b = b.unflatten(-1, (-1, run))
    return torch.stack((b & 15, b >> 4), dim=-2)


def _bits(b: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes as fields of `width` bits, the lowest first -> [..., 8 / width]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=b.device)
    return (b[..., None] >> shifts) & ((1 << width) - 1)


def _fifth(b: torch.Tensor) -> torch.Tensor:
    """32 bits in four bytes, those of Q5_0 and Q5_1, as the codes' fifth -> [..., 1, 2, 16]."""
    return _bits(b, 1).flatten(-2).unflatten(-1, (1, 2, 16)) << 4


def _k_fields(b: torch.Tensor, codes: torch.Tensor) -> _Fields:
    """Q4_K and Q5_K: eight scales and minima of six bits in 12 bytes."""
    low, middle, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), dim=-1)
    minimum = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), dim=-1)
    return _Fields(codes, scale, minimum, _half(b, 0), -_half(b, 2))


def _q5_k(b: torch.Tensor) -> _Fields:
    fifth = _bits(b[..., 16:48], 1).transpose(-2, -1)  # byte i has one bit for input i of each group
    return _k_fields(b, _nibbles(b[..., 48:], 32).flatten(-3, -2) | fifth << 4)


def _q6_k(b: torch.Tensor) -> _Fields:
    upper = _bits(b[..., 128:192].unflatten(-1, (2, 32)), 2).transpose(-2, -1)  # [..., 2, 4, 32]
    codes = _nibbles(b[..., :128], 64).reshape(upper.shape) | upper << 4
    return _Fields(codes, b[..., 192:208].view(torch.int8), block_scale=_half(b, 208))


_Unpack = Callable[[torch.Tensor], _Fields]
FORMS: dict[str, tuple[CodeForm, _Unpack]] = {
    "Q4_0": (CodeForm(4, centre=8), lambda b: _Fields(_nibbles(b[..., 2:], 16), _half(b, 0))),
    "Q4_1": (CodeForm(4, has_minimum=True), lambda b: _Fields(_nibbles(b[..., 4:], 16), _half(b, 0), _half(b, 2))),
    "Q5_0": (
        CodeForm(5, centre=16), lambda b: _Fields(_nibbles(b[..., 6:], 16) | _fifth(b[..., 2:6]), _half(b, 0)),
    ),
    "Q5_1": (
        CodeForm(5, has_minimum=True),
        lambda b: _Fields(_nibbles(b[..., 8:], 16) | _fifth(b[..., 4:8]), _half(b, 0), _half(b, 2)),
    ),
    "Q8_0": (CodeForm(8, centre=128), lambda b: _Fields(b[..., 2:] ^ 128, _half(b, 0))),
    "Q4_K": (CodeForm(4, has_minimum=True, has_blocks=True), lambda b: _k_fields(b, _nibbles(b[..., 16:], 32))),
    "Q5_K": (CodeForm(5, has_minimum=True, has_blocks=True), _q5_k),
    "Q6_K": (CodeForm(6, group=16, centre=32, has_blocks=True), _q6_k),
}  # fmt: skip


def _packed(rows: CodedRows, device: torch.device) -> CodeRun:
    form, unpack = FORMS[rows.type.name]
    blocks = to_torch(rows.blocks, device).unflatten(1, (-1, rows.type.num_bytes))
    parts, found = [], []
    for some in blocks.split(_rows_at_once(rows.shape[1])):
        fields = unpack(some)
        parts.append(planes(fields.codes.flatten(1), form.bits))
        found.append((fields.scale, fields.minimum, fields.block_scale, fields.block_minimum))
    scale, *others = zip(*found, strict=True)
    more = [None if other[0] is None else torch.cat(other).flatten(1) for other in others]
    return CodeRun(form, *_joined(parts), torch.cat(scale).flatten(1), *more)


def _rows_at_once(width: int) -> int:
    return max(_AT_ONCE // width, 1)


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = zip(*parts, strict=True)
    return torch.cat(low), torch.cat(high, dim=1)


def planes(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`low` int32 [N, G, 4] and `high` int32 [planes, N, G] of codes uint8 [N, K]."""
    codes = codes.unflatten(1, (-1, 2, 4, 4))  # [N, G, h, b, q]
    nibbles = codes >> bits - 4
    low = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).transpose(2, 3).contiguous().view(torch.int32).squeeze(-1)
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)  # of q
    high = []
    for place in range(bits - 5, max(bits - 7, -1), -1):
        bit = (codes >> place & 1) << places
        high.append(_word(bit[:, :, 0] | bit[:, :, 1] << 1))
    if bits == 8:
        high += [_word((codes[:, :, half] & 3) << places) for half in range(2)]
    return low, torch.stack(high) if high else low.new_empty(0, *low.shape[:2])


def _word(fields: torch.Tensor) -> torch.Tensor:
    """uint8 [N, G, b, q] without bits in common -> int32 [N, G], byte b the sum over q."""
    return fields.sum(dim=-1, dtype=torch.uint8).view(torch.int32).squeeze(-1)
