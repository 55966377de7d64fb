"""What the metadata of a GGUF file say of its model, as a Hugging Face config. Every key must be accounted for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from model_store.families import FAMILIES
from model_store.gguf_file import GgufError, GgufFile
from model_store.spec import SpecError

ARCHITECTURES = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}  # -> model_type


class MetadataKeys:
    """The metadata of the file's architecture, each as the type it must have. GgufError names a key that is not."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.architecture = file, file.metadata.get("general.architecture")
        self.read: set[str] = set()

    def has(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.file.metadata

    def _get(self, name: str, default: Any, kind: type | tuple[type, ...], wanted: str) -> Any:
        key = f"{self.architecture}.{name}"
        self.read.add(name)
        value = self.file.metadata.get(key, default)
        if value is None:
            raise GgufError(f"{self.file.name} lacks the metadata key {key}")
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]  # one number for each layer, all alike
        if isinstance(value, bool) or not isinstance(value, kind):
            raise GgufError(f"{self.file.name}: the metadata key {key} is {short(value)}, not {wanted}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A positive whole number below 2 ** 31."""
        value = self._get(name, default, int, "one whole number")
        if not 0 < value < 1 << 31:
            raise GgufError(f"{self.file.name}: the metadata key {self.architecture}.{name} is {value}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return self._get(name, default, (int, float), "a number")

    def text(self, name: str, default: str) -> str:
        return self._get(name, default, str, "a text")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def gguf_config(keys: MetadataKeys, dtype: str) -> dict[str, Any]:
    """The Hugging Face config that the metadata describe. GgufError or SpecError for what is missing or unknown."""
    file, architecture = keys.file, keys.architecture
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise GgufError(f"{file.name}: GGUF architecture {architecture!r} is not supported (supported: {known})")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = ARCHITECTURES[architecture]
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise GgufError(f"{file.name} has no token_embd.weight (vocabulary x hidden): it is no whole language model")
    vocab, hidden = embedding.shape
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocab:
        raise GgufError(f"{file.name} has {len(tokens)} tokens and token_embd.weight has {vocab} rows")
    if (said := keys.count("embedding_length", hidden)) != hidden:
        raise GgufError(
            f"{file.name}: token_embd.weight has rows of {hidden}, {architecture}.embedding_length is {said}"
        )
    heads, layers = keys.count("attention.head_count"), keys.count("block_count")
    present = {int(match[1]) for name in file.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if present != set(range(layers)):
        raise GgufError(
            f"{file.name} has tensors of {len(present)} layers, {architecture}.block_count is {layers}: it is not whole"
        )
    config: dict[str, Any] = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]], "model_type": model_type, "dtype": dtype,
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }  # fmt: skip
    for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = file.metadata.get(f"tokenizer.ggml.{gguf_name}_token_id")
        if isinstance(token, int) and 0 <= token < vocab:
            config[f"{name}_token_id"] = token
    if architecture == "gpt2":
        return config | {
            "n_layer": layers, "n_head": heads, "n_embd": hidden, "n_positions": keys.count("context_length"),
            "n_inner": keys.count("feed_forward_length"),
            "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        }  # fmt: skip
    family = FAMILIES[model_type]
    partial = family.rotates_a_part
    head_dim = keys.count(
        "attention.key_length", hidden // heads if partial else keys.count("rope.dimension_count", hidden // heads)
    )
    rotated = keys.count("rope.dimension_count", head_dim)
    for name, size in (("attention.value_length", keys.count("attention.value_length", head_dim)),
                       ("rope.dimension_count", head_dim if partial else rotated)):  # fmt: skip
        if size != head_dim:
            raise GgufError(f"{file.name}: {architecture}.{name} is {size} where heads have {head_dim}: not supported")
    rope = {"rope_theta": keys.number("rope.freq_base", 10000.0), **_rope_scaling(file, keys, rotated)}
    if partial:
        rope["partial_rotary_factor"] = rotated / head_dim
    config |= {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": keys.count("feed_forward_length"), "max_position_embeddings": keys.count("context_length"),
        "num_key_value_heads": keys.count("attention.head_count_kv", heads), "hidden_act": "silu", "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"), "rope_parameters": rope,
    }  # fmt: skip
    names = file.tensors
    if architecture in ("llama", "smollm3", "granite"):
        config |= {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_down.bias" in names}
    if architecture in _MORE:
        config |= _MORE[architecture](keys, config)
    return config


def _gemma3(keys: MetadataKeys, config: dict[str, Any]) -> dict[str, Any]:
    """As llama.cpp's loader: every sixth layer sees everything, and the largest model scales scores otherwise."""
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    every = keys.count("attention.sliding_window_pattern", 6)
    is_largest = config["num_hidden_layers"] == 62
    return {
        "hidden_activation": "gelu_pytorch_tanh", "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % every else "full_attention"
                        for i in range(config["num_hidden_layers"])],
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "query_pre_attn_scalar":
            config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"],
    }  # fmt: skip


def _granite(keys: MetadataKeys, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_multiplier": keys.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        "embedding_multiplier": keys.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": keys.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": keys.number("logit_scale", 0.0) or 1.0,
    }  # fmt: skip


def _phi3(keys: MetadataKeys, config: dict[str, Any]) -> dict[str, Any]:
    window = keys.number("attention.sliding_window", 0)
    if window != int(window if math.isfinite(window) else -1):
        raise GgufError(f"{keys.file.name}: the metadata key {keys.architecture}.attention.sliding_window is {window}")
    original = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    return {"sliding_window": int(window) or None, "original_max_position_embeddings": original}


