"""/v1/chat/completions: the answer of a `Conversation` in OpenAI's two shapes, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api.chat.protocol import ChatCompletionRequest
from server.api.generate.answer_parts import CallPart, Reasoning, Text
from server.api.generate.chunks import ChunkWriter, chunk_events
from server.api.generate.conversation import Answer, Call, Conversation, Piece
from server.api.generate.generation import Generation
from server.api.generate.history import message_text
from server.api.generate.logprobs import LogprobFormatter
from server.api.generate.serving import created_now, json_response, read_body, respond, written
from server.api.generate.submission import Caller
from server.api.http.state import ServerState


async def create_chat_completion(request: Request, state: ServerState) -> Response:
    body = await read_body(request, ChatCompletionRequest, state)
    caller = Caller.of(request, body.request_id)
    call = ChatCall(state, body, caller.request_id)
    generation = await call.conversation.generation(caller, call.id)
    return await respond(request, generation, bool(body.stream), call.whole, call.events)


class ChatCall(ChunkWriter):
    """One call and how its answer is written."""

    text_head = b',"delta":{"content":'
    text_tail = b'},"logprobs":null,"finish_reason":null}]'

    def __init__(self, state: ServerState, body: ChatCompletionRequest, request_id: str) -> None:
        self.state = state
        self.body = body
        self.id = f"chatcmpl-{request_id}"
        self.created = created_now()
        self.conversation = Conversation(state, body)
        self.num_logprobs = self.conversation.num_logprobs
        self.is_plain = self.num_logprobs is None and not body.return_token_ids
        self.role = state.settings.response_role
        if body.add_generation_prompt is False or body.continue_final_message:
            self.role = body.messages[-1].role
        self.echoed = message_text(body.messages[-1]) if body.echo and body.messages[-1].role == self.role else ""
        self.format = LogprobFormatter(
            state.tokenizer, self.num_logprobs or 0, as_token_ids=bool(body.return_tokens_as_token_ids)
        )

    def usage(self, generation: Generation) -> dict[str, Any]:
        return self.conversation.usage(generation)

    # --- one answer

    async def whole(self, generation: Generation) -> Response:
        answers = await self.conversation.answers(generation)
        answer = self._envelope(generation, "chat.completion")
        choices = []
        for index, item in enumerate(answers):
            num_scored = 0
            if self.num_logprobs is not None:
                num_scored = self.format.count(generation.sequences[index].num_output_tokens)
            choices.append(await written(self._choice, index, item, num_scored=num_scored))
        answer |= {"choices": choices, "usage": self.usage(generation)}
        first = generation.sequences[0]
        if self.body.prompt_logprobs is not None:
            scores, num_top = first.prompt_scores, self.body.prompt_logprobs
            num_scored = self.format.count(len(scores), num_top)
            answer["prompt_logprobs"] = await written(self.format.prompt, scores, num_top, num_scored=num_scored)
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = first.request.prompt_token_ids
        return json_response(answer | generation.timing_report(), generation.headers())

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        content = self.echoed + (answer.content or "") if self.echoed else answer.content
        message: dict[str, Any] = {"role": self.role, "content": content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [_tool_call(call) for call in answer.calls]
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self.num_logprobs is not None:
            choice["logprobs"] = self.format.chat([e for delta in answer.deltas for e in delta.logprobs or ()])
        if self.body.return_token_ids:
            choice["token_ids"] = [token_id for delta in answer.deltas for token_id in delta.token_ids]
        return choice

    def _envelope(self, generation: Generation, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": generation.model_id,
            "system_fingerprint": self.state.served.fingerprint,
            "size": generation.size_summary(),
        }

    # --- a stream

    def events(self, generation: Generation) -> AsyncGenerator[bytes]:
        return chunk_events(self, generation, self.conversation.read, self.body, self.state.settings)

    def envelope(self, generation: Generation) -> dict[str, Any]:
        return self._envelope(generation, "chat.completion.chunk")

    @property
    def is_only_text(self) -> bool:
        return self.is_plain and not self.conversation.tools.reads

    def num_scored(self, generation: Generation, piece: Piece, is_first: bool) -> int:
        return 0 if self.num_logprobs is None else self.format.count(len(piece.delta.token_ids))

    def first(self, generation: Generation, piece: Piece) -> dict[str, Any] | None:
        # The role goes out with the first token: clients take the first chunk's time for time to first token.
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": {"role": self.role, "content": self.echoed},
            "logprobs": None,
            "finish_reason": None,
        }
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = generation.sequences[piece.index].request.prompt_token_ids
        return choice

    def choice(self, generation: Generation, piece: Piece, is_first: bool) -> dict[str, Any] | None:
        delta = piece.delta
        text = "".join(part.text for part in piece.parts if isinstance(part, Text))
        thought = "".join(part.text for part in piece.parts if isinstance(part, Reasoning))
        calls = [_call_delta(part) for part in piece.parts if isinstance(part, CallPart)]
        change: dict[str, Any] = {"content": text} if text else {}
        if thought:
            change["reasoning_content"] = thought
        if calls:
            change["tool_calls"] = calls
        if not (change or piece.finish_reason or not self.is_plain or generation_is_counted(self.body)):
            return None
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": change,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason:
            choice["stop_reason"] = delta.stop_reason
        if self.num_logprobs is not None and delta.token_ids:
            choice["logprobs"] = self.format.chat(list(delta.logprobs or ()))
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice


def generation_is_counted(body: ChatCompletionRequest) -> bool:
    """Whether every token is worth a chunk, for the sake of its usage."""
    return bool(body.stream_options and body.stream_options.continuous_usage_stats)


def _tool_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta(part: CallPart) -> dict[str, Any]:
    function = {"arguments": part.arguments}
    if part.id is None:
        return {"index": part.index, "function": function}
    return {"index": part.index, "id": part.id, "type": "function", "function": {"name": part.name, **function}}
