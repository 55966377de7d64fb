"""What a caller means by a size: `auto`, `"24L"`, `24`, `"75%"`, `0.75`, `"110M"`, `student`, `teacher`; and by a
precision: `exact`, `"q6"`. Any size may name one: `"24L-q6"`, and `"24L-exact"`, which is written `"24L"`.

Parsed once, at the edge. Layers name exactly one size; a share or a parameter count names the largest size that does
not exceed it. A precision is a width of weights (`server.core.width`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from server.core.width import EXACT, precision_name

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(L|%|K|M|B)?", re.IGNORECASE)
_SCALE = {"K": 1e3, "M": 1e6, "B": 1e9}
_PRECISION = re.compile(r"exact|q([1-9])", re.IGNORECASE)


class SizeError(ValueError):
    """The text is no size, or no such size is served; the message says which ones are."""


@dataclass(frozen=True, slots=True)
class SizeSpec:
    """A parsed size. `kind`: auto | student | teacher | layers | fraction | parameters; `value` for the last three.

    `width`: the precision in bits, None if none is named.
    """

    kind: str
    value: float = 0.0
    width: int | None = None

    @property
    def is_auto(self) -> bool:
        return self.kind == "auto"

    @classmethod
    def parse(cls, value: str | int | float) -> SizeSpec:
        """Raises SizeError for anything that is not a size. Whole numbers are layers, numbers in (0, 1) shares."""
        if isinstance(value, bool):
            raise SizeError(f"{value!r} is not a size")
        if isinstance(value, int):
            return cls._layers(value)
        if isinstance(value, float):
            return cls._fraction(value, value)
        if not isinstance(value, str):
            raise SizeError(f"a size is text or a number, not {type(value).__name__}")
        text = value.strip()
        depth, separator, precision = text.rpartition("-")
        if separator and len(text) <= 24 and (match := _PRECISION.fullmatch(precision)):
            found = cls.parse(depth)
            if found.width is not None:
                raise SizeError(f"{text!r} names two precisions")
            return replace(found, width=_width(match))
        if text.lower() in ("auto", "student", "teacher"):
            return cls(text.lower())
        match = _NUMBER.fullmatch(text) if len(text) <= 24 else None
        if match is None:
            shown = text if len(text) <= 24 else text[:24] + "..."
            raise SizeError(
                f"{shown!r} is not a size: use auto, student, teacher, layers (24L), a share (75%) or parameters (110M)"
                ", and -q6 or the like after it for a precision (24L-q6)"
            )
        number, unit = float(match[1]), (match[2] or "").upper()
        if unit == "L" or (not unit and "." not in match[1]):
            if not number.is_integer():
                raise SizeError(f"{text!r}: layers come whole")
            return cls._layers(int(number))
        if unit == "%":
            return cls._fraction(number / 100, text)
        if not unit:
            return cls._fraction(number, text)
        return cls("parameters", number * _SCALE[unit])

    @classmethod
    def _layers(cls, layers: int) -> SizeSpec:
        if not 0 < layers < 10**6:
            raise SizeError(f"{layers if abs(layers) < 10**9 else 'this'} is not a number of layers")
        return cls("layers", float(layers))

    @classmethod
    def _fraction(cls, fraction: float, shown: object) -> SizeSpec:
        if not math.isfinite(fraction) or not 0 < fraction <= 1:
            raise SizeError(f"{shown} is not a share of the full size: it must be above 0 and at most 1 (100%)")
        return cls("fraction", fraction)

    def resolve(self, sizes: Sequence[int], parameters: Mapping[int, float]) -> int:
        """The size (a layer count) meant, out of all sizes of the pair, loaded or not.

        `sizes` ascending; `parameters` by size. A share is of the teacher's parameters. Not for `auto`. Raises
        SizeError.
        """
        assert self.kind != "auto"
        if self.kind == "student":
            return sizes[0]
        if self.kind == "teacher":
            return sizes[-1]
        if self.kind == "layers":
            layers = int(self.value)
            if layers not in sizes:
                raise SizeError(f"there is no size {layers}L; sizes are {describe_sizes(sizes)}")
            return layers
        limit = self.value * (parameters[sizes[-1]] if self.kind == "fraction" else 1)
        # The slack keeps products like 0.7 * 30 = 21.000000000000004 and their mirror images on the right side.
        fits = [size for size in sizes if parameters[size] <= limit * (1 + 1e-12)]
        asked = str(self) if self.kind == "fraction" else f"{self} parameters"
        if not fits:
            share = parameters[sizes[0]] / parameters[sizes[-1]]
            smallest = f"{sizes[0]}L, has {format_count(parameters[sizes[0]])} parameters ({share:.1%})"
            raise SizeError(f"no size is as small as {asked}; the smallest, {smallest}")
        return fits[-1]

    def __str__(self) -> str:
        if self.width is not None:
            return f"{replace(self, width=None)}-{precision_name(self.width)}"
        if self.kind == "layers":
            return f"{int(self.value)}L"
        if self.kind == "fraction":
            return f"{self.value * 100:.4g}%"
        if self.kind == "parameters":
            return format_count(self.value)
        return self.kind


AUTO = SizeSpec("auto")


def parse_precision(value: object) -> int | None:
    """A width in bits of `exact` or `q8`, `q6`, ...; None for `auto`. SizeError for anything else."""
    if not isinstance(value, str):
        raise SizeError(f"a precision is text (exact, q8, q6, ...), not {type(value).__name__}")
    text = value.strip()
    if text.lower() == "auto":
        return None
    match = _PRECISION.fullmatch(text)
    if match is None:
        shown = text if len(text) <= 24 else text[:24] + "..."
        raise SizeError(f"{shown!r} is not a precision: use auto, exact, or the bits of a weight as q8, q6, ...")
    return _width(match)


def _width(match: re.Match[str]) -> int:
    return int(match[1]) if match[1] else EXACT


def size_name(layers: int, width: int = EXACT) -> str:
    """`24L` as the weights were loaded, `24L-q6` at 6 bits: valid in URLs, file names and labels."""
    return f"{layers}L" if width == EXACT else f"{layers}L-{precision_name(width)}"


def describe_widths(widths: Sequence[int]) -> str:
    """`exact, q8, q6` of ascending widths."""
    return ", ".join(map(precision_name, reversed(widths)))


def describe_sizes(sizes: Sequence[int]) -> str:
    """`16L .. 30L` for consecutive sizes, a list otherwise."""
    if len(sizes) > 3 and list(sizes) == list(range(sizes[0], sizes[-1] + 1)):
        return f"{sizes[0]}L .. {sizes[-1]}L"
    return ", ".join(f"{size}L" for size in sizes)


def format_count(number: float) -> str:
    """134515008 -> 134.5M."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:.0f}"
