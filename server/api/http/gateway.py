"""The ASGI layer in front of the routes: request ids, readiness, keys, limits, HTTP metrics, access log.

Plain ASGI rather than a Starlette middleware: those put a task and a queue between a stream and its client.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.generate.generation import Generation
from server.api.http.auth import ANONYMOUS, Key
from server.api.http.errors import APIError
from server.api.http.state import ServerState

access_logger = logging.getLogger("boomerang.access")

# Reachable without a key: probes and scrapers rarely have one, and the page's own files hold no data.
PUBLIC = frozenset(
    {"/health", "/live", "/ping", "/version", "/metrics", "/", "/favicon.ico", "/playground/{name:path}"}
)
_NO_ROUTE = "none"
_MOST_LOGGED = 1000  # characters of a path
# Routes that answer without a model.
_PROBES = PUBLIC | {"/openapi.json", "/docs", "/redoc"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gateway:
    """Wraps the application. `scope["state"]` gets `request_id`, `tenant` and `arrival_time`.

    What a request is, the router decides: keys, limits, the drain and the log go by the path of the route that it
    matches (`/v1/models/{model}`), never by the path that the client wrote.
    """

    def __init__(self, app: ASGIApp, state: ServerState, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self.state = state
        self.routes = routes
        self.quiet = frozenset(state.settings.disable_access_log_for_endpoints)
        self.limits = state.limits

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

        path = self._route(scope)
        # Whatever is posted costs the engine or the tokenizer: refused while loading and draining, counted by key.
        is_inference = scope["method"] == "POST" and path not in _PROBES and path != _NO_ROUTE
        tenant: Key | None = None
        try:
            try:
                if not scope["path"].isprintable():
                    raise APIError("The path holds characters that cannot be printed.")
                carried["tenant"] = self._authenticate(path, scope["method"], headers)
                self._check(path, is_inference, headers)
                if is_inference:
                    self.limits.enter(carried["tenant"])
                    tenant = carried["tenant"]
                    self.state.count_active(1)
            except APIError as error:
                await error.response(path, "anthropic-version" in headers)(scope, receive, send_noting)
                return
            await self.app(scope, receive, send_noting)
        finally:
            if tenant is not None:
                self.limits.leave(tenant)
                self.state.count_active(-1)
            seconds, generation = time.monotonic() - started, carried.get("generation")
            self._report(scope, path, status, seconds, headers, num_bytes, request_id)
            if is_inference and self.state.telemetry is not None:
                self.state.telemetry.observe(path, headers, status or 499, started, request_id, generation)

    def _route(self, scope: Scope) -> str:
        """The path of the route that the router will choose, as it was declared."""
        for route in self.routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return getattr(route, "path", _NO_ROUTE)
        return _NO_ROUTE

    # --- before

    def _authenticate(self, path: str, method: str, headers: Headers) -> Key:
        keys = self.state.keys
        # A browser's CORS preflight cannot carry a key.
        if keys.is_open or path in PUBLIC or method == "OPTIONS":
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
        if path not in _PROBES and path != _NO_ROUTE:
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
        method = scope["method"] if scope["method"] in _METHODS else "other"  # labels are few
        status = status or 499  # the client left before there was an answer
        length = headers.get("content-length", "")
        self.state.metrics.observe_http(
            path, method, status, seconds, int(length) if length.isdigit() else 0, num_bytes
        )
        if self.state.settings.access_log and path not in self.quiet:
            client, made = scope.get("client") or ("-", 0), _generated(scope["state"].get("generation"))
            access_logger.info(
                '%s "%s %s" %d %.1f ms%s',
                client[0],
                scope["method"],
                scope["path"][:_MOST_LOGGED],
                status,
                seconds * 1000,
                ", {size}, {prompt_tokens} + {completion_tokens} tokens".format(**made) if made else "",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": scope["path"][:_MOST_LOGGED],
                    "status": status,
                    "duration_ms": round(seconds * 1000, 3),
                    "tenant": scope["state"]["tenant"].name,
                    **made,
                },
            )


def _generated(generation: Generation | None) -> dict[str, Any]:
    """What the log says of an answer."""
    if generation is None or not generation.size:
        return {}
    usage, size = generation.usage(), generation.size_summary()
    return {
        "model": generation.model_id,
        "size": size["name"],
        "precision": size["precision"],
        "size_reason": generation.reason,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "finish_reasons": [sequence.finish_reason for sequence in generation.sequences],
        **generation.timings(),
    }
