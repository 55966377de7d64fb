"""Log-probabilities of prompt tokens, for requests that asked: gathered by chunks, given to the first output."""

from __future__ import annotations

import math

import numpy as np

from model_store.arrays import Array
from server.core.batch import ForwardBatch
from server.core.executor import Executor, LogitOps
from server.core.request import LiveRequest, RequestOutput, TokenLogprobs

# Rows of a prompt that go through the head at once: bounds the [rows, V] scratch.
_MAX_ROWS = 128


class PromptScores:
    """What has been scored of prompts that are still being computed, by request id."""

    def __init__(self) -> None:
        self._scores: dict[str, list[TokenLogprobs | None]] = {}

    def score(
        self, executor: Executor, ops: LogitOps, batch: ForwardBatch, hidden: Array, head_rows: int
    ) -> list[LiveRequest]:
        """Score what this step computed of prompts. `hidden` [S, E]; its first `head_rows` take the teacher's head.

        Returns the requests whose logits hold no number.
        """
        faulty: list[LiveRequest] = []
        for row, request in enumerate(batch.requests):
            wanted = request.sampling.prompt_logprobs
            first, begin = int(batch.logits_start[row]), request.num_computed_tokens
            count = min(int(batch.context_lens[row]), request.num_prompt_tokens - 1) - begin
            if wanted is None or count <= 0:
                continue
            scores = self._scores.setdefault(request.request_id, [None])
            del scores[begin + 1 :]  # a preempted request computes its prompt again
            known = len(scores)
            for start in range(0, count, _MAX_ROWS):
                rows = hidden[first + start : first + min(start + _MAX_ROWS, count)]
                widths = np.full(len(rows), request.width, np.uint8)
                logits = executor.logits(rows, len(rows) if first < head_rows else 0, widths)
                tokens = request.token_ids(begin + start + 1, begin + start + 1 + len(rows))
                scores += ops.token_logprobs(logits, tokens, [wanted] * len(rows))
            if any(score is not None and math.isnan(score.logprob) for score in scores[known:]):
                faulty.append(request)
        return faulty

    def attach(self, outputs: list[RequestOutput]) -> None:
        """Give each request's scores to its first output."""
        if not self._scores:
            return
        for output in outputs:
            if output.request_id in self._scores and (output.new_token_ids or output.is_finished):
                output.prompt_logprobs = self._scores.pop(output.request_id)

    def forget(self, request_id: str) -> None:
        self._scores.pop(request_id, None)
