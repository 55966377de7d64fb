"""A discrete-event clock that drives replicas of the real scheduler behind a router (server.simulation.replica).

Everything that decides is the code that serves. Replicas share nothing but the router in front of them.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from server.core.request import LiveRequest, Request, RequestStatus, SamplingParams
from server.core.step_times import relative_error
from server.simulation.jobs import Job, Record
from server.simulation.replica import Replica, ReplicaSpec

__all__ = ["ClusterState", "Job", "Record", "Replica", "ReplicaSpec", "Result", "Simulator"]


@dataclass(slots=True)
class ClusterState:
    """What an autoscaler sees at a tick."""

    time: float
    num_replicas: int  # serving
    num_starting: int
    num_running: int
    num_waiting: int
    kv_usage: float
    # Since the last tick:
    num_arrived: int
    num_decided: int
    num_below_ceiling: int  # given less than the largest size they allowed
    mean_size: float
    kl_loss: float  # expected KL beyond that of the best they allowed, in the mean, nats per token
    num_refused: int


class Autoscaler(Protocol):
    """Decides how many replicas there should be; a pure function of what it has been shown."""

    def __call__(self, state: ClusterState) -> int: ...


Router = Callable[[list[Replica], Job], Replica]


def least_outstanding(replicas: list[Replica], job: Job) -> Replica:
    return min(replicas, key=lambda replica: replica.num_outstanding)


class TwoChoices:
    """The less busy of two at random: close to least-outstanding, and O(1) at a thousand replicas."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def __call__(self, replicas: list[Replica], job: Job) -> Replica:
        a, b = self._rng.choice(replicas), self._rng.choice(replicas)
        return a if a.num_outstanding <= b.num_outstanding else b


@dataclass(slots=True)
class Sample:
    """The cluster at one moment of simulated time."""

    time: float
    replicas: int
    running: int
    waiting: int
    mean_running_size: float
    kv_usage: float


@dataclass(slots=True)
class Result:
    records: list[Record]
    samples: list[Sample]
    num_steps: int
    duration: float
    step_errors: dict[str, dict[str, float]] = field(default_factory=dict)


