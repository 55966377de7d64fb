"""What all routes that generate have in common: reading the body, tokenising, running a `Generation`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api.generate.generation import Generation, PromptInput
from server.api.generate.protocol import SamplingFields
from server.api.generate.sampling import check_token_ids
from server.api.http.body import Body, parse_body
from server.api.http.errors import APIError, invalid
from server.api.http.sse import EventStream, JSONParts, Written, dumped_parts, dumps, until_disconnect
from server.api.http.state import ServerState

T = TypeVar("T", bound=Body)
R = TypeVar("R")

# A body that takes longer than this to arrive is a stalled client.
_BODY_SECONDS = 120.0
# Bodies of the largest allowed size that may be arriving at once: bounds memory, whatever the number of connections.
_FULL_BODIES = 16


async def read_body(request: Request, model: type[T], state: ServerState) -> T:
    """The parsed body. APIError for one that is too large, too slow, or not valid."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"Content-Encoding {encoding[:40]!r} is not understood: send the body as it is."
        raise APIError(message, status=415, headers={"accept-encoding": "identity"})
    limit = state.settings.max_body_bytes
    chunks: list[bytes] = []
    size = 0
    tenant = request.scope["state"]["tenant"].name
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                state.arriving[tenant] += len(chunk)
                if size > limit:
                    raise APIError(f"The request body is larger than {limit} bytes.", status=413)
                if is_crowded(state.arriving, tenant, limit * _FULL_BODIES):
                    raise APIError("Too many large requests are arriving.", status=503, retry_after=1)
                chunks.append(chunk)
    except TimeoutError:
        raise APIError("The request body did not arrive in time.", status=408) from None
    except ClientDisconnect:
        raise APIError("The client left before its request had arrived.", status=499) from None
    finally:
        state.arriving[tenant] -= size
        if not state.arriving[tenant]:
            del state.arriving[tenant]
    return parse_body(model, b"".join(chunks))


_LONG = 1 << 20  # bytes of an answer
WRITTEN_INLINE = 5000  # log-probabilities that are written on the event loop: a few milliseconds


async def written(make: Callable[..., Any], *arguments: Any, num_scored: int) -> Written:
    """JSON of `make(*arguments)`, a part of an answer that holds `num_scored` log-probabilities."""

    def write() -> Written:
        return Written(dumps(make(*arguments)))

    return await off_loop(write, num_scored=num_scored)


async def off_loop(make: Callable[..., R], *arguments: Any, num_scored: int) -> R:
    """`make(*arguments)`, which writes `num_scored` log-probabilities.

    Each takes about a microsecond, and there may be millions: beyond a few they are written in a thread, from which the
    event loop gets its turns; and of few in each of many answers it gets one after each.
    """
    if num_scored > WRITTEN_INLINE:
        return await asyncio.to_thread(make, *arguments)
    if num_scored > WRITTEN_INLINE // 10:
        await asyncio.sleep(0)
    return make(*arguments)


def is_crowded(arriving: Counter[str], tenant: str, most: int) -> bool:
    """Whether more bytes arrive than `most`, and this tenant's are more than its share: one key's uploads cost others
    no refusals, and at most double the memory."""
    return arriving.total() > most and arriving[tenant] > most / len(arriving)


def json_response(data: Any, headers: dict[str, str] | None = None) -> Response:
    parts = dumped_parts(data)
    if sum(map(len, parts)) > _LONG:
        return JSONParts(parts, headers)
    return Response(b"".join(parts), headers=headers, media_type="application/json")


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
    text: str, add_special_tokens: bool, state: ServerState, param: str, is_cut: str | None = None
) -> PromptInput:
    """`encode_prompts` for one."""
    return (await encode_prompts([text], add_special_tokens, state, param, is_cut))[0]


async def encode_prompts(
    texts: list[str], add_special_tokens: bool, state: ServerState, param: str, is_cut: str | None = None
) -> list[PromptInput]:
    """Tokenise, off the event loop if they are long all together; 400 for a text without tokens, or one that cannot
    fit at best.

    Of texts that `is_cut` afterwards, ends that cannot remain are cut off before.
    """
    most = state.tokenizer.longest_token * state.catalog.max_model_len
    if not is_cut and (longer := next((text for text in texts if len(text) > most), None)):
        raise too_long(longer, state, param)
    texts = [text[:most] if is_cut == "right" else text[-most:] for text in texts]
    try:
        encoded = await state.tokenizer.encode_many(texts, add_special_tokens)
    except UnicodeError:
        raise invalid(f"{param} is not valid Unicode.", param) from None
    if not all(encoded):
        raise invalid(f"{param} is empty: there is nothing to continue.", param)
    return [PromptInput(token_ids, text) for token_ids, text in zip(encoded, texts, strict=True)]


async def read_prompts(
    value: Any, state: ServerState, param: str, add_special_tokens: bool = True, is_cut: str | None = None
) -> list[PromptInput]:
    """Tokenised prompts of a `Prompt`. 400 for anything that is not text, texts, ids or lists of ids."""
    most = state.settings.max_completion_prompts
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(prompt, str | list) for prompt in value):
        raise invalid(f"{param} must be text, a list of texts, token ids, or a list of lists of token ids.", param)
    if not value:
        raise invalid(f"{param} is an empty list.", param)
    if len(value) > most:
        raise invalid(f"{param} has {len(value)} entries; at most {most} are allowed here.", param)
    # What is cheap to refuse first.
    given = {at: check_prompt_ids(ids, state, param) for at, ids in enumerate(value) if isinstance(ids, list)}
    texts = [prompt for prompt in value if isinstance(prompt, str)]
    encoded = iter(await encode_prompts(texts, add_special_tokens, state, param, is_cut))
    return [given[at] if at in given else next(encoded) for at in range(len(value))]


def too_long(text: str, state: ServerState, param: str) -> APIError:
    return APIError(
        f"{param} has {len(text)} characters, far more than {state.catalog.max_model_len} tokens can hold.",
        param=param,
        code="context_length_exceeded",
    )


def check_prompt_ids(token_ids: list[int], state: ServerState, param: str) -> PromptInput:
    if not token_ids:
        raise invalid(f"{param} is empty: there is nothing to continue.", param)
    if len(token_ids) > 4 * state.catalog.max_model_len:  # long lists are not even looked through
        raise invalid(f"{param} has {len(token_ids)} tokens; the context has {state.catalog.max_model_len}.", param)
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
    events: Callable[[Generation], AsyncGenerator[bytes]] | None = None,
    error_event: Callable[[APIError], bytes] | None = None,
    media_type: str = "text/event-stream",
) -> Response:
    """Run the generation as one answer, or as a stream. Whatever happens, nothing of it is left running."""

    carried = request.scope["state"]
    carried["generation"] = generation  # for log and traces
    asked = [sequence.request for sequence in generation.sequences]
    num_tokens = sum(len(one.prompt_token_ids) + one.sampling.max_tokens for one in asked)
    generation.state.limits.spend(carried["tenant"], len(asked), num_tokens)

    async def run() -> Response:
        handed_over = False
        try:
            await generation.start()
            if not stream or events is None:
                return await whole(generation)
            handed_over = True
            return EventStream(events(generation), generation.headers(), generation.close, error_event, media_type)
        finally:
            if not handed_over:
                await generation.close()

    return await until_disconnect(request, run())


def created_now() -> int:
    return int(time.time())
