"""Nonsense against a real server: never a 5xx, never a hang, never a second of its processor, nothing left behind.

In the test suite a small sample; `make fuzz` runs 20,000 requests and 200 Schemathesis examples per operation.
"""

import asyncio
import json
import os
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from tests.api.tiny import RunningServer, make_pair
from tests.fuzz import generate, mutate

NUM_MUTATED = int(os.environ.get("BOOMERANG_FUZZ_REQUESTS", "400"))
NUM_EXAMPLES = int(os.environ.get("BOOMERANG_FUZZ_EXAMPLES", "8"))
SEED = int(os.environ.get("BOOMERANG_FUZZ_SEED", "0"))
CONTROL = {"prompt": "The quick", "max_tokens": 12, "temperature": 0, "size": "5L", "ignore_eos": True}
# An answer that takes longer is a hang: the longest that can be asked for takes some seconds of a core of one's own.
HANG_SECONDS = 60 if NUM_MUTATED < 5000 else 300
# Of the server's processor, for one request: beside its engine thread, and there beyond what its tokens may cost.
CPU_SECONDS, CPU_SECONDS_PER_TOKEN = 1.0, 0.03
AT_ONCE = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RunningServer(make_pair(tmp_path_factory.mktemp("fuzz"))) as running:
        before = control(running.url)
        yield running
        assert_nothing_left(running.url)
        assert control(running.url) == before
        assert running.stop() == 0
        log = "".join(running.log)
        assert re.search(r"all \d+ pages are free", log), log[-2000:]
        assert "ERROR" not in log and "Traceback" not in log, log[-4000:]


def control(url: str) -> str:
    return httpx.post(url + "/v1/completions", json=CONTROL, timeout=HANG_SECONDS).json()["choices"][0]["text"]


def assert_nothing_left(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        load = httpx.get(url + "/load").json()
        left = {name: load[name] for name in ("num_running", "num_waiting", "server_load", "kv_usage") if load[name]}
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


class Meter:
    """Processor time of a server: what its engine thread took, and everything else. It does not depend on the load of
    the machine."""

    def __init__(self, server: RunningServer) -> None:
        self.url, self._process = server.url, psutil.Process(server.process.pid)
        before = self._threads()
        body = CONTROL | {"max_tokens": 200}
        httpx.post(self.url + "/v1/completions", json=body, timeout=HANG_SECONDS).raise_for_status()
        grown = {tid: seconds - before.get(tid, 0.0) for tid, seconds in self._threads().items()}
        del grown[self._process.pid]  # the event loop's
        self._engine = max(grown, key=grown.__getitem__)

    def _threads(self) -> dict[int, float]:
        return {thread.id: thread.user_time + thread.system_time for thread in self._process.threads()}

    def seconds(self) -> tuple[float, float]:
        """Of the engine thread, and of all others."""
        times, engine = self._process.cpu_times(), self._threads()[self._engine]
        return engine, times.user + times.system - engine

    def tokens(self) -> float:
        """Computed so far, prompts included."""
        counters = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(counters))


# Bounds of what waits, and limits that `strict` wants kept on a machine that is busy with this test.
NOT_NOW = (
    b"server is overloaded", b"slo_policy is strict", b"Too many large requests are arriving",
    b"Too many grammars of yours wait", b"No grammar can be compiled now",
)  # fmt: skip


async def send(client: httpx.AsyncClient, schemas: generate.FromSchemas, number: int, stays: bool = False) -> str:
    """Send request `number`; returns the kind of outcome, raises AssertionError for a bad one."""
    draw = random.Random(SEED * 1_000_003 + number)
    path, raw, headers = mutate.request(draw, schemas)
    leaves = draw.random() < 0.08 and not stays
    what = f"request {number}: {path} {headers} {raw[:600]!r}"
    try:
        async with client.stream("POST", path, content=raw, headers=headers) as response:
            if leaves:
                return "left"
            content = await response.aread()
    except httpx.TimeoutException:
        raise AssertionError(f"hangs: {what}") from None
    except httpx.LocalProtocolError:  # httpx itself refuses to send such a header
        return "not sent"
    status = response.status_code
    if status == 503 and any(text in content for text in NOT_NOW):
        assert int(response.headers["retry-after"]) > 0, what
        return "not now"
    assert status < 500, f"{status} for {what}: {content[:500]!r}"
    if status >= 400:
        # Anthropic's shape has the same two keys, Ollama's has the text alone.
        error = json.loads(content)["error"]
        assert error if isinstance(error, str) else error["message"], what
    elif response.headers["content-type"].startswith(("text/event-stream", "application/x-ndjson")):
        failed = re.search(rb'^(data: )?\{"error".*"code":5\d\d', content, re.M)
        assert not failed, f"a stream fails with {failed[0][:300]!r} for {what}"
    else:
        json.loads(content)
    return str(status)


