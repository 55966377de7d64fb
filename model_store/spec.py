"""The shape of a model: everything the one decoder layer needs to know, as transformers reads its config.

Defaults, migrations of old spellings and rotary frequencies are those of the installed transformers; what is ours is
which of its models this server computes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from model_store.errors import BoomerangError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip
# The most of what a config may count, far above any model: beyond, something is damaged, and would be allocated.
_MOST = {
    "num_hidden_layers": 1 << 12, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14, "head_dim": 1 << 14, "vocab_size": 1 << 25, "max_position_embeddings": 1 << 31,
    "n_layer": 1 << 12, "n_embd": 1 << 20, "n_inner": 1 << 22, "n_head": 1 << 14, "n_positions": 1 << 31,
}  # fmt: skip


class SpecError(BoomerangError, ValueError):
    """A model this server cannot run, with the reason."""


def int8_kv_bytes(num_kv_heads: int, head_dim: int) -> int:
    """Of K and V of one token of one layer: a byte per value; float16 scales, of K per 32 channels, of V per head."""
    return num_kv_heads * (2 * head_dim + 2 * (-(-head_dim // 32) + 1))


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
    # Frequencies in radians per position, float32 [rotary_dim / 2]; none: `rope_theta` ** (-2 i / rotary_dim).
    inv_freq: tuple[float, ...] | None = None
    rope_factor: float = 1.0  # multiplies cos and sin
    rope_theta: float = field(default=10000.0, compare=False)  # how the frequencies were described, for files written
    rope_scaling: dict[str, Any] | None = field(default=None, compare=False)
    learned_positions: bool = False
    max_position_embeddings: int
    sliding_window: int | None = None  # contexts up to it are exact; the engine never goes beyond
    layer_types: tuple[str, ...] = ()  # "full_attention" or "sliding_attention"; () where all layers are alike
    tie_word_embeddings: bool
    attention_scale: float
    notes: tuple[str, ...] = field(default=(), compare=False)  # what of a checkpoint is not as its config says

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

    def kv_bytes_per_token_layer(self, bytes_per_value: int, kv_cache_dtype: str = "auto") -> int:
        if kv_cache_dtype == "int8":
            return int8_kv_bytes(self.num_kv_heads, self.head_dim)
        return 2 * self.kv_size * bytes_per_value

    def rope_inv_freq(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies, float32 [rotary_dim / 2], and the factor that scales cos and sin."""
        if self.inv_freq is None:
            return _plain_frequencies(self.rope_theta, self.rotary_dim), self.rope_factor
        return torch.tensor(self.inv_freq, dtype=torch.float32), self.rope_factor

    @classmethod
    def from_hf_config(cls, raw: Mapping[str, Any]) -> ModelSpec:
        """From the contents of a `config.json`; imports transformers. SpecError for what cannot be run exactly."""
        config = resolved_config(raw)
        _check_counts(config)
        family, heads, hidden = config.model_type, config.num_attention_heads, config.hidden_size
        head_dim = hidden // heads
        if family in ("gpt2", "gpt_neox"):
            if hidden % heads or (getattr(config, "head_dim", None) or head_dim) != head_dim:
                raise SpecError(f"heads of hidden_size {hidden} / num_attention_heads {heads} channels are expected")
        else:
            own = getattr(config, "head_dim", None)
            head_dim = head_dim if own is None else own
        if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not 1 <= head_dim <= _MOST["head_dim"]:
            raise SpecError(f"head_dim is {head_dim!r}, not a count between 1 and {_MOST['head_dim']}")
        if not getattr(config, "is_causal", True):
            raise SpecError("is_causal is false: a model whose tokens see those after them generates no text")
        windows = _windows(config)
        common: dict[str, Any] = {
            "family": family, "num_layers": config.num_hidden_layers, "hidden_size": hidden, "num_heads": heads,
            "head_dim": head_dim, "vocab_size": config.vocab_size, "attention_scale": head_dim**-0.5,
            "max_position_embeddings": config.max_position_embeddings, "layer_types": windows[1],
            "tie_word_embeddings": bool(config.tie_word_embeddings), "sliding_window": windows[0],
        }  # fmt: skip
        if family == "gpt2":
            spec = cls(**common | _gpt2(config))
        else:
            make = _gpt_neox if family == "gpt_neox" else _llama_like
            spec = cls(**common | make(config) | _rope(config, head_dim))
        _check(spec)
        return spec


