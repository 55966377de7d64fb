"""What completions and chat have in common: reading the body, tokenising, building a `Generation`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api.generate.generation import Generation, PromptInput
from server.api.generate.protocol import SamplingFields
from server.api.generate.sampling import (
    check_logprobs,
    check_token_ids,
    output_limit,
    sampling_params,
    stop_strings,
)
from server.api.http.body import Body, parse_body
from server.api.http.errors import APIError, invalid
from server.api.http.sse import EventStream, until_disconnect
from server.api.http.state import ServerState

T = TypeVar("T", bound=Body)

# A body that takes longer than this to arrive is a stalled client.
_BODY_SECONDS = 120.0
# Bodies of the largest allowed size that may be arriving at once: bounds memory, whatever the number of connections.
_FULL_BODIES = 16


async def read_body(request: Request, model: type[T], state: ServerState) -> T:
    """The parsed body. APIError for one that is too large, too slow, or not valid."""
    limit = state.settings.max_body_bytes
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                state.body_bytes += len(chunk)
                if size > limit:
                    raise APIError(f"The request body is larger than {limit} bytes.", status=413)
                if state.body_bytes > limit * _FULL_BODIES:
                    raise APIError("Too many large requests are arriving.", status=503, retry_after=1)
                chunks.append(chunk)
    except TimeoutError:
        raise APIError("The request body did not arrive in time.", status=408) from None
    except ClientDisconnect:
        raise APIError("The client left before its request had arrived.", status=499) from None
    finally:
        state.body_bytes -= size
    return parse_body(model, b"".join(chunks))


def json_response(data: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(data), headers=headers, media_type="application/json")


@dataclass(slots=True, kw_only=True)
class Plan:
    """A validated request that only lacks its prompts' tokens."""

    state: ServerState
    body: SamplingFields
    request_id: str
    arrival_time: float
    tenant: Any
    headers: Any
    num_logprobs: int | None = None  # of output tokens
    num_prompt_logprobs: int | None = None
    max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"
    default_max_tokens: int | None = None  # None: what is left of the context
    grammar: Callable[[], Any] | None = None  # makes a fresh constraint for each choice

    def build(self, prompts: list[PromptInput]) -> Generation:
        """Check lengths and sizes and add n choices per prompt. APIError names what is wrong."""
        body, state = self.body, self.state
        settings, catalog, tokenizer = state.settings, state.catalog, state.tokenizer
        model_spec = catalog.split_model(body.model)
        choice = state.chooser.choose(body, model_spec, self.headers, self.tenant.name)
        stop = stop_strings(body, settings)
        n = body.n or 1
        if n > settings.max_n:
            raise invalid(f"n is {n}; at most {settings.max_n} are allowed here.", "n")
        most = max(settings.max_completion_prompts, settings.max_n)
        if n * len(prompts) > most:
            raise invalid(f"n times the number of prompts is {n * len(prompts)}; at most {most} are allowed.", "n")
        limits = [
            output_limit(
                self.max_tokens,
                self.max_tokens_param,
                self.default_max_tokens,
                len(prompt.token_ids),
                catalog.max_model_len,
            )
            for prompt in prompts
        ]
        longest = max(len(prompt.token_ids) + limit for prompt, limit in zip(prompts, limits, strict=True))
        choice = choice.within_memory(catalog, longest)
        logprobs = check_logprobs(self.num_logprobs, "logprobs", settings, tokenizer.vocab_size)
        prompt_logprobs = check_logprobs(self.num_prompt_logprobs, "prompt_logprobs", settings, tokenizer.vocab_size)
        num_entries = 0
        num_scored = sum(len(prompt.token_ids) for prompt in prompts)
        for wanted, positions in ((logprobs, sum(limits)), (prompt_logprobs, num_scored)):
            if wanted is not None:
                num_entries += n * positions * (1 + (tokenizer.vocab_size if wanted < 0 else wanted))
        if num_entries > settings.max_logprob_entries:
            raise invalid(
                f"{num_entries} log-probabilities may be needed, and one answer holds at most "
                f"{settings.max_logprob_entries}: lower max_tokens, n, logprobs or the number of prompts.",
                "prompt_logprobs" if logprobs is None else "logprobs",
            )
        generation = Generation(state, self.request_id, choice, body.model or catalog.name)
        generation.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        for prompt, limit in zip(prompts, limits, strict=True):
            for index in range(n):
                generation.add(
                    prompt,
                    sampling_params(
                        body,
                        settings,
                        tokenizer,
                        max_tokens=limit,
                        max_tokens_param=self.max_tokens_param,
                        logprobs=logprobs,
                        prompt_logprobs=prompt_logprobs,
                        index=index,
                    ),
                    stop=stop,
                    include_stop=bool(body.include_stop_str_in_output),
                    skip_special_tokens=body.skip_special_tokens is not False,
                    priority=choice.priority,
                    tenant=self.tenant.name,
                    cache_salt=body.cache_salt or "",
                    arrival_time=self.arrival_time,
                    grammar=self.grammar() if self.grammar else None,
                )
        state.metrics.observe_params_n(n)
        return generation

    def check_streaming(self) -> None:
        body = self.body
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream: true.", "stream_options")
        if body.stream and body.prompt_logprobs is not None:
            raise invalid("prompt_logprobs cannot be streamed.", "prompt_logprobs")


