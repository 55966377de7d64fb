"""A size at fewer bits than it was loaded with, as an export needs it: matrices read from the pair's nested codes.

GGUF's Q4_1 and Q5_1 are the same grid (blocks of 32 inputs, a scale and a minimum each), so that files of 4 and 5 bits
hold the very codes. 6 and 8 bits, and heads, go into Q8_0, whose grid is finer.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from model_store.arrays import FLOAT32, Array
from model_store.nested import GROUP, HEAD_BITS, NestedMatrix, can_nest_width
from model_store.spec import ModelSpec
from model_store.tensor_file import TensorFile
from model_store.weights import MATRICES, LayerWeights, split_layer

Grid = tuple[np.ndarray, np.ndarray]  # scale and minimum [N, G] of a matrix's groups
AFFINE = {4: "Q4_1", 5: "Q5_1"}  # GGUF types that hold the codes of a width as they are


class PointCodes:
    """The nested codes of a pair, read at one width."""

    def __init__(self, file: Path, width: int) -> None:
        self.file, self.width = file, width
        self._tensors = TensorFile(file)
        self._shared: dict[str, str] = json.loads(self._tensors.metadata["boomerang"])["shared"]
        self._names = set(self._tensors.names())

    def matrix(self, name: str, bits: int) -> NestedMatrix | None:
        """`name` as `layers.3.qkv_weight` or `teacher.head`; None for what is not nested."""
        first = self._shared.get(name, name)
        if f"{first}.codes" not in self._names:
            return None
        codes, zero, scales = (self._tensors.tensor(f"{first}.{part}") for part in ("codes", "zero", "scales"))
        return NestedMatrix(codes, zero, scales, bits)

    def layer(self, index: int, weights: LayerWeights, dtype: np.dtype) -> LayerWeights:
        """The layer with this global id, its matrices read at the width."""
        found = {name: self.matrix(f"layers.{index}.{name}", self.width) for name in MATRICES}
        return dataclasses.replace(weights, **{n: m.dense(FLOAT32).astype(dtype) for n, m in found.items() if m})

    def head(self, side: str, dtype: np.dtype) -> np.ndarray | None:
        matrix = self.matrix(f"{side}.head", HEAD_BITS[self.width])
        return None if matrix is None else matrix.dense(FLOAT32).astype(dtype)

    def grids(self, index: int, weights: LayerWeights, spec: ModelSpec) -> dict[str, Grid]:
        """By name in the family's files, of a layer's matrices, if GGUF has a type for them."""
        parts: list[dict[str, Any]] = [{}, {}]
        for name in MATRICES:
            matrix = self.matrix(f"layers.{index}.{name}", self.width)
            if matrix is not None:
                groups = matrix.groups()
                assert groups.minimum is not None
                parts[0][name], parts[1][name] = groups.scale, groups.minimum
        whole = dict(split_layer(weights, spec))
        scales, minima = (dict(split_layer(dataclasses.replace(weights, **part), spec)) for part in parts)
        nested = [n for n, value in whole.items() if value.ndim == 2 and scales[n].shape[1] * GROUP == value.shape[1]]
        return {name: (scales[name], minima[name]) for name in nested}


def affine_blocks(values: np.ndarray, grid: Grid, width: int) -> np.ndarray:
    """Bytes [N, G * block] of a matrix [N, K] in Q4_1 or Q5_1, whose values lie on the grid but for rounding.

    A block of 32: scale and minimum in float16; of five bits the fifth ones in an uint32; then nibbles, of inputs 0 to
    15 in the lower halves (ggml-common.h of ggml: block_q4_1, block_q5_1).
    """
    scale, minimum = grid
    groups = values.astype(FLOAT32).reshape(len(values), -1, GROUP)
    codes = np.rint((groups - minimum[..., None]) / scale[..., None]).clip(0, 2**width - 1).astype(np.uint8)
    ends = np.stack([scale.astype(np.float16), minimum.astype(np.float16)], axis=-1).view(np.uint8)
    nibbles = (codes[..., :16] & 15) | ((codes[..., 16:] & 15) << 4)
    parts = [ends, nibbles]
    if width == 5:
        fifth = np.packbits(codes >> 4, axis=-1, bitorder="little")
        parts = [ends, fifth, nibbles]
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def can_hold(value: Array) -> bool:
    """Whether a matrix is whole blocks."""
    return value.ndim == 2 and can_nest_width(value.shape[1])