def resolved_config(raw: Mapping[str, Any]) -> Any:
    """The transformers config that `raw` stands for, defaults filled in and old spellings migrated.

    SpecError for a family, a quantised checkpoint or values that are refused.
    """
    if not isinstance(raw, Mapping):
        raise SpecError(f"config.json is a JSON {type(raw).__name__}, not an object")
    family = raw.get("model_type")
    if family not in FAMILIES:
        said = f"model family {family!r} is not supported" if family else "config.json names no model_type"
        raise SpecError(f"{said} (supported: {', '.join(FAMILIES)})")
    if refusal := quantised_as(raw):
        raise SpecError(refusal)
    for key, most in _MOST.items():
        value = raw.get(key)
        if isinstance(value, int | float) and value > most:
            raise SpecError(f"{key} is {value}: no model has more than {most}, the config is damaged")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[family].from_dict(copy.deepcopy(dict(raw)))
    except Exception as error:  # whatever a validator of transformers makes of a value
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SpecError(f"transformers does not take this config: {reason}") from error


def quantised_as(raw: Mapping[str, Any]) -> str | None:
    """What to say of a checkpoint that its config calls quantised; None for one that it does not."""
    found = [raw[key] for key in ("quantization_config", "compression_config") if raw.get(key) is not None]
    if not found:
        return None
    quantization = found[0]
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if isinstance(quantization, Mapping) and not method:
        method = "bitsandbytes" if any(str(key).startswith("load_in_") for key in quantization) else "unknown method"
    values = quantization if isinstance(quantization, Mapping) else {}
    kind = ", ".join([str(method), *(f"{values[key]} bits" for key in ("bits", "w_bit") if values.get(key))])
    return (
        f"this checkpoint is quantised ({kind}; quantization_config in config.json), and quantised checkpoints are not "
        "supported: take the original one, and --quantization int8 to save memory"
    )


def _llama_like(config: Any) -> dict[str, Any]:
    """Biases as the modelling code of each family has them, whatever the config says."""
    family = config.model_type
    bias = family in ("llama", "qwen3") and bool(config.attention_bias)
    return {
        "intermediate_size": config.intermediate_size, "num_kv_heads": config.num_key_value_heads, "norm": "rms",
        "norm_eps": config.rms_norm_eps, "activation": _activation(config.hidden_act), "gated_mlp": True,
        "parallel_residual": False, "qk_norm": family == "qwen3", "qkv_bias": family == "qwen2" or bias,
        "o_bias": bias, "mlp_bias": family == "llama" and bool(config.mlp_bias),
    }  # fmt: skip


def _gpt_neox(config: Any) -> dict[str, Any]:
    bias = bool(config.attention_bias)
    return {
        "intermediate_size": config.intermediate_size, "num_kv_heads": config.num_attention_heads, "norm": "layer",
        "norm_eps": config.layer_norm_eps, "activation": _activation(config.hidden_act), "gated_mlp": False,
        "parallel_residual": bool(config.use_parallel_residual), "qk_norm": False, "qkv_bias": bias, "o_bias": bias,
        "mlp_bias": True,
    }  # fmt: skip


def _gpt2(config: Any) -> dict[str, Any]:
    if config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        raise SpecError("GPT-2 with attention scaled by layer index or with cross attention is not supported")
    changes = {} if config.scale_attn_weights else {"attention_scale": 1.0}
    return changes | {
        "intermediate_size": 4 * config.n_embd if config.n_inner is None else config.n_inner,
        "num_kv_heads": config.n_head, "norm": "layer", "norm_eps": config.layer_norm_epsilon,
        "activation": _activation(config.activation_function), "gated_mlp": False, "parallel_residual": False,
        "qk_norm": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "rotary_dim": 0,
        "learned_positions": True,
    }  # fmt: skip


