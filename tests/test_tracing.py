"""Spans and GenAI metrics as a collector receives them over OTLP, and the JSON access log."""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.api.tiny import NAME, QUICK, RunningServer, make_pair

pytest.importorskip("opentelemetry.sdk", reason="pip install boomerang-serve[otel]")

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Receives what an OpenTelemetry collector would."""

    def __init__(self) -> None:
        self.spans, self.metrics, self.services = [], {}, set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                collector.receive(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def receive(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.services.update(a.value.string_value for a in group.resource.attributes if a.key == "service.name")
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
        else:
            for group in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.metrics |= {metric.name: metric for scope in group.scope_metrics for metric in scope.metrics}


def attributes(span) -> dict:
    values = {}
    for item in span.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        values[item.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return values


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """(collector, lines of the server's log) after a few requests and a clean stop."""
    collector = Collector()
    flags = ["--otlp-traces-endpoint", f"{collector.url}/v1/traces", "--log-format", "json"]
    flags += ["--otlp-metrics-endpoint", f"{collector.url}/v1/metrics", "--enable-per-request-metrics"]
    with RunningServer(make_pair(tmp_path_factory.mktemp("tracing")), *flags, *QUICK) as server:
        trace = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        body = {"model": f"{NAME}:5L", "prompt": "The quick", "max_tokens": 6, "temperature": 0, "size": "5L"}
        answer = httpx.post(server.url + "/v1/completions", json=body, headers=trace)
        assert set(answer.json()["metrics"]) >= {"queue_time_ms", "time_to_first_token_ms", "tokens_per_second"}
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
        assert httpx.post(server.url + "/v1/chat/completions", json=chat).status_code == 200
        assert httpx.post(server.url + "/v1/completions", json=body | {"size": "99L"}).status_code == 400
        assert httpx.get(server.url + "/health").status_code == 200
    return collector, [json.loads(line) for line in server.log if line.startswith("{")]


def test_a_request_continues_the_callers_trace(observed):
    collector, _ = observed
    assert collector.services == {"boomerang-serve"}
    span = next(span for span in collector.spans if span.name == f"text_completion {NAME}" and not span.status.code)
    assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == PARENT
    values = attributes(span)
    assert values["gen_ai.request.model"] == NAME  # not what a client writes: that would be a series each
    assert values["gen_ai.response.model"] == f"{NAME}:5L" and values["boomerang.size"] == 5
    assert values["gen_ai.usage.output_tokens"] == 6 and values["gen_ai.response.finish_reasons"] == ["length"]
    assert values["gen_ai.request.id"] == "mine" and values["http.response.status_code"] == 200
    phases = {child.name: child for child in collector.spans if child.parent_span_id == span.span_id}
    assert set(phases) == {"queue", "prefill", "decode"}
    ordered = [phases[name] for name in ("queue", "prefill", "decode")]
    for before, after in itertools.pairwise(ordered):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    assert span.start_time_unix_nano <= ordered[0].start_time_unix_nano
    assert ordered[-1].end_time_unix_nano <= span.end_time_unix_nano


def test_streams_and_refusals_have_spans_too(observed):
    collector, _ = observed
    stream = next(span for span in collector.spans if span.name == f"chat {NAME}")
    assert attributes(stream)["gen_ai.usage.output_tokens"] == 3
    refused = [attributes(span) for span in collector.spans if span.status.code == 2]
    assert [values["error.type"] for values in refused] == ["400"]


def test_genai_metrics(observed):
    collector, _ = observed
    duration = collector.metrics["gen_ai.server.request.duration"]
    assert duration.unit == "s" and sum(point.count for point in duration.histogram.data_points) == 3
    first = collector.metrics["gen_ai.server.time_to_first_token"].histogram.data_points
    assert sum(point.count for point in first) == 2 and list(first[0].explicit_bounds)[:3] == [0.001, 0.005, 0.01]
    assert "gen_ai.server.time_per_output_token" in collector.metrics


def test_json_log_lines_carry_ids_and_sizes_and_health_is_quiet(observed):
    _, lines = observed
    access = {line["request_id"]: line for line in lines if line["logger"] == "boomerang.access"}
    mine = access["mine"]
    assert mine["status"] == 200 and mine["model"] == f"{NAME}:5L" and mine["completion_tokens"] == 6
    assert mine["size_reason"] == "requested" and mine["time_to_first_token_ms"] > 0
    assert not [line for line in access.values() if line["path"] == "/health"]
