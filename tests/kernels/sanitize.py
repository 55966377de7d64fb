"""`python -m tests.kernels.sanitize [options of pytest]`: the native kernels under AddressSanitizer and
UndefinedBehaviorSanitizer, at the widest vectors that this machine has and at AVX2; what `make sanitize` runs.

The kernels' own tests, and checkpoints that somebody damaged. The first access outside a tensor, or the first undefined
operation, ends it with a report and a status that is not 0. Takes some minutes. Needs gcc and its sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
CHECKPOINTS = "400"
FOLDER = Path(__file__).parent
# What has kernels of its own, and what builds them.
ELSEWHERE = {"test_build.py", "test_amx_emulated.py", *(file.name for file in FOLDER.glob("test_cuda_*.py"))}


def main(options: list[str]) -> int:
    os.environ["BOOMERANG_CPU_FLAGS"] = FLAGS  # read when the module is imported
    from server.kernels.cpu import build

    cxx = build.compiler()
    runnable = [variant for variant in build.VARIANTS if not build.missing_instructions(variant)]
    if cxx is None or not runnable:
        print("no C++ compiler, or no variant for this processor", file=sys.stderr)
        return 2
    chosen = dict.fromkeys([runnable[0], runnable[-1]])
    for variant in chosen:
        print(f"building {variant} with {FLAGS}", flush=True)
        build.build(variant)  # not under the sanitizer itself

    def runtime(name: str) -> str:
        return subprocess.check_output([cxx, f"-print-file-name={name}"], text=True).strip()

    # The C++ runtime too: the sanitizer looks for its `throw` when it starts, and Python has none.
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # of an interpreter; what is refused is an error
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "BOOMERANG_MALFORMED": CHECKPOINTS,
    }
    others = (f"{variant}{end}" for variant in build.VARIANTS if variant not in chosen for end in "-]")
    selection = " and ".join(f"not {name}" for name in others)
    files = [str(file) for file in sorted(FOLDER.glob("test_*.py")) if file.name not in ELSEWHERE]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-n0", "--timeout=3000"]  # sanitized code is slow
    command = [*pytest, "-k", selection, *files, *options]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
