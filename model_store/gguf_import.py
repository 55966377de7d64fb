"""GGUF as an import format: turned once into an ordinary checkpoint folder, never read while serving.

The `gguf` package dequantises; names, layouts and config are ours, because every tensor and every key of the model must
be accounted for: one that is silently left out (a bias, rope factors, a window) would give a model that answers, and
answers wrong. Tensors of the types of quantized.py are kept as they are too, in codes.safetensors, which is what the
native executor serves.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from model_store.gguf_file import GgufError, GgufFile, GgufTensor, read_gguf
from model_store.gguf_tokenizer import write_tokenizer
from model_store.layout import end_tensors, full_name, layer_prefix, layer_tensors
from model_store.quantized import BLOCK_TYPES, CODES_FILE
from model_store.spec import ModelSpec, SpecError
from model_store.store import StoreError

logger = logging.getLogger(__name__)

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


def import_gguf(path: Path, folder: Path, progress: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json, safetensors (in `dtype`), generation config and tokenizer files into `folder`.

    `path` may be any part of a split file. Peak memory is one shard of 4 GiB. Raises StoreError for a file that cannot
    be read or turned into a model that this server runs exactly.
    """
    try:
        file = read_gguf(path)
        config = gguf_config(file, str(dtype).removeprefix("torch."))
        spec = ModelSpec.from_hf_config(config)
        _check_metadata(file)
        tensors = hf_tensors(file, spec)
        ends = write_tokenizer(file, folder)
    except (GgufError, SpecError) as error:
        raise StoreError(str(error) if path.name in str(error) else f"{path.name}: {error}") from error
    shown = tqdm(tensors, desc=f"dequantising {file.name}", unit="tensor", disable=not progress)
    write_safetensors(folder, ((tensor.name, tensor.dequantised().to(dtype)) for tensor in shown))
    _write_codes(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))


class _Keys:
    """The metadata of the file's architecture, each as the type it must have. GgufError names a key that is not."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.architecture = file, file.metadata.get("general.architecture")

    def has(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.file.metadata

    def _get(self, name: str, default: Any, kind: type | tuple[type, ...], wanted: str) -> Any:
        key = f"{self.architecture}.{name}"
        value = self.file.metadata.get(key, default)
        if value is None:
            raise GgufError(f"{self.file.name} lacks the metadata key {key}")
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]  # one number for each layer, all alike
        if isinstance(value, bool) or not isinstance(value, kind):
            raise GgufError(f"{self.file.name}: the metadata key {key} is {_short(value)}, not {wanted}")
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def gguf_config(file: GgufFile, dtype: str) -> dict[str, Any]:
    """The Hugging Face config that the metadata describe. GgufError or SpecError for what is missing or unknown."""
    keys = _Keys(file)
    architecture = keys.architecture
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise GgufError(f"{file.name}: GGUF architecture {architecture!r} is not supported (supported: {known})")
    model_type, class_name, *_ = _ARCHITECTURES[architecture]
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
        "architectures": [class_name], "model_type": model_type, "dtype": dtype, "vocab_size": vocab,
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
    head_dim = keys.count("attention.key_length", keys.count("rope.dimension_count", hidden // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if (size := keys.count(name, head_dim)) != head_dim:
            raise GgufError(f"{file.name}: {architecture}.{name} is {size} where heads have {head_dim}: not supported")
    config |= {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": keys.count("feed_forward_length"), "max_position_embeddings": keys.count("context_length"),
        "num_key_value_heads": keys.count("attention.head_count_kv", heads), "hidden_act": "silu", "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_theta": keys.number("rope.freq_base", 10000.0), **_rope_scaling(file, keys, head_dim),
        },
    }  # fmt: skip
    if architecture == "llama":
        names = file.tensors
        config |= {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_down.bias" in names}
    return config


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


def _check_metadata(file: GgufFile) -> None:
    """GgufError for a key of the model that nobody here reads and that is not known to change nothing."""
    start = f"{file.metadata['general.architecture']}."
    for key, value in file.metadata.items():
        name = key.removeprefix(start)
        if name == key or name in _READ or value in _NEUTRAL.get(name, ()):
            continue
        raise GgufError(f"{file.name}: the metadata key {key} ({_short(value)}) changes the model and is not supported")
    for name in ("add_sep_token", "remove_extra_whitespaces", "suppress_tokens", "normalizer.lowercase"):
        if (name != "remove_extra_whitespaces" or file.metadata.get("tokenizer.ggml.model") != "llama") and (
            file.metadata.get(f"tokenizer.ggml.{name}")
        ):
            raise GgufError(f"{file.name}: the metadata key tokenizer.ggml.{name} is not supported")
    for name in file.metadata:
        if name.startswith("adapter.") or (name == "general.type" and file.metadata[name] not in ("model", "")):
            raise GgufError(f"{file.name} is no model ({name} is {_short(file.metadata[name])})")


def _rope_scaling(file: GgufFile, keys: _Keys, head_dim: int) -> dict[str, Any]:
    """As llama.cpp's loader does: linear where no type is given, the factor under its new or its old key."""
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


