"""Builds the native CPU kernels: one shared library, a plain C interface, only a C++ compiler needed.

Standard library only, so that it can run in a build environment that has nothing installed. Run directly:
`python server/kernels/cpu/build.py [folder]`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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


def cache_folder() -> Path:
    """Where kernels are built: what has been built once for the same sources and flags is not built again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "boomerang" / "kernels"


def build(variant: str, folder: Path | None = None) -> Path:
    """The library of a variant in `folder` [the cache], compiled if it is not there. Raises BuildError, OSError.

    Who comes while another process compiles the same library waits for it: a compilation takes a whole core.
    """
    folder = folder or cache_folder()
    target = folder / library_name(variant)
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f"{variant}.lock"):
            if not target.is_file():
                _compile(variant, target)
    return target


def _compile(variant: str, target: Path) -> None:
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler (g++, c++ or clang++, or CXX)")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        command = [cxx, *FLAGS, *VARIANTS[variant].flags, "-o", str(output), str(SOURCES / "step.cpp")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(f"{cxx} failed: {result.stderr.strip().splitlines()[-1:] or result.returncode}")
        os.replace(output, target)  # whole or absent


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; where the system has no such locks two may compile the same, which does no harm."""
    with lock.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield


def build_all(folder: Path, for_this_machine: bool = False) -> list[Path]:
    """Put every variant that the compiler can make into `folder` (an image may run on any processor), or the best one
    for this machine. They are built in the cache, or in a scratch folder if nothing can be written there.

    Raises BuildError if there is none, OSError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        where = cache_folder() if _is_writable(cache_folder()) else Path(scratch)

        def attempt(variant: str) -> Path | BuildError:
            try:
                return build(variant, where)
            except BuildError as error:
                return error

        results: list[Path | BuildError] = [BuildError("no variant suits this processor")]
        if for_this_machine:
            for variant in VARIANTS:
                if not isinstance(results[-1], Path) and not missing_instructions(variant):
                    results.append(attempt(variant))
        else:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                results += threads.map(attempt, VARIANTS)
        built = [result for result in results if isinstance(result, Path)]
        if not built:
            raise results[-1]
        folder.mkdir(parents=True, exist_ok=True)
        return [_install(library, folder / library.name) for library in built]


def _install(library: Path, target: Path) -> Path:
    if not target.is_file():
        scratch = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(library, scratch)
        os.replace(scratch, target)  # never half a file, nor one changed under a process that runs it
    return target


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


if __name__ == "__main__":
    print(*build_all(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES), sep="\n")
