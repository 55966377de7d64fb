"""A pair's matrices in nested codes, kept in the store: made once from the loaded pair, read at every later start.

One safetensors file for each pair (by the digest of everything that decides its answers), tensors named
`layers.<global id>.<field>.<part>` and `<side>.<head|embed>.<part>`. A matrix that several places share is there once;
the metadata say whose it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError

from model_store.arrays import Array, address, to_numpy
from model_store.dual import DualMatrix
from model_store.int8 import is_plain
from model_store.loaded import LoadedPair
from model_store.nested import GROUP, HEAD_BITS, WIDTHS, NestedMatrix, can_nest_width, nest
from model_store.quantized import CodedMatrix
from model_store.store import StoreError
from model_store.tensor_file import TensorFile, write_tensors
from model_store.weight_form import Storage, WeightForm
from model_store.weights import MATRICES, EndWeights, LayerWeights

if TYPE_CHECKING:
    from model_store.pair import Pair

VERSION = 2  # of the codes and of the text that scales are fitted on: files of other versions are made again
_PARTS = ("codes", "zero", "scales")

Grams = dict[int, Array]  # address of a matrix -> X^T X of the inputs that it met


Owner = LayerWeights | EndWeights


def places(pair: LoadedPair) -> Iterator[tuple[str, Owner, str]]:
    """(name, owner, field) of every matrix of layers and heads that can be nested, in the order of a step."""
    yield from _places(_owners(pair))


def _owners(pair: LoadedPair) -> list[tuple[str, Owner]]:
    return [*((f"layers.{index}", layer) for index, layer in sorted(pair.layers.items())), *pair.ends.items()]


def _places(owners: Iterable[tuple[str, Owner]]) -> Iterator[tuple[str, Owner, str]]:
    for prefix, owner in owners:
        for field in MATRICES if isinstance(owner, LayerWeights) else ("head",):
            matrix = getattr(owner, field)
            if (is_plain(matrix) or isinstance(matrix, CodedMatrix)) and can_nest_width(matrix.shape[1]):
                yield f"{prefix}.{field}", owner, field


def write(
    pair: LoadedPair, file: Path, grams: Grams | None = None, each: Callable[[str], None] = lambda name: None
) -> None:
    """Nest every matrix of a pair loaded in plain floats. `each` hears the name of what was done, for a bar."""
    tensors: dict[str, np.ndarray] = {}
    names: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, owner, field in places(pair):
        matrix = getattr(owner, field)
        place = address(matrix)
        if place in names:
            shared[name] = names[place]
            continue
        names[place] = name
        nested = nest(matrix, (grams or {}).get(place))
        tensors |= {f"{name}.{part}": to_numpy(tensor) for part, tensor in zip(_PARTS, nested.tensors(), strict=True)}
        each(name)
    about = {"version": VERSION, "fitted": bool(grams), "shared": shared}
    write_tensors(file, tensors, {"boomerang": json.dumps(about)})


def nested_file(pair: Pair, store: Path) -> Path:
    """Where the store keeps the pair's nested codes."""
    return store / "nested" / f"{pair.place}.safetensors"


def has_nested(pair: Pair, store: Path) -> bool:
    """Whether the store keeps current codes of the pair. Its files are hashed only if some lie there under its name."""
    folder, name = store / "nested", pair.name.replace("/", "--")
    return any(folder.glob(f"{name}-*.safetensors")) and is_current(nested_file(pair, store))


def is_current(file: Path) -> bool:
    """Whether the file is there, whole, and of this version."""
    try:
        return _about(TensorFile(file)).get("version") == VERSION
    except (OSError, SafetensorError):
        return False


def _about(tensors: TensorFile) -> dict:
    return json.loads(tensors.metadata.get("boomerang", "{}"))


def put(pair: LoadedPair, file: Path, form: WeightForm) -> None:
    """Give the pair's matrices the nested codes of the file: in their place, layers read at `form.bits` and heads at
    `HEAD_BITS`, or beside them. Rows may then choose from `form.widths`.

    What is shared stays shared. A tied embedding is read as its head is.
    """
    pair.widths = form.widths
    NestedCodes(file, form).give(_owners(pair))


class NestedCodes:
    """A pair's file of nested codes, read in one form."""

    def __init__(self, file: Path, form: WeightForm) -> None:
        self._file, self._tensors, self._form = file, TensorFile(file), form
        self._shared = _about(self._tensors)["shared"]

    def give(self, owners: list[tuple[str, Owner]]) -> None:
        """Put the codes in place of the matrices of layers (by "layers.<id>") and ends (by side), or beside them."""
        read: dict[str, NestedMatrix | DualMatrix] = {}
        for name, owner, field in list(_places(owners)):
            first = self._shared.get(name, name)
            if first not in read:
                matrix = getattr(owner, field)
                width = HEAD_BITS[self._form.bits] if field == "head" else self._form.bits
                nested = read[first] = self._read(first, matrix.shape, width)
                if self._form.storage is not Storage.NESTED:
                    read[first] = DualMatrix(matrix, nested)
            if isinstance(owner, EndWeights) and owner.embed is owner.head:
                owner.embed = read[first]
            setattr(owner, field, read[first])

    def _read(self, name: str, shape: tuple[int, ...], width: int) -> NestedMatrix:
        parts = [f"{name}.{part}" for part in _PARTS]
        if not {*parts} <= {*self._tensors.names()}:
            raise StoreError(f"{self._file} lacks the codes of {name}: delete it, and it is made again")
        codes, zero, scales = (np.array(self._tensors.tensor(part)) for part in parts)
        (rows, inputs), groups = shape, shape[1] // GROUP
        wanted = ((rows, inputs), np.uint8), ((rows, groups), np.uint8), ((len(WIDTHS), rows, groups), np.float16)
        if any((one.shape, one.dtype) != two for one, two in zip((codes, zero, scales), wanted, strict=True)):
            raise StoreError(f"{self._file}: {name} is not {rows} x {inputs} in codes: delete it, and it is made again")
        return NestedMatrix(codes, zero, scales, width)
