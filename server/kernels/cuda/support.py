"""What the CUDA executor does not do, and what it needs of the machine."""

from __future__ import annotations

import os
import shutil
import sysconfig

import torch

from model_store.pair import LoadedPair
from server.core.config import EngineConfig
from server.kernels.cuda.runtime import INTERPRETED


def refusal(pair: LoadedPair, config: EngineConfig) -> str | None:
    """Why this pair or this machine cannot have the CUDA executor, as the end of a sentence; None if it can."""
    if pair.device != "cuda" and not (INTERPRETED and config.executor == "cuda"):
        return f"runs on cuda, not on {pair.device}"
    if pair.device == "cuda":
        device = pair.ends["teacher"].final_norm_weight.device
        if device.index:
            return "runs on the first visible device only: set CUDA_VISIBLE_DEVICES instead of --device"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"needs compute capability 8.0, the device has {major}.{minor}"
        if missing := _missing_for_triton():
            return f"Triton needs {missing} at run time"
    if config.kv_cache_dtype == "int8":
        return "takes no --kv-cache-dtype int8"
    if reason := _not_computed(pair, config):
        return reason
    if pair.low_rank and len(pair.shared_stations) < len(pair.elasticity.stations):
        return "runs students kept as differences only where all of their layers are"
    return None


def _not_computed(pair: LoadedPair, config: EngineConfig) -> str | None:
    """What of a family the kernels here do not compute."""
    spec = pair.spec
    lacking = {
        "norms of what attention and the MLP give": spec.norm_after,
        "layers without a norm before them": not spec.norm_before,
        "norms whose weights are offsets": spec.norm_offset != 0.0,
        "norms over all heads together": spec.qk_norm_of_all,
    }
    for what, is_there in lacking.items():
        if is_there:
            return f"has no kernel for {what} ({spec.family})"
    windows = [layer.window for layer in pair.layers.values() if layer.window is not None]
    if windows and min(windows) < config.max_model_len:
        return f"has no kernel for sliding windows: --max-model-len up to {min(windows)} is served"
    return None


def _missing_for_triton() -> str | None:
    """What Triton compiles its launchers with and cannot find, as it looks for it."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "gcc, clang or CC"
    headers = sysconfig.get_paths()["include"]
    return None if os.path.exists(os.path.join(headers, "Python.h")) else f"Python.h in {headers}"
