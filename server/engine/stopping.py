"""When a request has said enough."""

from __future__ import annotations

from server.core.request import LiveRequest, RequestStatus


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
    if num_output >= sampling.max_tokens or request.num_tokens >= max_model_len:
        return RequestStatus.FINISHED_LENGTH
    return None
