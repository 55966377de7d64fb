"""/v1/responses: answers as a `response` object, whole and as its typed events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.conversation import Conversation
from server.api.generate.generation import Delta, Generation
from server.api.generate.logprobs import LogprobFormatter
from server.api.generate.serving import created_now, json_response, read_body, respond
from server.api.http.errors import APIError
from server.api.http.sse import named_event
from server.api.http.state import ServerState
from server.api.responses.convert import to_chat
from server.api.responses.protocol import ResponsesRequest


async def create_response(request: Request, state: ServerState) -> Response:
    body = await read_body(request, ResponsesRequest, state)
    conversation = Conversation(state, to_chat(body))
    call = ResponseCall(state, body, conversation, body.request_id or request.scope["state"]["request_id"])
    generation = await conversation.generation(request, call.id)
    return await respond(request, generation, bool(body.stream), call.whole, call.events, call.error_event)


class ResponseCall:
    """One call and how its answer is written."""

    def __init__(self, state: ServerState, body: ResponsesRequest, conversation: Conversation, request_id: str) -> None:
        self.state = state
        self.body = body
        self.conversation = conversation
        self.id = f"resp_{request_id}"
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self.created = created_now()
        self.format = LogprobFormatter(state.tokenizer, body.top_logprobs or 0)
        self._sequence_number = 0

    async def whole(self, generation: Generation) -> Response:
        answer = (await self.conversation.answers(generation))[0]
        output = []
        if answer.content or not answer.calls:
            part = self._part(answer.content or "", answer.deltas)
            output.append(self._message(_status(answer.finish_reason), [part]))
        output += [_function_call(call) for call in answer.calls]
        response = self._response(generation, answer.finish_reason, output)
        return json_response(response, generation.headers())

    # --- a stream

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        deltas: list[Delta] = []
        text, has_begun, is_open, finish, calls = "", False, False, None, []
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        async for piece in self.conversation.pieces(generation):
            if not has_begun:
                has_begun = True
                started = self._response(generation, None, [])
                yield self._event("response.created", response=started)
                yield self._event("response.in_progress", response=started)
            finish, calls = piece.finish_reason, piece.calls
            deltas.append(piece.delta)
            if piece.text or (finish and not calls and not is_open):
                if not is_open:
                    is_open = True
                    item = self._message("in_progress", [])
                    yield self._event("response.output_item.added", output_index=0, item=item)
                    yield self._event("response.content_part.added", **place, part=self._part("", []))
                text += piece.text
                logprobs = self._logprobs([piece.delta])
                yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=logprobs)
        output = []
        if is_open:
            part = self._part(text, deltas)
            yield self._event("response.output_text.done", **place, text=text, logprobs=part["logprobs"])
            yield self._event("response.content_part.done", **place, part=part)
            output.append(self._message(_status(finish), [part]))
            yield self._event("response.output_item.done", output_index=0, item=output[0])
        for call in calls:
            for event in self._call_events(_function_call(call), len(output)):
                yield event
            output.append(_function_call(call))
        final = self._response(generation, finish, output)
        yield self._event(f"response.{final['status']}", response=final)

    def _call_events(self, item: dict[str, Any], index: int) -> list[bytes]:
        place = {"item_id": item["id"], "output_index": index}
        arguments = item["arguments"]
        name = "response.function_call_arguments"
        return [
            self._event(
                "response.output_item.added",
                output_index=index,
                item=item | {"arguments": "", "status": "in_progress"},
            ),
            self._event(f"{name}.delta", **place, delta=arguments),
            self._event(f"{name}.done", **place, name=item["name"], arguments=arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def error_event(self, error: APIError) -> bytes:
        detail = error.body()["error"]
        return self._event("error", code=str(detail["code"]), message=error.message, param=error.param)

    def _event(self, kind: str, **data: Any) -> bytes:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        return named_event(kind, {"type": kind, "sequence_number": number, **data})

    # --- parts

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.message_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, text: str, deltas: list[Delta]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(deltas)}

    def _logprobs(self, deltas: list[Delta]) -> list[dict[str, Any]]:
        return self.format.chat([entry for delta in deltas for entry in delta.logprobs or ()])["content"]

    def _response(self, generation: Generation, finish: str | None, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, chat = self.body, self.conversation.body
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
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": shown.get("text") or {"format": {"type": "text"}},
            "tool_choice": shown.get("tool_choice", "auto"),
            "tools": shown.get("tools", []),
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "truncation": "disabled",
            "usage": _usage(generation) if finish else None,
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _status(finish: str | None) -> str:
    if finish is None:
        return "in_progress"
    return "incomplete" if finish == "length" else "completed"


def _function_call(call: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": call["id"].replace("call_", "fc_"),
        "type": "function_call",
        "status": "completed",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
    }


def _usage(generation: Generation) -> dict[str, Any]:
    usage = generation.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
