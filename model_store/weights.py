"""Opens safetensors checkpoints and turns each family's tensor names and layouts into one.

E = hidden, H = query heads, K = KV heads, D = head dim, I = MLP width, V = vocabulary, P = positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open

from model_store.spec import ModelSpec

# Buffers that old checkpoints carry; computed, not learned.
_BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "attn.bias", "attn.masked_bias")
_PREFIXES = ("model.", "gpt_neox.", "transformer.")


class WeightError(ValueError):
    """A checkpoint that lacks tensors, has unknown ones, or is not safetensors."""


@dataclass(slots=True, eq=False)
class LayerWeights:
    """One decoder layer. `qkv` rows are all q heads, then k, then v; gated `up` rows are all of gate, then up."""

    attn_norm_weight: torch.Tensor  # [E]
    qkv_weight: torch.Tensor  # [(H + 2K) D, E]
    o_weight: torch.Tensor  # [E, H D]
    mlp_norm_weight: torch.Tensor  # [E]
    up_weight: torch.Tensor  # [2I, E] gated, else [I, E]
    down_weight: torch.Tensor  # [E, I]
    attn_norm_bias: torch.Tensor | None = None
    qkv_bias: torch.Tensor | None = None
    q_norm_weight: torch.Tensor | None = None  # [D]
    k_norm_weight: torch.Tensor | None = None  # [D]
    o_bias: torch.Tensor | None = None
    mlp_norm_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        return (value for f in fields(self) if (value := getattr(self, f.name)) is not None)


@dataclass(slots=True, eq=False)
class EndWeights:
    """What surrounds the layers. `head` is the same tensor object as `embed` when they are tied."""

    embed: torch.Tensor  # [V, E]
    final_norm_weight: torch.Tensor  # [E]
    head: torch.Tensor  # [V, E]
    positions: torch.Tensor | None = None  # [P, E]
    final_norm_bias: torch.Tensor | None = None
    head_bias: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        return (value for f in fields(self) if (value := getattr(self, f.name)) is not None)


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
        self._files = {name: safe_open(name, "pt") for name in weight_files(self.path)}
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

    def layer(self, index: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> LayerWeights:
        """One layer in the common layout; each merged tensor is built and moved before the next is read."""

        def place(tensor: torch.Tensor) -> torch.Tensor:
            # A clone even when nothing changes: a view of the map would keep the whole file's mapping alive and slow.
            return tensor.to(device=device, dtype=dtype, copy=True).contiguous()

        return _LAYERS[self.spec.family](self, index, place)

    def ends(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> EndWeights:
        def place(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=dtype, copy=True).contiguous()

        names = _ENDS[self.spec.family]
        embed = place(self.tensor(names["embed"]))
        head_name = next((n for n in ("lm_head.weight", "embed_out.weight") if n in self), None)
        tied = self.spec.tie_word_embeddings or head_name is None
        if tied and head_name:
            self._used.add(head_name)
        return EndWeights(
            embed=embed,
            final_norm_weight=place(self.tensor(names["norm"] + ".weight")),
            final_norm_bias=place(self.tensor(names["norm"] + ".bias")) if self.spec.norm == "layer" else None,
            head=embed if tied else place(self.tensor(head_name)),
            head_bias=place(self.tensor("lm_head.bias")) if "lm_head.bias" in self else None,
            positions=place(self.tensor("wpe.weight")) if self.spec.learned_positions else None,
        )

    def unused(self) -> list[str]:
        """Tensors nobody asked for, known buffers aside: after a full load this must be empty."""
        return sorted(n for n in self._where if n not in self._used and not n.endswith(_BUFFERS))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder; WeightError if there are none or one is missing."""
    index = path / "model.safetensors.index.json"
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


Place = Callable[[torch.Tensor], torch.Tensor]


def _llama_layer(checkpoint: Checkpoint, index: int, place: Place) -> LayerWeights:
    base = f"layers.{index}."

    def get(name: str) -> torch.Tensor:
        return checkpoint.tensor(base + name)

    def merged(*names: str) -> torch.Tensor:
        return place(torch.cat([get(name) for name in names]))

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
