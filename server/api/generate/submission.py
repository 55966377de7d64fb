"""What one HTTP request asks of the engine, checked and tokenised: the caller's part, which nobody changes any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from server.api.generate.protocol import RepetitionDetection, SamplingFields
from server.api.generate.sampling import check_logprobs, output_limit, sampling_params, stop_strings
from server.api.generate.size_choice import SizeChoice
from server.api.http.errors import invalid
from server.config import Settings
from server.core.request import SamplingParams

if TYPE_CHECKING:
    from server.api.http.state import ServerState
    from server.engine.extras.grammar import Grammar


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and when the request came in."""

    request_id: str
    arrival_time: float  # on the clock of time.monotonic
    tenant: str
    headers: Mapping[str, str]

    @classmethod
    def of(cls, request: Request, request_id: str | None = None) -> Caller:
        """`request_id`: the body's own, if it has one."""
        carried = request.scope["state"]
        return cls(
            request_id or carried["request_id"], carried["arrival_time"], carried["tenant"].name, request.headers
        )


@dataclass(slots=True)
class PromptInput:
    """A tokenised prompt; `text` is None until somebody needs it (a prompt that came as token ids)."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLimits:
    """How much of an answer is asked for, by which field. `logprobs` are those of output tokens."""

    max_tokens: int | None
    param: str = "max_tokens"
    prompt: str = "prompt"  # what the route calls that
    default: int | None = None  # None: what is left of the context
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    pool: bool = False  # no output but the mean of the prompt's states
    repetition: RepetitionDetection | None = None  # for bodies that say nothing of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One HTTP request on its way to the engine: `n` sequences for each prompt."""

    answer_id: str
    caller: Caller
    model: str  # as it was asked for
    prompts: tuple[PromptInput, ...]
    n: int
    sampling: tuple[tuple[SamplingParams, ...], ...]  # [prompt][choice]
    sizes: SizeChoice
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    cache_salt: str
    grammar: Callable[[], Grammar] | None = None  # makes a fresh constraint for each choice
    marks: Mapping[int, str] = field(default_factory=dict)  # special tokens that the answer's text keeps

    @classmethod
    def build(
        cls,
        state: ServerState,
        caller: Caller,
        body: SamplingFields,
        prompts: list[PromptInput],
        *,
        answer_id: str,
        limits: OutputLimits,
        grammar: Callable[[], Grammar] | None = None,
        marks: Mapping[int, str] | None = None,
    ) -> Submission:
        """APIError names the field at fault: lengths, sizes and numbers are checked against the server's limits."""
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream: true.", "stream_options")
        if body.stream and body.prompt_logprobs is not None:
            raise invalid("prompt_logprobs cannot be streamed.", "prompt_logprobs")
        settings, catalog, tokenizer = state.settings, state.catalog, state.tokenizer
        assert state.chooser is not None
        sizes = state.chooser.choose(body, catalog.split_model(body.model), caller.headers, caller.tenant)
        stop = stop_strings(body, settings)
        n = num_choices(body, len(prompts), settings)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        asked, room = (limits.max_tokens, limits.param, limits.default), catalog.max_model_len
        most = [output_limit(*asked, length, room, limits.prompt) for length in lengths]
        sizes = sizes.within_memory(catalog, max(map(sum, zip(lengths, most, strict=True))))
        if limits.pool:
            sizes = sizes.largest()
        logprobs = check_logprobs(limits.logprobs, "logprobs", settings, tokenizer.vocab_size)
        scored = check_logprobs(limits.prompt_logprobs, "prompt_logprobs", settings, tokenizer.vocab_size)
        _check_entries(((logprobs, n * sum(most)), (scored, n * sum(lengths))), state)
        sampling = sampling_params(
            body,
            state,
            max_tokens=most,
            max_tokens_param=limits.param,
            n=n,
            logprobs=logprobs,
            prompt_logprobs=scored,
            pool=limits.pool,
            repetition=limits.repetition,
        )
        return cls(
            answer_id=answer_id,
            caller=caller,
            model=body.model or catalog.name,
            prompts=tuple(prompts),
            n=n,
            sampling=sampling,
            sizes=sizes,
            stop=stop,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            cache_salt=body.cache_salt or "",
            grammar=grammar,
            marks=marks or {},
        )

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts; one that `n` choices share counts once."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)


def num_choices(body: SamplingFields, num_prompts: int, settings: Settings) -> int:
    """Sequences for each prompt. 400 if there are too many of them."""
    n = body.n or 1
    if n > settings.max_n:
        raise invalid(f"n is {n}; at most {settings.max_n} are allowed here.", "n")
    most = max(settings.max_completion_prompts, settings.max_n)
    if n * num_prompts > most:
        raise invalid(f"n times the number of prompts is {n * num_prompts}; at most {most} are allowed.", "n")
    return n


def _check_entries(wanted: tuple[tuple[int | None, int], ...], state: ServerState) -> None:
    """400 if (likeliest tokens, positions) add up to more log-probabilities than one answer may hold."""
    most, vocab_size = state.settings.max_logprob_entries, state.tokenizer.vocab_size
    count = sum(positions * (1 + (vocab_size if top < 0 else top)) for top, positions in wanted if top is not None)
    if count > most:
        raise invalid(
            f"{count} log-probabilities may be needed, and one answer holds at most {most}: lower max_tokens, n, "
            "logprobs or the number of prompts.",
            "prompt_logprobs" if wanted[0][0] is None else "logprobs",
        )
