"""When a request has said enough."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from server.core.request import LiveRequest, RepetitionLimit, RequestStatus

_LOOK_EVERY = 8  # tokens: a loop goes on, so it is found a little later


def _is_looping(request: LiveRequest, limit: RepetitionLimit) -> bool:
    """Whether the end of the text is some pattern over and over. To be asked at every `_LOOK_EVERY`th token.

    Shifted by one pattern, such an end is itself. `request.repeated[s - 1]` counts the tokens at the end that are what
    stood s before them: compared anew each time, a text that nearly loops would take milliseconds.
    """
    most = limit.max_pattern_size
    recent = np.full(most + _LOOK_EVERY, -1)
    newest = request.output_token_ids[-len(recent) :]
    recent[len(recent) - len(newest) :] = newest
    windows = sliding_window_view(
        recent, most + 1
    )  # [_LOOK_EVERY, most + 1]: each of the newest, last, and those before
    is_same = windows[:, -2::-1] == windows[:, -1:]
    before = np.zeros(most, np.int64) if request.repeated is None else request.repeated
    request.repeated = np.where(is_same.all(axis=0), before + _LOOK_EVERY, is_same[::-1].argmin(axis=0))
    sizes = np.arange(1, most + 1)
    is_loop = (request.repeated >= sizes * (limit.min_count - 1)) & (sizes >= limit.min_pattern_size)
    return bool(is_loop.any())


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
        and _is_looping(request, sampling.repetition)
        and num_output >= sampling.min_tokens
    ):
        return RequestStatus.FINISHED_REPETITION
    if num_output >= sampling.max_tokens or num_output + request.num_prompt_tokens >= max_model_len:
        return RequestStatus.FINISHED_LENGTH
    return None
