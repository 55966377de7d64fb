"""The kernels for ARM, compiled by a cross compiler and run under emulation: a small model in every form of weights
gives what the build for AVX2 gives. Nothing here says how fast they are."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from server.kernels.cpu import build

CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
pytestmark = [
    pytest.mark.skipif(not os.environ.get("BOOMERANG_TEST_ARM"), reason="takes minutes: make test-arm"),
    pytest.mark.skipif(not (CROSS and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with the build for x86"),
    pytest.mark.timeout(900),
]
SOURCES = [str(Path(__file__).parent / "one_model.cpp"), str(build.SOURCES / "step.cpp")]


def outputs(compiler: str, flags: list[str], binary: Path, *runner: str) -> np.ndarray:
    options = ["-O0", "-std=c++17", "-pthread", "-w", f"-I{build.SOURCES}", *flags]
    subprocess.run([compiler, *options, *SOURCES, "-o", str(binary)], check=True)
    return np.frombuffer(subprocess.run([*runner, str(binary)], check=True, capture_output=True).stdout, np.float32)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> np.ndarray:
    binary = tmp_path_factory.mktemp("avx2") / "model"
    return outputs("g++", build.X86_VARIANTS["avx2"].flags, binary)


@pytest.mark.parametrize("variant", build.ARM_VARIANTS)
def test_every_form_of_weights_as_on_x86(variant, expected, tmp_path):
    found = outputs(CROSS, ["-static", *build.ARM_VARIANTS[variant].flags], tmp_path / "model", EMULATOR)
    assert np.isfinite(expected).all() and len(found) == len(expected)
    num_cases = 18
    cases = zip(found.reshape(num_cases, -1), expected.reshape(num_cases, -1), strict=True)
    for case, (ours, theirs) in enumerate(cases):
        scale = np.abs(theirs).max()
        # Where activations are rounded, a tie may fall the other way.
        assert 0.01 < scale < 1000 and np.abs(ours - theirs).max() < (1e-3 if case < 3 else 2e-2) * scale, case
