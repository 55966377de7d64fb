"""HTTP connections that cannot be held open for nothing: slow or endless heads and bodies, clients that do not read.

A client that stops reading fills the socket's buffers, then uvicorn's, and then its handler waits. The engine does not
(outputs merge while nobody takes them), but the request would count as running, and a shutdown would wait for it.
"""

from __future__ import annotations

import asyncio
import logging

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.http.errors import invalid

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
BODY_SECONDS = 120.0
# The answer has gone and the body still comes: nobody will read it.
UNREAD_SECONDS = 5.0


def guarded_protocol(stall_seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which drops a client that reads nothing for `stall_seconds` while there is more to send."""
    return type("Guarded", (_GuardedProtocol,), {"stall_seconds": stall_seconds})


class _GuardedProtocol(HttpToolsProtocol):
    stall_seconds = 60.0
    _head_timer: asyncio.TimerHandle | None = None  # runs while a head is incomplete
    _body_timer: asyncio.TimerHandle | None = None  # runs while a body is incomplete
    _stall_timer: asyncio.TimerHandle | None = None  # runs while the client does not read
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._drop)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in ("_head_timer", "_body_timer", "_stall_timer"):
            self._stop(name)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._drop)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop("_head_timer")
        self._stop("_body_timer")
        # Whoever reads the body answers 408 by then; this is for the routes that do not.
        self._body_timer = self.loop.call_later(BODY_SECONDS + UNREAD_SECONDS, self._drop)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop("_body_timer")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._body_timer is not None and not self.transport.is_closing():
            self._stop("_body_timer")
            self._body_timer = self.loop.call_later(UNREAD_SECONDS, self._drop)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop("_stall_timer")
        self._stall_timer = self.loop.call_later(self.stall_seconds, self._drop)

    def resume_writing(self) -> None:
        self._stop("_stall_timer")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP at all is refused in the same shape as everything else."""
        content = orjson.dumps(invalid(msg).body())
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: "
        self.transport.write(head + b"%d\r\n\r\n" % len(content) + content)
        self.transport.close()

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the request's head is too large")  # the parser turns this into a 400

    def _stop(self, name: str) -> None:
        if (timer := getattr(self, name)) is not None:
            timer.cancel()
            setattr(self, name, None)

    def _drop(self) -> None:
        logger.info("dropping a client that neither sends nor reads: %s", self.client)
        self.transport.abort()  # which ends in connection_lost
