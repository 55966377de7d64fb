"""Writes tiny models as GGUF files in llama.cpp's layouts, to test the import against what it came from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġ Ġ", "Ġt he", "1 2"]
TOKENS = CONTROL + list(bytes_to_unicode().values()) + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "smollm3": "smollm3", "phi3": "phi3",
    "olmo2": "olmo2", "granite": "granite", "gemma3_text": "gemma3",
}  # fmt: skip
_PLAIN = gguf.GGMLQuantizationType.F32


def write_gguf(
    model: PreTrainedModel, path: Path, *, quantise: str | dict[str, str] | None = None, extra: dict | None = None
) -> None:
    """`extra`: further tensors by name. Matrices are quantised if asked, vectors never; `quantise` is a type, or one of
    each part that is quantised ("attn_v", ...)."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if family == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        rope = config.rope_parameters
        if family == "gemma3_text":
            writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
            rope = rope["full_attention"]
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope.get("factor"):
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
    if family != "gpt2":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if family in ("gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if family == "phi3":
        writer.add_rope_dimension_count(12)
    if family in ("qwen3", "gemma3_text"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, value in tensors.items():
        stem, _, kind = name.rpartition(".")
        value = _to_llama_cpp(value, stem, config)
        target = names.get_name(stem)
        if family == "gemma3_text" and stem.endswith("norm"):
            value = value + 1
        _add(writer, f"{target}.{kind}", value, quantise)
    for name, value in (extra or {}).items():
        _add(writer, name, value, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, value: np.ndarray, quantise: str | dict[str, str] | None) -> None:
    wanted = quantise.get(name.split(".")[-2]) if isinstance(quantise, dict) else quantise
    is_quantised = wanted and value.ndim == 2 and value.shape[1] % 32 == 0
    kind = gguf.GGMLQuantizationType[wanted] if is_quantised else _PLAIN
    data = np.ascontiguousarray(value, dtype=np.float32)
    writer.add_tensor(name, data if kind is _PLAIN else gguf.quantize(data, kind), raw_dtype=kind)


def _to_llama_cpp(value: np.ndarray, name: str, config) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py: neighbouring rotary channels, plain linears."""
    heads = config.num_attention_heads
    if config.model_type in ("llama", "smollm3", "granite") and name.endswith(("q_proj", "k_proj")):
        heads = config.num_key_value_heads if name.endswith("k_proj") else heads
        return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if config.model_type == "gpt2" and name.endswith(("c_attn", "c_proj", "c_fc")) and value.ndim == 2:
        return value.T
    return value
