"""A safetensors file as arrays that view its memory map, bfloat16 and float8 included.

The library checks the file and knows its entries; its own numpy arrays are copies, and of float8 there are none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from model_store.arrays import BFLOAT16
from model_store.files import share

_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": BFLOAT16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


class TensorFile:
    """Raises SafetensorError for a file that is none, OSError for one that cannot be read."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "np") as checked:
            self.metadata: dict[str, str] = checked.metadata() or {}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        self._entries = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        self._path, self._start = path, 8 + length
        self._bytes: np.ndarray | None = None

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def type(self, name: str) -> str:
        """As safetensors calls it: "BF16"."""
        return self._entries[name]["dtype"]

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of the file, which stays mapped as long as it lives."""
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        dtype = np.dtype(_TYPES[entry["dtype"]])
        if begin == end:
            return np.zeros(entry["shape"], dtype)
        if self._bytes is None:
            self._bytes = np.memmap(self._path, np.uint8, "r", self._start)
        view = np.asarray(self._bytes[begin:end])
        if (view.ctypes.data % dtype.itemsize) != 0:
            view = view.copy()
        return view.view(dtype).reshape(entry["shape"])


def write_tensors(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """A safetensors file that is whole as soon as it has its name. OSError, SafetensorError."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, partial, metadata=metadata)
        share(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
