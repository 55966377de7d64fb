"""Main memory that the system hands out when it is first used, and gets back when nobody needs it."""

from __future__ import annotations

import ctypes
import mmap
import sys

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


def give_back(address: int, num_bytes: int) -> int:
    """Have the system take the whole pages of a piece of private memory: they read as zeros until they are written
    again, at the same addresses. Bytes that were taken; 0 where `can_give_back` is False. OSError.
    """
    if not can_give_back():
        return 0
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + num_bytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if size <= 0:
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    if madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "the system does not take memory back")
    return size


def can_give_back() -> bool:
    """Whether `give_back` frees anything here: Linux's MADV_DONTNEED does, that of other systems only might."""
    return sys.platform == "linux"
