"""All weights in one allocation of huge pages.

Streaming hundreds of megabytes per step through 4 KiB pages misses the TLB all the time. Tensors keep their identity
(only their storage moves, one at a time), so what was shared stays shared and nothing exists twice.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable

import torch

logger = logging.getLogger(__name__)

_HUGE = 2 << 20
_ALIGN = 64
_MADV_HUGEPAGE = 14


def move_to_huge_pages(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Move the tensors' storage into one huge-page arena and return it (the tensors keep it alive).

    On a system without transparent huge pages the arena is ordinary memory.
    """
    distinct: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        same = distinct.setdefault(tensor.data_ptr(), [])
        if all(tensor is not other for other in same):
            same.append(tensor)
    total = sum(_padded(same[0]) for same in distinct.values())
    raw = torch.empty(total + _HUGE, dtype=torch.uint8)
    start = -raw.data_ptr() % _HUGE
    arena = raw[start : start + total]
    advise = ctypes.CDLL(None, use_errno=True).madvise
    if advise(ctypes.c_void_p(arena.data_ptr()), ctypes.c_size_t(total // _HUGE * _HUGE), _MADV_HUGEPAGE):
        logger.info("no huge pages for the weights (errno %d)", ctypes.get_errno())
    offset = 0
    for same in distinct.values():
        first = same[0]
        size = first.numel() * first.element_size()
        target = arena[offset : offset + size].view(first.dtype).view(first.shape)
        # Not copy_: hundreds of fork-joins of torch's threads take a second if another process has one of the cores.
        ctypes.memmove(target.data_ptr(), first.contiguous().data_ptr(), size)
        for tensor in same:
            tensor.data = target
        offset += _padded(first)
    return arena


def _padded(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
