"""The autoscaler as it is deployed: its own process, with Docker and Prometheus coming and going around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.stack import free_port
from tests.deploy.fake_engine import FakeEngine
from tests.deploy.test_signals import FakePrometheus, Handler

BUSY = {"up": "1", "request_rate": "5", "degraded_share": "0.9", "size_fraction": "0.5", "running": "10"}


class Autoscaler:
    def __init__(self, folder):
        self.prometheus_port, self.port = free_port(), free_port()
        self.decisions_path = folder / "decisions.jsonl"
        self.socket, gate_port = folder / "docker.sock", free_port()
        self.gate = subprocess.Popen(
            [
                *(sys.executable, "-m", "deploy.autoscaler.gate", "--project", "boomerang", "--host", "127.0.0.1"),
                *("--port", str(gate_port), "--docker-url", f"unix://{self.socket}"),
            ],
            stderr=subprocess.DEVNULL,
        )
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "deploy.autoscaler", "--interval", "0.1"),
                *("--gate-url", f"http://127.0.0.1:{gate_port}", "--metrics-port", str(self.port), "--window", "30s"),
                *("--prometheus-url", f"http://127.0.0.1:{self.prometheus_port}", "--max-replicas", "2"),
                *("--decisions-path", str(self.decisions_path)),
            ],
            stderr=subprocess.DEVNULL,
        )

    def metric(self, name: str, **labels: str) -> float | None:
        try:
            text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False).text
        except httpx.TransportError:
            return None
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return next((s.value for s in samples if s.name == name and labels.items() <= s.labels.items()), None)

    def until(self, condition, what: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert self.process.poll() is None, f"it ended with {self.process.returncode}"
            assert time.monotonic() < deadline, what
            time.sleep(0.05)

    def errors(self, source: str) -> float:
        return self.metric("boomerang_autoscaler_errors_total", source=source) or 0

    def decisions(self) -> list[dict]:
        return [json.loads(line) for line in self.decisions_path.read_text().splitlines()]


@pytest.fixture
def autoscaler(tmp_path):
    autoscaler = Autoscaler(tmp_path)
    yield autoscaler
    for process in (autoscaler.process, autoscaler.gate):
        process.kill()
        process.wait()


def serve_prometheus(port: int) -> FakePrometheus:
    server = FakePrometheus(("127.0.0.1", port), Handler)
    server.values = BUSY
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def test_it_outlives_docker_and_prometheus(autoscaler):
    autoscaler.until(lambda: autoscaler.errors("driver") >= 2, "Docker's absence is not counted")
    assert not autoscaler.decisions_path.exists()  # it knows of no replica, so there is nothing to decide

    engine = FakeEngine(autoscaler.socket)
    autoscaler.until(lambda: autoscaler.errors("prometheus") >= 2, "Prometheus' absence is not counted")
    assert autoscaler.metric("boomerang_autoscaler_signal_ok") == 0
    assert autoscaler.decisions()[-1]["reason"] == "no_data"
    assert not [call for call in engine.calls if not call.startswith("GET")]

    prometheus = serve_prometheus(autoscaler.prometheus_port)
    autoscaler.until(lambda: len(engine.containers) == 3, "no second replica")  # besides the load balancer
    assert autoscaler.decisions()[-1]["target"] == 2 and autoscaler.decisions()[-1]["reason"] == "degraded"
    assert autoscaler.metric("boomerang_autoscaler_target_replicas") == 2

    prometheus.shutdown()
    prometheus.server_close()
    autoscaler.until(lambda: autoscaler.decisions()[-1]["reason"] == "no_data", "the loss of Prometheus is not noticed")
    engine.close()
    before = autoscaler.errors("driver")
    autoscaler.until(lambda: autoscaler.errors("driver") > before, "the loss of Docker is not noticed")
    engine.open()
    prometheus = serve_prometheus(autoscaler.prometheus_port)
    autoscaler.until(lambda: autoscaler.metric("boomerang_autoscaler_signal_ok") == 1, "it did not recover")
    prometheus.shutdown()
    prometheus.server_close()

    # Its end is not the replicas': they go on serving.
    autoscaler.process.send_signal(signal.SIGTERM)
    assert autoscaler.process.wait(10) == 0
    assert len(engine.containers) == 3
    autoscaler.gate.send_signal(signal.SIGTERM)
    assert autoscaler.gate.wait(10) == 0
    engine.close()


@pytest.mark.parametrize("program", ["deploy.autoscaler", "deploy.autoscaler.gate"])
def test_a_variable_that_nobody_knows_is_an_error_with_a_suggestion(program):
    known = f"BOOMERANG_{program.rpartition('.')[2].upper()}_MAX_REPLICAS"
    environment = {**os.environ, known[:-1]: "3"}
    command = [sys.executable, "-m", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2 and f"did you mean {known}?" in result.stderr
