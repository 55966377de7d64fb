"""Builds the native CPU kernels: one shared library, a plain C interface, only a C++ compiler needed.

Standard library only, so that it can run in a build environment that has nothing installed. Run directly:
`python server/kernels/cpu/build.py [folder]`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = [
    "-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
    "-mavx512bf16", "-mfma",
    "-w",  # gcc 12 warns about its own intrinsics
]  # fmt: skip


class BuildError(RuntimeError):
    """No compiler, or it failed; the message says which."""


def library_name() -> str:
    """File name with a digest of sources and flags, so that a stale library is never loaded."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    return f"boomerang_cpu_{digest.hexdigest()[:16]}.so"


def compiler() -> str | None:
    return next((c for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if c and shutil.which(c)), None)


def build(folder: Path) -> Path:
    """Compile into `folder` and return the library's path. Raises BuildError."""
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler (g++, c++ or clang++, or CXX)")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / library_name()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / target.name
        command = [cxx, *FLAGS, "-o", str(output), str(SOURCES / "step.cpp")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(f"{cxx} failed: {result.stderr.strip().splitlines()[-1:] or result.returncode}")
        os.replace(output, target)  # whole or absent, also when two processes build at once
    return target


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES))
