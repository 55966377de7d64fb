"""The sizes a request may get: what is worth considering, and what decisions read about each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from server.cost.price import StepPrice


class Candidate(NamedTuple):
    """A size worth considering."""

    size: int
    num_on_teacher: int  # stations at which it runs the teacher's block
    path_weight: float  # layer weight of its path: `CostProfile.path_weights`
    is_teacher_head: bool


class Candidates(NamedTuple):
    """C sizes worth considering, ascending in layers and in quality."""

    sizes: tuple[int, ...]
    positions: tuple[int, ...]  # in CandidateTable.sizes
    columns: tuple[Candidate, ...]


class CandidateTable:
    """Per pair, computed once. A size that is larger but measured no better than another is never chosen freely."""

    def __init__(self, price: StepPrice, quality: Mapping[int, float] | None = None) -> None:
        """`quality` counts only if it covers every size."""
        elasticity = price.cost.profile.elasticity
        self.sizes = elasticity.sizes
        self.quality = quality if quality and all(size in quality for size in self.sizes) else None
        self._columns = {
            size: Candidate(
                size, sum(size >= t for t in elasticity.thresholds), weight, size >= elasticity.head_threshold
            )
            for size, weight in price.path_weights.items()
        }
        self._cache: dict[tuple[int, ...], Candidates] = {}
        self.all = self._build(self.sizes)

    def candidates(self, sizes: tuple[int, ...]) -> Candidates:
        """Those of `sizes` (ascending) that no smaller one beats in quality; a single size stays what it is."""
        found = self._cache.get(sizes)
        if found is None:
            if len(self._cache) > 4096:
                self._cache.clear()
            found = self._cache[sizes] = self._build(self._front(sizes))
        return found

    def _front(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if self.quality is None:
            return sizes
        front: list[int] = []
        for size in sizes:
            if not front or self.quality[size] > self.quality[front[-1]]:
                front.append(size)
        return tuple(front)

    def _build(self, sizes: tuple[int, ...]) -> Candidates:
        return Candidates(sizes, tuple(map(self.sizes.index, sizes)), tuple(self._columns[size] for size in sizes))
