"""When a request has said enough."""

from __future__ import annotations

from collections.abc import Sequence

from server.core.request import LiveRequest, RepetitionLimit, RequestStatus

_LOOK_EVERY = 8  # tokens: a loop goes on, so it is found a little later


def is_looping(token_ids: Sequence[int], limit: RepetitionLimit) -> bool:
    """Whether the end of the text is some pattern over and over."""
    for size in range(max(limit.min_pattern_size, 1), limit.max_pattern_size + 1):
        length = size * limit.min_count
        if length > len(token_ids):
            return False
        # Shifted by one pattern, such an end is itself.
        if token_ids[-1] == token_ids[-1 - size] and token_ids[-length:-size] == token_ids[-length + size :]:
            return True
    return False


def stop_status(request: LiveRequest, token_id: int, max_model_len: int) -> RequestStatus | None:
    """What ends the request with its newest token, or None. Notes a stop token of the caller's in `stop_reason`.

    A constraint that cannot be followed is an error, which `error` then tells.
    """
    sampling, grammar = request.sampling, request.grammar
    if grammar is not None and grammar.error is not None:
        request.error = f"The constraint could not be followed: {grammar.error}"
        return RequestStatus.FINISHED_ERROR
    num_output = len(request.output_token_ids)
    if num_output >= sampling.min_tokens:
        if not sampling.ignore_eos and token_id in sampling.eos_token_ids:
            return RequestStatus.FINISHED_STOP
        if token_id in sampling.stop_token_ids:
            request.stop_reason = token_id
            return RequestStatus.FINISHED_STOP
    if grammar is not None and grammar.is_terminated():
        return RequestStatus.FINISHED_STOP
    if (
        sampling.repetition is not None
        and num_output % _LOOK_EVERY == 0
        and num_output >= sampling.min_tokens
        and is_looping(request.output_token_ids, sampling.repetition)
    ):
        return RequestStatus.FINISHED_REPETITION
    if num_output >= sampling.max_tokens or num_output + request.num_prompt_tokens >= max_model_len:
        return RequestStatus.FINISHED_LENGTH
    return None
