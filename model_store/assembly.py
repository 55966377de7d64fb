"""Sizes, thresholds and layer paths: how a teacher and a student interlock. Pure Python; no tensor is touched here.

Method: Boomerang distillation (arXiv 2510.05064). Student layer `i` stands for the teacher's block
`kept[i] .. kept[i + 1] - 1`; the place where either of them runs is station `i`. A patch order is given as one
threshold per station: the smallest size that runs the teacher's block there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model_store.errors import BoomerangError

Side = Literal["teacher", "student"]


class AssemblyError(BoomerangError, ValueError):
    """The layer lists or thresholds do not describe an interlocking pair."""


@dataclass(frozen=True, slots=True)
class Station:
    """Teacher block [start, stop) and the student layer `index` that can stand for it."""

    index: int
    start: int
    stop: int

    @property
    def num_layers(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class LayerPath:
    """What one size runs: global layer ids in running order (teacher t is t, student s is N + s), and its ends."""

    size: int
    layers: tuple[int, ...]
    teacher_stations: tuple[bool, ...]
    starts: tuple[int, ...]  # by station: how many layers run before it
    embed_from: Side
    norm_from: Side
    head_from: Side

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def is_teacher(self) -> bool:
        """Whether it runs nothing of the student's."""
        return all(self.teacher_stations)

    def first_difference(self, other: LayerPath) -> int:
        """The station at which two paths of a pair part: all before it is computed alike. 0: they share nothing."""
        if self.embed_from != other.embed_from:
            return 0
        pairs = enumerate(zip(self.teacher_stations, other.teacher_stations, strict=True))
        return next((index for index, (one, two) in pairs if one != two), len(self.starts))


