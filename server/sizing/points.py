"""What is known of each point of depth and width that a server offers, for whoever is shown it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from server.core.width import EXACT
from server.cost.frontier import Point, QualityTable
from server.sizing.quality import GUESS
from server.sizing.spec import size_name


@dataclass(frozen=True, slots=True)
class PointInfo:
    """One point."""

    size: int
    width: int
    kl: Mapping[str, float]  # to the teacher as loaded, in nats per token, by kind of text
    best_in: tuple[str, ...]  # regimes (decode of one request, of sixteen, prompts) in which nothing beats it
    is_measured: bool  # False: additive, or guessed for a pair that nobody has measured
    seconds: Mapping[str, float] = field(default_factory=dict)  # of a step when the server started, by regime

    def card(self) -> dict[str, Any]:
        kl = {kind: round(value, 4) for kind, value in self.kl.items()}
        card = {"expected_kl": kl, "kl_is_measured": self.is_measured, "best_in": list(self.best_in)}
        taken = {name: round(1000 * value, 3) for name, value in self.seconds.items()}
        return card | {"expected_step_ms": taken} if taken else card


def points_of(
    quality: QualityTable,
    best: Mapping[Point, tuple[str, ...]],
    sizes: Sequence[int],
    widths: Sequence[int],
    seconds: Mapping[str, Mapping[Point, float]] = MappingProxyType({}),
) -> tuple[PointInfo, ...]:
    """Every point of `sizes` and `widths`; `best` and `seconds` as `CandidateTable` has them."""
    found = []
    for point in (Point(size, width) for size in sizes for width in widths):
        kl = {kind: quality.kl(point, kind) for kind in quality.by_depth}
        alone = point.width == EXACT and GUESS not in kl
        is_measured = all(alone or point in quality.measured.get(kind, {}) for kind in kl)
        taken = {regime: of_points[point] for regime, of_points in seconds.items()}
        found.append(PointInfo(*point, kl, best.get(point, ()), is_measured, taken))
    return tuple(found)


def write_points(file: Path, points: Sequence[PointInfo]) -> None:
    """As JSON, the best first. A file that cannot be written costs a table, no more."""
    rows = [{"name": size_name(point.size, point.width)} | point.card() for point in reversed(points)]
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")
