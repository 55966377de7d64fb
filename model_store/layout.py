"""Which tensors a checkpoint of each family has: names, shapes, and how they become the one common layout.

What reading, checking, splitting and exporting share. E = hidden, H = query heads, K = KV heads, D = head dim,
I = MLP width, V = vocabulary, P = positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from model_store.families import FAMILIES, Order
from model_store.spec import ModelSpec

END_PARTS = ("embed", "norm", "head")
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")  # the latter is GPT-NeoX's


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a layer in the file; those of one field follow each other as its rows."""

    name: str  # after the layer's number
    field: str  # of LayerWeights
    shape: tuple[int, ...]  # in the file
    order: Order = Order.PLAIN

    def read(self, value: np.ndarray, spec: ModelSpec) -> np.ndarray:
        """From the file's layout to ours."""
        if self.order is Order.CONV1D:
            return value.T
        if self.order is Order.PER_HEAD:
            shape = (spec.num_heads, 3, spec.head_dim, *value.shape[1:])
            return value.reshape(shape).swapaxes(0, 1).reshape(value.shape)
        return value

    def write(self, value: np.ndarray, spec: ModelSpec) -> np.ndarray:
        """The inverse of `read`; contiguous."""
        if self.order is Order.CONV1D:
            return np.ascontiguousarray(value.T)
        if self.order is Order.PER_HEAD:
            shape = (3, spec.num_heads, spec.head_dim, *value.shape[1:])
            return value.reshape(shape).swapaxes(0, 1).reshape(value.shape)
        return np.ascontiguousarray(value)


def layer_prefix(family: str) -> str:
    return FAMILIES[family].layers


def full_name(name: str, family: str) -> str:
    """The name that transformers gives in a file to what we call `name`; heads have no prefix."""
    return name if name in HEAD_NAMES else FAMILIES[family].prefix + name


@lru_cache
def layer_tensors(spec: ModelSpec) -> tuple[FileTensor, ...]:
    """Every tensor of one layer."""
    family, found = FAMILIES[spec.family], []
    q_norm, k_norm = spec.qk_norm_widths
    widths = {"q_norm": q_norm, "k_norm": k_norm}
    biases = {"qkv": spec.qkv_bias, "o": spec.o_bias, "up": spec.mlp_bias, "down": spec.mlp_bias}
    for part, names in family.names.items():
        if part not in biases:
            if family.has_part(part):
                kinds = ("weight", "bias") if spec.norm == "layer" else ("weight",)
                norm_width = widths.get(part, spec.hidden_size)
                found += [FileTensor(f"{names[0]}.{kind}", f"{part}_{kind}", (norm_width,)) for kind in kinds]
            continue
        rows, width = spec.matrix_shapes[f"{part}_weight"]
        order = (family.qkv_order if part == "qkv" else None) or family.matrices
        for name, count in zip(names, _rows(spec, part, len(names), rows), strict=True):
            shape = (width, count) if order is Order.CONV1D else (count, width)
            found.append(FileTensor(f"{name}.weight", f"{part}_weight", shape, order))
        if biases[part]:
            order = Order.PLAIN if order is Order.CONV1D else order
            for name, count in zip(names, _rows(spec, part, len(names), rows), strict=True):
                found.append(FileTensor(f"{name}.bias", f"{part}_bias", (count,), order))
    return tuple(found)


def _rows(spec: ModelSpec, part: str, num_tensors: int, rows: int) -> list[int]:
    """How the rows of a part are split among its tensors."""
    if num_tensors == 1:
        return [rows]
    return [spec.q_size, spec.kv_size, spec.kv_size] if part == "qkv" else [rows // num_tensors] * num_tensors


def end_tensors(spec: ModelSpec) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Field of EndWeights -> (part, name in the file, shape) of what is outside the layers."""
    table, norm, family = [spec.vocab_size, spec.hidden_size], [spec.hidden_size], FAMILIES[spec.family]
    found = {
        "embed": ("embed", family.embed, (*table,)),
        "final_norm_weight": ("norm", f"{family.final_norm}.weight", (*norm,)),
        "head": ("head", family.head, (*table,)),
    }
    if spec.norm == "layer":
        found["final_norm_bias"] = ("norm", f"{family.final_norm}.bias", (*norm,))
    if spec.learned_positions:
        found["positions"] = ("embed", "wpe.weight", (spec.max_position_embeddings, spec.hidden_size))
    return found
