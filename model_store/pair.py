"""A teacher and a student that interlock: what is on disk, and what it becomes in memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model_store.assembly import AssemblyError, Elasticity
from model_store.lowrank import LOW_RANK_FILE, LowRankDelta, LowRankStudent
from model_store.published import order_of
from model_store.spec import ModelSpec
from model_store.weights import Checkpoint, EndWeights, LayerWeights

DEFAULT_PAIR = "smollm2-135m-instruct"
DEFAULT_PAIR_DIR = Path(__file__).parent / "default_pair"
PATCH_ORDERS = ("last_to_first", "first_to_last")


class PairError(ValueError):
    """A teacher and a student that do not interlock, with the reason."""


@dataclass(slots=True, eq=False)
class LoadedPair:
    """Tensors of one pair, each once. `layers` by global id: teacher t is t, student s is N + s."""

    name: str
    spec: ModelSpec
    elasticity: Elasticity
    sizes: tuple[int, ...]
    layers: dict[int, LayerWeights]
    ends: dict[str, EndWeights]
    missing_sizes: dict[int, str] = field(default_factory=dict)  # size -> why it cannot be served
    low_rank: dict[int, LowRankDelta] | None = None  # global id -> factors, if kept unexpanded

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, a shared one as often as it is referred to."""
        for layer in self.layers.values():
            yield from layer.tensors()
        for end in self.ends.values():
            yield from end.tensors()

    def num_bytes(self) -> int:
        """Bytes in memory: distinct storages once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(storages.values())


@dataclass(slots=True, eq=False)
class Pair:
    """A pair on disk."""

    name: str
    teacher_path: Path
    student_path: Path
    spec: ModelSpec
    elasticity: Elasticity
    patch_order: str
    quality: dict[int, dict[str, Any]] = field(default_factory=dict)
    student_has_own_ends: bool = True

    @property
    def tokenizer_path(self) -> Path:
        return self.teacher_path

    def load(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        memory_budget: int | None = None,
        keep_low_rank: bool = False,
    ) -> LoadedPair:
        """Read the tensors, in `dtype`, onto the device.

        With a `memory_budget` (bytes of weights) too small for both models, the largest size whose weights fit
        together with everything below it decides which teacher layers are read; larger sizes are reported missing.
        """
        sizes, missing = self._servable(dtype, memory_budget)
        wanted = sorted({layer for size in sizes for layer in self.elasticity.path(size).layers})
        num_teacher = self.spec.num_layers
        teacher = Checkpoint(self.teacher_path)
        layers = {i: teacher.layer(i, dtype, device) for i in wanted if i < num_teacher}
        low_rank: dict[int, LowRankDelta] = {}
        ends = {"teacher": teacher.ends(dtype, device)}
        if self._low_rank_file:
            student = LowRankStudent(self._low_rank_file, self.elasticity.kept)
            for i in (w - num_teacher for w in wanted if w >= num_teacher):
                base = layers.get(self.elasticity.kept[i]) or teacher.layer(self.elasticity.kept[i], dtype, device)
                if not student.has_own_layer(i):
                    layers[num_teacher + i] = base
                else:
                    # In float32 from the file, so that rounding happens once even where the pair is bfloat16.
                    exact = base if dtype == torch.float32 else teacher.layer(self.elasticity.kept[i], torch.float32)
                    layers[num_teacher + i] = student.layer(i, exact, dtype, device)
                    if keep_low_rank:
                        low_rank[num_teacher + i] = student.delta(i, base, dtype, device)
            ends["student"] = ends["teacher"]
        else:
            checkpoint = Checkpoint(self.student_path)
            for i in (w - num_teacher for w in wanted if w >= num_teacher):
                layers[num_teacher + i] = checkpoint.layer(i, dtype, device)
            ends["student"] = _share_equal(checkpoint.ends(dtype, device), ends["teacher"])
            if len(sizes) == len(self.elasticity.sizes) and (left := checkpoint.unused()):
                raise PairError(f"the student's checkpoint has tensors that no layer uses: {', '.join(left[:5])}")
        if len(sizes) == len(self.elasticity.sizes) and not self._low_rank_file:
            _ = teacher.unused()
        return LoadedPair(
            self.name, self.spec, self.elasticity, sizes, layers, ends, missing, low_rank if keep_low_rank else None
        )

    @property
    def _low_rank_file(self) -> Path | None:
        file = self.student_path / LOW_RANK_FILE
        return file if file.is_file() else None

    # --- arithmetic, from the shapes alone

    def _ends_parameters(self, untied: bool) -> int:
        spec = self.spec
        count = spec.vocab_size * spec.hidden_size * (2 if untied else 1)
        count += spec.max_position_embeddings * spec.hidden_size if spec.learned_positions else 0
        return count + spec.hidden_size * (2 if spec.norm == "layer" else 1)

    def parameters(self, size: int) -> int:
        """Parameters of one size as assembled: a tied pair whose ends differ is untied in between."""
        path = self.elasticity.path(size)
        mixed = self.student_has_own_ends and path.embed_from != path.head_from
        untied = mixed or not self.spec.tie_word_embeddings
        return path.num_layers * self.spec.layer_parameters + self._ends_parameters(untied)

    def size_table(self, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
        """One row per size: layers, parameters, fraction of the teacher, weight bytes, KV bytes per token, quality."""
        teacher = self.parameters(self.elasticity.sizes[-1])
        kv = self.spec.kv_bytes_per_token_layer(dtype.itemsize)
        return [
            {
                "size": size,
                "parameters": (parameters := self.parameters(size)),
                "fraction": parameters / teacher,
                "weight_bytes": parameters * dtype.itemsize,
                "kv_bytes_per_token": size * kv,
                "quality": self.quality.get(size, {}),
            }
            for size in self.elasticity.sizes
        ]

    def union_bytes(self, sizes: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of all weights that serving exactly `sizes` needs in memory."""
        layers = {layer for size in sizes for layer in self.elasticity.path(size).layers}
        ends = 2 if self.student_has_own_ends else 1
        untied = not self.spec.tie_word_embeddings
        return (len(layers) * self.spec.layer_parameters + ends * self._ends_parameters(untied)) * dtype.itemsize

    def _servable(self, dtype: torch.dtype, memory_budget: int | None) -> tuple[tuple[int, ...], dict[int, str]]:
        sizes = self.elasticity.sizes
        if memory_budget is None or self.union_bytes(sizes, dtype) <= memory_budget:
            return sizes, {}
        for count in range(len(sizes) - 1, 0, -1):
            if self.union_bytes(sizes[:count], dtype) <= memory_budget:
                reason = f"its weights do not fit the memory budget of {memory_budget} bytes"
                return sizes[:count], dict.fromkeys(sizes[count:], reason)
        need = self.union_bytes(sizes[:1], dtype)
        raise PairError(f"the smallest size needs {need} bytes of weights and the memory budget is {memory_budget}")


