"""The exact requests of vllm bench serve, guidellm, aiperf and inference-perf, and what they read from the answers."""

import json
import re

import httpx
import pytest

from tests.api.tiny import NAME, RunningServer

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(plain):
    with httpx.Client(base_url=plain.url, timeout=60) as client:
        yield client


def stream(client: httpx.Client, path: str, body: dict, **headers: str) -> list[dict]:
    """The data chunks, read as load tools read them; the stream ends with [DONE]."""
    with client.stream("POST", path, json=body, headers=headers) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_vllm_bench_serve(client):
    body = {
        "model": NAME, "prompt": "The quick", "repetition_penalty": 1.0, "max_tokens": 9, "logprobs": None,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0,
    }  # fmt: skip
    chunks = stream(client, "/v1/completions", body, **{"x-request-id": "bench-0"})
    assert chunks[0]["choices"] and "text" in chunks[0]["choices"][0]  # time to first token
    assert not chunks[-1]["choices"] and chunks[-1]["usage"]["completion_tokens"] == 9
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    messages = [{"role": "user", "content": [{"type": "text", "text": "The quick"}]}]
    body = {
        "model": NAME, "messages": messages, "max_completion_tokens": 9, "stream": True, "temperature": 0.0,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    chunks = stream(client, "/v1/chat/completions", body)
    assert all("delta" in chunk["choices"][0] for chunk in chunks[:-1])
    assert not chunks[-1]["choices"] and chunks[-1]["usage"]["completion_tokens"] == 9


def test_guidellm(client):
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == NAME
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": NAME, "stream": True, "stream_options": options, "max_tokens": 7, "stop": None, "ignore_eos": True}
    chunks = stream(client, "/v1/completions", body | {"prompt": "The quick", "size": "4L"})
    usages = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert usages == sorted(usages) and usages[-1] == 7 and chunks[0]["model"] == f"{NAME}:4L"
    body |= {"messages": HELLO, "max_completion_tokens": 7}
    chunks = stream(client, "/v1/chat/completions", body)
    assert all("usage" in chunk for chunk in chunks) and chunks[-1]["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_aiperf(client, endpoint):
    body = {"model": NAME, "stream": True, "stream_options": {"include_usage": True}}
    if endpoint == "chat":
        message = {"role": "user", "content": "The quick", "name": ""}
        chunks = stream(client, "/v1/chat/completions", body | {"messages": [message], "max_completion_tokens": 5})
        assert chunks[0]["object"] == "chat.completion.chunk"
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    else:
        chunks = stream(client, "/v1/completions", body | {"prompt": ["The quick"], "max_tokens": 5})
        assert chunks[0]["object"] == "text_completion"
    assert chunks[-1]["usage"]["completion_tokens"] <= 5
    text = client.get("/metrics").text  # aiperf scrapes families by prefix
    assert "vllm:time_to_first_token_seconds_bucket" in text and "vllm:num_requests_running" in text


def test_inference_perf_sends_limits_as_headers(client):
    headers = {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "60000", "x-gateway-inference-objective": "any"}
    body = {"model": NAME, "prompt": "The quick", "max_tokens": 5, "ignore_eos": True, "stream": False}

    def num_met() -> float:
        family = r'^boomerang:slo_requests_total\{met="true",model_name="tiny",slo="ttft"\} (\S+)'
        found = re.search(family, client.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    before = num_met()
    answer = client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5
    assert num_met() == before + 1


def test_an_error_in_a_stream_is_an_error_event(pair):
    """guidellm raises on it instead of counting a short answer."""
    with RunningServer(pair, "--max-request-seconds", "0.3") as server:
        body = {"prompt": "x", "max_tokens": 250, "ignore_eos": True, "stream": True, "n": 16, "logprobs": 20}
        lines = httpx.post(server.url + "/v1/completions", json=body, timeout=60).text.split("\n\n")
        assert lines[-2] == "data: [DONE]"
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["type"] == "timeout_error"
