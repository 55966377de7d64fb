"""OpenAI's older streams: chunks of an answer as server-sent events, for completions and chat alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import Any

from server.api.generate.conversation import Piece
from server.api.generate.generation import Delta, Generation
from server.api.generate.protocol import SamplingFields
from server.api.generate.serving import off_loop
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

    @property
    @abstractmethod
    def is_only_text(self) -> bool:
        """Whether, until the end of a choice, there is nothing to write but the text of deltas."""

    @abstractmethod
    def num_scored(self, generation: Generation, piece: Piece, is_first: bool) -> int:
        """Log-probabilities in `choice`."""

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
    is_only_text = writer.is_only_text and not every_usage
    written_for = -1  # changes of size or precision
    envelope: dict[str, Any] = {}
    # Of choices that have begun and go on with text: all of a chunk before and behind it, which is written once. What a
    # token takes here it takes with cold caches, hundreds of times a step.
    heads: dict[int, bytes] = {}
    head = tail = b""
    has_begun: set[int] = set()

    def write(choice: dict[str, Any]) -> bytes:
        usage: dict[str, Any] = {}
        if with_usage:  # OpenAI's chunks carry null until the last
            usage = {"usage": writer.usage(generation) if every_usage else None}
        return event(envelope | {"choices": [choice]} | usage)

    async for delta in generation.deltas():
        if written_for != generation.num_changes:
            written_for = generation.num_changes
            envelope = writer.envelope(generation)
            head = b"data: " + dumps(envelope)[:-1] + b',"choices":[{"index":'
            tail = writer.text_tail + (b',"usage":null' if with_usage else b"") + b"}\n\n"
            heads.clear()
        if delta.finish_reason is None and (before := heads.get(delta.index)) is not None:
            if delta.text:
                yield before + dumps(delta.text) + tail
            continue
        piece = read(delta)
        if piece is None:
            continue
        is_first = piece.index not in has_begun
        prefix = b""
        if is_first and (first := writer.first(generation, piece)) is not None:
            prefix = write(first)
            is_first = False
            has_begun.add(piece.index)
        num_scored = 0 if is_only_text else writer.num_scored(generation, piece, is_first)
        choice = await off_loop(writer.choice, generation, piece, is_first, num_scored=num_scored)
        if choice is not None:
            has_begun.add(piece.index)
        if is_only_text and piece.index in has_begun:
            heads[piece.index] = head + b"%d" % piece.index + writer.text_head
        if choice is not None:
            yield prefix + write(choice)
        elif prefix:
            yield prefix
    if with_usage:
        yield event(envelope | {"choices": [], "usage": writer.usage(generation)} | generation.timing_report())
    yield DONE
