"""A discrete-event clock that drives the real scheduler, KV manager, size policy and cost model. No model, no torch.

What is simulated is time: a step lasts as long as the `machine` cost model says (with optional noise), tokens have no
content, and lengths come from the trace. Everything that decides is the code that serves. Replicas share nothing but
the router in front of them.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from server.engine.config import EngineConfig
from server.engine.kv_cache import KVCacheManager
from server.engine.queue import WaitingQueue
from server.engine.request import Budget, Request, RequestStatus, SamplingParams
from server.engine.scheduler import SampledToken, Scheduler, SizePolicy
from server.sizing.cost_model import CostModel, StepShape

_RETRY = 0.002  # seconds until a replica whose policy held everything back looks again, as AsyncEngine does


@dataclass(slots=True)
class Job:
    """One request of a trace. Times in seconds from the start of the trace."""

    arrival: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    priority: int = 0
    sizes: tuple[int, ...] | None = None  # None: all
    budget: Budget = field(default_factory=Budget)


@dataclass(slots=True)
class Record:
    """What became of a job; times in seconds, `size` 0 and NaN times if it was never answered."""

    job: Job
    size: int
    reason: str
    ttft: float
    tpot: float
    e2e: float
    preemptions: int
    replica: int
    error_status: int = 0

    @property
    def met(self) -> bool:
        """All limits the job came with, and an answer at all."""
        budget = self.job.budget
        return (
            self.error_status == 0
            and (budget.ttft is None or self.ttft <= budget.ttft)
            and (budget.tpot is None or self.tpot <= budget.tpot)
            and (budget.e2e is None or self.e2e <= budget.e2e)
        )


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
    num_refused: int


class Autoscaler(Protocol):
    """Decides how many replicas there should be; a pure function of what it has been shown."""

    def __call__(self, state: ClusterState) -> int: ...


@dataclass(slots=True)
class ReplicaSpec:
    """How to build one replica; `make_policy` gets a fresh policy per replica (its cost model learns)."""

    config: EngineConfig
    machine: CostModel
    num_pages: int
    make_policy: Callable[[], SizePolicy]
    make_queue: Callable[[], WaitingQueue] = WaitingQueue
    noise: float = 0.0  # standard deviation of the logarithm of a step's time
    delivery: float = 0.0  # seconds between a step's end and the client's reading it, and from client to queue
    max_queued_requests: int = 1024


class Replica:
    """One engine's worth of scheduling state and its place in time."""

    def __init__(self, index: int, spec: ReplicaSpec, seed: int = 0) -> None:
        self.index = index
        self.spec = spec
        self.now = 0.0
        elasticity = spec.machine.profile.elasticity
        self.kv_cache = KVCacheManager(
            num_pages=spec.num_pages,
            page_size=spec.config.page_size,
            num_layers=elasticity.num_teacher_layers + len(elasticity.stations),
            max_num_seqs=spec.config.max_num_seqs,
            max_model_len=spec.config.max_model_len,
            enable_prefix_caching=False,  # traces tell lengths, not texts
        )
        self.policy = spec.make_policy()
        self.scheduler = Scheduler(
            spec.config, elasticity, self.kv_cache, self.policy, spec.make_queue(), clock=lambda: self.now
        )
        self.elasticity = elasticity
        self.inbox: list[Request] = []
        self.num_steps = 0
        self.busy = 0.0  # seconds in steps
        self._rng = random.Random(seed * 1_000_003 + index)
        self._segments: dict[tuple[tuple[int, int], ...], dict[int, float]] = {}
        self._joint, self._teacher, self._student = spec.machine.profile.station_weights()

    @property
    def num_outstanding(self) -> int:
        return len(self.scheduler.requests) + len(self.inbox)

    @property
    def has_work(self) -> bool:
        return bool(self.inbox) or self.scheduler.has_work

    def run_step(self, now: float) -> tuple[float, list]:
        """One pass of the engine's loop, begun at `now`: (when it ends, outputs and refusals)."""
        self.now = now
        outputs = []
        for request in self.inbox:
            refusal = self.scheduler.prepare(request)
            if refusal is None and len(self.scheduler.waiting) >= self.spec.max_queued_requests:
                wait = self.policy.estimated_wait(self.scheduler, now)
                outputs.append((request, 503, wait))
            elif refusal is not None:
                outputs.append((request, refusal.status, None))
            else:
                self.scheduler.add(request)
        self.inbox.clear()
        planned = self.scheduler.schedule()
        for output in planned.outputs:
            if output.error is not None:
                outputs.append((output.request_id, output.error_status, output.retry_after))
        if not planned.scheduled:
            return now + (_RETRY if self.scheduler.has_work else 0.0), outputs
        shape = self._shape(planned.scheduled)
        seconds = self.spec.machine.seconds(shape)
        if self.spec.noise:
            seconds *= self._rng.lognormvariate(0.0, self.spec.noise)
        sampled = {
            request.request_id: SampledToken(0)
            for request, count in planned.scheduled
            if request.num_computed_tokens + count == request.num_tokens
        }
        self.now = now + seconds
        self.scheduler.update(planned, sampled)
        cost = getattr(self.policy, "cost", None)
        if cost is not None:
            cost.observe(shape, seconds)
            cost.observe_overhead(self.spec.machine.overhead)
        self.num_steps += 1
        self.busy += seconds + self.spec.machine.overhead
        finished = [request for request, _ in planned.scheduled if request.is_finished]
        outputs.extend((request, 0, None) for request in finished)
        self.now += self.spec.machine.overhead
        return self.now, outputs

    def _shape(self, scheduled: list[tuple[Request, int]]) -> StepShape:
        """The step's features straight from the plan: what `CostModel.shape` reads off a batch."""
        n = len(scheduled)
        counts = np.fromiter((count for _, count in scheduled), np.int64, n)
        sizes = np.fromiter((request.path.size for request, _ in scheduled), np.int64, n)
        context = np.fromiter((request.num_computed_tokens for request, _ in scheduled), np.int64, n) + counts
        by_size: dict[int, int] = {}
        num_logits = 0
        for request, count in scheduled:
            size = request.path.size
            by_size[size] = by_size.get(size, 0) + count
            num_logits += request.num_computed_tokens + count == request.num_tokens
        segments: dict[int, float] = {}
        total = sum(by_size.values())
        for index, threshold in enumerate(self.elasticity.thresholds):
            above = sum(tokens for size, tokens in by_size.items() if size >= threshold)
            parts = ((total, self._joint), (above, self._teacher), (total - above, self._student))
            for tokens, weights in parts:
                if tokens:
                    segments[tokens] = segments.get(tokens, 0.0) + weights[index]
        return self.spec.machine.shape_of(counts, context, sizes, segments, [num_logits] if num_logits else [])


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
        self._events: list[tuple[float, int, str, object]] = []
        self._order = itertools.count()
        self._jobs: dict[str, tuple[Job, Request, int]] = {}
        self._awake: set[int] = set()  # replicas with a step event pending
        self._tick = dict.fromkeys(("arrived", "decided", "below", "refused"), 0)
        self._tick_sizes = 0.0

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

    def _push(self, time: float, kind: str, item: object) -> None:
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
        request = Request(
            f"{len(self.records)}-{next(self._order)}",
            [0] * job.prompt_tokens,
            sampling,
            sizes=job.sizes or self.spec.machine.profile.elasticity.sizes,
            size_reason="auto" if job.sizes is None else "requested",
            budget=job.budget,
            priority=job.priority,
            tenant=job.tenant,
            arrival_time=now,
        )
        self._jobs[request.request_id] = (job, request, replica.index)
        replica.inbox.append(request)
        self._wake(replica, now + self.spec.delivery)

    def _wake(self, replica: Replica, now: float) -> None:
        if replica.index not in self._awake:
            self._awake.add(replica.index)
            self._push(max(now, replica.now), "step", replica)

    def _step(self, replica: Replica, now: float) -> None:
        end, outputs = replica.run_step(now)
        for item, status, _ in outputs:
            self._finish(item if isinstance(item, str) else item.request_id, status)
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
        lag = 2 * self.spec.delivery
        ttft = request.first_token_time - request.arrival_time + lag
        count = len(request.output_token_ids)
        e2e = request.last_token_time - request.arrival_time + lag
        tpot = (e2e - ttft) / (count - 1) if count > 1 else 0.0
        size = request.decision.size
        self._tick["decided"] += 1
        self._tick["below"] += size < request.sizes[-1]
        self._tick_sizes += size
        self.records.append(
            Record(job, size, request.decision.reason, ttft, tpot, e2e, request.num_preemptions, index)
        )

    def _sample(self, now: float) -> None:
        active = self.replicas + self.leaving
        running = sum(r.scheduler.load.num_rows for r in active)
        layers = sum(size * count for r in active for size, count in enumerate(r.scheduler.load.rows) if count)
        waiting = sum(len(r.scheduler.waiting) + len(r.inbox) for r in active)
        usage = float(np.mean([r.kv_cache.usage for r in active]))
        mean = layers / running if running else float("nan")
        self.samples.append(Sample(now, len(self.replicas), running, waiting, mean, usage))

    def _scale(self, now: float) -> None:
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
            num_refused=tick["refused"],
        )
        self._tick = dict.fromkeys(tick, 0)
        self._tick_sizes = 0.0
        wanted = max(self.autoscaler(state), 1)
        for _ in range(wanted - len(active) - self.num_starting):
            self.num_starting += 1
            self._push(now + self.startup, "ready", None)
        for _ in range(len(active) - wanted):
            self.leaving.append(min(active, key=lambda r: r.num_outstanding))
            active.remove(self.leaving[-1])  # gets no more requests, finishes those it has

    def _new_replica(self) -> Replica:
        return Replica(next(self._indices), self.spec, self.seed)

    def _errors(self) -> dict[str, dict[str, float]]:
        """Predicted against simulated step time, all replicas together."""
        merged: dict[str, list[float]] = {}
        for replica in self.replicas:
            cost = getattr(replica.policy, "cost", None)
            for kind, stats in cost.errors.items() if cost is not None else ():
                merged.setdefault(kind, []).extend(stats.recent)
        return {
            kind: {"median": float(np.median(e)), "p95": float(np.quantile(e, 0.95)), "count": len(e)}
            for kind, e in merged.items()
            if e
        }
