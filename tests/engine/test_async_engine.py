"""The asyncio face of the engine on the native executor: every token is heard, once and in order, whatever fails."""

import asyncio
import contextlib
import dataclasses
import gc
import os
import random
import re
from collections import Counter

import pytest
import torch

from model_store.pair import open_pair
from model_store.weight_form import WeightForm
from server.config import Settings
from server.core.request import Request, SamplingParams
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.loading import engine_config
from server.observe.metrics import Metrics
from tests.api.tiny import make_pair

NUM_REQUESTS = 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("async"))


def make_engine(folders, metrics=None, **changes) -> Engine:
    settings, cpu = Settings(dtype="float32", device="cpu"), "cpu"
    pair = open_pair(*folders)
    config = engine_config(settings, pair, torch.float32, cpu)
    return Engine(
        pair.load(WeightForm(torch.float32)), dataclasses.replace(config, max_num_seqs=8, **changes), metrics=metrics
    )


async def converse(engine: Engine, rng: random.Random) -> Counter:
    """Many requests at once, some of which leave early; what became of them."""
    front, told = AsyncEngine(engine), Counter()
    await front.start()

    async def ask(number: int) -> None:
        await asyncio.sleep(rng.random())
        prompt = [rng.randrange(3, 300) for _ in range(rng.randint(1, 40))]
        sampling = SamplingParams(max_tokens=rng.randint(1, 50), temperature=0.0, ignore_eos=True)
        request = Request(f"r{number}", prompt, sampling, sizes=(rng.choice(engine.sizes),))
        stream, heard = front.submit(request), []
        async for output in stream:
            heard += output.new_token_ids
            if number % 7 == 0 and len(heard) > 5:
                await stream.aclose()
                told["left"] += 1
                return
        told[output.finish_reason] += 1
        told["tokens"] += len(heard)
        if output.finish_reason == "length":
            assert len(heard) == sampling.max_tokens

    try:
        await asyncio.wait_for(asyncio.gather(*map(ask, range(NUM_REQUESTS))), 60)
    finally:
        await front.stop()
    assert not front._outbox and not front.is_alive
    return told


def open_files() -> set[tuple[str, str]]:
    """(descriptor, what it is) of all that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


@pytest.mark.parametrize("case", ["plain", "steps fail", "speculative"])
def test_every_token_is_heard_once_and_in_order(folders, case):
    changes = {"speculative_size": 4, "num_speculative_tokens": 2} if case == "speculative" else {}
    metrics = Metrics()
    engine = make_engine(folders, metrics, **changes)
    if not engine.executor.can_ring:
        pytest.skip("no native kernels here")
    metrics.attach(engine, "tiny", 512)
    gc.collect()  # what earlier tests left open; what of it is closed in the middle of this one is none of its business
    before, rng = open_files(), random.Random(0)
    if case == "steps fail":
        forward = engine.executor.forward

        def failing(batch):  # before the step rings: what it should have handed over must be heard all the same
            if batch.num_requests > 1 and rng.random() < 0.05:
                raise RuntimeError("injected")
            return forward(batch)

        engine.executor.forward = failing
    told = asyncio.run(converse(engine, rng))
    num_tokens = told.pop("tokens")
    assert told.total() == NUM_REQUESTS and told["length"] >= NUM_REQUESTS // 2
    assert set(told) <= {"length", "left", *({"error"} if case == "steps fail" else ())}
    assert engine.executor.doorbell == -1 and not open_files() - before
    engine.check_integrity()
    counted = re.search(r"vllm:generation_tokens_total\{[^}]*\} ([0-9.]+)", metrics.render().decode())
    # Those that left had tokens as well, at most one more than they were told of when they did.
    assert num_tokens + 6 * told["left"] <= float(counted[1]) <= num_tokens + 50 * told["left"]
