"""What the cost model's arithmetic needs to know about a loaded pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_store.assembly import Elasticity
from server.core.width import EXACT


@dataclass(frozen=True, slots=True)
class CostProfile:
    """What the arithmetic needs to know about a loaded pair. Bytes as they lie in memory."""

    elasticity: Elasticity
    layer_bytes: tuple[int, ...]  # by global layer id; 0 where a layer is not loaded
    head_bytes: int
    kv_bytes: int  # K and V of one token of one layer
    attention_flops: int  # of one query token against one context position on one layer: 4 * heads * head_dim
    weight_bytes_per_parameter: float = 2.0
    shared_head: bool = False  # teacher and student use the same head tensor
    # Stations where student rows go through the products of the teacher's first layer: `layer_bytes` of such a
    # student layer is what it adds (low-rank factors, or nothing).
    shared_stations: frozenset[int] = frozenset()
    widths: tuple[int, ...] = (EXACT,)  # that rows may read, ascending; bytes and coefficients above are the widest's
    width_bytes: tuple[float, ...] = (1.0,)  # what a step reads at each of them, as a share of the widest

    @property
    def reference_bytes(self) -> int:
        """Bytes of the heaviest layer: the unit of `layer_weights`."""
        return max(self.layer_bytes)

    @property
    def layer_weights(self) -> np.ndarray:
        return np.asarray(self.layer_bytes, dtype=np.float64) / self.reference_bytes

    def station_weights(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Layer weights by station, [S] each: what all rows run, what the teacher's rows add, what the student's add.

        The one place that knows which form a student runs in: its own layers, or a difference to the teacher's.
        """
        weights, num_teacher = self.layer_weights, self.elasticity.num_teacher_layers
        stations = self.elasticity.stations
        joint = np.array([weights[s.start] if s.index in self.shared_stations else 0.0 for s in stations])
        teacher = np.array([weights[s.start : s.stop].sum() for s in stations]) - joint
        return joint, teacher, np.array([weights[num_teacher + s.index] for s in stations])

    def path_weights(self) -> dict[int, float]:
        """Layer weight of each size's path: what one step reads and multiplies by, all rows being of that size."""
        joint, teacher, student = self.station_weights()
        thresholds = np.asarray(self.elasticity.thresholds)
        return {
            size: float(joint.sum() + np.where(size >= thresholds, teacher, student).sum())
            for size in self.elasticity.sizes
        }

    def to_json(self) -> dict[str, Any]:
        pair = self.elasticity
        thresholds = {name: getattr(pair, name) for name in _THRESHOLDS}
        shape = {"num_teacher_layers": pair.num_teacher_layers, "kept": list(pair.kept), **thresholds}
        fields = {name: getattr(self, name) for name in ("layer_bytes", *_PROFILE_FIELDS)}
        dial = {"widths": list(self.widths), "width_bytes": list(self.width_bytes)}
        return {"pair": shape, **fields, "shared_stations": sorted(self.shared_stations), **dial}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CostProfile:
        """KeyError, TypeError or ValueError if it is not what `to_json` wrote."""
        fields = {name: content[name] for name in _PROFILE_FIELDS}
        return cls(
            elasticity=Elasticity(**content["pair"]),
            layer_bytes=tuple(content["layer_bytes"]),
            shared_stations=frozenset(content["shared_stations"]),
            widths=tuple(content["widths"]),
            width_bytes=tuple(content["width_bytes"]),
            **fields,
        )


_THRESHOLDS = ("thresholds", "embed_threshold", "norm_threshold", "head_threshold")
_PROFILE_FIELDS = ("head_bytes", "kv_bytes", "attention_flops", "weight_bytes_per_parameter", "shared_head")
