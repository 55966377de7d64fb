"""/v1/chat/completions: the answer of a `Conversation` in OpenAI's two shapes, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.api.chat.protocol import ChatCompletionRequest
from server.api.generate.conversation import Answer, Conversation, Piece
from server.api.generate.generation import Generation
from server.api.generate.logprobs import LogprobFormatter
from server.api.generate.serving import created_now, json_response, read_body, respond
from server.api.generate.tools import message_text
from server.api.http.sse import DONE, event
from server.api.http.state import ServerState


async def create_chat_completion(request: Request, state: ServerState) -> Response:
    body = await read_body(request, ChatCompletionRequest, state)
    call = ChatCall(state, body, body.request_id or request.scope["state"]["request_id"])
    generation = await call.conversation.generation(request, call.id)
    return await respond(request, generation, bool(body.stream), call.whole, call.events)


class ChatCall:
    """One call and how its answer is written."""

    def __init__(self, state: ServerState, body: ChatCompletionRequest, request_id: str) -> None:
        self.state = state
        self.body = body
        self.id = f"chatcmpl-{request_id}"
        self.created = created_now()
        self.conversation = Conversation(state, body)
        self.num_logprobs = self.conversation.num_logprobs
        self.role = state.settings.response_role
        if body.add_generation_prompt is False or body.continue_final_message:
            self.role = body.messages[-1].role
        self.echoed = message_text(body.messages[-1]) if body.echo and body.messages[-1].role == self.role else ""
        self.format = LogprobFormatter(
            state.tokenizer, self.num_logprobs or 0, as_token_ids=bool(body.return_tokens_as_token_ids)
        )

    # --- one answer

    async def whole(self, generation: Generation) -> Response:
        answers = await self.conversation.answers(generation)
        answer = self._envelope(generation, "chat.completion")
        answer |= {
            "choices": [self._choice(index, item) for index, item in enumerate(answers)],
            "usage": generation.usage(),
        }
        first = generation.sequences[0]
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self.format.prompt(first.prompt_logprobs or [])
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = first.request.prompt_token_ids
        return json_response(answer | generation.timing_report(), generation.headers())

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        content = self.echoed + (answer.content or "") if self.echoed else answer.content
        message: dict[str, Any] = {"role": self.role, "content": content}
        if answer.calls:
            message["tool_calls"] = answer.calls
        choice = {
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
            "system_fingerprint": self.state.model.fingerprint,
            "size": generation.size_summary(),
        }

    # --- a stream

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        options = self.body.stream_options
        with_usage = self.state.settings.enable_force_include_usage or bool(options and options.include_usage)
        every_usage = bool(options and options.continuous_usage_stats) and with_usage
        envelope = self._envelope(generation, "chat.completion.chunk")
        is_plain = not (self.num_logprobs is not None or self.body.return_token_ids or every_usage)
        # Everything but the text is the same in every plain chunk of a choice: written once.
        head = b"data: " + orjson.dumps(envelope)[:-1]
        heads = [head + b',"choices":[{"index":%d,"delta":{"content":' % s.index for s in generation.sequences]
        tail = b'},"logprobs":null,"finish_reason":null}]}\n\n'
        has_begun = [False] * len(heads)
        async for piece in self.conversation.pieces(generation):
            index, text = piece.index, piece.text
            # The role goes out with the first token: clients take the first chunk's time for time to first token.
            prefix = b""
            if not has_begun[index]:
                has_begun[index] = True
                prefix = self._role_event(envelope, generation, index, every_usage)
            if is_plain and not piece.finish_reason:
                if text or prefix:
                    yield prefix + (heads[index] + orjson.dumps(text) + tail if text else b"")
                continue
            yield prefix + self._chunk(envelope, generation, piece, every_usage)
        if with_usage:
            yield event(envelope | {"choices": [], "usage": generation.usage()} | generation.timing_report())
        yield DONE

    def _role_event(self, envelope: dict[str, Any], generation: Generation, index: int, with_usage: bool) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": self.role, "content": self.echoed},
            "logprobs": None,
            "finish_reason": None,
        }
        chunk = envelope | {"choices": [choice]}
        if self.body.return_token_ids:
            chunk["prompt_token_ids"] = generation.sequences[index].request.prompt_token_ids
        if with_usage:
            chunk["usage"] = generation.usage()
        return event(chunk)

    def _chunk(self, envelope: dict[str, Any], generation: Generation, piece: Piece, with_usage: bool) -> bytes:
        delta = piece.delta
        change: dict[str, Any] = {"content": piece.text} if piece.text or not piece.finish_reason else {}
        if piece.calls:
            change["tool_calls"] = [{"index": place, **call} for place, call in enumerate(piece.calls)]
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
        chunk = envelope | {"choices": [choice]}
        if with_usage:
            chunk["usage"] = generation.usage()
        return event(chunk)
