"""What a replica tells Ray: the scaling signal, the sizes it runs, and its metrics through Ray's own exporter."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from ray.util import metrics as ray_metrics

from server.observe.metrics import size_load

if TYPE_CHECKING:
    from server.engine.engine import Engine

__all__ = ["MetricsMirror", "ReplicaStats"]


class ReplicaStats:
    """Reads the engine of a replica. `replica.app` is the application that Serve holds."""

    def __init__(self, replica: Any, metrics_interval: float = 5.0) -> None:
        self.replica, self.metrics_interval = replica, metrics_interval
        self._mirror: MetricsMirror | None = None
        self._last_mirror = 0.0
        self._last: dict[str, float] = {}
        self._last_time = time.monotonic()

    @property
    def _engine(self) -> Engine | None:
        async_engine = self.replica.app.state.server.async_engine
        return async_engine.engine if async_engine else None

    def autoscaling(self) -> dict[str, float]:
        """Gauges, and counters as rates since the last call (Ray averages what it gets over its window)."""
        engine = self._engine
        if engine is None:
            return {}
        registry = self.replica.app.state.server.metrics.registry
        self._mirror_metrics(registry)
        totals = _totals(registry)
        now = time.monotonic()
        seconds = max(now - self._last_time, 1e-3)
        rates = {name: (total - self._last.get(name, 0.0)) / seconds for name, total in totals.items()}
        self._last, self._last_time = totals, now
        return {**size_load(engine), "waiting": float(engine.stats().num_waiting), **rates}

    def routing(self) -> dict[str, Any]:
        engine = self._engine
        return {"sizes": [str(size) for size in engine.stats().running_by_size] if engine else []}

    def _mirror_metrics(self, registry: CollectorRegistry) -> None:
        now = time.monotonic()
        if now - self._last_mirror >= self.metrics_interval:
            self._last_mirror = now
            if self._mirror is None:
                self._mirror = MetricsMirror(registry)
            self._mirror.push()


def _totals(registry: CollectorRegistry) -> dict[str, float]:
    totals = {"slo_met": 0.0, "slo_missed": 0.0, "rejected": 0.0}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name == "boomerang:slo_requests_total" and sample.labels["slo"] == "all":
                totals["slo_met" if sample.labels["met"] == "true" else "slo_missed"] += sample.value
            elif sample.name == "vllm:admission_rejections_total":
                totals["rejected"] += sample.value
    return totals


class MetricsMirror:
    """Copies the server's metrics to ray.util.metrics, which exports them with the replica as a label.

    `GET /metrics` through Serve's proxy reaches one arbitrary replica; Ray's exporter has them all, as
    ray_vllm_..., ray_boomerang_... Histograms go over as their cumulative buckets, sum and count.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._metrics: dict[str, ray_metrics.Gauge | ray_metrics.Counter] = {}
        self._last: dict[tuple[str, tuple[str, ...]], float] = {}

    def push(self) -> None:
        for family in self.registry.collect():
            if not family.name.startswith(("vllm:", "boomerang:")):
                continue
            for sample in family.samples:
                self._push_one(family.type, sample)

    def _push_one(self, kind: str, sample: Any) -> None:
        names = tuple(sorted(sample.labels))
        # Ray appends _total to counters itself.
        name = re.sub(r"[^a-zA-Z0-9_]", "_", sample.name).removesuffix("_total")
        metric = self._metrics.get(name)
        is_counter = kind in ("counter", "histogram", "summary")
        if metric is None:
            make = ray_metrics.Counter if is_counter else ray_metrics.Gauge
            metric = self._metrics[name] = make(name, description=sample.name, tag_keys=names)
        if not is_counter:
            metric.set(sample.value, tags=dict(sample.labels))
            return
        key = (name, tuple(sample.labels[label] for label in names))
        increase = sample.value - self._last.get(key, 0.0)
        if increase > 0:  # a Ray counter takes increments, and not of zero
            metric.inc(increase, tags=dict(sample.labels))
            self._last[key] = sample.value
