#!/usr/bin/env bash
# safetensors 0.8.0, numpy side, with ml_dtypes 0.6.0: it writes bfloat16 and float8 arrays that it cannot read back, and two
# readers of one module differ about which.
#
# `safetensors.numpy.save` and `save_file` take ml_dtypes' arrays and write them as BF16, F8_E4M3 and F8_E5M2, as other
# frameworks do. Of these `load_file` (and `safe_open(..., "np")`) reads bfloat16 alone: for float8 it looks for a type of
# that name in numpy itself, which has none, and raises AttributeError. `load`, from bytes, knows not even bfloat16: KeyError.
# So a checkpoint converter without torch passes every test that writes, and whether what it wrote can be read depends on the
# function. The header is right: torch reads all of them.
#
# Seen on 30 November 2026, Python 3.11, x86-64 (numpy 2.4.6):
#   float16: same bytes; load_file float16; load float16
#   bfloat16: same bytes; load_file bfloat16; load KeyError: 'BF16'
#   float8_e4m3fn: same bytes; load_file AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'; load KeyError: 'F8_E4M3'
#   float8_e5m2: same bytes; load_file AttributeError: module 'numpy' has no attribute 'float8_e5m2'; load KeyError: 'F8_E5M2'
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 ml_dtypes==0.6.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load, load_file, save, save_file


def attempt(read: Callable[[], dict[str, np.ndarray]]) -> str:
    try:
        return str(read()["x"].dtype)
    except (AttributeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


found = {}
for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
    tensors = {"x": np.arange(16).reshape(4, 4).astype(dtype)}
    save_file(tensors, "x.safetensors")
    same = Path("x.safetensors").read_bytes() == save(tensors)
    found[dtype.__name__] = attempt(lambda: load_file("x.safetensors")), attempt(lambda: load(save(tensors)))
    print(f"{dtype.__name__}: {'same bytes' if same else 'other bytes'}; load_file {found[dtype.__name__][0]}; load {found[dtype.__name__][1]}")
sys.exit(
    found
    != {
        "float16": ("float16", "float16"),
        "bfloat16": ("bfloat16", "KeyError: 'BF16'"),
        "float8_e4m3fn": ("AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'", "KeyError: 'F8_E4M3'"),
        "float8_e5m2": ("AttributeError: module 'numpy' has no attribute 'float8_e5m2'", "KeyError: 'F8_E5M2'"),
    }
)
PYTHON
