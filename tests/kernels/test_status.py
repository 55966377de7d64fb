"""What goes wrong inside the library is an exception of Python, and the engine goes on."""

import ctypes
import os
import subprocess

import numpy as np
import pytest

from server.core.executor import Draw
from server.kernels.cpu import build, library

HUGE = 2**31 - 1
WIDE = 1 << 20  # HUGE rows of it lie beyond what an address can say: no system, however generous, gives that


@pytest.fixture(scope="module")
def lib():
    chosen = library.choose()
    if isinstance(chosen, list):
        pytest.skip("; ".join(chosen))
    return chosen[1]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def engine(lib, request):
    spec = library.Spec(hidden=WIDE, intermediate=16, num_heads=1, num_kv_heads=1, head_dim=16, vocab=16, page_size=32)
    tables = (library.Layer * 1)(), (library.Difference * 1)(), 1, (library.End * 2)()
    made = library.create_engine(lib, ctypes.byref(spec), *tables, request.param)
    yield made
    lib.bs_destroy(made)


def test_memory_that_cannot_be_had_is_a_memory_error(lib, engine):
    for _ in range(2):
        with pytest.raises(MemoryError, match="no more memory"):
            lib.bs_step(engine, ctypes.byref(library.Step(num_tokens=HUGE, doorbell=-1)))
        with pytest.raises(MemoryError, match="no more memory"):
            lib.bs_head(engine, None, None, HUGE, 0, None)
        # And what fits is computed.
        lib.bs_step(engine, ctypes.byref(library.Step(doorbell=-1)))
        logits, tokens = np.zeros((2, 16), np.float32), np.full(2, -1, np.int32)
        logits[:, 7] = 5
        rows = np.array([Draw(0.0, 1.0, 0.0, 0, 0.5)] * 2, library.DRAW)
        lib.bs_draw(engine, logits.ctypes.data, 2, rows.ctypes.data, tokens.ctypes.data)
        assert tokens.tolist() == [7, 7]


THROWING = r"""
#include <atomic>
#include <new>
#include <stdexcept>

#include "pool.h"

int main() {
    for (int threads : {1, 2, 4}) {
        boomerang::Pool pool(threads);
        for (int round = 0; round < 500; round++) {
            std::atomic<int> ran{0};
            bool was_told = false;
            pool.begin();
            try {
                pool.run(64, [&](int chunk, int) {
                    ran++;
                    if (chunk % 8 == round % 8) throw std::bad_alloc();
                });
            } catch (const std::bad_alloc&) {
                was_told = true;
            }
            pool.end();
            if (!was_told || (threads > 1 && ran != 64)) return 1;
            ran = 0;
            pool.begin();
            pool.run(64, [&](int, int) { ran++; });
            pool.end();
            if (ran != 64) return 2;
        }
    }
}
"""


def test_what_a_thread_of_the_team_throws_reaches_the_caller(tmp_path):
    if (cxx := build.compiler()) is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "throwing.cpp", tmp_path / "throwing"
    source.write_text(THROWING)
    flags = [*(flag for flag in build.FLAGS if flag != "-shared"), "-O1", "-mavx2", f"-I{build.SOURCES}"]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # of `make sanitize`
    subprocess.run([cxx, *flags, "-o", str(program), str(source)], check=True, env=environment)
    assert subprocess.run([program], timeout=60, check=False, env=environment).returncode == 0
