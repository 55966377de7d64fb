"""What a size is worth, from what was measured of the pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def quality_by_size(measured: Mapping[int, Mapping[str, Any]], sizes: Sequence[int]) -> dict[int, float] | None:
    """Quality in [0, 1] by size: 1 - KL(size) / KL(student), of the next-token distributions against the teacher's.

    So the student is worth 0 and the teacher 1. None unless every size (but the teacher, whose KL is 0 by definition)
    was measured.
    """
    kl: dict[int, float] = {size: row["kl"] for size, row in measured.items() if row.get("kl") is not None}
    kl.setdefault(sizes[-1], 0.0)
    if any(size not in kl for size in sizes) or not kl[sizes[0]] > 0:
        return None
    return {size: 1.0 - kl[size] / kl[sizes[0]] for size in sizes}
