"""Requests that wait for admission: by priority, then preempted ones, then arrival."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from server.engine.request import Request


class WaitingQueue:
    """A priority queue with O(1) lazy removal. Lower `priority` first, as in vLLM; ties by arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Request]] = []
        self._members: dict[str, Request] = {}
        self._sequence = itertools.count()
        self.num_tokens = 0  # prompt tokens waiting

    def push(self, request: Request) -> None:
        self._insert(request, 1)

    def push_front(self, request: Request) -> None:
        """Put a preempted request ahead of all others of its priority."""
        self._insert(request, 0)

    def peek(self, now: float) -> Request | None:
        """The request to admit next, or None."""
        while self._heap and self._members.get(self._heap[0][3].request_id) is not self._heap[0][3]:
            heapq.heappop(self._heap)
        return self._heap[0][3] if self._heap else None

    def remove(self, request: Request) -> None:
        if self._members.pop(request.request_id, None) is not None:
            self.num_tokens -= request.num_tokens

    def _insert(self, request: Request, rank: int) -> None:
        assert request.request_id not in self._members
        # A later preemption goes first: the victim is always the youngest, so this restores arrival order.
        sequence = next(self._sequence)
        heapq.heappush(self._heap, (request.priority, rank, sequence if rank else -sequence, request))
        self._members[request.request_id] = request
        self.num_tokens += request.num_tokens

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members.values())
