"""OpenTelemetry: a span for every inference request, and the GenAI server metrics. Needs the extra `otel`.

A request's span continues the caller's trace (W3C `traceparent`) and has children for the time it waited, read its
prompt and generated. Names follow the GenAI semantic conventions; `gen_ai.response.model` says which size answered.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from server.config import Settings
from server.options import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer
    from starlette.datastructures import Headers

    from server.api.generate.generation import Generation

_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/api/generate": "text_completion",
    "/v1/embeddings": "embeddings",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}  # everything else that generates is chat


def create_telemetry(settings: Settings) -> Telemetry | None:
    """None if no endpoint is set; SettingsError if the packages are missing."""
    if not (settings.otlp_traces_endpoint or settings.otlp_metrics_endpoint):
        return None
    try:
        return Telemetry(settings)
    except ImportError as error:
        raise SettingsError(
            f"--otlp-traces-endpoint and --otlp-metrics-endpoint need OpenTelemetry: "
            f"pip install 'boomerang-serve[otel]' ({error})"
        ) from None


class Telemetry:
    """Exports in threads of its own; `close` sends what is left."""

    def __init__(self, settings: Settings) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES are read by the library; ours is only the default.
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {"service.name": "boomerang-serve"})
        self._propagator = TraceContextTextMapPropagator()
        self._tracing: TracerProvider | None = None
        self._tracer: Tracer | None = None
        self._metering: MeterProvider | None = None
        if settings.otlp_traces_endpoint:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            self._tracing = TracerProvider(resource=resource)
            self._tracing.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.otlp_traces_endpoint)))
            self._tracer = self._tracing.get_tracer("boomerang-serve")
        if settings.otlp_metrics_endpoint:
            self._declare_metrics(settings.otlp_metrics_endpoint, resource)
        self._server = {"server.address": settings.host, "server.port": settings.port}

    def _declare_metrics(self, endpoint: str, resource: Any) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint))
        self._metering = MeterProvider([reader], resource)
        meter = self._metering.get_meter("boomerang-serve")

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return meter.create_histogram(
                f"gen_ai.server.{name}", "s", text, explicit_bucket_boundaries_advisory=list(buckets)
            )

        self._duration = histogram("request.duration", "First byte in to last byte out", _DURATION)
        self._per_token = histogram("time_per_output_token", "Time per output token after the first", _PER_TOKEN)
        self._first_token = histogram("time_to_first_token", "Arrival to first token", _FIRST_TOKEN)

    def observe(
        self, path: str, headers: Headers, status: int, arrival: float, request_id: str, generation: Generation | None
    ) -> None:
        """One finished inference request that arrived at `arrival` (`time.monotonic`).

        `generation` is None if it was refused before it had one.
        """
        shared = {
            "gen_ai.operation.name": _OPERATIONS.get(path, "chat"),
            "gen_ai.provider.name": "boomerang",
            **self._server,
        }
        if generation is not None:
            # Not what the client wrote: `NAME:0.7499` and its like would be a new series each.
            shared["gen_ai.request.model"] = generation.state.catalog.name
            if generation.size:
                shared["gen_ai.response.model"] = generation.model_id
        if failure := _failure(status, generation):
            shared["error.type"] = failure
        if self._metering is not None:
            self._measure(shared, time.monotonic() - arrival, generation)
        if self._tracer is not None:
            self._trace(self._tracer, shared, path, headers, status, arrival, request_id, generation)

    def _measure(self, shared: dict[str, Any], seconds: float, generation: Generation | None) -> None:
        self._duration.record(seconds, shared)
        timings = generation.timings() if generation is not None else {}
        if "time_to_first_token_ms" in timings:
            self._first_token.record(timings["time_to_first_token_ms"] / 1000, shared)
        if "mean_itl_ms" in timings:
            self._per_token.record(timings["mean_itl_ms"] / 1000, shared)

    def _trace(
        self,
        tracer: Tracer,
        shared: dict[str, Any],
        path: str,
        headers: Headers,
        status: int,
        arrival: float,
        request_id: str,
        generation: Generation | None,
    ) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        # The request and its phases are put on the wall clock by one and the same offset, so that they nest.
        offset = time.time_ns() - time.monotonic_ns()
        name = f"{shared['gen_ai.operation.name']} {shared.get('gen_ai.request.model', '')}".strip()
        span = tracer.start_span(
            name,
            context=self._propagator.extract(dict(headers)),
            kind=SpanKind.SERVER,
            start_time=int(arrival * 1e9) + offset,
            attributes=shared
            | {"http.route": path, "http.response.status_code": status, "gen_ai.request.id": request_id}
            | (_details(generation) if generation is not None else {}),
        )
        if "error.type" in shared:
            span.set_status(Status(StatusCode.ERROR))
        if generation is not None:
            for phase, begin, finish in generation.phases():
                child = tracer.start_span(
                    phase, context=set_span_in_context(span), start_time=int(begin * 1e9) + offset
                )
                child.end(int(finish * 1e9) + offset)
        span.end(time.monotonic_ns() + offset)

    def close(self) -> None:
        """Send what is left; blocks for some seconds if nobody listens."""
        for provider in (self._tracing, self._metering):
            if provider is not None:
                provider.shutdown()


def _failure(status: int, generation: Generation | None) -> str | None:
    if status >= 400:
        return str(status)
    if generation is not None and not all(sequence.is_finished for sequence in generation.sequences):
        return "cancelled"  # the client left, or the stream ended with an error event
    return None


def _details(generation: Generation) -> dict[str, Any]:
    """Attributes of the span alone: what was asked for and what came of it."""
    usage, sampling = generation.usage(), generation.sequences[0].request.sampling
    details = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.choice.count": len(generation.sequences),
        "gen_ai.response.id": generation.submission.answer_id,
        "gen_ai.response.finish_reasons": [s.finish_reason or "error" for s in generation.sequences],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
    }
    if sampling.seed is not None:
        details["gen_ai.request.seed"] = str(sampling.seed)  # may be wider than an attribute's 64 signed bits
    if generation.size:
        summary = generation.size_summary()
        details |= {"boomerang.size": generation.size, "boomerang.size.reason": generation.reason}
        details["boomerang.precision"] = summary["precision"]
    return details
