"""A pair's files: what serving them takes, and what they become in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model_store.arrays import FLOAT32, in_torch
from model_store.assembly import Elasticity
from model_store.errors import PairError
from model_store.expanded import can_code, expanded_bytes, read_or_make
from model_store.footprint import CodeBytes, Footprint, MatrixBytes
from model_store.layout import END_PARTS
from model_store.loaded import LoadedPair, is_same_layer, join_ends
from model_store.lowrank import LOW_RANK_FILE, LowRankDelta, LowRankStudent
from model_store.spec import ModelSpec
from model_store.store import folder_digest, store_root
from model_store.weight_form import Storage, WeightForm
from model_store.weights import Checkpoint, LayerWeights

_LOAD_THREADS = 2  # each holds one layer beside the result


@dataclass(eq=False)
class Pair:
    """A pair on disk, or a teacher alone. `open_pair` makes one."""

    name: str
    teacher_path: Path
    student_path: Path | None  # None: a teacher alone, which has one size
    # Of pair.json, quality.json and the like: the student's folder, or that of its GGUF file; alone: one in the store.
    notes_path: Path
    spec: ModelSpec
    elasticity: Elasticity
    patch_order: str  # "last_to_first", "first_to_last", or "thresholds" for a measured one
    quality: dict[int, dict[str, Any]] = field(default_factory=dict)  # size -> what was measured in this patch order
    # Kind of text -> what was measured on it: `sizes` (layers), `widths` (bits, at full depth), `points` (24L-q6)
    kinds: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    student_spec: ModelSpec | None = None  # None: a low-rank student, whose ends are the teacher's, or no student
    store: Path | str | None = None
    # Of an ordinary student, where its config says so: it has the teacher's ends, and only these layers of its own.
    # What the file has beside them is not read.
    shares_ends: bool = False
    own_layers: frozenset[int] | None = None  # None: any may be

    @property
    def tokenizer_path(self) -> Path:
        return self.teacher_path

    @property
    def is_low_rank(self) -> bool:
        """Whether the student is kept as low-rank differences to the teacher."""
        return self.student_path is not None and self.student_spec is None

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of everything that decides an answer: both models' files and the patch order."""
        paths = [self.elasticity.path(size) for size in self.elasticity.sizes]
        order = [[path.layers, path.embed_from, path.norm_from, path.head_from] for path in paths]
        folders = [folder_digest(path, self.store) for path in (self.teacher_path, self.student_path) if path]
        return hashlib.sha256(json.dumps([folders, order]).encode()).hexdigest()

    @property
    def place(self) -> str:
        """Name of what the store keeps of exactly this pair."""
        return f"{self.name.replace('/', '--')}-{self.digest[:16]}"

    # --- arithmetic, from the shapes alone

    def parameters(self, size: int) -> int:
        """Parameters of one size as assembled: a tied pair whose ends differ is untied in between."""
        return self._footprint.parameters([size])

    def union_bytes(self, sizes: Collection[int], form: WeightForm, matrix_bytes: MatrixBytes | None = None) -> int:
        """Bytes of all weights that serving exactly `sizes` needs in memory; arguments as for `size_table`."""
        return self._footprint_in(form).num_bytes(sizes, form, matrix_bytes)

    def size_table(
        self, form: WeightForm | None = None, matrix_bytes: MatrixBytes | None = None
    ) -> list[dict[str, Any]]:
        """One row per size: layers, parameters, fraction of the teacher, weight bytes, KV bytes per token, quality.

        The bytes are those of the form that runs (default: bfloat16, as loaded); `matrix_bytes` is what an executor
        says that a packed matrix takes (default: `form.matrix_bytes`).
        """
        form = form or WeightForm()
        rows = self._footprint.size_table(form, matrix_bytes)
        if form.low_rank:
            rows = [row | {"weight_bytes": self.union_bytes([row["size"]], form, matrix_bytes)} for row in rows]
        return [row | {"quality": self.quality.get(row["size"], {})} for row in rows]

    @cached_property
    def _footprint(self) -> Footprint:
        if not self.is_low_rank:
            # Equal layers of an ordinary student are only found when it is loaded.
            ends = self._equal_ends() if self.student_spec and not self.shares_ends else END_PARTS
            spec = self.student_spec or self.spec
            kept, num_layers = self.elasticity.kept, self.spec.num_layers
            same = {num_layers + i: t for i, t in enumerate(kept) if not self.may_own(i)}
            return Footprint(self.elasticity, self.spec, spec, same, ends, code_bytes=self._code_bytes())
        student, num_teacher = self.low_rank_student, self.spec.num_layers
        shared = {num_teacher + i: t for i, t in enumerate(student.kept) if not student.has_own_layer(i)}
        return Footprint(self.elasticity, self.spec, self.spec, shared, END_PARTS, code_bytes=self._code_bytes())

    @cached_property
    def has_codes(self) -> bool:
        """Whether the teacher came from a file whose codes are kept."""
        return Checkpoint(self.teacher_path, self.store).has_codes

    def code_kinds(self) -> str:
        """Types of the teacher's codes by kind of tensor."""
        return Checkpoint(self.teacher_path, self.store).code_kinds()

    def _code_bytes(self) -> CodeBytes | None:
        """Of matrices where codes are kept, by side and layer or end part."""
        if not self.has_codes:
            return None
        sides = {"teacher": Checkpoint(self.teacher_path, self.store)}
        if self.student_spec is not None:
            sides["student"] = self._student()

        def code_bytes(side: str, what: int | str, itemsize: int) -> int:
            if side not in sides:  # a low-rank student's, expanded
                shapes = self.spec.matrix_shapes.values()
                return sum([expanded_bytes(n, k) if can_code(shapes) else n * k * itemsize for n, k in shapes])
            if isinstance(what, int):
                return sides[side].layer_bytes(what, itemsize)
            return sides[side].matrix_bytes(sides[side].end_names(what)[:1], itemsize)

        return code_bytes

    def _footprint_in(self, form: WeightForm) -> Footprint:
        """With low-rank layers kept as differences to the teacher's if `form` says so."""
        if not self.is_low_rank or not form.low_rank:
            return self._footprint
        student, num_teacher = self.low_rank_student, self.spec.num_layers
        is_shared = [student.is_difference(i) or not student.has_own_layer(i) for i in range(len(student.kept))]
        shared = {num_teacher + i: t for i, t in enumerate(student.kept) if is_shared[i]}
        differences = {num_teacher + i: size for i, size in student.num_bytes(form.dtype).items()}
        return Footprint(self.elasticity, self.spec, self.spec, shared, END_PARTS, differences, self._code_bytes())

    def _equal_ends(self) -> set[str]:
        """End parts in which the student's tensors equal the teacher's. Unlike tensors are told apart at once."""
        teacher, student = Checkpoint(self.teacher_path, self.store), self._student()

        def is_equal(part: str) -> bool:
            ours, theirs = teacher.end_names(part), student.end_names(part)
            pairs = [(teacher.tensor(a), student.tensor(b)) for a, b in zip(ours, theirs, strict=False)]
            return len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in pairs)

        return {part for part in END_PARTS if is_equal(part)}

    def _student(self) -> Checkpoint:
        """Where it is an ordinary one."""
        assert self.student_path is not None
        return Checkpoint(self.student_path, self.store)

    @cached_property
    def low_rank_student(self) -> LowRankStudent:
        """Where `is_low_rank`."""
        assert self.student_path is not None
        return LowRankStudent(self.student_path / LOW_RANK_FILE, self.elasticity.kept)

    def may_own(self, index: int) -> bool:
        """Whether layer `index` of an ordinary student may differ from the teacher's."""
        return self.own_layers is None or index in self.own_layers

    # --- loading

    def read_layer(self, layer: int, form: WeightForm) -> LayerWeights:
        """One layer by its global id (teacher t is t, student s is N + s), low-rank ones expanded, from the file."""
        index, kept = layer - self.spec.num_layers, self.elasticity.kept
        if index >= 0 and self.student_spec is not None and self.may_own(index):
            return self._student().layer(index, form)
        teacher = Checkpoint(self.teacher_path, self.store)
        if index < 0 or self.student_spec is not None or not self.low_rank_student.has_own_layer(index):
            return teacher.layer(layer if index < 0 else kept[index], form)
        return self._expanded(index, form, teacher)

    def _expanded(self, index: int, form: WeightForm, teacher: Checkpoint) -> LayerWeights:
        """Layer `index` of a low-rank student in floats; beside a teacher in codes, in codes that the store keeps."""
        student, shapes = self.low_rank_student, self.spec.matrix_shapes
        # From the file in float32, so that rounding happens once even where the pair is bfloat16.
        exact = WeightForm(FLOAT32, storage=Storage.CODES if form.storage is Storage.CODES else Storage.AS_LOADED)
        base = teacher.layer(student.kept[index], exact)

        if form.storage is not Storage.CODES or not can_code(shapes.values()):
            return student.layer(index, base, form, student.sums(index, base))
        folder = store_root(self.store) / "expanded" / self.place
        coded = read_or_make(folder, index, shapes, lambda: student.sums(index, base))
        return student.layer(index, base, form, coded)

    def load(self, form: WeightForm, device: str = "cpu", memory_budget: int | None = None) -> LoadedPair:
        """Read the tensors, in this form: numpy's arrays on the CPU, torch's tensors on any other device.

        Peak memory is the result plus two layers (plain ones, and one plain head, if the form is quantised).

        With a `memory_budget` (bytes of weights) too small for both models, the student and as many teacher blocks as
        fit, in patch order, are read; the sizes beyond are reported missing. `form.low_rank` has no effect on an
        ordinary student. Raises PairError or WeightError.
        """
        sizes, missing = self._footprint_in(form).servable(form, memory_budget)
        if not sizes:
            smallest = self.elasticity.sizes[0]
            raise PairError(f"not even the smallest size can be served: {smallest}L {missing[smallest]}")
        wanted = sorted({layer for size in sizes for layer in self.elasticity.path(size).layers})
        num_teacher = self.spec.num_layers
        if form.low_rank and self.is_low_rank:
            shared = self._footprint_in(form).shared_layers
            wanted = sorted({*wanted, *(shared[i] for i in wanted if i in shared)})
        teacher = Checkpoint(self.teacher_path, self.store)

        def place(weights: Any) -> Any:
            return weights if device == "cpu" else in_torch(weights, device)

        with ThreadPoolExecutor(_LOAD_THREADS) as threads:  # copies and conversions run outside the interpreter's lock
            ids = [i for i in wanted if i < num_teacher]
            read = threads.map(lambda i: place(teacher.layer(i, form)), ids)
            layers = dict(zip(ids, read, strict=True))
        student_ids = [i for i in wanted if i >= num_teacher]
        factors: dict[int, LowRankDelta] = {}
        parts = self._footprint.end_parts(sizes)
        if self.student_spec is None:
            factors = self._load_low_rank(teacher, student_ids, layers, form, place) if student_ids else {}
            ends = join_ends(teacher.end_tensors(form), {})
        else:
            student = self._student()
            for i in student_ids:
                origin = self.elasticity.kept[i - num_teacher]
                if not self.may_own(i - num_teacher):
                    layers[i] = layers[origin] if origin in layers else place(teacher.layer(origin, form))
                    continue
                own = place(student.layer(i - num_teacher, form))
                is_teachers = origin in layers and is_same_layer(own, layers[origin])
                layers[i] = layers[origin] if is_teachers else own
            if self.shares_ends:
                ends = join_ends(teacher.end_tensors(form), {})
            else:
                ends = join_ends(
                    teacher.end_tensors(form, parts["teacher"]),
                    student.end_tensors(form, parts["student"]),
                )
        return LoadedPair(self.name, self.spec, self.elasticity, sizes, layers, place(ends), missing, factors)

    def _load_low_rank(
        self,
        teacher: Checkpoint,
        student_ids: list[int],
        layers: dict[int, LayerWeights],
        form: WeightForm,
        place: Callable[[Any], Any],
    ) -> dict[int, LowRankDelta]:
        """Adds the student's layers to `layers`, expanded; or returns their factors, if they are to be kept.

        Layers that are the teacher's own are added in any case.
        """
        student, num_teacher = self.low_rank_student, self.spec.num_layers

        def expand(i: int) -> LayerWeights:
            index = i - num_teacher
            origin = student.kept[index]
            if not student.has_own_layer(index):
                return layers[origin] if origin in layers else place(teacher.layer(origin, form))
            return place(self._expanded(index, form, teacher))

        kept = [i for i in student_ids if form.low_rank and student.is_difference(i - num_teacher)]
        with ThreadPoolExecutor(_LOAD_THREADS) as threads:
            expanded = [i for i in student_ids if i not in kept]
            layers |= dict(zip(expanded, threads.map(expand, expanded), strict=True))
        return {
            i: place(student.delta(i - num_teacher, layers[student.kept[i - num_teacher]], form.dtype)) for i in kept
        }
