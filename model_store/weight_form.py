"""In what form weights lie in memory: decided once, before they are loaded; an executor says what it made of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import torch

from model_store.int8 import int8_bytes


class Storage(enum.StrEnum):
    """What the matrices of layers, heads and tied embeddings are kept as. Norms and biases stay in the dtype."""

    AS_LOADED = "as loaded"
    TWELVE_BITS = "12 bits"  # bfloat16, compressed without loss by an executor
    CODES = "codes"  # a file's own, and AS_LOADED for what it has no codes of
    INT8 = "int8"  # rounded to 255 steps per output channel


@dataclass(frozen=True, slots=True)
class WeightForm:
    """`dtype` is that of the products; `low_rank`: a low-rank student's layers stay differences to the teacher's."""

    dtype: torch.dtype = torch.bfloat16
    low_rank: bool = False
    storage: Storage = Storage.AS_LOADED

    @property
    def is_quantised(self) -> bool:
        """Whether the weights differ from those of the files by more than the dtype's rounding."""
        return self.storage is Storage.INT8

    def stored_as(self, storage: Storage) -> WeightForm:
        return replace(self, storage=storage)

    def matrix_bytes(self, num_rows: int, width: int) -> int:
        """Bytes of a matrix [num_rows, width] as `Pair.load` leaves it; an executor that packs it knows its own."""
        if self.storage is Storage.INT8:
            return int8_bytes(num_rows, width)
        return num_rows * width * self.dtype.itemsize

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return name if self.storage is Storage.AS_LOADED else f"{name}, {self.storage} weights"
