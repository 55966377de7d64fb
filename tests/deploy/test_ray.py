"""The Ray Serve application on this machine: one node, two CPU replicas. Slow to start: run by `make test-ray`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import time
from types import SimpleNamespace

import httpx
import pytest

from deploy.local.stack import free_port
from tests.api.tiny import make_pair

if not os.environ.get("BOOMERANG_TEST_RAY"):
    pytest.skip("takes a minute and a gigabyte: set BOOMERANG_TEST_RAY=1 (make test-ray)", allow_module_level=True)
ray = pytest.importorskip("ray", reason="needs ray[serve]")
# Ray's own, about its own fields.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TOKENS = 200
METRICS_PORT = free_port()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    os.environ |= {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray.routing:middlewares",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_RECORD_AUTOSCALING_STATS_TIMEOUT_S": "5",
    }
    from ray import serve

    from deploy.ray.app import build

    teacher, student = make_pair(tmp_path_factory.mktemp("pair"))
    # Logical CPUs: what Ray may place, not what the machine has.
    ray.init(
        num_cpus=6,
        include_dashboard=False,
        configure_logging=False,
        log_to_driver=False,
        _metrics_export_port=METRICS_PORT,
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {
        "teacher": str(teacher),
        "student": str(student),
        "served_model_name": ["tiny"],
        "dtype": "float32",
        "executor": "torch",
        "device": "cpu",
        "num_threads": 1,
        "kv_cache_memory": "16MiB",
        "max_num_seqs": 2,
    }
    options = {
        "metrics_interval": 1,
        "max_replicas": 2,
        "num_cpus": 1,
        "look_back": 3,
        "policy": {"down_stabilisation": 5.0, "down_interval": 2.0, "queue_high": 1.0},
    }
    serve.run(build({**settings, **options}), name="boomerang")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def body(prompt: str = "The quick brown fox", **fields) -> dict:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, **fields}


def num_replicas() -> int:
    from ray import serve

    (deployment,) = serve.status().applications["boomerang"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def load_of(url: str) -> dict:
    return httpx.get(url + "/load").json()


def wait_for(condition, timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.25)


def test_streams_token_by_token(url):
    times, text, is_done = [], "", False
    with httpx.stream(
        "POST", url + "/v1/completions", json=body(stream=True, max_tokens=TOKENS), timeout=60
    ) as response:
        assert response.status_code == 200 and response.headers["x-boomerang-size"]
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
                event = json.loads(line[6:])
                text += "".join(choice["text"] for choice in event["choices"])
            is_done = is_done or line == "data: [DONE]"
    assert text and is_done
    assert len(times) > 10 and times[-1] - times[0] > 0.02  # not one lump at the end


def test_sizes_and_errors_are_those_of_the_server(url):
    answer = httpx.post(url + "/v1/completions", json=body(size="5L"), timeout=30)
    assert answer.json()["model"] == "tiny:5L"
    refused = httpx.post(url + "/v1/completions", json=body(size="99L"), timeout=30)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "size"


def test_disconnect_aborts(url):
    with httpx.stream("POST", url + "/v1/completions", json=body(stream=True, max_tokens=240), timeout=60) as response:
        next(response.iter_lines())
    wait_for(lambda: load_of(url)["num_running"] == 0, 10, "the abandoned request still runs")


def test_metrics_go_out_through_ray(url):
    httpx.post(url + "/v1/completions", json=body(size="5L"), timeout=30)

    def is_exported() -> bool:
        try:
            text = httpx.get(f"http://127.0.0.1:{METRICS_PORT}/metrics").text
        except httpx.TransportError:
            return False
        return "ray_vllm_num_requests_running" in text and "ray_boomerang_served_layers" in text

    wait_for(is_exported, 60, "the metrics of the replica are not exported")


def test_scales_up_under_load_and_down_again(url):
    assert num_replicas() == 1
    stop = time.monotonic() + 90
    statuses: list[int] = []

    def visitor(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < stop and num_up[0] < 2:
                request = body(f"visitor {number} says", max_tokens=TOKENS, stream=False)
                statuses.append(client.post(url + "/v1/completions", json=request).status_code)

    num_up = [1]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        visitors = [pool.submit(visitor, number) for number in range(12)]
        try:
            wait_for(lambda: num_replicas() == 2, 80, "no second replica under load")
        finally:
            num_up[0] = 2
        concurrent.futures.wait(visitors)
    assert statuses and set(statuses) == {200}
    wait_for(lambda: num_replicas() == 1, 60, "the second replica stayed")


def test_the_router_prefers_the_prefix_then_the_size_unless_busy():
    from deploy.ray.routing import PrefixAndSizeRouter

    class Router(PrefixAndSizeRouter):
        """Without Serve around it: loads are given."""

        def __init__(self, loads: dict[str, int]) -> None:
            self.loads = loads
            self.initialize_state(max_imbalance=4)

        def _load(self, replica) -> int:
            return self.loads[replica.replica_id]

    def replica(name: str, *sizes: str):
        return SimpleNamespace(replica_id=name, routing_stats={"sizes": list(sizes)})

    def request(prefix: str, size: str = ""):
        return SimpleNamespace(metadata=SimpleNamespace(session_id=prefix, multiplexed_model_id=size))

    def order(router, asked) -> list[str]:
        ranks = asyncio.run(router.choose_replicas(replicas, asked))
        return [choice.replica_id for rank in ranks for choice in rank]

    replicas = [replica("a", "16"), replica("b", "30"), replica("c")]
    router = Router({"a": 3, "b": 2, "c": 1})
    assert order(router, request("p")) == ["c", "b", "a"]  # nothing known: by load
    assert order(router, request("p", "16L")) == ["a", "c", "b"]  # it runs this size
    router.on_request_routed(request("p"), "b", None)
    assert order(router, request("p", "16L"))[0] == "b"  # it has this prefix
    router.loads["b"] = 9
    assert order(router, request("p", "16L")) == ["a", "c", "b"]  # but is too busy
    assert order(router, None) == ["c", "a", "b"]
