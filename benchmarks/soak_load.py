"""The traffic of a soak run: a catalogue of requests, and clients that ask, read, and sometimes leave.

Every request is one of a fixed catalogue, so that whatever a client got under load, whole or up to the point where it
left, can be compared with what a quiet server says to the same request.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

SENTENCES = (
    "The harbour was quiet when the first boats came in.", "Nobody had expected the bridge to hold that long.",
    "She counted the letters twice and put them back.", "In the north the winters are long and the roads are bad.",
    "A good tool is one that you forget while you use it.", "The committee met on Tuesday and decided nothing.",
    "Water boils at a lower temperature in the mountains.", "He wrote down every number that he could remember.",
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
STRUCTURES: tuple[dict[str, Any], ...] = (
    {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
    {"structured_outputs": {"regex": r"[A-Z][a-z]{2,8} (is|was) [a-z ]{5,30}\."}},
    {"structured_outputs": {"choice": ["certainly", "perhaps", "never"]}},
)


@dataclass(frozen=True, slots=True)
class Case:
    """One request of the catalogue. `is_fixed`: greedy at a named size, so its answer never varies."""

    name: str
    body: dict[str, Any]
    is_fixed: bool


def catalogue(model: dict[str, Any], num_cases: int = 96, seed: int = 0) -> list[Case]:
    """Mixed sizes, long and short prompts and answers, plain, structured and sampled. `model`: a /v1/models card."""
    draw = random.Random(seed)
    context = model["max_model_len"]
    sizes = model["sizes"]
    cases = []
    for index in range(num_cases):
        num_words = draw.choice([4, 4, 12, 30, context // 8, context // 5])
        words = " ".join(draw.choice(SENTENCES) for _ in range(max(1, num_words // 9))).split()
        body: dict[str, Any] = {"prompt": " ".join(words[:num_words]), "temperature": 0, "ignore_eos": True}
        body["truncate_prompt_tokens"] = context // 2
        body["max_tokens"] = min(draw.choice([1, 8, 24, 48, 96, 128]), context // 4)
        kind = draw.choices(["plain", "structured", "sampled", "auto", "scored"], [45, 25, 10, 10, 10])[0]
        if kind == "structured":
            body |= draw.choice(STRUCTURES) | {"ignore_eos": False}
        if kind == "sampled":
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": index, "n": draw.choice([1, 2])}
        if kind == "scored":
            body |= {"logprobs": 2, "echo": draw.random() < 0.5}
        if kind != "auto":
            body["size"] = draw.choice(sizes)
        cases.append(Case(f"{index}-{kind}", body, kind in ("plain", "structured", "scored")))
    return cases


@dataclass(slots=True)
class Outcome:
    """What all clients together saw."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    num_tokens: int = 0
    whole: dict[str, set[str]] = field(default_factory=dict)  # case -> texts of complete answers
    partial: dict[str, set[str]] = field(default_factory=dict)  # case -> texts up to a disconnect

    def fail(self, case: Case, what: str) -> None:
        self.counts["failed"] += 1
        if len(self.failures) < 50:
            self.failures.append(f"{case.name}: {what[:300]}")


class Clients:
    """Sends cases. `leave_share` of the requests are given up at a random moment."""

    def __init__(
        self, url: str, cases: list[Case], outcome: Outcome, *, leave_share: float, seed: int, timeout: float = 600
    ) -> None:
        self.cases, self.outcome, self.leave_share = cases, outcome, leave_share
        self.random = random.Random(seed)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
        self.http = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits)
        self.typical = 1.0  # seconds of a plain answer, for the moment at which its client loses patience

    async def one(self) -> None:
        """One request from a random case, followed to its end or to the moment its client leaves."""
        draw, case = self.random, self.random.choice(self.cases)
        leaves = draw.random() < self.leave_share
        try:
            if draw.random() < 0.6:
                await self._stream(case, draw.randrange(case.body["max_tokens"] + 1) if leaves else None)
            else:
                await self._plain(case, draw.random() * self.typical if leaves else None)
        except (httpx.TransportError, json.JSONDecodeError, KeyError, IndexError) as error:
            self.outcome.fail(case, f"{type(error).__name__}: {error}")

    async def _stream(self, case: Case, leave_after: int | None) -> None:
        texts, num_events, started = {}, 0, time.monotonic()
        is_done = False
        async with self.http.stream("POST", "/v1/completions", json=case.body | {"stream": True}) as response:
            if response.status_code != 200:
                return self._refused(case, response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if leave_after is not None and num_events >= leave_after:
                    break
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    is_done = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    return self.outcome.fail(case, line)
                num_events += 1
                for choice in event["choices"]:
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if is_done:
            self._done(case, texts.get(0, ""), started)
        elif leave_after is None:
            self.outcome.fail(case, "the stream ended without [DONE]")
        else:
            self.outcome.counts["left"] += 1
            if case.is_fixed:
                self.outcome.partial.setdefault(case.name, set()).add(texts.get(0, ""))

    async def _plain(self, case: Case, patience: float | None) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                response = await self.http.post("/v1/completions", json=case.body)
        except TimeoutError:
            self.outcome.counts["left"] += 1
            return
        if response.status_code != 200:
            return self._refused(case, response.status_code, response.text)
        answer = response.json()
        self.outcome.num_tokens += answer["usage"]["completion_tokens"]
        self.typical += 0.05 * (time.monotonic() - started - self.typical)
        self._done(case, answer["choices"][0]["text"], started)

    def _done(self, case: Case, text: str, started: float) -> None:
        self.outcome.counts["answered"] += 1
        self.outcome.latencies.append(time.monotonic() - started)
        if case.is_fixed:
            self.outcome.whole.setdefault(case.name, set()).add(text)

    def _refused(self, case: Case, status: int, text: str) -> None:
        """503 with Retry-After is what an overloaded server should say; anything else is a failure here."""
        if status == 503 and "overloaded" in text:
            self.outcome.counts["refused"] += 1
        else:
            self.outcome.fail(case, f"{status} {text}")

    async def closed_loop(self, seconds: float, concurrency: int) -> float:
        """Keep so many requests in flight; requests per second ended (answered or left)."""
        deadline = time.monotonic() + seconds
        before = self.outcome.counts.total()

        async def client() -> None:
            while time.monotonic() < deadline:
                await self.one()

        started = time.monotonic()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return (self.outcome.counts.total() - before) / (time.monotonic() - started)

    async def open_loop(self, seconds: float, rate: float) -> None:
        """Poisson arrivals at `rate` per second, whatever the server does; waits for the last to end."""
        tasks: set[asyncio.Task] = set()
        started = due = time.monotonic()
        while (due := due + self.random.expovariate(rate)) < started + seconds:
            behind = time.monotonic() - due
            if behind > 5:  # the machine stood still: what did not arrive meanwhile is not made up for
                due += behind
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.ensure_future(self.one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def aclose(self) -> None:
        await self.http.aclose()
