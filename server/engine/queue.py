"""Requests that wait for admission: fair between tenants, by priority and arrival within one.

Fairness is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): every
tenant has a counter of service received, divided by its weight; the waiting tenant with the lowest one is next. A
tenant that comes back from idling is lifted to the others' level, so that it cannot save up. `priority` is the
caller's word and therefore orders only its own tenant's requests; between tenants the operator's `rank` comes first.

A request whose first token can no longer come within its TTFT limit is late: it goes behind those of its tenant that
can still be on time (first come, first served would make everyone late once the queue is as long as the limit), but
not for ever.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from server.core.request import LiveRequest

# A late request that has waited so many times its TTFT limit goes first.
PATIENCE = 8.0

# Service of one generated token in prompt tokens: a decode row moves far fewer tokens per weight read.
OUTPUT_TOKEN_COST = 2.0


@dataclass(slots=True)
class _Line:
    """One tenant's requests. Heap entries are (priority, 0 = preempted / 1 = new, sequence, request)."""

    heap: list[tuple[int, int, int, LiveRequest]] = field(default_factory=list)
    late: deque[tuple[int, int, int, LiveRequest]] = field(default_factory=deque)
    num_requests: int = 0
    num_tokens: int = 0
    served: float = 0.0  # the virtual counter: layer-tokens of service over weight


class WaitingQueue:
    """One line per tenant with O(1) lazy removal. Lower `priority` first, as in vLLM; ties by arrival."""

    def __init__(self, weight: Callable[[str], float] | None = None, rank: Callable[[str], int] | None = None) -> None:
        """`weight(tenant)` > 0: its share; `rank(tenant)`: a class served strictly before those above it."""
        self.weight = weight or (lambda tenant: 1.0)
        self.rank = rank or (lambda tenant: 0)
        self._lines: dict[str, _Line] = {}
        self._members: dict[str, LiveRequest] = {}
        self._deadlines: list[tuple[float, int, LiveRequest]] = []  # heap of strict requests with a TTFT limit
        self._sequence = itertools.count()
        self._last_served = 0.0
        self.num_tokens = 0  # tokens waiting to be computed: prompts, and outputs of preempted requests

    def push(self, request: LiveRequest) -> None:
        self._insert(request, 1)

    def push_front(self, request: LiveRequest) -> None:
        """Put a preempted request ahead of all others of its priority in its tenant's line."""
        self._insert(request, 0)

    def peek(
        self, now: float, skip: Collection[str] = (), first_token_after: Callable[[LiveRequest], float] | None = None
    ) -> LiveRequest | None:
        """The request to admit next, leaving out the tenants in `skip`; or None.

        `first_token_after(request)`: seconds from admission to its first token, without which it counts as none.
        """
        best: LiveRequest | None = None
        best_key: tuple[int, int, float] | None = None
        for tenant, line in self._lines.items():
            if not line.num_requests or tenant in skip:
                continue
            entry = self._head(line, now, first_token_after)
            # A preempted request has been paid for: it goes before anything new of its class.
            key = (self.rank(tenant), entry[1], line.served)
            if best_key is None or key < best_key:
                best, best_key = entry[3], key
        return best

    def remove(self, request: LiveRequest) -> None:
        if self._members.pop(request.request_id, None) is None:
            return
        line = self._lines[request.tenant]
        line.num_requests -= 1
        line.num_tokens -= request.num_tokens
        self.num_tokens -= request.num_tokens
        if not line.num_requests:
            line.heap.clear()
            line.late.clear()
            self._last_served = line.served

    def overdue(self, now: float) -> list[LiveRequest]:
        """Strict requests that still wait and are past their TTFT limit, each told once."""
        found = []
        while self._deadlines and self._deadlines[0][0] < now:
            request = heapq.heappop(self._deadlines)[2]
            if self._is_member(request) and request.first_token_time is None:
                found.append(request)
        return found

    def charge(self, tenant: str, layer_tokens: float) -> None:
        """Book service a tenant received (prompt layer-tokens, generated ones times OUTPUT_TOKEN_COST)."""
        line = self._lines.get(tenant)
        if line is not None:
            line.served += layer_tokens / self.weight(tenant)

    def waiting_of(self, tenant: str) -> tuple[int, int]:
        """Requests and tokens that a tenant has waiting."""
        line = self._lines.get(tenant)
        return (line.num_requests, line.num_tokens) if line else (0, 0)

    def served(self, tenant: str) -> float:
        line = self._lines.get(tenant)
        return line.served if line else 0.0

    def tenants(self) -> list[str]:
        """Tenants with something waiting."""
        return [tenant for tenant, line in self._lines.items() if line.num_requests]

    def _head(
        self, line: _Line, now: float, first_token_after: Callable[[LiveRequest], float] | None
    ) -> tuple[int, int, int, LiveRequest]:
        """The entry to admit next of a line that is not empty."""
        heap, late = line.heap, line.late
        while late and not self._is_member(late[0][3]):
            late.popleft()
        if late:
            oldest = late[0][3]
            if oldest.budget.ttft is not None and now - oldest.arrival_time > PATIENCE * oldest.budget.ttft:
                return late[0]
        while heap:
            _, rank, _, request = heap[0]
            if not self._is_member(request):
                heapq.heappop(heap)
            elif rank and self._is_late(request, now, first_token_after):
                late.append(heapq.heappop(heap))
            else:
                return heap[0]
        while not self._is_member(late[0][3]):
            late.popleft()
        return late[0]

    @staticmethod
    def _is_late(request: LiveRequest, now: float, first_token_after: Callable[[LiveRequest], float] | None) -> bool:
        if request.budget.ttft is None:
            return False
        left = request.budget.ttft - (now - request.arrival_time)
        return left < 0.0 or (first_token_after is not None and left < first_token_after(request))

    def _is_member(self, request: LiveRequest) -> bool:
        return self._members.get(request.request_id) is request

    def _insert(self, request: LiveRequest, rank: int) -> None:
        assert request.request_id not in self._members
        line = self._lines.get(request.tenant)
        if line is None:
            self._forget_idle()
            line = self._lines[request.tenant] = _Line()
        if not line.num_requests:
            active = [other.served for other in self._lines.values() if other.num_requests]
            line.served = max(line.served, min(active) if active else self._last_served)
        # A later preemption goes first: the victim is always the youngest, so this restores arrival order.
        sequence = next(self._sequence)
        entry = (request.priority, rank, sequence if rank else -sequence, request)
        heapq.heappush(line.heap, entry)
        if rank and request.budget.strict and request.budget.ttft is not None:
            heapq.heappush(self._deadlines, (request.arrival_time + request.budget.ttft, sequence, request))
        self._members[request.request_id] = request
        line.num_requests += 1
        line.num_tokens += request.num_tokens
        self.num_tokens += request.num_tokens

    def _forget_idle(self) -> None:
        """Keep the lines of past tenants from piling up; they would be lifted on return anyway."""
        if len(self._lines) < 4096:
            return
        self._lines = {tenant: line for tenant, line in self._lines.items() if line.num_requests}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(self._members.values())
