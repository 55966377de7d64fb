"""A monotone piecewise-linear function, asked for single numbers by decisions and for arrays by tables."""

from __future__ import annotations

from bisect import bisect
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from server.cost.features import ramps

TABLE = 4097  # arguments 0, 1, 2, ... that a curve keeps the values of


class Lookup(Protocol):
    def __getitem__(self, number: Any, /) -> float: ...


class Curve:
    """0 for nothing, the first knot's value up to it, and from the last knot on as steep as before."""

    def __init__(self, knots: np.ndarray, coefficients: np.ndarray) -> None:
        """`coefficients` of `ramps(x, knots)`: the value at the first knot, and what each piece adds."""
        values = np.cumsum(coefficients)
        slopes = coefficients[1:] / np.diff(knots)
        self.knots: list[float] = knots.tolist()
        self.values: list[float] = values.tolist()
        self.slopes: list[float] = np.append(slopes, slopes[-1]).tolist()  # from each knot on
        # Flat pieces would make the inverse jump; a hair of slope keeps it a function.
        self._rising: list[float] = (values + np.arange(len(values)) * 1e-12).tolist()
        self._coefficients = coefficients

    def __call__(self, x: float) -> float:
        if x <= self.knots[0]:
            return self.values[0] if x > 0 else 0.0
        i = bisect(self.knots, x) - 1
        return self.values[i] + (x - self.knots[i]) * self.slopes[i]

    __getitem__ = __call__

    def upto(self, largest: float) -> Lookup:
        """What to index with whole numbers up to `largest`: a list where that will do, else the curve itself."""
        return self._table if largest < TABLE else self

    @cached_property
    def _table(self) -> list[float]:
        numbers = np.arange(TABLE, dtype=np.float64)
        return np.where(numbers > 0, ramps(numbers, np.asarray(self.knots)) @ self._coefficients, 0.0).tolist()

    def at(self, knots: np.ndarray) -> Curve:
        """The same function on more knots."""
        return Curve(knots, np.diff([self(x) for x in knots.tolist()], prepend=0.0))

    def inverse(self, value: float) -> float:
        """The x at which the function is `value`; 0 where it is never as small."""
        rising = self._rising
        if value <= self.values[0]:
            return 0.0
        if value >= rising[-1]:
            slope = max((rising[-1] - rising[-2]) / (self.knots[-1] - self.knots[-2]), 1e-12)
            return self.knots[-1] + (value - rising[-1]) / slope
        i = max(bisect(rising, value), 1)
        step = (self.knots[i] - self.knots[i - 1]) / (rising[i] - rising[i - 1])
        return step * (value - rising[i - 1]) + self.knots[i - 1]
