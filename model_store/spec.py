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

import numpy as np

from model_store.arrays import need_torch
from model_store.errors import BoomerangError
from model_store.families import FAMILIES, Family, why_not

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
Rope = Literal["none", "global", "local"]
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
    qk_norm_of_all: bool = False  # over the channels of all heads together, not of each
    norm_before: bool = True  # attention and the MLP take the normed hidden state
    norm_after: bool = False  # what they give is normed before it is added
    norm_offset: float = 0.0  # added to the weights of norms
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the MLP add to the hidden state
    logit_scale: float = 1.0
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rotary_dim: int  # channels of a head that are rotated; 0 = no rotary embedding
    # Frequencies in radians per position, float32 [rotary_dim / 2]; none: `rope_theta` ** (-2 i / rotary_dim).
    inv_freq: tuple[float, ...] | None = None
    rope_factor: float = 1.0  # multiplies cos and sin
    rope_theta: float = field(default=10000.0, compare=False)  # how the frequencies were described, for files written
    rope_scaling: dict[str, Any] | None = field(default=None, compare=False)
    local_inv_freq: tuple[float, ...] | None = None  # of layers with a sliding window, where they have their own
    unrotated_layers: tuple[int, ...] = ()
    learned_positions: bool = False
    max_position_embeddings: int  # for which this implementation is exact
    sliding_window: int | None = None  # a token sees so many, itself among them, in layers that have a window
    layer_types: tuple[str, ...] = ()  # "full_attention" or "sliding_attention"; () where all layers are alike
    tie_word_embeddings: bool
    attention_scale: float
    notes: tuple[str, ...] = field(default=(), compare=False)  # what of a checkpoint is not as its config says

    @property
    def max_context(self) -> int:
        """Positions for which this implementation is exact."""
        return self.max_position_embeddings

    def window(self, layer: int) -> int | None:
        """How many tokens a token sees in this layer; None: all before it."""
        if self.sliding_window is None or (self.layer_types and self.layer_types[layer] != "sliding_attention"):
            return None
        return self.sliding_window

    def rope(self, layer: int) -> Rope:
        """Which angles the layer's queries and keys are turned by."""
        if not self.rotary_dim or layer in self.unrotated_layers:
            return "none"
        return "local" if self.local_inv_freq is not None and self.window(layer) is not None else "global"

    @property
    def input_scale(self) -> float:
        """What the embedding is multiplied by, where `residual_scale` is taken out of the layers: the hidden state is
        divided by it, which norms do not see but for their epsilon (`stream_eps`)."""
        return self.embedding_scale / self.residual_scale

    @property
    def stream_eps(self) -> float:
        """Epsilon of the norms of such a hidden state."""
        return self.norm_eps / self.residual_scale**2

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
        num_norms = 2 * self.norm_before + 2 * self.norm_after
        count = sum(outputs * inputs for outputs, inputs in shapes.values()) + num_norms * norm_width * e
        count += qkv * self.qkv_bias + e * self.o_bias + (up + e) * self.mlp_bias
        return count + (sum(self.qk_norm_widths) if self.qk_norm else 0)

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """Channels of the norms of queries and of keys."""
        return (self.q_size, self.kv_size) if self.qk_norm_of_all else (self.head_dim, self.head_dim)

    def kv_bytes_per_token_layer(self, bytes_per_value: int, kv_cache_dtype: str = "auto") -> int:
        if kv_cache_dtype == "int8":
            return int8_kv_bytes(self.num_kv_heads, self.head_dim)
        return 2 * self.kv_size * bytes_per_value

    def rope_inv_freq(self, rope: Rope = "global") -> tuple[np.ndarray, float]:
        """Inverse frequencies, float32 [rotary_dim / 2], and the factor that scales cos and sin; not for "none"."""
        if rope == "local":
            return np.array(self.local_inv_freq, np.float32), 1.0
        if self.inv_freq is None:
            return _plain_frequencies(self.rope_theta, self.rotary_dim), self.rope_factor
        return np.array(self.inv_freq, np.float32), self.rope_factor

    @classmethod
    def from_hf_config(cls, raw: Mapping[str, Any]) -> ModelSpec:
        """From the contents of a `config.json`; imports transformers. SpecError for what cannot be run exactly."""
        config = resolved_config(raw)
        _check_counts(config)
        name, heads, hidden = config.model_type, config.num_attention_heads, config.hidden_size
        family = FAMILIES[name]
        head_dim = hidden // heads
        if name in ("gpt2", "gpt_neox"):
            if hidden % heads or (getattr(config, "head_dim", None) or head_dim) != head_dim:
                raise SpecError(f"heads of hidden_size {hidden} / num_attention_heads {heads} channels are expected")
        else:
            own = getattr(config, "head_dim", None)
            head_dim = head_dim if own is None else own
        if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not 1 <= head_dim <= _MOST["head_dim"]:
            raise SpecError(f"head_dim is {head_dim!r}, not a count between 1 and {_MOST['head_dim']}")
        _refuse(config)
        window, types = _windows(config, family)
        try:
            values = {
                "attention_scale": family.attention_scale(config) if family.attention_scale else head_dim**-0.5,
                "embedding_scale": float(family.embedding_scale(config)),
                "residual_scale": float(family.residual_scale(config)),
                "logit_scale": float(family.logit_scale(config)),
                "unrotated_layers": family.no_rotation(config),
            }
        except (TypeError, ZeroDivisionError) as error:
            raise SpecError(f"a multiplier or list of layers of config.json is no such thing: {error}") from error
        spec = cls(
            family=name, num_layers=config.num_hidden_layers, hidden_size=hidden,
            intermediate_size=family.intermediate_size(config), num_heads=heads,
            num_kv_heads=family.num_kv_heads(config), head_dim=head_dim, vocab_size=config.vocab_size,
            norm=family.norm, norm_eps=family.eps(config), activation=_activation(family.activation(config)),
            gated_mlp=family.gated, parallel_residual=family.parallel_residual(config),
            qk_norm=family.qk_norm != "none", qk_norm_of_all=family.qk_norm == "all",
            norm_before=family.norms != "after", norm_after=family.norms != "before", norm_offset=family.norm_offset,
            qkv_bias=family.qkv_bias(config), o_bias=family.o_bias(config), mlp_bias=family.mlp_bias(config),
            learned_positions=family.positions == "learned", sliding_window=window, layer_types=types,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            **values,
            **({"max_position_embeddings": config.max_position_embeddings} | _positions(config, family, head_dim)),
        )  # fmt: skip
        _check(spec)
        return spec