class Elasticity:
    """Every size of a pair and the path it runs, computed once; `path(size)` is a dictionary look-up."""

    def __init__(
        self,
        num_teacher_layers: int,
        kept: Sequence[int],
        thresholds: Sequence[int],
        *,
        embed_threshold: int | None = None,
        norm_threshold: int | None = None,
        head_threshold: int | None = None,
    ) -> None:
        """`kept`: teacher layer that each student layer started from; `thresholds`: one per station, in layers.

        A teacher alone has no `kept`: one station covers all its layers, and there is one size.
        The embedding follows the first station and norm and head the last, unless told otherwise: that reproduces the
        published rules of both orders. Raises AssemblyError if any size between would not have its number of layers.
        """
        kept = tuple(kept)
        _check_kept(num_teacher_layers, kept)
        if len(thresholds) != (num_stations := max(len(kept), 1)):
            raise AssemblyError(f"{len(thresholds)} thresholds for {num_stations} stations")
        if any(isinstance(t, bool) or not isinstance(t, int) for t in thresholds):
            raise AssemblyError(f"thresholds must be whole numbers of layers, got {list(thresholds)}")
        self.num_teacher_layers = num_teacher_layers
        self.num_student_layers = len(kept)
        self.kept = kept
        self.stations = _stations(num_teacher_layers, kept)
        self.thresholds = tuple(thresholds)
        self.embed_threshold = thresholds[0] if embed_threshold is None else embed_threshold
        self.norm_threshold = thresholds[-1] if norm_threshold is None else norm_threshold
        self.head_threshold = thresholds[-1] if head_threshold is None else head_threshold
        low, high = self.num_student_layers, num_teacher_layers
        for threshold in (*self.thresholds, self.embed_threshold, self.norm_threshold, self.head_threshold):
            if not low < threshold <= high:
                raise AssemblyError(f"threshold {threshold} is not between {low + 1} and {high}")
        paths = {size: self._build(size) for size in sorted({*self.thresholds, *([low] if kept else [])})}
        for size, path in paths.items():
            if len(path.layers) != size:
                raise AssemblyError(f"thresholds give the size of {size} layers a path of {len(path.layers)}")
        self._paths = paths
        self.sizes: tuple[int, ...] = tuple(sorted(paths))

    def _build(self, size: int) -> LayerPath:
        layers: list[int] = []
        starts: list[int] = []
        on_teacher = tuple(size >= threshold for threshold in self.thresholds)
        for station, is_teacher in zip(self.stations, on_teacher, strict=True):
            starts.append(len(layers))
            if is_teacher:
                layers.extend(range(station.start, station.stop))
            else:
                layers.append(self.student_layer(station.index))

        def side(threshold: int) -> Side:
            return "teacher" if size >= threshold else "student"

        return LayerPath(
            size, tuple(layers), on_teacher, tuple(starts), side(self.embed_threshold), side(self.norm_threshold),
            side(self.head_threshold),
        )  # fmt: skip

    def path(self, size: int) -> LayerPath:
        """The path of one size; KeyError if the pair has no such size."""
        return self._paths[size]

    @property
    def num_global_layers(self) -> int:
        """How many global layer ids there are: the teacher's, and one for each station (even without a student)."""
        return self.num_teacher_layers + len(self.stations)

    def student_layer(self, index: int) -> int:
        """Global id of student layer `index`, the one at station `index`."""
        return self.num_teacher_layers + index

    # --- orders

    @classmethod
    def of_teacher(cls, num_teacher_layers: int) -> Elasticity:
        """A teacher without a student: its own depth is the only size."""
        return cls(num_teacher_layers, (), (num_teacher_layers,))

    @classmethod
    def last_to_first(cls, num_teacher_layers: int, kept: Sequence[int]) -> Elasticity:
        """Blocks are put back from the end: student[:s] + teacher[t:], norm and head from the teacher."""
        order = _real_blocks(num_teacher_layers, kept)[::-1]
        return cls.from_order(num_teacher_layers, kept, order, riders="next")

    @classmethod
    def first_to_last(cls, num_teacher_layers: int, kept: Sequence[int]) -> Elasticity:
        """Blocks are put back from the front: teacher[:t] + student[s:], embedding from the teacher."""
        order = _real_blocks(num_teacher_layers, kept)
        return cls.from_order(num_teacher_layers, kept, order, riders="previous")

    @classmethod
    def from_order(
        cls,
        num_teacher_layers: int,
        kept: Sequence[int],
        order: Sequence[int],
        *,
        riders: Literal["next", "previous"] = "next",
    ) -> Elasticity:
        """From the stations with more than one teacher layer, first patched first (any nested order).

        One-layer stations add no depth, so they ride along with a neighbour: the next larger block ("next", as the
        published last-to-first cut does) or the previous one ("previous", as first-to-last does). At the end of the
        stack, where there is none on that side, it is the nearest on the other.
        """
        kept = tuple(kept)
        _check_kept(num_teacher_layers, kept)
        if not kept:
            raise AssemblyError("a teacher without a student has no patch order")
        blocks, order = _real_blocks(num_teacher_layers, kept), list(order)
        if sorted(order) != blocks:
            raise AssemblyError(f"a patch order must name every block of more than one layer once, got {order}")
        stations = _stations(num_teacher_layers, kept)
        threshold_of = {}
        size = len(kept)
        for station in order:
            size += stations[station].num_layers - 1
            threshold_of[station] = size

        def host(station: int) -> int:
            before, after = [b for b in blocks if b <= station], [b for b in blocks if b >= station]
            if riders == "next":
                return after[0] if after else before[-1]
            return before[-1] if before else after[0]

        return cls(num_teacher_layers, kept, [threshold_of[host(station)] for station in range(len(kept))])


def _real_blocks(num_teacher_layers: int, kept: Sequence[int]) -> list[int]:
    return [station.index for station in _stations(num_teacher_layers, kept) if station.num_layers > 1]


def _stations(num_teacher_layers: int, kept: Sequence[int]) -> tuple[Station, ...]:
    starts = tuple(kept) or (0,)
    stops = (*starts[1:], num_teacher_layers)
    return tuple(Station(i, a, b) for i, (a, b) in enumerate(zip(starts, stops, strict=True)))


def _check_kept(num_teacher_layers: int, kept: Sequence[int]) -> None:
    if any(isinstance(k, bool) or not isinstance(k, int) for k in kept):
        raise AssemblyError(f"kept layers must be whole numbers, got {list(kept)}")
    if kept and kept[0] != 0:
        raise AssemblyError("the student must keep the teacher's layer 0, so that its first block has a beginning")
    if list(kept) != sorted(set(kept)) or max(kept, default=0) >= num_teacher_layers:
        raise AssemblyError(f"kept layers {list(kept)} are not ascending layers of a teacher of {num_teacher_layers}")
    if len(kept) >= num_teacher_layers:
        raise AssemblyError("the student must have fewer layers than the teacher")
