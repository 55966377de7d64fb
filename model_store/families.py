"""The families of models that are served, each as one description; and why the others are not.

A description holds what a family's modelling code fixes and no config says: where its norms and biases are, what is
multiplied by what, and how its files name and lay out tensors. One decoder layer computes them all.

E = hidden, H = query heads, K = KV heads, D = head dim, I = MLP width.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Of = Callable[[Any], Any]  # a value from transformers' config


class Order(enum.Enum):
    """How a file keeps a tensor."""

    PLAIN = enum.auto()
    CONV1D = enum.auto()  # [in, out]
    PER_HEAD = enum.auto()  # q, k and v of a head side by side


# Parts of a layer -> names of their tensors in files, from top to bottom where a part is made of several.
_ATTENTION = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
    "q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",),
}  # fmt: skip
_MLP = {"up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}
_LLAMA_NAMES = {
    **_ATTENTION, **_MLP, "attn_norm": ("input_layernorm",), "mlp_norm": ("post_attention_layernorm",),
}  # fmt: skip
_NORMS_AFTER = {"post_attn_norm": ("post_attention_layernorm",), "post_mlp_norm": ("post_feedforward_layernorm",)}
_GEMMA_NORMS = {"attn_norm": ("input_layernorm",), "mlp_norm": ("pre_feedforward_layernorm",), **_NORMS_AFTER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is the same in all models of a family. Functions read it from transformers' config."""

    # What is computed.
    norm: Literal["rms", "layer"] = "rms"
    norms: Literal["before", "after", "around"] = "before"  # where, seen from attention and from the MLP
    norm_offset: float = 0.0  # added to the weights of every norm
    qk_norm: Literal["none", "head", "all"] = (
        "none"  # of queries and keys: each head's channels, or all heads' together
    )
    gated: bool = True
    qkv_bias: Of = lambda config: False
    o_bias: Of = lambda config: False
    mlp_bias: Of = lambda config: False
    parallel_residual: Of = lambda config: False
    attention_scale: Of | None = None  # default: D ** -0.5
    embedding_scale: Of = lambda config: 1.0  # multiplies what the embedding gives
    residual_scale: Of = lambda config: 1.0  # multiplies what attention and the MLP add
    logit_scale: Of = lambda config: 1.0  # multiplies logits
    positions: Literal["rotary", "learned"] = "rotary"
    rotates_a_part: bool = False  # partial_rotary_factor counts, whatever the kind of angles
    no_rotation: Of = lambda config: ()  # layers whose queries and keys are not rotated
    local_rope: bool = False  # layers with a sliding window have angles of their own
    # Which layers `sliding_window` is for; "all, or by type": by type where a config has types.
    windows: Literal["none", "all", "by type", "all, or by type"] = "none"
    # How a config calls things.
    num_kv_heads: Of = lambda config: config.num_key_value_heads
    eps: Of = lambda config: config.rms_norm_eps
    activation: Of = lambda config: config.hidden_act
    intermediate_size: Of = lambda config: config.intermediate_size
    num_layers_key: str = "num_hidden_layers"
    # How files call things.
    names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _LLAMA_NAMES)
    matrices: Order = Order.PLAIN
    qkv_order: Order | None = None  # default: as `matrices`
    prefix: str = "model."  # of everything but the head, in files that transformers writes
    layers: str = "layers."
    embed: str = "embed_tokens.weight"
    final_norm: str = "norm"
    head: str = "lm_head.weight"
    # llama.cpp's name for it, where it has one; whether rows of q and k are in another order there.
    gguf: str | None = None
    gguf_permutes: bool = False

    def has_part(self, part: str) -> bool:
        """Whether layers have this norm."""
        if part in ("attn_norm", "mlp_norm"):
            return self.norms != "after"
        if part in ("post_attn_norm", "post_mlp_norm"):
            return self.norms != "before"
        return part not in ("q_norm", "k_norm") or self.qk_norm != "none"


def _yes(config: Any) -> bool:
    return True


def _attention_bias(config: Any) -> bool:
    return bool(config.attention_bias)


