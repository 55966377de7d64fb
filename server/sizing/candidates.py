"""The sizes a request may get, as arrays: what is worth considering, and which weights each runs at every station."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.cost.profile import CostProfile


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """C sizes worth considering, ascending in layers and in quality."""

    sizes: tuple[int, ...]
    sizes_array: np.ndarray  # [C] float
    index: tuple[int, ...]  # position in CandidateTable.sizes
    columns: tuple[tuple[int, int], ...]  # (size, stations at which it runs the teacher's block)
    on_teacher: np.ndarray  # [C, stations] 1 where the size runs the teacher's block


class CandidateTable:
    """Per pair, computed once. A size that is larger but measured no better than another is never chosen freely."""

    def __init__(self, profile: CostProfile, quality: dict[int, float] | None = None) -> None:
        """`quality` counts only if it covers every size."""
        self.elasticity = elasticity = profile.elasticity
        self.sizes = elasticity.sizes
        self.thresholds = np.asarray(elasticity.thresholds)
        self.joint_weights, self.teacher_weights, self.student_weights = profile.station_weights()
        # By station, in patch order, so that those where a size runs the teacher's block come first: how far the
        # station's threshold lies below the largest size, the weight of the teacher's side, and of the student's.
        weights = self.teacher_weights.tolist(), self.student_weights.tolist()
        order = sorted(zip(elasticity.thresholds, *weights, strict=True))
        self.patches = [(self.sizes[-1] - threshold, *sides) for threshold, *sides in order]
        self.joint_weight = float(self.joint_weights.sum())  # of what every row runs, whatever its size
        self.full_weight = float(self.teacher_weights.sum()) + self.joint_weight  # of the largest size's path
        self.quality = quality if quality and all(size in quality for size in self.sizes) else None
        self._position = {size: i for i, size in enumerate(self.sizes)}
        self._cache: dict[tuple[int, ...], Candidates] = {}
        self.all = self._build(self.sizes)

    def path_weights(self, on_teacher: np.ndarray) -> np.ndarray:
        """Layer weight of paths given as rows of stations, 1 where they run the teacher's block: [..., S] -> [...]."""
        own = on_teacher @ self.teacher_weights + (1.0 - on_teacher) @ self.student_weights
        return own + self.joint_weight

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
        array = np.asarray(sizes)
        return Candidates(
            sizes=sizes,
            sizes_array=array.astype(np.float64),
            index=tuple(self._position[size] for size in sizes),
            columns=tuple((size, sum(size >= t for t in self.elasticity.thresholds)) for size in sizes),
            on_teacher=(array[:, None] >= self.thresholds).astype(np.float64),
        )