# What an architecture adds to the config.
_MORE: dict[str, Callable[[MetadataKeys, dict[str, Any]], dict[str, Any]]] = {
    "gemma3": _gemma3, "granite": _granite, "phi3": _phi3,
    "smollm3": lambda keys, config: {"no_rope_layer_interval": 4},
    "olmo2": lambda keys, config: {"attention_bias": False},
}  # fmt: skip


# Keys that change what a model computes, with the values under which they change nothing; and those that never do.
_NEUTRAL = {
    "attention.sliding_window": (0,), "attention.causal": (True,), "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,), "attention.scale": (0.0,), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "embedding_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0), "expert_count": (0,), "expert_used_count": (0,), "use_parallel_residual": (True, False),
    "rope.scaling.attn_factor": (1.0,), "rope.scaling.finetuned": (True, False), "nextn_predict_layers": (0,),
    "pooling_type": (0,), "attention.temperature_length": (0,), "rope.scaling.yarn_log_multiplier": (0.0,),
}  # fmt: skip
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "tensor_data_layout",
}  # fmt: skip


def check_metadata(keys: MetadataKeys) -> None:
    """GgufError for a key of the model that nobody here reads and that is not known to change nothing."""
    file = keys.file
    start = f"{file.metadata['general.architecture']}."
    for key, value in file.metadata.items():
        name = key.removeprefix(start)
        if name == key or name in _READ or name in keys.read or value in _NEUTRAL.get(name, ()):
            continue
        raise GgufError(f"{file.name}: the metadata key {key} ({short(value)}) changes the model and is not supported")
    for name in ("add_sep_token", "remove_extra_whitespaces", "suppress_tokens", "normalizer.lowercase"):
        if (name != "remove_extra_whitespaces" or file.metadata.get("tokenizer.ggml.model") != "llama") and (
            file.metadata.get(f"tokenizer.ggml.{name}")
        ):
            raise GgufError(f"{file.name}: the metadata key tokenizer.ggml.{name} is not supported")
    for name in file.metadata:
        if name.startswith("adapter.") or (name == "general.type" and file.metadata[name] not in ("model", "")):
            raise GgufError(f"{file.name} is no model ({name} is {short(file.metadata[name])})")


def _rope_scaling(file: GgufFile, keys: MetadataKeys, head_dim: int) -> dict[str, Any]:
    """As llama.cpp's loader does: linear where no type is given, the factor under its new or its old key."""
    if "rope_factors_short.weight" in file.tensors:
        return _longrope(file, keys)
    kind = keys.text("rope.scaling.type", "linear")
    old = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", old)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return _llama3_scaling(file, keys, head_dim)
    if "rope_freqs.weight" in file.tensors:
        raise GgufError(f"{file.name} has both rope_freqs.weight and {keys.architecture}.rope.scaling.type {kind!r}")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "yarn":
        raise GgufError(f"{file.name}: {keys.architecture}.rope.scaling.type {kind!r} is not supported")
    if not factor > 1.0:
        raise GgufError(
            f"{file.name}: {keys.architecture}.rope.scaling.type is yarn and there is no scaling.factor above 1"
        )
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": float(factor)}
    if (extrapolation := keys.number("rope.scaling.yarn_ext_factor", 1.0)) not in (1.0, -1.0):
        raise GgufError(
            f"{file.name}: {keys.architecture}.rope.scaling.yarn_ext_factor {extrapolation} is not supported"
        )
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if keys.has(f"rope.scaling.{key}"):
            scaling[name] = keys.number(f"rope.scaling.{key}")
    # llama.cpp multiplies its attention factor (1 by default) by 0.1 ln(factor) + 1.
    own = keys.number("rope.scaling.yarn_attn_factor", keys.number("rope.scaling.attn_factor", 1.0))
    if own != 1.0:
        scaling["attention_factor"] = own * (0.1 * math.log(factor) + 1.0)
    original = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    return scaling | {"original_max_position_embeddings": original}


def _longrope(file: GgufFile, keys: MetadataKeys) -> dict[str, Any]:
    if "rope_factors_long.weight" not in file.tensors:
        raise GgufError(f"{file.name} has rope_factors_short.weight and no rope_factors_long.weight")
    factors = {f"{kind}_factor": file.tensors[f"rope_factors_{kind}.weight"].dequantised().tolist()
               for kind in ("short", "long")}  # fmt: skip
    original = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    return factors | {
        "rope_type": "longrope", "original_max_position_embeddings": original,
        "attention_factor": float(keys.number("rope.scaling.attn_factor", 1.0)),
    }  # fmt: skip


def _llama3_scaling(file: GgufFile, keys: MetadataKeys, head_dim: int) -> dict[str, Any]:
    if "rope_freqs.weight" not in file.tensors:
        return {"rope_type": "default"}
    # Llama 3.1 and later: the file carries the resulting factor of each frequency instead of the four parameters.
    factors = file.tensors["rope_freqs.weight"].dequantised()
    if factors.shape != (head_dim // 2,):
        raise GgufError(f"{file.name}: rope_freqs.weight is {[*factors.shape]}, not [{head_dim // 2}]")
    factor = float(factors.max())
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    exponents = np.arange(len(factors)) / len(factors)
    wavelength = 2 * np.pi * keys.number("rope.freq_base", 10000.0) ** exponents
    smooth = np.clip((8192 / wavelength - 1.0) / 3.0, 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise SpecError("its rope_freqs are not those of Llama 3.1 scaling: import it from the original checkpoint")
    return scaling
