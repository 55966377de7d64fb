"""Keeps a device one decode step ahead of the host: the next step is launched before the tokens of this one are known.

Only for executors that can (`launch`), and only for steps in which every row decodes and asks nothing of its logits
that the host would have to do. The tokens stay on the device as the next step's input; while it runs, the host
books the step before. A request that turns out to have ended has run one step too many, whose result is dropped. What
that step wrote lies in pages that the request owned when it was launched; whoever gets them writes later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from model_store.assembly import LayerPath
from server.core.batch import ForwardBatch, Scheduled
from server.core.executor import Draw, Executor, Follows, PendingTokens
from server.core.request import LiveRequest, RequestStatus
from server.engine.sampler import Sampler, needs_processing
from server.engine.scheduler import Scheduler, SchedulerOutput

# Steps ahead in a row, after which the scheduler is asked again: a policy may want to change sizes.
_MAX_RUN = 16


@dataclass(slots=True)
class _Launched:
    """A step on the device. `positions`: where each row stood, by which a row that has gone another way is told."""

    batch: ForwardBatch
    paths: list[LayerPath]
    positions: list[int]
    draws: list[Draw]
    tokens: PendingTokens | None  # None until it is launched

    def wait(self) -> list[int]:
        assert self.tokens is not None, "launched before it is waited for"
        return self.tokens.wait()

    def alive(self) -> list[int]:
        """Rows whose request still wants this step."""
        rows = zip(self.batch.requests, self.paths, self.positions, strict=True)
        return [
            row for row, (request, path, position) in enumerate(rows)
            if request.status == RequestStatus.RUNNING and request.path is path
            and request.num_computed_tokens == position
        ]  # fmt: skip


class Lookahead:
    """The steps in flight: at most the one that is waited for and the one after it."""

    def __init__(
        self, executor: Executor, scheduler: Scheduler, sampler: Sampler,
        build_batch: Callable[[Scheduled], ForwardBatch],
    ) -> None:  # fmt: skip
        self._executor, self._scheduler, self._sampler = executor, scheduler, sampler
        self._build_batch = build_batch
        self._next: _Launched | None = None
        self._run_length = 0
        self.num_ahead = 0  # steps that were launched ahead and used

    def planned(self) -> SchedulerOutput | None:
        """The step that already runs, as a plan; None if the scheduler is to make one."""
        if self._next is None:
            return None
        requests = [self._next.batch.requests[row] for row in self._next.alive()]
        if not requests:
            self.drop()
            return None
        return SchedulerOutput(scheduled=[(request, 1) for request in requests])

    def takes(self, planned: SchedulerOutput) -> bool:
        """Whether this plan is for `run`."""
        if self._matches(planned):
            return True
        self.drop()
        return all(count == 1 and _is_plain_decode(request) for request, count in planned.scheduled)

    def run(self, planned: SchedulerOutput) -> tuple[ForwardBatch, list[int]]:
        """Compute a plan that `takes` said yes to, and launch the step after it.

        Returns the batch, and a token id for each of its requests (-1: there is none).
        """
        step = self._next
        if step is not None and self._matches(planned):
            self._next = None
            self._run_length += 1
            self.num_ahead += 1
        else:
            self._run_length = 0
            step = self._launch(self._build_batch(planned.scheduled), None)
        try:
            rows = step.alive()
            # Nobody else may be kept waiting: neither a prompt that is half computed nor one that could be admitted.
            is_whole = len(rows) == len(self._scheduler.running) and not self._scheduler.can_admit
            if is_whole and self._run_length < _MAX_RUN:
                self._next = self._launch_next(step, rows)
            tokens = step.wait()
        except Exception:
            self.drop()
            self._give_back(step)
            raise
        if len(rows) == len(tokens):
            return step.batch, tokens
        batch = self._build_batch(planned.scheduled)
        return batch, [tokens[row] for row in _rows_of(batch, step.batch)]

    def drop(self) -> None:
        """Forget what runs ahead; numbers drawn for it serve the next draw of their requests."""
        self._give_back(self._next)
        self._next = None

    # --- parts

    def _matches(self, planned: SchedulerOutput) -> bool:
        step = self._next
        if step is None:
            return False
        return [step.batch.requests[row] for row in step.alive()] == [request for request, _ in planned.scheduled]

    def _launch_next(self, step: _Launched, alive: list[int]) -> _Launched | None:
        rows = [row for row in alive if self._goes_on(step.batch.requests[row])]
        requests = [step.batch.requests[row] for row in rows]
        allocate = self._scheduler.kv_cache.allocate
        if not rows or not all(allocate(request, request.num_computed_tokens + 2) for request in requests):
            return None
        batch = self._build_batch([(request, 1) for request in requests])
        batch = replace(batch, positions=batch.positions + 1, context_lens=batch.context_lens + 1)
        assert step.tokens is not None, "the step before is launched"
        return self._launch(batch, (step.tokens, np.array(_rows_of(batch, step.batch), np.int32)))

    def _launch(self, batch: ForwardBatch, follows: Follows | None) -> _Launched:
        launched = _Launched(
            batch, [request.path for request in batch.requests], batch.positions.tolist(),
            [self._sampler.next_draw(request) for request in batch.requests], None,
        )  # fmt: skip
        try:
            launched.tokens = self._executor.launch(batch, launched.draws, follows=follows)
        except Exception:
            self._give_back(launched)
            raise
        return launched

    def _goes_on(self, request: LiveRequest) -> bool:
        """Whether the request wants a token after the one that is being drawn, for all that is known."""
        is_last = len(request.output_token_ids) + 1 >= request.sampling.max_tokens
        return not is_last and request.num_tokens + 1 < self._scheduler.config.max_model_len

    def _give_back(self, step: _Launched | None) -> None:
        if step is not None:
            for request, draw in zip(step.batch.requests, step.draws, strict=True):
                self._sampler.give_back(request, draw)


def _rows_of(batch: ForwardBatch, before: ForwardBatch) -> list[int]:
    """Where its requests had their rows in a batch before: where widths have changed, others lie in another order."""
    rows = {id(request): row for row, request in enumerate(before.requests)}
    return [rows[id(request)] for request in batch.requests]


def _is_plain_decode(request: LiveRequest) -> bool:
    return (
        request.num_tokens == request.num_computed_tokens + 1
        and request.sampling.max_tokens > 0
        and request.sampling.logprobs is None
        and request.sampling.prompt_logprobs is None
        and not request.size_schedule
        and not needs_processing(request)
    )
