"""Device presets and published shapes: a cost model from arithmetic alone, for machines that are not at hand.

Figures of devices are their data sheets' dense peaks times a stated efficiency; shapes of pairs are those of the
published checkpoints. A prediction from here is a plan, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model_store.assembly import Elasticity
from model_store.nested import bytes_read
from model_store.spec import int8_kv_bytes
from server.core.width import EXACT
from server.cost.features import AT, HEAD_KNOTS, KNOTS, NARROW_HEAD_KNOTS, NARROW_KNOTS, layout
from server.cost.model import CostModel
from server.cost.profile import CostProfile


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks in bytes/s, FLOP/s and bytes; efficiencies are the shares of them that kernels reach."""

    name: str
    bandwidth: float
    flops: float  # dense, 16-bit
    memory: float
    bandwidth_efficiency: float = 0.75
    flops_efficiency: float = 0.55
    launch: float = 4e-6  # per layer and lane, with CUDA graphs
    fixed: float = 3e-4  # per step: sampling, graph replay
    overhead: float = 7e-4  # per step: scheduling on the host


DEVICES = {
    "h200": Device("h200", bandwidth=4.8e12, flops=989e12, memory=141e9),
    "h100": Device("h100", bandwidth=3.35e12, flops=989e12, memory=80e9),
    "a100": Device("a100", bandwidth=2.04e12, flops=312e12, memory=80e9),
    "l4": Device("l4", bandwidth=0.3e12, flops=121e12, memory=24e9),
}


@dataclass(frozen=True, slots=True)
class PairShape:
    """Enough of a published pair to price it: 16-bit weights, ordinary (whole-layer) student."""

    name: str
    num_layers: int
    kept: tuple[int, ...]
    order: str  # last_to_first | first_to_last
    layer_parameters: int
    vocab_parameters: int  # of one [vocab, hidden] matrix
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def elasticity(self) -> Elasticity:
        build = Elasticity.first_to_last if self.order == "first_to_last" else Elasticity.last_to_first
        return build(self.num_layers, list(self.kept))

    def profile(self, kv_cache_dtype: str = "auto", widths: tuple[int, ...] = (EXACT,)) -> CostProfile:
        """`kv_cache_dtype`: auto (16 bits) or int8. `widths`: that rows may read, beside EXACT from nested codes."""
        heads, dim = self.num_kv_heads, self.head_dim
        return CostProfile(
            elasticity=self.elasticity(),
            layer_bytes=(2 * self.layer_parameters,) * (self.num_layers + len(self.kept)),
            head_bytes=2 * self.vocab_parameters,
            kv_bytes=int8_kv_bytes(heads, dim) if kv_cache_dtype == "int8" else 2 * 2 * heads * dim,
            attention_flops=4 * self.num_heads * self.head_dim,
            widths=widths,
            width_bytes=tuple(1.0 if width == EXACT else bytes_read(width) / 2 for width in widths),
        )

    @property
    def weight_bytes(self) -> int:
        """Teacher and student resident together, embedding and head of both."""
        return 2 * (self.layer_parameters * (self.num_layers + len(self.kept)) + 2 * self.vocab_parameters)


_QWEN3_KEPT = (*range(0, 34, 2), 34, 35)
_LLAMA_KEPT = (0, *range(1, 28, 2))
_PYTHIA_KEPT = (*range(0, 30, 2), 30, 31)
PAIRS = {
    pair.name: pair
    for pair in (
        PairShape("qwen3-4b", 36, _QWEN3_KEPT, "last_to_first", 100_930_816, 388_956_160, 32, 8, 128),
        PairShape("qwen3-8b", 36, _QWEN3_KEPT, "last_to_first", 192_946_432, 622_329_856, 32, 8, 128),
        PairShape("llama-3.2-3b", 28, _LLAMA_KEPT, "first_to_last", 100_669_440, 394_002_432, 24, 8, 128),
        PairShape("pythia-2.8b", 32, _PYTHIA_KEPT, "last_to_first", 78_676_480, 128_778_240, 32, 32, 80),
    )
}


def roofline_cost_model(profile: CostProfile, device: Device) -> CostModel:
    """Coefficients by roofline: a layer takes the longer of reading its weights and multiplying by them."""
    bandwidth = device.bandwidth * device.bandwidth_efficiency
    flops = device.flops * device.flops_efficiency

    def increments(num_bytes: float, knots: np.ndarray, launch: float, share: float = 1.0) -> np.ndarray:
        """`share` of the bytes are read; what is multiplied is the same."""
        parameters = num_bytes / profile.weight_bytes_per_parameter
        values = np.maximum(share * num_bytes / bandwidth, 2.0 * parameters * knots / flops) + launch
        return np.diff(values, prepend=0.0)

    at = layout(profile.widths)
    coefficients = np.zeros(at.size)
    for share, (layers, head) in zip(profile.width_bytes, at.narrow.values(), strict=False):
        coefficients[layers] = increments(profile.reference_bytes, NARROW_KNOTS, device.launch, share)
        coefficients[head] = increments(profile.head_bytes, NARROW_HEAD_KNOTS, device.launch, share)
    coefficients[AT.fixed] = device.fixed
    coefficients[AT.layers] = increments(profile.reference_bytes, KNOTS, device.launch)
    coefficients[AT.head] = increments(profile.head_bytes, HEAD_KNOTS, device.launch)
    coefficients[AT.decode_context] = profile.kv_bytes / bandwidth
    coefficients[AT.prefill_context] = profile.attention_flops / flops
    model = CostModel(profile, coefficients)
    model.overhead = device.overhead
    return model
