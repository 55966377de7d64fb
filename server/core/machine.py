"""What this process may use of its machine: memory and processors, within the limits of its container."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def available_memory(replicas: int = 1, root: Path = _ROOT, machine: int | None = None) -> int:
    """Bytes that can be had without swapping: a share of the machine's, which `replicas` processes divide, within the
    limits of this container (cgroup v2 or v1), which are its own. psutil knows the machine's, not the container's.

    Of what a container uses, files that were not read again lately do not count: the kernel gives them up first
    (`working set` in Kubernetes' words). Without that, reading the weights would seem to fill it.
    """
    available = (psutil.virtual_memory().available if machine is None else machine) // replicas
    for folder, is_v2 in _groups("memory", root):
        limit, used = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            headroom = int((folder / limit).read_text()) - int((folder / used).read_text())
            available = min(available, headroom + _idle_file_bytes(folder, is_v2))
    return max(available, 0)


def _idle_file_bytes(folder: Path, is_v2: bool) -> int:
    name = "inactive_file" if is_v2 else "total_inactive_file"
    with contextlib.suppress(OSError, ValueError):
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(facts.get(name, 0))
    return 0


def processor_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time that this container gets (`docker run --cpus`, a limit in Kubernetes); None: no limit.

    More threads than that are all stopped for the rest of each period once they have used it up together.
    """
    quotas = []
    for folder, is_v2 in _groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            if is_v2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0 and period > 0:  # v1: -1 is no limit
                quotas.append(quota / period)
    return min(quotas, default=None)


def share_of_cores(cores: int, replicas: int = 1, root: Path = _ROOT) -> int:
    """Threads for one of `replicas` processes that divide a machine's cores, at most the container's own quota."""
    return max(min(cores // replicas, int(processor_quota(root) or cores)), 1)


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the group of this process and those above it, and whether each is of cgroup v2.

    In a container the group's own folder is mostly mounted as the root, whatever /proc/self/cgroup says.
    """
    groups = [""]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = [*line.split(":", 2), "-", ""][:3]  # number:controllers:path
            if controllers == "" or controller in controllers.split(","):
                parts = [part for part in path.split("/") if part not in ("", "..")]
                groups += ["/".join(parts[: i + 1]) for i in range(len(parts))]
    base = root / "sys/fs/cgroup"
    for group in dict.fromkeys(groups):
        yield base / group, True
        yield base / controller / group, False


def trim_heap() -> None:
    """Give what the C library keeps of freed memory back to the system, where it knows how (glibc)."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
