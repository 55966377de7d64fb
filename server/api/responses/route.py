"""/v1/responses: answers as a `response` object, whole and as its typed events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.answer_parts import CallPart, Reasoning, Text
from server.api.generate.conversation import Call, Conversation
from server.api.generate.generation import Delta, Generation
from server.api.generate.logprobs import LogprobFormatter
from server.api.generate.serving import created_now, json_response, off_loop, read_body, respond
from server.api.generate.submission import Caller
from server.api.http.errors import APIError
from server.api.http.sse import listed, named_event
from server.api.http.state import ServerState
from server.api.responses.convert import to_chat
from server.api.responses.protocol import ResponsesRequest

_NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format"}


async def create_response(request: Request, state: ServerState) -> Response:
    body = await read_body(request, ResponsesRequest, state)
    conversation = Conversation(state, to_chat(body), _NAMES)
    caller = Caller.of(request, body.request_id)
    call = ResponseCall(state, body, conversation, caller.request_id)
    generation = await conversation.generation(caller, call.id)
    return await respond(request, generation, bool(body.stream), call.whole, call.events, call.error_event)


class ResponseCall:
    """One call and how its answer is written."""

    def __init__(self, state: ServerState, body: ResponsesRequest, conversation: Conversation, request_id: str) -> None:
        self.state = state
        self.body = body
        self.conversation = conversation
        self.id = f"resp_{request_id}"
        self.created = created_now()
        self.format = LogprobFormatter(state.tokenizer, body.top_logprobs or 0)
        self._sequence_number = 0

    async def whole(self, generation: Generation) -> Response:
        answer = (await self.conversation.answers(generation))[0]
        output = _Output(self, answer.finish_reason)
        output.scored = [await self._scored(answer.deltas)]
        for item in answer.items or [Text("")]:
            if isinstance(item, Text):
                output.add_message(item.text)
            elif isinstance(item, Reasoning):
                output.add_reasoning(item.text)
            else:
                output.add_call(item)
        response = self._response(generation, answer.finish_reason, output.items)
        return json_response(response, generation.headers())

    # --- a stream

    async def events(self, generation: Generation) -> AsyncGenerator[bytes]:
        output = _Output(self, None)
        num_changes = 0
        async for piece in self.conversation.pieces(generation):
            if not num_changes:
                num_changes = len(generation.changes)
                started = self._response(generation, None, [])
                yield self.event("response.created", response=started)
                yield self.event("response.in_progress", response=started)
            change: dict[str, Any] = {}
            if len(generation.changes) > num_changes:  # of size: shown with the text that it happens at
                num_changes = len(generation.changes)
                change = {"size": generation.size_summary()}
            output.finish = piece.finish_reason
            scored = await self._scored([piece.delta])
            output.scored.append(scored)
            parts = piece.parts or ([Text("")] if piece.finish_reason and output.is_empty else [])
            for part in parts:
                for event in output.write(part, scored, change):
                    yield event
        for event in output.close():
            yield event
        final = self._response(generation, output.finish, output.items)
        yield self.event(f"response.{final['status']}", response=final)

    def error_event(self, error: APIError) -> bytes:
        detail = error.body()["error"]
        return self.event("error", code=str(detail["code"]), message=error.message, param=error.param)

    def event(self, kind: str, **data: Any) -> bytes:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        return named_event(kind, {"type": kind, "sequence_number": number, **data})

    # --- parts

    def message(self, item_id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def part(self, text: str, scored: list[bytes]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": listed(scored)}

    async def _scored(self, deltas: list[Delta]) -> bytes:
        """Log-probabilities as they are written: a part for `listed`."""
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        return await off_loop(self.format.chat_entries, entries, num_scored=self.format.count(len(entries)))

    def _response(self, generation: Generation, finish: str | None, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, chat, default = self.body, self.conversation.body, self.state.sampling_defaults
        status = _status(finish)
        shown = body.model_dump(include={"tools", "tool_choice", "text"}, exclude_none=True, by_alias=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": generation.model_id,
            "size": generation.size_summary(),
            "output": output,
            "parallel_tool_calls": chat.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": default.temperature if body.temperature is None else body.temperature,
            "text": shown.get("text") or {"format": {"type": "text"}},
            "tool_choice": shown.get("tool_choice", "auto"),
            "tools": shown.get("tools", []),
            "top_p": default.top_p if body.top_p is None else body.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "truncation": "disabled",
            "usage": _usage(self.conversation.usage(generation)) if finish else None,
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _status(finish: str | None) -> str:
    if finish is None:
        return "in_progress"
    return "incomplete" if finish == "length" else "completed"


class _Output:
    """The items of an answer, in order; streamed, one is open at a time."""

    def __init__(self, call: ResponseCall, finish: str | None) -> None:
        self._call = call
        self.finish = finish
        self.items: list[dict[str, Any]] = []
        self.scored: list[bytes] = []  # log-probabilities so far: parts for `listed`
        self._open: str | None = None
        self._item_id = ""
        self._text = ""
        self._function: Call | None = None

    @property
    def is_empty(self) -> bool:
        return not self.items and self._open is None

    # --- whole items

    def add_message(self, text: str, item_id: str = "") -> dict[str, Any]:
        """Log-probabilities are those of the first message's tokens and all that follow."""
        is_first = not any(item["type"] == "message" for item in self.items)
        part = self._call.part(text, self.scored if is_first else [])
        self.items.append(self._call.message(item_id or _item_id("msg"), _status(self.finish), [part]))
        return part

    def add_reasoning(self, text: str, item_id: str = "") -> None:
        content = [{"type": "reasoning_text", "text": text}]
        item = {"id": item_id or _item_id("rs"), "type": "reasoning", "summary": [], "content": content}
        self.items.append(item | {"status": "completed"})

    def add_call(self, call: Call) -> None:
        self.items.append(_function_call(call, "incomplete" if self.finish == "length" else "completed"))

    # --- streamed

    def write(self, part: Text | Reasoning | CallPart, scored: bytes, extra: dict[str, Any]) -> Iterator[bytes]:
        if isinstance(part, CallPart):
            if part.id is not None:
                yield from self.close()
                self._open, self._function = "call", Call(part.id, part.name or "", "")
                self._item_id = part.id.replace("call_", "fc_")
                yield self._added(_function_call(self._function, "in_progress"))
            assert self._function is not None
            self._function.arguments += part.arguments
            if part.arguments:
                yield self._event("response.function_call_arguments.delta", delta=part.arguments, **extra)
        elif isinstance(part, Reasoning):
            if self._open != "reasoning":
                yield from self.close()
                self._begin("reasoning", "rs")
                item = {"id": self._item_id, "type": "reasoning", "summary": [], "content": []}
                yield self._added(item | {"status": "in_progress"})
            self._text += part.text
            yield self._event("response.reasoning_text.delta", content_index=0, delta=part.text, **extra)
        else:
            if self._open != "message":
                yield from self.close()
                self._begin("message", "msg")
                yield self._added(self._call.message(self._item_id, "in_progress", []))
                part_of = self._call.part("", [])
                yield self._event("response.content_part.added", content_index=0, part=part_of)
            self._text += part.text
            name = "response.output_text.delta"
            yield self._event(name, content_index=0, delta=part.text, logprobs=listed([scored]), **extra)

    def close(self) -> Iterator[bytes]:
        """End the open item, if there is one."""
        kind, text, self._open = self._open, self._text, None
        if kind is None:
            return
        index = len(self.items)
        if kind == "message":
            part = self.add_message(text, self._item_id)
            logprobs = part["logprobs"]
            yield self._event("response.output_text.done", index, content_index=0, text=text, logprobs=logprobs)
            yield self._event("response.content_part.done", index, content_index=0, part=part)
        elif kind == "reasoning":
            self.add_reasoning(text, self._item_id)
            yield self._event("response.reasoning_text.done", index, content_index=0, text=text)
        else:
            assert self._function is not None
            self.add_call(self._function)
            name, arguments = self._function.name, self._function.arguments
            yield self._event("response.function_call_arguments.done", index, name=name, arguments=arguments)
        yield self._call.event("response.output_item.done", output_index=index, item=self.items[-1])

    def _begin(self, kind: str, prefix: str) -> None:
        self._open, self._item_id, self._text = kind, _item_id(prefix), ""

    def _added(self, item: dict[str, Any]) -> bytes:
        return self._call.event("response.output_item.added", output_index=len(self.items), item=item)

    def _event(self, kind: str, index: int | None = None, **data: Any) -> bytes:
        index = len(self.items) if index is None else index
        return self._call.event(kind, item_id=self._item_id, output_index=index, **data)


def _item_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _function_call(call: Call, status: str) -> dict[str, Any]:
    return {
        "id": call.id.replace("call_", "fc_"),
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage.get("completion_tokens_details", {"reasoning_tokens": 0}),
        "total_tokens": usage["total_tokens"],
    }
