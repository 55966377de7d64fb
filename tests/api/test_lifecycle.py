"""A real server process from start to end: readiness, memory budget, disconnects, dead engine, drain."""

import json
import threading
import time

import httpx
import pytest
import torch

from model_store.pair import open_pair
from model_store.weight_form import WeightForm
from tests.api.tiny import NAME, QUICK, RunningServer


def post(url: str, **body) -> httpx.Response:
    return httpx.post(url + "/v1/completions", json={"prompt": "The quick", "temperature": 0} | body, timeout=60)


@pytest.fixture(scope="module")
def slow(pair):
    """Loads, and steps, for long enough that something can happen meanwhile. The last test stops it."""
    server = RunningServer(pair)
    try:
        yield server
    finally:
        server.stop()


def test_health_is_503_until_the_model_is_loaded(slow):
    slow.wait_listening()
    first = httpx.get(slow.url + "/health")
    if first.status_code == 503:  # it may have loaded already
        assert first.json()["error"]["code"] == 503 and "retry-after" in first.headers
        early = post(slow.url)
        assert early.status_code in (200, 503)
    slow.wait_ready()
    assert httpx.get(slow.url + "/health").status_code == 200
    assert post(slow.url, max_tokens=2).status_code == 200


def test_a_memory_budget_serves_the_sizes_that_fit_and_names_the_others(pair):
    budget = open_pair(*pair).union_bytes((4, 5), WeightForm(torch.float32)) + 1000
    with RunningServer(pair, "--memory-budget", str(budget), *QUICK) as server:
        listed = httpx.get(server.url + "/v1/models").json()["data"]
        assert [card["id"] for card in listed] == [NAME, f"{NAME}:4L", f"{NAME}:5L"]
        assert "6L" in json.dumps(listed[0]["missing_sizes"])
        assert post(server.url, max_tokens=2).json()["model"] == f"{NAME}:5L"
        refused = post(server.url, size="6L")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "size"
        assert "6L" in refused.json()["error"]["message"]


def wait_idle(url: str, seconds: float = 10) -> dict:
    deadline = time.monotonic() + seconds
    while True:
        load = httpx.get(url + "/load").json()
        if load["num_running"] == load["num_waiting"] == 0 or time.monotonic() > deadline:
            return load
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(slow, stream):
    slow.wait_ready()
    body = {"prompt": "The quick", "max_tokens": 240, "ignore_eos": True, "stream": stream, "n": 4}
    started = time.monotonic()
    try:
        with httpx.Client(timeout=0.3).stream("POST", slow.url + "/v1/completions", json=body) as response:
            if stream:
                next(response.iter_lines())
    except httpx.TimeoutException:
        pass
    load = wait_idle(slow.url)
    assert load["num_running"] == 0 and load["kv_usage"] == 0.0
    assert time.monotonic() - started < 10


def test_sigterm_lets_streams_finish_and_refuses_new_work(slow):
    slow.wait_ready()
    lines: list[str] = []
    began = threading.Event()

    def read() -> None:
        body = {"prompt": "The quick", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", slow.url + "/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                began.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(30)
    stopper = threading.Thread(target=slow.stop)
    stopper.start()
    refused = 0
    while stopper.is_alive() and reader.is_alive():
        try:
            answer = post(slow.url, max_tokens=1)
            if answer.status_code == 503:
                refused += 1
                assert "retry-after" in answer.headers
                assert httpx.get(slow.url + "/health").status_code == 503
        except httpx.TransportError:
            break
    reader.join(60)
    stopper.join(60)
    assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"
    assert refused > 0 and slow.process.returncode == 0
    assert "pages are free" in "".join(slow.log)
