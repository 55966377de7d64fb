"""The layers of a low-rank student in codes of their own, beside a teacher in a file's codes.

Their sum with the teacher's is rounded to `EXPANDED`. That takes seconds for 135M parameters, so the store keeps the
result: a safetensors file for each layer, by the digest of everything that decides the pair's answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from model_store.files import share
from model_store.quantized import BLOCK_TYPES, CodedMatrix, CodedRows, q5_1
from model_store.store import is_disk_full
from model_store.tensor_file import TensorFile

logger = logging.getLogger(__name__)

EXPANDED = BLOCK_TYPES["Q5_1"]
VERSION = 1  # of the fit: files of other versions are made again

Coded = dict[str, CodedMatrix]  # "qkv_weight", "o_weight", "up_weight", "down_weight" -> matrix


def can_code(width: int) -> bool:
    """Whether a matrix of so many inputs has codes; one that has none stays in floats."""
    return width % EXPANDED.inputs == 0


def expanded_bytes(num_rows: int, width: int) -> int:
    return num_rows * (width // EXPANDED.inputs) * EXPANDED.num_bytes


def code(matrix: np.ndarray) -> CodedMatrix:
    """[N, K] of floats in codes."""
    return q5_1(matrix)


def read_or_make(folder: Path, index: int, shapes: dict[str, tuple[int, int]], make: Callable[[], Coded]) -> Coded:
    """The coded matrices of student layer `index` from the folder; made and kept there if they are not in it.

    `shapes` of the matrices by name. A store that cannot be written is no reason to fail: they are made anew next time.
    """
    file = folder / f"layer-{index}.safetensors"
    if (coded := _read(file, shapes)) is not None:
        return coded
    coded = make()
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        blocks = {name: matrix.parts[0].blocks for name, matrix in coded.items()}
        save_file(blocks, partial, metadata={"type": EXPANDED.name, "version": str(VERSION)})
        share(partial)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = "the disk is full" if is_disk_full(error) else error
        logger.warning("%s could not be kept, the next start makes it again: %s", file, reason)
    return coded


def _read(file: Path, shapes: dict[str, tuple[int, int]]) -> Coded | None:
    """None unless the file is there, whole, and what would be made today."""
    try:
        tensors = TensorFile(file)
    except (OSError, SafetensorError):
        return None
    if tensors.metadata != {"type": EXPANDED.name, "version": str(VERSION)} or {*tensors.names()} != {*shapes}:
        return None
    coded = {}
    for name, (num_rows, width) in shapes.items():
        if tensors.shape(name) != (num_rows, expanded_bytes(1, width)) or tensors.type(name) != "U8":
            return None
        coded[name] = CodedMatrix((CodedRows(tensors.tensor(name), EXPANDED),))
    return coded
