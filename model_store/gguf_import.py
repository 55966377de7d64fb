"""GGUF as an import format: dequantised once into an ordinary checkpoint folder, never read while serving."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from model_store.spec import ModelSpec, SpecError
from model_store.store import StoreError


def import_gguf(path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (bfloat16), generation config and tokenizer files into `folder`.

    transformers' loader does the dequantisation, the tensor names, the rotary permutation and the tokenizer. Raises
    StoreError for a file it cannot read or a family this server does not run.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise StoreError(f"{name} cannot be imported: {error}") from error
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "bfloat16"
    try:
        spec = ModelSpec.from_hf_config(config)
    except SpecError as error:
        raise StoreError(f"{name}: {error}") from error
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    if spec.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
