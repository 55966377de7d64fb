"""Prometheus metrics: vLLM's families under vLLM's names, everything per size under `boomerang:`.

Gauges are read from the engine when somebody scrapes. Per request there is one call, per step another; both come from
the engine thread and cost microseconds. Names, types, labels and buckets of the `vllm:` families follow vLLM's
`vllm/v1/metrics/loggers.py`, so that its dashboards work unchanged.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    Summary,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily, Metric

from server.core.width import precision_name
from server.observe.engine_metrics import EngineCollector, size_load

__all__ = ["Metrics", "size_load"]

from server.engine.step_clock import PARTS

if TYPE_CHECKING:
    from server.core.request import LiveRequest, SizeDecision
    from server.engine.engine import Engine
    from server.engine.stats import StepStats

LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
    *(160, 640, 2560),
)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
HTTP_FINE = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60)
_MOST_UNBOOKED = 64  # steps; beyond that the engine books them itself
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")


def token_buckets(max_value: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `max_value`."""
    buckets: list[int] = []
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale > max_value:
                return tuple(buckets) or (1,)
            buckets.append(step * scale)
        scale *= 10


class WeightedHistogram:
    """A histogram that can observe one value many times at once: a step gives all its requests the same interval."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: dict[str, str],
        buckets: Iterable[float],
        registry: CollectorRegistry,
    ) -> None:
        self.name, self.documentation, self.labels = name, documentation, labels
        self._bounds = tuple(float(bound) for bound in buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, count: int = 1) -> None:
        """Called by one thread at a time."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self.name, self.documentation, labels=list(self.labels))
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        family.add_metric(list(self.labels.values()), buckets, self._sum)
        yield family