def _refuse(config: Any) -> None:
    """SpecError for options of a family that nobody computes here."""
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        raise SpecError("is_causal is false: a model whose tokens see those after them generates no text")
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        raise SpecError("attn_logit_softcapping or final_logit_softcapping: scores capped by a tanh are not supported")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or getattr(config, "add_cross_attention", False):
        raise SpecError("GPT-2 with attention scaled by layer index or with cross attention is not supported")


def resolved_config(raw: Mapping[str, Any]) -> Any:
    """The transformers config that `raw` stands for, defaults filled in and old spellings migrated.

    SpecError for a family, a quantised checkpoint or values that are refused.
    """
    if not isinstance(raw, Mapping):
        raise SpecError(f"config.json is a JSON {type(raw).__name__}, not an object")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise SpecError(why_not(raw))
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


def _activation(name: Any) -> Literal["silu", "gelu", "gelu_tanh"]:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise SpecError(f"activation {name!r} is not supported")
    return _ACTIVATIONS[name]


def _windows(config: Any, family: Family) -> tuple[int | None, tuple[str, ...]]:
    """The window of the layers that have one, and the layers' types where the family has types by layer."""
    window = getattr(config, "sliding_window", None)
    if family.windows == "all" or (family.windows != "by type" and not getattr(config, "layer_types", None)):
        return (None if family.windows == "none" else window), ()
    types = tuple(config.layer_types)
    if not all(isinstance(kind, str) for kind in types):
        raise SpecError(f"layer_types: {next(kind for kind in types if not isinstance(kind, str))!r:.60} is no type")
    if len(types) != config.num_hidden_layers:
        raise SpecError(f"layer_types names {len(types)} layers, num_hidden_layers is {config.num_hidden_layers}")
    if unknown := {*types} - {"full_attention", "sliding_attention"}:
        raise SpecError(f"layer_types: {min(unknown)!r} is not supported")
    if "sliding_attention" not in types:
        return None, types
    if window is None or not getattr(config, "use_sliding_window", True):
        raise SpecError("layer_types names sliding_attention, and no sliding_window is in use")
    return window, types


