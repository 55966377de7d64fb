"""What a request's `size_schedule`, ((size, output tokens), ...), says, and the `width_schedule` beside it.

A leg of 0 tokens lasts until the end.
"""

from __future__ import annotations

from server.core.request import LiveRequest


def planned_size(request: LiveRequest) -> int:
    """The size of the next token."""
    return request.size_schedule[_leg(request)][0]


def planned_width(request: LiveRequest) -> int | None:
    """The width of the next token; None if the schedule names none."""
    widths = request.asked.width_schedule
    return widths[_leg(request)] if widths else None


def _leg(request: LiveRequest) -> int:
    """Index of the leg of the next token."""
    end = 0
    for index, (_, num_tokens) in enumerate(request.size_schedule):
        end += num_tokens
        if not num_tokens or len(request.output_token_ids) < end:
            return index
    return len(request.size_schedule) - 1


def following_size(request: LiveRequest) -> int | None:
    """The first size after the present one, `path.size`; None if it is the last."""
    start = 0
    for size, num_tokens in request.size_schedule:
        if size != request.path.size and start >= len(request.output_token_ids):
            return size
        start += num_tokens
    return None
