"""GGUF as an import format: turned once into an ordinary checkpoint folder, never read while serving.

The `gguf` package dequantises; names, layouts and config are ours, because every tensor and every key of the model must
be accounted for: one that is silently left out (a bias, rope factors, a window) would give a model that answers, and
answers wrong. Tensors of the types of quantized.py are kept as they are too, in codes.safetensors, which is what the
native executor serves.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from model_store.arrays import BFLOAT16, dtype_of
from model_store.families import FAMILIES, Order
from model_store.files import share
from model_store.gguf_config import MetadataKeys, check_metadata, gguf_config
from model_store.gguf_file import GgufError, GgufFile, GgufTensor, read_gguf
from model_store.gguf_tokenizer import write_tokenizer
from model_store.layout import end_tensors, full_name, layer_prefix, layer_tensors
from model_store.quantized import BLOCK_TYPES, CODES_FILE
from model_store.spec import ModelSpec, SpecError
from model_store.store import StoreError

logger = logging.getLogger(__name__)

_MAX_SHARD_BYTES = 4 << 30

# Parts of a layer -> llama.cpp's names of their tensors, by how many there are.
_PARTS = {
    "attn_norm": ("attn_norm",), "mlp_norm": ("ffn_norm",), "post_attn_norm": ("post_attention_norm",),
    "post_mlp_norm": ("post_ffw_norm",), "q_norm": ("attn_q_norm",), "k_norm": ("attn_k_norm",),
    "o": ("attn_output",), "down": ("ffn_down",),
}  # fmt: skip
_SPLIT = {
    ("qkv", 1): ("attn_qkv",), ("qkv", 3): ("attn_q", "attn_k", "attn_v"), ("up", 1): ("ffn_up",),
    ("up", 2): ("ffn_gate", "ffn_up"),
}  # fmt: skip
_IN_THE_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def tensor_names(model_type: str) -> tuple[dict[str, str], dict[str, str]]:
    """llama.cpp's names of modules -> Hugging Face's: around the layers, and in a layer (after its number)."""
    family = FAMILIES[model_type]
    stems = {"token_embd": family.embed, "position_embd": "wpe.weight", "output_norm": f"{family.final_norm}.weight",
             "output": family.head}  # fmt: skip
    ends = {name: full_name(stem, model_type).removesuffix(".weight") for name, stem in stems.items()}
    layer: dict[str, str] = {}
    for part, names in family.names.items():
        layer |= dict(zip(_PARTS.get(part) or _SPLIT[part, len(names)], names, strict=True))
    return ends, layer


def import_gguf(path: Path, folder: Path, progress: bool = True, dtype: Any = BFLOAT16) -> None:
    """Write config.json, safetensors (in `dtype`), generation config and tokenizer files into `folder`.

    `path` may be any part of a split file. Peak memory is one shard of 4 GiB. Raises StoreError for a file that cannot
    be read or turned into a model that this server runs exactly.
    """
    try:
        file = read_gguf(path)
        keys = MetadataKeys(file)
        config = gguf_config(keys, dtype_of(dtype).name)
        spec = ModelSpec.from_hf_config(config)
        check_metadata(keys)
        tensors = hf_tensors(file, spec)
        ends = write_tokenizer(file, folder)
    except (GgufError, SpecError) as error:
        raise StoreError(str(error) if path.name in str(error) else f"{path.name}: {error}") from error
    shown = tqdm(tensors, desc=f"dequantising {file.name}", unit="tensor", disable=not progress)
    write_safetensors(folder, ((tensor.name, tensor.dequantised().astype(dtype_of(dtype))) for tensor in shown))
    _write_codes(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))


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
    more: float = 0.0  # than the Hugging Face tensor has: norms whose weights are offsets

    def dequantised(self) -> np.ndarray:
        """float32, in Hugging Face's layout."""
        array = self.source.dequantised()
        if self.rows is not None:
            array = array[self.rows]
        if self.is_transposed:
            array = array.T
        if self.more:
            array = array - np.float32(self.more)
        return np.ascontiguousarray(array)


def hf_tensors(file: GgufFile, spec: ModelSpec) -> list[HfTensor]:
    """Every weight of the file. GgufError for one that is missing, unknown to the family, or of another shape."""
    family = FAMILIES[spec.family]
    ends, names = tensor_names(spec.family)
    found = []
    for tensor in file.tensors.values():
        if tensor.name in _IN_THE_CONFIG:
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", tensor.name)
        if not match or match[2] not in (ends if match[1] is None else names):
            raise GgufError(f"{file.name} has a tensor that this family does not: {tensor.name}")
        layer, part, kind = match.groups()
        name = ends[part] if layer is None else full_name(f"{family.layers}{layer}.{names[part]}", spec.family)
        rows = None
        if family.gguf_permutes and part in ("attn_q", "attn_k"):
            heads = spec.num_heads if part == "attn_q" else spec.num_kv_heads
            if tensor.shape[0] != heads * spec.head_dim:
                raise GgufError(f"{file.name}: {tensor.name} has {tensor.shape[0]} rows, not {heads} x {spec.head_dim}")
            # llama.cpp rotates neighbouring channels, Hugging Face the two halves: undo its reordering.
            rows = np.arange(tensor.shape[0]).reshape(heads, spec.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
        is_conv = family.matrices is Order.CONV1D and layer is not None and len(tensor.shape) == 2
        more = family.norm_offset if part.endswith("norm") else 0.0
        found.append(HfTensor(f"{name}.{kind}", tensor, rows, is_conv, more))
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
    blocks = {t.name: np.array(t.source.data if t.rows is None else t.source.data[t.rows]) for t in coded}
    save_file(blocks, folder / CODES_FILE, {tensor.name: tensor.source.kind.name for tensor in coded})
    share(folder / CODES_FILE)


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Shards of at most 4 GiB, with an index if there are several."""
    shard: dict[str, np.ndarray] = {}
    size, total, weight_map, files = 0, 0, {}, 0

    def flush() -> None:
        nonlocal shard, size, files
        files += 1
        file = f"model-{files:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        share(folder / file)
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
