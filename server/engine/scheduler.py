"""Who advances by how many tokens in this step. No torch, no clock of its own: a simulator can drive it too.

There is no prefill phase and no decode phase: each step moves requests' `num_computed_tokens` toward `num_tokens`
under a budget. The budget is in layer-tokens (tokens x layers of the request's path), because that is what a step
costs when sizes differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from model_store.assembly import Elasticity
from server.engine.config import EngineConfig
from server.engine.kv_cache import KVCacheManager
from server.engine.queue import WaitingQueue
from server.engine.request import Request, RequestOutput, RequestStatus, SizeDecision, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request gets no size: 400 impossible, 503 not now."""

    message: str
    status: int
    retry_after: float | None = None


class SizePolicy(Protocol):
    """Picks the size of a request as it is admitted (and again when it is re-admitted after preemption)."""

    def choose(self, request: Request, scheduler: Scheduler, now: float) -> SizeDecision | Refusal | None:
        """A size out of `request.sizes`, a refusal, or None to leave it queued for now."""


class LargestSize:
    """The largest size the caller allows, whatever the load."""

    def choose(self, request: Request, scheduler: Scheduler, now: float) -> SizeDecision:
        return SizeDecision(request.sizes[-1], request.size_reason)


@dataclass(slots=True)
class SchedulerOutput:
    """One step's plan. `scheduled`: (request, tokens it advances by); `outputs`: admissions and refusals to report."""

    scheduled: list[tuple[Request, int]] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    num_preempted: int = 0


