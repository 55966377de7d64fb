"""The models the peers load: the same weights, exported at the sizes that a benchmark needs (kept beside the peers)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.peers.environments import folder, python_of

_QUANTISE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
code = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params))
sys.exit(code)
"""


def checkpoint(size: int) -> Path:
    """The default pair at `size` layers as an ordinary checkpoint folder."""
    from model_store.export import export_size
    from model_store.pair import open_pair

    path = folder() / "models" / f"{size}L"
    if not (path / "config.json").is_file():
        export_size(open_pair(), size, path)
    return path


def gguf(size: int, quantised: bool = False) -> Path:
    """The same for llama.cpp, in bfloat16 or quantised by llama.cpp itself to Q8_0."""
    from model_store.export_gguf import write_gguf

    plain = folder() / "models" / f"{size}L-bf16.gguf"
    if not plain.is_file():
        write_gguf(checkpoint(size), plain)
    if not quantised:
        return plain
    small = plain.with_name(f"{size}L-q8_0.gguf")
    if not small.is_file():
        command = [python_of("llamacpp"), "-c", _QUANTISE, str(plain), str(small)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return small
