"""A request: what the caller said, what the engine knows about it, and the messages that cross between their threads.

    Request, Abort, Order -> engine thread, frozen
    LiveRequest      the engine thread's own
    RequestOutput    <- engine thread, one per step at most; read by nobody else before it is handed over

No torch here: the scheduler and the size policy are plain Python that a test can drive by hand.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from model_store.assembly import LayerPath
from server.core.block import Block
from server.core.width import EXACT


@dataclass(frozen=True, slots=True)
class RepetitionLimit:
    """An answer that ends in a pattern of so many tokens, repeated so often, has fallen into a loop. vLLM's words."""

    min_pattern_size: int
    max_pattern_size: int
    min_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Validated by the API; `n` is expanded there into one request per sample."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()  # the model's own; not consulted when ignore_eos
    ignore_eos: bool = False
    repetition: RepetitionLimit | None = None  # ends a loop
    logprobs: int | None = None  # None: none; 0: of the sampled token only; n: and of the n likeliest; -1: all
    prompt_logprobs: int | None = None  # the same for prompt positions 1..
    pool: bool = False  # the mean of the prompt's final hidden states is wanted, and no token

    @property
    def wants_prompt(self) -> bool:
        """Whether every position of the prompt must be computed, though its KV may be cached."""
        return self.pool or self.prompt_logprobs is not None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits a request brings along (None: none). Times in seconds, from arrival; memory in bytes."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    memory: int | None = None
    strict: bool = False  # slo_policy: strict refuses what cannot be met now, best_effort serves it at the floor
    inherited: frozenset[str] = frozenset()  # the limits above that the server or the key brought, not the caller


@dataclass(frozen=True, slots=True)
class SizeDecision:
    """The size a request got and why (`size.reason` in the answer). `width`: what its first step at that size reads at
    least; a step raises rows where what one of them demands serves all."""

    size: int
    reason: str
    after_tokens: int = 0  # output tokens before it
    width: int = EXACT


