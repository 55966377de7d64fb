"""Arrays of weights: numpy's on the host, torch's where an executor made of torch works with them.

Nothing here imports torch unless it is asked for a tensor: a server on the native executor never is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from model_store.errors import BoomerangError

# np.ndarray, or a torch.Tensor of the same shape: whoever loads a pair says which (`Pair.load`, `in_torch`).
Array = Any

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)


class MissingExtraError(BoomerangError, ImportError):
    """Something needs a library that an extra of the package brings."""


def need_torch(what: str) -> Any:
    """The module torch; MissingExtraError that says what wants it, if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs torch, which is not installed: pip install 'boomerang-serve[torch]'"
        ) from error
    return torch


def dtype_of(dtype: Any) -> np.dtype:
    """The dtype of this name; numpy's and torch's own objects are taken too."""
    return dtype if isinstance(dtype, np.dtype) else np.dtype(str(dtype).removeprefix("torch."))


def device_of(array: Array) -> str:
    """The type of device that an array lies on: "cpu", "cuda"."""
    return "cpu" if isinstance(array, np.ndarray) else array.device.type


def address(array: Array) -> int:
    """Of the first byte, which tells what shares memory."""
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data_ptr()


def as_type(array: Array, dtype: Any) -> Array:
    """In a dtype of its own library; the same array where nothing changes."""
    return array.astype(dtype, copy=False) if isinstance(array, np.ndarray) else array.to(dtype)


def float32(array: Array) -> Array:
    return array.astype(np.float32, copy=False) if isinstance(array, np.ndarray) else array.float()


def to_torch(array: Array, device: Any = "cpu") -> Any:
    """The torch.Tensor of the same numbers; on the CPU it shares the memory, unless that is read-only."""
    if not isinstance(array, np.ndarray):
        return array.to(device)
    torch = need_torch("this executor")
    if not array.flags.writeable:  # a file's map: torch has no such tensors
        array = array.copy()
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def to_numpy(tensor: Array) -> np.ndarray:
    """The inverse of `to_torch`; of a tensor on the CPU it shares the memory."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.view(need_torch("bfloat16").int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def in_torch(weights: Any, device: Any = "cpu", done: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """Weights (dataclasses, dicts, lists of arrays) with every array as a tensor on a device; what is shared stays so.

    Codes of a GGUF file stay the bytes that they are; on the CPU those stay arrays.
    """
    from model_store.quantized import CodedMatrix

    done = {} if done is None else done
    if id(weights) in done:
        return done[id(weights)][1]
    converted = weights
    if isinstance(weights, np.ndarray):
        converted = to_torch(weights, device)
    elif isinstance(weights, CodedMatrix):
        if str(device) != "cpu":
            parts = [dataclasses.replace(part, blocks=to_torch(part.blocks, device)) for part in weights.parts]
            converted = CodedMatrix(tuple(parts))
    elif isinstance(weights, dict):
        converted = {key: in_torch(value, device, done) for key, value in weights.items()}
    elif isinstance(weights, list):
        converted = [in_torch(value, device, done) for value in weights]
    elif dataclasses.is_dataclass(weights) and not isinstance(weights, type):
        fields = {f.name: in_torch(getattr(weights, f.name), device, done) for f in dataclasses.fields(weights)}
        converted = dataclasses.replace(weights, **fields)
    done[id(weights)] = weights, converted  # the original is kept too: an id is one object's only while it lives
    return converted