def truncate(token_ids: list[int], body: SamplingFields, max_model_len: int) -> list[int]:
    """What `truncate_prompt_tokens` keeps (-1: as many as the context holds with room for one more)."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return token_ids
    if keep == 0 or keep > max_model_len:
        raise invalid(f"truncate_prompt_tokens must be -1 or 1 .. {max_model_len}.", "truncate_prompt_tokens")
    keep = max_model_len - 1 if keep == -1 else keep
    return token_ids[:keep] if body.truncation_side == "right" else token_ids[-keep:]


async def encode_prompt(
    text: str, add_special_tokens: bool, state: ServerState, param: str, is_cut: bool = False
) -> PromptInput:
    """Tokenise; 400 for a text without tokens, or (unless it `is_cut` afterwards) one that cannot fit at best."""
    if len(text) > state.tokenizer.longest_token * state.catalog.max_model_len and not is_cut:
        raise APIError(
            f"The prompt has {len(text)} characters, far more than {state.catalog.max_model_len} tokens can hold.",
            param=param,
            code="context_length_exceeded",
        )
    try:
        token_ids = await state.tokenizer.encode_async(text, add_special_tokens)
    except UnicodeEncodeError:
        raise invalid(f"{param} is not valid Unicode.", param) from None
    if not token_ids:
        raise invalid(f"{param} is empty: there is nothing to continue.", param)
    return PromptInput(token_ids, text)


def check_prompt_ids(token_ids: list[int], state: ServerState, param: str) -> PromptInput:
    if not token_ids:
        raise invalid(f"{param} is empty: there is nothing to continue.", param)
    if any(type(token_id) is not int for token_id in token_ids):
        raise invalid(f"{param} must hold whole numbers only.", param)
    if min(token_ids) < 0:
        raise invalid(f"{param}: token ids are not negative.", param)
    check_token_ids(token_ids, param, state.tokenizer.vocab_size)
    return PromptInput(token_ids)


async def respond(
    request: Request,
    generation: Generation,
    stream: bool,
    whole: Callable[[Generation], Awaitable[Response]],
    events: Callable[[Generation], AsyncIterator[bytes]],
    error_event: Callable[[APIError], bytes] | None = None,
) -> Response:
    """Run the generation as one answer or as a stream. Whatever happens, nothing of it is left running."""

    carried = request.scope["state"]
    carried["generation"] = generation  # for log and traces
    asked = [sequence.request for sequence in generation.sequences]
    num_tokens = sum(len(one.prompt_token_ids) + one.sampling.max_tokens for one in asked)
    generation.state.limits.spend(carried["tenant"], len(asked), num_tokens)

    async def run() -> Response:
        handed_over = False
        try:
            await generation.start()
            if not stream:
                return await whole(generation)
            handed_over = True
            return EventStream(events(generation), generation.headers(), generation.close, error_event)
        finally:
            if not handed_over:
                await generation.close()

    return await until_disconnect(request, run())


def created_now() -> int:
    return int(time.time())
