"""What a scrape reads from the engine itself: gauges, and counters that the engine keeps anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from server.core.width import bits_read, precision_name
from server.engine.sleep import SleepState

if TYPE_CHECKING:
    from server.engine.engine import Engine
    from server.engine.extras.speculation import Speculator
    from server.engine.sleep import SleepReport


_NOTICED = 0.02  # nats per token below which bits that are missing do not make a request degraded


def size_load(engine: Engine) -> dict[str, float]:
    """What load costs in quality right now: running requests, those well below their ceiling, and sums over all of
    layers, of layers times the bits that a weight is read with, and of expected KL (nats per token), each as it is and
    as it would be at the ceiling."""
    running, kl_of = tuple(engine.scheduler.running), engine.scheduler.policy.expected_kl
    sizes = [(r.path.size, max(r.sizes), bits_read(r.width), bits_read(r.max_width), *kl_of(r)) for r in running]
    return {
        "running": len(sizes),
        "degraded": sum(size < top or kl - best > _NOTICED for size, top, _, _, kl, best in sizes),
        "served_layers": sum(row[0] for row in sizes),
        "ceiling_layers": sum(row[1] for row in sizes),
        "served_bits": sum(row[0] * row[2] for row in sizes),
        "ceiling_bits": sum(row[1] * row[3] for row in sizes),
        "kl": sum(row[4] for row in sizes),
        "ceiling_kl": sum(row[5] for row in sizes),
    }


# Labels of vllm:cache_config_info that dashboards and gateways read.
_CACHE_CONFIG = (
    *("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype", "gpu_memory_utilization"),
    *("sliding_window", "num_cpu_blocks"),
)


class EngineCollector:
    """Reads the engine's state at scrape time."""

    def __init__(self, engine: Engine, labels: dict[str, str], legacy: bool, memory_share: float) -> None:
        self.engine, self.labels, self.legacy, self.memory_share = engine, labels, legacy, memory_share

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats, config = self.engine.stats(), self.engine.config
        names, values = list(self.labels), list(self.labels.values())

        def one(kind: Callable[..., Any], name: str, text: str, value: float) -> Metric:
            family = kind(name, text, labels=names)
            family.add_metric(values, value)
            return family

        yield one(GaugeMetricFamily, "vllm:num_requests_running", "Requests in the batch", stats.num_running)
        yield one(GaugeMetricFamily, "vllm:num_requests_waiting", "Requests in the queue", stats.num_waiting)
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "Waiting requests by reason", labels=[*names, "reason"]
        )
        waiting.add_metric([*values, "capacity"], stats.num_waiting - stats.num_parked)
        waiting.add_metric([*values, "deferred"], stats.num_parked)
        yield waiting
        yield one(GaugeMetricFamily, "vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1", stats.kv_usage)
        if self.legacy:
            yield one(GaugeMetricFamily, "vllm:gpu_cache_usage_perc", "Old name of kv_cache_usage", stats.kv_usage)
        sleep = GaugeMetricFamily("vllm:engine_sleep_state", "1 for the current state", labels=[*names, "sleep_state"])
        is_awake = self.engine.sleeper is None or not self.engine.sleeper.report.num_bytes
        for state in ("awake", "weights_offloaded", "discard_all"):
            sleep.add_metric([*values, state], float(state == ("awake" if is_awake else "weights_offloaded")))
        yield sleep
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "KV cache settings",
            labels=["engine", *_CACHE_CONFIG],
        )
        # A client multiplies the two to get tokens; pages are of one layer, so count blocks of the largest size.
        blocks = stats.num_pages // max(self.engine.sizes[-1], 1)
        pages = (config.page_size, blocks, config.enable_prefix_caching, config.kv_cache_dtype)
        values_of_info = (*pages, self.memory_share, "None", 0)
        info.add_metric(["0", *map(str, values_of_info)], 1.0)
        yield info
        counters = [
            ("vllm:num_preemptions", "Requests preempted", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_cache_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.prefix_cache_hits),
        ]
        for name, text, value in counters:
            yield one(CounterMetricFamily, name, text, value)
        if self.engine.speculator is not None:
            yield from self._speculation(self.engine.speculator)
        yield from self._by_size(stats)
        yield from self._cost_model()
        if self.engine.sleeper is not None:
            yield from self._sleep(self.engine.sleeper.report)

    def _sleep(self, report: SleepReport) -> Iterator[Metric]:
        name = self.labels["model_name"]
        states = GaugeMetricFamily("boomerang:sleep_state", "1 for the current state", labels=["model_name", "state"])
        for state in SleepState:
            states.add_metric([name, str(state)], float(state is report.state))
        yield states
        gauges = (
            ("largest_size_awake", "Layers of the largest size that answers without waking", report.largest),
            ("sleep_bytes_released", "Bytes of weights given back while asleep", report.num_bytes),
            ("wake_last_seconds", "What the last wake took", report.wake_seconds),
        )
        counters = (
            ("sleeps", "Times larger sizes fell asleep", report.num_sleeps),
            ("wakes", "Times they woke", report.num_wakes),
            ("wake_seconds", "Seconds that took, all together", report.total_wake_seconds),
            ("wake_failures", "Times they could not be woken", report.num_failures),
        )
        for kind, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for suffix, text, value in rows:
                family = kind(f"boomerang:{suffix}", text, labels=["model_name"])
                family.add_metric([name], value)
                yield family

    def _speculation(self, speculator: Speculator) -> Iterator[Metric]:
        """vLLM's totals, and how well each size is guessed: which tells what the smaller one is worth, too."""
        stats, names = speculator.stats, list(self.labels)
        values = list(self.labels.values())
        by_position = [sum(column) for column in zip(*stats.accepted.values(), strict=True)] or [0]
        totals = (
            ("num_drafts", "Times guesses were made for a request", sum(stats.drafts.values())),
            ("num_draft_tokens", "Tokens guessed", sum(stats.draft_tokens.values())),
            ("num_accepted_tokens", "Guesses that stood", sum(by_position)),
        )
        for suffix, text, value in totals:
            family = CounterMetricFamily(f"vllm:spec_decode_{suffix}", text, labels=names)
            family.add_metric(values, value)
            yield family
        family = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Guesses that stood by position",
            labels=[*names, "position"],
        )  # fmt: skip
        for position, value in enumerate(by_position):
            family.add_metric([*values, str(position)], value)
        yield family
        pairs = (
            ("drafts", "Times guesses were made for a request of this size", stats.drafts),
            ("draft_tokens", "Tokens guessed for this size", stats.draft_tokens),
            ("accepted_tokens", "Guesses that stood", {size: sum(n) for size, n in stats.accepted.items()}),
        )
        for suffix, text, counts in pairs:
            family = CounterMetricFamily(
                f"boomerang:spec_decode_{suffix}", text, labels=["model_name", "size", "draft_size"]
            )
            for size, value in sorted(counts.items()):
                family.add_metric([self.labels["model_name"], str(size), speculator.pool.name], value)
            yield family

    def _cost_model(self) -> Iterator[Metric]:
        """How well steps are predicted; nothing where sizes are not chosen by cost."""
        cost = self.engine.scheduler.policy.cost
        if cost is None:
            return
        name = self.labels["model_name"]
        error = GaugeMetricFamily(
            "boomerang:step_prediction_error",
            "Relative error of predicted step time over recent steps, by kind of step and quantile",
            labels=["model_name", "kind", "quantile"],
        )
        seconds = CounterMetricFamily(
            "boomerang:step_prediction_seconds",
            "Step time by kind of step: measured, and as predicted beforehand",
            labels=["model_name", "kind", "value"],
        )
        for kind, stats in cost.errors.items():
            for quantile in (0.5, 0.95):
                error.add_metric([name, kind, str(quantile)], stats.quantile(quantile))
            seconds.add_metric([name, kind, "measured"], stats.measured)
            seconds.add_metric([name, kind, "predicted"], stats.predicted)
        yield error
        yield seconds

    def _by_size(self, stats: Any) -> Iterator[Metric]:
        name = self.labels["model_name"]
        running = GaugeMetricFamily(
            "boomerang:requests_running", "Requests in the batch by size", labels=["model_name", "size"]
        )
        for size in self.engine.sizes:
            running.add_metric([name, str(size)], stats.running_by_size.get(size, 0))
        yield running
        precision = GaugeMetricFamily(
            "boomerang:requests_running_at", "Requests in the batch by precision", labels=["model_name", "precision"]
        )
        widths = [request.width for request in tuple(self.engine.scheduler.running)]
        for width in self.engine.executor.widths:
            precision.add_metric([name, precision_name(width)], widths.count(width))
        yield precision
        load = size_load(self.engine)
        for suffix, text, value in (
            ("requests_running_degraded", "Running requests well below the best they allow", load["degraded"]),
            ("running_layers", "Sizes of the running requests, summed", load["served_layers"]),
            ("running_ceiling_layers", "Largest sizes the running requests allow, summed", load["ceiling_layers"]),
            ("running_layer_bits", "Sizes times bits of a weight read, summed", load["served_bits"]),
            ("running_ceiling_layer_bits", "The same at the most that they allow", load["ceiling_bits"]),
            ("running_expected_kl", "Expected KL of the running requests, nats per token, summed", load["kl"]),
            ("running_ceiling_expected_kl", "The same at the best that they allow", load["ceiling_kl"]),
            ("kv_pages", "KV pages in the pool", stats.num_pages),
            ("kv_pages_free", "KV pages that an allocation can have", stats.num_free_pages),
            ("queued_tokens", "Tokens of waiting requests", stats.num_waiting_tokens),
        ):
            family = GaugeMetricFamily(f"boomerang:{suffix}", text, labels=["model_name"])
            family.add_metric([name], value)
            yield family
