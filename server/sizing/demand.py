"""What is about to come: arrival rates and lengths by tenant, as exponentially decaying counts."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class _Tally:
    time: float
    start: float
    arrivals: float = 0.0  # decaying count
    prompt_tokens: float = 0.0
    last: float = 0.0  # time of the last arrival


class Demand:
    """Arrival rate, mean prompt and mean output length of each tenant over about `window` seconds.

    Time is whatever the caller's clock says; nothing here reads one.
    """

    def __init__(self, window: float = 10.0, length_window: float = 256.0, prior_output: float = 128.0) -> None:
        self.window = window
        self._length_decay = 1.0 - 1.0 / length_window
        self._tallies: dict[str, _Tally] = {}
        self._prior_output = prior_output
        self._finished = 0.0
        self._output_tokens = 0.0

    def arrived(self, tenant: str, prompt_tokens: int, now: float) -> None:
        tally = self._tallies.get(tenant)
        if tally is None:
            if len(self._tallies) > 4096:
                self._drop_stale(now)
            tally = self._tallies[tenant] = _Tally(now, now)
        self._decay(tally, now)
        tally.arrivals += 1.0
        tally.last = now
        tally.prompt_tokens += prompt_tokens

    def finished(self, output_tokens: int) -> None:
        """Lengths of answers are learned over all tenants: they decay by answers, not by time."""
        self._finished = self._finished * self._length_decay + 1.0
        self._output_tokens = self._output_tokens * self._length_decay + output_tokens

    @property
    def mean_output(self) -> float:
        """Expected tokens of an answer; a prior worth 4 answers keeps the first ones from deciding."""
        return (self._output_tokens + 4.0 * self._prior_output) / (self._finished + 4.0)

    def expected_output(self, max_tokens: int, min_tokens: int, ignore_eos: bool) -> float:
        if ignore_eos:
            return max(max_tokens, 1)
        return max(min(max_tokens, self.mean_output), min_tokens, 1.0)

    def rate(self, tenant: str, now: float, sigmas: float = 0.0) -> tuple[float, float]:
        """(requests per second, mean prompt tokens); the rate may be raised by so many standard errors."""
        tally = self._tallies.get(tenant)
        if tally is None:
            return 0.0, 1.0
        self._decay(tally, now)
        # A young tally has not counted for a whole window yet.
        seconds = self.window * (1.0 - math.exp(-max(now - tally.start, 0.0) / self.window))
        seconds = max(seconds, self.window * 0.2)
        count = tally.arrivals
        rate = (count + sigmas * math.sqrt(count)) / seconds
        return rate, tally.prompt_tokens / count if count > 1e-9 else 1.0

    def tenants(self, now: float) -> list[str]:
        """Tenants seen within about three windows."""
        return [name for name, tally in self._tallies.items() if now - tally.last < 3.0 * self.window]

    def _decay(self, tally: _Tally, now: float) -> None:
        elapsed = now - tally.time
        if elapsed > 0:
            keep = math.exp(-elapsed / self.window)
            tally.arrivals *= keep
            tally.prompt_tokens *= keep
            tally.time = now

    def _drop_stale(self, now: float) -> None:
        self._tallies = {name: t for name, t in self._tallies.items() if now - t.last < 3.0 * self.window}
