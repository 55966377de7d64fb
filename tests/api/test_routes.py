"""The smaller routes of a real server, settings from environment and YAML, keys, and float16."""

import re

import httpx
import pytest

from tests.api.tiny import NAME, QUICK, RunningServer


@pytest.fixture(scope="module")
def url(plain):
    return plain.url


def test_tokenizer_routes_are_enough_to_evaluate_without_a_tokenizer(url):
    for text in ("The quick brown fox", "Grüße, 世界 🌍", " two  spaces\n\n"):
        answer = httpx.post(url + "/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
        assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 256
        assert httpx.post(url + "/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = httpx.post(url + "/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert "assistant" in httpx.post(url + "/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    info = httpx.get(url + "/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and info["chat_template"]
    assert httpx.post(url + "/detokenize", json={"tokens": [10**9]}).status_code == 400


def test_version_metrics_and_docs(plain, url):
    assert httpx.get(url + "/version").json()["version"]
    httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 3, "size": "5L"})
    text = httpx.get(url + "/metrics").text
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:time_to_first_token_seconds_bucket"):
        assert f'{name}{{engine="0",' in text or f"{name}{{" in text
    assert any(line.startswith("boomerang:") and 'size="5' in line for line in text.splitlines())
    paths = httpx.get(url + "/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health"} <= set(paths)
    assert set(paths["/health"]) == {"get"} and "Duplicate Operation" not in "".join(plain.log)


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_pages_of_the_api_load_nothing_from_elsewhere(url, page):
    """A public endpoint's users run no script of a third party, and an air-gapped one has its pages."""
    loaded = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", httpx.get(url + page).text)
    assert len(loaded) >= 2 and "/openapi.json" in "".join([*loaded, httpx.get(url + page).text])
    for link in loaded:
        assert link.startswith("/") and httpx.get(url + link).status_code == 200, link


def test_environment_and_yaml_are_flags_too_and_float16_serves(pair, tmp_path):
    config = tmp_path / "server.yaml"
    config.write_text("max-size: 5L\nmin_size: 4L\n")
    flags = ("--config", str(config), "--dtype", "float16")
    with RunningServer(pair, *flags, env={"BOOMERANG_SIZE": "4L"}) as server:
        answer = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 4}, timeout=60).json()
        assert answer["model"] == f"{NAME}:4L" and answer["usage"]["completion_tokens"] >= 1
        refused = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "size": "6L"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "size"


def test_keys_guard_inference_but_not_health(pair):
    with RunningServer(pair, "--api-key", "one", "two", *QUICK) as server:
        body = {"prompt": "x", "max_tokens": 1}
        for header, status in ((None, 401), ("Bearer wrong", 401), ("Bearer one", 200), ("Bearer two", 200)):
            headers = {"authorization": header} if header else {}
            assert httpx.post(server.url + "/v1/completions", json=body, headers=headers).status_code == status
        assert httpx.get(server.url + "/v1/models").status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200
