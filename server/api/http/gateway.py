"""The ASGI layer in front of the routes: request ids, readiness, keys, limits, HTTP metrics, access log.

Plain ASGI rather than a Starlette middleware: those put a task and a queue between a stream and its client.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections import deque
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.generate.generation import Generation
from server.api.http.auth import ANONYMOUS, Tenant
from server.api.http.errors import APIError
from server.api.http.state import ServerState

access_logger = logging.getLogger("boomerang.access")

# Reachable without a key: probes and scrapers rarely have one, and the page itself holds no data.
PUBLIC = frozenset({"/health", "/live", "/ping", "/version", "/metrics", "/", "/favicon.ico"})
PUBLIC_PREFIXES = ("/playground/",)
# What costs engine time: refused while loading and draining, counted against a key's limits.
_INFERENCE = re.compile(
    r"/(v1/(completions|chat/completions|messages|responses|messages/count_tokens)|tokenize|detokenize|tokenizer_info)"
)
_NEEDS_MODEL = re.compile(r"/(v1/|tokeni|detokeni|load)")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gateway:
    """Wraps the application. `scope["state"]` gets `request_id`, `tenant` and `arrival_time`."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.state = state
        settings = state.settings
        self.quiet = frozenset(settings.disable_access_log_for_endpoints)
        self.limits = KeyLimits(settings.max_concurrent_per_key, settings.max_requests_per_minute_per_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        carried = scope.setdefault("state", {})
        carried["request_id"], carried["arrival_time"], carried["tenant"] = request_id, started, ANONYMOUS
        status, num_bytes = 0, 0

        async def send_noting(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.state.settings.enable_request_id_headers:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                num_bytes += len(message.get("body", b""))
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        is_inference = scope["method"] == "POST" and _INFERENCE.fullmatch(path) is not None
        tenant: Tenant | None = None
        try:
            try:
                carried["tenant"] = self._authenticate(path, scope["method"], headers)
                self._check(path, is_inference, headers)
                if is_inference:
                    self.limits.enter(carried["tenant"])
                    tenant = carried["tenant"]
                    self.state.num_active += 1
            except APIError as error:
                await error.response(path)(scope, receive, send_noting)
                return
            await self.app(scope, receive, send_noting)
        finally:
            if tenant is not None:
                self.limits.leave(tenant)
                self.state.num_active -= 1
            seconds, generation = time.monotonic() - started, carried.get("generation")
            self._report(scope, path, status, seconds, headers, num_bytes, request_id)
            if is_inference and self.state.telemetry is not None:
                self.state.telemetry.observe(path, headers, status or 499, started, request_id, generation)

    # --- before

    def _authenticate(self, path: str, method: str, headers: Headers) -> Tenant:
        keys = self.state.keys
        # A browser's CORS preflight cannot carry a key.
        if keys.is_open or path in PUBLIC or path.startswith(PUBLIC_PREFIXES) or method == "OPTIONS":
            return ANONYMOUS
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")  # Anthropic's clients
        tenant = keys.find(key.strip()) if key.strip() else None
        if tenant is None:
            problem = "Incorrect API key." if key.strip() else "An API key is needed: Authorization: Bearer KEY."
            raise APIError(problem, status=401, code="invalid_api_key")
        return tenant

    def _check(self, path: str, is_inference: bool, headers: Headers) -> None:
        if _NEEDS_MODEL.match(path):
            problem = self.state.problem()
            # While draining, what needs no engine is still answered.
            if problem and (is_inference or self.state.model is None):
                raise APIError(f"Not available: {problem}.", status=503, retry_after=5)
        length = headers.get("content-length", "")
        limit = self.state.settings.max_body_bytes
        if length.isdigit() and int(length) > limit:
            raise APIError(f"The request body has {length} bytes; at most {limit} are allowed.", status=413)

    # --- after

    def _report(
        self,
        scope: Scope,
        path: str,
        status: int,
        seconds: float,
        headers: Headers,
        num_bytes: int,
        request_id: str,
    ) -> None:
        route = scope.get("route")
        handler = getattr(route, "path", "none")  # the template: a raw path would be an unbounded label
        status = status or 499  # the client left before there was an answer
        length = headers.get("content-length", "")
        self.state.metrics.observe_http(
            handler, scope["method"], status, seconds, int(length) if length.isdigit() else 0, num_bytes
        )
        if self.state.settings.access_log and path not in self.quiet:
            client = scope.get("client") or ("-", 0)
            access_logger.info(
                '%s "%s %s" %d %.1f ms',
                client[0],
                scope["method"],
                path,
                status,
                seconds * 1000,
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "duration_ms": round(seconds * 1000, 3),
                    "tenant": scope["state"]["tenant"].name,
                    **_generated(scope["state"].get("generation")),
                },
            )


def _generated(generation: Generation | None) -> dict[str, Any]:
    """What the log says of an answer."""
    if generation is None or not generation.size:
        return {}
    usage = generation.usage()
    return {
        "model": generation.model_id,
        "size": generation.size,
        "size_reason": generation.reason,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "finish_reasons": [sequence.finish_reason for sequence in generation.sequences],
        **generation.timings(),
    }


class KeyLimits:
    """Requests in flight, and requests in the last minute, per tenant."""

    def __init__(self, max_concurrent: int | None, max_per_minute: int | None) -> None:
        self.max_concurrent, self.max_per_minute = max_concurrent, max_per_minute
        self._active: dict[str, int] = {}
        self._recent: dict[str, deque[float]] = {}

    def enter(self, tenant: Tenant) -> None:
        """Book one request, or 429. Anonymous callers are one tenant."""
        concurrent = tenant.max_concurrent or self.max_concurrent
        per_minute = tenant.max_requests_per_minute or self.max_per_minute
        active = self._active.get(tenant.name, 0)
        if concurrent is not None and active >= concurrent:
            raise APIError(
                f"This key has {active} requests in flight; {concurrent} are allowed.",
                status=429,
                code="rate_limit_exceeded",
                retry_after=1,
            )
        if per_minute is not None:
            now = time.monotonic()
            recent = self._recent.setdefault(tenant.name, deque())
            while recent and recent[0] <= now - 60:
                recent.popleft()
            if len(recent) >= per_minute:
                raise APIError(
                    f"This key has sent {per_minute} requests within a minute, which is its limit.",
                    status=429,
                    code="rate_limit_exceeded",
                    retry_after=recent[0] + 60 - now,
                )
            recent.append(now)
        self._active[tenant.name] = active + 1

    def leave(self, tenant: Tenant) -> None:
        self._active[tenant.name] -= 1
