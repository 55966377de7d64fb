"""Where the time between two model calls goes, while there is work to do."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

# book: tokens into requests, stops, pages, metrics; publish: outputs to the event loop, requests from it;
# schedule: the plan; build: its arrays. `wait` is what of all these the thread did not run: another thread had the
# interpreter, or another process the core.
PARTS = ("book", "publish", "schedule", "build")


@dataclass(slots=True)
class Gap:
    """Seconds between the end of one model call and the beginning of the next."""

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    wait: float = 0.0


class StepClock:
    """Marked by the engine thread as it goes; idle time does not count."""

    def __init__(self) -> None:
        self._end: float | None = None  # of the last model call
        self._mark = self._cpu = 0.0
        self._parts: dict[str, float] = {}

    def model_ended(self, now: float) -> None:
        self._end = self._mark = now
        self._cpu = time.thread_time()
        self._parts = {}

    def lap(self, part: str) -> None:
        """`part` ends now; it began when the one before it ended."""
        if self._end is not None:
            now = time.monotonic()
            self._parts[part] = self._parts.get(part, 0.0) + now - self._mark
            self._mark = now

    def model_starts(self, now: float, drafting: float = 0.0) -> Gap:
        """`drafting`: seconds since the last model call that were model calls too."""
        if self._end is None:
            return Gap()
        seconds = max(now - self._end - drafting, 0.0)
        waited = now - self._end - (time.thread_time() - self._cpu)
        return Gap(seconds, self._parts, min(max(waited, 0.0), seconds))

    def rest(self) -> None:
        """There is nothing to do: what follows is waiting for work."""
        self._end = None
