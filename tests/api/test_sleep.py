"""Sleep to the student, as operators and clients see it: memory goes back to the system, answers go on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.api.tiny import NAME, QUICK, ROOT, RunningServer, make_tokenizer, noted


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Enough weights to be seen among a process's memory: 4 MB a layer."""
    folder = tmp_path_factory.mktemp("large")
    kept = [0, 2, 14, 15]
    for name, layers in (("teacher", 16), ("student", 4)):
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=400, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
    pruned = [layer for layer in range(16) if layer not in kept]
    (folder / "student/student_config.json").write_text(
        json.dumps({"copied_teacher_layers": kept, "pruned_teacher_layers": pruned})
    )
    make_tokenizer(folder / "teacher")
    return noted(folder / "teacher", folder / "student")


def post(url: str, path: str = "/v1/completions", **body) -> httpx.Response:
    return httpx.post(url + path, json={"prompt": "The quick", "temperature": 0, "max_tokens": 8} | body, timeout=60)


def resident(server: RunningServer) -> int:
    """Bytes of main memory that the server's process takes."""
    line = next(x for x in Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) * 1024


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_memory_goes_back_to_the_system_and_answers_go_on(large, executor):
    with RunningServer(large, "--enable-sleep-mode", "--executor", executor, "--size-policy", "largest") as server:
        url = server.url
        cards = {card["id"]: card for card in httpx.get(url + "/v1/models").json()["data"]}
        small, *_, big = sorted((c for c in cards.values() if "layers" in c), key=lambda card: card["layers"])
        awake = {card["id"]: post(url, model=card["id"]).json()["choices"][0]["text"] for card in (small, big)}
        before, whole = resident(server), httpx.get(url + "/api/ps").json()["models"][0]["size"]
        slept = httpx.post(url + "/sleep?level=1", timeout=60).json()
        assert slept["is_sleeping"] and slept["state"] == "asleep" and slept["largest"] == small["id"].split(":")[1]
        released = slept["bytes_released"]
        asleep = resident(server)
        assert released > 40e6 and before - asleep > 0.8 * released
        assert (
            httpx.get(url + "/is_sleeping").json() == slept
            and httpx.get(url + "/load").json()["sleep_state"] == "asleep"
        )
        assert httpx.get(url + "/api/ps").json()["models"][0]["size"] == whole - released
        cards = {card["id"]: card for card in httpx.get(url + "/v1/models").json()["data"]}
        assert cards[NAME]["sleep"] == slept and cards[big["id"]]["is_asleep"] and not cards[small["id"]]["is_asleep"]
        answer = post(url)
        assert answer.headers["x-boomerang-size-reason"] == "asleep" and answer.json()["model"] == small["id"]
        assert answer.json()["choices"][0]["text"] == awake[small["id"]]
        found = metrics(url)
        name = f'{{model_name="{NAME}"}}'
        assert found[f"boomerang:sleep_bytes_released{name}"] == released
        assert found[f'boomerang:sleep_state{{model_name="{NAME}",state="asleep"}}'] == 1
        assert found[f"boomerang:served_layers_total{name}"] == found[f"boomerang:ceiling_layers_total{name}"]
        assert found[f'vllm:engine_sleep_state{{engine="0",model_name="{NAME}",sleep_state="weights_offloaded"}}'] == 1
        assert post(url, model=big["id"]).json()["choices"][0]["text"] == awake[big["id"]]  # waits, and wakes it
        assert httpx.get(url + "/is_sleeping").json()["state"] == "awake"
        assert resident(server) - asleep > 0.5 * released
        assert httpx.post(url + "/sleep", timeout=60).json()["is_sleeping"]
        woken = httpx.post(url + "/wake_up?tags=weights", timeout=60).json()
        assert woken["state"] == "awake" and woken["bytes_released"] == 0 and woken["seconds_to_wake"] > 0
        assert metrics(url)[f"boomerang:wakes_total{name}"] == 2
        assert post(url).json()["choices"][0]["text"] == awake[big["id"]]
        for path, param in (("/sleep?level=2", "level"), ("/wake_up?tags=lora", "tags"), ("/sleep?deep=1", "deep")):
            refused = httpx.post(url + path)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param


def test_an_idle_server_falls_asleep_and_a_request_wakes_it(pair):
    with RunningServer(pair, "--sleep-after", "0.3", "--api-key", "secret", *QUICK) as server:
        url, key = server.url, {"Authorization": "Bearer secret"}
        for path in ("/sleep", "/wake", "/wake_up"):
            assert httpx.post(url + path).status_code == 401
        assert httpx.get(url + "/is_sleeping").status_code == 401
        with httpx.Client(base_url=url, headers=key, timeout=60) as client:
            deadline = time.monotonic() + 30
            while client.get("/is_sleeping").json()["state"] != "asleep":
                assert time.monotonic() < deadline
                time.sleep(0.02)
            body = {"prompt": "The quick", "temperature": 0, "max_tokens": 8}
            first = client.post("/v1/completions", json=body)
            assert first.json()["model"] == f"{NAME}:4L" and first.headers["x-boomerang-size-reason"] == "asleep"
            sizes = set()
            while f"{NAME}:6L" not in sizes:  # it wakes in the background
                assert time.monotonic() < deadline
                sizes.add(client.post("/v1/completions", json=body).json()["model"])
            assert "could not wake" not in "".join(server.log)


def test_a_server_without_the_flags_does_not_sleep(plain):
    assert httpx.get(plain.url + "/is_sleeping").json() == {"is_sleeping": False}
    refused = httpx.post(plain.url + "/sleep")
    assert refused.status_code == 400 and "--sleep-after" in refused.json()["error"]["message"]
    assert "sleep" not in httpx.get(plain.url + "/v1/models").json()["data"][0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--student", "none", "--sleep-after", "60"], "--sleep-after: there is no smaller size to sleep to"),
        (["--min-size", "6L", "--enable-sleep-mode"], "--enable-sleep-mode: there is no smaller size"),
    ],
)
def test_where_there_is_nothing_to_sleep_to_it_says_so_at_start(pair, flags, words):
    command = [sys.executable, "-m", "server", "serve", "--teacher", str(pair[0]), "--student", str(pair[1])]
    command += ["--port", "0", "--host", "127.0.0.1", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and words in ended.stderr and "Traceback" not in ended.stderr
