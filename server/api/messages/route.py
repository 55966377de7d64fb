"""/v1/messages and /v1/messages/count_tokens: answers in Anthropic's shape, whole and as events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.answer_parts import CallPart, Reasoning, Text
from server.api.generate.conversation import Conversation, Piece
from server.api.generate.generation import Generation
from server.api.generate.json_text import is_json
from server.api.generate.serving import json_response, read_body, respond
from server.api.generate.submission import Caller
from server.api.http.errors import APIError
from server.api.http.sse import named_event
from server.api.http.state import ServerState
from server.api.messages.convert import to_chat
from server.api.messages.protocol import CountTokensRequest, MessagesRequest

_NAMES = {"response_format": "output_config.format"}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def create_message(request: Request, state: ServerState) -> Response:
    body = await read_body(request, MessagesRequest, state)
    caller = Caller.of(request)
    call = MessageCall(state, Conversation(state, to_chat(body), _NAMES), caller.request_id)
    generation = await call.conversation.generation(caller, call.id)
    return await respond(request, generation, bool(body.stream), call.whole, call.events, _error_event)


async def count_message_tokens(request: Request, state: ServerState) -> Response:
    body = await read_body(request, CountTokensRequest, state)
    state.catalog.split_model(body.model)
    prompt = await Conversation(state, to_chat(body)).prompt()
    return json_response({"input_tokens": len(prompt.token_ids)})


def _error_event(error: APIError) -> bytes:
    return named_event("error", error.anthropic_body())


class MessageCall:
    """One call and how its answer is written."""

    def __init__(self, state: ServerState, conversation: Conversation, request_id: str) -> None:
        self.state = state
        self.conversation = conversation
        self.id = f"msg_{request_id}"

    async def whole(self, generation: Generation) -> Response:
        answer = (await self.conversation.answers(generation))[0]
        content: list[dict[str, Any]] = []
        for item in answer.items:
            if isinstance(item, Text):
                content.append({"type": "text", "text": item.text})
            elif isinstance(item, Reasoning):
                content.append({"type": "thinking", "thinking": item.text, "signature": ""})
            else:
                content.append(_tool_use(item.id, item.name) | {"input": _input(item.arguments)})
        content = content or [{"type": "text", "text": ""}]
        message = self._message(generation) | {"content": content} | _stop(answer.finish_reason, answer.stop_reason)
        return json_response(message | {"usage": _usage(generation)}, generation.headers())

    async def events(self, generation: Generation) -> AsyncGenerator[bytes]:
        blocks = _Blocks()
        last: Piece | None = None
        num_changes = 0
        async for last in self.conversation.pieces(generation):
            if not num_changes:
                # With the first token: clients take this event's time for time to first token.
                num_changes = len(generation.changes)
                empty: dict[str, Any] = {
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": _usage(generation),
                }
                message = self._message(generation) | empty
                yield named_event("message_start", {"type": "message_start", "message": message})
                yield named_event("ping", {"type": "ping"})
            change = {}
            if len(generation.changes) > num_changes:  # of size: shown with the text that it happens at
                num_changes = len(generation.changes)
                change = {"model": generation.model_id, "size": generation.size_summary()}
            for part in last.parts:
                for event in blocks.write(part, change):
                    yield event
        for event in blocks.close():
            yield event
        assert last is not None
        end = {"type": "message_delta", "delta": _stop(last.finish_reason, last.delta.stop_reason)}
        end |= {"usage": _usage(generation), "model": generation.model_id, "size": generation.size_summary()}
        yield named_event("message_delta", end)
        yield named_event("message_stop", {"type": "message_stop"})

    def _message(self, generation: Generation) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": generation.model_id,
            "size": generation.size_summary(),
        }


class _Blocks:
    """The blocks of a streamed message: one is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._kind: type | None = None

    def write(self, part: Text | Reasoning | CallPart, extra: dict[str, Any]) -> Iterator[bytes]:
        if isinstance(part, CallPart):
            if part.id is not None:
                yield from self._open(CallPart, _tool_use(part.id, part.name or "") | {"input": {}})
            if part.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": part.arguments}, extra)
        elif isinstance(part, Reasoning):
            if self._kind is not Reasoning:
                yield from self._open(Reasoning, {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": part.text}, extra)
        else:
            if self._kind is not Text:
                yield from self._open(Text, {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": part.text}, extra)

    def close(self) -> Iterator[bytes]:
        """End the last block; an answer without any has one empty block of text, as a whole one has."""
        if self._kind is None:
            yield from self._open(Text, {"type": "text", "text": ""})
        yield self._stop()

    def _open(self, kind: type, block: dict[str, Any]) -> Iterator[bytes]:
        if self._kind is not None:
            yield self._stop()
        self._kind, self._index = kind, self._index + 1
        yield _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any], extra: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta, **extra)

    def _stop(self) -> bytes:
        return _event("content_block_stop", index=self._index)


def _event(kind: str, **data: Any) -> bytes:
    return named_event(kind, {"type": kind, **data})


def _usage(generation: Generation) -> dict[str, int]:
    """Anthropic counts cached prompt tokens apart from the others."""
    usage = generation.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "output_tokens": usage["completion_tokens"],
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }


def _stop(finish_reason: str | None, stop_reason: int | str | None) -> dict[str, Any]:
    if finish_reason == "stop" and isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": _STOP_REASONS.get(finish_reason or "stop", "end_turn"), "stop_sequence": None}


def _tool_use(call_id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id.replace("call_", "toolu_"), "name": name}


def _input(arguments: str) -> Any:
    """The arguments as they were written; of a call that was cut short, nothing."""
    return orjson.Fragment(arguments) if is_json(arguments) else {}
