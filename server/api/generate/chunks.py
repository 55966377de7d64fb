"""OpenAI's older streams: chunks of an answer as server-sent events, for completions and chat alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import Any

from server.api.generate.conversation import Piece
from server.api.generate.generation import Delta, Generation
from server.api.generate.protocol import SamplingFields
from server.api.http.sse import DONE, dumps, event
from server.config import Settings


class ChunkWriter(ABC):
    """How one route writes its chunks."""

    # Between a chunk's index and its text, and behind the text, of a chunk that holds nothing else.
    text_head: bytes
    text_tail: bytes

    @abstractmethod
    def envelope(self, generation: Generation) -> dict[str, Any]:
        """What is the same in all chunks, as long as the size is."""

    @abstractmethod
    def usage(self, generation: Generation) -> dict[str, Any]: ...

    @abstractmethod
    def plain_text(self, piece: Piece) -> str | None:
        """The text of a piece that is nothing but text; None if it takes `choice` to write it."""

    @abstractmethod
    def first(self, generation: Generation, piece: Piece) -> dict[str, Any] | None:
        """A choice that precedes all others of its index, None if there is none."""

    @abstractmethod
    def choice(self, generation: Generation, piece: Piece, is_first: bool) -> dict[str, Any] | None:
        """The choice of a piece; None if there is nothing to say yet, and then this was not the first."""


async def chunk_events(
    writer: ChunkWriter,
    generation: Generation,
    read: Callable[[Delta], Piece | None],
    body: SamplingFields,
    settings: Settings,
) -> AsyncGenerator[bytes]:
    """The stream. A change of size or precision shows in the chunk where it happens and in all that follow.

    `read` makes of what is new what is to be written: a function, for another generator on the way costs each token.
    """
    options = body.stream_options
    with_usage = settings.enable_force_include_usage or bool(options and options.include_usage)
    every_usage = bool(options and options.continuous_usage_stats) and with_usage
    written_for: tuple[int, int] | None = None  # changes of size, width
    envelope: dict[str, Any] = {}
    head = tail = b""
    has_begun: set[int] = set()

    def write(choice: dict[str, Any]) -> bytes:
        usage: dict[str, Any] = {}
        if with_usage:  # OpenAI's chunks carry null until the last
            usage = {"usage": writer.usage(generation) if every_usage else None}
        return event(envelope | {"choices": [choice]} | usage)

    async for delta in generation.deltas():
        piece = read(delta)
        if piece is None:
            continue
        if written_for != (now := (len(generation.changes), generation.width)):
            written_for = now
            envelope = writer.envelope(generation)
            # Everything but the text is the same in every plain chunk: written once.
            head = b"data: " + dumps(envelope)[:-1] + b',"choices":[{"index":'
            tail = writer.text_tail + (b',"usage":null' if with_usage else b"") + b"}\n\n"
        text = None if every_usage else writer.plain_text(piece)
        is_first = piece.index not in has_begun
        prefix = b""
        if is_first and (first := writer.first(generation, piece)) is not None:
            prefix = write(first)
            is_first = False
            has_begun.add(piece.index)
        if text is not None and not is_first:
            if text or prefix:
                index = b"%d" % piece.index
                yield prefix + (head + index + writer.text_head + dumps(text) + tail if text else b"")
            continue
        choice = writer.choice(generation, piece, is_first)
        if choice is not None:
            has_begun.add(piece.index)
            yield prefix + write(choice)
        elif prefix:
            yield prefix
    if with_usage:
        yield event(envelope | {"choices": [], "usage": writer.usage(generation)} | generation.timing_report())
    yield DONE
