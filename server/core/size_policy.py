"""What the scheduler asks of whoever chooses sizes, and the simplest answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.core.request import LiveRequest, SizeDecision
from server.core.width import EXACT

if TYPE_CHECKING:
    import numpy as np

    from server.core.batch import ForwardBatch, Scheduled
    from server.core.load import Load, LoadView
    from server.core.step_times import StepTimes


MAX_RETRY_AFTER = 60.0  # seconds: a wait that is predicted to be longer is not known well enough to keep clients away


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request gets no size: 400 impossible, 503 not now (`retry_after` in seconds)."""

    message: str
    status: int
    retry_after: float | None = None
    param: str | None = None  # the field at fault


class RequestRefused(ValueError):
    """A request that is not queued: one that this server could not run even when idle, or whose size is away."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class PrefillBudget:
    """What steps carry of prompts beside those who decode, as long as they are like this one."""

    layer_tokens: int  # tokens of prompt x layers that a step may carry
    seconds: float  # what such a step takes

    def first_token_after(self, request: LiveRequest, load: Load) -> float:
        """Seconds from the request's admission now to its first token at the smallest size it allows.

        One step more than the arithmetic says: a request admitted in vain costs another one its limit.
        """
        work = max(load.layer_pending - load.layer_rows, 0) + max(request.num_tokens - 1, 1) * request.sizes[0]
        return (math.ceil(work / self.layer_tokens) + 1) * self.seconds


class SizePolicy:
    """Picks the size of a request as it is admitted (and again when it is re-admitted after preemption).

    `view` is what a policy may know of the engine, `now` the scheduler's clock; an implementation reads no other. All
    members but `choose` may be left alone. The engine's thread calls all of them but `estimated_wait`.
    """

    shrinks_running = False  # whether `resize` may take a running request to its smallest size
    cost: StepTimes | None = None  # the model of step times that decisions rest on, if they rest on one

    def choose(self, request: LiveRequest, view: LoadView, now: float) -> SizeDecision | Refusal | None:
        """A size out of `request.sizes`, a refusal, or None to leave it queued for now."""
        raise NotImplementedError

    def prepare(self, request: LiveRequest, view: LoadView, now: float) -> Refusal | None:
        """Called once, before the request is queued: complete its budget and sizes, or refuse the impossible."""

    def on_arrival(self, request: LiveRequest, now: float) -> None:
        """The request is queued."""

    def on_finish(self, request: LiveRequest, now: float) -> None:
        """The request is finished; `status` says how."""

    def prefill_budget(self, view: LoadView, now: float) -> PrefillBudget | None:
        """What this step may carry of prompts beside its decode rows; None for the configured limit only."""

    def resize(self, view: LoadView, now: float) -> list[tuple[LiveRequest, SizeDecision]]:
        """Running requests that should go on at another size."""
        return []

    def width(self, view: LoadView, now: float) -> int:
        """Bits at which rows of the step that is about to be planned read the weights, each row within its own limits.

        Called once per step. What `view.widths` does not offer counts as the next narrower one that it does.
        """
        return EXACT

    def raises_rows(self, scheduled: Scheduled, width: int) -> bool:
        """Whether all rows of this step may read what one of them demands (`width`), each up to its own limit.

        True where a step waits for memory: what is read for one row costs no more if it serves all.
        """
        return True

    def observe_step(self, batch: ForwardBatch, seconds: float, end: float | None = None) -> None:
        """A step spent `seconds` in the model and ended at `end` on the scheduler's clock."""

    def decode_seconds(self, rows: np.ndarray, width: int = EXACT) -> float | None:
        """Predicted seconds of a decode step of rows[size] requests that all read `width`; None if this policy predicts
        nothing."""
        return None

    def expected_kl(self, request: LiveRequest) -> tuple[float, float]:
        """What a request's answer is expected to lose now, and what it would at the best it allows: nats per token
        from the teacher as loaded. Zeros where nothing is known. Any thread."""
        return 0.0, 0.0

    def on_idle(self) -> None:
        """Nothing is left to do: the time to the next step is nobody's."""

    def on_stop(self) -> None:
        """The engine ends: keep what was learned."""

    def refuse(self, view: LoadView, now: float) -> Refusal:
        """What a strict request hears whose limits cannot be met at the moment."""
        message = "The request's latency limits cannot be met at the moment (slo_policy is strict)."
        return Refusal(message, 503, math.ceil(self.estimated_wait(view, now)))

    def estimated_wait(self, view: LoadView, now: float) -> float:
        """Seconds until what waits now will have been admitted, 1 to MAX_RETRY_AFTER. Any thread."""
        return 1.0


class LargestSize(SizePolicy):
    """The largest size the caller allows, whatever the load."""

    def choose(self, request: LiveRequest, view: LoadView, now: float) -> SizeDecision:
        return SizeDecision(request.sizes[-1], request.size_reason)
