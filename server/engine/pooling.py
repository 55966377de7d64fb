"""Means of hidden states over a prompt, for requests that asked: gathered by chunks, given to the last output."""

from __future__ import annotations

import numpy as np

from model_store.arrays import Array, float32, to_numpy
from server.core.batch import ForwardBatch, Scheduled
from server.core.request import LiveRequest, RequestOutput


class PooledStates:
    """Sums over the chunks of prompts that are still being computed, by request id and first position."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, np.ndarray]] = {}

    def gather(self, batch: ForwardBatch, hidden: Array) -> list[LiveRequest]:
        """Add what this step computed of prompts. `hidden` [S, E]. Returns the requests whose states are no numbers."""
        faulty: list[LiveRequest] = []
        for row, request in enumerate(batch.requests):
            first, last = int(batch.logits_start[row]), int(batch.logits_start[row + 1])
            if not request.sampling.pool or first == last:
                continue
            begin = request.num_computed_tokens
            # A step that failed is run again, and a preempted request computes its prompt again.
            sums = {at: one for at, one in self._sums.get(request.request_id, {}).items() if at < begin}
            sums[begin] = to_numpy(float32(hidden[first:last]).sum(0))
            self._sums[request.request_id] = sums
            if not np.isfinite(sums[begin]).all():
                faulty.append(request)
        return faulty

    def attach(self, outputs: list[RequestOutput], scheduled: Scheduled) -> None:
        """Give each finished request's mean, float32 [E], to its last output."""
        if not self._sums:
            return
        lengths = {request.request_id: request.num_prompt_tokens for request, _ in scheduled}
        for output in outputs:
            if output.is_finished and output.request_id in self._sums:
                sums = self._sums.pop(output.request_id)
                output.pooled = np.sum(list(sums.values()), axis=0) / np.float32(lengths[output.request_id])

    def forget(self, request_id: str) -> None:
        self._sums.pop(request_id, None)
