"""The matrices of a pair in the forms that the kernels read: codes in planes, all others as they were loaded."""

from __future__ import annotations

import math

import torch

from model_store.dual import DualMatrix, head_width
from model_store.int8 import Matrix
from model_store.loaded import LoadedPair
from model_store.nested import WIDTHS, NestedMatrix, bytes_read
from model_store.quantized import CodedMatrix
from server.core.width import EXACT
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


def bytes_of_product(matrix: Weight, width: int = EXACT) -> float:
    """Bytes of a matrix that a product at this width reads."""
    if isinstance(matrix, DeviceDual):
        matrix = matrix.nested if width in WIDTHS else matrix.exact
    if isinstance(matrix, DeviceNested):
        return math.prod(matrix.shape) * bytes_read(width if width in WIDTHS else matrix.width)
    return matrix.nbytes


def bytes_per_weight(pair: LoadedPair, width: int) -> float:
    """Bytes of one weight as products of rows of this width read it: matrices of layers and heads, each once."""
    found = {id(m): (m, name) for m, name in ((getattr(owner, name), name) for owner, name in pair.places())}
    products = [(m, head_width(width) if name == "head" else width) for m, name in found.values() if name != "embed"]
    return sum(bytes_of_product(*product) for product in products) / sum(math.prod(m.shape) for m, _ in products)
