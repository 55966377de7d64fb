"""The points of depth and width that a request may get: what is worth considering, and what decisions read of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.cost.frontier import Point, QualityTable, front
from server.cost.price import StepPrice
from server.sizing.quality import quality_table

_LEAST_GAIN = 0.99  # seconds of a rung of the ladder over those of the rung above, at most
# Where points are compared: what dominates in one may not in another. Rows that decode, tokens of a prompt beside them.
REGIMES = {"decode_1": (1, 0), "decode_16": (16, 0), "prefill": (0, 256)}


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A point worth considering; there is one object of each."""

    size: int
    width: int
    position: int  # of the size in CandidateTable.sizes
    num_on_teacher: int  # stations at which it runs the teacher's block
    path_weight: float  # layer weight of its path: `CostProfile.path_weights`
    is_teacher_head: bool
    kl: float


Candidates = tuple[Candidate, ...]  # ascending in quality: the worst first


class CandidateTable:
    """Per pair. A point that costs more than another and was measured no better is never chosen freely."""

    def __init__(self, price: StepPrice, quality: QualityTable | None = None) -> None:
        """`quality`: without one, of every size and width that is served, what pairs are guessed to be worth."""
        self.price, profile = price, price.cost.profile
        self.elasticity, self.widths = profile.elasticity, profile.widths
        self.sizes = self.elasticity.sizes
        self.quality = quality or quality_table({}, {}, self.sizes, self.widths)
        self._weights = dict(price.path_weights)
        self._made: dict[tuple[int, int, str], Candidate] = {}
        self._cache: dict[tuple, Candidates] = {}
        self._rests_on: object = None  # coefficients that the cache was made with

    def candidate(self, size: int, width: int, workload: str = "") -> Candidate:
        key = size, width, workload
        found = self._made.get(key)
        if found is None:
            pair, kind = self.elasticity, workload if workload in self.quality.by_depth else None
            found = self._made[key] = Candidate(
                size, width, self.sizes.index(size), sum(size >= t for t in pair.thresholds), self._weights[size],
                size >= pair.head_threshold, self.quality.kl(Point(size, width), kind),
            )  # fmt: skip
        return found

    def candidates(self, sizes: tuple[int, ...], widths: tuple[int, ...], workload: str, rows: int) -> Candidates:
        """Points of `sizes` and `widths` (both ascending) that are worth choosing where `rows` decode."""
        if self._rests_on is not self.price.cost.layer:  # fitted anew
            self._rests_on = self.price.cost.layer
            self._cache.clear()
        regime = rows.bit_length() if len(widths) > 1 else 0
        key = sizes, widths, workload, regime
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) > 4096:
                self._cache.clear()
            found = self._cache[key] = self._build(sizes, widths, workload, 1 << max(regime - 1, 0))
        return found

    def _build(self, sizes: tuple[int, ...], widths: tuple[int, ...], workload: str, rows: int) -> Candidates:
        points = [self.candidate(size, width, workload) for size in sizes for width in widths]
        if len(widths) == 1:  # layers alone: more of them always cost more
            found: list[Candidate] = []
            for point in points:
                if not found or point.kl < found[-1].kl:
                    found.append(point)
            return tuple(found)
        chosen = {Point(point.size, point.width): point for point in points}
        seconds = self._seconds(chosen, rows)
        # From the best down: no rung that saves next to nothing, and none that is deeper than the one above it, which
        # would cost more of prompts and KV.
        ladder: list[Candidate] = []
        least = math.inf
        for best in reversed(front(seconds, {point: chosen[point].kl for point in chosen})):
            if not ladder or (best.depth <= ladder[-1].size and seconds[best] <= _LEAST_GAIN * least):
                ladder.append(chosen[best])
                least = seconds[best]
        return tuple(reversed(ladder))

    def _seconds(self, points: Iterable[Point], rows: int, tokens: int = 0) -> dict[Point, float]:
        return {point: self.price.point_seconds(point.depth, point.width, rows, tokens) for point in points}

    def seconds_in(self, sizes: Sequence[int]) -> dict[str, dict[Point, float]]:
        """What a step is expected to take now at each point of `sizes`, by regime."""
        points = [Point(size, width) for size in sizes for width in self.widths]
        return {name: self._seconds(points, *regime) for name, regime in REGIMES.items()}

    def best_in(self, sizes: Sequence[int]) -> dict[Point, tuple[str, ...]]:
        """The regimes in which nothing beats a point, for each point of `sizes`; () for one that is never the best."""
        kl = {Point(size, width): self.candidate(size, width).kl for size in sizes for width in self.widths}
        fronts = {name: set(front(seconds, kl)) for name, seconds in self.seconds_in(sizes).items()}
        return {point: tuple(name for name, best in fronts.items() if point in best) for point in kl}
