"""500 requests of random sizes, lengths, sampling and disconnects against a real server: nothing may be left behind."""

import asyncio
import random
import re
import time

import httpx
import pytest

from tests.api.tiny import MAX_LEN, SIZES, VOCAB, RunningServer

NUM_REQUESTS = 500
CONCURRENCY = 24


def random_body(draw: random.Random, shared: list[int]) -> dict:
    prompt = [draw.randrange(3, VOCAB - 3) for _ in range(draw.choice([1, 3, 20, 60, 120]))]
    if draw.random() < 0.4:
        prompt = shared + prompt
    body = {"prompt": prompt[: MAX_LEN - 40], "max_tokens": draw.randrange(1, 40)}
    body["temperature"] = draw.choice([0, 0.7, 1.5])
    if draw.random() < 0.8:
        body["size"] = draw.choice([f"{size}L" for size in SIZES] + ["student", "teacher", 0.8, "auto"])
    else:
        body |= {"min_size": "4L", "max_size": draw.choice(["5L", "6L"])}
    options = {
        "top_p": 0.9, "top_k": 5, "min_p": 0.05, "seed": 7, "n": 2, "stop": ["e", "\n"], "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "repetition_penalty": 1.2, "logprobs": 2, "echo": True, "min_tokens": 1,
        "ignore_eos": True, "logit_bias": {"5": 3.0}, "stop_token_ids": [9],
    }  # fmt: skip
    body |= {name: options[name] for name in draw.sample(sorted(options), draw.randrange(5))}
    if draw.random() < 0.2:
        body["prompt"] = [body["prompt"], shared]
    return body


async def one(client: httpx.AsyncClient, draw: random.Random, shared: list[int]) -> str:
    body = random_body(draw, shared)
    leave_after = draw.choice([None, None, 0, 1, 3])
    if draw.random() < 0.5:
        body["stream"] = True
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            lines = 0
            async for line in response.aiter_lines():
                lines += bool(line)
                assert '"error"' not in line, line
                if leave_after is not None and lines > leave_after:
                    return "left"
            return "streamed"
    if leave_after is not None:
        try:
            await client.post("/v1/completions", json=body, timeout=0.01 + 0.02 * leave_after)
        except httpx.TimeoutException:
            return "left"
        return "answered"
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert len(answer["choices"]) == body.get("n", 1) * (2 if isinstance(body["prompt"][0], list) else 1)
    assert response.headers["x-boomerang-size"] == f"{answer['size']['layers']}L"
    return "answered"


async def storm(url: str) -> dict[str, int]:
    draw = random.Random(0)
    shared = [draw.randrange(3, VOCAB - 3) for _ in range(40)]
    gate = asyncio.Semaphore(CONCURRENCY)
    counts: dict[str, int] = {}
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def guarded(seed: int) -> None:
            async with gate:
                outcome = await one(client, random.Random(seed), shared)
                counts[outcome] = counts.get(outcome, 0) + 1

        await asyncio.gather(*(guarded(seed) for seed in range(NUM_REQUESTS)))
    return counts


# Plenty of KV; and so little that requests preempt each other, while the smallest size guesses for the others.
@pytest.mark.parametrize(("kv_memory", "flags"), [("16MiB", ()), ("600KiB", ("--speculative-size", "auto"))])
def test_five_hundred_random_requests_leave_nothing_behind(pair, kv_memory, flags):
    with RunningServer(pair, "--kv-cache-memory", kv_memory, "--max-num-seqs", "12", *flags) as server:
        counts = asyncio.run(storm(server.url))
        assert sum(counts.values()) == NUM_REQUESTS and min(counts.values()) > 50, counts
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            load = httpx.get(server.url + "/load").json()
            if load["num_running"] == load["num_waiting"] == load["server_load"] == 0:
                break
            time.sleep(0.05)
        assert load["num_running"] == load["num_waiting"] == load["server_load"] == 0, load
        assert load["kv_usage"] == 0.0
        # The server still answers as a fresh one would.
        body = {"prompt": "The quick", "max_tokens": 8, "temperature": 0, "size": "5L"}
        first, second = (httpx.post(server.url + "/v1/completions", json=body).json() for _ in range(2))
        assert first["choices"][0]["text"] == second["choices"][0]["text"]
        if kv_memory == "600KiB":
            metrics = httpx.get(server.url + "/metrics").text
            preempted = re.search(r"^vllm:num_preemptions_total\{.*\} (\S+)", metrics, re.M)
            assert preempted and float(preempted[1]) > 0
            guessed = re.search(r'^boomerang:spec_decode_draft_tokens_total\{.*size="6".*\} (\S+)', metrics, re.M)
            assert guessed and float(guessed[1]) > 0
        assert server.stop() == 0
        log = "".join(server.log)
        assert re.search(r"all \d+ pages are free", log), log[-2000:]
        assert "ERROR" not in log and "Traceback" not in log
