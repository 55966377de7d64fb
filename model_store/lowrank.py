"""Students kept as a low-rank difference to the teacher's layers.

Student layer `i` = teacher layer `kept[i]` + lora_B @ lora_A per linear; its norms are stored whole, and so are biases
and query/key norms if they differ from the teacher's. A layer without any tensor of its own is the teacher's layer
itself and shares its memory. Tensor names are those of a Llama checkpoint (`model.layers.i.self_attn.q_proj.lora_A`,
...); factors may be int8 with a float scale per row (`lora_A_scale`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from model_store.arrays import FLOAT32, Array
from model_store.int8 import Factor, Int8Matrix, dense, tensors_of
from model_store.layout import layer_tensors
from model_store.spec import ModelSpec
from model_store.tensor_file import TensorFile
from model_store.weight_form import Storage, WeightForm
from model_store.weights import FLOATS, TENSOR_FIELDS, LayerWeights, WeightError, quantise_layer

LOW_RANK_FILE = "student_lowrank.safetensors"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite")  # whose linears and norms are those below
# Rows of the merged tensors that each projection owns, in order.
_PARTS = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
          "up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}  # fmt: skip
_NORMS = {"attn_norm_weight": "input_layernorm.weight", "mlp_norm_weight": "post_attention_layernorm.weight"}
_HEAD_NORMS = {"q_norm_weight": "self_attn.q_norm.weight", "k_norm_weight": "self_attn.k_norm.weight"}


@dataclass(slots=True, eq=False)
class LowRankTerm:
    """What one projection adds: rows [start, stop) of the merged output get `b @ (a @ x)`. a [r, in], b [out, r]."""

    start: int
    stop: int
    a: Factor
    b: Factor


@dataclass(slots=True, eq=False)
class LowRankDelta:
    """A student layer as terms to add to the teacher layer `base` (its index), with the student's own norms."""

    base: int
    terms: dict[str, list[LowRankTerm]]  # "qkv" | "o" | "up" | "down"
    attn_norm_weight: Array
    mlp_norm_weight: Array
    packed: np.ndarray | None = None  # the terms in an executor's own layout, which it keeps in their place

    def tensors(self) -> Iterator[Array]:
        yield from (self.attn_norm_weight, self.mlp_norm_weight)
        if self.packed is not None:
            yield self.packed
        for terms in self.terms.values():
            for term in terms:
                for factor in (term.a, term.b):
                    yield from tensors_of(factor)