@dataclass(slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


class Scheduler:
    """Waiting and running requests, and the only writer of their state."""

    def __init__(
        self,
        config: EngineConfig,
        elasticity: Elasticity,
        kv_cache: KVCacheManager,
        policy: SizePolicy | None = None,
        queue: WaitingQueue | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.elasticity = elasticity
        self.kv_cache = kv_cache
        self.policy: SizePolicy = policy or LargestSize()
        self.waiting = queue or WaitingQueue()
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.num_preemptions = 0
        self.clock = clock
        self._free_slots = list(range(config.max_num_seqs))[::-1]

    # --- the way in and out

    def limit_sizes(self, request: Request) -> str | None:
        """Drop from `request.sizes` those whose KV would not fit even on an idle server.

        Returns the reason if none is left, None otherwise. Without this an unlucky choice would wait for ever.
        """
        blocks = self.kv_cache.num_blocks_for(min(request.max_total_tokens + 1, self.config.max_model_len))
        fits = tuple(s for s in request.sizes if blocks * s <= self.kv_cache.num_pages)
        if not fits:
            return (
                f"This request needs up to {blocks * request.sizes[0]} KV-cache pages at its smallest allowed size and "
                f"{self.kv_cache.num_pages} exist: shorten the prompt, lower max_tokens, or allow a smaller size."
            )
        if fits != request.sizes:
            request.sizes, request.size_reason = fits, "kv_capacity"
        return None

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.push(request)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """Finish requests at their clients' wish; unknown and finished ones are ignored."""
        outputs = []
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished:
                outputs.append(self._finish(request, RequestStatus.FINISHED_ABORT))
        return outputs

    def fail(self, requests: Iterable[Request], message: str, status: int = 500) -> list[RequestOutput]:
        """Finish requests with an error (a step that raised, a poison request)."""
        outputs = []
        for request in requests:
            if not request.is_finished:
                request.error = message
                output = self._finish(request, RequestStatus.FINISHED_ERROR)
                output.error, output.error_status = message, status
                outputs.append(output)
        return outputs

    @property
    def has_work(self) -> bool:
        return bool(self.running) or bool(self.waiting)

    # --- one step

    def schedule(self) -> SchedulerOutput:
        """Running requests first, then waiting ones, until tokens, slots or pages run out."""
        output = SchedulerOutput()
        now = self.clock()
        budget = self.config.max_num_batched_tokens * self.elasticity.num_teacher_layers
        for request in list(self.running):
            if request.status != RequestStatus.RUNNING:  # preempted for the sake of an earlier one
                continue
            count = min(request.num_tokens - request.num_computed_tokens, budget // request.path.num_layers)
            if count > 0 and self._make_room(request, request.num_computed_tokens + count, output):
                output.scheduled.append((request, count))
                budget -= count * request.path.num_layers
        if not output.num_preempted:
            self._admit(output, budget, now)
        return output

    def update(self, output: SchedulerOutput, sampled: dict[str, SampledToken]) -> list[RequestOutput]:
        """Book a finished step: advance, append sampled tokens, stop, free. Returns what clients should hear."""
        now = self.clock()
        results = []
        for request, count in output.scheduled:
            if request.is_finished:  # aborted while the step ran
                continue
            request.num_computed_tokens += count
            self.kv_cache.cache_full_blocks(request)
            token = sampled.get(request.request_id)
            if token is not None:
                results.append(self._append(request, token, now))
            elif request.sampling.max_tokens == 0 and request.num_computed_tokens == request.num_tokens:
                results.append(self._finish(request, RequestStatus.FINISHED_LENGTH))
        return results

    # --- parts

    def _admit(self, output: SchedulerOutput, budget: int, now: float) -> None:
        while self.waiting and self._free_slots and budget > 0:
            request = self.waiting.peek(now)
            if request is None:
                break
            choice = self.policy.choose(request, self, now)
            if choice is None:
                break
            if isinstance(choice, Refusal):
                self.waiting.remove(request)
                for refused in self.fail([request], choice.message, choice.status):
                    refused.retry_after = choice.retry_after
                    output.outputs.append(refused)
                continue
            path = self.elasticity.path(choice.size)
            prefix = self.kv_cache.find_prefix(request, path)
            num_cached = len(prefix) * self.kv_cache.page_size
            count = min(request.num_tokens - num_cached, budget // path.num_layers)
            # The whole prompt must fit now, not only its first chunk: admitting on a chunk invites preemption. Cached
            # blocks nobody holds are counted as free, so adopting them uses up free pages as well.
            idle_prefix = sum(len(block.pages) for block in prefix if block.ref_count == 0)
            need = self.kv_cache.num_pages_for(request.num_tokens, path) - len(prefix) * path.num_layers
            if count <= 0 or not self.kv_cache.can_allocate(need + idle_prefix):
                break
            self.waiting.remove(request)
            request.path, request.decision = path, choice
            request.slot = self._free_slots.pop()
            self.kv_cache.adopt(request, prefix)
            allocated = self.kv_cache.allocate(request, num_cached + count)
            assert allocated
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            output.scheduled.append((request, count))
            budget -= count * path.num_layers
            if request.scheduled_time is None:
                request.scheduled_time = now
                request.num_cached_tokens = num_cached
                output.outputs.append(
                    RequestOutput(request.request_id, decision=choice, num_cached_tokens=num_cached)
                )

    def _make_room(self, request: Request, num_tokens: int, output: SchedulerOutput) -> bool:
        """Allocate up to `num_tokens`, preempting others if need be; False if `request` itself had to go."""
        while not self.kv_cache.allocate(request, num_tokens):
            victim = max(self.running, key=lambda r: (r.priority, r.arrival_time))
            self._preempt(victim, output)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, output: SchedulerOutput) -> None:
        output.scheduled = [item for item in output.scheduled if item[0] is not request]
        self._leave(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.num_preemptions += 1
        output.num_preempted += 1
        self.waiting.push_front(request)

    def _append(self, request: Request, token: SampledToken, now: float) -> RequestOutput:
        request.output_token_ids.append(token.token_id)
        if request.first_token_time is None:
            request.first_token_time = now
        request.last_token_time = now
        status = self._stop_status(request, token.token_id)
        result = self._finish(request, status) if status else RequestOutput(request.request_id)
        result.new_token_ids = [token.token_id]
        if token.logprobs is not None:
            result.new_logprobs = [token.logprobs]
        return result

    def _stop_status(self, request: Request, token_id: int) -> RequestStatus | None:
        sampling = request.sampling
        num_output = len(request.output_token_ids)
        if num_output >= sampling.min_tokens:
            if not sampling.ignore_eos and token_id in sampling.eos_token_ids:
                return RequestStatus.FINISHED_STOP
            if token_id in sampling.stop_token_ids:
                request.stop_reason = token_id
                return RequestStatus.FINISHED_STOP
        if request.grammar is not None and request.grammar.is_terminated():
            return RequestStatus.FINISHED_STOP
        if num_output >= sampling.max_tokens or request.num_tokens >= self.config.max_model_len:
            return RequestStatus.FINISHED_LENGTH
        return None

    def _finish(self, request: Request, status: RequestStatus) -> RequestOutput:
        if request.status == RequestStatus.RUNNING:
            self._leave(request)
        else:
            self.waiting.remove(request)
        request.status = status
        self.requests.pop(request.request_id, None)
        return RequestOutput(
            request.request_id, finish_reason=status.finish_reason, stop_reason=request.stop_reason
        )

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.kv_cache.free(request)
        self._free_slots.append(request.slot)
        request.slot = -1

    def check_integrity(self) -> None:
        """Assert the invariants that every scenario must leave intact."""
        self.kv_cache.check_integrity(self.running)
        slots = sorted(self._free_slots + [request.slot for request in self.running])
        assert slots == list(range(self.config.max_num_seqs)), "a slot leaked or has two owners"
        assert set(self.requests.values()) == set(self.running) | set(self.waiting), "a request is in no queue"
