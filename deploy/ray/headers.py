"""Puts what routing needs into headers, before anything has read a request's body.

Serve's proxy routes by metadata alone. This middleware of the proxy (`deploy.ray.routing:middlewares`) looks at the
beginning of a body and fills the two headers that Serve makes part of a request's metadata: the session id (here: the
prompt's beginning) and the multiplexed model id (here: the size). Clients may send a session id themselves; then the
body is not looked at. Keys are the replica's to check, so what a stranger can make the proxy do is bounded: it reads
`LOOK_AT` bytes, waits `PATIENCE` seconds for them, and hands on the rest as it comes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json

import pydantic_core
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREFIX_HEADER, SIZE_HEADER = b"x-session-id", b"serve_multiplexed_model_id"
# Characters of a prompt that make a conversation or a document; long enough to tell system prompts apart.
PREFIX_CHARACTERS = 1024
LOOK_AT = 64 << 10  # a size that stands behind a longer prompt is not seen
PATIENCE = 2.0
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/api/generate")


def routing_keys(body: bytes) -> tuple[str, str]:
    """(hash of the prompt's beginning, size or "") of a generating request, of which `body` may be the beginning only;
    empty strings where unreadable."""
    try:
        request = pydantic_core.from_json(body, allow_partial="trailing-strings")
        prompt = next((request[name] for name in ("prompt", "input") if request.get(name) is not None), None)
        if prompt is None:
            # The first message (the system prompt) and the second: turns that follow keep this prefix.
            prompt = [(m.get("role"), m.get("content")) for m in request["messages"][:2]]
        start = json.dumps(prompt, ensure_ascii=False)[:PREFIX_CHARACTERS] if not isinstance(prompt, str) else prompt
        model = str(request.get("model") or "")
        size = str(request.get("size") or (model.rpartition(":")[2] if ":" in model else ""))
    except (ValueError, TypeError, LookupError, AttributeError):
        return "", ""  # not ours to complain about: the replica answers 400
    key = hashlib.blake2b(start[:PREFIX_CHARACTERS].encode(errors="replace"), digest_size=8).hexdigest()
    return key, "" if size == "auto" else size


class RoutingHeaders:
    """ASGI middleware of the proxy: reads the beginning of the body, adds the headers, hands the body on unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        is_ours = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(ENDPOINTS)
        if not is_ours or PREFIX_HEADER in names:
            await self.app(scope, receive, send)
            return
        messages: list[Message] = []
        body = bytearray()
        try:
            async with asyncio.timeout(PATIENCE):
                while len(body) < LOOK_AT:
                    message = await receive()
                    messages.append(message)
                    body += message.get("body", b"")
                    if message["type"] != "http.request" or not message.get("more_body"):
                        break
        except TimeoutError:
            pass  # whoever is so slow is the replica's to time
        prefix, size = routing_keys(bytes(body[:LOOK_AT]))
        found = [(PREFIX_HEADER, prefix.encode()), (SIZE_HEADER, size.encode("latin-1", "replace"))]
        headers = [*scope["headers"], *found]
        queue = iter(messages)

        async def replay() -> Message:
            message = next(queue, None)
            return message if message is not None else await receive()

        await self.app({**scope, "headers": headers}, replay, send)
