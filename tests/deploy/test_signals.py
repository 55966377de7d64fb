"""Reading Prometheus: the arithmetic of the answer and every way it can fail."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from deploy.autoscaler.signals import PrometheusSource, SourceUnavailable, queries


class FakePrometheus(ThreadingHTTPServer):
    """Answers an instant query with the value that `values` has for a part of its text."""

    values: dict[str, str]
    status = 200
    raw: bytes | None = None


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)["query"][0]
        names = {text: name for name, text in queries("30s").items()}
        value = self.server.values.get(names[query])
        result = [] if value is None else [{"metric": {}, "value": [0, value]}]
        body = self.server.raw or json.dumps({"status": "success", "data": {"result": result}}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def prometheus():
    server = FakePrometheus(("127.0.0.1", 0), Handler)
    server.values = {"up": "2"}
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def source(prometheus):
    return PrometheusSource(f"http://127.0.0.1:{prometheus.server_port}")


def test_values_become_a_signal(prometheus, source):
    prometheus.values |= {"request_rate": "3.5", "degraded_share": "0.25", "size_fraction": "0.9", "running": "7"}
    signal = source.read()
    assert (signal.request_rate, signal.degraded_share, signal.size_fraction) == (3.5, 0.25, 0.9)
    assert (signal.running, signal.waiting, signal.slo_attainment) == (7, 0, None)


def test_nothing_served_is_not_degradation(prometheus, source):
    prometheus.values |= {"request_rate": "0", "degraded_share": "NaN", "size_fraction": "NaN"}
    signal = source.read()
    assert signal.degraded_share is None and signal.size_fraction is None


@pytest.mark.parametrize("up", [None, "0"])
def test_prometheus_without_replicas_is_no_data(prometheus, source, up):
    prometheus.values["up"] = up
    with pytest.raises(SourceUnavailable, match="no replica"):
        source.read()


@pytest.mark.parametrize("broken", [{"status": 500}, {"raw": b"<html>"}, {"raw": b"{}"}, {"raw": b'{"data": 1}'}])
def test_nonsense_is_unavailable(prometheus, source, broken):
    for name, value in broken.items():
        setattr(prometheus, name, value)
    with pytest.raises(SourceUnavailable):
        source.read()


def test_nobody_there_is_unavailable():
    with pytest.raises(SourceUnavailable):
        PrometheusSource("http://127.0.0.1:9").read()
