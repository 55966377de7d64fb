"""Which rows of a step read matrices at how many bits, as the host knows it: one launch for every run of equal rows.

T = rows.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from model_store.dual import head_width
from server.core.width import EXACT
from server.kernels.cuda.codes import DeviceDual, DeviceNested, Weight

Runs = tuple[tuple[slice, int], ...]  # (rows, width), which cover all rows in order; (): all at the widest

_HEAD_WIDTHS = np.array([head_width(width) for width in range(EXACT + 1)], np.uint8)


def runs_of(widths: np.ndarray | None) -> Runs:
    """Of the widths of rows, uint8 [T]; None: all at the widest."""
    if widths is None or not len(widths):
        return ()
    starts = [0, *(np.flatnonzero(np.diff(widths)) + 1).tolist(), len(widths)]
    return tuple((slice(a, b), int(widths[a])) for a, b in pairwise(starts))


def head_widths(widths: np.ndarray | None) -> np.ndarray | None:
    """What rows of these widths read of a head."""
    return None if widths is None else _HEAD_WIDTHS[widths]


def read_by(weight: Weight, runs: Runs) -> list[tuple[slice, Weight]]:
    """(rows, what they read of the matrix): one entry if it has one width only, or all rows read the same."""
    if not isinstance(weight, DeviceNested | DeviceDual):
        return [(slice(None), weight)]
    if len(runs) <= 1:
        return [(slice(None), weight.at(runs[0][1] if runs else EXACT))]
    return [(rows, weight.at(width)) for rows, width in runs]
