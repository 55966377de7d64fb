"""Ollama's /api/chat and /api/generate: answers as JSON objects, whole and one per line."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.answer_parts import CallPart, Reasoning, Text
from server.api.generate.conversation import Call, Piece
from server.api.generate.generation import Generation, now
from server.api.generate.json_text import is_json
from server.api.generate.logprobs import LogprobFormatter
from server.api.generate.serving import json_response, off_loop, read_body, respond
from server.api.generate.submission import Caller
from server.api.http.errors import APIError
from server.api.http.sse import dumps, listed
from server.api.http.state import ServerState
from server.api.ollama.convert import Talk, chat, generate, model_name
from server.api.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest, OllamaRequest

LINES = "application/x-ndjson"


async def ollama_chat(request: Request, state: ServerState) -> Response:
    body = await read_body(request, OllamaChatRequest, state)
    model, body.model = body.model, model_name(body.model, state)
    if not body.messages:
        return _loaded(model, {"message": {"role": "assistant", "content": ""}})
    return await _answer(request, state, body, chat(body, state), is_chat=True)


async def ollama_generate(request: Request, state: ServerState) -> Response:
    body = await read_body(request, OllamaGenerateRequest, state)
    model, body.model = body.model, model_name(body.model, state)
    if not body.prompt:
        return _loaded(model, {"response": ""})
    return await _answer(request, state, body, generate(body, state), is_chat=False)


async def _answer(request: Request, state: ServerState, body: OllamaRequest, talk: Talk, is_chat: bool) -> Response:
    caller = Caller.of(request)
    generation = await talk.generation(caller, f"ollama-{caller.request_id}")
    call = OllamaCall(state, talk, body, is_chat)
    return await respond(
        request, generation, body.stream is not False, call.whole, call.lines, ollama_error_line, media_type=LINES
    )


def ollama_error_line(error: APIError) -> bytes:
    return _line(error.ollama_body())


def timestamp() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _loaded(model: str, empty: dict[str, Any]) -> Response:
    """The answer to a request without text, by which clients load a model: this one is."""
    return json_response({"model": model, "created_at": timestamp(), **empty, "done": True, "done_reason": "load"})


def _line(data: dict[str, Any]) -> bytes:
    return dumps(data) + b"\n"


class OllamaCall:
    """One call and how its answer is written."""

    def __init__(self, state: ServerState, talk: Talk, body: OllamaRequest, is_chat: bool) -> None:
        self.talk = talk
        self.is_chat = is_chat
        self.with_logprobs = bool(body.logprobs)
        self.format = LogprobFormatter(state.tokenizer, body.top_logprobs or 0)

    async def whole(self, generation: Generation) -> Response:
        said = _Said()
        scored: list[bytes] = []
        async for piece in self.talk.pieces(generation):
            said.add(piece)
            scored.append(await self._scored(piece))
        answer = self._written(generation, said) | ({"logprobs": listed(scored)} if self.with_logprobs else {})
        return json_response(answer | self._end(generation, piece), generation.headers())

    async def lines(self, generation: Generation) -> AsyncGenerator[bytes]:
        said = _Said()
        async for piece in self.talk.pieces(generation):
            said.add(piece)
            scored = await self._scored(piece)
            if said.is_empty and not scored:
                continue
            line = self._written(generation, said) | ({"logprobs": listed([scored])} if scored else {})
            yield _line(line | {"done": False})
            said.clear()
        yield _line(self._written(generation, said) | self._end(generation, piece))

    def _written(self, generation: Generation, said: _Said) -> dict[str, Any]:
        thinking = {"thinking": said.thinking} if said.thinking else {}
        content: dict[str, Any]
        if self.is_chat:
            calls = {"tool_calls": said.calls} if said.calls else {}
            content = {"message": {"role": "assistant", "content": said.text, **thinking, **calls}}
        else:
            content = {"response": said.text, **thinking}
        return {"model": generation.model_id, "created_at": timestamp(), **content}

    async def _scored(self, piece: Piece) -> bytes:
        """Log-probabilities as they are written: a part for `listed`."""
        entries = piece.delta.logprobs or ()
        return await off_loop(self.format.chat_entries, entries, num_scored=self.format.count(len(entries)))

    def _end(self, generation: Generation, last: Piece) -> dict[str, Any]:
        """Durations in nanoseconds. `load_duration` is the time in the queue: nothing is loaded."""
        phases = {name: int((end - begin) * 1e9) for name, begin, end in generation.phases()}
        usage = generation.usage()
        return {
            "done": True,
            "done_reason": "length" if last.finish_reason == "length" else "stop",
            "total_duration": int((now() - generation.submission.caller.arrival_time) * 1e9),
            "load_duration": phases.get("queue", 0),
            "prompt_eval_count": usage["prompt_tokens"],
            "prompt_eval_duration": phases.get("prefill", 0),
            "eval_count": usage["completion_tokens"],
            "eval_duration": max(phases.get("decode", 0), 1),  # clients divide by it
            "size": generation.size_summary(),
        } | generation.timing_report()


class _Said:
    """What has come and was not written yet. A call counts once its arguments are whole; one that was cut does not."""

    def __init__(self) -> None:
        self._open: Call | None = None
        self._num_calls = 0
        self.clear()

    def clear(self) -> None:
        self.text = self.thinking = ""
        self.calls: list[dict[str, Any]] = []

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.thinking or self.calls)

    def add(self, piece: Piece) -> None:
        for part in piece.parts:
            if isinstance(part, CallPart) and part.id is None:
                assert self._open is not None
                self._open.arguments += part.arguments
                continue
            self._close()
            if isinstance(part, CallPart):
                self._open = Call(part.id or "", part.name or "", part.arguments)
            elif isinstance(part, Reasoning):
                self.thinking += part.text
            elif isinstance(part, Text):
                self.text += part.text
        if piece.finish_reason is not None:
            self._close()

    def _close(self) -> None:
        call, self._open = self._open, None
        if call is not None and is_json(call.arguments):
            # One object per line: line breaks of the model's own JSON stand between its tokens, never in a text.
            arguments = call.arguments.replace("\n", " ").replace("\r", " ")
            function = {"index": self._num_calls, "name": call.name, "arguments": orjson.Fragment(arguments)}
            self._num_calls += 1
            self.calls.append({"id": call.id, "function": function})
