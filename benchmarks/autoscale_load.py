"""Clients of a load balancer: what one request saw, load in phases, and what one replica can carry."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean

import httpx

__all__ = ["Phase", "Record", "Run", "body_maker", "capacity", "drive", "ends", "send"]

TOPICS = (
    "the tides", "a lighthouse keeper", "how bread rises", "the rules of chess", "migrating birds", "a broken clock",
    "why leaves turn red", "the first train", "a letter to a friend", "what an engine does",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phase:
    """`seconds` of Poisson arrivals at `rate` requests per second."""

    seconds: float
    rate: float


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times in seconds; `at` since the start of the load."""

    at: float
    status: int = 0
    size: int = 0
    reason: str = ""
    ttft: float | None = None
    e2e: float | None = None
    tokens: int = 0
    is_complete: bool = False
    error: str = ""

    @property
    def tpot(self) -> float | None:
        if self.tokens < 2 or self.ttft is None or self.e2e is None:
            return None
        return (self.e2e - self.ttft) / (self.tokens - 1)


@dataclass(slots=True)
class Run:
    """What came out: one record per request, and samples of (time, ready, target, in flight)."""

    records: list[Record] = field(default_factory=list)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)


async def send(client: httpx.AsyncClient, record: Record, body: dict, started: float) -> None:
    """One streamed request; never raises."""
    begin = time.monotonic()
    record.at = begin - started
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            record.status = response.status_code
            if response.status_code != 200:
                record.error = (await response.aread()).decode(errors="replace")[:300]
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    record.is_complete = not record.error
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    record.error = event["error"]["message"]
                    continue
                if size := event.get("size"):
                    record.size, record.reason = size["layers"], size["reason"]
                if event.get("usage"):
                    record.tokens = event["usage"]["completion_tokens"]
                if event.get("choices") and event["choices"][0].get("text") and record.ttft is None:
                    record.ttft = time.monotonic() - begin
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        record.e2e = time.monotonic() - begin


async def drive(
    url: str,
    phases: Sequence[Phase],
    make_body: Callable[[random.Random], dict],
    counts: Callable[[], tuple[int, int]],
    seed: int = 0,
    every: float = 0.5,
    kill: Callable[[], str] | None = None,
    kill_at: float = 0.0,
) -> Run:
    """Open-loop arrivals through the load balancer at `url`.

    `counts` gives (replicas ready, target), asked `every` so many seconds. `kill` ends one replica after `kill_at`
    seconds and says which.
    """
    rng, run = random.Random(seed), Run()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    started = time.monotonic()
    in_flight: set[asyncio.Task] = set()
    is_over = asyncio.Event()

    async def watch() -> None:
        while not is_over.is_set():
            ready, target = await asyncio.to_thread(counts)
            run.samples.append((time.monotonic() - started, ready, target, len(in_flight)))
            await asyncio.sleep(every)

    async def kill_one() -> None:
        await asyncio.sleep(kill_at)
        run.events.append((time.monotonic() - started, f"SIGKILL {await asyncio.to_thread(kill)}"))

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        helpers = [asyncio.create_task(watch())]
        if kill is not None:
            helpers.append(asyncio.create_task(kill_one()))
        due = 0.0
        for end, rate in ends(phases):
            while True:
                due += rng.expovariate(rate)
                if due >= end:
                    due = end
                    break
                await asyncio.sleep(max(0.0, started + due - time.monotonic()))
                record = Record(0.0)
                run.records.append(record)
                task = asyncio.create_task(send(client, record, make_body(rng), started))
                in_flight.add(task)
                task.add_done_callback(in_flight.discard)
            await asyncio.sleep(max(0.0, started + due - time.monotonic()))
        while in_flight:
            await asyncio.sleep(0.1)
        is_over.set()
        await asyncio.gather(*helpers)
    return run


def ends(phases: Sequence[Phase]) -> list[tuple[float, float]]:
    """(end, rate) of every phase."""
    found, end = [], 0.0
    for phase in phases:
        end += phase.seconds
        found.append((end, phase.rate))
    return found


def body_maker(model: str, slo: dict, tokens: tuple[int, int]) -> Callable[[random.Random], dict]:
    def make(rng: random.Random) -> dict:
        return {
            "model": model,
            "prompt": f"Write a short text about {rng.choice(TOPICS)} ({rng.randrange(10_000)}).\n\n",
            "max_tokens": rng.randint(*tokens),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "slo": slo,
        }

    return make


async def capacity(url: str, model: str, batch: int, tokens: int) -> tuple[float, float, float]:
    """One replica with `batch` requests of full size at once: (requests/s, seconds per token, seconds to the first)."""
    rng, limits = random.Random(0), httpx.Limits(max_connections=None)
    make = body_maker(model, {}, (tokens, tokens))
    rounds: list[list[Record]] = []
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        for _ in range(3):  # the first warms up
            records = [Record(0.0) for _ in range(batch)]
            bodies = [{**make(rng), "slo": None, "size": "teacher"} for _ in records]
            started = time.monotonic()
            await asyncio.gather(*(send(client, r, b, started) for r, b in zip(records, bodies, strict=True)))
            rounds.append(records)
    done = [record for records in rounds[1:] for record in records]
    assert all(record.is_complete for record in done), done[0]
    e2e, tpot, ttft = (mean(getattr(r, name) for r in done) for name in ("e2e", "tpot", "ttft"))
    return batch / e2e, tpot, ttft
