"""The shape of a model, read from its Hugging Face config: everything the one decoder layer needs to know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from model_store.errors import BoomerangError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")


class SpecError(BoomerangError, ValueError):
    """A model this server cannot run, with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Counts are of units, sizes of channels. `attention_scale` multiplies q.k before the softmax."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh"]
    gated_mlp: bool
    parallel_residual: bool
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rotary_dim: int  # channels of a head that are rotated; 0 = no rotary embedding
    rope_theta: float
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    learned_positions: bool = False
    max_position_embeddings: int
    sliding_window: int | None = None  # contexts up to it are exact; the engine never goes beyond
    tie_word_embeddings: bool
    attention_scale: float

    @property
    def max_context(self) -> int:
        """Positions for which this implementation is exact."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a layer's matrices by name."""
        up = self.intermediate_size * (2 if self.gated_mlp else 1)
        return {
            "qkv_weight": (self.q_size + 2 * self.kv_size, self.hidden_size),
            "o_weight": (self.hidden_size, self.q_size),
            "up_weight": (up, self.hidden_size),
            "down_weight": (self.hidden_size, self.intermediate_size),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, biases and norms included."""
        e, norm_width, shapes = self.hidden_size, 2 if self.norm == "layer" else 1, self.matrix_shapes
        qkv, up = shapes["qkv_weight"][0], shapes["up_weight"][0]
        count = sum(outputs * inputs for outputs, inputs in shapes.values()) + 2 * norm_width * e
        count += qkv * self.qkv_bias + e * self.o_bias + (up + e) * self.mlp_bias
        return count + (2 * self.head_dim if self.qk_norm else 0)

    def kv_bytes_per_token_layer(self, bytes_per_value: int) -> int:
        return 2 * self.kv_size * bytes_per_value

    def rope_inv_freq(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies, float32 [rotary_dim / 2], and the factor that scales cos and sin.

        Linear scaling divides positions; llama3 scaling (Llama 3.1 model card) stretches long wavelengths only; yarn
        (arXiv 2309.00071) ramps between both and scales attention.
        """
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
        inv_freq = 1.0 / (self.rope_theta**exponents)
        scaling = self.rope_scaling or {}
        kind = scaling.get("rope_type", "default")
        if kind == "linear":
            return inv_freq / scaling["factor"], 1.0
        if kind == "llama3":
            return _llama3(inv_freq, scaling), 1.0
        if kind == "yarn":
            return _yarn(inv_freq, scaling, self.rotary_dim, self.rope_theta, self.max_position_embeddings)
        return inv_freq, 1.0

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """From the contents of a `config.json`. Raises SpecError for what cannot be run exactly."""
        family = config.get("model_type", "?")
        if family not in FAMILIES:
            raise SpecError(f"model family {family!r} is not supported (supported: {', '.join(FAMILIES)})")
        return {"gpt2": _gpt2, "gpt_neox": _gpt_neox}.get(family, _llama_like)(config)


def _llama_like(config: Mapping[str, Any]) -> ModelSpec:
    family = config["model_type"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta, scaling = _rope(config)
    attention_bias = bool(config.get("attention_bias", False))
    window = config.get("sliding_window")
    if family in ("qwen2", "qwen3"):
        window = window if config.get("use_sliding_window") else None
    elif family == "llama":
        window = None
    if config.get("layer_types") and "sliding_attention" not in config["layer_types"]:
        window = None
    return ModelSpec(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=_activation(config.get("hidden_act", "silu")),
        gated_mlp=True,
        parallel_residual=False,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        rotary_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        sliding_window=window,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_scale=head_dim**-0.5,
    )


def _gpt_neox(config: Mapping[str, Any]) -> ModelSpec:
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    theta, scaling = _rope(config)
    fraction = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    bias = bool(config.get("attention_bias", True))
    return ModelSpec(
        family="gpt_neox",
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        norm="layer",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        activation=_activation(config.get("hidden_act", "gelu")),
        gated_mlp=False,
        parallel_residual=bool(config.get("use_parallel_residual", True)),
        qk_norm=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        rotary_dim=int(head_dim * fraction),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_scale=head_dim**-0.5,
    )


def _gpt2(config: Mapping[str, Any]) -> ModelSpec:
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("add_cross_attention"):
        raise SpecError("GPT-2 with attention scaled by layer index or with cross attention is not supported")
    heads, hidden = config.get("n_head", 12), config.get("n_embd", 768)
    head_dim = hidden // heads
    return ModelSpec(
        family="gpt2",
        num_layers=config.get("n_layer", 12),
        hidden_size=hidden,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=_activation(config.get("activation_function", "gelu_new")),
        gated_mlp=False,
        parallel_residual=False,
        qk_norm=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rotary_dim=0,
        rope_theta=0.0,
        learned_positions=True,
        max_position_embeddings=config.get("n_positions", 1024),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        attention_scale=head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0,
    )


def _activation(name: str) -> Literal["silu", "gelu", "gelu_tanh"]:
    known = {
        "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
    }  # fmt: skip
    if name not in known:
        raise SpecError(f"activation {name!r} is not supported")
    return known[name]


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling from either spelling: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0
    parameters.pop("partial_rotary_factor", None)
    kind = parameters.get("rope_type") or parameters.pop("type", "default")
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3", "yarn"):
        raise SpecError(f"rope type {kind!r} is not supported: its angles depend on the batch or on the context length")
    return float(theta), parameters | {"rope_type": kind}


def _llama3(inv_freq: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    is_between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(is_between, blended, scaled)


def _yarn(
    inv_freq: torch.Tensor, scaling: Mapping[str, Any], dim: int, theta: float, max_positions: int
) -> tuple[torch.Tensor, float]:
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or max_positions
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1

    def channel(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(fast), channel(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), float(attention)