def _plain_frequencies(theta: float, dim: int) -> np.ndarray:
    with np.errstate(all="ignore"):  # what comes of odd numbers is looked at later
        return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)


def _positions(config: Any, family: Family, head_dim: int) -> dict[str, Any]:
    """How positions come in."""
    if family.positions == "learned":
        return {"rotary_dim": 0}
    if not family.local_rope:
        return _rope(config, family, head_dim, config.rope_parameters)
    everywhere, local = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    found = _rope(config, family, head_dim, local, layer_type="sliding_attention")
    if found["rope_scaling"]:
        raise SpecError(f"rope_parameters of sliding_attention: {local['rope_type']!r} is not supported there")
    return _rope(config, family, head_dim, everywhere, layer_type="full_attention") | {
        "local_inv_freq": found["inv_freq"]
    }


def _rope(config: Any, family: Family, head_dim: int, parameters: dict[str, Any], **layer_type: str) -> dict[str, Any]:
    """Frequencies by the functions of transformers, which know every key of every kind."""

    kind = parameters.get("rope_type")
    if kind is None:
        raise SpecError("rope_parameters has no rope_type: frequencies by layer type are not supported")
    if kind not in _ROPE_TYPES:
        raise SpecError(f"rope type {kind!r} is not supported: its angles depend on the batch or on the context length")
    more: dict[str, Any] = {}
    try:
        theta = float(parameters["rope_theta"])
        if kind == "default":
            # As the modelling code has it: of these families only some rotate a part of a head.
            share = parameters.get("partial_rotary_factor", 1.0) if family.rotates_a_part else 1.0
            inv_freq, factor = _plain_frequencies(theta, int(head_dim * share)), 1.0
        else:
            need_torch(f"reading the angles of rope type {kind!r}")
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            tensor, factor = ROPE_INIT_FUNCTIONS[kind](config, **layer_type)
            inv_freq = tensor.float().numpy()
        if kind == "longrope":
            # Beyond the original length all angles would be others, those of the text before included.
            original = parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings
            more = {"max_position_embeddings": min(int(original), config.max_position_embeddings)}
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise SpecError(f"rope_parameters {parameters}: {type(error).__name__}: {error}") from error
    dim = 2 * len(inv_freq)
    if dim > head_dim or (dim < head_dim and not family.rotates_a_part):
        raise SpecError(f"rope_parameters {parameters} rotate {dim} of {head_dim} channels, which the family does not")
    if not (bool(np.isfinite(inv_freq).all()) and math.isfinite(factor)):
        raise SpecError(f"rope_parameters {parameters} give angles that are no numbers")
    scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
    return more | {
        "rotary_dim": dim, "inv_freq": tuple(inv_freq.tolist()), "rope_factor": float(factor),
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
    for name in ("attention_scale", "embedding_scale", "residual_scale", "logit_scale"):
        value = getattr(spec, name)
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):  # a root may be complex
            raise SpecError(f"the model's {name} is {value}, not a number above 0")
