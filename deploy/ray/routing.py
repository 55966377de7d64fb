"""Which replica answers: one that has this prompt's beginning in its KV cache and runs this size, unless it is busy.

Serve routes a request before anything has read its body. So a middleware in the proxy (`middlewares`, named by
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH) reads it and puts what routing needs into the two headers that Serve makes
part of a request's metadata: the session id (here: the prompt's beginning) and the multiplexed model id (here: the
size). Clients may send a session id themselves; then the body is not looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["PREFIX_HEADER", "SIZE_HEADER", "PrefixAndSizeRouter", "RoutingHeaders", "middlewares", "routing_keys"]

PREFIX_HEADER, SIZE_HEADER = b"x-session-id", b"serve_multiplexed_model_id"
# Characters of a prompt that make a conversation or a document; long enough to tell system prompts apart.
PREFIX_CHARACTERS = 1024
MAX_BODY = 16 << 20
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")


def routing_keys(body: bytes) -> tuple[str, str]:
    """(hash of the prompt's beginning, size or "") of a completion or chat request; empty strings where unreadable."""
    try:
        request = json.loads(body)
        prompt = request.get("prompt")
        if prompt is None:
            # The first message (the system prompt) and the second: turns that follow keep this prefix.
            prompt = [(m.get("role"), m.get("content")) for m in request["messages"][:2]]
        start = json.dumps(prompt, ensure_ascii=False)[:PREFIX_CHARACTERS] if not isinstance(prompt, str) else prompt
        model = str(request.get("model") or "")
        size = request.get("size") or (model.rpartition(":")[2] if ":" in model else "")
    except (ValueError, TypeError, LookupError, AttributeError):
        return "", ""  # not ours to complain about: the replica answers 400
    key = hashlib.blake2b(start[:PREFIX_CHARACTERS].encode(errors="replace"), digest_size=8).hexdigest()
    return key, "" if str(size) == "auto" else str(size)


class RoutingHeaders:
    """ASGI middleware of the proxy: buffers the body, adds the headers, hands the body on unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        is_ours = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(ENDPOINTS)
        if not is_ours or PREFIX_HEADER in names:
            await self.app(scope, receive, send)
            return
        messages: list[Message] = []
        body = b""
        while len(body) <= MAX_BODY:
            message = await receive()
            messages.append(message)
            body += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        prefix, size = routing_keys(body)
        found = [(PREFIX_HEADER, prefix.encode()), (SIZE_HEADER, size.encode("latin-1", "replace"))]
        headers = [*scope["headers"], *found]
        queue = iter(messages)

        async def replay() -> Message:
            message = next(queue, None)
            return message if message is not None else await receive()

        await self.app({**scope, "headers": headers}, replay, send)


def middlewares() -> list[Middleware]:
    return [Middleware(RoutingHeaders)]


class PrefixAndSizeRouter(FIFOMixin, RequestRouter):
    """Least loaded, with affinity: a replica that served this prefix, else one that runs this size, if not busier than
    the least loaded by more than `max_imbalance` requests. The last `max_prefixes` prefixes are remembered.
    """

    def initialize_state(self, max_imbalance: int = 4, max_prefixes: int = 10_000) -> None:
        self.max_imbalance, self.max_prefixes = max_imbalance, max_prefixes
        self.owners: OrderedDict[str, Any] = OrderedDict()  # prefix -> replica id

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates, best first; Serve tries the first rank that accepts."""
        if not candidate_replicas:
            return []
        load = {replica.replica_id: self._load(replica) for replica in candidate_replicas}
        by_load = sorted(candidate_replicas, key=lambda replica: load[replica.replica_id])
        prefix, size = _keys_of(pending_request)
        limit = load[by_load[0].replica_id] + self.max_imbalance
        owner = self.owners.get(prefix) if prefix else None

        def rank(replica: RunningReplica) -> int:
            if load[replica.replica_id] > limit:
                return 2
            if replica.replica_id == owner:
                return 0
            # A size that runs already costs only its rows; a new one costs its weights once more per step.
            return 1 if size and size in (replica.routing_stats or {}).get("sizes", ()) else 2

        ordered = sorted(by_load, key=rank)  # stable: least loaded first within a rank
        return [[replica] for replica in ordered]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        prefix, _ = _keys_of(pending_request)
        if prefix:
            self.owners[prefix] = replica_id
            self.owners.move_to_end(prefix)
            while len(self.owners) > self.max_prefixes:
                self.owners.popitem(last=False)

    def _load(self, replica: RunningReplica) -> int:
        """Requests in flight, as last heard; an unknown replica is taken as idle, so that new ones get work."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _keys_of(pending_request: PendingRequest | None) -> tuple[str, str]:
    """(prefix, size in layers) as the middleware, or the client, wrote them; empty strings where absent."""
    if pending_request is None:
        return "", ""
    metadata = pending_request.metadata
    return metadata.session_id or "", (metadata.multiplexed_model_id or "").removesuffix("L")