def _activation(name: Any) -> Literal["silu", "gelu", "gelu_tanh"]:
    if name not in _ACTIVATIONS:
        raise SpecError(f"activation {name!r} is not supported")
    return _ACTIVATIONS[name]


def _windows(config: Any) -> tuple[int | None, tuple[str, ...]]:
    """The narrowest window of any layer, and the layers' types where the family has types by layer."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        return window, ()
    if config.model_type not in ("qwen2", "qwen3"):
        return None, ()
    types = tuple(config.layer_types)
    if len(types) != config.num_hidden_layers:
        raise SpecError(f"layer_types names {len(types)} layers, num_hidden_layers is {config.num_hidden_layers}")
    if unknown := {*types} - {"full_attention", "sliding_attention"}:
        raise SpecError(f"layer_types: {min(unknown)!r} is not supported")
    if "sliding_attention" not in types:
        return None, types
    if window is None:
        raise SpecError("layer_types names sliding_attention, and no sliding_window is in use")
    return window, types


def _plain_frequencies(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _rope(config: Any, head_dim: int) -> dict[str, Any]:
    """Frequencies by the functions of transformers, which know every key of every kind."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters.get("rope_type")
    if kind is None:
        raise SpecError("rope_parameters has no rope_type: frequencies by layer type are not supported")
    if kind not in _ROPE_TYPES:
        raise SpecError(f"rope type {kind!r} is not supported: its angles depend on the batch or on the context length")
    try:
        theta = float(parameters["rope_theta"])
        if kind == "default":
            # As the modelling code has it: of these families only GPT-NeoX rotates a part of a head.
            share = parameters.get("partial_rotary_factor", 1.0) if config.model_type == "gpt_neox" else 1.0
            inv_freq, factor = _plain_frequencies(theta, int(head_dim * share)), 1.0
        else:
            inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise SpecError(f"rope_parameters {parameters}: {type(error).__name__}: {error}") from error
    dim = 2 * len(inv_freq)
    if dim > head_dim or (dim < head_dim and config.model_type != "gpt_neox"):
        raise SpecError(f"rope_parameters {parameters} rotate {dim} of {head_dim} channels, which the family does not")
    if not (bool(inv_freq.isfinite().all()) and math.isfinite(factor)):
        raise SpecError(f"rope_parameters {parameters} give angles that are no numbers")
    scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
    return {
        "rotary_dim": dim, "inv_freq": tuple(inv_freq.float().tolist()), "rope_factor": float(factor),
        "rope_theta": theta, "rope_scaling": None if kind == "default" else scaling,
    }  # fmt: skip


def _check_counts(config: Any) -> None:
    """Counts that no validator of transformers bounds; before anything is divided by them."""
    names = ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"]
    if config.model_type not in ("gpt2", "gpt_neox"):
        names += ["intermediate_size", "num_key_value_heads"]
    for name in names:
        count = getattr(config, name)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST[name]:
            raise SpecError(f"{name} is {count!r}, not a count between 1 and {_MOST[name]}")


def _check(spec: ModelSpec) -> None:
    most = _MOST["intermediate_size"]
    if not 1 <= spec.intermediate_size <= most:
        raise SpecError(f"intermediate_size is {spec.intermediate_size!r}, not a count between 1 and {most}")
    if spec.num_heads % spec.num_kv_heads:
        raise SpecError(f"num_attention_heads {spec.num_heads} is no multiple of {spec.num_kv_heads} key/value heads")
    if spec.sliding_window is not None and spec.sliding_window < 1:
        raise SpecError(f"sliding_window is {spec.sliding_window}")
    if not (math.isfinite(spec.norm_eps) and spec.norm_eps >= 0):
        raise SpecError(f"the norms' epsilon is {spec.norm_eps}")
