"""Builds the native CPU kernels: one shared library, a plain C interface, only a C++ compiler needed.

Standard library only, so that it can run in a build environment that has nothing installed. Run directly:
`python server/kernels/cpu/build.py [folder]`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w"]  # -w: gcc 12 warns about its own intrinsics
FLAGS += os.environ.get("BOOMERANG_CPU_FLAGS", "").split()  # of sanitizers, for one
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
_BF16 = ["-mavx512bf16", "-mavx512vnni"]  # no processor has the former without the latter


class Variant(NamedTuple):
    """One build of the same sources: compiler flags, and what the processor must have (names of /proc/cpuinfo)."""

    flags: list[str]
    instructions: tuple[str, ...]


_512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
# Best first.
X86_VARIANTS = {
    "amx": Variant(
        [*_AVX512, *_BF16, "-mamx-tile", "-mamx-bf16"], (*_512, "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
    ),
    "avx512_bf16": Variant([*_AVX512, *_BF16], (*_512, "avx512_bf16", "avx512_vnni")),
    "avx512": Variant(_AVX512, _512),
    "avx2_vnni": Variant(["-mavx2", "-mfma", "-mf16c", "-mavxvnni"], ("avx2", "fma", "avx_vnni")),
    "avx2": Variant(["-mavx2", "-mfma", "-mf16c"], ("avx2", "fma")),
}
ARM_VARIANTS = {
    "dotprod": Variant(["-march=armv8.2-a+dotprod"], ("asimd", "asimddp")),
    "neon": Variant(["-march=armv8-a"], ("asimd",)),
}
VARIANTS = ARM_VARIANTS if platform.machine().lower() in ("aarch64", "arm64") else X86_VARIANTS


def missing_instructions(variant: str) -> list[str]:
    """What this processor lacks of what a variant uses."""
    needed = VARIANTS[variant].instructions
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))  # on x86, on ARM
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
    """Where kernels are built: what one compiler has built of the same sources is not built again. Raises OSError."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "boomerang" / "kernels"
    except RuntimeError as error:  # a user without an entry in passwd, and no HOME
        raise OSError(f"no cache folder: {error}") from error


def _cached_name(variant: str, cxx: str) -> str:
    """Of a library in the cache, which may be shared by machines and outlive a compiler: a digest of those is added."""
    command, env = [cxx, "--version"], {**os.environ, "LC_ALL": "C"}
    version = subprocess.run(command, capture_output=True, text=True, check=False, env=env).stdout
    digest = hashlib.sha256("\n".join([version, platform.machine(), *platform.libc_ver()]).encode())
    return library_name(variant).replace(".so", f"_{digest.hexdigest()[:16]}.so")


def build(variant: str, folder: Path | None = None) -> Path:
    """The library of a variant in `folder` [the cache], compiled if it is not there. Raises BuildError, OSError.

    Who comes while another process compiles the same library waits for it: a compilation takes a whole core.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler (g++, c++ or clang++, or CXX)")
    folder = folder or cache_folder()
    target = folder / _cached_name(variant, cxx)
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(variant, folder):
            if not target.is_file():
                _compile(variant, cxx, target)
                _remove_old(variant, folder)
    with contextlib.suppress(OSError):
        os.utime(target)  # in use
    return target


def _compile(variant: str, cxx: str, target: Path) -> None:
    logger.info("compiling kernels (%s), about 30 s", variant)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        command = [cxx, *FLAGS, *VARIANTS[variant].flags, "-o", str(output), str(SOURCES / "step.cpp")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(f"{cxx} failed: {result.stderr.strip().splitlines()[-1:] or result.returncode}")
        os.replace(output, target)  # whole or absent


@contextlib.contextmanager
def _alone(variant: str, folder: Path) -> Iterator[None]:
    """One process at a time; where there are no such locks, or it is another user's, two may compile the same, which
    does no harm."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            file = held.enter_context((folder / f"{variant}.lock").open("w"))  # locked until it is closed
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.info("waiting for another process that compiles kernels (%s)", variant)
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_old(variant: str, folder: Path) -> None:
    """Libraries of a variant that nobody has asked for in a month, and what builds left that were killed."""
    digest = "[0-9a-f]" * 16
    for pattern, days in ((f"boomerang_cpu_{variant}_{digest}*.so", 30), ("tmp*", 1)):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - days * 86400:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def build_all(folder: Path, for_this_machine: bool = False) -> list[Path]:
    """Put every variant that the compiler can make into `folder` (an image may run on any processor), or the best one
    for this machine. They are built in the cache, or in a scratch folder if that fails.

    Logs a warning for each variant that is passed over. Raises BuildError if there is none, OSError.
    """
    with tempfile.TemporaryDirectory() as scratch:

        def attempt(variant: str) -> Path | Exception:
            try:
                try:
                    return build(variant)
                except (BuildError, OSError):  # BuildError too: that a cache is full may be the compiler's to say
                    return build(variant, Path(scratch))
            except (BuildError, OSError) as error:
                return error

        results: dict[str, Path | Exception] = {}
        if for_this_machine:
            for variant in VARIANTS:
                if not missing_instructions(variant):
                    results[variant] = attempt(variant)
                    if isinstance(results[variant], Path):
                        break
        else:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            with ThreadPoolExecutor(cores) as threads:
                results.update(zip(VARIANTS, threads.map(attempt, VARIANTS), strict=True))
        built = {variant: result for variant, result in results.items() if isinstance(result, Path)}
        if not built:
            failures = [result for result in results.values() if isinstance(result, Exception)]
            raise failures[-1] if failures else BuildError("no variant suits this processor")
        for variant, result in results.items():
            if variant not in built:
                logger.warning("kernels (%s) were not built: %s", variant, result)
        folder.mkdir(parents=True, exist_ok=True)
        return [_install(library, folder / library_name(variant)) for variant, library in built.items()]


def _install(library: Path, target: Path) -> Path:
    if not target.is_file():
        scratch = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(library, scratch)
        os.replace(scratch, target)  # never half a file, nor one changed under a process that runs it
    return target


if __name__ == "__main__":
    print(*build_all(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES), sep="\n")
