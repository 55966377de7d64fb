"""Opens safetensors checkpoints, checks every tensor, and turns each family's names and layouts into one.

E = hidden, H = query heads, K = KV heads, D = head dim, I = MLP width, V = vocabulary, P = positions.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from model_store.arrays import Array
from model_store.description import remembered_spec
from model_store.errors import BoomerangError
from model_store.families import Order
from model_store.files import read_json, refuse_pointer
from model_store.int8 import Int8Matrix, Matrix, quantise, tensors_of
from model_store.layout import END_PARTS, HEAD_NAMES, FileTensor, end_tensors, layer_prefix, layer_tensors
from model_store.quantized import BLOCK_TYPES, CODES_FILE, CodedMatrix, CodedRows, stacked
from model_store.spec import ModelSpec, Rope, SpecError, quantised_as
from model_store.tensor_file import TensorFile
from model_store.weight_form import Storage, WeightForm

# Buffers that old checkpoints carry; computed, not learned.
_BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")
_PREFIXES = ("model.", "gpt_neox.", "transformer.")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# What GPTQ, AWQ, bitsandbytes, compressed-tensors and float8 checkpoints add to the weights.
_QUANTISED = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".weight_zero_point", ".weight_shape", ".absmax", ".quant_map", ".SCB", ".weight_format", ".input_scale",
)  # fmt: skip
MATRICES = ("qkv_weight", "o_weight", "up_weight", "down_weight")  # of a layer


class WeightError(BoomerangError, ValueError):
    """A checkpoint that lacks tensors, has unknown ones, or is not safetensors."""


@dataclass(slots=True, eq=False)
class LayerWeights:
    """One decoder layer. `qkv` rows are all q heads, then k, then v; gated `up` rows are all of gate, then up.

    A Matrix is an array, int8 with scales, or the codes of a file.
    """

    qkv_weight: Matrix  # [(H + 2K) D, E]
    o_weight: Matrix  # [E, H D]
    up_weight: Matrix  # [2I, E] gated, else [I, E]
    down_weight: Matrix  # [E, I]
    attn_norm_weight: Array | None = None  # [E]
    mlp_norm_weight: Array | None = None  # [E]
    attn_norm_bias: Array | None = None
    qkv_bias: Array | None = None
    q_norm_weight: Array | None = None  # [D], or [H D] over all heads
    k_norm_weight: Array | None = None  # [D], or [K D]
    o_bias: Array | None = None
    mlp_norm_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None
    post_attn_norm_weight: Array | None = None  # [E], of what attention gives
    post_mlp_norm_weight: Array | None = None  # [E]
    window: int | None = None  # how many tokens a token sees; None: all before it
    rope: Rope = "global"

    def tensors(self) -> Iterator[Array]:
        return (tensor for name in TENSOR_FIELDS for tensor in tensors_of(getattr(self, name)))


TENSOR_FIELDS = tuple(f.name for f in fields(LayerWeights) if f.name not in ("window", "rope"))


@dataclass(slots=True, eq=False)
class EndWeights:
    """What surrounds the layers, in three parts: embed (with positions), norm, head.

    `head` is the same object as `embed` when they are tied; only then can the embedding be int8, unlike codes.
    """

    embed: Matrix  # [V, E]
    final_norm_weight: Array  # [E]
    head: Matrix  # [V, E]
    positions: Array | None = None  # [P, E]
    final_norm_bias: Array | None = None
    head_bias: Array | None = None

    def tensors(self) -> Iterator[Array]:
        return (tensor for f in fields(self) for tensor in tensors_of(getattr(self, f.name)))


class Checkpoint:
    """A folder with config.json and safetensors. Tensors are read one at a time, through a memory map.

    Whatever is wrong with names, shapes and types is found when it is opened: nothing that computes ever sees it.
    """

    def __init__(self, path: Path | str, store: Path | str | None = None) -> None:
        """Raises WeightError, SpecError or FileError; WeightError also if there is no safetensors file (other formats
        can run code when read). `store` keeps what was found out about the folder."""
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise WeightError(f"{self.path} has no config.json")
        if (self.path / "adapter_config.json").is_file():
            raise WeightError(f"{self.path} has an adapter_config.json: merge the adapter into its model first")
        raw = read_json(self.path / "config.json")
        if refusal := quantised_as(raw):
            raise SpecError(f"{self.path}: {refusal}")
        files = weight_files(self.path)
        self._files = {file: _open(file) for file in files}
        self._where: dict[str, tuple[Path, str]] = {}
        for file, handle in self._files.items():
            for key in handle.names():
                if (name := _plain(key)) in self._where:
                    raise WeightError(f"{self.path} has the tensor {name!r} twice")
                self._where[name] = (file, key)
        codes = self.path / CODES_FILE
        self._codes = _open(codes) if codes.is_file() else None
        types = self._codes.metadata if self._codes else {}
        self._code_types = {_plain(key): (kind, key) for key, kind in types.items()}
        self.spec = remembered_spec(self.path, files, store, lambda: self._resolve(raw))
        self._ends = self._check()

    @property
    def has_codes(self) -> bool:
        """Whether it came from a file whose codes are kept."""
        return bool(self._code_types)

    def codes(self, names: Sequence[str]) -> CodedMatrix | None:
        """The codes of tensors, one below the other; None unless all have some."""
        if self._codes is None or not all(name in self._code_types for name in names):
            return None
        kinds = [self._code_types[name] for name in names]
        parts = [CodedRows(self._codes.tensor(key), BLOCK_TYPES[kind]) for kind, key in kinds]
        return stacked([CodedMatrix((part,)) for part in parts])

    def matrix_bytes(self, names: Sequence[str], itemsize: int) -> int:
        """Bytes of such a matrix with its codes kept, or of `itemsize` a weight where it has none."""
        if self._codes is not None and all(name in self._code_types for name in names):
            keys = [self._code_types[name][1] for name in names]
            return sum([math.prod(self._codes.shape(key)) for key in keys])
        where = [self._where[name] for name in names]
        return itemsize * sum([math.prod(self._files[file].shape(key)) for file, key in where])

    def _matrix_names(self, index: int) -> dict[str, list[str]]:
        """Field of a layer's matrix -> the tensors that it is made of."""
        base = f"{layer_prefix(self.spec.family)}{index}."
        names: dict[str, list[str]] = {name: [] for name in MATRICES}
        for tensor in layer_tensors(self.spec):
            if tensor.field in names:
                names[tensor.field].append(base + tensor.name)
        return names

    def layer_bytes(self, index: int, itemsize: int) -> int:
        """Bytes of the matrices of a layer with its codes kept."""
        return sum([self.matrix_bytes(names, itemsize) for names in self._matrix_names(index).values()])

    def code_kinds(self) -> str:
        """Types of the codes by kind of tensor, "-" where there are none: "qkv, o: Q4_K + Q6_K; embedding: Q8_0"."""
        layers = [self._matrix_names(index) for index in range(self.spec.num_layers)]
        wanted = {field.removesuffix("_weight"): [n for names in layers for n in names[field]] for field in MATRICES}
        wanted |= {"embedding": [self._ends["embed"]], "head": [self._ends["head"]]}
        kinds: dict[str, list[str]] = {}
        for part, names in wanted.items():
            types = dict.fromkeys(self._code_types.get(name, ("-", ""))[0] for name in names)
            kinds.setdefault(" + ".join(types), []).append(part)
        return "; ".join(f"{', '.join(parts)}: {kind}" for kind, parts in kinds.items())

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def tensor(self, name: str) -> np.ndarray:
        """As the file has it: a read-only view of its memory map."""
        if name not in self._where:
            raise WeightError(f"{self.path} lacks the tensor {name!r}")
        file, key = self._where[name]
        return self._files[file].tensor(key)

    def layer(self, index: int, form: WeightForm) -> LayerWeights:
        """One layer in the common layout."""
        base = f"{layer_prefix(self.spec.family)}{index}."
        names: dict[str, list[FileTensor]] = {}
        for tensor in layer_tensors(self.spec):
            names.setdefault(tensor.field, []).append(tensor)

        def field(tensors: list[FileTensor]) -> Matrix:
            if form.storage is Storage.CODES and (codes := self.codes([base + t.name for t in tensors])):
                return codes
            parts = [tensor.read(self.tensor(base + tensor.name), self.spec) for tensor in tensors]
            return _copied(parts[0], form.dtype) if len(parts) == 1 else _joined(parts, form.dtype)

        values: dict[str, Any] = {name: field(tensors) for name, tensors in names.items()}
        layer = LayerWeights(**values, window=self.spec.window(index), rope=self.spec.rope(index))
        if form.storage is Storage.INT8:
            quantise_layer(layer)
        return layer

    def end_tensors(self, form: WeightForm, parts: Collection[str] = END_PARTS) -> dict[str, Any]:
        """The EndWeights fields of some `parts`; a tied head is the very object of the embedding if both are asked.

        What is quantised is the head, and an embedding that is tied to it.
        """

        def place(tensor: np.ndarray) -> np.ndarray:
            return _copied(tensor, form.dtype)

        def matrix(name: str, is_head: bool) -> Matrix:
            if form.storage is Storage.CODES and (codes := self.codes([name])):
                return codes
            placed = place(self.tensor(name))
            return quantise(placed) if is_head and form.storage is Storage.INT8 else placed

        is_tied = self.spec.tie_word_embeddings
        tensors: dict[str, Any] = {}
        if "embed" in parts:
            tensors["embed"] = matrix(self._ends["embed"], is_tied)
            tensors["positions"] = place(self.tensor("wpe.weight")) if self.spec.learned_positions else None
        if "norm" in parts:
            for field in ("final_norm_weight", "final_norm_bias"):
                tensors[field] = place(self.tensor(self._ends[field])) if field in self._ends else None
        if "head" in parts:
            is_loaded = is_tied and "embed" in tensors
            tensors["head"] = tensors["embed"] if is_loaded else matrix(self._ends["head"], True)
        return tensors

    def ends(self, form: WeightForm) -> EndWeights:
        return EndWeights(**self.end_tensors(form))

    def end_names(self, part: str) -> list[str]:
        """Names of the tensors of an end part ("embed", "norm", "head") in this checkpoint, in a fixed order."""
        fields = {"embed": ("embed", "positions"), "norm": ("final_norm_weight", "final_norm_bias"), "head": ("head",)}
        return [self._ends[field] for field in fields[part] if field in self._ends]

    def _head_name(self) -> str | None:
        """Name of the head's tensor, None if there is none in the file."""
        names = HEAD_NAMES if self.spec.family == "gpt_neox" else HEAD_NAMES[:1]
        return next((name for name in names if name in self), None)

    def _resolve(self, raw: dict[str, Any]) -> ModelSpec:
        """The config as transformers reads it, and its rule for heads: tied only if they are equal, or one lacks."""
        try:
            self.spec = ModelSpec.from_hf_config(raw)
        except SpecError as error:
            raise SpecError(f"{self.path}: {error}") from error
        embed, head, is_tied = end_tensors(self.spec)["embed"][1], self._head_name(), self.spec.tie_word_embeddings
        if embed not in self or is_tied == (head is None):
            return self.spec
        if head is None:
            note = "tie_word_embeddings is false and the file has no head: the embedding is used for it"
        elif not _is_equal(self.tensor(head), self.tensor(embed)):
            note = "tie_word_embeddings is true and the file has a head of its own: it is used, as transformers does"
        else:
            return self.spec
        return dataclasses.replace(self.spec, tie_word_embeddings=not is_tied, notes=(note,))

    def _check(self) -> dict[str, str]:
        """Compare every tensor with what the spec expects. Returns EndWeights field -> name.

        WeightError names the first that is missing, of another shape, no float, or unknown.
        """
        spec, head = self.spec, self._head_name()
        expected = {name: shape for _, name, shape in end_tensors(spec).values()}
        ends = {field: name for field, (_, name, _) in end_tensors(spec).items()}
        table = expected.pop(ends["head"])
        if head:
            expected[head] = table
            if ends["embed"] not in self and spec.tie_word_embeddings:
                del expected[ends["embed"]]  # the one table there is was saved as the head
                ends["embed"] = head
        ends["head"] = ends["embed"] if spec.tie_word_embeddings else head or ends["head"]
        if not spec.tie_word_embeddings:
            expected[ends["head"]] = table
        prefix = layer_prefix(spec.family)
        for index in range(spec.num_layers):
            expected |= {f"{prefix}{index}.{tensor.name}": tensor.shape for tensor in layer_tensors(spec)}
        unknown = sorted(name for name in self._where.keys() - expected.keys() if not name.endswith(_BUFFERS))
        if quantised := next((name for name in unknown if name.endswith(_QUANTISED)), None):
            raise WeightError(
                f"{self.path} is quantised (it has {quantised}), which is not supported: take the original"
            )
        for name, shape in expected.items():
            if name not in self:
                raise WeightError(f"{self.path} lacks the tensor {name!r}{self._hint(unknown)}")
            file, key = self._where[name]
            found, kind = self._files[file].shape(key), self._files[file].type(key)
            if found != shape:
                raise WeightError(f"{self.path}: {name} is {list(found)}, its config says {list(shape)}")
            if kind not in FLOATS:
                raise WeightError(f"{self.path}: {name} is of type {kind}, not of floats: is it quantised?")
        if unknown:
            beyond = rf"{re.escape(prefix)}(\d+)\."
            number = max((int(match[1]) for name in unknown if (match := re.match(beyond, name))), default=-1)
            if number >= spec.num_layers:
                raise WeightError(f"{self.path}: its config says {spec.num_layers} layers, the file has layer {number}")
            some = ", ".join(unknown[:5])
            raise WeightError(f"{self.path} has {len(unknown)} tensors that its model family has no place for: {some}")
        self._check_codes(expected)
        return ends

    def _check_codes(self, expected: dict[str, tuple[int, ...]]) -> None:
        """WeightError for codes that are not those of a matrix of this shape: kernels read as many as there should be.

        Their rows are outputs, also where the file keeps the matrix the other way round.
        """
        prefix = re.escape(layer_prefix(self.spec.family))
        turned = {tensor.name for tensor in layer_tensors(self.spec) if tensor.order is Order.CONV1D}
        names = {*self._codes.names()} if self._codes else set()
        for name, (kind, key) in self._code_types.items():
            block, shape = BLOCK_TYPES.get(kind), expected.get(name, ())
            if block is None or len(shape) != 2 or key not in names:
                raise WeightError(f"{self.path / CODES_FILE}: {key} ({kind!r:.20}) is no matrix of this model in codes")
            rows, inputs = shape[::-1] if re.sub(rf"{prefix}\d+\.", "", name) in turned else shape
            wanted = rows, inputs // block.inputs * block.num_bytes
            assert self._codes is not None
            found, type_ = self._codes.shape(key), self._codes.type(key)
            if found != wanted or type_ != "U8" or inputs % block.inputs:
                said = f"{key} is {type_} {list(found)}, not the {kind} codes of a matrix {[rows, inputs]}"
                raise WeightError(f"{self.path / CODES_FILE}: {said}")

    def _hint(self, unknown: list[str]) -> str:
        return f"; it has {unknown[0]!r}, which its family does not know" if unknown else ""


