"""Pairs of known shapes with random weights, made on the device: for timing only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from model_store.arrays import to_torch
from model_store.assembly import Elasticity
from model_store.int8 import Int8Matrix, Matrix
from model_store.loaded import LoadedPair
from model_store.nested import GROUP, WIDTHS, NestedMatrix
from model_store.quantized import BLOCK_TYPES, CodedMatrix, CodedRows
from model_store.spec import ModelSpec
from model_store.weight_form import Storage, WeightForm
from model_store.weights import EndWeights, LayerWeights

# Hugging Face configs; the student keeps every other layer.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1e6,
    },
    "tiny": {
        "num_hidden_layers": 6, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 97, "rope_theta": 1e4,
    },
}  # fmt: skip


# Halves in a block that make weights of random bytes about 0.02: place -> value.
_HALVES = {
    "Q4_K": {0: 1.4e-4, 2: 1e-3}, "Q6_K": {208: 1.5e-5}, "Q4_0": {0: 4e-3}, "Q8_0": {0: 2.7e-4},
}  # fmt: skip
_SMALL_BLOCKS = {"Q4_K": "Q4_0", "Q6_K": "Q8_0"}  # for rows that are not whole blocks of 256


def _coded_rows(name: str, num_rows: int, width: int, device: torch.device) -> CodedRows:
    name = name if width % BLOCK_TYPES[name].inputs == 0 else _SMALL_BLOCKS[name]
    kind = BLOCK_TYPES[name]
    shape = (num_rows, width // kind.inputs, kind.num_bytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    for at, value in _HALVES[name].items():
        blocks[..., at : at + 2] = to_torch(np.array([value], np.float16).view(np.uint8), device)
    return CodedRows(blocks.flatten(1), kind)


def spec_of(shape: str) -> ModelSpec:
    config = {"model_type": "qwen3", "tie_word_embeddings": True, "max_position_embeddings": 40960}
    return ModelSpec.from_hf_config(config | SHAPES[shape])


def transformers_config(spec: ModelSpec) -> Any:
    """The same shape for transformers."""
    from transformers import Qwen3Config

    return Qwen3Config(
        num_hidden_layers=spec.num_layers, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        vocab_size=spec.vocab_size, tie_word_embeddings=True, max_position_embeddings=spec.max_position_embeddings,
    )  # fmt: skip


def random_pair(shape: str, form: WeightForm, device: torch.device) -> LoadedPair:
    """A pair in this form."""
    spec, dtype = spec_of(shape), getattr(torch, form.dtype.name)

    def draw(*dims: int, kinds: tuple[tuple[str, int], ...] = ()) -> Matrix:
        """`kinds`: types and rows of the tensors that are fused in it, where it is in a file's codes."""
        num_rows, width = dims
        if form.storage is Storage.CODES:
            runs = kinds or (("Q4_K", num_rows),)
            return CodedMatrix(tuple(_coded_rows(name, rows, width, device) for name, rows in runs))
        if form.storage is Storage.NESTED:
            codes = torch.randint(0, 256, dims, dtype=torch.uint8, device=device)
            zero = torch.full((num_rows, width // GROUP), 127, dtype=torch.uint8, device=device)
            scales = torch.full((len(WIDTHS), *zero.shape), 0.02 / 74, dtype=torch.float16, device=device)
            return NestedMatrix(codes, zero, scales, form.bits)
        if form.storage is Storage.INT8:
            values = torch.randint(-127, 128, dims, dtype=torch.int8, device=device)
            return Int8Matrix(values, torch.full(dims[:1], 0.02 / 73, device=device))
        return torch.empty(dims, dtype=dtype, device=device).normal_(0, 0.02)

    def ones(width: int) -> torch.Tensor:
        return torch.ones(width, dtype=dtype, device=device)

    def layer() -> LayerWeights:
        e, i = spec.hidden_size, spec.intermediate_size
        qkv = (("Q4_K", spec.q_size + spec.kv_size), ("Q6_K", spec.kv_size))  # as in files called Q4_K_M
        return LayerWeights(
            attn_norm_weight=ones(e), qkv_weight=draw(spec.q_size + 2 * spec.kv_size, e, kinds=qkv),
            o_weight=draw(e, spec.q_size), mlp_norm_weight=ones(e), up_weight=draw(2 * i, e),
            down_weight=draw(e, i, kinds=(("Q6_K", e),)),
            q_norm_weight=ones(spec.head_dim), k_norm_weight=ones(spec.head_dim),
        )  # fmt: skip

    elasticity = Elasticity.last_to_first(spec.num_layers, range(0, spec.num_layers, 2))
    embed = draw(spec.vocab_size, spec.hidden_size, kinds=(("Q6_K", spec.vocab_size),))
    ends = EndWeights(embed=embed, head=embed, final_norm_weight=ones(spec.hidden_size))
    return LoadedPair(
        name=shape, spec=spec, elasticity=elasticity, sizes=elasticity.sizes,
        layers={i: layer() for i in range(elasticity.num_global_layers)}, ends={"teacher": ends, "student": ends},
    )  # fmt: skip
