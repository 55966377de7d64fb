"""Small host arrays to the device without waiting for it."""

from __future__ import annotations

import numpy as np
import torch


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device, for operations enqueued from now on. On the CPU it shares the array's memory."""
    host = torch.from_numpy(array)
    if device.type == "cuda":
        host = host.pin_memory()  # else the copy would wait for all that the device has to do
    return host.to(device, non_blocking=True)