class Simulator:
    """Runs a trace over replicas. `progress(done, total)` is called now and then."""

    def __init__(
        self,
        spec: ReplicaSpec,
        num_replicas: int = 1,
        *,
        router: Router | None = None,
        autoscaler: Autoscaler | None = None,
        autoscale_interval: float = 5.0,
        startup: float = 60.0,
        sample_interval: float = 1.0,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.spec = spec
        self.seed = seed
        self._indices = itertools.count()
        self._by_index: dict[int, Replica] = {}
        self.replicas = [self._new_replica() for _ in range(num_replicas)]
        self.leaving: list[Replica] = []
        self.num_starting = 0
        self.router = router or (least_outstanding if num_replicas <= 16 else TwoChoices(seed))
        self.autoscaler = autoscaler
        self.autoscale_interval = autoscale_interval
        self.startup = startup
        self.sample_interval = sample_interval
        self.progress = progress
        self.records: list[Record] = []
        self.samples: list[Sample] = []
        self._events: list[tuple[float, int, str, Any]] = []
        self._order = itertools.count()
        self._jobs: dict[str, tuple[Job, LiveRequest, int]] = {}
        self._awake: set[int] = set()  # replicas with a step event pending
        self._tick = dict.fromkeys(("arrived", "decided", "below", "refused"), 0)
        self._tick_sizes = self._tick_kl = 0.0

    def run(self, jobs: Iterable[Job], total: int = 0) -> Result:
        """Play the whole trace until the last answer."""
        source: Iterator[Job] = iter(jobs)
        self._push_next(source)
        self._push(0.0, "sample", None)
        if self.autoscaler is not None:
            self._push(self.autoscale_interval, "scale", None)
        last = 0.0
        while self._events:
            now, _, kind, item = heapq.heappop(self._events)
            if kind == "arrive":
                self._arrive(item, now)
                self._push_next(source)
                if self.progress is not None and len(self._jobs) % 64 == 0:
                    self.progress(len(self.records), total)
            elif kind == "step":
                self._step(item, now)
                last = now
            elif kind == "sample":
                self._sample(now)
                if self._is_going():
                    self._push(now + self.sample_interval, "sample", None)
            elif kind == "scale":
                self._scale(now)
                if self._is_going():
                    self._push(now + self.autoscale_interval, "scale", None)
            elif kind == "ready":
                self.num_starting -= 1
                self.replicas.append(self._new_replica())
        if self.progress is not None:
            self.progress(len(self.records), total)
        return Result(
            self.records, self.samples, sum(r.num_steps for r in self.replicas + self.leaving), last, self._errors()
        )

    # --- events

    def _push(self, time: float, kind: str, item: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), kind, item))

    def _push_next(self, source: Iterator[Job]) -> None:
        job = next(source, None)
        if job is not None:
            self._push(job.arrival, "arrive", job)
        self._exhausted = job is None

    def _is_going(self) -> bool:
        return not self._exhausted or bool(self._jobs)

    def _arrive(self, job: Job, now: float) -> None:
        self._tick["arrived"] += 1
        replica = self.router(self.replicas, job)
        sampling = SamplingParams(temperature=0.0, max_tokens=job.output_tokens, ignore_eos=True)
        asked = Request(
            f"{len(self.records)}-{next(self._order)}",
            [0] * job.prompt_tokens,
            sampling,
            sizes=job.sizes or self.spec.machine.profile.elasticity.sizes,
            size_reason="auto" if job.sizes is None else "requested",
            budget=job.budget,
            priority=job.priority,
            tenant=job.tenant,
            min_width=job.min_width,
            max_width=job.max_width,
            arrival_time=now,
        )
        request = LiveRequest(asked)
        self._jobs[request.request_id] = (job, request, replica.index)
        replica.inbox.append(request)
        self._wake(replica, now + self.spec.delivery)

    def _wake(self, replica: Replica, now: float) -> None:
        if replica.index not in self._awake:
            self._awake.add(replica.index)
            self._push(max(now, replica.now), "step", replica)

    def _step(self, replica: Replica, now: float) -> None:
        end, outputs = replica.run_step(now)
        for request_id, status, _ in outputs:
            self._finish(request_id, status)
        self._awake.discard(replica.index)
        if replica.has_work:
            self._wake(replica, end)

    def _finish(self, request_id: str, status: int) -> None:
        job, request, index = self._jobs.pop(request_id)
        nan = float("nan")
        if status or request.status not in (RequestStatus.FINISHED_LENGTH, RequestStatus.FINISHED_STOP):
            self._tick["refused"] += 1
            self.records.append(Record(job, 0, "refused", nan, nan, nan, 0, index, status or 500))
            return
        assert request.decision and request.first_token_time is not None and request.last_token_time is not None
        lag = 2 * self.spec.delivery
        ttft = request.first_token_time - request.arrival_time + lag
        count = len(request.output_token_ids)
        e2e = request.last_token_time - request.arrival_time + lag
        tpot = (e2e - ttft) / (count - 1) if count > 1 else 0.0
        size = request.decision.size
        self._tick["decided"] += 1
        self._tick["below"] += size < request.sizes[-1]
        self._tick_sizes += size
        kl, best = self._by_index[index].policy.expected_kl(request)
        self._tick_kl += kl - best
        starts = [after for _, after in request.widths]
        tokens_at: dict[int, int] = {}
        for (width, start), end in zip(request.widths, [*starts[1:], count], strict=True):
            tokens_at[width] = tokens_at.get(width, 0) + end - start
        reason, preemptions = request.decision.reason, request.num_preemptions
        self.records.append(Record(job, size, reason, ttft, tpot, e2e, preemptions, index, tokens_at=tokens_at))

    def _sample(self, now: float) -> None:
        active = self.replicas + self.leaving
        running = sum(r.scheduler.load.num_rows for r in active)
        layers = sum(size * count for r in active for size, count in enumerate(r.scheduler.load.rows) if count)
        waiting = sum(len(r.scheduler.waiting) + len(r.inbox) for r in active)
        usage = float(np.mean([r.kv_cache.usage for r in active]))
        mean = layers / running if running else float("nan")
        self.samples.append(Sample(now, len(self.replicas), running, waiting, mean, usage))

    def _scale(self, now: float) -> None:
        assert self.autoscaler is not None
        tick, active = self._tick, self.replicas
        state = ClusterState(
            time=now,
            num_replicas=len(active),
            num_starting=self.num_starting,
            num_running=sum(r.scheduler.load.num_rows for r in active),
            num_waiting=sum(len(r.scheduler.waiting) + len(r.inbox) for r in active),
            kv_usage=float(np.mean([r.kv_cache.usage for r in active])),
            num_arrived=tick["arrived"],
            num_decided=tick["decided"],
            num_below_ceiling=tick["below"],
            mean_size=self._tick_sizes / tick["decided"] if tick["decided"] else float("nan"),
            kl_loss=self._tick_kl / tick["decided"] if tick["decided"] else 0.0,
            num_refused=tick["refused"],
        )
        self._tick = dict.fromkeys(tick, 0)
        self._tick_sizes = self._tick_kl = 0.0
        wanted = max(self.autoscaler(state), 1)
        for _ in range(wanted - len(active) - self.num_starting):
            self.num_starting += 1
            self._push(now + self.startup, "ready", None)
        for _ in range(len(active) - wanted):
            self.leaving.append(min(active, key=lambda r: r.num_outstanding))
            active.remove(self.leaving[-1])  # gets no more requests, finishes those it has

    def _new_replica(self) -> Replica:
        replica = Replica(next(self._indices), self.spec, self.seed)
        self._by_index[replica.index] = replica
        return replica

    def _errors(self) -> dict[str, dict[str, float]]:
        """Predicted against simulated step time, all replicas together."""
        merged: dict[str, list[float]] = {}
        for replica in self.replicas:
            cost = replica.policy.cost
            for kind, stats in cost.errors.items() if cost is not None else ():
                merged.setdefault(kind, []).extend(stats.recent)
        return {
            kind: {"median": relative_error(e, 0.5), "p95": relative_error(e, 0.95), "count": len(e)}
            for kind, e in merged.items()
            if e
        }