class Metrics:
    """All metrics of one server process, on a registry of their own. The engine's `MetricsSink`."""

    def __init__(self, legacy_names: bool = False) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._engine: Engine | None = None
        self._legacy = legacy_names
        self._steps: deque[StepStats] = deque()  # that have not been booked
        self._booking = threading.Lock()
        self._declare_http()
        self._labels: dict[str, str] = {}
        self._num_prompt_tokens = self._num_generation_tokens = 0

    def token_totals(self) -> tuple[int, int]:
        """Tokens of prompts whose answers have begun, and of answers, so far."""
        self._book_steps()
        return self._num_prompt_tokens, self._num_generation_tokens

    def attach(self, engine: Engine, model_name: str, max_model_len: int, gpu_memory_utilization: float = 0.9) -> None:
        """The model is known: declare what carries its name, and read gauges from this engine from now on."""
        self._labels = {"model_name": model_name, "engine": "0"}
        self._declare_engine(max_model_len)
        self._engine = engine
        self.registry.register(EngineCollector(engine, self._labels, self._legacy, gpu_memory_utilization))

    def render(self) -> bytes:
        self._book_steps()
        return generate_latest(self.registry)

    # --- declarations

    def _declare_http(self) -> None:
        """What prometheus_fastapi_instrumentator exports for vLLM."""
        registry = self.registry
        by = ("handler", "method", "status")
        self.http_requests = Counter("http_requests", "HTTP requests by handler and status", by, registry=registry)
        self.http_request_size = Summary("http_request_size_bytes", "Request bodies", ("handler",), registry=registry)
        self.http_response_size = Summary(
            "http_response_size_bytes", "Response bodies", ("handler",), registry=registry
        )
        self.http_duration_fine = Histogram(
            "http_request_duration_highr_seconds", "Latency of all requests", buckets=HTTP_FINE, registry=registry
        )
        self.http_duration = Histogram(
            "http_request_duration_seconds",
            "Latency by handler",
            ("handler", "method"),
            buckets=(0.1, 0.5, 1),
            registry=registry,
        )
        self._lag = Histogram(
            "boomerang:event_loop_lag_seconds", "Lateness of the event loop", buckets=LAG, registry=registry
        )
        self._rejections = Counter(
            "vllm:admission_rejections", "Requests refused before they were queued", ("reason",), registry=registry
        )
        for reason in ("max_num_queued_reqs", "max_num_queued_tokens"):
            self._rejections.labels(reason)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, (*self._labels, *labels), registry=self.registry)
        return counter if labels else counter.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, text, tuple(self._labels), buckets=tuple(buckets), registry=self.registry).labels(
            **self._labels
        )

    def _declare_engine(self, max_model_len: int) -> None:
        seconds, count = self._histogram, token_buckets(max_model_len)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens processed")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated")
        self.cached_tokens = self._counter("vllm:prompt_tokens_cached", "Prompt tokens taken from the prefix cache")
        by_source = self._counter("vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from", "source")
        sources = ("local_compute", "local_cache_hit", "external_kv_transfer")
        self.by_source = {source: by_source.labels(**self._labels, source=source) for source in sources}
        success = self._counter("vllm:request_success", "Finished requests", "finished_reason")
        self.success = {reason: success.labels(**self._labels, finished_reason=reason) for reason in FINISH_REASONS}
        self.corrupted = self._counter("vllm:corrupted_requests", "Requests with NaN in their logits")
        self.e2e = seconds("vllm:e2e_request_latency_seconds", "Arrival to last token", LATENCY)
        self.queue = seconds("vllm:request_queue_time_seconds", "Time in the waiting queue", LATENCY)
        self.prefill = seconds("vllm:request_prefill_time_seconds", "First scheduled to first token", LATENCY)
        self.decode = seconds("vllm:request_decode_time_seconds", "First to last token", LATENCY)
        self.inference = seconds("vllm:request_inference_time_seconds", "First scheduled to last token", LATENCY)
        self.ttft = seconds("vllm:time_to_first_token_seconds", "Arrival to first token", TTFT)
        self.tpot = seconds("vllm:request_time_per_output_token_seconds", "Mean time per output token", PER_TOKEN)
        self.num_prompt = seconds("vllm:request_prompt_tokens", "Prompt tokens per request", count)
        self.num_generated = seconds("vllm:request_generation_tokens", "Generated tokens per request", count)
        self.max_generated = seconds(
            "vllm:request_max_num_generation_tokens", "Most tokens generated for one of n choices", count
        )
        self.max_tokens = seconds("vllm:request_params_max_tokens", "max_tokens of requests", count)
        self.kv_computed = seconds(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens computed, cached ones left out", count
        )
        self.params_n = seconds("vllm:request_params_n", "n of requests", (1, 2, 5, 10, 20))
        weighted = [("vllm:inter_token_latency_seconds", "Time between tokens", PER_TOKEN)]
        if self._legacy:
            weighted.append(("vllm:time_per_output_token_seconds", "Old name of inter_token_latency", PER_TOKEN))
        self._inter_token = [WeightedHistogram(n, t, self._labels, b, self.registry) for n, t, b in weighted]
        self.iteration = WeightedHistogram(
            "vllm:iteration_tokens_total", "Tokens per step", self._labels, ITERATION, self.registry
        )
        self._declare_sizes()

    def _declare_sizes(self) -> None:
        names = ("model_name", "size")
        text = "Work done on the student that is being made, 0 to 1"
        self.student_progress = Gauge("boomerang:student_progress", text, names[:1], registry=self.registry)
        text = "KL of its sizes so far, nats per token"
        self.student_kl = Gauge("boomerang:student_kl", text, names, registry=self.registry)
        by_size = lambda name, text, *more: Counter(  # noqa: E731
            f"boomerang:{name}", text, ("model_name", "size", *more), registry=self.registry
        )
        self.size_requests = by_size("requests", "Finished requests", "finished_reason")
        self.size_prompt_tokens = by_size("prompt_tokens", "Prompt tokens of finished requests")
        self.size_generation_tokens = by_size("generation_tokens", "Tokens generated by finished requests")
        self.size_decisions = by_size("size_decisions", "Sizes given to requests, and why", "precision", "reason")
        self.degraded = by_size("requests_degraded", "Requests served below the largest size they allowed", "reason")
        latency = lambda key, text, buckets: Histogram(  # noqa: E731
            f"boomerang:{key}_seconds", text, ("model_name", "size"), buckets=buckets, registry=self.registry
        )
        self.size_ttft = latency("time_to_first_token", "Arrival to first token, by size", TTFT)
        self.size_tpot = latency("time_per_output_token", "Mean time per output token, by size", PER_TOKEN)
        self.size_e2e = latency("e2e_request_latency", "Arrival to last token, by size", LATENCY)
        name = {"model_name": self._labels["model_name"]}
        one = lambda key, text: Counter(  # noqa: E731
            f"boomerang:{key}", text, ("model_name",), registry=self.registry
        ).labels(**name)
        self.served_layers = one("served_layers", "Layers of the sizes that finished requests got")
        self.ceiling_layers = one("ceiling_layers", "Layers of the largest sizes that they allowed")
        self.precision_tokens = Counter(
            "boomerang:generation_tokens_at",
            "Tokens generated by finished requests, by precision",
            ("model_name", "precision"),
            registry=self.registry,
        )
        self.served_kl = one("served_expected_kl", "Expected KL of finished requests, nats per token, summed")
        self.ceiling_kl = one("ceiling_expected_kl", "The same at the best that they allowed")
        slo = Counter(
            "boomerang:slo_requests",
            "Finished requests with latency limits, by limit (ttft, tpot, e2e, all of theirs)",
            ("model_name", "slo", "met"),
            registry=self.registry,
        )
        self.slo = {
            (limit, met): slo.labels(**name, slo=limit, met=str(met).lower())
            for limit in ("ttft", "tpot", "e2e", "all")
            for met in (True, False)
        }
        self.step_time = WeightedHistogram("boomerang:step_seconds", "Time of a step", name, STEP, self.registry)
        self.model_time = WeightedHistogram(
            "boomerang:step_model_seconds", "Time of a step's model call", name, STEP, self.registry
        )
        self.step_gap = one("step_gap_seconds", "Time between model calls")
        by_part = Counter(
            "boomerang:step_gap_part_seconds",
            "The same by what was done; wait: the part of it all in which the engine's thread did not run",
            ("model_name", "part"),
            registry=self.registry,
        )
        self.gap_parts = {part: by_part.labels(**name, part=part) for part in (*PARTS, "wait")}
        self.engine_steps = one("engine_steps", "Steps run")

    # --- event loop

    def admission_rejected(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def observe_choices(self, n: int, longest: int) -> None:
        """One HTTP request has ended: its `n`, and the tokens of the longest of its choices."""
        self.params_n.observe(n)
        self.max_generated.observe(longest)

    def observe_http(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        self.http_requests.labels(handler, method, f"{status // 100}xx").inc()
        self.http_request_size.labels(handler).observe(request_bytes)
        self.http_response_size.labels(handler).observe(response_bytes)
        self.http_duration_fine.observe(seconds)
        self.http_duration.labels(handler, method).observe(seconds)

    def observe_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def set_student_progress(self, share: float, kl_by_size: Mapping[int, float]) -> None:
        """How far the student is that is made for this server."""
        name = self._labels["model_name"]
        self.student_progress.labels(name).set(share)
        for size, kl in kl_by_size.items():
            self.student_kl.labels(name, str(size)).set(kl)

    # --- engine thread

    def on_step(self, stats: StepStats) -> None:
        """Steps are booked by the event loop, while the next one computes, and a few at a time: after the weights have
        passed through the caches, the first of a series takes three times as long as the others. A scrape books what
        is left."""
        self._steps.append(stats)
        if len(self._steps) >= _MOST_UNBOOKED:
            self._book_steps()

    def book_steps(self) -> None:
        if len(self._steps) >= 8:
            self._book_steps()

    def _book_steps(self) -> None:
        with self._booking:
            while self._steps:
                self._book_step(self._steps.popleft())

    def _book_step(self, stats: StepStats) -> None:
        self.generation_tokens.inc(stats.num_generation_tokens)
        self._num_generation_tokens += stats.num_generation_tokens
        self.iteration.observe(stats.num_scheduled_tokens)
        self.step_time.observe(stats.step_time)
        self.model_time.observe(stats.model_time)
        self.step_gap.inc(stats.gap.seconds)
        for part in PARTS:
            self.gap_parts[part].inc(stats.gap.parts.get(part, 0.0))
        self.gap_parts["wait"].inc(stats.gap.wait)
        self.engine_steps.inc()
        # Everyone who decodes gets a token in every step, so the step's period is the interval of all of them.
        num_later = stats.num_generation_tokens - stats.num_first_tokens
        if num_later > 0:
            for histogram in self._inter_token:
                histogram.observe(stats.model_time + stats.gap.seconds, num_later)

    def on_size_decision(self, decision: SizeDecision) -> None:
        labels = str(decision.size), precision_name(decision.width), decision.reason
        self.size_decisions.labels(self._labels["model_name"], *labels).inc()

    def on_first_token(self, request: LiveRequest) -> None:
        """A prompt counts once, when its answer begins: where it came from adds up to all of it, as for vLLM."""
        num_cached = max(request.num_cached_tokens, 0)
        self.prompt_tokens.inc(request.num_prompt_tokens)
        self._num_prompt_tokens += request.num_prompt_tokens
        self.cached_tokens.inc(num_cached)
        self.by_source["local_cache_hit"].inc(num_cached)
        self.by_source["local_compute"].inc(request.num_prompt_tokens - num_cached)

    def on_request_finished(self, request: LiveRequest) -> None:
        reason = request.status.finish_reason or "abort"
        self.success[reason].inc()
        num_cached, num_output = max(request.num_cached_tokens, 0), len(request.output_token_ids)
        self.num_prompt.observe(request.num_prompt_tokens)
        self.num_generated.observe(num_output)
        self.max_tokens.observe(request.sampling.max_tokens)
        scheduled, first, last = request.scheduled_time, request.first_token_time, request.last_token_time
        if scheduled is not None:
            self.queue.observe(scheduled - request.arrival_time)
            if not request.output_token_ids and reason in ("stop", "length"):  # a prompt that was only scored
                self.on_first_token(request)
            self.kv_computed.observe(request.num_prompt_tokens - num_cached)
        if request.decision is not None:
            if scheduled is not None and first is not None and last is not None:
                self._observe_times(request, request.decision.size, scheduled, first, last)
            self._observe_size(request, request.decision, reason)

    def _observe_times(self, request: LiveRequest, size: int, scheduled: float, first: float, last: float) -> None:
        num_output = len(request.output_token_ids)
        ttft, e2e = first - request.arrival_time, last - request.arrival_time
        self.ttft.observe(ttft)
        self.e2e.observe(e2e)
        self.prefill.observe(first - scheduled)
        self.decode.observe(last - first)
        self.inference.observe(last - scheduled)
        tpot = (last - first) / (num_output - 1) if num_output > 1 else 0.0
        labels = (self._labels["model_name"], str(size))
        if num_output > 1:
            self.tpot.observe(tpot)
            self.size_tpot.labels(*labels).observe(tpot)
        self.size_ttft.labels(labels[0], str(request.decisions[0].size)).observe(ttft)
        self.size_e2e.labels(*labels).observe(e2e)
        budget = request.budget
        limits = (("ttft", ttft, budget.ttft), ("tpot", tpot, budget.tpot), ("e2e", e2e, budget.e2e))
        met = {name: value <= limit for name, value, limit in limits if limit is not None}
        if met:
            met["all"] = all(met.values())
            for item in met.items():
                self.slo[item].inc()

    def _observe_size(self, request: LiveRequest, decision: SizeDecision, reason: str) -> None:
        name, size = self._labels["model_name"], str(decision.size)
        self.size_requests.labels(name, size, reason).inc()
        # Tokens belong to the size that made them, the prompt to the first.
        self.size_prompt_tokens.labels(name, str(request.decisions[0].size)).inc(request.num_prompt_tokens)
        begins, num_output = [made.after_tokens for made in request.decisions], len(request.output_token_ids)
        for made_by, begin, end in zip(request.decisions, begins, [*begins[1:], num_output], strict=True):
            if end > begin:
                self.size_generation_tokens.labels(name, str(made_by.size)).inc(end - begin)
        ends = [*(start for _, start in request.widths[1:]), num_output]
        for (width, begin), end in zip(request.widths, ends, strict=False):  # no widths: no token was made
            if end > begin:
                self.precision_tokens.labels(name, precision_name(width)).inc(end - begin)
        if self._engine is not None:
            kl, best = self._engine.scheduler.policy.expected_kl(request)
            self.served_kl.inc(kl)
            self.ceiling_kl.inc(best)
        ceiling = max(request.sizes)
        self.served_layers.inc(decision.size)
        self.ceiling_layers.inc(ceiling)
        if decision.size < ceiling:
            self.degraded.labels(name, size, decision.reason).inc()
