"""Who advances by how many tokens in this step. No torch, no clock of its own: a simulator can drive it too.

There is no prefill phase and no decode phase: each step moves requests' `num_computed_tokens` toward `num_tokens`
under a budget. The budget is in layer-tokens (tokens x layers of the request's path), because that is what a step
costs when sizes differ.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from model_store.assembly import Elasticity, LayerPath
from server.core.batch import Scheduled
from server.core.block import Block
from server.core.config import EngineConfig
from server.core.load import Load
from server.core.request import LiveRequest, RequestOutput, RequestStatus, SampledToken, SizeDecision
from server.core.size_policy import LargestSize, PrefillBudget, Refusal, SizePolicy
from server.core.width import EXACT, bits_read
from server.engine.extras.drafts import Drafts
from server.engine.extras.masks import MaskTurns
from server.engine.kv_cache import KVCacheManager
from server.engine.queue import OUTPUT_TOKEN_COST, WaitingQueue
from server.engine.size_schedule import following_size, planned_size, planned_width
from server.engine.step_widths import StepWidths
from server.engine.stopping import stop_status

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SchedulerOutput:
    """One step's plan. `scheduled`: (request, tokens it advances by); `outputs`: admissions and refusals to report;
    `finished`: once the step is booked, whom it brought to an end."""

    scheduled: Scheduled = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    finished: list[LiveRequest] = field(default_factory=list)
    num_preempted: int = 0


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
        drafts: Drafts | None = None,
        widths: tuple[int, ...] = (EXACT,),
    ) -> None:
        """`drafts`: where requests speculate. `widths`: what the executor can read, ascending."""
        self.config = config
        self.elasticity = elasticity
        self.kv_cache = kv_cache
        self.policy: SizePolicy = policy or LargestSize()
        self.waiting = WaitingQueue() if queue is None else queue  # an empty queue is false
        self.running: list[LiveRequest] = []
        self.requests: dict[str, LiveRequest] = {}
        self.parked: set[LiveRequest] = set()  # to be queued once the weights that they need are back (`sleep.py`)
        self.load = Load(elasticity.num_teacher_layers)
        self.num_preemptions = 0
        self.num_resizes = 0
        self.widths = widths
        self._step_widths = StepWidths(widths)
        self._mask_turns = MaskTurns(config.num_threads or 1)
        self.clock = clock
        self._free_slots = list(range(config.max_num_seqs))[::-1]
        self._step_began = self._step_seconds = 0.0
        self.drafts = drafts

    # --- the way in and out

    def limit_sizes(self, request: LiveRequest) -> str | None:
        """Drop from `request.sizes` those whose KV would not fit even on an idle server.

        Returns the reason if none is left, None otherwise. Without this an unlucky choice would wait for ever.
        """
        blocks = self.kv_cache.num_blocks_for(min(request.max_total_tokens + 1, self.config.max_model_len))
        fits = tuple(s for s in request.sizes if blocks * s <= self.kv_cache.num_pages)
        smallest = request.sizes[0]
        if request.size_schedule:
            smallest = max(size for size, _ in request.size_schedule)
            fits = request.sizes if blocks * smallest <= self.kv_cache.num_pages else ()
        if not fits:
            return (
                f"This request needs up to {blocks * smallest} KV-cache pages at its smallest allowed size and "
                f"{self.kv_cache.num_pages} exist: shorten the prompt, lower max_tokens, or allow a smaller size."
            )
        if fits != request.sizes:
            request.sizes, request.size_reason = fits, "kv_capacity"
        return None

    def prepare(self, request: LiveRequest) -> Refusal | None:
        """Complete a request before it is queued; a refusal (400) if it could not run even on an idle server."""
        if request.size_schedule:
            request.sizes = (planned_size(request),)
        if reason := self.limit_sizes(request):
            return Refusal(reason, 400)
        refusal = self.policy.prepare(request, self, self.clock())
        self._step_widths.limit(request)
        return refusal

    def add(self, request: LiveRequest) -> None:
        self.requests[request.request_id] = request
        self.waiting.push(request)
        self.policy.on_arrival(request, self.clock())

    def park(self, request: LiveRequest) -> None:
        self.requests[request.request_id] = request
        self.parked.add(request)

    def unpark(self, request: LiveRequest) -> None:
        self.parked.remove(request)
        self.add(request)

    def abort(self, request_ids: Iterable[str], stop_string: str | None = None) -> list[RequestOutput]:
        """Finish requests at their clients' wish; unknown and finished ones are ignored.

        `stop_string`: what their text ended with, which makes it an ordinary end.
        """
        status = RequestStatus.FINISHED_ABORT if stop_string is None else RequestStatus.FINISHED_STOP
        outputs = []
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished:
                request.stop_reason = stop_string
                outputs.append(self._finish(request, status))
        return outputs

    def fail(self, requests: Iterable[LiveRequest], message: str, status: int = 500) -> list[RequestOutput]:
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

    def estimated_wait(self) -> float:
        """Seconds until what waits now will have been admitted. Any thread: totals may be a step old."""
        return self.policy.estimated_wait(self, self.clock())

    @property
    def can_admit(self) -> bool:
        """Whether somebody waits and a slot is free (there may still be no pages)."""
        return bool(self.waiting) and bool(self._free_slots)

    def change_student(self, elasticity: Elasticity, policy: SizePolicy) -> None:
        """Choose among the sizes of `elasticity` from now on: the same teacher beside another student.

        What runs the teacher alone goes on as it is. Anything else has KV of the old student's: it is queued again, as
        after a preemption, and its text so far is computed anew.
        """
        for request in list(self.running):
            if request.path.is_teacher and request.num_computed_tokens >= request.resume_stop:
                request.path, request.keep_station = elasticity.path(request.path.size), 0
            else:
                self._preempt(request, SchedulerOutput())
        self.elasticity, self.policy = elasticity, policy

    # --- a step's plan

    def schedule(self) -> SchedulerOutput:
        """Decoding rows first, then running prompts, then waiting requests, until tokens, slots or pages run out."""
        output = SchedulerOutput()
        now = self.clock()
        self._step_widths.choose(self.policy, self, now)
        for request in self.waiting.overdue(now):
            self._refuse(request, self.policy.refuse(self, now), output)
        for request, decision in self.policy.resize(self, now):
            self._change_size(request, decision, output)
        budget = self.config.max_num_batched_tokens * self.elasticity.num_teacher_layers
        prompts = []
        for request in self._mask_turns.take(self.running, self._step_seconds):  # others wait for a mask
            if request.num_tokens - request.num_computed_tokens > 1:
                prompts.append(request)
            elif request.slot >= 0 and budget >= request.path.size:  # else preempted for the sake of another
                budget = self._advance(request, budget, output)
        if prompts or self.waiting:
            # Those who decode are on time for their next token only if the prompts beside them leave room.
            prefill = self.policy.prefill_budget(self, now)
            if prefill is not None and output.scheduled:
                budget = min(budget, prefill.layer_tokens)
            for request in prompts:
                if request.slot >= 0:
                    budget = self._advance(request, budget, output)
            if not output.num_preempted:
                self._admit(output, budget, now, prefill)
        self._step_widths.set_rows(output.scheduled, self.policy)
        self._step_began = self.clock()
        return output

    def _advance(self, request: LiveRequest, budget: int, output: SchedulerOutput) -> int:
        """Plan a running request's tokens for this step; returns what is left of the layer-token budget."""
        computed, depth = request.num_computed_tokens, request.path.size
        if computed < request.resume_stop:
            # A step's tokens stay bounded, however few layers each of them runs.
            depth = max(self.kv_cache.depth(request), self.elasticity.sizes[0])
        count = min(request.num_tokens - computed, budget // depth)
        if count <= 0:
            return budget
        has_room = computed + count <= len(request.blocks) * self.kv_cache.page_size
        if not has_room and not self._make_room(request, computed + count, output):
            return budget
        output.scheduled.append((request, count))
        return budget - count * depth

    def _make_room(self, request: LiveRequest, num_tokens: int, output: SchedulerOutput) -> bool:
        """Allocate up to `num_tokens`, preempting others if need be; False if `request` itself had to go."""
        while not self.kv_cache.allocate(request, num_tokens):
            if self.drafts is not None and self.drafts.release():
                continue
            victim = self._victim()
            self._preempt(victim, output)
            if victim is request:
                return False
        return True

    def _victim(self) -> LiveRequest:
        """The youngest request of the least priority, of the tenant that holds most for its weight."""
        candidates = self.running
        held = self.load.held
        if len(held) > 1:
            heaviest = max(
                held, key=lambda name: (self.waiting.rank(name), held[name] / self.waiting.weight(name), name)
            )
            candidates = [request for request in candidates if request.tenant == heaviest]
        return max(candidates, key=lambda r: (r.priority, r.arrival_time))

    def _preempt(self, request: LiveRequest, output: SchedulerOutput) -> None:
        output.scheduled = [item for item in output.scheduled if item[0] is not request]
        self._leave(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.num_preemptions += 1
        output.num_preempted += 1
        self.waiting.push_front(request)

    def _admit(self, output: SchedulerOutput, budget: int, now: float, prefill: PrefillBudget | None) -> None:
        held: set[str] = set()  # tenants whose next request the policy holds back; others may still go
        first_token_after = None if prefill is None else partial(prefill.first_token_after, load=self.load)
        while self.waiting and self._free_slots and budget > 0:
            request = self.waiting.peek(now, held, first_token_after)
            if request is None:
                break
            choice = self._choose(request, now)
            if choice is None:
                held.add(request.tenant)
                continue
            if isinstance(choice, Refusal):
                self._refuse(request, choice, output)
                continue
            path = self.elasticity.path(choice.size)
            request.width = self._step_widths.of(request)
            prefix = self.kv_cache.find_prefix(request, path)
            num_cached = len(prefix) * self.kv_cache.page_size
            count = min(request.num_tokens - num_cached, budget // path.num_layers)
            # The whole prompt must fit now, not only its first chunk: admitting on a chunk invites preemption. Cached
            # blocks nobody holds are counted as free, so adopting them uses up free pages as well.
            idle_prefix = sum(len(block.pages) for block in prefix if block.ref_count == 0)
            need = self.kv_cache.num_pages_for(request.num_tokens, path) - len(prefix) * path.num_layers
            if count <= 0 or not self.kv_cache.can_allocate(need + idle_prefix):
                if count > 0 and self.drafts is not None and self.drafts.release():
                    continue
                break
            self._enter(request, path, prefix, count)
            output.scheduled.append((request, count))
            budget -= count * path.num_layers
            self._note_choice(request, choice, now, output)

    def _choose(self, request: LiveRequest, now: float) -> SizeDecision | Refusal | None:
        try:
            return self.policy.choose(request, self, now)
        except Exception:  # a choice gone wrong must not cost an answer, let alone the engine
            logger.exception("the size policy failed; taking the largest size")
            return SizeDecision(request.sizes[-1], "policy_failed")

    def _note_choice(self, request: LiveRequest, choice: SizeDecision, now: float, output: SchedulerOutput) -> None:
        """The client hears of its admission, and of another size after a preemption."""
        is_change = request.decision is not None and request.decision.size != choice.size
        choice = replace(choice, after_tokens=len(request.output_token_ids), width=request.width)
        request.decision = choice
        if is_change or not request.decisions:
            request.decisions.append(choice)
        if request.scheduled_time is None:
            request.scheduled_time = now
            request.num_cached_tokens = request.num_computed_tokens
            admission = RequestOutput(
                request.request_id, decision=choice, num_cached_tokens=request.num_cached_tokens, scheduled_time=now
            )
            output.outputs.append(admission)
        elif is_change:
            output.outputs.append(RequestOutput(request.request_id, decision=choice))

    def _refuse(self, request: LiveRequest, refusal: Refusal, output: SchedulerOutput) -> None:
        for refused in self.fail([request], refusal.message, refusal.status):
            refused.retry_after = refusal.retry_after
            output.outputs.append(refused)

    # --- a step's end

    def update(self, output: SchedulerOutput, sampled: dict[str, SampledToken]) -> list[RequestOutput]:
        """Book a finished step: advance, append sampled tokens, stop, free. Returns what clients should hear."""
        now = self.clock()
        self._step_seconds = now - self._step_began
        results = []
        served: defaultdict[str, float] = defaultdict(float)  # by tenant
        for request, count in output.scheduled:
            if request.slot < 0:  # aborted while the step ran
                continue
            if request.draft_token_ids:  # guesses count as computed only once they have become tokens
                count -= len(request.draft_token_ids)
                request.draft_token_ids = []
            token = sampled.get(request.request_id)
            served[request.tenant] += self._book(request, count, 0 if token is None else 1)
            if token is not None:
                results.append(self._append(request, token, now))
                for another in token.following:
                    if request.slot < 0:
                        break
                    served[request.tenant] += self._book(request, 1, 1)
                    results.append(self._append(request, another, now))
            elif request.sampling.max_tokens == 0 and request.num_computed_tokens == request.num_tokens:
                results.append(self._finish(request, RequestStatus.FINISHED_LENGTH))
            if request.slot < 0:
                output.finished.append(request)
        for tenant, layer_tokens in served.items():
            self.waiting.charge(tenant, layer_tokens)
        return results

    def _book(self, request: LiveRequest, count: int, num_new: int) -> float:
        """`count` more tokens of the request hold KV, and it is about to get `num_new`.

        Returns what its tenant is charged for that, in layer-tokens.
        """
        before, page_size = request.num_computed_tokens, self.kv_cache.page_size
        request.num_computed_tokens = computed = before + count
        if request.width < request.kv_width:
            request.kv_width = request.width
        self.load.advance(request, count, num_new)
        if computed // page_size > before // page_size:
            self.kv_cache.cache_full_blocks(request)
        if request.resume_stop and computed >= request.resume_stop:
            self.kv_cache.finish_resuming(request)
        weight = OUTPUT_TOKEN_COST if count == 1 and request.output_token_ids else 1.0
        if request.min_width > self._step_widths.now:  # the step reads more for this request's sake
            weight *= bits_read(request.min_width) / bits_read(self._step_widths.now)
        return count * request.path.size * weight

    def _append(self, request: LiveRequest, token: SampledToken, now: float) -> RequestOutput:
        is_first = request.first_token_time is None
        if is_first:
            request.first_token_time = now
        if is_first or request.widths[-1][0] != request.width:
            request.widths.append((request.width, len(request.output_token_ids)))
        request.output_token_ids.append(token.token_id)
        request.last_token_time = now
        status = stop_status(request, token.token_id, self.config.max_model_len)
        if status is None:
            result = RequestOutput(request.request_id, [token.token_id])  # by keyword it takes half as long again
        else:
            result = self._finish(request, status)
            result.new_token_ids = [token.token_id]
            if status == RequestStatus.FINISHED_ERROR:
                result.error, result.error_status, result.error_param = request.error, 400, "response_format"
        result.last_token_time, result.width = now, request.width
        if is_first:
            result.first_token_time = now
        if token.logprobs is not None:
            result.new_logprobs = [token.logprobs]
        if request.size_schedule and status is None:
            size = planned_size(request)
            self._step_widths.pin(request, planned_width(request), self.load)
            if size != request.path.size:
                self._set_size(request, SizeDecision(size, "schedule"))
                result.decision = request.decision
        return result

    # --- a running request changes size

    def _change_size(self, request: LiveRequest, decision: SizeDecision, output: SchedulerOutput) -> None:
        if request.status == RequestStatus.RUNNING and decision.size != request.path.size:
            self._set_size(request, decision)
            output.outputs.append(RequestOutput(request.request_id, decision=request.decision))

    def _set_size(self, request: LiveRequest, decision: SizeDecision) -> None:
        """Go on at another size: everything so far is computed again on the new path, but for what its cache holds and
        for the layers before the first station that differs, where a hidden state was kept.

        KV at a layer depends on every layer below it, so text after the change equals that of a fresh request at the
        new size whose prompt is the text so far.
        """
        self.load.leave(request)
        self.kv_cache.move(request, self.elasticity.path(decision.size))
        request.decision = replace(decision, after_tokens=len(request.output_token_ids), width=request.width)
        request.decisions.append(request.decision)
        if request.size_schedule:
            request.sizes = (decision.size,)
        request.keep_station = self._keep_station(request)
        self.load.enter(request)
        self.num_resizes += 1

    def _keep_station(self, request: LiveRequest) -> int:
        """The station at which a change of size to come parts from the request's path; 0: none is expected."""
        if not self.kv_cache.states.num_pages or request.sampling.wants_prompt:
            return 0
        size = following_size(request) if request.size_schedule else None
        if not request.size_schedule and self.policy.shrinks_running:
            size = request.sizes[0]
        if size is None or size == request.path.size:
            return 0
        return request.path.first_difference(self.elasticity.path(size))

    # --- who runs

    def _enter(self, request: LiveRequest, path: LayerPath, prefix: list[Block], count: int) -> None:
        """A waiting request runs: it gets a slot, the cached `prefix` of its text and pages for `count` tokens more."""
        self.waiting.remove(request)
        request.path = path
        request.slot = self._free_slots.pop()
        request.keep_station = self._keep_station(request)
        self.kv_cache.adopt(request, prefix)
        allocated = self.kv_cache.allocate(request, request.num_computed_tokens + count)
        assert allocated
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self.load.enter(request)

    def _leave(self, request: LiveRequest) -> None:
        self.running.remove(request)
        self.load.leave(request)
        self.kv_cache.free(request)
        request.draft_token_ids = []
        if self.drafts is not None:
            self.drafts.drop(request.request_id)
        self._free_slots.append(request.slot)
        request.slot = -1

    def _finish(self, request: LiveRequest, status: RequestStatus) -> RequestOutput:
        if request.status == RequestStatus.RUNNING:
            self._leave(request)
        else:
            self.waiting.remove(request)
            self.parked.discard(request)
        request.status = status
        self.requests.pop(request.request_id, None)
        self.policy.on_finish(request, self.clock())
        return RequestOutput(request.request_id, finish_reason=status.finish_reason, stop_reason=request.stop_reason)

    def borrow(self, request: LiveRequest, size: int, use: Callable[[LiveRequest], str | None]) -> str | None:
        """Lend a slot and pages to a request that is in no queue, for the length of one call; None if none are free."""
        request.path = self.elasticity.path(size)
        if not self._free_slots or not self.kv_cache.can_allocate(request.path.num_layers):
            return None
        request.slot = self._free_slots.pop()
        self.kv_cache.allocate(request, 1)
        try:
            return use(request)
        finally:
            self.kv_cache.free(request)
            self._free_slots.append(request.slot)

    def check_integrity(self) -> None:
        """Assert the invariants that every scenario must leave intact."""
        drafts = [] if self.drafts is None else self.drafts.check_integrity(self.running)
        self.kv_cache.check_integrity(self.running + drafts)
        self.load.check(self.running)
        slots = sorted(self._free_slots + [request.slot for request in self.running])
        assert slots == list(range(self.config.max_num_seqs)), "a slot leaked or has two owners"
        queued = set(self.running) | set(self.waiting) | self.parked
        assert set(self.requests.values()) == queued, "a request is in no queue"
