"""The load generator of `benchmarks.trace`: streamed completions sent at their times, whatever became of those before.

It shares the cores with the server, so while requests run it does next to nothing: bodies are written beforehand,
what arrives is kept with its time, and read as HTTP and JSON after the last answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

import h11

from server.core.width import EXACT
from server.simulation.jobs import Job, Record

VOCAB = 40000  # prompts are random token ids below this: no prefix is shared
GIVE_UP = 30.0  # seconds after the last arrival; what is unfinished by then has missed its limits
NAN = float("nan")


@dataclass(slots=True)
class Exchange:
    """One request as bytes, and the bytes that came back, each with the time at which they were there."""

    job: Job
    intended: float = 0.0  # when it should have been sent, on the clock of time.perf_counter
    connection: h11.Connection = field(default_factory=lambda: h11.Connection(h11.CLIENT))
    request: bytes = b""
    received: list[tuple[float, bytes]] = field(default_factory=list)

    @classmethod
    def of(cls, host: str, job: Job, size: str, rng: random.Random) -> Exchange:
        """A completion of `job` at `size`, with a random prompt."""
        body: dict[str, Any] = {
            "prompt": [rng.randrange(1000, VOCAB) for _ in range(job.prompt_tokens)],
            "max_tokens": job.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "size": size,
            "stream_options": {"include_usage": True},
        }
        if size == "auto":  # pinned servers are not told: they could do nothing about it
            slo = {"ttft_ms": job.budget.ttft, "tpot_ms": job.budget.tpot}
            body["slo"] = {name: 1000 * limit for name, limit in slo.items() if limit is not None}
        payload = json.dumps(body).encode()
        headers = {"host": host, "content-type": "application/json", "content-length": str(len(payload))}
        headers["connection"] = "close"
        own = cls(job)
        events = (
            h11.Request(method="POST", target="/v1/completions", headers=list(headers.items())),
            h11.Data(data=payload),
            h11.EndOfMessage(),
        )
        own.request = b"".join(own.connection.send(event) or b"" for event in events)
        return own

    async def run(self, host: str) -> None:
        """Send it, and keep what comes back until the server closes the connection."""
        address, _, port = host.rpartition(":")
        reader, writer = await asyncio.open_connection(address, int(port))
        try:
            writer.write(self.request)
            while data := await reader.read(1 << 16):
                self.received.append((time.perf_counter(), data))
            self.received.append((time.perf_counter(), b""))
        finally:
            writer.close()

    def _next_event(self) -> Any:
        try:
            return self.connection.next_event()
        except h11.RemoteProtocolError:  # it ended in the middle
            return h11.PAUSED

    def record(self) -> Record:
        """What became of it; status 599 if the answer is not whole."""
        first = last = None
        status, reason, layers, width, count, is_whole = 599, "unfinished", 0, EXACT, 0, False
        tokens_at: dict[int, int] = {}
        text = b""
        for now, data in self.received:
            self.connection.receive_data(data)
            while (event := self._next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    headers = {name: value.decode() for name, value in event.headers}
                    status = event.status_code
                    if status == 200:
                        layers, width = point_of(headers[b"x-boomerang-size"])
                        reason = headers[b"x-boomerang-size-reason"]
                elif isinstance(event, h11.Data):
                    *lines, text = (text + bytes(event.data)).split(b"\n")
                    for line in lines:
                        if not line.startswith(b"data: {"):
                            continue
                        told = json.loads(line[6:])
                        if told.get("model"):  # the last one, if it changed on the way
                            layers, width = point_of(told["model"].rpartition(":")[2])
                        if told.get("usage"):
                            count = told["usage"]["completion_tokens"]
                        elif told.get("choices"):
                            tokens_at[width] = tokens_at.get(width, 0) + 1
                            first = first or now
                            last = now
                elif isinstance(event, h11.EndOfMessage):
                    is_whole = True
                else:
                    break
        if status != 200:
            return Record(self.job, 0, "refused" if status != 599 else reason, NAN, NAN, NAN, 0, 0, status)
        if not is_whole or first is None:
            return Record(self.job, 0, "unfinished", NAN, NAN, NAN, 0, 0, 599)
        tpot = (last - first) / (count - 1) if count > 1 else 0.0
        times = first - self.intended, tpot, last - self.intended
        return Record(self.job, layers, reason, *times, 0, 0, tokens_at=tokens_at)


def point_of(name: str) -> tuple[int, int]:
    """(layers, width) of `24L` or `24L-q6`."""
    layers, _, bits = name.partition("L-q")
    return int(layers.rstrip("L")), int(bits or EXACT)


async def ask(url: str, job: Job, size: str, rng: random.Random) -> Record:
    """One completion, now."""
    host = urllib.parse.urlsplit(url).netloc
    exchange = Exchange.of(host, job, size, rng)
    exchange.intended = time.perf_counter()
    await asyncio.wait_for(exchange.run(host), 120)
    return exchange.record()


async def play(url: str, jobs: list[Job], size: str) -> list[Record]:
    """Open loop: every request is sent at its time. Times count from when it should have been sent."""
    rng, host = random.Random(0), urllib.parse.urlsplit(url).netloc
    exchanges = [Exchange.of(host, job, size, rng) for job in jobs]
    begun = time.perf_counter() + 0.2
    tasks = []
    for exchange in exchanges:
        exchange.intended = begun + exchange.job.arrival
        await asyncio.sleep(max(exchange.intended - time.perf_counter(), 0.0))
        tasks.append(asyncio.ensure_future(exchange.run(host)))
    _, late = await asyncio.wait(tasks, timeout=GIVE_UP)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return [exchange.record() for exchange in exchanges]
