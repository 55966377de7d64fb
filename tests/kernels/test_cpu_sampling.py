"""The native draw against the sampler's own: same rules, same uniform number, same token."""

import ctypes
import random

import numpy as np
import pytest

from server.core.executor import Draw
from server.engine.sampler import Sampler
from server.kernels.cpu import library
from server.kernels.cpu.executor import NativeExecutor
from tests.engine.test_sampler import LOGITS, expect, make_request, softmax

VOCAB = 5003


class Drawer:
    """A native executor without a model: only its vocabulary matters for drawing."""

    def __init__(self, vocab: int) -> None:
        _, self._lib, _ = library.choose()
        spec = library.Spec(hidden=16, intermediate=16, num_heads=1, num_kv_heads=1, head_dim=16, vocab=vocab)
        self._engine = library.create_engine(
            self._lib, ctypes.byref(spec), (library.Layer * 1)(), (library.Difference * 1)(), 1, (library.End * 2)(), 2
        )

    draw = NativeExecutor.draw
    __del__ = NativeExecutor.__del__


@pytest.fixture(scope="module", autouse=True)
def _needs_native():
    if isinstance(reasons := library.choose(), list):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize(
    "sampling",
    [
        {}, {"temperature": 0.3}, {"temperature": 2.0}, {"min_p": 0.1}, {"top_k": 1}, {"top_k": 7}, {"top_k": 4000},
        {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 50, "top_p": 0.8}, {"top_k": 50, "min_p": 0.02},
        {"top_p": 0.7, "min_p": 0.05, "temperature": 0.6}, {"temperature": 0},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("spread", [0.2, 1.0, 6.0])
def test_native_draw_follows_the_sampler(sampling, spread):
    logits = np.random.default_rng(0).standard_normal((64, VOCAB), np.float32) * np.float32(spread)
    drawer = Drawer(VOCAB)
    reference = Sampler().sample(logits.copy(), [make_request(seed=i, **sampling) for i in range(64)])
    native = Sampler(draw=drawer.draw).sample(logits.copy(), [make_request(seed=i, **sampling) for i in range(64)])
    same = sum(a.token_id == b.token_id for a, b in zip(reference, native, strict=True))
    assert same >= 62  # float32 sums in another order may move a boundary past a uniform number


def test_native_frequencies_and_masked_entries():
    logits = LOGITS.copy()
    logits[1] = -np.inf
    drawer, rng = Drawer(len(logits)), random.Random(0)
    rows = np.tile(logits, (4000, 1))
    tokens = drawer.draw(rows, [Draw(1.0, 1.0, 0.0, 0, rng.random()) for _ in range(4000)])
    measured = np.bincount(tokens, minlength=len(logits)) / 4000
    assert measured[1] == 0
    expect(softmax(logits), measured)