class LowRankStudent:
    """Reads a low-rank student file."""

    def __init__(self, path: Path, kept: tuple[int, ...]) -> None:
        """Raises WeightError for a file that is not one, or has tensors with no place in a student of this shape."""
        self.path = path
        self.kept = kept
        try:
            self._file = TensorFile(path)
        except SafetensorError as error:
            raise WeightError(f"{path} is not a readable safetensors file: {error}") from error
        self._names = set(self._file.names())
        linear = "|".join(re.escape(part) for parts in _PARTS.values() for part in parts)
        norm = "|".join(map(re.escape, [*_NORMS.values(), *_HEAD_NORMS.values()]))
        known = re.compile(rf"model\.layers\.(\d+)\.(?:(?:{linear})\.(?:lora_[AB](?:_scale)?|bias)|{norm})")
        layers = {name: int(match[1]) for name in self._names if (match := known.fullmatch(name))}
        if unknown := sorted(name for name in self._names if layers.get(name, len(kept)) >= len(kept)):
            raise WeightError(f"{path.name} has tensors that no student layer uses: {', '.join(unknown[:5])}")
        self._own = {*layers.values()}
        own_names = (*(f".{name}" for name in _HEAD_NORMS.values()), ".bias")
        self._more = {layer for name, layer in layers.items() if name.endswith(own_names)}

    def check(self, spec: ModelSpec) -> None:
        """WeightError if a tensor of a layer is missing, or has another shape than a layer of `spec` wants."""
        shapes = {tensor.name: tensor.shape for tensor in layer_tensors(spec)}
        for name in sorted(self._names):
            kind, is_factor = self._file.type(name), name.endswith((".lora_A", ".lora_B"))
            if kind not in FLOATS and not (kind == "I8" and is_factor):
                raise WeightError(f"{self.path.name}: {name} is of type {kind}, not of floats")
            if is_factor and (len(self._shape(name)) != 2 or 0 in self._shape(name)):
                raise WeightError(f"{self.path.name}: {name} is {list(self._shape(name))}, not a matrix")
        for index in sorted(self._own):
            wanted: dict[str, tuple[int | None, ...]] = {name: shapes[name] for name in _NORMS.values()}
            for parts in _PARTS.values():
                for part in parts:
                    rows, width = shapes[f"{part}.weight"]
                    a = self._shape(f"model.layers.{index}.{part}.lora_A")
                    wanted |= {f"{part}.lora_A": (a[0], width), f"{part}.lora_B": (rows, a[0])}
            prefix = f"model.layers.{index}."
            more = [name.removeprefix(prefix) for name in self._names if name.startswith(prefix)]
            wanted |= {name: shapes.get(name, ()) for name in more if name not in wanted and "lora_" not in name}
            for name in (name for name in more if "lora_" in name):
                self._check_scale(prefix + name)
            for name, shape in wanted.items():
                if (found := self._shape(prefix + name)) != shape:
                    raise WeightError(f"{self.path.name}: {prefix}{name} is {list(found)}, the teacher's {list(shape)}")

    def _check_scale(self, name: str) -> None:
        """WeightError for factors in int8 without a scale per row, or scales of another length."""
        factor = name.removesuffix("_scale")
        rows, scales = self._shape(factor)[0], f"{factor}_scale"
        is_int8 = self._file.type(factor) == "I8"
        if (is_int8 or scales in self._names) and math.prod(self._shape(scales)) != rows:
            raise WeightError(f"{self.path.name}: {scales} is {list(self._shape(scales))}, not one for each of {rows}")

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._names:
            raise WeightError(f"{self.path.name} lacks the tensor {name!r}")
        return self._file.shape(name)

    def has_own_layer(self, index: int) -> bool:
        """Whether student layer `index` differs from the teacher's layer at all."""
        return index in self._own

    def is_difference(self, index: int) -> bool:
        """Whether it can run as a difference: it has biases and query/key norms of its own only where expanded."""
        return index in self._own and index not in self._more

    def delta(self, index: int, teacher: LayerWeights, dtype: np.dtype) -> LowRankDelta:
        """The factors of student layer `index`: int8 as stored, else in `dtype`.

        WeightError if a shape does not fit the teacher's layer.
        """
        terms: dict[str, list[LowRankTerm]] = {}
        for group, parts in _PARTS.items():
            merged, start = getattr(teacher, f"{group}_weight"), 0
            for part in parts:
                name = f"model.layers.{index}.{part}"
                a, b = (self._factor(f"{name}.{side}", dtype) for side in ("lora_A", "lora_B"))
                if a.shape[1] != merged.shape[1] or start + b.shape[0] > merged.shape[0] or a.shape[0] != b.shape[1]:
                    raise WeightError(f"{self.path.name}: layer {index} {part} does not fit the teacher's layer")
                terms.setdefault(group, []).append(LowRankTerm(start, start + b.shape[0], a, b))
                start += b.shape[0]
            if start != merged.shape[0]:
                raise WeightError(f"{self.path.name}: layer {index} {group} does not fit the teacher's layer")
        norms = {field: self._tensor(f"model.layers.{index}.{name}").astype(dtype) for field, name in _NORMS.items()}
        return LowRankDelta(self.kept[index], terms, **norms)

    def sums(self, index: int, teacher: LayerWeights) -> dict[str, np.ndarray]:
        """float32 matrices of student layer `index` ("qkv_weight", ...): those of its teacher layer and the terms."""
        sums = {}
        for group, terms in self.delta(index, teacher, FLOAT32).terms.items():
            weight = np.array(dense(getattr(teacher, f"{group}_weight"), FLOAT32))
            for term in terms:
                weight[term.start : term.stop] += dense(term.b, FLOAT32) @ dense(term.a, FLOAT32)
            sums[f"{group}_weight"] = weight
        return sums

    def layer(self, index: int, teacher: LayerWeights, form: WeightForm, matrices: Mapping[str, Any]) -> LayerWeights:
        """Student layer `index` expanded, its matrices those given (`sums`, or codes of them): floats are rounded to
        the dtype, then quantised if asked.

        Biases and query/key norms that are not stored are the teacher's (in the dtype).
        """
        dtype = form.dtype
        changed: dict[str, Any] = {
            name: matrix.astype(dtype, copy=False) if isinstance(matrix, np.ndarray) else matrix
            for name, matrix in matrices.items()
        }
        prefix = f"model.layers.{index}."
        for group, parts in _PARTS.items():
            bias, start = getattr(teacher, f"{group}_bias"), 0
            for part in parts:
                stop = start + self._shape(f"{prefix}{part}.lora_B")[0]
                if f"{prefix}{part}.bias" in self._names:
                    bias = changed.setdefault(f"{group}_bias", bias.astype(FLOAT32))
                    bias[start:stop] = self._tensor(f"{prefix}{part}.bias")
                start = stop
        for norm, name in _HEAD_NORMS.items():
            if prefix + name in self._names:
                changed[norm] = self._tensor(prefix + name)
        changed |= {field: self._tensor(prefix + name) for field, name in _NORMS.items()}
        for field in TENSOR_FIELDS:
            value = changed.get(field, getattr(teacher, field))
            if value is not None and field not in matrices:
                changed[field] = value.astype(dtype)
        layer = LayerWeights(**changed, window=teacher.window, rope=teacher.rope)
        if form.storage is Storage.INT8:
            quantise_layer(layer)
        return layer

    def _tensor(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise WeightError(f"{self.path.name} lacks the tensor {name!r}")
        return self._file.tensor(name)

    def _factor(self, name: str, dtype: np.dtype) -> Factor:
        value = self._tensor(name)
        if f"{name}_scale" not in self._names:
            return value.astype(dtype)
        scale = self._tensor(f"{name}_scale").astype(FLOAT32).reshape(-1)
        if value.dtype == np.int8:
            return Int8Matrix(np.array(value), scale)
        return (value.astype(FLOAT32) * scale[:, None]).astype(dtype)

    def num_bytes(self, dtype: np.dtype) -> dict[int, int]:
        """Layer that can run as a difference -> bytes of its factors and norms: int8 as stored, the rest in `dtype`."""
        sizes = dict.fromkeys(self._own - self._more, 0)
        for name in self._names:
            if int(name.split(".")[2]) not in sizes:
                continue
            count = math.prod(self._file.shape(name))
            width = 1 if self._file.type(name) == "I8" else 4 if name.endswith("_scale") else dtype.itemsize
            sizes[int(name.split(".")[2])] += count * width
        return sizes
