"""/v1/completions: prompts in any of four forms, echo with prompt logprobs, streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.api.completions.protocol import CompletionRequest
from server.api.generate.detokenizer import Detokenizer
from server.api.generate.generation import Delta, Generation, PromptInput, Sequence
from server.api.generate.grammar import grammar_factory
from server.api.generate.logprobs import LogprobFormatter
from server.api.generate.serving import (
    Plan,
    check_prompt_ids,
    created_now,
    encode_prompt,
    json_response,
    read_body,
    respond,
    truncate,
)
from server.api.http.errors import invalid
from server.api.http.sse import DONE, event
from server.api.http.state import ServerState
from server.core.request import TokenLogprobs


async def create_completion(request: Request, state: ServerState) -> Response:
    body = await read_body(request, CompletionRequest, state)
    carried = request.scope["state"]
    state.admission.check(carried["tenant"].name)
    call = CompletionCall(state, body, body.request_id or carried["request_id"])
    prompts = await call.prompts()
    plan = Plan(
        state=state,
        body=body,
        request_id=call.id,
        arrival_time=carried["arrival_time"],
        tenant=carried["tenant"],
        headers=request.headers,
        num_logprobs=body.logprobs,
        num_prompt_logprobs=call.num_prompt_logprobs,
        max_tokens=body.max_tokens,
        default_max_tokens=16,
        grammar=await grammar_factory(body, state),
    )
    plan.check_streaming()
    generation = plan.build(prompts)
    call.prepare(generation, prompts)
    return await respond(request, generation, bool(body.stream), call.whole, call.events)


class CompletionCall:
    """One call: its prompts and how its answer is written."""

    def __init__(self, state: ServerState, body: CompletionRequest, request_id: str) -> None:
        self.state = state
        self.body = body
        self.id = f"cmpl-{request_id}"
        self.created = created_now()
        self.echo = bool(body.echo)
        self.with_logprobs = body.logprobs is not None
        self.format = LogprobFormatter(
            state.tokenizer, body.logprobs or 0, as_token_ids=bool(body.return_tokens_as_token_ids)
        )
        self.echo_texts: list[str] = []
        self.n = body.n or 1
        if body.max_tokens == 0 and not self.echo and body.prompt_logprobs is None:
            raise invalid("max_tokens must be at least 1 unless echo or prompt_logprobs is asked for.", "max_tokens")

    @property
    def num_prompt_logprobs(self) -> int | None:
        if self.echo and self.with_logprobs:
            return max(self.body.logprobs, self.body.prompt_logprobs or 0) if self.body.logprobs >= 0 else -1
        return self.body.prompt_logprobs

    # --- prompts

    async def prompts(self) -> list[PromptInput]:
        """Tokenised prompts. 400 for anything that is not text, texts, ids or lists of ids."""
        body, state = self.body, self.state
        most = state.settings.max_completion_prompts
        value = body.prompt
        if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(prompt, str | list) for prompt in value):
            raise invalid("prompt must be text, a list of texts, token ids, or a list of lists of token ids.", "prompt")
        if not value:
            raise invalid("prompt is an empty list.", "prompt")
        if len(value) > most:
            raise invalid(f"prompt has {len(value)} entries; at most {most} are allowed here.", "prompt")
        special = body.add_special_tokens is not False
        is_cut = body.truncate_prompt_tokens is not None
        prompts = []
        for prompt in value:
            if isinstance(prompt, str):
                item = await encode_prompt(prompt, special, state, "prompt", is_cut)
            else:
                item = check_prompt_ids(prompt, state, "prompt")
            if is_cut:
                kept = truncate(item.token_ids, body, state.catalog.max_model_len)
                if len(kept) < len(item.token_ids):
                    item = PromptInput(kept)
            prompts.append(item)
        return prompts

    def prepare(self, generation: Generation, prompts: list[PromptInput]) -> None:
        """Echoed text comes first, and offsets of generated tokens count from its beginning."""
        if not self.echo:
            return
        skip = self.body.skip_special_tokens is not False
        for sequence in generation.sequences:
            prompt = prompts[sequence.index // self.n]
            if prompt.text is None:
                prompt.text = self.state.tokenizer.decode(prompt.token_ids, skip_special_tokens=skip)
            self.echo_texts.append(prompt.text)
            sequence.text_start = len(prompt.text)

    # --- one answer

    async def whole(self, generation: Generation) -> Response:
        parts: list[list[Delta]] = [[] for _ in generation.sequences]
        async for delta in generation.deltas():
            parts[delta.index].append(delta)
        choices = [self._choice(sequence, parts[sequence.index], generation) for sequence in generation.sequences]
        answer = self._envelope(generation) | {"choices": choices, "usage": generation.usage()}
        return json_response(answer | generation.timing_report(), generation.headers())

    def _choice(self, sequence: Sequence, deltas: list[Delta], generation: Generation) -> dict[str, Any]:
        body, last = self.body, deltas[-1]
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        text = "".join(delta.text for delta in deltas)
        logprobs = None
        if self.with_logprobs:
            entries = [entry for delta in deltas for entry in delta.logprobs or ()]
            offsets = [offset for delta in deltas for offset in delta.offsets]
            logprobs = self._logprobs(sequence, entries, token_ids, offsets)
        choice = {
            "index": sequence.index,
            "text": self.echo_texts[sequence.index] + text if self.echo else text,
            "logprobs": logprobs,
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.format.prompt(sequence.prompt_logprobs or [])
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
        if self.echo:
            prompt_ids = sequence.request.prompt_token_ids
            # A prompt of one token has nothing to score, and then the engine sends nothing.
            entries = [*(sequence.prompt_logprobs or [None] * len(prompt_ids)), *entries]
            offsets = [*self._prompt_offsets(prompt_ids), *offsets]
            token_ids = [*prompt_ids, *token_ids]
        return self.format.legacy(entries, token_ids, offsets)

    def _prompt_offsets(self, token_ids: list[int]) -> list[int]:
        detokenizer = Detokenizer(self.state.tokenizer, skip_special_tokens=self.body.skip_special_tokens is not False)
        offsets = []
        for token_id in token_ids:
            offsets.append(len(detokenizer.text))
            detokenizer.push(token_id)
        return offsets

    def _envelope(self, generation: Generation) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
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
        envelope = self._envelope(generation)
        is_plain = not (self.with_logprobs or self.body.return_token_ids or every_usage)
        # Everything but the text is the same in every plain chunk of a choice: written once.
        head = orjson.dumps(envelope)[:-1]
        heads = [
            b"data: " + head + b',"choices":[{"index":%d,"text":' % sequence.index for sequence in generation.sequences
        ]
        tail = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
        has_begun = [False] * len(heads)
        async for delta in generation.deltas():
            text, first = delta.text, not has_begun[delta.index]
            if self.echo and first:
                if not delta.token_ids and delta.finish_reason is None:
                    continue  # prompt and its logprobs go out with the first token
                text = self.echo_texts[delta.index] + text
            if is_plain and delta.finish_reason is None:
                if text:
                    has_begun[delta.index] = True
                    yield heads[delta.index] + orjson.dumps(text) + tail
                continue
            if not (text or delta.token_ids or delta.finish_reason):
                continue
            has_begun[delta.index] = True
            chunk = envelope | {"choices": [self._chunk_choice(generation, delta, text, first)]}
            if every_usage:
                chunk["usage"] = generation.usage()
            yield event(chunk)
        if with_usage:
            last = {"choices": [], "usage": generation.usage()}
            yield event(envelope | last | generation.timing_report())
        yield DONE

    def _chunk_choice(self, generation: Generation, delta: Delta, text: str, first: bool) -> dict[str, Any]:
        sequence = generation.sequences[delta.index]
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.with_logprobs and (delta.token_ids or (first and self.echo)):
            entries = list(delta.logprobs or ())
            if first:
                choice["logprobs"] = self._logprobs(sequence, entries, delta.token_ids, delta.offsets)
            else:
                choice["logprobs"] = self.format.legacy(entries, delta.token_ids, delta.offsets)
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = sequence.request.prompt_token_ids
        return choice
