"""Finds or builds the kernel library and describes its C interface (step.h) to ctypes."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

from server.kernels.cpu import build

_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")


class Layer(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in (
        "attn_norm_w", "attn_norm_b", "qkv_w", "qkv_b", "q_norm_w", "k_norm_w", "o_w", "o_b",
        "mlp_norm_w", "mlp_norm_b", "up_w", "up_b", "down_w", "down_b",
    )]  # fmt: skip


class Spec(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in (
            "hidden", "intermediate", "num_heads", "num_kv_heads", "head_dim", "vocab", "layer_norm", "activation",
            "gated", "parallel_residual", "rotary_dim", "page_size", "is_bf16",
        )),
        ("eps", c_float), ("scale", c_float), ("cos", c_void_p), ("sin", c_void_p),
    ]  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = [
        ("num_tokens", c_int32), ("num_requests", c_int32), ("num_segments", c_int32),
        ("program", c_void_p), ("positions", c_void_p), ("query_start", c_void_p), ("slots", c_void_p),
        ("block_tables", c_void_p), ("layer_stride", c_int64), ("slot_stride", c_int64),
        ("k_pages", c_void_p), ("v_pages", c_void_p), ("hidden", c_void_p),
    ]  # fmt: skip


class Draw(ctypes.Structure):
    _fields_ = [
        ("uniform", c_double), ("temperature", c_float), ("top_p", c_float), ("min_p", c_float), ("top_k", c_int32),
    ]  # fmt: skip


def missing_instructions() -> list[str]:
    """What this processor lacks of what the kernels use."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return list(_NEEDED)
    return [name for name in _NEEDED if name not in flags.split()]


def load() -> ctypes.CDLL:
    """The library: installed beside its sources, else in the cache, else built there. Raises build.BuildError."""
    name = build.library_name()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "boomerang" / "kernels"
    path = next((folder / name for folder in (build.SOURCES, cache) if (folder / name).is_file()), None)
    library = ctypes.CDLL(str(path or build.build(cache)))
    library.bs_create.restype = c_void_p
    library.bs_create.argtypes = [POINTER(Spec), POINTER(Layer), c_int32, c_int32]
    library.bs_destroy.argtypes = [c_void_p]
    library.bs_step.argtypes = [c_void_p, POINTER(Step)]
    library.bs_norm.argtypes = [c_void_p, c_void_p, c_int32, c_void_p, c_void_p]
    library.bs_head.argtypes = [c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_void_p]
    library.bs_draw.argtypes = [c_void_p, c_void_p, c_int32, POINTER(Draw), c_void_p]
    return library
