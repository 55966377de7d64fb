"""Where the time between the process's start and its readiness goes: one log line, for people and for a benchmark."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)


class StartupClock:
    """Phases in seconds; the first one begins with the process itself, so interpreter and imports count."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._phases = {"interpreter and imports": _process_age()}

    def mark(self, phase: str) -> None:
        """`phase` ends now; it began when the one before it ended."""
        now = time.monotonic()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def report(self, link: str) -> None:
        """The line that says that the server is ready, and where: `link` is for people to click."""
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self._phases.items())
        total = sum(self._phases.values())
        text = "ready: %s  %.2f s after the process started (%s)"
        logger.info(text, link, total, parts, extra={"startup": self._phases, "link": link})


def _process_age() -> float:
    """Seconds since this process was started."""
    try:
        # Field 22 of stat, counted after the command's name, which may hold blanks. Where there is /proc psutil knows
        # the time to a second only, as the system's start is given in whole ones.
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return max(time.time() - psutil.Process().create_time(), 0.0)
    return max(uptime - started / os.sysconf("SC_CLK_TCK"), 0.0)
