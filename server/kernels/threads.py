"""How many threads a step should have."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from server.core.machine import share_of_cores

_SYSTEM = Path("/sys/devices/system/cpu")


def available_threads(replicas: int = 1, system: Path = _SYSTEM) -> int:
    """OMP_NUM_THREADS, else the cores that this process may run on: two threads of a core share what products need.

    `replicas` processes divide the cores; a container's quota is its own.
    """
    with contextlib.suppress(ValueError, KeyError):
        return max(int(os.environ["OMP_NUM_THREADS"].split(",")[0]), 1)
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        import psutil

        return share_of_cores(psutil.cpu_count(logical=False) or 1, replicas)
    processors, cores = os.sched_getaffinity(0), set()
    for number in processors:
        try:
            cores.add((system / f"cpu{number}/topology/thread_siblings_list").read_text())
        except OSError:  # not told: each is taken for a core
            cores.add(str(number))
    return share_of_cores(len(cores), replicas)
