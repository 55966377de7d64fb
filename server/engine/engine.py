"""The loop: schedule, run, sample, book. A plain synchronous object; tests call `step()` by hand."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from model_store.pair import LoadedPair
from server.core.batch import ForwardBatch, Scheduled
from server.core.config import EngineConfig
from server.core.executor import Executor
from server.core.request import LiveRequest, Order, Request, RequestOutput, SampledToken
from server.core.size_policy import Refusal, RequestRefused, SizePolicy
from server.engine.extras.drafts import DraftPool, Drafts, OwnDrafts
from server.engine.extras.lookahead import Lookahead
from server.engine.extras.speculation import Speculator
from server.engine.fault_handler import FaultHandler
from server.engine.isolation import ComputeError, bisect
from server.engine.observer import ComputedStep, Observer, num_prompt_tokens
from server.engine.queue import WaitingQueue
from server.engine.runner import StepRunner, outcome
from server.engine.scheduler import Scheduler, SchedulerOutput
from server.engine.sleep import RETRY_SECONDS, Sleeper, SleepState
from server.engine.stats import EngineStats, MetricsSink
from server.engine.step_clock import Gap, StepClock

logger = logging.getLogger(__name__)


class Engine:
    """One loaded pair, its KV pool and its scheduler."""

    def __init__(
        self,
        pair: LoadedPair,
        config: EngineConfig,
        *,
        policy: SizePolicy | None = None,
        queue: WaitingQueue | None = None,
        runner: StepRunner | None = None,
        metrics: MetricsSink | None = None,
        sleeper: Sleeper | None = None,
    ) -> None:
        """`runner`: the pair's, where one was made before (a policy may want steps timed). `sleeper`: gives weights of
        larger sizes back while nobody wants them."""
        self.config = config
        self.runner = runner or StepRunner(pair, config)
        self.spec, self.elasticity, self.sizes = self.runner.spec, self.runner.elasticity, self.runner.sizes
        self.executor, self.kv_cache, self.sampler = self.runner.executor, self.runner.kv_cache, self.runner.sampler
        self.missing_sizes: dict[int, str] = dict(pair.missing_sizes)
        drafts: Drafts | None = None
        if config.speculative_size is not None:
            slots = range(config.max_num_seqs, 2 * config.max_num_seqs)
            path = self.elasticity.path(config.speculative_size)
            drafts = DraftPool(self.kv_cache, path, slots, config.speculative_width)
        elif config.speculative_width is not None:
            drafts = OwnDrafts(config.speculative_width)
        self.scheduler = Scheduler(
            config, self.elasticity, self.kv_cache, policy, queue, drafts=drafts, widths=self.executor.widths
        )
        self.speculator: Speculator | None = None
        if drafts is not None:
            self.speculator = Speculator(
                self.runner, self.scheduler, self.sampler, drafts, config.num_speculative_tokens
            )
        self.lookahead: Lookahead | None = None
        if self.speculator is None and self.executor.can_launch:
            self.lookahead = Lookahead(self.executor, self.scheduler, self.sampler, self.build_batch)
        self.metrics, self.sleeper = metrics, sleeper
        self._clock = StepClock()
        self._observer = Observer(metrics, config.speculates)
        self._fault_handler = FaultHandler(self.scheduler, self.runner, self._forget)
        # The lists of the request before, which the other sequences of its HTTP request share: they may be long.
        self._checked: tuple[Any, Any, Any] | None = None
        self.num_step_failures = 0

    # --- requests

    def add_request(self, asked: Request) -> LiveRequest:
        """Queue a request. Raises ValueError (RequestRefused if it could not run even on an idle server)."""
        request = LiveRequest(asked)
        self.add(request)
        return request

    def add(self, request: LiveRequest) -> None:
        """`add_request` for one that was made before."""
        if request.num_tokens == 0:
            raise ValueError("prompt is empty")
        self._check_tokens(request)
        if request.request_id in self.scheduler.requests:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        if self._fault_handler.refuses(request):
            raise ValueError("The same request made the model fail a short while ago; it is not tried again for now.")
        if refusal := self.scheduler.prepare(request):
            raise RequestRefused(refusal)
        parks = False if self.sleeper is None else self.sleeper.enter(request)
        if isinstance(parks, Refusal):
            raise RequestRefused(parks)
        (self.scheduler.park if parks else self.scheduler.add)(request)

    def _check_tokens(self, request: LiveRequest) -> None:
        """ValueError for a token that the model has no row for, whichever way it came: executors read what is there."""
        sampling = request.sampling
        lists: dict[str, Collection[int]] = {"prompt": request.prompt_token_ids}
        allowed, bias, words = sampling.allowed_token_ids, sampling.logit_bias, sampling.bad_words_ids
        stops = sampling.stop_token_ids
        if self._checked is None or any(a is not b for a, b in zip(self._checked, (allowed, bias, words), strict=True)):
            lists |= {"allowed_token_ids": allowed or (), "logit_bias": bias or ()}
            lists["bad_words"] = [i for word in words for i in word]
        lists["stop_token_ids"] = stops if sampling.min_tokens else ()
        for param, ids in lists.items():
            if len(ids) and (min(ids) < 0 or max(ids) >= self.spec.vocab_size):
                wrong = next(i for i in ids if not 0 <= i < self.spec.vocab_size)
                message = f"{param}: token {wrong} is not in the model's vocabulary (0 .. {self.spec.vocab_size - 1})."
                raise RequestRefused(Refusal(message, 400, param=param))
        self._checked = allowed, bias, words

    def abort(self, request_ids: Iterable[str], stop_string: str | None = None) -> list[RequestOutput]:
        """End requests early; unknown and finished ones are ignored. `stop_string`: what their text ended with."""
        finished = [self.scheduler.requests[i] for i in request_ids if i in self.scheduler.requests]
        outputs = self.scheduler.abort([request.request_id for request in finished], stop_string)
        self._forget(finished)
        return outputs

    def change_student(self, pair: LoadedPair, executor: Executor, policy: SizePolicy) -> None:
        """From the next step on serve `pair`, the same teacher beside another student, with the executor that
        `Executor.beside` made for it. Every size that was served is served on; requests go on (`Scheduler`)."""
        assert set(self.sizes) <= set(pair.sizes), "somebody may be running a size, or have been promised it"
        assert self.speculator is None and self.lookahead is None, "they know paths of the old student"
        self.scheduler.change_student(pair.elasticity, policy)
        self.runner.change_student(pair, executor, self.scheduler.running)
        self.elasticity, self.sizes, self.executor = self.runner.elasticity, self.runner.sizes, executor
        self.missing_sizes = dict(pair.missing_sizes)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    # --- sleep

    def obey(self, order: Order) -> None:
        """What an operator wants."""
        if self.sleeper is not None:
            self.sleeper.sleep() if order is Order.SLEEP else self.sleeper.wake(is_order=True)

    def close(self) -> None:
        """No step comes any more."""
        if self.sleeper is not None:
            self.sleeper.close()

    def due_in(self) -> float | None:
        """Seconds until an idle engine should `tend`; None: not before somebody says so."""
        return None if self.sleeper is None else self.sleeper.due_in()

    def tend(self) -> list[RequestOutput]:
        """Between steps: give weights back, take up what was read, go on with those who waited for it."""
        if self.sleeper is None:
            return []
        scheduler, outputs = self.scheduler, []
        self.sleeper.tend(scheduler.requests.values())
        for request in sorted(scheduler.parked, key=lambda request: request.arrival_time):
            if self.sleeper.can_serve(request):
                scheduler.unpark(request)
            elif self.sleeper.state is not SleepState.WAKING:
                message = f"This size is asleep and could not be woken: {self.sleeper.report.failure}."
                refused = scheduler.fail([request], message, 503)
                refused[0].retry_after = RETRY_SECONDS
                outputs += refused
                self._forget([request])
        return outputs

    # --- one step

    def build_batch(self, scheduled: Scheduled) -> ForwardBatch:
        return self.runner.build_batch(scheduled)

    def step(self, before_model: Callable[[], None] = lambda: None) -> list[RequestOutput]:
        """Advance everyone who can. A failure costs the requests that cause it, nobody else, and is not raised.

        `before_model` is called whenever the step is about to leave Python. Raises EngineBroken when nothing can be
        computed any more.
        """
        started = time.monotonic()
        self._clock.lap("publish")
        planned = self._schedule()
        if not planned.scheduled:
            self._rest()
            return planned.outputs
        try:
            return planned.outputs + self._advance(planned, started, before_model)
        except ComputeError as failure:
            return planned.outputs + self._salvage(planned.scheduled, failure.error, started, before_model)

    def _schedule(self) -> SchedulerOutput:
        planned = None if self.lookahead is None else self.lookahead.planned()
        if planned is None:
            planned = self.scheduler.schedule()
        self._clock.lap("schedule")
        self._observer.on_outputs(planned.outputs)
        return planned

    def _advance(
        self, planned: SchedulerOutput, started: float, before_model: Callable[[], None]
    ) -> list[RequestOutput]:
        """Compute a plan and book it. ComputeError, with nothing booked, if it cannot be computed."""
        try:
            step = self._compute(planned, before_model)
        except Exception as error:
            if self.speculator is not None:
                self.speculator.retract(planned)
            raise ComputeError(error) from error
        faulty = []
        if step.faults:
            faulty = [request for request, _ in planned.scheduled if request.request_id in step.faults]
            planned.scheduled = [item for item in planned.scheduled if item[0].request_id not in step.faults]
        num_prompt = 0 if step.batch.layout else num_prompt_tokens(planned.scheduled)
        outputs = self._update(planned, step.sampled)
        self._observe(planned, step, started, num_prompt)
        self._clock.lap("book")
        for request in faulty:
            outputs += self._fault_handler.condemn(request, step.faults[request.request_id])
        if not self.has_work:
            self._rest()
        return outputs

    def _compute(self, planned: SchedulerOutput, before_model: Callable[[], None]) -> ComputedStep:
        """Guess, build the batch, run the model and sample; or take over the step that already runs ahead."""
        drafting = 0.0 if self.speculator is None else self._draft(self.speculator, planned, before_model)
        if self.lookahead is not None and self.lookahead.takes(planned):
            start, gap = self._model_begins(drafting, before_model)
            batch, tokens = self.lookahead.run(planned)
            sampled, faults = outcome(batch.requests, tokens)
        else:
            batch = self.build_batch(planned.scheduled)
            start, gap = self._model_begins(drafting, before_model)
            sampled, faults = self.runner.run(batch, self.speculator)
        end = time.monotonic()
        self._clock.model_ended(end)
        return ComputedStep(batch, sampled, faults, start, end, drafting, gap)

    def _model_begins(self, drafting: float, before_model: Callable[[], None]) -> tuple[float, Gap]:
        """Now, and the time since the last model call."""
        self._clock.lap("build")
        before_model()
        start = time.monotonic()
        return start, self._clock.model_starts(start, drafting)

    def _draft(self, speculator: Speculator, planned: SchedulerOutput, before_model: Callable[[], None]) -> float:
        """Let the speculator guess; seconds that took."""
        before_model()
        started = time.monotonic()
        speculator.draft(planned)
        drafting = time.monotonic() - started
        self._clock.lap("draft")
        return drafting

    def _update(self, planned: SchedulerOutput, sampled: dict[str, SampledToken]) -> list[RequestOutput]:
        """Book a computed step; what clients should hear of it."""
        outputs = self.scheduler.update(planned, sampled)
        self.runner.prompt_scores.attach(outputs)
        self.runner.pooled_states.attach(outputs, planned.scheduled)
        self._forget(planned.finished)
        self._observer.on_outputs(outputs)
        return outputs

    def _observe(self, planned: SchedulerOutput, step: ComputedStep, started: float, num_prompt: int) -> None:
        try:
            self.scheduler.policy.observe_step(step.batch, step.end - step.start, step.end)
            self._observer.on_step(planned, step, started, num_prompt)
        except Exception:  # the step is booked: what only watches it must not undo that
            logger.exception("a step could not be observed")

    def _rest(self) -> None:
        """The time to the next step is waiting for work, not overhead."""
        self._clock.rest()
        self.scheduler.policy.on_idle()
        if self.sleeper is not None:
            self.sleeper.rest()

    def _forget(self, requests: list[LiveRequest]) -> None:
        for request in requests:
            self.runner.prompt_scores.forget(request.request_id)
            self.runner.pooled_states.forget(request.request_id)
            self._observer.on_finished(request)

    # --- when a step fails

    def _salvage(
        self, scheduled: Scheduled, error: Exception, started: float, before_model: Callable[[], None]
    ) -> list[RequestOutput]:
        """A step could not be computed: advance those that can be computed without the others, fail the rest."""
        self.num_step_failures += 1
        logger.error("a step of %d requests failed", len(scheduled), exc_info=error)
        self._clock.rest()

        def run(part: Scheduled) -> list[RequestOutput]:
            try:
                return self._advance(SchedulerOutput(scheduled=part), started, before_model)
            except ComputeError as failure:
                raise failure.error from None

        outputs = bisect(scheduled, error, run, self._fault_handler.condemn)
        return [output for part in outputs for output in part]

    def probe(self, size: int) -> None:
        """Compute one token at `size`, alone. EngineBroken if that fails or yields no number."""
        self._fault_handler.probe(size)

    # --- reports

    def stats(self) -> EngineStats:
        scheduler, kv_cache = self.scheduler, self.kv_cache
        by_size: dict[int, int] = {}
        for request in tuple(scheduler.running):
            by_size[request.path.size] = by_size.get(request.path.size, 0) + 1
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.parked),
            num_parked=len(scheduler.parked),
            num_waiting_tokens=scheduler.waiting.num_tokens,
            kv_usage=kv_cache.usage,
            num_pages=kv_cache.num_pages,
            num_free_pages=kv_cache.num_free_pages,
            running_by_size=by_size,
            prefix_cache_queries=kv_cache.prefix_queries,
            prefix_cache_hits=kv_cache.prefix_hits,
            num_preemptions=scheduler.num_preemptions,
        )

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
