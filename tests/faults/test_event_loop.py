"""Requests that are expensive to look at: none may hold the event loop, whatever it answers."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest

from tests.api.tiny import NAME, VOCAB, RunningServer
from tests.faults.test_clients import BODY

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
SHORT = BODY | {"max_tokens": 1}
MANY = {"prompt": ["a"] * 1024, "max_tokens": 1}
RULES = "root ::= " + " | ".join(f'"w{i}"' for i in range(6000))
TAGS = [{"begin": f"<t{i}>", "schema": {}, "end": "</t>"} for i in range(2000)]


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FRACTIONS = "[" + ",".join(["0.1"] * 1_000_000) + "]"
WORDS = [chr(97 + i % 26) * (i + 1) for i in range(256)]


def properties(number: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {} for i in range(number)}}


def asked(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, SHORT | fields


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": HELLO, "max_tokens": 1} | fields


KINDS: dict[str, tuple[str, Any]] = {
    "a grammar to convert": asked(structured_outputs={"grammar": RULES[:60_000]}),
    "a grammar far too large": asked(structured_outputs={"grammar": RULES * 20}),
    "bad words with many prompts": (COMPLETIONS, MANY | {"bad_words": WORDS}),
    "biases for everything": asked(logit_bias={str(i): 1 for i in range(50_000)}, n=16),
    "biases with many choices": asked(logit_bias={str(i): 1 for i in range(VOCAB)}, n=128),
    "structures and triggers": asked(
        response_format={"type": "structural_tag", "structures": TAGS, "triggers": ["x"] * 20_000 + ["<"]}
    ),
    "100,000 messages": chat(messages=HELLO * 100_000),
    "200,000 wrong types": asked(stop=[1] * 200_000),
    "a million ids to text": ("/detokenize", {"tokens": [5] * 1_000_000}),
    "long stop strings on many sequences": asked(stop=["x" * 500 + str(i) for i in range(64)], n=32, max_tokens=200),
    "a megabyte of text": asked(prompt="The quick brown fox. " * 50_000),
    "a megabyte to tokenize": ("/tokenize", {"prompt": "The quick brown fox. " * 50_000}),
    "a megabyte that is cut": asked(prompt="The quick brown fox. " * 50_000, truncate_prompt_tokens=5),
    # And of our own making:
    "lists in lists": (COMPLETIONS, b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}"),
    "lists in lists without end": (COMPLETIONS, b'{"prompt": ' + b"[" * 1_000_000),
    "1,024 prompts of 2,000 characters": (COMPLETIONS, {"prompt": ["word " * 400] * 1024, "max_tokens": 1}),
    "a million ids": asked(prompt=[5] * 1_000_000),
    "a schema of 5,000 properties": asked(structured_outputs={"json": properties(5000)}),
    "a thousand choices": asked(structured_outputs={"choice": [f"choice {i} " * 5 for i in range(1000)]}),
    "a long expression": asked(structured_outputs={"regex": "(a|b)" * 12_000}),
    "100,000 unknown fields": asked(**{f"field{i}": i for i in range(100_000)}),
    "a huge variable of the template": chat(chat_template_kwargs={"x": list(range(500_000))}),
    "100,000 documents": chat(documents=[{}] * 100_000),
    "tools with large schemas": chat(
        tools=[{"type": "function", "function": {"name": f"f{i}", "parameters": properties(200)}} for i in range(128)]
    ),
    "allowed tokens with many choices": asked(allowed_token_ids=list(range(VOCAB)) * 100, n=128),
    "a schedule of 100,000 legs": asked(size_schedule=[{"size": "4L", "tokens": 1}] * 100_000),
    "parts of one message": chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 100_000}]),
    "a million ids to embed": ("/v1/embeddings", {"input": [5] * 1_000_000}),
    "1,024 texts to embed": ("/v1/embeddings", {"input": ["word " * 400] * 1024}),
    "200,000 wrong types to embed": ("/api/embed", {"model": NAME, "input": [1] * 200_000}),
    "four thousand messages of ten calls": chat(
        messages=[*HELLO, *[{"role": "assistant", "tool_calls": [CALL] * 10}] * 4000]
    ),
    "four thousand messages of thirty parts": ("/v1/messages", {"model": NAME, "max_tokens": 1, "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x"}] * 30}] * 4000}),
    "parts in parts": ("/v1/messages", {"model": NAME, "max_tokens": 1, "messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}] * 1000}] * 100}]}),
    "as many parts as are allowed": chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 4}] * 4096
    ),
    "calls and results of others": ("/api/chat", {"model": NAME, "options": {"num_predict": 1}, "messages": [
        *HELLO, *[{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 128}] * 500,
        *[{"role": "tool", "tool_name": "g", "content": "x"}] * 3000]}),
    "a million allowed tokens for every prompt": (COMPLETIONS, MANY | {"allowed_token_ids": [5] * 1_000_000}),
    "half a million of anything in metadata": ("/v1/responses", {"model": NAME, "input": "a", "metadata": {
        str(i): i for i in range(350_000)}}),
    "a million fractions in a call": chat(messages=[*HELLO, {"role": "assistant", "tool_calls": [
        CALL | {"function": {"name": "f", "arguments": FRACTIONS}}]}]),
    "fractions in many calls": chat(messages=[*HELLO, {"role": "assistant", "tool_calls": [
        CALL | {"function": {"name": "f", "arguments": '{"a": ' + FRACTIONS[:39_999] + "]}"}}] * 100}]),
    "a million fractions in an input": ("/v1/messages", {"model": NAME, "max_tokens": 1, "messages": [
        *HELLO, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "a", "name": "f", "input": {"a": [0.1] * 900_000}}]}]}),
    "a million numbers in a call": ("/api/chat", {"model": NAME, "messages": [
        *HELLO, {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": {"a": [1] * 1_000_000}}}]}]}),
    "a million alternatives": asked(structured_outputs={"json": {"anyOf": [{}] * 1_300_000}}),
    "a million alternatives of a tool": chat(tool_choice="required", tools=[
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "anyOf": [{}] * 1_300_000}}}]),
    "a million numbers in a tool": chat(tools=[
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "enum": [1] * 1_300_000}}}]),
    "a thousand texts of other letters": (COMPLETIONS, {"prompt": ["".join(
        chr(0x4E00 + (i * j) % 20_000) for j in range(1300)) for i in range(1024)], "max_tokens": 1}),
    "usage with every token of a thousand answers": (COMPLETIONS, MANY | {
        "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    "a grammar for every prompt": (COMPLETIONS, MANY | {"structured_outputs": {"json": properties(200)}}),
    "a number of three million digits": (COMPLETIONS, b'{"prompt": [5], "temperature": 0.' + b"1" * 3_000_000 + b"}"),
    "long integers": (COMPLETIONS, b'{"prompt": [' + b",".join([b"1234567890123456789012"] * 150_000) + b"]}"),
    "ids that are echoed": (COMPLETIONS, {"prompt": [[5] * 200] * 100, "max_tokens": 1, "echo": True, "logprobs": 5}),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(pair):
    with RunningServer(pair, "--max-num-queued-reqs", "4000") as server:
        # What is made on first use is made.
        httpx.post(server.url + COMPLETIONS, json=SHORT | {"structured_outputs": {"regex": "a"}}, timeout=60)
        yield server


def content(body: Any) -> bytes:
    return body if isinstance(body, bytes) else orjson.dumps(body)


@pytest.mark.parametrize("name", KINDS)
def test_looking_at_a_request_costs_less_than_a_second(server, name):
    """Of processor time, which does not depend on the machine's load; the model's own steps do not count."""
    path, body = KINDS[name]
    process = psutil.Process(server.process.pid)

    def spent() -> float:
        # The event loop runs in the process's first thread.
        return sum(t.user_time + t.system_time for t in process.threads() if t.id == process.pid)

    before = spent()
    answer = httpx.post(server.url + path, content=content(body), timeout=120)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    assert spent() - before < 1.0


class Watch:
    """How long something took, less the time that says nothing of the server: threads of it, or this one, were ready to
    run and had no processor; or this one worked. On cores of one's own, what is left is the time on the clock."""

    def __init__(self, pid: int) -> None:
        self._tasks = Path(f"/proc/{pid}/task")
        self.longest = 0.0
        self.start()

    def start(self) -> None:
        self._at, self._excused = time.monotonic(), self._excuses()

    def stop(self) -> None:
        took = time.monotonic() - self._at - max(self._excuses() - self._excused, 0.0)
        self.longest = max(self.longest, took)

    def _excuses(self) -> float:
        files = [*self._tasks.glob("*/schedstat"), Path("/proc/thread-self/schedstat")]
        waits = 0
        for file in files:
            with contextlib.suppress(OSError):  # a thread that has ended
                waits += int(file.read_text().split()[1])
        return waits / 1e9 + time.thread_time()


