"""Responses that notice when their client leaves: server-sent events, and plain answers that take a while."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.api.http.errors import APIError

logger = logging.getLogger(__name__)

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


# Line ends for clients that split a stream as Python's str.splitlines does; escaped, they mean the same in JSON.
_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))


class Written:
    """JSON that `dumps` has written before: a part of what it is to write now."""

    __slots__ = ("content",)

    def __init__(self, content: bytes) -> None:
        self.content = content


# Stands for that while the rest is written; nobody outside can know it.
_PLACE = secrets.token_hex(16)


def dumps(data: Any) -> bytes:
    """JSON that holds no line end of any kind."""
    return b"".join(dumped_parts(data))


def dumped_parts(data: Any) -> list[bytes]:
    """The same in parts: what was written before is not looked at again, for it may be a hundred megabytes."""
    before: list[bytes] = []

    def place(value: Any) -> str:
        if not isinstance(value, Written):
            raise TypeError(f"{type(value).__name__} is no JSON")
        before.append(value.content)
        return _PLACE

    try:
        text = orjson.dumps(data, default=place)
    except TypeError:  # a caller's schema that is handed back may hold integers of any length
        before.clear()
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=place).encode()
    if not text.isascii():
        for raw, escaped in _LINE_ENDS:
            text = text.replace(raw, escaped)
    if not before:
        return [text]
    own = text.split(f'"{_PLACE}"'.encode())
    return [part for pair in zip(own, [*before, b""], strict=True) for part in pair if part]


def entries_of(values: Sequence[T], write: Callable[[T], Any], at_once: int) -> bytes:
    """JSON of `write(value)` for each, with commas between them: a part for `listed`.

    `at_once` in one call of the library, while which no other thread gets a turn.
    """
    parts = (dumps([write(value) for value in values[at : at + at_once]]) for at in range(0, len(values), at_once))
    return b",".join(part[1:-1] for part in parts)


def listed(parts: Iterable[bytes]) -> Written:
    """A JSON list of what is in `parts`."""
    return Written(b"[" + b",".join(filter(None, parts)) + b"]")


class JSONParts(Response):
    """A long answer, sent in parts: between two of them the event loop turns."""

    def __init__(self, parts: list[bytes], headers: dict[str, str] | None = None) -> None:
        length = str(sum(map(len, parts)))
        super().__init__(None, headers={**(headers or {}), "content-length": length}, media_type="application/json")
        self.parts = parts

    async def __call__(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: Any) -> bytes:
    """One server-sent event with a JSON payload."""
    return b"data: " + dumps(data) + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """The same with an event name, as Anthropic's and OpenAI's newer streams have it."""
    return b"event: " + name.encode() + b"\ndata: " + dumps(data) + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields, then awaits `close`; at once if the client leaves or the task is cancelled.

    A failure after the headers have gone becomes an error event, so that the client can tell it from an end.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        headers: dict[str, str],
        close: Callable[[], Awaitable[None]],
        error_event: Callable[[APIError], bytes] | None = None,
        media_type: str = "text/event-stream",
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(None, headers=headers, media_type=media_type)
        # Response sets a length of 0 for its empty body.
        self.raw_headers = [item for item in self.raw_headers if item[0] != b"content-length"]
        self.events = events
        self.close = close
        self.error_event = error_event or (lambda error: event(error.body()) + DONE)

    async def __call__(self, scope, receive, send) -> None:
        sender = asyncio.ensure_future(self._send(send))
        leaver = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sender, leaver), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            await _cancel(sender, leaver)
            await self.events.aclose()
            await self.close()  # a generator that never started has run no `finally` of its own

    async def _send(self, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self.events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except APIError as error:
            await send({"type": "http.response.body", "body": self.error_event(error), "more_body": True})
        except OSError:  # the client is gone
            return
        except Exception:
            logger.exception("stream failed")
            failure = APIError("The server failed to handle this request.", status=500)
            await send({"type": "http.response.body", "body": self.error_event(failure), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(request: Request, work: Awaitable[Response]) -> Response:
    """Await `work`, unless the client leaves first: then it is cancelled. Cancelling this cancels it as well."""
    worker = asyncio.ensure_future(work)
    leaver = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((worker, leaver), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        return Response(status_code=499)  # nobody reads it; the access log does
    finally:
        await _cancel(worker, leaver)


async def _disconnected(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future) -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