def open_pair(
    teacher: Path | str | None = None,
    student: Path | str | None = None,
    *,
    patch_order: str | None = None,
    thresholds: list[int] | None = None,
    name: str | None = None,
    store: Path | str | None = None,
) -> Pair:
    """Open a teacher and a student; with neither, the default pair. Raises PairError if they do not interlock."""
    from model_store.sources import default_teacher, resolve

    is_default = teacher is None and student is None
    if student is None and teacher is not None:
        raise PairError("a teacher needs its student: give --student too")
    teacher_path = default_teacher(store) if teacher is None else resolve(teacher, store)
    student_path = DEFAULT_PAIR_DIR if student is None else resolve(student, store)
    config = _student_config(student_path)
    teacher_config = json.loads((teacher_path / "config.json").read_text())
    spec = ModelSpec.from_hf_config(teacher_config)
    kept = config.get("copied_teacher_layers")
    if not isinstance(kept, list) or not all(isinstance(k, int) for k in kept):
        raise PairError(f"{student_path}/student_config.json has no list copied_teacher_layers")
    has_low_rank = (student_path / LOW_RANK_FILE).is_file()
    if not has_low_rank:
        _check_interlock(spec, ModelSpec.from_hf_config(json.loads((student_path / "config.json").read_text())), kept)
    manifest_file = student_path / "pair.json"
    manifest = json.loads(manifest_file.read_text()) if manifest_file.is_file() else {}
    order = patch_order or manifest.get("patch_order") or order_of(str(student or ""))
    thresholds = thresholds or (None if patch_order else manifest.get("thresholds"))
    try:
        if thresholds is not None:
            elasticity = Elasticity(spec.num_layers, kept, thresholds)
            order = order or "thresholds"
        elif order in PATCH_ORDERS:
            elasticity = getattr(Elasticity, order)(spec.num_layers, kept)
        elif order is None:
            order = "last_to_first"
            elasticity = Elasticity.last_to_first(spec.num_layers, kept)
        else:
            raise PairError(f"unknown patch order {order!r} (known: {', '.join(PATCH_ORDERS)}, or thresholds)")
    except AssemblyError as error:
        raise PairError(str(error)) from error
    quality_file = student_path / "quality.json"
    quality = json.loads(quality_file.read_text()).get("sizes", {}) if quality_file.is_file() else {}
    return Pair(
        name=name or manifest.get("name") or (DEFAULT_PAIR if is_default else teacher_path.name.lower()),
        teacher_path=teacher_path,
        student_path=student_path,
        spec=spec,
        elasticity=elasticity,
        patch_order=order,
        quality={int(size): row for size, row in quality.items()} if not patch_order else {},
        student_has_own_ends=not has_low_rank,
    )


def _student_config(path: Path) -> dict[str, Any]:
    file = path / "student_config.json"
    if not file.is_file():
        raise PairError(f"{path} has no student_config.json: which teacher layers its layers stand for is not known")
    return json.loads(file.read_text())




def _check_interlock(teacher: ModelSpec, student: ModelSpec, kept: list[int]) -> None:
    may_differ = {"num_layers", "tie_word_embeddings", "max_position_embeddings", "sliding_window"}
    for spec_field in dataclasses.fields(ModelSpec):
        name = spec_field.name
        ours, theirs = getattr(teacher, name), getattr(student, name)
        if name not in may_differ and ours != theirs:
            raise PairError(f"teacher and student do not interlock: {name} is {ours!r} and {theirs!r}")
    if student.num_layers != len(kept):
        raise PairError(
            f"the student has {student.num_layers} layers and student_config.json lists {len(kept)} copied layers"
        )


def _share_equal(ends: EndWeights, other: EndWeights) -> EndWeights:
    """Replace tensors equal to the other side's by that side's, so that they exist once."""
    was_tied = ends.head is ends.embed
    for spec_field in dataclasses.fields(EndWeights):
        mine, theirs = getattr(ends, spec_field.name), getattr(other, spec_field.name)
        if mine is not None and theirs is not None and mine.shape == theirs.shape and torch.equal(mine, theirs):
            setattr(ends, spec_field.name, theirs)
    if was_tied:
        ends.head = ends.embed
    return ends
