"""The loop: look, decide, act, write down why."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
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

    Times in seconds. Nothing that may hold streams is ended before it had `drain_timeout` to finish them. One that is
    not ready `start_timeout` after its start, or that turned unhealthy, is drained and replaced, one at a time; while
    most are unhealthy at once the host is overloaded and none is. Stale ones are replaced likewise, the new one first;
    one that serves without keys goes first if its replacement, which has keys, cannot start.
    What was learned and who drains since when is kept in `state_path`. In a dry run decisions are made, logged and
    exported, and nothing is touched.
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
    state_path: Path | None = None
    clock: Callable[[], float] = time.time
    state: ScalingState | None = None
    _drain_started: dict[str, float] = field(default_factory=dict)
    _was_ready: set[str] = field(default_factory=set)
    _is_blind: bool = False
    _problem: str = ""  # of the driver, as last logged
    _last_written: tuple[int, str] | None = None
    _last_saved: str = ""
    _learned: float | None = None  # capacity, from an earlier life

    def __post_init__(self) -> None:
        self._load()

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
            replicas = [self._judge(replica) for replica in self.driver.replicas()]
        except DriverUnavailable as error:
            return self._driver_failed("list", error)
        counts = dict.fromkeys(("starting", "ready", "unhealthy", "draining", "exited"), 0)
        for replica in replicas:
            counts[replica.status] += 1
        if self.state is None:
            # Taking over a running deployment: what is there is the target until a decision says otherwise.
            there = counts["ready"] + counts["starting"] + counts["unhealthy"]
            self.state = ScalingState(target=there, capacity=self._learned)
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
                self._problem = ""
            except DriverUnavailable as error:
                self._driver_failed("act", error)
        self._save()
        return decision

    def _judge(self, replica: Replica) -> Replica:
        """What the driver sees and what is remembered: one that was told to go is draining, whoever told it so."""
        if replica.id in self._drain_started and replica.status != "exited":
            return replace(replica, status="draining")
        if replica.status == "ready":
            self._was_ready.add(replica.id)
        elif replica.status == "unhealthy" and replica.id not in self._was_ready:
            return replace(replica, status="starting")  # Docker's patience is shorter than a first download
        return replica

    def _act(self, replicas: list[Replica], target: int, now: float) -> None:
        live = [r for r in replicas if r.status in ("starting", "ready", "unhealthy")]
        ids = {replica.id for replica in replicas}
        self._drain_started = {id: since for id, since in self._drain_started.items() if id in ids}
        self._was_ready &= ids
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
        if (failed := self._failed(live, now)) is not None:
            log.warning("%s is %s: replacing it", failed.id[:20], failed.status)
            self.metrics.actions.labels("replace").inc()
            self._drain(failed, now)
            live.remove(failed)
        for replica in [r for r in live if r.is_open or (r.is_stale and r.status == "starting")]:
            why = "serves without keys, and what has keys cannot start" if replica.is_open else "is stale already"
            log.warning("%s %s: draining it", replica.id[:20], why)
            self.metrics.actions.labels("drain").inc()
            self._drain(replica, now)
            live.remove(replica)
        # While there is a stale one there is one more than wanted: the new one is ready before the old one goes.
        is_stale = any(replica.is_stale for replica in live)
        for _ in range(target + is_stale - len(live)):
            name = self.driver.start()
            log.info("started %s", name[:20])
            self.metrics.actions.labels("start").inc()
        if is_stale:
            surplus = sum(replica.status == "ready" for replica in live) - target
        else:
            surplus = len(live) - target
        # Stale ones first, then our own, those not yet serving before those that do, the youngest first.
        order = sorted(live, key=lambda r: (not r.is_stale, not r.is_managed, r.status == "ready", -r.started))
        for replica in order[: max(0, surplus)]:
            log.info("draining %s", replica.id[:20])
            self.metrics.actions.labels("drain").inc()
            self._drain(replica, now)

    def _drain(self, replica: Replica, now: float) -> None:
        self.driver.drain(replica.id)
        self._drain_started[replica.id] = now

    def _failed(self, live: list[Replica], now: float) -> Replica | None:
        """The one to replace now, if any. Those that Compose made are Docker's to restart."""
        sick = [r for r in live if r.status == "unhealthy"]
        late = [r for r in live if r.status == "starting" and now - r.started > self.start_timeout]
        is_overload = 2 * len(sick) > len(live) > 1
        self.metrics.held_replacements.set(len(sick) if is_overload else 0)
        if self._drain_started:
            return None  # one at a time: somebody is leaving already
        return next((r for r in (late if is_overload else sick + late) if r.is_managed), None)

    def _driver_failed(self, what: str, error: DriverUnavailable) -> None:
        problem = f"driver cannot {what}: {error}"
        (log.debug if problem == self._problem else log.warning)("%s", problem)  # once, not with every look
        self._problem = problem
        self.metrics.errors.labels("driver").inc()
        return None

    def _write(self, observation: Observation, decision: Decision) -> None:
        """One JSON line for each change of target or reason to the decisions file; changes of target to the log too."""
        key, last = (decision.target, decision.reason), self._last_written
        if key == last:
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
        (log.debug if last is not None and last[0] == decision.target else log.info)("decision %s", line)
        if self.decisions_path:
            try:
                with open(self.decisions_path, "a", encoding="utf-8") as out:
                    out.write(line + "\n")
            except OSError as error:
                print(f"cannot write {self.decisions_path}: {error}", file=sys.stderr)

    def _load(self) -> None:
        try:
            kept = json.loads(self.state_path.read_text()) if self.state_path else {}
            self._drain_started = {str(id): float(since) for id, since in kept.get("draining", {}).items()}
            self._learned = None if kept.get("capacity") is None else float(kept["capacity"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("cannot use %s: %s", self.state_path, error)

    def _save(self) -> None:
        if self.state_path is None or self.state is None:
            return
        capacity = self.state.capacity
        kept = {"capacity": None if capacity is None else round(capacity, 2), "draining": self._drain_started}
        if (text := json.dumps(kept)) == self._last_saved:
            return
        self._last_saved = text
        try:
            partial = self.state_path.with_suffix(".tmp")
            partial.write_text(text)
            partial.replace(self.state_path)
        except OSError as error:
            log.warning("cannot keep %s: %s", self.state_path, error)
