"""In what form the settings have a pair's weights in memory; the weights in that form."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from model_store.arrays import dtype_of, need_torch
from model_store.store import store_root
from server.config import Settings
from server.core.machine import available_memory

if TYPE_CHECKING:
    import numpy as np

    from model_store.loaded import LoadedPair
    from model_store.pair import Pair
    from model_store.weight_form import WeightForm

logger = logging.getLogger(__name__)

_NESTED_BITS = {"q8": 8, "q6": 6, "q5": 5, "q4": 4}  # --quantization
_LOAD_SHARE = 0.8  # of free memory, that two forms of the weights may take while they are loaded


def pick_device(settings: Settings) -> str:
    """`auto` is CUDA where there is one. MissingExtraError if a device is asked for that only torch knows."""
    if settings.device == "cpu":
        return "cpu"
    if settings.device != "auto":
        return str(need_torch(f"--device {settings.device}").device(settings.device))
    if not _has_cuda_driver() or importlib.util.find_spec("torch") is None:  # told without importing torch
        return "cpu"
    return "cuda" if need_torch("--device auto").cuda.is_available() else "cpu"


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def pick_dtype(settings: Settings) -> np.dtype:
    """`auto` is bfloat16: half the bytes to stream, and the executors convert where the processor cannot."""
    return dtype_of("bfloat16" if settings.dtype == "auto" else settings.dtype)


def open_settings_pair(settings: Settings) -> Pair:
    """The pair that the settings name (the default pair if they name none)."""
    from model_store.pair import open_pair

    return open_pair(settings.teacher, settings.student, patch_order=settings.patch_order, store=settings.store)


def weight_form(settings: Settings, pair: Pair) -> WeightForm:
    """In what form the pair is loaded. ValueError for settings that do not go together or with this pair."""
    form = _base_form(settings, pair)
    return _with_widths(settings, pair, form) if settings.precision_dial != "off" else form


def _with_widths(settings: Settings, pair: Pair, form: WeightForm) -> WeightForm:
    """The form with nested codes beside it or in its place; as it is where the dial is neither possible nor asked for.

    What a request gets that asks for no precision is never changed unasked: `auto` adds codes to the exact form, if
    the store has them and both fit.
    """
    from model_store.nested import WIDTHS
    from model_store.nested_store import has_nested
    from model_store.weight_form import Storage
    from model_store.width import EXACT

    is_asked = settings.precision_dial == "on" or settings.exact == "off"
    if not is_asked and form.storage is not Storage.AS_LOADED:  # as small as what the dial would read
        return form
    refusal = None
    device = pick_device(settings)
    if not _reads_codes(settings, device):
        refusal = f"the dial needs a CPU, or the cuda executor; this is {settings.executor} on {device}"
    elif form.storage in (Storage.INT8, Storage.NESTED):
        refusal = f"it does not go with --quantization {settings.quantization}"
    if refusal and is_asked:
        name = "--exact off" if settings.exact == "off" else "--precision-dial on"
        raise ValueError(f"{name}: {refusal}")
    if refusal:
        return form
    if not is_asked and not has_nested(pair, store_root(settings.store)):
        return form
    widths = tuple(sorted(WIDTHS))
    both = dataclasses.replace(form, widths=(*widths, EXACT))
    most = min(settings.memory_budget or math.inf, _LOAD_SHARE * _memory(settings, device))
    if settings.exact == "on" or (settings.exact == "auto" and pair.union_bytes(pair.elasticity.sizes, both) <= most):
        return both
    if not is_asked:
        return form
    if settings.exact == "auto":
        logger.warning("no memory for the weights as loaded beside their codes: 8 bits are the most that can be read")
    return dataclasses.replace(form, storage=Storage.NESTED, low_rank=False, widths=widths)


def _reads_codes(settings: Settings, device: str) -> bool:
    """Whether an executor there has a kernel for codes: on a CPU each has, on an NVIDIA GPU cuda."""
    return device == "cpu" or (device.startswith("cuda") and settings.executor != "torch")


def _memory(settings: Settings, device: str) -> int:
    """Bytes that weights may take: of a GPU all, for this is asked again when they lie there."""
    if device == "cpu":
        return available_memory(settings.max_replicas)
    return need_torch(device).cuda.mem_get_info(device)[1]


def _base_form(settings: Settings, pair: Pair) -> WeightForm:
    """The form without a dial. ValueError if low-rank differences were asked of an ordinary student.

    `--low-rank auto` keeps differences if the pair would not fit --memory-budget otherwise.
    """
    from model_store.weight_form import Storage, WeightForm

    if settings.quantization is None:
        keeps_codes = pair.has_codes and _reads_codes(settings, pick_device(settings))
        storage = Storage.CODES if keeps_codes else Storage.AS_LOADED
    else:
        bits = _NESTED_BITS.get(settings.quantization)
        if bits is not None:
            if settings.low_rank == "on":
                raise ValueError(f"--low-rank on does not go with --quantization {settings.quantization}")
            return WeightForm(
                pick_dtype(settings), storage=Storage.NESTED, bits=bits, kv_cache_dtype=settings.kv_cache_dtype
            )
        storage = Storage.AS_LOADED if settings.quantization == "none" else Storage(settings.quantization)
    form = WeightForm(pick_dtype(settings), storage=storage, kv_cache_dtype=settings.kv_cache_dtype)
    if not pair.is_low_rank:
        if settings.low_rank == "on":
            raise ValueError("--low-rank on: this student is not kept as a low-rank difference, or there is none")
        return form
    low_rank = settings.low_rank == "on"
    if settings.low_rank == "auto" and settings.memory_budget is not None:
        low_rank = pair.union_bytes(pair.elasticity.sizes, form) > settings.memory_budget
    return dataclasses.replace(form, low_rank=low_rank)


def nested_codes(pair: Pair, store: Path | str | None) -> Path:
    """The file of a pair's nested codes. They are made first if the store has none: a minute for 135M parameters."""
    from model_store import nested_store

    file = nested_store.nested_file(pair, store_root(store))
    if not nested_store.is_current(file):
        need_torch("making nested codes")
        from server.nesting import make_nested

        make_nested(pair, file)
    return file


def load_weights(settings: Settings, pair: Pair, form: WeightForm, device: str) -> LoadedPair:
    """The pair's tensors in this form. Nested codes are made first if the store has none yet: a minute for 135M
    parameters. Raises PairError or WeightError."""
    from model_store.weight_form import Storage

    if form.storage is not Storage.NESTED and len(form.widths) == 1:
        return pair.load(form, device, settings.memory_budget)
    from model_store import nested_store

    file = nested_codes(pair, settings.store)
    loaded = pair.load(form, "cpu", settings.memory_budget)  # nothing goes to a device that codes take the place of
    nested_store.put(loaded, file, form)
    return loaded if device == "cpu" else loaded.in_torch(device)
