"""The matrices of a pair in the forms that the kernels read: codes in planes, all others as they were loaded."""

from __future__ import annotations

import math

import torch

from model_store.dual import DualMatrix, head_width
from model_store.int8 import Matrix
from model_store.loaded import LoadedPair
from model_store.nested import WIDTHS, NestedMatrix, bytes_read
from model_store.quantized import CodedMatrix
from server.kernels.cuda.codes import DeviceCodes, DeviceDual, DeviceNested, Weight


def pack(pair: LoadedPair, device: torch.device) -> None:
    """Put the planes of every matrix in codes in its place."""

    def packed(matrix: Matrix) -> Weight:
        if isinstance(matrix, CodedMatrix):
            return DeviceCodes.of(matrix, device)
        if isinstance(matrix, DualMatrix):
            exact = matrix.exact
            exact = DeviceCodes.of(exact, device) if isinstance(exact, CodedMatrix) else exact
            return DeviceDual(exact, DeviceNested.of(matrix.nested, device))
        return DeviceNested.of(matrix, device) if isinstance(matrix, NestedMatrix) else matrix

    pair.replace_matrices(packed)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what lay between


def bytes_per_weight(pair: LoadedPair, width: int) -> float:
    """Bytes of one weight as products of rows of this width read it: matrices of layers and heads, each once."""
    matrices = {id(getattr(owner, name)): (getattr(owner, name), name) for owner, name in pair.places()}
    num_weights, num_read = 0, 0.0
    for matrix, name in matrices.values():
        if name == "embed":
            continue
        count, bits = math.prod(matrix.shape), head_width(width) if name == "head" else width
        if isinstance(matrix, DeviceDual) and bits not in WIDTHS:
            matrix = matrix.exact
        is_nested = isinstance(matrix, DeviceNested | DeviceDual)
        num_weights += count
        num_read += count * bytes_read(bits if bits in WIDTHS else matrix.width) if is_nested else matrix.nbytes
    return num_read / num_weights
