"""Opens safetensors checkpoints and turns each family's tensor names and layouts into one.

E = hidden, H = query heads, K = KV heads, D = head dim, I = MLP width, V = vocabulary, P = positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model_store.errors import BoomerangError
from model_store.int8 import Int8Matrix, Matrix, quantise, tensors_of
from model_store.spec import ModelSpec
from model_store.weight_form import Storage, WeightForm

# Buffers that old checkpoints carry; computed, not learned.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")
_PREFIXES = ("model.", "gpt_neox.", "transformer.")
END_PARTS = ("embed", "norm", "head")
MATRICES = ("qkv_weight", "o_weight", "up_weight", "down_weight")  # of a layer


class WeightError(BoomerangError, ValueError):
    """A checkpoint that lacks tensors, has unknown ones, or is not safetensors."""


@dataclass(slots=True, eq=False)
class LayerWeights:
    """One decoder layer. `qkv` rows are all q heads, then k, then v; gated `up` rows are all of gate, then up.

    A Matrix is a tensor, or int8 with scales.
    """

    attn_norm_weight: torch.Tensor  # [E]
    qkv_weight: Matrix  # [(H + 2K) D, E]
    o_weight: Matrix  # [E, H D]
    mlp_norm_weight: torch.Tensor  # [E]
    up_weight: Matrix  # [2I, E] gated, else [I, E]
    down_weight: Matrix  # [E, I]
    attn_norm_bias: torch.Tensor | None = None
    qkv_bias: torch.Tensor | None = None
    q_norm_weight: torch.Tensor | None = None  # [D]
    k_norm_weight: torch.Tensor | None = None  # [D]
    o_bias: torch.Tensor | None = None
    mlp_norm_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        return (tensor for f in fields(self) for tensor in tensors_of(getattr(self, f.name)))


@dataclass(slots=True, eq=False)
class EndWeights:
    """What surrounds the layers, in three parts: embed (with positions), norm, head.

    `head` is the same object as `embed` when they are tied; only then can the embedding be int8.
    """

    embed: Matrix  # [V, E]
    final_norm_weight: torch.Tensor  # [E]
    head: Matrix  # [V, E]
    positions: torch.Tensor | None = None  # [P, E]
    final_norm_bias: torch.Tensor | None = None
    head_bias: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        return (tensor for f in fields(self) for tensor in tensors_of(getattr(self, f.name)))


class Checkpoint:
    """A folder with config.json and safetensors. Tensors are read one at a time, through a memory map."""

    def __init__(self, path: Path | str) -> None:
        """Raises WeightError if there is no safetensors file (other formats can run code when read)."""
        self.path = Path(path)
        config_file = self.path / "config.json"
        if not config_file.is_file():
            raise WeightError(f"{self.path} has no config.json")
        self.config = json.loads(config_file.read_text())
        self.spec = ModelSpec.from_hf_config(self.config)
        self._files = {file: _open(file) for file in weight_files(self.path)}
        self._where = {_plain(key): (file, key) for file, handle in self._files.items() for key in handle.keys()}  # noqa: SIM118
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._where:
            raise WeightError(f"{self.path} lacks the tensor {name!r}")
        self._used.add(name)
        file, key = self._where[name]
        return self._files[file].get_tensor(key)

    def layer(self, index: int, form: WeightForm, device: torch.device | str = "cpu") -> LayerWeights:
        """One layer in the common layout; each merged tensor is built and moved before the next is read."""
        layer = _LAYERS[self.spec.family](self, index, _placer(form.dtype, device))
        for name, shape in self.spec.matrix_shapes.items():
            if tuple(getattr(layer, name).shape) != shape:
                found = list(getattr(layer, name).shape)
                raise WeightError(f"{self.path}: layer {index} {name} is {found}, its config says {list(shape)}")
        if form.storage is Storage.INT8:
            quantise_layer(layer)
        return layer

    def end_tensors(
        self, form: WeightForm, device: torch.device | str = "cpu", parts: Collection[str] = END_PARTS
    ) -> dict[str, Matrix | None]:
        """The EndWeights fields of some `parts`; a tied head is the very object of the embedding if both are asked.

        What is quantised is the head, and an embedding that is tied to it.
        """
        place, names = _placer(form.dtype, device), _ENDS[self.spec.family]
        placed_head = (lambda tensor: quantise(place(tensor))) if form.storage is Storage.INT8 else place
        tensors: dict[str, Matrix | None] = {}
        embed_name, head_name = names["embed"], self.head_name
        if "embed" in parts:
            tensors["embed"] = (placed_head if head_name == embed_name else place)(self.tensor(embed_name))
            tensors["positions"] = place(self.tensor("wpe.weight")) if self.spec.learned_positions else None
        if "norm" in parts:
            tensors["final_norm_weight"] = place(self.tensor(names["norm"] + ".weight"))
            has_bias = self.spec.norm == "layer"
            tensors["final_norm_bias"] = place(self.tensor(names["norm"] + ".bias")) if has_bias else None
        if "head" in parts:
            is_loaded = head_name == embed_name and "embed" in tensors
            tensors["head"] = tensors["embed"] if is_loaded else placed_head(self.tensor(head_name))
            tensors["head_bias"] = place(self.tensor("lm_head.bias")) if "lm_head.bias" in self else None
        return tensors

    def ends(self, form: WeightForm, device: torch.device | str = "cpu") -> EndWeights:
        return EndWeights(**self.end_tensors(form, device))

    @property
    def head_name(self) -> str:
        """Name of the head's tensor: the embedding's where they are tied or no head was saved."""
        head = next((name for name in ("lm_head.weight", "embed_out.weight") if name in self), None)
        if self.spec.tie_word_embeddings or head is None:
            if head:
                self._used.add(head)  # a copy of the embedding that some tools save too
            return _ENDS[self.spec.family]["embed"]
        return head

    def end_names(self, part: str) -> list[str]:
        """Names of the tensors of an end part ("embed", "norm", "head") in this checkpoint."""
        names = _ENDS[self.spec.family]
        wanted = {
            "embed": [names["embed"], "wpe.weight"],
            "norm": [names["norm"] + ".weight", names["norm"] + ".bias"],
            "head": [self.head_name, "lm_head.bias"],
        }[part]
        return [name for name in wanted if name in self]

    def unused(self) -> list[str]:
        """Tensors nobody asked for, known buffers aside: after a full load this must be empty."""
        return sorted(n for n in self._where if n not in self._used and not n.endswith(_BUFFERS))


def quantise_layer(layer: LayerWeights) -> None:
    """The layer's matrices become int8, one after the other."""
    for name in MATRICES:
        matrix = getattr(layer, name)
        if not isinstance(matrix, Int8Matrix):
            setattr(layer, name, quantise(matrix))


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise WeightError(f"{file} is not a readable safetensors file: {error}") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder; WeightError if there are none or one is missing."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise WeightError(f"{path} lacks {', '.join(missing)}, which its index names")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
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


