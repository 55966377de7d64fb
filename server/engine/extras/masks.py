"""Whose grammar mask is computed before a step, and who sits the step out until theirs is there.

A mask may take longer than the step itself, and the sampler cannot go on without it. So masks are computed before the
plan is made, in as much time as a step takes, and a request that has none yet is left out of the plan.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from server.core.request import Constraint, LiveRequest

_LEAST_SECONDS = 0.002  # for masks in each step, however short the last one was


class MaskTurns:
    """Costly masks hold back each other, and slow down nobody else by more than half."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads

    def take(self, running: Sequence[LiveRequest], step_seconds: float) -> list[LiveRequest]:
        """Compute masks for about as long as the last step took (`step_seconds`), those first that have waited longest.

        Returns those of `running` that can take part in the next step, in order: all without a grammar, and at least
        one with, since as many masks are computed as there are threads.
        """
        waiting = [r.grammar for r in running if r.grammar is not None and not r.grammar.is_ready]
        if not waiting:
            return list(running)
        self._fill(waiting, max(step_seconds, _LEAST_SECONDS))
        return [r for r in running if r.grammar is None or r.grammar.is_ready]

    def _fill(self, waiting: list[Constraint], seconds: float) -> None:
        from server.engine.extras.grammar import fill_masks  # brings llguidance, which few servers ever need

        waiting.sort(key=lambda constraint: constraint.filled_at)
        end = time.monotonic() + seconds
        for at in range(0, len(waiting), self._num_threads):
            fill_masks(waiting[at : at + self._num_threads], self._num_threads)
            if time.monotonic() > end:
                return
