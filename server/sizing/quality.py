"""What a size is worth, from what was measured of the pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.core.width import EXACT
from server.cost.frontier import Point, QualityTable
from server.sizing.spec import SizeSpec

# Of pairs that nobody has measured, in nats per token, so that their points have an order. A share of layers that a
# student replaces costs KL in proportion, and widths by these figures: those of the default pair (docs/quality.md).
GUESS = "guess"  # in the place of a kind of text
_KL_PER_SHARE = 2.2
_KL_BY_WIDTH = {EXACT: 0.0, 8: 0.0034, 7: 0.006, 6: 0.0115, 5: 0.044, 4: 0.06}


def quality_table(
    measured: Mapping[int, Mapping[str, Any]],
    kinds: Mapping[str, Mapping[str, Any]],
    sizes: Sequence[int],
    widths: Sequence[int],
) -> QualityTable:
    """KL by size and width from a pair's figures (`Pair.quality`, `Pair.kinds`), or a guess where there are none.

    A kind of text counts if every size was measured on it; the teacher as loaded has 0 by definition.
    """
    by_depth: dict[str, dict[int, float]] = {}
    by_width: dict[str, dict[int, float]] = {}
    cells: dict[str, dict[Point, float]] = {}
    found = {name: (_kls(kind.get("sizes", {})), kind) for name, kind in kinds.items()}
    if not any(_is_whole(kl, sizes) for kl, _ in found.values()):
        found = {"text": ({size: row["kl"] for size, row in measured.items() if row.get("kl") is not None}, {})}
    for name, (kl, kind) in found.items():
        if _is_whole(kl, sizes):
            by_depth[name] = {size: kl.get(size, 0.0) for size in sizes}
            own = _KL_BY_WIDTH | _kls(kind.get("widths", {}))
            by_width[name] = {width: own.get(width, 2.0) for width in widths}
            points = {SizeSpec.parse(text): row["kl"] for text, row in kind.get("points", {}).items()}
            cells[name] = {Point(int(spec.value), spec.width or EXACT): kl for spec, kl in points.items()}
    if not by_depth:
        top = sizes[-1]
        by_depth[GUESS] = {size: _KL_PER_SHARE * (top - size) / top for size in sizes}
        by_width[GUESS] = {width: _KL_BY_WIDTH.get(width, 2.0) for width in widths}
    return QualityTable(by_depth, by_width, cells)


def _kls(rows: Mapping[str, Mapping[str, Any]]) -> dict[int, float]:
    return {int(key): row["kl"] for key, row in rows.items() if row.get("kl") is not None}


def _is_whole(kl: Mapping[int, float], sizes: Sequence[int]) -> bool:
    return all(size in kl for size in sizes[:-1]) and bool(kl)


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
