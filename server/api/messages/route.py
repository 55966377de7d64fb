"""/v1/messages and /v1/messages/count_tokens: answers in Anthropic's shape, whole and as events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.conversation import Conversation, Piece
from server.api.generate.generation import Generation
from server.api.generate.serving import json_response, read_body, respond
from server.api.http.errors import APIError
from server.api.http.sse import named_event
from server.api.http.state import ServerState
from server.api.messages.convert import to_chat
from server.api.messages.protocol import CountTokensRequest, MessagesRequest

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def create_message(request: Request, state: ServerState) -> Response:
    body = await read_body(request, MessagesRequest, state)
    call = MessageCall(state, Conversation(state, to_chat(body)), request.scope["state"]["request_id"])
    generation = await call.conversation.generation(request, call.id)
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
        if answer.content or not answer.calls:
            content.append({"type": "text", "text": answer.content or ""})
        content += [_tool_use(call) | {"input": _arguments(call)} for call in answer.calls]
        message = self._message(generation) | {"content": content} | _stop(answer.finish_reason, answer.stop_reason)
        return json_response(message | {"usage": _usage(generation)}, generation.headers())

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        start = self._message(generation) | {"content": [], "stop_reason": None, "stop_sequence": None}
        has_begun, index, is_open = False, 0, False
        last: Piece | None = None
        async for last in self.conversation.pieces(generation):
            if not has_begun:
                # With the first token: clients take this event's time for time to first token.
                has_begun = True
                message = start | {"usage": _usage(generation)}
                yield named_event("message_start", {"type": "message_start", "message": message})
                yield named_event("ping", {"type": "ping"})
            if last.text:
                if not is_open:
                    is_open = True
                    yield _block_start(index, {"type": "text", "text": ""})
                yield _block_delta(index, {"type": "text_delta", "text": last.text})
        if is_open:
            yield _block_stop(index)
            index += 1
        for call in last.calls:
            yield _block_start(index, _tool_use(call) | {"input": {}})
            partial = call["function"]["arguments"]
            yield _block_delta(index, {"type": "input_json_delta", "partial_json": partial})
            yield _block_stop(index)
            index += 1
        change = _stop(last.finish_reason, last.delta.stop_reason)
        end = {"type": "message_delta", "delta": change, "usage": _usage(generation)}
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


def _tool_use(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"].replace("call_", "toolu_"), "name": call["function"]["name"]}


def _arguments(call: dict[str, Any]) -> Any:
    return orjson.loads(call["function"]["arguments"])


def _block_start(index: int, block: dict[str, Any]) -> bytes:
    return named_event("content_block_start", {"type": "content_block_start", "index": index, "content_block": block})


def _block_delta(index: int, delta: dict[str, Any]) -> bytes:
    return named_event("content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta})


def _block_stop(index: int) -> bytes:
    return named_event("content_block_stop", {"type": "content_block_stop", "index": index})