def _mlp_bias(config: Any) -> bool:
    return bool(config.mlp_bias)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        qkv_bias=_attention_bias, o_bias=_attention_bias, mlp_bias=_mlp_bias, gguf="llama", gguf_permutes=True
    ),
    "mistral": Family(windows="all, or by type"),  # with types transformers takes it for a Ministral
    "qwen2": Family(qkv_bias=_yes, windows="by type", gguf="qwen2"),
    "qwen3": Family(
        qkv_bias=_attention_bias, o_bias=_attention_bias, qk_norm="head", windows="by type", gguf="qwen3"
    ),
    "smollm3": Family(
        qkv_bias=_attention_bias, o_bias=_attention_bias, mlp_bias=_mlp_bias, windows="by type",
        no_rotation=lambda config: tuple(i for i, rotates in enumerate(config.no_rope_layers) if not rotates),
        gguf="smollm3", gguf_permutes=True,
    ),
    "phi3": Family(
        windows="all", rotates_a_part=True, gguf="phi3",
        names=_LLAMA_NAMES | {"qkv": ("self_attn.qkv_proj",), "up": ("mlp.gate_up_proj",)},
    ),
    "olmo2": Family(
        norms="after", qk_norm="all", qkv_bias=_attention_bias, o_bias=_attention_bias,
        names={**_ATTENTION, **_MLP, **_NORMS_AFTER}, gguf="olmo2",
    ),
    "granite": Family(
        qkv_bias=_attention_bias, o_bias=_attention_bias, mlp_bias=_mlp_bias,
        attention_scale=lambda config: config.attention_multiplier,
        embedding_scale=lambda config: config.embedding_multiplier,
        residual_scale=lambda config: config.residual_multiplier,
        logit_scale=lambda config: 1.0 / config.logits_scaling, gguf="granite", gguf_permutes=True,
    ),
    "gemma3_text": Family(
        norms="around", norm_offset=1.0, qk_norm="head", qkv_bias=_attention_bias, o_bias=_attention_bias,
        attention_scale=lambda config: config.query_pre_attn_scalar**-0.5,
        embedding_scale=lambda config: math.sqrt(config.hidden_size),
        activation=lambda config: config.hidden_activation, windows="by type", local_rope=True,
        names={**_ATTENTION, **_MLP, **_GEMMA_NORMS}, gguf="gemma3",
    ),
    "gpt_neox": Family(
        norm="layer", gated=False, qkv_bias=_attention_bias, o_bias=_attention_bias, mlp_bias=_yes,
        parallel_residual=lambda config: bool(config.use_parallel_residual), rotates_a_part=True,
        num_kv_heads=lambda config: config.num_attention_heads, eps=lambda config: config.layer_norm_eps,
        qkv_order=Order.PER_HEAD, prefix="gpt_neox.", embed="embed_in.weight", final_norm="final_layer_norm",
        head="embed_out.weight",
        names={
            "attn_norm": ("input_layernorm",), "qkv": ("attention.query_key_value",), "o": ("attention.dense",),
            "mlp_norm": ("post_attention_layernorm",), "up": ("mlp.dense_h_to_4h",), "down": ("mlp.dense_4h_to_h",),
        },
    ),
    "gpt2": Family(
        norm="layer", gated=False, qkv_bias=_yes, o_bias=_yes, mlp_bias=_yes, positions="learned",
        attention_scale=lambda config: (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0,
        num_kv_heads=lambda config: config.n_head, eps=lambda config: config.layer_norm_epsilon,
        activation=lambda config: config.activation_function,
        intermediate_size=lambda config: 4 * config.n_embd if config.n_inner is None else config.n_inner,
        num_layers_key="n_layer", matrices=Order.CONV1D, prefix="transformer.", layers="h.", embed="wte.weight",
        final_norm="ln_f", gguf="gpt2",
        names={
            "attn_norm": ("ln_1",), "qkv": ("attn.c_attn",), "o": ("attn.c_proj",), "mlp_norm": ("ln_2",),
            "up": ("mlp.c_fc",), "down": ("mlp.c_proj",),
        },
    ),
}  # fmt: skip

_NOT_TEXT = "it is multi-modal: only models of text alone are served"
_EXPERTS = "it is a mixture of experts: every layer would need a router and its experts"
_HYBRID = "its layers mix tokens by a recurrence or a linear attention: there is no kernel for them"
_CAPPED = "its attention scores are capped by a tanh (soft-capping): no attention kernel here does that"
_LATENT = "its keys and values are compressed (multi-head latent attention): the KV cache here holds whole ones"
_ENCODER = "it is no decoder of text alone: there is an encoder, or tokens see those after them"
_MARKS = (
    (("vision_config", "audio_config", "image_token_id", "audio_token_id", "vision_tower"), _NOT_TEXT),
    (("is_encoder_decoder",), _ENCODER),
    (("kv_lora_rank", "q_lora_rank"), _LATENT),
    (
        (
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok",
            "moe_intermediate_size", "ffn_config",
        ),
        _EXPERTS,
    ),
    (
        (
            "mamba_d_state", "mamba_n_heads", "ssm_state_size", "state_size", "linear_num_value_heads", "conv_L_cache",
            "lru_width", "linear_attn_config", "attention_hidden_size", "mamba_num_heads",
            "mlstm_round_up_to_multiple_of",
        ),
        _HYBRID,
    ),
    (("attn_logit_softcapping",), _CAPPED),
)  # fmt: skip
_WORDS = (
    (("moe", "mixtral", "dbrx", "expert"), _EXPERTS),
    (("mamba", "rwkv", "xlstm", "jamba", "zamba", "bamba", "linear", "hybrid", "recurrent", "lfm", "qwen3_next",
      "qwen3_5", "minimax"), _HYBRID),
    (("vl", "vision", "audio", "omni", "multimodal", "mllama", "llava", "fuyu", "whisper", "ocr", "gemma3", "gemma4",
      "llama4", "unified"), _NOT_TEXT),
    (("gemma2",), _CAPPED),
    (("bert", "bart", "t5", "pegasus", "marian", "prophetnet", "roformer"), _ENCODER),
)  # fmt: skip


def why_not(raw: Mapping[str, Any]) -> str:
    """What to say of a config whose family is not served."""
    family = raw.get("model_type")
    known = f"(supported: {', '.join(FAMILIES)})"
    if not family:
        return f"config.json names no model_type {known}"
    said = f"model family {family!r} is not supported"
    types = {str(kind) for kind in raw.get("layer_types") or ()} if isinstance(raw.get("layer_types"), list) else set()
    if others := types - {"full_attention", "sliding_attention"}:
        mixes = any(word in kind for kind in others for word in ("linear", "mamba", "conv", "recurrent", "hybrid"))
        reason = _HYBRID if mixes else f"its layers are of the types {', '.join(sorted(types))}"
        return f"{said}: {reason} {known}"
    for keys, reason in _MARKS:
        if any(raw.get(key) for key in keys):
            return f"{said}: {reason} {known}"
    for words, reason in _WORDS:
        if reason == _NOT_TEXT and str(family).endswith("_text"):
            continue
        if any(word in str(family).lower() for word in words):
            return f"{said}: {reason} {known}"
    return f"{said}: nobody has described it here yet {known}"
