"""How much may wait: counted per tenant, refused with 503 and the time after which trying again makes sense."""

from __future__ import annotations

from collections.abc import Callable

from server.api.http.errors import APIError
from server.config import Settings
from server.observe.metrics import Metrics


class Admission:
    """Counts work that was accepted and not yet admitted by the scheduler; refuses what exceeds the queue limits.

    Everything happens on the event loop, so a check and its booking cannot be torn apart. A full queue refuses those
    who fill it: a tenant with less waiting than its equal share of the queue still gets in, so that a flood from one
    key costs the other keys no refusals. That can at most double the queue.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.max_reqs = settings.max_num_queued_reqs or None
        self.max_tokens = settings.max_num_queued_tokens or None
        self.metrics = metrics
        self.num_reqs = 0
        self.num_tokens = 0
        self._waiting: dict[str, tuple[int, int]] = {}  # tenant -> requests, tokens
        self.retry_after: Callable[[], float] = lambda: 1.0  # seconds until what waits now has been admitted

    def check(self, tenant: str, num_reqs: int = 1, num_tokens: int = 0) -> None:
        """503 with Retry-After if so much more of this tenant does not fit into the queue."""
        own_reqs, own_tokens = self._waiting.get(tenant, (0, 0))
        num_tenants = len(self._waiting.keys() | {tenant})

        def is_full(limit: int | None, waiting: int, own: int, more: int) -> bool:
            # One request larger than the whole queue is let through when nothing waits, or it could never run.
            if limit is None or not waiting or waiting + more <= limit:
                return False
            return num_tenants == 1 or own + more > limit / num_tenants

        if is_full(self.max_reqs, self.num_reqs, own_reqs, num_reqs):
            self._refuse("max_num_queued_reqs", f"{self.num_reqs} requests are waiting")
        if is_full(self.max_tokens, self.num_tokens, own_tokens, num_tokens):
            self._refuse("max_num_queued_tokens", f"{self.num_tokens} prompt tokens are waiting")

    def enter(self, tenant: str, num_tokens: int) -> None:
        self._book(tenant, 1, num_tokens)

    def leave(self, tenant: str, num_tokens: int) -> None:
        self._book(tenant, -1, -num_tokens)

    def _book(self, tenant: str, num_reqs: int, num_tokens: int) -> None:
        self.num_reqs += num_reqs
        self.num_tokens += num_tokens
        own_reqs, own_tokens = self._waiting.pop(tenant, (0, 0))
        if own_reqs + num_reqs:
            self._waiting[tenant] = own_reqs + num_reqs, own_tokens + num_tokens

    def _refuse(self, reason: str, detail: str) -> None:
        self.metrics.admission_rejected(reason)
        raise APIError(
            f"The server is overloaded: {detail}. Try again later.",
            status=503,
            code="server_overloaded",
            retry_after=self.retry_after(),
        )
