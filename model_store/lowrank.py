"""Students kept as a low-rank difference to the teacher's layers.

Student layer `i` = teacher layer `kept[i]` + lora_B @ lora_A per linear; its norms are stored whole. A layer without
any tensor of its own is the teacher's layer itself and shares its memory. Tensor names are those of a Llama checkpoint
(`model.layers.i.self_attn.q_proj.lora_A`, ...); factors may be int8 with a float scale per row (`lora_A_scale`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from model_store.weights import LayerWeights, WeightError

LOW_RANK_FILE = "student_lowrank.safetensors"
# Rows of the merged tensors that each projection owns, in order.
_PARTS = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
          "up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}  # fmt: skip
_NORMS = {"attn_norm_weight": "input_layernorm.weight", "mlp_norm_weight": "post_attention_layernorm.weight"}


@dataclass(slots=True, eq=False)
class LowRankTerm:
    """What one projection adds: rows [start, stop) of the merged output get `b @ (a @ x)`. a [r, in], b [out, r]."""

    start: int
    stop: int
    a: torch.Tensor
    b: torch.Tensor


@dataclass(slots=True, eq=False)
class LowRankDelta:
    """A student layer as terms to add to the teacher layer `base` (its index), with the student's own norms."""

    base: int
    terms: dict[str, list[LowRankTerm]]  # "qkv" | "o" | "up" | "down"
    attn_norm_weight: torch.Tensor
    mlp_norm_weight: torch.Tensor

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.attn_norm_weight, self.mlp_norm_weight)
        for terms in self.terms.values():
            for term in terms:
                yield from (term.a, term.b)


class LowRankStudent:
    """Reads a low-rank student file."""

    def __init__(self, path: Path, kept: tuple[int, ...]) -> None:
        self.path = path
        self.kept = kept
        self._file = safe_open(path, "pt")
        self._names = set(self._file.keys())

    def has_own_layer(self, index: int) -> bool:
        return any(name.startswith(f"model.layers.{index}.") for name in self._names)

    def delta(self, index: int, teacher: LayerWeights, dtype: torch.dtype, device: torch.device | str) -> LowRankDelta:
        """The factors of student layer `index`, on the device, in `dtype`. WeightError if a shape does not fit."""
        terms: dict[str, list[LowRankTerm]] = {}
        for group, parts in _PARTS.items():
            merged, start = getattr(teacher, f"{group}_weight"), 0
            for part in parts:
                pair = self._factors(f"model.layers.{index}.{part}")
                if pair is None:
                    raise WeightError(f"{self.path.name} lacks factors for layer {index} {part}")
                a, b = pair
                if a.shape[1] != merged.shape[1] or start + b.shape[0] > merged.shape[0]:
                    raise WeightError(f"{self.path.name}: layer {index} {part} does not fit the teacher's layer")
                term = LowRankTerm(start, start + b.shape[0], a.to(device, dtype), b.to(device, dtype))
                terms.setdefault(group, []).append(term)
                start += b.shape[0]
        norms = {
            field: self._file.get_tensor(f"model.layers.{index}.{name}").to(device, dtype, copy=True)
            for field, name in _NORMS.items()
        }
        return LowRankDelta(self.kept[index], terms, **norms)

    def layer(self, index: int, teacher: LayerWeights, dtype: torch.dtype, device: torch.device | str) -> LayerWeights:
        """Student layer `index` expanded: the sum is taken in float32 and rounded once."""
        delta = self.delta(index, teacher, torch.float32, device)
        merged = {}
        for group, terms in delta.terms.items():
            weight = getattr(teacher, f"{group}_weight").to(torch.float32, copy=True)
            for term in terms:
                weight[term.start : term.stop] += term.b @ term.a
            merged[f"{group}_weight"] = weight.to(dtype)
        return LayerWeights(
            **merged,
            attn_norm_weight=delta.attn_norm_weight.to(dtype),
            mlp_norm_weight=delta.mlp_norm_weight.to(dtype),
        )

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        if f"{name}.lora_A" not in self._names:
            return None
        factors = []
        for side in ("lora_A", "lora_B"):
            value = self._file.get_tensor(f"{name}.{side}").float()
            if f"{name}.{side}_scale" in self._names:
                value = value * self._file.get_tensor(f"{name}.{side}_scale").float()[:, None]
            factors.append(value)
        return factors[0], factors[1]
