"""/v1/completions: the answer of a `Continuation`, whole and streamed, with the prompt in front if it is echoed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api.completions.convert import Continuation
from server.api.completions.protocol import CompletionRequest
from server.api.generate.chunks import ChunkWriter, chunk_events
from server.api.generate.conversation import Piece
from server.api.generate.generation import Delta, Generation, Sequence
from server.api.generate.logprobs import LogprobFormatter
from server.api.generate.serving import created_now, json_response, read_body, respond, written
from server.api.generate.submission import Caller
from server.api.http.state import ServerState
from server.core.request import TokenLogprobs


async def create_completion(request: Request, state: ServerState) -> Response:
    body = await read_body(request, CompletionRequest, state)
    caller = Caller.of(request, body.request_id)
    call = CompletionCall(state, body, caller.request_id)
    generation = await call.continuation.generation(caller, call.id)
    return await respond(request, generation, bool(body.stream), call.whole, call.events)


class CompletionCall(ChunkWriter):
    """One call and how its answer is written."""

    text_head = b',"text":'
    text_tail = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]'

    def __init__(self, state: ServerState, body: CompletionRequest, request_id: str) -> None:
        self.state = state
        self.body = body
        self.id = f"cmpl-{request_id}"
        self.created = created_now()
        self.continuation = Continuation(state, body)
        self.echo = self.continuation.echo
        self.with_logprobs = body.logprobs is not None
        self.is_plain = not (self.with_logprobs or body.return_token_ids)
        self.format = LogprobFormatter(
            state.tokenizer, body.logprobs or 0, as_token_ids=bool(body.return_tokens_as_token_ids)
        )

    def usage(self, generation: Generation) -> dict[str, Any]:
        return generation.usage()

    # --- one answer

    async def whole(self, generation: Generation) -> Response:
        parts: list[list[Delta]] = [[] for _ in generation.sequences]
        async for delta in generation.deltas():
            parts[delta.index].append(delta)
        choices = []
        for sequence in generation.sequences:
            num_scored = self._num_scored(sequence, self.with_logprobs * sequence.num_output_tokens)
            choices.append(await written(self._choice, sequence, parts[sequence.index], num_scored=num_scored))
        answer = self.envelope(generation) | {"choices": choices, "usage": self.usage(generation)}
        return json_response(answer | generation.timing_report(), generation.headers())

    def _num_scored(self, sequence: Sequence, num_positions: int) -> int:
        """Log-probabilities of a choice at so many positions and at those of its prompt."""
        num_scored, num_top = self.format.count(num_positions), self.continuation.num_prompt_logprobs
        if num_top is not None:
            num_scored += self.format.count(len(sequence.prompt.token_ids), num_top)
        return num_scored

    def _choice(self, sequence: Sequence, deltas: list[Delta]) -> dict[str, Any]:
        body, last = self.body, deltas[-1]
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        text = "".join(delta.text for delta in deltas)
        logprobs = None
        if self.with_logprobs:
            entries = [entry for delta in deltas for entry in delta.logprobs or ()]
            offsets = [offset for delta in deltas for offset in delta.offsets]
            logprobs = self._logprobs(sequence, entries, token_ids, offsets)
        choice: dict[str, Any] = {
            "index": sequence.index,
            "text": self.continuation.prompt_text(sequence.prompt) + text if self.echo else text,
            "logprobs": logprobs,
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.format.prompt(sequence.prompt_scores, body.prompt_logprobs)
        if body.return_token_ids:
            choice["prompt_token_ids"] = sequence.request.prompt_token_ids
            choice["token_ids"] = token_ids
        return choice

    def _logprobs(
        self,
        sequence: Sequence,
        entries: list[TokenLogprobs],
        token_ids: list[int],
        offsets: list[int],
    ) -> dict[str, Any]:
        if not self.echo:
            return self.format.legacy(entries, token_ids, offsets)
        return self.format.legacy(
            [*sequence.prompt_scores, *entries],
            [*sequence.prompt.token_ids, *token_ids],
            [*self.continuation.prompt_offsets(sequence.prompt), *offsets],
        )

    def envelope(self, generation: Generation) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": generation.model_id,
            "system_fingerprint": self.state.served.fingerprint,
            "size": generation.size_summary(),
        }

    # --- a stream

    def events(self, generation: Generation) -> AsyncGenerator[bytes]:
        return chunk_events(self, generation, self.continuation.read, self.body, self.state.settings)

    @property
    def is_only_text(self) -> bool:
        return self.is_plain

    def num_scored(self, generation: Generation, piece: Piece, is_first: bool) -> int:
        if not self.with_logprobs:
            return 0
        num_positions = len(piece.delta.token_ids)
        if is_first and self.echo:
            return self._num_scored(generation.sequences[piece.index], num_positions)
        return self.format.count(num_positions)

    def first(self, generation: Generation, piece: Piece) -> dict[str, Any] | None:
        return None

    def choice(self, generation: Generation, piece: Piece, is_first: bool) -> dict[str, Any] | None:
        delta, sequence = piece.delta, generation.sequences[piece.index]
        text = delta.text
        counts_tokens = bool(delta.token_ids) and (self.echo or not is_first or not self.is_plain)
        if not (text or delta.finish_reason or counts_tokens):
            return None  # prompt and its logprobs go out with the first token
        if self.echo and is_first:
            text = self.continuation.prompt_text(sequence.prompt) + text
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.with_logprobs and (delta.token_ids or (is_first and self.echo)):
            entries = list(delta.logprobs or ())
            if is_first:
                choice["logprobs"] = self._logprobs(sequence, entries, delta.token_ids, delta.offsets)
            else:
                choice["logprobs"] = self.format.legacy(entries, delta.token_ids, delta.offsets)
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if is_first:
                choice["prompt_token_ids"] = sequence.request.prompt_token_ids
        return choice
