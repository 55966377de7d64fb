"""What one API key may ask for: requests in flight, and requests, sequences and tokens within a minute."""

from __future__ import annotations

import time
from collections import deque

from server.api.http.auth import Key
from server.api.http.errors import APIError
from server.config import Settings

_MINUTE = 60.0  # seconds


class KeyLimits:
    """Books what each tenant uses. Anonymous callers are one tenant. Only the event loop touches it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._active: dict[str, int] = {}
        self._used: dict[tuple[str, str], deque[tuple[float, int]]] = {}  # (tenant, unit) -> (time, amount)

    def enter(self, tenant: Key) -> None:
        """Book one request, or 429."""
        concurrent = tenant.max_concurrent or self._settings.max_concurrent_per_key
        active = self._active.get(tenant.name, 0)
        if concurrent is not None and active >= concurrent:
            raise _too_many(f"This key has {active} requests in flight; {concurrent} are allowed.", 1)
        per_minute = tenant.max_requests_per_minute or self._settings.max_requests_per_minute_per_key
        self._spend(tenant.name, {"requests": (1, per_minute)})
        self._active[tenant.name] = active + 1

    def leave(self, tenant: Key) -> None:
        self._active[tenant.name] -= 1

    def spend(self, tenant: Key, num_sequences: int, num_tokens: int) -> None:
        """Book the work of one request, all of it or none: `num_tokens` of prompts and of output asked for. Or 429."""
        settings = self._settings
        sequences = tenant.max_sequences_per_minute or settings.max_sequences_per_minute_per_key
        tokens = tenant.max_tokens_per_minute or settings.max_tokens_per_minute_per_key
        self._spend(tenant.name, {"sequences": (num_sequences, sequences), "tokens": (num_tokens, tokens)})

    def _spend(self, name: str, amounts: dict[str, tuple[int, int | None]]) -> None:
        now = time.monotonic()
        for unit, (amount, limit) in amounts.items():
            if limit is None:
                continue
            used = self._used.setdefault((name, unit), deque())
            while used and used[0][0] <= now - _MINUTE:
                used.popleft()
            if amount > limit:
                raise APIError(f"This request has {amount} {unit}; this key may use {limit} within a minute.")
            left = limit - sum(spent for _, spent in used)
            if amount > left:
                until = next(at for at, spent in used if (left := left + spent) >= amount) + _MINUTE
                raise _too_many(f"This key may use {limit} {unit} within a minute, which is its limit.", until - now)
        for unit, (amount, limit) in amounts.items():
            if limit is not None:
                self._used[name, unit].append((now, amount))


def _too_many(message: str, retry_after: float) -> APIError:
    return APIError(message, status=429, code="rate_limit_exceeded", retry_after=retry_after)
