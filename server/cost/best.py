"""The fastest that this machine has been measured to be: what decides that a limit is impossible, and not just missed.

A cost model follows the machine, slow neighbours included. Whatever lasts longer than the neighbour (a refusal that
tells the client not to try again, the file that the next start begins with) is held to this instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from server.core.step_times import KINDS, StepShape

_SUSTAINED = 32  # steps over which a mean must hold to count as what the machine can do


class _LeastMean:
    """The least mean of measured over expected among runs of `_SUSTAINED` values."""

    def __init__(self, value: float) -> None:
        self.value = value
        self._measured = self._expected = 0.0
        self._count = 0

    def add(self, measured: float, expected: float = 1.0) -> None:
        self._measured += measured
        self._expected += expected
        self._count += 1
        if self._count == _SUSTAINED:
            self.value = min(self.value, self._measured / max(self._expected, 1e-12))
            self._measured = self._expected = 0.0
            self._count = 0


class BestEver:
    """Coefficients of the fastest calibration, and by how much, sustained, steps have been faster than these say."""

    def __init__(self, coefficients: np.ndarray) -> None:
        self.coefficients = coefficients.copy()
        self._scale = {kind: _LeastMean(1.0) for kind in KINDS}
        self._overhead = _LeastMean(float("inf"))

    @property
    def scale(self) -> dict[str, float]:
        """By kind of step, at most 1."""
        return {kind: least.value for kind, least in self._scale.items()}

    @property
    def overhead(self) -> float:
        """Least seconds between steps; 0 until they were measured."""
        return self._overhead.value if np.isfinite(self._overhead.value) else 0.0

    def seconds(self, shape: StepShape) -> float:
        """Least seconds that such a step has been measured to take in the model."""
        return float(shape.features @ self.coefficients) * self._scale[shape.kind].value

    def observe(self, shape: StepShape, measured: float) -> None:
        self._scale[shape.kind].add(measured, float(shape.features @ self.coefficients))

    def observe_overhead(self, seconds: float) -> None:
        self._overhead.add(seconds)

    def to_json(self) -> dict[str, Any]:
        return {"coefficients": self.coefficients.tolist(), "scale": self.scale, "overhead": self.overhead or None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BestEver:
        """KeyError, TypeError or ValueError if it is not what `to_json` wrote."""
        best = cls(np.asarray(content["coefficients"], dtype=np.float64))
        for kind in KINDS:
            best._scale[kind].value = float(content["scale"][kind])
        if content["overhead"] is not None:
            best._overhead.value = float(content["overhead"])
        return best
