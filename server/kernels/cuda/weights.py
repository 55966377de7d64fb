"""The matrices of a pair in the forms that the kernels read: codes in planes, all others as they were loaded."""

from __future__ import annotations

import math

import torch

from model_store.int8 import Matrix
from model_store.loaded import LoadedPair
from model_store.nested import NestedMatrix, bytes_read
from model_store.quantized import CodedMatrix
from server.kernels.cuda.codes import DeviceCodes, DeviceNested
from server.kernels.cuda.linear import Weight


def pack(pair: LoadedPair, device: torch.device) -> None:
    """Put the planes of every matrix in codes in its place."""

    def packed(matrix: Matrix) -> Weight:
        if isinstance(matrix, CodedMatrix):
            return DeviceCodes.of(matrix, device)
        return DeviceNested.of(matrix, device) if isinstance(matrix, NestedMatrix) else matrix

    pair.replace_matrices(packed)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what lay between


def bytes_per_weight(pair: LoadedPair) -> float:
    """Bytes of one weight as products read it: matrices of layers and heads, each once."""
    found = {id(m): m for m in (getattr(owner, name) for owner, name in pair.places() if name != "embed")}.values()
    numbers = {id(matrix): math.prod(matrix.shape) for matrix in found}
    read = [
        numbers[id(matrix)] * bytes_read(matrix.width) if isinstance(matrix, DeviceNested) else matrix.nbytes
        for matrix in found
    ]
    return sum(read) / sum(numbers.values())
