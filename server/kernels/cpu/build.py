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
from typing import NamedTuple

SOURCES = Path(__file__).parent
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w"]  # -w: gcc 12 warns about its own intrinsics
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
_BF16 = ["-mavx512bf16", "-mavx512vbmi"]  # the latter widens int8 weights


class Variant(NamedTuple):
    """One build of the same sources: compiler flags, and what the processor must have (names of /proc/cpuinfo)."""

    flags: list[str]
    instructions: tuple[str, ...]


_512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
# Best first.
VARIANTS = {
    "amx": Variant(
        [*_AVX512, *_BF16, "-mamx-tile", "-mamx-bf16"], (*_512, "avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16")
    ),
    "avx512_bf16": Variant([*_AVX512, *_BF16], (*_512, "avx512_bf16", "avx512vbmi")),
    "avx512": Variant(_AVX512, _512),
    "avx2": Variant(["-mavx2", "-mfma", "-mf16c"], ("avx2", "fma")),
}


def missing_instructions(variant: str) -> list[str]:
    """What this processor lacks of what a variant uses."""
    needed = VARIANTS[variant].instructions
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return list(needed)
    return [name for name in needed if name not in flags.split()]


class BuildError(RuntimeError):
    """No compiler, or it failed; the message says which."""


def library_name(variant: str) -> str:
    """File name with a digest of sources and flags, so that a stale library is never loaded."""
    digest = hashlib.sha256(" ".join([*FLAGS, *VARIANTS[variant].flags]).encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    return f"boomerang_cpu_{variant}_{digest.hexdigest()[:16]}.so"


def compiler() -> str | None:
    return next((c for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if c and shutil.which(c)), None)


def build(folder: Path, variant: str) -> Path:
    """Compile one variant into `folder` and return the library's path. Raises BuildError."""
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler (g++, c++ or clang++, or CXX)")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / library_name(variant)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / target.name
        command = [cxx, *FLAGS, *VARIANTS[variant].flags, "-o", str(output), str(SOURCES / "step.cpp")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(f"{cxx} failed: {result.stderr.strip().splitlines()[-1:] or result.returncode}")
        os.replace(output, target)  # whole or absent, also when two processes build at once
    return target


def build_all(folder: Path, for_this_machine: bool = False) -> list[Path]:
    """Every variant that the compiler can make (an image may run on any processor), or the best one for this machine.

    Raises BuildError if there is none.
    """
    built, errors = [], [BuildError("no variant suits this processor")]
    for variant in VARIANTS:
        if for_this_machine and (built or missing_instructions(variant)):
            continue
        try:
            built.append(build(folder, variant))
        except BuildError as error:
            errors.append(error)
    if not built:
        raise errors[-1]
    return built


if __name__ == "__main__":
    print(*build_all(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES), sep="\n")