class RequestStatus(enum.IntEnum):
    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2  # waiting again, its KV gone
    # Anything from here on is finished.
    FINISHED_STOP = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORT = 5
    FINISHED_ERROR = 6
    FINISHED_REPETITION = 7

    @property
    def is_finished(self) -> bool:
        return self >= RequestStatus.FINISHED_STOP

    @property
    def finish_reason(self) -> str | None:
        return {3: "stop", 4: "length", 5: "abort", 6: "error", 7: "repetition"}.get(int(self))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the raw logits in float32 (before temperature, penalties, masks).

    `top` lists (token id, logprob) likeliest first, with as many entries as were asked for;
    `rank` is the 1-based rank of `token_id` among the vocabulary.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class SampledToken:
    """What a step drew for a request."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    following: tuple[SampledToken, ...] = ()  # more tokens of the same step: guesses that were right


class Constraint(Protocol):
    """A compiled grammar and where a text stands in it: which tokens may come next. Moves on with every token."""

    error: str | None  # why it cannot be followed any further
    is_ready: bool  # whether the bitmask is there; if not, it has to be computed, which takes up to 20 ms
    filled_at: float  # when it was, last; on the clock of time.monotonic

    def bitmask(self) -> np.ndarray:
        """int32 [ceil(V / 32)], bit i of word w set if token 32 w + i may come next."""

    def accept(self, token_id: int) -> bool:
        """Advance over a token; False if the constraint has failed."""

    def is_terminated(self) -> bool:
        """Whether nothing but the end can follow."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller said. A message: made anywhere, handed to the engine, changed by nobody."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    sizes: tuple[int, ...]  # what the caller allows, ascending: floor .. ceiling (one entry = pinned)
    size_reason: str = "requested"  # why `sizes` is what it is: requested | auto | memory_budget | ...
    budget: Budget = field(default_factory=Budget)
    priority: int = 0  # lower first, as in vLLM
    tenant: str = ""  # fairness is between tenants; "" = anonymous
    size_schedule: tuple[tuple[int, int], ...] = ()  # ((size, output tokens), ...) for a planned mid-request change
    width_schedule: tuple[int, ...] = ()  # widths of its entries; (): the limits below, for all
    workload: str = ""  # kind of text on which sizes are weighed (`SizePolicy`); "": that on which each is worst
    # Widths that the caller allows (`server.core.width`): a server takes the nearest that it offers. Equal: pinned.
    min_width: int = 0
    max_width: int = EXACT
    cache_salt: str = ""
    grammar: Constraint | None = None  # the engine's alone from the submission on
    arrival_time: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody wants the rest of a request any more. A message to the engine."""

    request_id: str
    stop_string: str | None = None  # the text ended with this, which only the caller's side sees


class Order(enum.Enum):
    """What an operator wants of the engine (`server/engine/sleep.py`). A message to it."""

    SLEEP = "sleep"
    WAKE = "wake"


@dataclass(slots=True, eq=False, repr=False)
class LiveRequest:
    """What the engine knows about a request, from `add_request` to its end. Owned by the engine thread: no other
    thread reads or writes it; what others are to know goes out as `RequestOutput`.

    `num_computed_tokens` chases `num_tokens`; nothing else decides a request's phase.
    """

    asked: Request

    # --- the caller's words, which stay as they are
    request_id: str = field(init=False)
    prompt_token_ids: list[int] = field(init=False)
    sampling: SamplingParams = field(init=False)
    priority: int = field(init=False)
    tenant: str = field(init=False)
    size_schedule: tuple[tuple[int, int], ...] = field(init=False)
    cache_salt: str = field(init=False)
    grammar: Constraint | None = field(init=False)  # the runner tells it of every token
    arrival_time: float = field(init=False)

    # --- completed before it is queued: scheduler (sizes that fit, widths that are offered), policy (limits of the
    # tenant). A request whose answer must be repeatable has one width only: `min_width` is `max_width`.
    sizes: tuple[int, ...] = field(init=False)
    min_width: int = field(init=False)
    max_width: int = field(init=False)
    size_reason: str = field(init=False)
    budget: Budget = field(init=False)

    # --- scheduler
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    decision: SizeDecision | None = None  # the last one; None until admitted
    decisions: list[SizeDecision] = field(default_factory=list)  # all of them, the first and every change
    path: LayerPath = field(init=False)  # set at admission, and by the KV cache at a change of size; unset before
    slot: int = -1  # row of the block tables while running
    width: int = EXACT  # what its next step reads; set before every step
    widths: list[tuple[int, int]] = field(default_factory=list)  # (width, output tokens before it): the first, changes
    keep_station: int = 0  # hidden states are kept before this station, for a change of size to come; 0: nowhere
    num_cached_tokens: int = -1  # prefix-cache hit at first admission
    num_preemptions: int = 0
    scheduled_time: float | None = None  # first time it was given tokens
    first_token_time: float | None = None
    last_token_time: float | None = None
    stop_reason: int | str | None = None  # the caller's stop token or stop string that ended it
    error: str | None = None  # why it failed
    repeated: np.ndarray | None = None  # int64 [longest pattern], of a request that is to end if it loops (`stopping`)

    # --- KV cache (`num_computed_tokens`: the scheduler too, as it books a step)
    blocks: list[Block] = field(default_factory=list)
    num_computed_tokens: int = 0
    kv_width: int = EXACT  # the narrowest width that any of its KV was computed at
    resume_stop: int = 0  # positions below this start from a hidden state if their block `resumes`

    # --- speculation and sampler
    draft_token_ids: list[int] = field(default_factory=list)  # guesses to verify in this step, after the last token
    sampler_state: Any = None  # random numbers and token counts (`SamplerState`); made by the sampler on first use

    def __post_init__(self) -> None:
        asked = self.asked
        self.request_id, self.prompt_token_ids, self.sampling = asked.request_id, asked.prompt_token_ids, asked.sampling
        self.priority, self.tenant, self.size_schedule = asked.priority, asked.tenant, asked.size_schedule
        self.cache_salt, self.grammar, self.arrival_time = asked.cache_salt, asked.grammar, asked.arrival_time
        self.sizes, self.size_reason, self.budget = asked.sizes, asked.size_reason, asked.budget
        self.min_width, self.max_width = asked.min_width, asked.max_width

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_total_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    @property
    def is_repeatable(self) -> bool:
        """Whether the same request should give the same answer again: then it keeps one width from first to last."""
        sampling, is_pinned = self.sampling, self.asked.min_width == self.asked.max_width
        is_scored = sampling.logprobs is not None or sampling.wants_prompt
        return is_pinned or is_scored or sampling.seed is not None

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Ids at positions start .. stop-1 of prompt followed by output."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]

    def __repr__(self) -> str:
        size = self.decision.size if self.decision else "?"
        phase = f"{self.status.name}, {size}L, {self.num_computed_tokens}/{self.num_tokens}"
        return f"LiveRequest({self.request_id}, {phase})"


@dataclass(slots=True)
class RequestOutput:
    """What one step produced for one request; crosses from the engine thread to the event loop.

    The first output of every request is its admission (`decision` set, no tokens), so that the HTTP layer can put the
    size into headers before the first token. `new_logprobs` is parallel to `new_token_ids` when logprobs were asked
    for. `prompt_logprobs` arrives once, with the first token (entry 0 is None: nothing precedes it).
    """

    request_id: str
    new_token_ids: list[int] = field(default_factory=list)
    width: int = EXACT  # that the newest of `new_token_ids` was made at
    earlier_widths: tuple[tuple[int, int], ...] = ()  # (width, tokens) of those before, where several steps were merged
    decision: SizeDecision | None = None
    earlier_decisions: tuple[SizeDecision, ...] = ()  # changes before `decision` that nobody has heard of yet
    new_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pooled: np.ndarray | None = None  # float32 [E], on the last output
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | str | None = None  # the stop token id that ended it, when not eos
    scheduled_time: float | None = None  # on the admission; all times on the clock of `Request.arrival_time`
    first_token_time: float | None = None  # on the output with the first token
    last_token_time: float | None = None  # of the newest of `new_token_ids`
    num_cached_tokens: int = 0
    error: str | None = None
    error_status: int = 500  # HTTP status that `error` deserves (400 impossible, 503 not now)
    error_param: str | None = None  # the field at fault
    retry_after: float | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None
