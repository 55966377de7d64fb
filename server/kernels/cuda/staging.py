"""Small host arrays to the device and back without waiting: pinned memory, one copy each way per step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import DTypeLike


class Upload:
    """Packs host arrays into one device buffer with one asynchronous copy.

    Two pinned buffers take turns, so that filling the next one never waits for the copy before. The device buffer needs
    no such care: its readers were enqueued before the copy that overwrites it.
    """

    def __init__(self, capacity: int, dtype: DTypeLike, device: torch.device) -> None:
        self._dtype, self._device = np.dtype(dtype), device
        self._turn = 0
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        torch_dtype = torch.from_numpy(np.zeros(0, self._dtype)).dtype
        is_cuda = self._device.type == "cuda"
        self._host = [torch.zeros(capacity, dtype=torch_dtype, pin_memory=is_cuda) for _ in range(2)]
        self.buffer = torch.zeros(capacity, dtype=torch_dtype, device=self._device)

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Views of the device buffer that hold the arrays once the stream gets there; valid until the next send.

        The buffer grows if they do not fit: not for views that a captured graph reads.
        """
        total = sum(array.size for array in arrays)
        if total > len(self.buffer):
            for event in self._copied:
                if event is not None:
                    event.synchronize()
            self._allocate(max(total, 2 * len(self.buffer)))
        self._turn = 1 - self._turn
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        host = self._host[self._turn].numpy()
        views, start = [], 0
        for array in arrays:
            stop = start + array.size
            host[start:stop] = array.reshape(-1)
            views.append(self.buffer[start:stop].view(array.shape))
            start = stop
        self.buffer[:total].copy_(self._host[self._turn][:total], non_blocking=True)
        if self._device.type == "cuda":
            event = self._copied[self._turn] = event or torch.cuda.Event()
            event.record()
        return views


class Download:
    """A copy of device values that is on its way to the host. `values` are those on the device."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values.clone()

    def ids(self, rows: torch.Tensor) -> torch.Tensor:
        """Of these rows, as input ids that the host does not know yet: 0 for -1, which it will see."""
        return self.values.index_select(0, rows).clamp_min(0)

    def wait(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