def _is_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tables hold the same numbers; unlike ones are told apart by their first rows."""
    if one.shape != other.shape:
        return False
    parts = (slice(start, start + 1024) for start in range(0, len(one), 1024))
    return all(np.array_equal(one[p].astype(np.float32), other[p].astype(np.float32)) for p in parts)


def split_layer(layer: LayerWeights, spec: ModelSpec) -> Iterator[tuple[str, np.ndarray]]:
    """A layer of plain tensors by the names, and in the layout, that its family's files have."""
    starts: dict[str, int] = {}
    for tensor in layer_tensors(spec):
        merged, start = getattr(layer, tensor.field), starts.get(tensor.field, 0)
        rows = tensor.shape[1] if tensor.order is Order.CONV1D else tensor.shape[0]
        starts[tensor.field] = start + rows
        yield tensor.name, tensor.write(merged[start : start + rows], spec)


def quantise_layer(layer: LayerWeights) -> None:
    """The layer's matrices become int8, one after the other."""
    for name in MATRICES:
        matrix = getattr(layer, name)
        if not isinstance(matrix, Int8Matrix):
            setattr(layer, name, quantise(matrix))


def _open(file: Path) -> TensorFile:
    try:
        refuse_pointer(file)
        return TensorFile(file)
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file} is not a readable safetensors file: {error}") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder; WeightError if there are none or one is missing."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightError(f"{index} has no weight_map: it does not say in which files the tensors are")
        given = [*weight_map.values()]
        if outside := [
            name for name in given if not isinstance(name, str) or Path(name).name != name or len(name) > 255
        ]:
            raise WeightError(f"{index} names {outside[0]!r:.100}, which is not a file beside it")
        names = sorted({*given})
        missing = [repr(name) for name in names if not (path / name).is_file()]
        if missing:
            raise WeightError(f"{path} lacks {', '.join(missing)}, which its index names")
        return [path / name for name in names]
    files = sorted(file for file in path.glob("*.safetensors") if file.name != CODES_FILE)
    if not files:
        other = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)]
        hint = f"; {other[0]} is a pickle and is never read: convert it to safetensors" if other else ""
        raise WeightError(f"{path} has no safetensors file{hint}")
    return files


def _plain(name: str) -> str:
    """Without the wrapper module's prefix, which base-model checkpoints lack."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _copied(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy even when nothing changes: a view of the map would keep the file mapped, and page in under load."""
    return np.ascontiguousarray(tensor).astype(dtype)


def _joined(parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """One below the other."""
    return np.concatenate([part.astype(dtype, copy=False) for part in parts])
