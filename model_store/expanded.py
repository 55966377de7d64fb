"""The layers of a low-rank student in codes of their own, beside a teacher in a file's codes.

Their sum with the teacher's is rounded to `EXPANDED`. That takes seconds for 135M parameters, so the store keeps the
result: a safetensors file for each layer, by the digest of everything that decides the pair's answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from model_store.quantized import BLOCK_TYPES, CodedMatrix, CodedRows, q5_1
from model_store.store import is_disk_full
from model_store.tensor_file import TensorFile, write_tensors

logger = logging.getLogger(__name__)

EXPANDED = BLOCK_TYPES["Q5_1"]
_METADATA = {"type": EXPANDED.name, "version": "1"}  # version of the fit: what has other metadata is made again

Matrices = dict[str, np.ndarray]
Coded = dict[str, CodedMatrix]  # "qkv_weight", "o_weight", "up_weight", "down_weight" -> matrix


def can_code(shapes: Iterable[tuple[int, int]]) -> bool:
    """Whether matrices (outputs, inputs) of a layer all have codes; if one has none, the layer stays in floats."""
    return all(width % EXPANDED.inputs == 0 for _, width in shapes)


def expanded_bytes(num_rows: int, width: int) -> int:
    return num_rows * (width // EXPANDED.inputs) * EXPANDED.num_bytes


def read_or_make(folder: Path, index: int, shapes: dict[str, tuple[int, int]], make: Callable[[], Matrices]) -> Coded:
    """The coded matrices of student layer `index` from the folder; coded and kept there if they are not in it.

    `shapes` of the matrices by name; `make` gives them in floats. A store that cannot be written is no reason to fail:
    they are made anew next time.
    """
    file = folder / f"layer-{index}.safetensors"
    if (coded := _read(file, shapes)) is not None:
        return coded
    coded = {name: q5_1(matrix) for name, matrix in make().items()}
    try:
        write_tensors(file, {name: matrix.parts[0].blocks for name, matrix in coded.items()}, _METADATA)
    except (OSError, SafetensorError) as error:
        reason = "the disk is full" if is_disk_full(error) else error
        logger.warning("%s could not be kept, the next start makes it again: %s", file, reason)
    return coded


def _read(file: Path, shapes: dict[str, tuple[int, int]]) -> Coded | None:
    """None unless the file is there, whole, and what would be made today."""
    try:
        tensors = TensorFile(file)
    except (OSError, SafetensorError):
        return None
    if tensors.metadata != _METADATA or {*tensors.names()} != {*shapes}:
        return None
    coded = {}
    for name, (num_rows, width) in shapes.items():
        if tensors.shape(name) != (num_rows, expanded_bytes(1, width)) or tensors.type(name) != "U8":
            return None
        coded[name] = CodedMatrix((CodedRows(tensors.tensor(name), EXPANDED),))
    return coded
