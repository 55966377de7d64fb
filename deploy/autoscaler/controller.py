"""The loop: look, decide, act, write down why."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from deploy.autoscaler.decision import Decision, Observation, ScalingPolicy, ScalingState, Signal, decide
from deploy.autoscaler.drivers import Driver, DriverUnavailable, Replica
from deploy.autoscaler.metrics import AutoscalerMetrics
from deploy.autoscaler.signals import SourceUnavailable

__all__ = ["Controller"]

log = logging.getLogger("boomerang.autoscaler")


class Source(Protocol):
    def read(self) -> Signal: ...


@dataclass(slots=True)
class Controller:
    """Joins a signal source and a driver. One `tick` is one pass; `run` repeats it until `stop` is set.

    Times in seconds. A replica that drains longer than `drain_timeout` is ended; one that is not ready after
    `start_timeout` is replaced. In a dry run decisions are made, logged and exported, and nothing is touched.
    """

    policy: ScalingPolicy
    source: Source
    driver: Driver
    metrics: AutoscalerMetrics = field(default_factory=AutoscalerMetrics)
    interval: float = 5.0
    drain_timeout: float = 300.0
    start_timeout: float = 600.0
    is_dry_run: bool = False
    decisions_path: Path | None = None
    clock: Callable[[], float] = time.time
    state: ScalingState | None = None
    _drain_started: dict[str, float] = field(default_factory=dict)
    _is_blind: bool = False
    _last_written: tuple[int, str] | None = None

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            started = time.monotonic()
            try:
                self.tick()
            except Exception:
                # The autoscaler outlives its own bugs: replicas keep serving, the next pass tries again.
                log.exception("tick failed")
                self.metrics.errors.labels("internal").inc()
            stop.wait(max(0.0, self.interval - (time.monotonic() - started)))

    def tick(self) -> Decision | None:
        """One pass. Returns the decision, or None when the driver is away (then nothing is known to act on)."""
        now = self.clock()
        try:
            replicas = self.driver.replicas()
        except DriverUnavailable as error:
            return self._driver_failed("list", error)
        counts = dict.fromkeys(("starting", "ready", "draining", "exited"), 0)
        for replica in replicas:
            counts[replica.status] += 1
        if self.state is None:
            # Taking over a running deployment: what is there is the target until a decision says otherwise.
            self.state = ScalingState(target=counts["ready"] + counts["starting"])
        try:
            signal = self.source.read()
            if self._is_blind:
                log.info("the signal is back")
            self._is_blind = False
        except SourceUnavailable as error:
            if not self._is_blind:  # once, not with every look
                log.warning("no signal: %s", error)
            self._is_blind = True
            self.metrics.errors.labels("prometheus").inc()
            signal = None
        observation = Observation(now=now, ready=counts["ready"], starting=counts["starting"], signal=signal)
        self.state, decision = decide(self.policy, self.state, observation)
        self.metrics.observe(self.policy, counts, signal, decision, self.state)
        self._write(observation, decision)
        if not self.is_dry_run:
            try:
                self._act(replicas, decision.target, now)
            except DriverUnavailable as error:
                self._driver_failed("act", error)
        return decision

    def _act(self, replicas: list[Replica], target: int, now: float) -> None:
        live = [r for r in replicas if r.status in ("starting", "ready")]
        for replica in replicas:
            if replica.status == "exited" and (replica.is_managed or replica.id in self._drain_started):
                # One that Compose made and that stopped by itself is Compose's to restart (its policy), not ours.
                log.info("removing %s, which has exited", replica.id[:20])
                self.driver.remove(replica.id)
                self._drain_started.pop(replica.id, None)
            elif replica.status == "draining":
                since = self._drain_started.setdefault(replica.id, now)
                if now - since > self.drain_timeout:
                    log.warning("%s still draining after %.0f s: ending it", replica.id[:20], now - since)
                    self.metrics.actions.labels("kill").inc()
                    self.driver.remove(replica.id)
            elif replica.status == "starting" and replica.is_managed and now - replica.created > self.start_timeout:
                log.warning("%s not ready after %.0f s: replacing it", replica.id[:20], now - replica.created)
                self.metrics.actions.labels("replace").inc()
                self.driver.remove(replica.id)
                live.remove(replica)
        for _ in range(target - len(live)):
            name = self.driver.start()
            log.info("started %s", name[:20])
            self.metrics.actions.labels("start").inc()
        # Our own first, those not yet serving before those that do, the youngest first.
        order = sorted(live, key=lambda r: (not r.is_managed, r.status == "ready", -r.created))
        for replica in order[: max(0, len(live) - target)]:
            log.info("draining %s", replica.id[:20])
            self.metrics.actions.labels("drain").inc()
            self.driver.drain(replica.id)
            self._drain_started[replica.id] = now

    def _driver_failed(self, what: str, error: DriverUnavailable) -> None:
        log.warning("driver cannot %s: %s", what, error)
        self.metrics.errors.labels("driver").inc()
        return None

    def _write(self, observation: Observation, decision: Decision) -> None:
        """One JSON line for each change of target or reason, to the decisions file and the log."""
        key = (decision.target, decision.reason)
        if key == self._last_written:
            return
        self._last_written = key
        entry = {
            "time": round(observation.now, 3),
            **asdict(decision),
            "dry_run": self.is_dry_run,
            "ready": observation.ready,
            "starting": observation.starting,
            "capacity": self.state.capacity if self.state else None,
            "signal": asdict(observation.signal) if observation.signal else None,
        }
        line = json.dumps(entry)
        log.info("decision %s", line)
        if self.decisions_path:
            try:
                with open(self.decisions_path, "a", encoding="utf-8") as out:
                    out.write(line + "\n")
            except OSError as error:
                print(f"cannot write {self.decisions_path}: {error}", file=sys.stderr)
