"""An exported checkpoint folder as a GGUF file for llama.cpp, through the gguf package (its dtype, not quantised)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from model_store.export import ExportError
from model_store.gguf_import import import_gguf
from model_store.spec import ModelSpec
from model_store.weights import weight_files

# What the matrices are in a file of each dtype, and what such a file calls itself.
_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def write_gguf(folder: Path, file: Path, pre: str | None = None) -> None:
    """Write the checkpoint in `folder` as `file`, matrices in the dtype that its config names, vectors in float32.

    ExportError for a family, a dtype or a tokenizer that this writer does not know.
    """
    config = json.loads((folder / "config.json").read_text())
    family = config.get("model_type")
    if family not in _ARCHITECTURES:
        raise ExportError(f"--gguf writes {', '.join(_ARCHITECTURES)}, not {family}")
    if (dtype := config.get("dtype")) not in _TYPES:
        raise ExportError(f"--gguf writes {', '.join(_TYPES)}, not {dtype}")
    spec = ModelSpec.from_hf_config(config)
    if spec.rope_scaling:
        raise ExportError("--gguf: scaled rotary positions are not written; convert the folder with llama.cpp's script")
    if spec.sliding_window is not None:
        raise ExportError("--gguf: llama.cpp reads no sliding window for this family: beyond it the file would differ")
    if spec.activation != "silu":
        raise ExportError(f"--gguf: llama.cpp computes this family with silu only, not with {spec.activation}")
    architecture = _ARCHITECTURES[family]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(f"{folder.name}")
    writer.add_file_type(_TYPES[dtype][1])
    writer.add_vocab_size(spec.vocab_size)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.rotary_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    _add_tokenizer(writer, folder, config, pre)
    names = gguf.get_tensor_name_map(architecture, spec.num_layers)
    for source in weight_files(folder):
        with safe_open(source, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                stem, _, kind = name.rpartition(".")
                target = names.get_name(stem)
                if target is None:
                    raise ExportError(f"--gguf: llama.cpp has no name for the tensor {name}")
                _add_tensor(writer, f"{target}.{kind}", handle.get_tensor(name), dtype, stem, family, spec)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, value: torch.Tensor, dtype: str, stem: str, family: str, spec: ModelSpec
) -> None:
    if family == "llama" and stem.endswith(("q_proj", "k_proj")):
        heads = spec.num_heads if stem.endswith("q_proj") else spec.num_kv_heads
        # llama.cpp rotates neighbouring channels where Hugging Face rotates the two halves.
        value = value.view(heads, 2, spec.head_dim // 2, -1).transpose(1, 2).reshape(value.shape)
    if value.ndim == 1:  # llama.cpp wants vectors in float32
        writer.add_tensor(name, value.float().numpy())
        return
    raw = value.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy()  # bytes: numpy has no bfloat16
    writer.add_tensor(name, raw.reshape(value.shape[0], -1), raw_dtype=_TYPES[dtype][0])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], pre: str | None) -> None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ExportError(f"--gguf: {folder} has no tokenizer.json")
    tokenizer = json.loads(file.read_text())
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ExportError(f"--gguf writes byte-level BPE tokenizers, not {model['type']}")
    size = config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or _pre_tokenizer(tokenizer, config))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for name, add in (
        ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id),
    ):  # fmt: skip
        value = config.get(f"{name}_token_id")
        if isinstance(value, list):
            value = value[0]
        if value is not None:
            add(value)
    writer.add_add_bos_token(False)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())


def _pre_tokenizer(tokenizer: dict[str, Any], config: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut before BPE, recognised from what the tokenizer says it does."""
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if any(step.get("type") == "Digits" and step.get("individual_digits") for step in steps):
        return "smollm"
    if config["model_type"] in ("qwen2", "qwen3"):
        return "qwen2"
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return "gpt-2"
    if any("{1,3}" in str(step.get("pattern")) for step in steps):
        return "llama-bpe"
    raise ExportError("--gguf: how this tokenizer cuts text is not recognised: name it with --gguf-pre")


def verify_gguf(folder: Path, file: Path) -> None:
    """Read the file back as a model is imported, and compare every tensor. ExportError names the first that differs."""
    with tempfile.TemporaryDirectory() as scratch:
        back = Path(scratch)
        import_gguf(file, back, progress=False, dtype=torch.float32)  # every dtype written is exact in float32
        ours, theirs = _all_tensors(folder), _all_tensors(back)
        if ours.keys() != theirs.keys():
            raise ExportError(f"{file.name} lacks or adds tensors: {sorted(ours.keys() ^ theirs.keys())[:5]}")
        for name, value in ours.items():
            if not np.array_equal(value.float().numpy(), theirs[name].float().numpy()):
                raise ExportError(f"{file.name}: the tensor {name} is not what was written")


def _all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors
