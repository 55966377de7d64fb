"""Widths: at how many bits a row's products read the weights, the fast one of the two dials.

A width is an int of bits, or EXACT: the weights as they were loaded. A server offers some, ascending; (EXACT,) is one
whose precision is no dial. A row's width may change at every step: KV that is there stays as it was made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from model_store.width import EXACT

__all__ = ["EXACT", "bits_read", "offered_width", "precision_name"]


def offered_width(width: int, offered: Sequence[int]) -> int:
    """The widest of `offered` (ascending) that is no wider than asked; the narrowest where all are wider."""
    return offered[max(bisect_right(offered, width) - 1, 0)]


def bits_read(width: int) -> int:
    """Bits of a weight that a row reads, roughly: what tenants are charged by. EXACT is mostly kept in twelve."""
    return min(width, 12)


def precision_name(width: int) -> str:
    """What requests, answers and metrics call a width."""
    return "exact" if width == EXACT else f"q{width}"
