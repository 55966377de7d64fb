"""Which tensors a checkpoint of each family has: names, shapes, and how they become the one common layout.

The one table for reading, checking, splitting and exporting. E = hidden, H = query heads, K = KV heads, D = head dim,
I = MLP width, V = vocabulary, P = positions.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache

import torch

from model_store.spec import ModelSpec

LAYER_PREFIX = {"gpt2": "h."}  # "layers." elsewhere
# Prefix of everything but the head in files that transformers writes.
MODEL_PREFIX = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}  # "model." elsewhere
END_PARTS = ("embed", "norm", "head")
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")  # the latter is GPT-NeoX's


class Order(enum.Enum):
    """How a file keeps a tensor."""

    PLAIN = enum.auto()
    CONV1D = enum.auto()  # [in, out]
    PER_HEAD = enum.auto()  # q, k and v of a head side by side


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a layer in the file; those of one field follow each other as its rows."""

    name: str  # after the layer's number
    field: str  # of LayerWeights
    shape: tuple[int, ...]  # in the file
    order: Order = Order.PLAIN

    def read(self, value: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
        """From the file's layout to ours."""
        if self.order is Order.CONV1D:
            return value.T
        if self.order is Order.PER_HEAD:
            shape = (spec.num_heads, 3, spec.head_dim, *value.shape[1:])
            return value.reshape(shape).transpose(0, 1).reshape(value.shape)
        return value

    def write(self, value: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
        """The inverse of `read`; contiguous."""
        if self.order is Order.CONV1D:
            return value.T.contiguous()
        if self.order is Order.PER_HEAD:
            shape = (3, spec.num_heads, spec.head_dim, *value.shape[1:])
            return value.reshape(shape).transpose(0, 1).reshape(value.shape).contiguous()
        return value.contiguous()


def layer_prefix(family: str) -> str:
    return LAYER_PREFIX.get(family, "layers.")


def full_name(name: str, family: str) -> str:
    """The name that transformers gives in a file to what we call `name`; heads have no prefix."""
    return name if name in HEAD_NAMES else MODEL_PREFIX.get(family, "model.") + name


@lru_cache
def layer_tensors(spec: ModelSpec) -> tuple[FileTensor, ...]:
    """Every tensor of one layer."""
    return {"gpt2": _gpt2, "gpt_neox": _gpt_neox}.get(spec.family, _llama_like)(spec)


def end_tensors(spec: ModelSpec) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Field of EndWeights -> (part, name in the file, shape) of what is outside the layers."""
    table, norm = [spec.vocab_size, spec.hidden_size], [spec.hidden_size]
    embed, norm_name, head = {
        "gpt2": ("wte.weight", "ln_f", "lm_head.weight"),
        "gpt_neox": ("embed_in.weight", "final_layer_norm", "embed_out.weight"),
    }.get(spec.family, ("embed_tokens.weight", "norm", "lm_head.weight"))
    found = {
        "embed": ("embed", embed, (*table,)),
        "final_norm_weight": ("norm", f"{norm_name}.weight", (*norm,)),
        "head": ("head", head, (*table,)),
    }
    if spec.norm == "layer":
        found["final_norm_bias"] = ("norm", f"{norm_name}.bias", (*norm,))
    if spec.learned_positions:
        found["positions"] = ("embed", "wpe.weight", (spec.max_position_embeddings, spec.hidden_size))
    return found


def _llama_like(spec: ModelSpec) -> tuple[FileTensor, ...]:
    e, i, q, kv = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
    linears = [
        ("self_attn.q_proj", "qkv", q, e, spec.qkv_bias), ("self_attn.k_proj", "qkv", kv, e, spec.qkv_bias),
        ("self_attn.v_proj", "qkv", kv, e, spec.qkv_bias), ("self_attn.o_proj", "o", e, q, spec.o_bias),
        ("mlp.gate_proj", "up", i, e, spec.mlp_bias), ("mlp.up_proj", "up", i, e, spec.mlp_bias),
        ("mlp.down_proj", "down", e, i, spec.mlp_bias),
    ]  # fmt: skip
    found = [
        FileTensor("input_layernorm.weight", "attn_norm_weight", (e,)),
        FileTensor("post_attention_layernorm.weight", "mlp_norm_weight", (e,)),
    ]
    found += [FileTensor(f"{name}.weight", f"{field}_weight", (n, k)) for name, field, n, k, _ in linears]
    found += [FileTensor(f"{name}.bias", f"{field}_bias", (n,)) for name, field, n, _, bias in linears if bias]
    if spec.qk_norm:
        found += [FileTensor(f"self_attn.{x}_norm.weight", f"{x}_norm_weight", (spec.head_dim,)) for x in "qk"]
    return tuple(found)


def _gpt_neox(spec: ModelSpec) -> tuple[FileTensor, ...]:
    e, i = spec.hidden_size, spec.intermediate_size
    linears = [
        ("attention.query_key_value", "qkv", 3 * e, e, spec.qkv_bias), ("attention.dense", "o", e, e, spec.o_bias),
        ("mlp.dense_h_to_4h", "up", i, e, spec.mlp_bias), ("mlp.dense_4h_to_h", "down", e, i, spec.mlp_bias),
    ]  # fmt: skip
    found = []
    for name, field in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "mlp_norm")):
        found += [FileTensor(f"{name}.{kind}", f"{field}_{kind}", (e,)) for kind in ("weight", "bias")]
    for name, field, n, k, bias in linears:
        order = Order.PER_HEAD if field == "qkv" else Order.PLAIN
        found.append(FileTensor(f"{name}.weight", f"{field}_weight", (n, k), order))
        if bias:
            found.append(FileTensor(f"{name}.bias", f"{field}_bias", (n,), order))
    return tuple(found)


def _gpt2(spec: ModelSpec) -> tuple[FileTensor, ...]:
    e, i = spec.hidden_size, spec.intermediate_size
    linears = [("attn.c_attn", "qkv", 3 * e, e), ("attn.c_proj", "o", e, e), ("mlp.c_fc", "up", i, e),
               ("mlp.c_proj", "down", e, i)]  # fmt: skip
    found = []
    for name, field in (("ln_1", "attn_norm"), ("ln_2", "mlp_norm")):
        found += [FileTensor(f"{name}.{kind}", f"{field}_{kind}", (e,)) for kind in ("weight", "bias")]
    for name, field, n, k in linears:
        found.append(FileTensor(f"{name}.weight", f"{field}_weight", (k, n), Order.CONV1D))
        found.append(FileTensor(f"{name}.bias", f"{field}_bias", (n,)))
    return tuple(found)
