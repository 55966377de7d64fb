"""CUDA graphs by key: a sequence of launches recorded once and replayed with one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)


def buckets(max_rows: int) -> list[int]:
    """Row counts to record for, ascending; a step runs in the smallest one that holds its rows."""
    steps = [1, 2, 4, *range(8, 32, 8), *range(32, 128, 16), *range(128, 256, 32), *range(256, max_rows + 64, 64)]
    return [rows for rows in steps if rows < max_rows] + [max_rows]


def bucket_of(rows: int, sizes: list[int]) -> int:
    return next(size for size in sizes if size >= rows)


class Graphs:
    """Runs functions whose launches are always the same for a key; what they read and write lies at fixed addresses.

    All graphs share one memory pool: none of them leaves anything in it that another one could destroy. Without CUDA,
    or with `enabled` false, functions are called as they are.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self._stream = torch.cuda.Stream(device) if self.enabled else None

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget all graphs: an address they know has changed."""
        self._graphs.clear()

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Do what `function` does. The first time for a key it is called, then recorded."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        function()  # also compiles kernels, which must not happen while recording
        if self.enabled:
            self._record(key, function)

    def _record(self, key: Hashable, function: Callable[[], None]) -> None:
        assert self._stream is not None, "there is one where graphs are enabled"
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            # What was to be recorded has just run, so it is only recording that fails: most likely for lack of memory.
            logger.warning("CUDA graphs cannot be recorded, %s and later ones run without: %s", key, error)
            self.enabled = False
            return
        finally:
            current.wait_stream(self._stream)
        self._graphs[key] = graph