def _llama3_scaling(file: GgufFile, keys: _Keys, head_dim: int) -> dict[str, Any]:
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


@dataclass(frozen=True)
class HfTensor:
    """A weight of the file under its Hugging Face name, still as the file has it.

    `source.data` holds rows of quantised blocks. They are the rows of the Hugging Face matrix after `rows` has put them
    in order (None: they are already), and its columns where `is_transposed`.
    """

    name: str
    source: GgufTensor
    rows: np.ndarray | None = None
    is_transposed: bool = False

    def dequantised(self) -> torch.Tensor:
        """float32, in Hugging Face's layout."""
        array = self.source.dequantised()
        if self.rows is not None:
            array = array[self.rows]
        if self.is_transposed:
            array = array.T
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def hf_tensors(file: GgufFile, spec: ModelSpec) -> list[HfTensor]:
    """Every weight of the file. GgufError for one that is missing, unknown to the family, or of another shape."""
    architecture = file.metadata["general.architecture"]
    _, _, names, prefix = _ARCHITECTURES[architecture]
    found = []
    for tensor in file.tensors.values():
        if tensor.name == "rope_freqs.weight":
            continue  # in the config
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", tensor.name)
        if not match or match[2] not in names:
            raise GgufError(f"{file.name} has a tensor that this family does not: {tensor.name}")
        layer, part, kind = match.groups()
        name = f"{prefix}{layer}.{names[part]}.{kind}" if layer is not None else f"{names[part]}.{kind}"
        rows = None
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            heads = spec.num_heads if part == "attn_q" else spec.num_kv_heads
            if tensor.shape[0] != heads * spec.head_dim:
                raise GgufError(f"{file.name}: {tensor.name} has {tensor.shape[0]} rows, not {heads} x {spec.head_dim}")
            # llama.cpp rotates neighbouring channels, Hugging Face the two halves: undo its reordering.
            rows = np.arange(tensor.shape[0]).reshape(heads, spec.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
        is_conv = architecture == "gpt2" and layer is not None and kind == "weight" and len(tensor.shape) == 2  # Conv1D
        found.append(HfTensor(name, tensor, rows, is_conv))
    _check_shapes(file, spec, found)
    return found


def _check_shapes(file: GgufFile, spec: ModelSpec, found: list[HfTensor]) -> None:
    ends = {name: shape for field, (_, name, shape) in end_tensors(spec).items()
            if field != "head" or not spec.tie_word_embeddings}  # fmt: skip
    layers = {
        f"{layer_prefix(spec.family)}{index}.{tensor.name}": tensor.shape
        for index in range(spec.num_layers)
        for tensor in layer_tensors(spec)
    }
    expected = {full_name(name, spec.family): shape for name, shape in (ends | layers).items()}
    for tensor in found:
        shape = tensor.source.shape[::-1] if tensor.is_transposed else tensor.source.shape
        if tensor.name not in expected:
            raise GgufError(f"{file.name} has a tensor that this family does not: {tensor.source.name}")
        if tuple(shape) != expected.pop(tensor.name):
            raise GgufError(
                f"{file.name}: the shape of {tensor.source.name} is {[*tensor.source.shape]}, which its metadata do "
                "not say"
            )
    if expected:
        raise GgufError(f"{file.name} lacks a tensor: {next(iter(expected))} as transformers names it")


def _write_codes(folder: Path, tensors: list[HfTensor]) -> None:
    """The blocks of matrices whose type is kept, rows being outputs in every family, under their names."""
    matrices = [tensor for tensor in tensors if len(tensor.source.shape) == 2]
    coded = [tensor for tensor in matrices if tensor.source.kind.name in BLOCK_TYPES]
    if not coded:
        return
    if others := sorted({t.source.kind.name for t in matrices} - BLOCK_TYPES.keys()):
        logger.info("matrices of type %s are kept dequantised, not as codes", ", ".join(others))
    blocks = {
        t.name: torch.from_numpy(np.array(t.source.data if t.rows is None else t.source.data[t.rows])) for t in coded
    }
    save_file(blocks, folder / CODES_FILE, {tensor.name: tensor.source.kind.name for tensor in coded})
    (folder / CODES_FILE).chmod(0o644)


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Shards of at most 4 GiB, with an index if there are several."""
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
