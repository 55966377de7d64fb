"""Whether guessing pays in this step, and how far ahead: measured acceptance against predicted step times. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from server.core.batch import Scheduled
from server.core.request import LiveRequest

# Acceptance of one guess before any was measured: hopeful, so that it gets measured. Counts like so many guesses.
_HOPE, _HOPE_WEIGHT = 0.8, 10.0
_MEMORY = 200.0  # guesses after which an old one counts 1/e
_MARGIN = 1.03  # predictions are a few per cent off
_PROBE_EVERY = 256  # steps without guesses after which one is tried, where it could pay at all

# Seconds of a decode step of rows[size] requests; None where nothing predicts it.
DecodeSeconds = Callable[[np.ndarray], float | None]


class Payoff:
    """Acceptance by requested size, and the decision."""

    def __init__(self, num_teacher_layers: int, max_guesses: int) -> None:
        self.num_teacher_layers = num_teacher_layers
        self.max_guesses = max_guesses
        self.acceptance: dict[int, float] = {}  # requested size -> probability that a guess stands
        self._seen: dict[int, float] = {}  # requested size -> guesses that its acceptance rests on
        self._quiet_steps = 0

    def observe(self, size: int, num_guesses: int, num_accepted: int) -> None:
        """Of `num_guesses` guesses the first `num_accepted` stood; those after the first that fell tell nothing."""
        value, seen = self.acceptance.get(size, _HOPE), self._seen.get(size, _HOPE_WEIGHT)
        for stood in [1.0] * num_accepted + [0.0] * (num_accepted < num_guesses):
            seen = min(seen + 1.0, _MEMORY)
            value += (stood - value) / seen
        self.acceptance[size], self._seen[size] = value, seen

    def rows(self, counts: Iterable[tuple[int, int]]) -> np.ndarray:
        """Rows by size, of (size, rows)."""
        rows = np.zeros(self.num_teacher_layers + 1)
        for size, count in counts:
            rows[size] += count
        return rows

    def depth(
        self,
        scheduled: Scheduled,
        candidates: Sequence[LiveRequest],
        decode_seconds: DecodeSeconds,
        one_guess: float | None,
    ) -> int:
        """Guesses per candidate in this step; 0: it does not pay. `one_guess`: seconds that one of each takes."""
        rows = self.rows((request.path.size, count) for request, count in scheduled)
        guessing = self.rows((request.path.size, 1) for request in candidates)
        plain = decode_seconds(rows)
        if plain is None or one_guess is None:
            return self.max_guesses
        measured = {size: self.acceptance.get(size, _HOPE) for size in np.flatnonzero(guessing).tolist()}

        def predicted(rows: np.ndarray) -> float:
            seconds = decode_seconds(rows)
            assert seconds is not None, "what predicts one step predicts all"
            return seconds

        best = self._best(plain, one_guess, rows, guessing, measured, predicted)
        if best:
            self._quiet_steps = 0
            return best
        self._quiet_steps += 1
        if self._quiet_steps < _PROBE_EVERY:
            return 0
        self._quiet_steps = 0
        always = dict.fromkeys(measured, 1.0)
        return min(self._best(plain, one_guess, rows, guessing, always, predicted), 1)

    def _best(
        self,
        plain: float,
        one_guess: float,
        rows: np.ndarray,
        guessing: np.ndarray,
        acceptance: dict[int, float],
        predicted: Callable[[np.ndarray], float],
    ) -> int:
        """The depth with the most tokens per second, if that beats a plain step."""
        others = rows.sum() - guessing.sum()
        best, most = 0, rows.sum() / plain * _MARGIN
        for depth in range(1, self.max_guesses + 1):
            seconds = depth * one_guess + predicted(rows + depth * guessing)
            tokens = others + sum(
                guessing[size] * sum(a**i for i in range(depth + 1)) for size, a in acceptance.items()
            )
            if tokens / seconds > most:
                best, most = depth, tokens / seconds
        return best
