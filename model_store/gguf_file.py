"""A GGUF file, or all parts of a split one: metadata and tensors, checked before anything is believed.

The layout is that of ggml's docs/gguf.md, versions 2 and 3. The `gguf` package has a reader too; it follows counts
beyond the end of the file, and reads the vocabulary one array per string.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import quant_shape_to_byte_shape

from model_store.files import refuse_pointer

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
}
_INTEGERS = ("I8", "I16", "I32", "I64", "F64")  # that GGUF can hold and no weight of ours is
_MAX_TENSORS, _MAX_KEYS, _MAX_DIMS = 1 << 17, 1 << 16, 4
_MAX_ENTRIES = 1 << 24  # of an array of the metadata: each becomes an object here
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GgufError(ValueError):
    """A file that is damaged or not a GGUF file of a kind that is read here; names the file."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as it lies in the file. Numbers of `shape` are rows first, as in torch.

    `data` is a view of the file: float32 or float16 [*shape], else uint8 [*rows, bytes of a row's quantised blocks].
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    def dequantised(self) -> np.ndarray:
        """float32 [*shape]."""
        return gguf.dequantize(self.data, self.kind).astype(np.float32, copy=False)


@dataclass(frozen=True)
class GgufFile:
    """Metadata of the first part, tensors of all parts by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def name(self) -> str:
        return self.path.name


def parts_of(path: Path) -> list[Path]:
    """All parts of the split file that `path` belongs to, in order; of an ordinary file itself.

    GgufError names the first part that is not there.
    """
    match = _PART.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise GgufError(f"{path.name} is one of {count} parts of a split file, and {part.name} is not beside it")
    return parts


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a file and of all its parts; any part stands for the whole. GgufError says what is wrong."""
    parts = parts_of(path)
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        values, found = _read_part(part)
        if number == 0:
            metadata = values
        if (count := values.get("split.count", 1)) not in (0, len(parts)):
            raise GgufError(
                f"{part.name} is part {values.get('split.no', 0) + 1} of {count} of a split file (split.count), and "
                "its name does not tell the others: name the parts <name>-00001-of-0000N.gguf"
            )
        if len(parts) > 1 and values.get("split.no", number) != number:
            raise GgufError(f"{part.name} says that it is part {values['split.no'] + 1} of its split file (split.no)")
        for tensor in found:
            if tensor.name in tensors:
                raise GgufError(f"{part.name} has the tensor {tensor.name} a second time")
            tensors[tensor.name] = tensor
    expected = metadata.get("split.tensors.count")
    if expected is not None and expected != len(tensors):
        raise GgufError(f"{parts[0].name} and its parts have {len(tensors)} tensors, split.tensors.count is {expected}")
    return GgufFile(parts[0], metadata, tensors)


class _Cursor:
    """Reads forward in a mapped file and never beyond its end."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self.data = np.memmap(path, mode="r", dtype=np.uint8)
        except (ValueError, OSError) as error:  # an empty file cannot be mapped
            raise GgufError(f"{self.name} is not a readable GGUF file: {error}") from error
        self.at = 0
        self.what = "its header"

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise GgufError(
                f"{self.name} is damaged: {self.what} needs {size} bytes at byte {self.at}, and the file has "
                f"{len(self.data)}"
            )
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise GgufError(f"{self.name} is damaged: {self.what} is not UTF-8: {error}") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == GGUFValueType.FLOAT32:  # the shortest decimal that means the same: 1e-05, not 9.99999974e-06
            return float(str(np.float32(self.number("f"))))
        if kind in _SCALARS:
            return self.number(_SCALARS[GGUFValueType(kind)])
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY or depth > 2:
            raise GgufError(f"{self.name} is damaged: {self.what} has the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > _MAX_ENTRIES:
            raise GgufError(f"{self.name} is damaged: {self.what} claims {count} entries")
        if inner in _SCALARS:
            code = _SCALARS[GGUFValueType(inner)]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
        if 8 * count > len(self.data) - self.at:  # every string or array starts with its length
            raise GgufError(f"{self.name} is damaged: {self.what} claims {count} entries, more than the file can hold")
        return [self.value(inner, depth + 1) for _ in range(count)]


def _read_part(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    cursor = _Cursor(path)
    if (magic := bytes(cursor.data[:4])) != b"GGUF":
        refuse_pointer(path)
        raise GgufError(f"{path.name} is not a readable GGUF file: it starts with {magic!r} instead of 'GGUF'")
    cursor.take(4)
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise GgufError(f"{path.name} was written for big-endian machines: convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise GgufError(f"{path.name} is of GGUF version {version}; versions 2 and 3 are read: convert it anew")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    for count, most, what in ((num_tensors, _MAX_TENSORS, "tensors"), (num_keys, _MAX_KEYS, "metadata keys")):
        if count > most:
            raise GgufError(f"{path.name} is damaged: it claims {count} {what}")
    metadata: dict[str, Any] = {}
    for i in range(num_keys):
        cursor.what = f"metadata key {i + 1} of {num_keys}"
        key = cursor.text()
        cursor.what = f"the value of {key!r}"
        if key in metadata:
            raise GgufError(f"{path.name} is damaged: it has the metadata key {key} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise GgufError(f"{path.name}: general.alignment is {alignment!r}, not a power of two")
    return metadata, list(_tensors(cursor, num_tensors, alignment))


def _tensors(cursor: _Cursor, count: int, alignment: int) -> Iterator[GgufTensor]:
    entries = []
    for i in range(count):
        cursor.what = f"the entry of tensor {i + 1} of {count}"
        name = cursor.text()
        dims = cursor.number("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise GgufError(f"{cursor.name} is damaged: the tensor {name} has {dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
        entries.append((name, shape, cursor.number("I"), cursor.number("Q")))
    start, total = -(-cursor.at // alignment) * alignment, 0
    for name, shape, raw_kind, offset in entries:
        try:
            kind = GGMLQuantizationType(raw_kind)
        except ValueError:
            raise GgufError(
                f"{cursor.name}: the tensor {name} is of the unknown or retired type {raw_kind}: convert the model anew"
            ) from None
        if kind.name in _INTEGERS:
            raise GgufError(f"{cursor.name}: the tensor {name} is of type {kind.name}, which is no type for weights")
        dtype: np.dtype[Any] = _PLAIN.get(kind, np.dtype(np.uint8))
        try:
            laid = shape if kind in _PLAIN else quant_shape_to_byte_shape(shape, kind)
        except ValueError:
            raise GgufError(
                f"{cursor.name}: the tensor {name} has rows of {shape[-1]} values, no whole blocks of {kind.name}"
            ) from None
        size = math.prod(laid) * dtype.itemsize
        begin = start + offset
        if begin + size > len(cursor.data):
            raise GgufError(
                f"{cursor.name} is cut off: the tensor {name} ends at byte {begin + size}, the file has "
                f"{len(cursor.data)}: download it again"
            )
        total += size
        if total > len(cursor.data):  # a small file would unfold to a huge model
            raise GgufError(f"{cursor.name} is damaged: its tensors lie one over the other ({name} and others)")
        yield GgufTensor(name, kind, shape, cursor.data[begin : begin + size].view(dtype).reshape(laid))