Place = Callable[..., torch.Tensor]


def _placer(dtype: torch.dtype, device: torch.device | str) -> Place:
    def place(tensor: torch.Tensor, is_fresh: bool = False) -> torch.Tensor:
        # A copy even when nothing changes: a view of the map would keep the whole file mapped, and page in under load.
        return tensor.to(device=device, dtype=dtype, copy=not is_fresh).contiguous()

    return place


def _llama_layer(checkpoint: Checkpoint, index: int, place: Place) -> LayerWeights:
    base = f"layers.{index}."

    def get(name: str) -> torch.Tensor:
        return checkpoint.tensor(base + name)

    def merged(*names: str) -> torch.Tensor:
        return place(torch.cat([get(name) for name in names]), is_fresh=True)

    spec = checkpoint.spec
    qkv = [f"self_attn.{p}_proj" for p in "qkv"]
    up = ["mlp.gate_proj", "mlp.up_proj"]
    return LayerWeights(
        attn_norm_weight=place(get("input_layernorm.weight")),
        qkv_weight=merged(*(n + ".weight" for n in qkv)),
        qkv_bias=merged(*(n + ".bias" for n in qkv)) if spec.qkv_bias else None,
        q_norm_weight=place(get("self_attn.q_norm.weight")) if spec.qk_norm else None,
        k_norm_weight=place(get("self_attn.k_norm.weight")) if spec.qk_norm else None,
        o_weight=place(get("self_attn.o_proj.weight")),
        o_bias=place(get("self_attn.o_proj.bias")) if spec.o_bias else None,
        mlp_norm_weight=place(get("post_attention_layernorm.weight")),
        up_weight=merged(*(n + ".weight" for n in up)),
        up_bias=merged(*(n + ".bias" for n in up)) if spec.mlp_bias else None,
        down_weight=place(get("mlp.down_proj.weight")),
        down_bias=place(get("mlp.down_proj.bias")) if spec.mlp_bias else None,
    )


