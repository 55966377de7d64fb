"""In what form weights and KV lie in memory: decided before they are loaded; an executor says what it made of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import numpy as np

from model_store.arrays import BFLOAT16, dtype_of
from model_store.int8 import int8_bytes
from model_store.nested import can_nest_width, nested_bytes
from model_store.width import EXACT


class Storage(enum.StrEnum):
    """What the matrices of layers, heads and tied embeddings are kept as. Norms and biases stay in the dtype."""

    AS_LOADED = "as loaded"
    TWELVE_BITS = "12 bits"  # bfloat16, compressed without loss by an executor
    CODES = "codes"  # a file's own, and AS_LOADED for what it has no codes of
    NESTED = "nested codes"  # one 8-bit parent per weight, read at fewer bits (nested.py)
    INT8 = "int8"  # rounded to 255 steps per output channel


@dataclass(frozen=True, slots=True)
class WeightForm:
    """`dtype` is that of the products; `low_rank`: a low-rank student's layers stay differences to the teacher's;
    `bits`: those at which nested codes are read; `widths`: those that rows can choose from, for which nested codes lie
    beside whatever the storage is; `kv_cache_dtype`: auto (keys and values in `dtype`) or int8."""

    dtype: np.dtype = BFLOAT16  # or its name, or torch's of that name
    low_rank: bool = False
    storage: Storage = Storage.AS_LOADED
    bits: int = 8
    kv_cache_dtype: str = "auto"
    widths: tuple[int, ...] = (EXACT,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_of(self.dtype))

    @property
    def is_quantised(self) -> bool:
        """Whether the weights differ from those of the files by more than the dtype's rounding."""
        return self.storage in (Storage.INT8, Storage.NESTED)

    def stored_as(self, storage: Storage) -> WeightForm:
        return replace(self, storage=storage)

    def matrix_bytes(self, num_rows: int, width: int) -> int:
        """Bytes of a matrix [num_rows, width] as `Pair.load` leaves it; an executor that packs it knows its own."""
        if self.storage is Storage.INT8:
            return int8_bytes(num_rows, width)
        if self.storage is Storage.NESTED and can_nest_width(width):
            return nested_bytes(num_rows, width)
        return num_rows * width * self.dtype.itemsize + self.bytes_beside(num_rows, width)

    def bytes_beside(self, num_rows: int, width: int) -> int:
        """Of those, bytes of nested codes beside the matrix as it was loaded."""
        is_dual = len(self.widths) > 1 and self.storage is not Storage.NESTED
        return nested_bytes(num_rows, width) if is_dual and can_nest_width(width) else 0

    def __str__(self) -> str:
        name, kv = self.dtype.name, "" if self.kv_cache_dtype == "auto" else ", int8 KV"
        if len(self.widths) > 1:
            widths = ", ".join(str(width) for width in self.widths if width != EXACT)
            return f"{name}, read at {widths} bits{' or as loaded' if EXACT in self.widths else ''}{kv}"
        if self.storage is Storage.NESTED:
            return f"{name}, {self.storage} read at {self.bits} bits{kv}"
        return f"{name}{kv}" if self.storage is Storage.AS_LOADED else f"{name}, {self.storage} weights{kv}"
