"""One engine on a simulated clock: the real scheduler, KV manager, size policy and cost model, and no model.

What is simulated is time: a step lasts as long as the `machine` cost model says (with optional noise), tokens have no
content, and lengths come from the trace.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from server.core.config import EngineConfig
from server.core.request import LiveRequest, SampledToken
from server.core.size_policy import SizePolicy
from server.core.step_times import StepShape
from server.cost.features import step_shape, union, weight_features
from server.cost.model import CostModel
from server.cost.price import StepPrice
from server.engine.kv_cache import KVCacheManager
from server.engine.queue import WaitingQueue
from server.engine.scheduler import Scheduler, SchedulerOutput

_RETRY = 0.002  # seconds until a replica whose policy held everything back looks again, as AsyncEngine does


@dataclass(slots=True)
class ReplicaSpec:
    """How to build one replica; `make_policy` gets a fresh policy per replica (its cost model learns)."""

    config: EngineConfig
    machine: CostModel
    num_pages: int
    make_policy: Callable[[], SizePolicy]
    make_queue: Callable[[], WaitingQueue] = WaitingQueue
    noise: float = 0.0  # standard deviation of the logarithm of a step's time, where the machine has no measured spread
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
            num_layers=elasticity.num_global_layers,
            max_num_seqs=spec.config.max_num_seqs,
            max_model_len=spec.config.max_model_len,
            enable_prefix_caching=False,  # traces tell lengths, not texts
            widest=spec.machine.profile.widths[-1],
        )
        self.policy = spec.make_policy()
        self.scheduler = Scheduler(
            spec.config, elasticity, self.kv_cache, self.policy, spec.make_queue(), clock=lambda: self.now,
            widths=spec.machine.profile.widths,
        )  # fmt: skip
        self.elasticity = elasticity
        self.inbox: list[LiveRequest] = []
        self.num_steps = 0
        self.busy = 0.0  # seconds in steps
        self._rng = random.Random(seed * 1_000_003 + index)
        self.price = StepPrice(spec.machine)

    @property
    def num_outstanding(self) -> int:
        return len(self.scheduler.requests) + len(self.inbox)

    @property
    def has_work(self) -> bool:
        return bool(self.inbox) or self.scheduler.has_work

    def run_step(self, now: float) -> tuple[float, list[tuple[str, int, float | None]]]:
        """One pass of the engine's loop, begun at `now`: (when it ends, [(request id, status, retry after)] of requests
        that ended; status 0 is an answer)."""
        self.now = now
        outputs: list[tuple[str, int, float | None]] = []
        for request in self.inbox:
            refusal = self.scheduler.prepare(request)
            if refusal is None and len(self.scheduler.waiting) >= self.spec.max_queued_requests:
                wait = self.policy.estimated_wait(self.scheduler, now)
                outputs.append((request.request_id, 503, wait))
            elif refusal is not None:
                outputs.append((request.request_id, refusal.status, None))
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
        if ratios := self.spec.machine.spread.get(shape.kind):
            seconds *= self._rng.choice(ratios)
        elif self.spec.noise:
            seconds *= self._rng.lognormvariate(0.0, self.spec.noise)
        self.now = now + seconds
        self.scheduler.update(planned, self.sample(planned))
        machine = self.spec.machine
        overhead = machine.overhead + machine.overhead_per_request * len(planned.scheduled)
        if self.policy.cost is not None:
            self.policy.cost.observe(shape, seconds)
            self.policy.cost.observe_overhead(overhead, len(planned.scheduled))
        self.num_steps += 1
        self.busy += seconds + overhead
        outputs += [(request.request_id, 0, None) for request, _ in planned.scheduled if request.is_finished]
        self.now += overhead
        return self.now, outputs

    def sample(self, planned: SchedulerOutput) -> dict[str, SampledToken]:
        """A token, whatever it is, for everyone whose turn it is."""
        return {
            request.request_id: SampledToken(0)
            for request, count in planned.scheduled
            if request.num_computed_tokens + count == request.num_tokens
        }

    def _shape(self, scheduled: list[tuple[LiveRequest, int]]) -> StepShape:
        """The step's features straight from the plan: what `CostModel.shape` reads off a batch."""
        n = len(scheduled)
        counts = np.fromiter((count for _, count in scheduled), np.int64, n)
        sizes = np.fromiter((request.path.size for request, _ in scheduled), np.int64, n)
        context = np.fromiter((request.num_computed_tokens for request, _ in scheduled), np.int64, n) + counts
        widths, sums = self.spec.machine.profile.widths, [0] * (self.price.top + 1)
        used = {min(request.width, widths[-1]) for request, _ in scheduled}
        tokens, logits = {w: list(sums) for w in used}, {w: list(sums) for w in used}
        for request, count in scheduled:
            width = min(request.width, widths[-1])
            tokens[width][request.path.size] += count
            logits[width][request.path.size] += request.num_computed_tokens + count == request.num_tokens
        heads = zip(*(self.price.heads(rows) for rows in logits.values()), strict=True)
        rows = [run for part in heads for run in union(dict(zip(logits, part, strict=True)))]
        return step_shape(weight_features(self.price.runs(tokens), rows, widths), counts, context, sizes)