def _gpt_neox_layer(checkpoint: Checkpoint, index: int, place: Place) -> LayerWeights:
    base, spec = f"layers.{index}.", checkpoint.spec

    def get(name: str) -> torch.Tensor:
        return checkpoint.tensor(base + name)

    def split_heads(fused: torch.Tensor) -> torch.Tensor:
        # The file interleaves q, k, v per head: [heads, 3, D, ...] -> [3, heads, D, ...].
        shape = (spec.num_heads, 3, spec.head_dim, *fused.shape[1:])
        return fused.view(shape).transpose(0, 1).reshape(fused.shape)

    return LayerWeights(
        attn_norm_weight=place(get("input_layernorm.weight")),
        attn_norm_bias=place(get("input_layernorm.bias")),
        qkv_weight=place(split_heads(get("attention.query_key_value.weight"))),
        qkv_bias=place(split_heads(get("attention.query_key_value.bias"))) if spec.qkv_bias else None,
        o_weight=place(get("attention.dense.weight")),
        o_bias=place(get("attention.dense.bias")) if spec.o_bias else None,
        mlp_norm_weight=place(get("post_attention_layernorm.weight")),
        mlp_norm_bias=place(get("post_attention_layernorm.bias")),
        up_weight=place(get("mlp.dense_h_to_4h.weight")),
        up_bias=place(get("mlp.dense_h_to_4h.bias")),
        down_weight=place(get("mlp.dense_4h_to_h.weight")),
        down_bias=place(get("mlp.dense_4h_to_h.bias")),
    )


def _gpt2_layer(checkpoint: Checkpoint, index: int, place: Place) -> LayerWeights:
    def get(name: str) -> torch.Tensor:
        return checkpoint.tensor(f"h.{index}.{name}")

    # Conv1D keeps [in, out].
    return LayerWeights(
        attn_norm_weight=place(get("ln_1.weight")),
        attn_norm_bias=place(get("ln_1.bias")),
        qkv_weight=place(get("attn.c_attn.weight").T),
        qkv_bias=place(get("attn.c_attn.bias")),
        o_weight=place(get("attn.c_proj.weight").T),
        o_bias=place(get("attn.c_proj.bias")),
        mlp_norm_weight=place(get("ln_2.weight")),
        mlp_norm_bias=place(get("ln_2.bias")),
        up_weight=place(get("mlp.c_fc.weight").T),
        up_bias=place(get("mlp.c_fc.bias")),
        down_weight=place(get("mlp.c_proj.weight").T),
        down_bias=place(get("mlp.c_proj.bias")),
    )


_LAYERS = {
    "llama": _llama_layer,
    "mistral": _llama_layer,
    "qwen2": _llama_layer,
    "qwen3": _llama_layer,
    "gpt_neox": _gpt_neox_layer,
    "gpt2": _gpt2_layer,
}
_LLAMA_ENDS = {"embed": "embed_tokens.weight", "norm": "norm"}
_ENDS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA_ENDS),
    "gpt_neox": {"embed": "embed_in.weight", "norm": "final_layer_norm"},
    "gpt2": {"embed": "wte.weight", "norm": "ln_f"},
}
