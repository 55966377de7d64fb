"""Sizes on two dials, depth and width: what each point costs and is worth, and which ones are ever worth choosing.

Quality is the KL divergence of next-token distributions from the teacher's as loaded, in nats per token, by kind of
text: lower is better.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Point(NamedTuple):
    """A size: layers, and bits that a weight is read with."""

    depth: int
    width: int


@dataclass(frozen=True, slots=True)
class QualityTable:
    """KL by point and kind of text. Cells that were not measured are the sum of what depth and width cost alone."""

    by_depth: Mapping[str, Mapping[int, float]]  # kind of text -> layers -> KL at full width
    by_width: Mapping[str, Mapping[int, float]]  # kind of text -> bits -> KL at full depth
    measured: Mapping[str, Mapping[Point, float]] = field(default_factory=dict)  # cells that were

    def kl(self, point: Point, kind: str | None = None) -> float:
        """Of one kind of text, or of the kind on which it is worst. KeyError for what was never measured."""
        if kind is None:
            return max(self.kl(point, each) for each in self.by_depth)
        cell = self.measured.get(kind, {}).get(point)
        return self.by_depth[kind][point.depth] + self.by_width[kind][point.width] if cell is None else cell

    def mean_kl(self, depth: int, tokens: Mapping[int, int], kind: str | None = None) -> float:
        """Of an answer at one depth, by how many of its tokens were made at each width; as loaded if it has none."""
        total = sum(tokens.values())
        if not total:
            return self.kl(Point(depth, max(next(iter(self.by_width.values())))), kind)
        return sum(count * self.kl(Point(depth, width), kind) for width, count in tokens.items()) / total

    def additive_error(self, kind: str) -> float:
        """How far, at most and in nats, measured cells are from the sum: whether the sum may stand in for others."""
        alone = QualityTable(self.by_depth, self.by_width)
        return max((abs(alone.kl(point, kind) - kl) for point, kl in self.measured.get(kind, {}).items()), default=0.0)


def front(seconds: Mapping[Point, float], kl: Mapping[Point, float]) -> list[Point]:
    """The points that no other one beats in both, cheapest first (and so best last), in one regime (rows, context).

    Of points that are equal in both the deepest stays.
    """
    found: list[Point] = []
    for point in sorted(seconds, key=lambda point: (seconds[point], kl[point], -point.depth, -point.width)):
        if not found or kl[point] < kl[found[-1]]:
            found.append(point)
    return found


def never_best(regimes: Collection[Mapping[Point, float]], kl: Mapping[Point, float]) -> set[Point]:
    """Points that are on the front of no regime: offered to who names them, never chosen freely."""
    return set(kl).difference(*(front(seconds, kl) for seconds in regimes))
