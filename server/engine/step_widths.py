"""At how many bits each row of a step reads the weights: the policy's word, within what the request allows."""

from __future__ import annotations

import logging

from server.core.batch import Scheduled
from server.core.load import Load, LoadView
from server.core.request import LiveRequest
from server.core.size_policy import SizePolicy
from server.core.width import offered_width

logger = logging.getLogger(__name__)


class StepWidths:
    """The widths that the executor can read, and the one of this step. The scheduler's own."""

    def __init__(self, offered: tuple[int, ...]) -> None:
        """`offered`: ascending."""
        self.offered = offered
        self.now = offered[-1]  # of this step, where a request's own limits say nothing else

    # --- of one request

    def limit(self, request: LiveRequest) -> None:
        """Make the request's limits widths that are offered, and one where its answer must be repeatable."""
        request.max_width = offered_width(request.max_width, self.offered)
        request.min_width = min(offered_width(request.min_width, self.offered), request.max_width)
        if request.is_repeatable:
            request.min_width = request.max_width
        request.width = request.max_width

    def pin(self, request: LiveRequest, width: int | None, load: Load) -> None:
        """From its next step on a running request reads this width and no other; None: as it was."""
        if width is None or (width := offered_width(width, self.offered)) == request.min_width == request.max_width:
            return
        load.leave(request)
        request.min_width = request.max_width = request.width = width
        load.enter(request)

    def of(self, request: LiveRequest) -> int:
        """What it would read in this step if it ran alone."""
        return min(max(self.now, request.min_width), request.max_width)

    # --- of one step

    def choose(self, policy: SizePolicy, view: LoadView, now: float) -> None:
        """Ask the policy for the width of the step that is about to be planned."""
        if len(self.offered) == 1:
            return
        try:
            self.now = offered_width(policy.width(view, now), self.offered)
        except Exception:  # as for sizes
            logger.exception("the size policy failed; taking the largest width")
            self.now = self.offered[-1]

    def set_rows(self, scheduled: Scheduled, policy: SizePolicy) -> None:
        """What each row of a plan reads: the step's width within the request's limits, or more where it is paid."""
        if len(self.offered) == 1:
            return
        now = widest = self.now
        for request, _ in scheduled:  # at every step, for up to hundreds of rows: without calls
            if request.min_width <= now <= request.max_width:
                request.width = now
                continue
            request.width = request.min_width if now < request.min_width else request.max_width
            if request.width > widest:
                widest = request.width
        if widest > now and policy.raises_rows(scheduled, widest):
            for request, _ in scheduled:
                request.width = max(request.width, min(widest, request.max_width))
