"""What a size is worth, from what was measured of the pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def quality_by_size(measured: Mapping[int, Mapping[str, Any]], sizes: Sequence[int]) -> dict[int, float] | None:
    """Quality in [0, 1] by size: 1 - KL(size) / KL(student), of the next-token distributions against the teacher's.

    So the student is worth 0 and the teacher 1. None unless every size (but the teacher, whose KL is 0 by definition)
    was measured.
    """
    kl = {size: measured.get(size, {}).get("kl") for size in sizes}
    if kl[sizes[-1]] is None:
        kl[sizes[-1]] = 0.0
    if any(value is None for value in kl.values()) or not kl[sizes[0]] > 0:
        return None
    return {size: 1.0 - value / kl[sizes[0]] for size, value in kl.items()}
