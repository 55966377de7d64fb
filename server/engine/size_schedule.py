"""What a request's `size_schedule`, ((size, output tokens), ...), says. A leg of 0 tokens lasts until the end."""

from __future__ import annotations

from server.core.request import LiveRequest


def planned_size(request: LiveRequest) -> int:
    """The size of the next token."""
    end = 0
    for size, num_tokens in request.size_schedule:
        end += num_tokens
        if not num_tokens or len(request.output_token_ids) < end:
            return size
    return request.size_schedule[-1][0]


def following_size(request: LiveRequest) -> int | None:
    """The first size after the present one, `path.size`; None if it is the last."""
    start = 0
    for size, num_tokens in request.size_schedule:
        if size != request.path.size and start >= len(request.output_token_ids):
            return size
        start += num_tokens
    return None
