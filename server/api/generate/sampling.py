"""Request fields -> `SamplingParams`, with every limit checked and every complaint naming its field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from server.api.generate.protocol import RepetitionDetection, SamplingFields
from server.api.generate.tokenizer import ServingTokenizer
from server.api.http.errors import APIError, invalid
from server.config import Settings
from server.core.request import RepetitionLimit, SamplingParams

if TYPE_CHECKING:
    from server.api.http.state import ServerState


def stop_strings(body: SamplingFields, settings: Settings) -> tuple[str, ...]:
    """`stop` as a tuple. 400 if there are too many, or one is empty or too long."""
    if body.stop is None:
        return ()
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if len(stop) > settings.max_stop_strings:
        raise invalid(f"stop has {len(stop)} entries; at most {settings.max_stop_strings} are allowed.", "stop")
    if any(not text for text in stop):
        raise invalid("stop must not contain an empty string.", "stop")
    if any(len(text) > settings.max_stop_length for text in stop):
        raise invalid(f"stop strings may have at most {settings.max_stop_length} characters.", "stop")
    return tuple(dict.fromkeys(stop))


def check_logprobs(value: int | None, param: str, settings: Settings, vocab_size: int) -> int | None:
    """A number of likeliest tokens within the server's limit; -1 (all) only where the limit itself is -1."""
    if value is None:
        return None
    limit = settings.max_logprobs
    if value == -1:
        if limit != -1:
            raise invalid(f"{param}: all logprobs (-1) are not offered here; at most {limit}.", param)
    elif limit != -1 and value > limit:
        raise invalid(f"{param} is {value}; at most {limit} are allowed here.", param)
    return min(value, vocab_size)


def check_token_ids(token_ids: list[int], param: str, vocab_size: int) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        raise invalid(f"{param}: token id {max(token_ids)} is not in the vocabulary (0 .. {vocab_size - 1}).", param)


def output_limit(
    requested: int | None, param: str, default: int | None, num_prompt_tokens: int, max_model_len: int, prompt: str
) -> int:
    """`max_tokens`, or what is left of the context (at most `default`). 400 if prompt and output do not fit.

    `param` and `prompt` are what the caller's route calls the limit and the prompt.
    """
    room = max_model_len - num_prompt_tokens
    if requested is not None and 0 <= requested <= room:
        return requested
    if requested is None and room > 0:
        return room if default is None else min(default, room)
    if requested is None:
        param, detail = prompt, "which leaves no room for an answer"
    else:
        detail = f"and {requested} more were asked for"
    raise APIError(
        f"This model's context has {max_model_len} tokens; the prompt has {num_prompt_tokens}, {detail}.",
        param=param,
        code="context_length_exceeded",
    )


def sampling_params(
    body: SamplingFields,
    state: ServerState,
    *,
    max_tokens: Sequence[int],
    max_tokens_param: str = "max_tokens",
    n: int = 1,
    logprobs: int | None,
    prompt_logprobs: int | None,
    pool: bool = False,
    repetition: RepetitionDetection | None = None,
) -> tuple[tuple[SamplingParams, ...], ...]:
    """[prompt][choice]: everything is looked at once, for all sequences. `max_tokens`: of each prompt."""
    tokenizer, default = state.tokenizer, state.sampling_defaults
    vocab_size = tokenizer.vocab_size
    if (body.min_tokens or 0) > (least := min(max_tokens)):
        raise invalid(f"min_tokens ({body.min_tokens}) is above {max_tokens_param} ({least}).", "min_tokens")
    stop_ids = body.stop_token_ids or []
    check_token_ids(stop_ids, "stop_token_ids", vocab_size)
    allowed = body.allowed_token_ids
    if allowed is not None:
        if not allowed:
            raise invalid("allowed_token_ids must not be empty.", "allowed_token_ids")
        check_token_ids(allowed, "allowed_token_ids", vocab_size)
    shared = SamplingParams(
        min_tokens=body.min_tokens or 0,
        temperature=_or(body.temperature, default.temperature),
        top_p=_or(body.top_p, default.top_p),
        top_k=max(default.top_k if body.top_k is None else body.top_k, 0),
        min_p=_or(body.min_p, default.min_p),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_or(body.repetition_penalty, default.repetition_penalty),
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
        bad_words_ids=_bad_words(body.bad_words, tokenizer),
        stop_token_ids=frozenset(stop_ids),
        eos_token_ids=tokenizer.eos_token_ids,
        ignore_eos=bool(body.ignore_eos),
        repetition=repetition_limit(body.repetition_detection or repetition),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        pool=pool,
    )
    seeds = [_seed(body.seed, index) for index in range(n)]
    return tuple(tuple(replace(shared, max_tokens=most, seed=seed) for seed in seeds) for most in max_tokens)


def repetition_limit(asked: RepetitionDetection | None) -> RepetitionLimit | None:
    """The same for the engine; None if nothing is to be looked for. 400 if the lengths are the wrong way round."""
    if asked is None or not asked.max_pattern_size:
        return None
    if asked.min_pattern_size > asked.max_pattern_size:
        param = "repetition_detection.min_pattern_size"
        raise invalid(f"{param} is above max_pattern_size.", param)
    return RepetitionLimit(asked.min_pattern_size, asked.max_pattern_size, asked.min_count)


def _seed(seed: int | None, index: int) -> int | None:
    """A seed of its own for each of n choices. -1 is no seed, as for vLLM and llama.cpp, and so is None.

    Python's generator drops the sign, so negative numbers are moved above all others.
    """
    if seed is None or seed == -1:
        return None
    return (seed if seed >= 0 else 2**65 + seed) + (index << 66)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not bias:
        return None
    result = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit()) or len(key) > 10 or int(key) >= vocab_size:
            raise invalid(f"logit_bias: {key[:20]!r} is not a token id (0 .. {vocab_size - 1}).", "logit_bias")
        if not -100 <= value <= 100:
            raise invalid(f"logit_bias: {value} is outside -100 .. 100.", "logit_bias")
        result[int(key)] = value
    return result


def _bad_words(words: list[str] | None, tokenizer: ServingTokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences to avoid: each word as it starts a text and as it follows a blank, like vLLM does."""
    if not words:
        return ()
    if len(words) > 256 or any(not word.strip() or len(word) > 256 for word in words):
        raise invalid("bad_words: up to 256 words of up to 256 characters, none of them empty.", "bad_words")
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        plain = word.lstrip()
        for text in (plain, " " + plain):
            token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if token_ids:
                sequences[token_ids] = None
    return tuple(sequences)
