"""Finds or builds the kernel library that suits the processor and describes its C interface (step.h) to ctypes."""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p

import numpy as np

from server.kernels.cpu import build

# Forces one variant; for tests and for measuring what a variant is worth.
VARIANT_VARIABLE = "BOOMERANG_CPU_VARIANT"
FLOAT, BF16, INT8, BF12, WIDE, CODES = 0, 1, 2, 3, 12, 13  # BsType
BLOCK_TYPES = {"Q4_0": 4, "Q4_1": 5, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 9, "Q5_K": 10, "Q6_K": 11}
NESTED = {4: 14, 5: 15, 6: 16, 8: 17}  # by the bits that are read
_NO_MEMORY = 1  # BsStatus


class Weights(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("data", "scale", "exponents", "rest_start", "rest")),
        ("type", c_int32), ("rows", c_int32), ("more", c_void_p), ("nested", c_void_p),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in (
            "attn_norm_w", "attn_norm_b", "qkv_b", "q_norm_w", "k_norm_w", "o_b", "mlp_norm_w", "mlp_norm_b", "up_b",
            "down_b", "post_attn_norm_w", "post_mlp_norm_w", "cos", "sin",
        )),
        ("window", c_int64),
        *((name, Weights) for name in ("qkv", "o", "up", "down")),
    ]  # fmt: skip


class Term(ctypes.Structure):
    _fields_ = [("b", Weights), ("start", c_int32), ("stop", c_int32), ("rank", c_int32)]


class Factors(ctypes.Structure):
    _fields_ = [("a", Weights), ("num_terms", c_int32), ("terms", Term * 3)]


class Difference(ctypes.Structure):
    _fields_ = [
        ("attn_norm_w", c_void_p), ("mlp_norm_w", c_void_p),
        *((name, Factors) for name in ("qkv", "o", "up", "down")),
    ]  # fmt: skip


class End(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("embed", "positions", "norm_w", "norm_b", "head_b")),
        ("packed_embed", Weights), ("head", Weights),
    ]  # fmt: skip


class Spec(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in (
            "hidden", "intermediate", "num_heads", "num_kv_heads", "head_dim", "vocab", "layer_norm", "activation",
            "gated", "parallel_residual", "rotary_dim", "page_size", "type", "weight_type",
            "factor_type", "exact_activations", "kv_type", "wide_qk_norm", "rows_alone",
        )),
        *((name, c_float) for name in ("eps", "stream_eps", "scale", "norm_offset", "input_scale")),
    ]  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in (
            "num_tokens", "num_requests", "num_segments", "num_rows", "embed_cut", "norm_cut", "doorbell", "reserved",
        )),
        *((name, c_void_p) for name in (
            "program", "input_ids", "widths", "positions", "query_start", "slots", "block_tables",
        )),
        ("layer_stride", c_int64), ("slot_stride", c_int64), ("num_saves", c_int32), ("num_restores", c_int32),
        *((name, c_void_p) for name in ("saves", "restores", "states")),
        *((name, c_void_p) for name in ("rows", "k_pages", "v_pages", "out")),
    ]  # fmt: skip


class Pack(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in (
            "source", "target", "source_scale", "source_minimum", "scale", "exponents", "rest_start", "rest",
        )),
        *((name, c_int32) for name in ("N", "K", "gated", "type")),
    ]  # fmt: skip


# BsDraw of step.h, with the fields of `server.core.executor.Draw` in its order.
DRAW = np.dtype({
    "names": ["temperature", "top_p", "min_p", "top_k", "uniform"], "formats": ["f4", "f4", "f4", "i4", "f8"],
    "offsets": [8, 12, 16, 20, 0], "itemsize": 24,
})  # fmt: skip


TIMES = ("product", "attention", "place", "norm", "head", "embed")  # of bs_times


def choose() -> tuple[str, ctypes.CDLL, list[str]] | list[str]:
    """The best variant that this machine can run and its library, with why better ones were passed over.

    Only the reasons if there is none.
    """
    if not sys.platform.startswith("linux"):
        return ["the kernels are for Linux: they use its futexes"]
    forced = os.environ.get(VARIANT_VARIABLE)
    if forced and forced not in build.VARIANTS:
        raise ValueError(f"{VARIANT_VARIABLE}={forced}: not one of {', '.join(build.VARIANTS)}")
    reasons = []
    for variant in build.VARIANTS:
        if forced and variant != forced:
            continue
        if missing := build.missing_instructions(variant):
            reasons.append(f"{variant}: the processor lacks {', '.join(missing)}")
            continue
        try:
            library = load(variant)
        except (build.BuildError, OSError) as error:
            reasons.append(f"{variant}: not built: {error}")
            continue
        if code := library.bs_prepare():
            reasons.append(f"{variant}: the system refuses it: {os.strerror(code)}")
            continue
        return variant, library, reasons
    return reasons


def load(variant: str) -> ctypes.CDLL:
    """The library: installed beside its sources, else in the cache, else built there. Raises build.BuildError.

    Of its functions those that can fail raise MemoryError, or RuntimeError with the words of an exception of C++.
    """
    installed = build.SOURCES / build.library_name(variant)
    library = ctypes.CDLL(str(installed if installed.is_file() else build.build(variant)))
    library.bs_error.restype = c_char_p
    library.bs_packed_bytes.restype = c_int64
    library.bs_packed_bytes.argtypes = [c_int32] * 4
    library.bs_packed_channels.restype = c_int64
    library.bs_packed_channels.argtypes = [c_int32] * 2
    library.bs_page_bytes.restype = c_int64
    library.bs_page_bytes.argtypes = [POINTER(Spec), c_int32]
    library.bs_destroy.argtypes = [c_void_p]
    library.bs_destroy.restype = None
    library.bs_times.argtypes = [c_void_p, POINTER(c_double)]
    library.bs_times.restype = None

    def check(status: int, function: object, arguments: tuple) -> None:
        if status:
            raise (MemoryError if status == _NO_MEMORY else RuntimeError)(f"kernels: {library.bs_error().decode()}")

    for name, arguments in {
        "bs_measure": (POINTER(Pack), c_int32, c_int32),
        "bs_pack": (POINTER(Pack), c_int32, c_int32),
        "bs_create": (
            POINTER(c_void_p), POINTER(Spec), POINTER(Layer), POINTER(Difference), c_int32, POINTER(End), c_int32,
        ),
        "bs_step": (c_void_p, POINTER(Step)),
        "bs_head": (c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_void_p),
        "bs_greedy": (c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_void_p),
        "bs_draw": (c_void_p, c_void_p, c_int32, c_void_p, c_void_p),
    }.items():  # fmt: skip
        function = getattr(library, name)
        function.argtypes, function.restype, function.errcheck = arguments, c_int32, check
    return library


def create_engine(library: ctypes.CDLL, *arguments: object) -> int:
    """The address of a new engine (`bs_create`). Raises MemoryError, RuntimeError."""
    engine = c_void_p()
    library.bs_create(ctypes.byref(engine), *arguments)
    assert engine.value is not None
    return engine.value
