"""GGUF as an import format: dequantised once into an ordinary checkpoint folder, never read while serving.

The `gguf` package reads and dequantises, transformers rebuilds the tokenizer; names, layouts and config are ours,
because every tensor of the file must be accounted for: one that is silently left out (a bias, rope factors) would
give a model that answers, and answers wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from model_store.spec import ModelSpec, SpecError
from model_store.store import StoreError

_MAX_SHARD_BYTES = 4 << 30

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
# GGUF architecture -> model_type, class, tensor names, prefix of a layer
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM", _LLAMA_NAMES, "model.layers."),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _LLAMA_NAMES, "model.layers."),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _LLAMA_NAMES, "model.layers."),
    "gpt2": ("gpt2", "GPT2LMHeadModel", _GPT2_NAMES, "transformer.h."),
}
# Vocabularies whose text was cut into single digits before byte-level BPE (llama.cpp, src/llama-vocab.cpp).
_DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")


def import_gguf(path: Path, folder: Path, progress: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json, safetensors (in `dtype`), generation config and tokenizer files into `folder`.

    Peak memory is one shard of 4 GiB. Raises StoreError for a file that cannot be read or turned into a model that
    this server runs exactly.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError) as error:
        raise StoreError(f"{path.name} is not a readable GGUF file: {error}") from error
    values = {key: _value(field) for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.to")}
    architecture = values.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise StoreError(f"{path.name}: GGUF architecture {architecture!r} is not supported (supported: {known})")
    try:
        config = _config(architecture, values, reader, str(dtype).removeprefix("torch."))
        spec = ModelSpec.from_hf_config(config)
    except KeyError as error:
        raise StoreError(f"{path.name} lacks the metadata key {error}") from error
    except SpecError as error:
        raise StoreError(f"{path.name}: {error}") from error
    _write_tensors(folder, ((n, t.to(dtype)) for n, t in _tensors(architecture, spec, reader, path.name, progress)))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokens = {f"{key}_token_id": values.get(f"tokenizer.ggml.{name}_token_id") for key, name in _SPECIAL.items()}
    ends = [tokens["eos_token_id"], values.get("tokenizer.ggml.eot_token_id")]
    ends = [end for i, end in enumerate(ends) if end is not None and end not in ends[:i]]
    generation = tokens | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    generation = {key: value for key, value in generation.items() if value not in (None, [])}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    _write_tokenizer(path, folder, values)


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _value(field: Any) -> Any:
    value = field.contents()
    if isinstance(value, float):  # float32 in the file: the shortest decimal that means the same, 1e-05 for 9.99e-06
        value = float(str(np.float32(value)))
    return value


def _config(architecture: str, values: dict[str, Any], reader: gguf.GGUFReader, dtype: str) -> dict[str, Any]:
    """The Hugging Face config that the metadata describe. KeyError for a key that must be there."""

    def key(name: str, *default: Any) -> Any:
        full = f"{architecture}.{name}"
        return values.get(full, *default) if default else values[full]

    model_type, class_name, *_ = _ARCHITECTURES[architecture]
    names = {tensor.name for tensor in reader.tensors}
    shape = next(tensor.shape for tensor in reader.tensors if tensor.name == "token_embd.weight")
    hidden, vocab = int(shape[0]), int(shape[1])
    heads, layers = key("attention.head_count"), key("block_count")
    config = {
        "architectures": [class_name], "model_type": model_type, "dtype": dtype, "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in names,
    }  # fmt: skip
    for name, gguf_name in _SPECIAL.items():
        if (token := values.get(f"tokenizer.ggml.{gguf_name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    if architecture == "gpt2":
        return config | {
            "n_layer": layers, "n_head": heads, "n_embd": hidden, "n_positions": key("context_length"),
            "n_inner": key("feed_forward_length"), "layer_norm_epsilon": key("attention.layer_norm_epsilon"),
        }  # fmt: skip
    config |= {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": key("feed_forward_length"), "max_position_embeddings": key("context_length"),
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": key("rope.freq_base", 10000.0)} | _rope_scaling(key, names, reader)
    config |= {
        "num_key_value_heads": key("attention.head_count_kv", heads), "hidden_act": "silu",
        "head_dim": key("attention.key_length", key("rope.dimension_count", hidden // heads)),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"), "rope_parameters": rope,
    }  # fmt: skip
    if architecture == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_down.bias" in names}
    return config


def _rope_scaling(key: Callable, names: set[str], reader: gguf.GGUFReader) -> dict[str, Any]:
    kind = key("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": key("rope.scaling.factor")}
    if kind == "yarn":
        original = key("rope.scaling.original_context_length")
        return {
            "rope_type": "yarn", "factor": key("rope.scaling.factor"), "original_max_position_embeddings": original,
        }  # fmt: skip
    if kind != "none":
        raise SpecError(f"rope scaling {kind!r} is not supported")
    if "rope_freqs.weight" not in names:
        return {}
    # Llama 3.1 and later: the file carries the resulting factor of each frequency instead of the four parameters.
    factors = np.array(next(t.data for t in reader.tensors if t.name == "rope_freqs.weight"), dtype=np.float32)
    scaling = {
        "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    exponents = np.arange(len(factors)) / len(factors)
    wavelength = 2 * np.pi * key("rope.freq_base", 10000.0) ** exponents
    smooth = np.clip((8192 / wavelength - 1.0) / 3.0, 0.0, 1.0)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise SpecError("its rope_freqs are not those of Llama 3.1 scaling: import it from the original checkpoint")
    return scaling


def _tensors(
    architecture: str, spec: ModelSpec, reader: gguf.GGUFReader, file_name: str, progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and float32 tensor of every weight, in Hugging Face's names and layouts."""
    _, _, names, prefix = _ARCHITECTURES[architecture]
    for tensor in tqdm(reader.tensors, desc=f"dequantising {file_name}", unit="tensor", disable=not progress):
        if tensor.name == "rope_freqs.weight":
            continue  # in the config
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", tensor.name)
        if not match or match[2] not in names:
            raise StoreError(f"{file_name} has a tensor that this family does not: {tensor.name}")
        layer, part, kind = match.groups()
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            heads = spec.num_heads if part == "attn_q" else spec.num_kv_heads
            # llama.cpp rotates neighbouring channels, Hugging Face the two halves: undo its reordering.
            array = array.reshape(heads, spec.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
        elif architecture == "gpt2" and layer is not None and kind == "weight" and array.ndim == 2:
            array = array.T  # Conv1D
        name = f"{prefix}{layer}.{names[part]}.{kind}" if layer is not None else f"{names[part]}.{kind}"
        yield name, torch.from_numpy(np.require(array, requirements="CW"))


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    shard: dict[str, torch.Tensor] = {}
    size, total, weight_map, files = 0, 0, {}, 0

    def flush() -> None:
        nonlocal shard, size, files
        files += 1
        file = f"model-{files:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for name, tensor in tensors:
        if size and size + tensor.nbytes > _MAX_SHARD_BYTES:
            flush()
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if files == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_tokenizer(path: Path, folder: Path, values: dict[str, Any]) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise StoreError(f"the tokenizer of {path.name} cannot be rebuilt: {error}") from error
    if values.get("tokenizer.ggml.pre") in _DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
    # Leave out what describes this machine or this run; name a class that every version of transformers knows.
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for name in ("backend", "is_local", "local_files_only", "name_or_path", "model_max_length"):
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=1, ensure_ascii=False))
