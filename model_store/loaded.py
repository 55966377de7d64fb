"""A pair in memory: every tensor once, whatever is served."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from model_store.assembly import Elasticity
from model_store.dual import DualMatrix, exact_of
from model_store.int8 import Int8Matrix, Matrix
from model_store.lowrank import LowRankDelta
from model_store.nested import NestedMatrix
from model_store.quantized import CodedMatrix
from model_store.spec import ModelSpec
from model_store.weight_form import Storage, WeightForm
from model_store.weights import MATRICES, TENSOR_FIELDS, EndWeights, LayerWeights
from model_store.width import EXACT


@dataclass(slots=True, eq=False)
class LoadedPair:
    """Tensors of one pair, each once. `layers` by global id: teacher t is t, student s is N + s."""

    name: str
    spec: ModelSpec
    elasticity: Elasticity
    sizes: tuple[int, ...]  # that can be served
    layers: dict[int, LayerWeights]
    ends: dict[str, EndWeights]  # "teacher", "student"; one object if nothing differs
    missing_sizes: dict[int, str] = field(default_factory=dict)  # size -> why it cannot be served
    # Global id -> factors of a student layer. Those not in `layers` run as a difference to their teacher layer.
    low_rank: dict[int, LowRankDelta] = field(default_factory=dict)
    widths: tuple[int, ...] = (EXACT,)  # at which rows can read the matrices, ascending

    @property
    def form(self) -> WeightForm:
        """In what form the tensors are, before an executor packs them."""
        end = self.ends["teacher"]
        storage = Storage.INT8 if isinstance(end.head, Int8Matrix) else Storage.AS_LOADED
        if any(isinstance(exact_of(value), CodedMatrix) for _, value in self._matrices()):
            storage = Storage.CODES
        form = WeightForm(end.final_norm_weight.dtype, bool(self.low_rank), storage, widths=self.widths)
        nested = [value.width for _, value in self._matrices() if isinstance(value, NestedMatrix)]
        return dataclasses.replace(form, storage=Storage.NESTED, bits=min(nested)) if nested else form

    def _matrices(self) -> Iterator[tuple[str, Matrix]]:
        for layer in self.layers.values():
            yield from ((name.removesuffix("_weight"), getattr(layer, name)) for name in MATRICES)
        for end in self.ends.values():
            yield from (("embedding", end.embed), ("head", end.head))

    def kinds(self) -> str:
        """What lies in memory, by kind of tensor, before an executor packs it: "qkv Q4_K + Q6_K, ..., head Q6_K"."""
        kinds: dict[str, dict[str, None]] = {}
        for name, matrix in self._matrices():
            kind = str(matrix.dtype).removeprefix("torch.")
            if isinstance(matrix, CodedMatrix | NestedMatrix | DualMatrix):
                kind = matrix.kind
            kinds.setdefault(name, {})[kind] = None
        names: dict[str, list[str]] = {}
        for name, found in kinds.items():
            names.setdefault(" + ".join(found), []).append(name)
        return "; ".join(f"{', '.join(group)}: {kind}" for kind, group in names.items())

    @property
    def shared_stations(self) -> frozenset[int]:
        """Stations whose student layer is, or is a difference to, the teacher layer it is kept from.

        There all rows of a step can go through the same products.
        """
        num_teacher = self.elasticity.num_teacher_layers

        def is_shared(index: int, origin: int) -> bool:
            own, base = self.layers.get(num_teacher + index), self.layers.get(origin)
            return base is not None and (own is base or (own is None and num_teacher + index in self.low_rank))

        return frozenset(i for i, origin in enumerate(self.elasticity.kept) if is_shared(i, origin))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, a shared one as often as it is referred to."""
        for layer in self.layers.values():
            yield from layer.tensors()
        for delta in self.low_rank.values():
            yield from delta.tensors()
        for end in self.ends.values():
            yield from end.tensors()

    def num_bytes(self) -> int:
        """Bytes of weights in memory: distinct storages once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(storages.values())


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, an operation of torch uses only the thread that calls it; threads started inside do so too.

    For loading, which is parallel by layers: hundreds of fork-joins over small tensors cost more than they save, and
    a second where another process has one of the cores.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def is_same_layer(one: LayerWeights, other: LayerWeights) -> bool:
    """Whether two layers have equal tensors. Unlike ones are told apart by their norms, which are small."""
    if (one.window, one.rope) != (other.window, other.rope):
        return False
    names = sorted(TENSOR_FIELDS, key=lambda name: "norm" not in name)
    return all(_is_equal(getattr(one, name), getattr(other, name)) for name in names)


def join_ends(teacher: dict[str, Any], student: dict[str, Any]) -> dict[str, EndWeights]:
    """EndWeights of both sides from the parts that were read; equal tensors become one object.

    A part that no size needs was not read: it stands for the other side's, so that both sides are always whole.
    """
    shared: dict[int, Matrix] = {}
    for name, mine in student.items():
        theirs = teacher.get(name)
        if mine is not None and theirs is not None and mine is not theirs and _is_equal(mine, theirs):
            shared[id(mine)] = theirs
    student = {name: shared.get(id(value), value) for name, value in student.items()}
    teacher, student = student | teacher, teacher | student
    if all(teacher[name] is student[name] for name in teacher):
        return dict.fromkeys(("teacher", "student"), EndWeights(**teacher))
    return {"teacher": EndWeights(**teacher), "student": EndWeights(**student)}


def _is_equal(one: Matrix | None, other: Matrix | None) -> bool:
    if one is None or other is None:
        return one is other
    if isinstance(one, CodedMatrix) or isinstance(other, CodedMatrix):
        if not (isinstance(one, CodedMatrix) and isinstance(other, CodedMatrix)) or len(one.parts) != len(other.parts):
            return False
        parts = zip(one.parts, other.parts, strict=True)
        return all(a.type is b.type and _is_equal(a.blocks, b.blocks) for a, b in parts)
    if isinstance(one, Int8Matrix) or isinstance(other, Int8Matrix):
        if not (isinstance(one, Int8Matrix) and isinstance(other, Int8Matrix)):
            return False
        return _is_equal(one.scale, other.scale) and _is_equal(one.values, other.values)
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return one is other
    return one is other or (one.shape == other.shape and torch.equal(one, other))
