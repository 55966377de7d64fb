"""A pair in memory: every tensor once, whatever is served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from model_store import arrays
from model_store.arrays import Array, device_of, dtype_of
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
    def device(self) -> str:
        """Where the tensors are; those on the CPU are numpy's, unless `in_torch` made others of them."""
        return device_of(self.ends["teacher"].final_norm_weight)

    @property
    def dtype(self) -> np.dtype:
        """Of norms and biases, and of products."""
        return dtype_of(self.ends["teacher"].final_norm_weight.dtype)

    def in_torch(self, device: str = "cpu") -> LoadedPair:
        """The same pair for an executor made of torch: on the CPU its tensors share the arrays' memory.

        A pair that is in torch already is itself, but for arrays that were put into one on another device.
        """
        if device == "cpu" and not isinstance(self.ends["teacher"].final_norm_weight, np.ndarray):
            return self
        tensors = arrays.in_torch([self.layers, self.ends, self.low_rank], device)
        return dataclasses.replace(self, layers=tensors[0], ends=tensors[1], low_rank=tensors[2])

    def places(self) -> Iterator[tuple[LayerWeights | EndWeights, str]]:
        """(owner, field) of every matrix of layers and ends; of owners that several layers or sides share, once."""
        owners: list[LayerWeights | EndWeights] = [*self.layers.values(), *self.ends.values()]
        for owner in {id(owner): owner for owner in owners}.values():
            for name in MATRICES if isinstance(owner, LayerWeights) else ("embed", "head"):
                yield owner, name

    def replace_matrices(self, convert: Callable[[Matrix], Any]) -> None:
        """Put what `convert` makes of a matrix in its place, one after the other, so that hardly anything exists twice.

        What is shared is converted once, and stays shared.
        """
        users: dict[int, list[tuple[LayerWeights | EndWeights, str]]] = {}
        for owner, name in self.places():
            users.setdefault(id(getattr(owner, name)), []).append((owner, name))
        for places in users.values():
            converted = convert(getattr(*places[0]))
            for owner, name in places:
                setattr(owner, name, converted)

    def widen_codes(self) -> None:
        """Put plain matrices in the dtype in place of a file's codes: for an executor without a kernel for them where
        they are. They are unpacked on the host."""

        def widened(matrix: Matrix) -> Matrix:
            if isinstance(matrix, DualMatrix):
                return DualMatrix(widened(matrix.exact), matrix.nested)
            if not isinstance(matrix, CodedMatrix):
                return matrix
            parts = [dataclasses.replace(part, blocks=arrays.to_numpy(part.blocks)) for part in matrix.parts]
            return arrays.to_torch(CodedMatrix(tuple(parts)).dense(self.dtype), self.device)

        self.replace_matrices(widened)

    @property
    def form(self) -> WeightForm:
        """In what form the tensors are, before an executor packs them."""
        end = self.ends["teacher"]
        storage = Storage.INT8 if isinstance(end.head, Int8Matrix) else Storage.AS_LOADED
        if any(isinstance(exact_of(value), CodedMatrix) for _, value in self._matrices()):
            storage = Storage.CODES
        form = WeightForm(self.dtype, bool(self.low_rank), storage, widths=self.widths)
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
            kind = dtype_of(matrix.dtype).name
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

    def tensors(self) -> Iterator[Array]:
        """Every tensor, a shared one as often as it is referred to."""
        for layer in self.layers.values():
            yield from layer.tensors()
        for delta in self.low_rank.values():
            yield from delta.tensors()
        for end in self.ends.values():
            yield from end.tensors()

    def num_bytes(self) -> int:
        """Bytes of weights in memory: distinct storages once."""
        storages = dict(_storage(tensor) for tensor in self.tensors())
        return sum(storages.values())


def _storage(tensor: Array) -> tuple[int, int]:
    """(address, bytes) of the memory that a tensor is a part of."""
    if not isinstance(tensor, np.ndarray):
        return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
    while isinstance(tensor.base, np.ndarray):
        tensor = tensor.base
    return arrays.address(tensor), tensor.nbytes


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
    if isinstance(one, NestedMatrix | DualMatrix) or isinstance(other, NestedMatrix | DualMatrix):
        return one is other
    return one is other or (one.shape == other.shape and bool((one == other).all()))
