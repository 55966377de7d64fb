"""What the autoscaler says about itself (its own /metrics, by default on port 9105)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from deploy.autoscaler.decision import Decision, ScalingPolicy, ScalingState, Signal

__all__ = ["AutoscalerMetrics"]


class AutoscalerMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        gauge = lambda name, text, labels=(): Gauge(  # noqa: E731
            f"boomerang_autoscaler_{name}", text, labels, registry=self.registry
        )
        counter = lambda name, text, labels: Counter(  # noqa: E731
            f"boomerang_autoscaler_{name}", text, labels, registry=self.registry
        )
        self.target = gauge("target_replicas", "Replicas there should be.")
        self.wanted = gauge("wanted_replicas", "Replicas the signal alone asks for, before stabilisation.")
        self.replicas = gauge("replicas", "Replicas there are, by status.", ("status",))
        self.max = gauge("max_replicas", "The limit set by the operator.")
        self.capacity = gauge("replica_capacity_requests", "Learned: requests in flight one replica serves whole.")
        self.signal_ok = gauge("signal_ok", "1 while Prometheus answers with data.")
        self.held_replacements = gauge("held_replacements", "Unhealthy replicas left alone, because most are.")
        self.decisions = counter("decisions", "Decisions by reason.", ("reason",))
        self.actions = counter("actions", "What was done: start, drain, kill, replace.", ("action",))
        self.errors = counter("errors", "Failed reads and calls.", ("source",))
        for action in ("start", "drain", "kill", "replace"):
            self.actions.labels(action)
        for source in ("prometheus", "driver", "internal"):
            self.errors.labels(source)

    def observe(
        self,
        policy: ScalingPolicy,
        counts: dict[str, int],
        signal: Signal | None,
        decision: Decision,
        state: ScalingState,
    ) -> None:
        self.max.set(policy.max_replicas)
        self.target.set(decision.target)
        self.wanted.set(decision.wanted)
        for status, count in counts.items():
            self.replicas.labels(status).set(count)
        self.capacity.set(state.capacity or 0)
        self.signal_ok.set(signal is not None)
        self.decisions.labels(decision.reason).inc()
