"""Words for a step's time: its shape, how well such steps were predicted, and what a model of them offers to others."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

KINDS = ("decode", "prefill", "mixed")  # of steps: tokens of answers only, of prompts only, both


@dataclass(slots=True)
class StepShape:
    """A step as the cost model sees it: its features (`server.cost.features`) and its kind, one of KINDS."""

    features: np.ndarray
    kind: str


@dataclass(slots=True)
class ErrorStats:
    """How long recent steps of one kind took, as multiples of what had been predicted."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=2048))
    count: int = 0
    predicted: float = 0.0  # seconds, summed
    measured: float = 0.0

    def add(self, predicted: float, measured: float) -> None:
        self.recent.append(measured / predicted)
        self.count += 1
        self.predicted += predicted
        self.measured += measured

    def quantile(self, q: float) -> float:
        """Quantile of the relative error |predicted - measured| / measured; NaN without steps."""
        return relative_error(self.recent, q)

    def spread(self) -> list[float]:
        """The middles of 32 equal shares of measured / predicted, ascending: what a simulator draws from."""
        return np.quantile(list(self.recent), (np.arange(32) + 0.5) / 32).tolist() if self.recent else [1.0]


def relative_error(ratios: Collection[float], q: float) -> float:
    """Quantile of |predicted - measured| / measured, from measured / predicted; NaN without any."""
    return float(np.quantile(np.abs(1.0 / np.asarray(ratios) - 1.0), q)) if ratios else float("nan")


class StepTimes(Protocol):
    """A model of how long steps take, as a size policy that decides by one shows it to metrics and to the simulator."""

    @property
    def errors(self) -> Mapping[str, ErrorStats]:
        """By kind of step, and of "all"."""

    def observe(self, shape: StepShape, measured: float) -> float:
        """Learn from a step that took `measured` seconds in the model; returns what had been predicted."""

    def observe_overhead(self, seconds: float, num_requests: int) -> None:
        """Learn from the time around a step of `num_requests`: scheduling, building the batch, handing out tokens."""
