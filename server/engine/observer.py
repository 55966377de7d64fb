"""Tells metrics what the engine does. They only watch: what fails in them is logged, and fails nobody."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from server.core.batch import ForwardBatch, Scheduled
from server.core.request import LiveRequest, RequestOutput, SampledToken
from server.engine.runner import Faults
from server.engine.scheduler import SchedulerOutput
from server.engine.stats import MetricsSink, StepStats
from server.engine.step_clock import Gap

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ComputedStep(NamedTuple):
    """A step that has been computed. Times in seconds, on the monotonic clock."""

    batch: ForwardBatch
    sampled: dict[str, SampledToken]
    faults: Faults
    start: float  # of the model call
    end: float
    drafting: float  # seconds that guessing took before it
    gap: Gap


class Observer:
    """Hears of decisions, of finished requests and of every step that has been booked."""

    def __init__(self, metrics: MetricsSink | None, speculates: bool) -> None:
        """`speculates`: whether a step may bring more than one token for a request."""
        self.metrics, self._speculates = metrics, speculates

    def on_outputs(self, outputs: Iterable[RequestOutput]) -> None:
        """Count the sizes that were decided on."""
        if self.metrics is not None:
            for output in outputs:
                if output.decision is not None:
                    _tell(self.metrics.on_size_decision, output.decision)

    def on_finished(self, request: LiveRequest) -> None:
        if self.metrics is not None:
            _tell(self.metrics.on_request_finished, request)

    def on_step(self, planned: SchedulerOutput, step: ComputedStep, started: float, num_prompt: int) -> None:
        """A plan that was begun at `started` is booked; `num_prompt` tokens of it were of prompts. May raise."""
        if self.metrics is None:
            return
        num_first, num_generated = 0, len(step.sampled)
        if self._speculates:
            num_generated += sum(len(token.following) for token in step.sampled.values())
        if not step.batch.layout:  # with one, everybody had a token before
            for request, _ in planned.scheduled:
                if len(request.output_token_ids) == 1 and request.request_id in step.sampled:
                    num_first += 1
                    self.metrics.on_first_token(request)
        self.metrics.on_step(
            StepStats(
                num_scheduled_tokens=step.batch.num_tokens,
                num_prompt_tokens=num_prompt,
                num_generation_tokens=num_generated,
                step_time=time.monotonic() - started,
                model_time=step.drafting + step.end - step.start,
                gap=step.gap,
                num_preempted=planned.num_preempted,
                num_first_tokens=num_first,
            )
        )


def num_prompt_tokens(scheduled: Scheduled) -> int:
    """Tokens of prompts, not of answers, that a plan computes; before it is booked."""
    return sum(
        max(0, min(request.num_computed_tokens + count, request.num_prompt_tokens) - request.num_computed_tokens)
        for request, count in scheduled
    )


def _tell(hear: Callable[[T], None], subject: T) -> None:
    try:
        hear(subject)
    except Exception:
        logger.exception("metrics could not be told of %.200s", subject)