def longest_step(url: str) -> float:
    """Seconds, from the metrics: the bound of the bucket that holds the longest."""
    counts = re.findall(r'boomerang:step_seconds_bucket\{.*le="([^"]+)".*\} (\S+)', httpx.get(url + "/metrics").text)
    return next(float(bound) for bound, count in counts if count == counts[-1][1])


def test_health_is_answered_and_a_stream_goes_on_meanwhile(server):
    contents = [(path, content(body)) for path, body in KINDS.values()]

    async def scenario() -> tuple[float, float, float, set[int]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            gap, late = Watch(server.process.pid), Watch(server.process.pid)
            done = asyncio.Event()

            async def stream() -> None:
                while not done.is_set():
                    body = BODY | {"max_tokens": 240, "stream": True}
                    async with client.stream("POST", COMPLETIONS, json=body) as answer:
                        gap.start()
                        async for _ in answer.aiter_lines():
                            gap.stop()
                            gap.start()

            async def health() -> None:
                while not done.is_set():
                    late.start()
                    assert (await client.get("/health")).status_code == 200
                    late.stop()
                    await asyncio.sleep(0.02)

            watchers = asyncio.gather(stream(), health())
            await asyncio.sleep(1.0)
            normal, statuses = gap.longest, set()
            for path, body in contents:
                statuses.add((await client.post(path, content=body)).status_code)
            done.set()
            await watchers
            return normal, gap.longest, late.longest, statuses

    normal, gap, late, statuses = asyncio.run(scenario())
    step = longest_step(server.url)
    print(f"longest gap {gap:.3f} s, normally {normal:.3f} s, a step {step:.3f} s; slowest /health {late:.3f} s")
    assert statuses <= {200, 400, 413, 429}
    assert late < 0.5
    assert gap < normal + 3 * step
