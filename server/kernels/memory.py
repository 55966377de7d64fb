"""Main memory that the system hands out when it is first used."""

from __future__ import annotations

import numpy as np

_LINE = 64  # bytes of a cache line


def zero_bytes(num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes], all zero, from the start of a cache line.

    It takes no memory before it is written: numpy asks the system for pages that are cleared on first use, where torch
    would write to every one.
    """
    raw = np.zeros(num_bytes + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + num_bytes]