class Storm:
    """Requests, a few at a time; where these took long, each again alone."""

    def __init__(self, server: RunningServer) -> None:
        self.url = server.url
        self.outcomes: Counter[str] = Counter()
        self.most = 0.0  # seconds of the processor for `AT_ONCE` requests, the engine's apart
        self._meter = Meter(server)
        self._schemas = generate.FromSchemas(httpx.get(self.url + "/openapi.json").json())

    def send(self, numbers: Iterable[int]) -> None:
        numbers = iter(numbers)
        while some := list(islice(numbers, AT_ONCE)):
            excess, seconds = self._timed(some)
            self.most = max(self.most, seconds)
            if excess <= 0:
                continue
            alone = {number: self._timed([number], stays=True) for number in some}
            bad = {number: figures for number, figures in alone.items() if figures[0] > 0}
            assert not bad, f"{bad} (seconds of processor beyond what is allowed, and beside the engine's)"
            # What only a first time costs, a new grammar for one, is not seen again.
            assert excess < CPU_SECONDS, f"{some} together took {seconds:.2f} s of processor, and not again alone"

    def _timed(self, numbers: list[int], stays: bool = False) -> tuple[float, float]:
        tokens, before = self._meter.tokens(), self._meter.seconds()
        asyncio.run(self._together(numbers, stays))
        assert_nothing_left(self.url)
        engine, others = (now - then for now, then in zip(self._meter.seconds(), before, strict=True))
        tokens = self._meter.tokens() - tokens
        excess = max(others - CPU_SECONDS, engine - CPU_SECONDS - tokens * CPU_SECONDS_PER_TOKEN)
        return excess, others

    async def _together(self, numbers: list[int], stays: bool) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=HANG_SECONDS) as client:
            found = await asyncio.gather(*(send(client, self._schemas, number, stays) for number in numbers))
        if not stays:
            self.outcomes.update(found)


@pytest.mark.timeout(4 * 3600)
def test_spoilt_and_made_up_requests(server):
    process, storm, memory = psutil.Process(server.process.pid), Storm(server), []
    for start in range(0, NUM_MUTATED, step := max(NUM_MUTATED // 40, 1)):
        storm.send(range(start, min(start + step, NUM_MUTATED)))
        memory.append(process.memory_info().rss)
    # Bounded caches (grammars, above all) are full by the time of three quarters of 20,000.
    growth = statistics.median(memory[-4:]) / statistics.median(memory[-10:-6]) - 1
    outcomes = storm.outcomes
    print(
        f"\n{outcomes.total()} requests: {dict(outcomes.most_common())}; "
        f"at most {storm.most:.2f} s of processor for {AT_ONCE} of them, the engine's apart; "
        f"memory in MiB {' '.join(str(size >> 20) for size in memory)}, {growth:+.2%} at the end"
    )
    assert outcomes["200"] > 0.1 * NUM_MUTATED and outcomes["400"] > 0.2 * NUM_MUTATED
    if NUM_MUTATED >= 20000:
        assert growth < 0.03


def try_examples(operation) -> tuple[Counter, list[str]]:
    """Statuses of generated examples of one operation by count, and those that ended in a 5xx as curl commands.

    These are collected, not raised: a request that made a step fail is refused the next time, which Hypothesis would
    call flaky. An example without an answer raises.
    """
    statuses: Counter = Counter()
    failed: list[str] = []

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=operation.as_strategy())
    def examples(case):
        status = case.call(timeout=HANG_SECONDS).status_code
        statuses[status] += 1
        if status >= 500:
            failed.append(f"{status}: {case.as_curl_command()}")

    examples()
    return statuses, failed


@pytest.mark.timeout(3600)
def test_every_operation_of_the_openapi_document(server):
    import schemathesis  # a second, which every process of the suite would take

    document = schemathesis.openapi.from_url(server.url + "/openapi.json")
    problems, num_operations = [], 0
    for found in document.get_all_operations():
        operation = found.ok()
        num_operations += 1
        try:
            statuses, failed = try_examples(operation)
        except Exception as error:
            problems.append(f"{operation.label}: {type(error).__name__}: {error}")
        else:
            print(f"{operation.label}: {dict(statuses)}")
            problems += failed
    assert not problems, "\n\n".join(problems)
    assert num_operations > 8
