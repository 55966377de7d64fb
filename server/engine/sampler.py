"""Logits to tokens and log-probabilities.

S = rows, V = vocabulary. Order of operations: raw logprobs -> grammar and allowed tokens -> bad words, min_tokens ->
logit bias -> repetition, presence and frequency penalties -> temperature -> min_p -> top_k -> top_p -> draw.

The draw is an exponential race: token i arrives after -log(1 - v_i) / weight_i, the first one wins, and v_i is a hash
of i and of one number per row that the host takes from the request's own generator. The winner has its distribution
(the Gumbel-max trick, Maddison et al. 2014), and a token whose logit moves by d loses to another with probability about
d. So a seed gives the same text on any device and in any batch, but for the rare race that rounding decides.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from model_store.arrays import Array
from server.core.executor import GREEDY, Draw, LogitOps
from server.core.request import LiveRequest, SampledToken, SamplingParams
from server.core.seen_tokens import SeenTokens
from server.engine import host_logits
from server.engine.host_logits import HostLogits

# (logits [S, V], how to draw from each row) -> token ids, -1 where no logit is a finite number
DrawTokens = Callable[[Array, list[Draw]], list[int]]


class Masks:
    """What a request's parameters forbid and add, in the form in which every step applies them.

    A caller may name thousands of tokens and ask for many answers: what could be looked up once must not be looked up
    for every row of every step, which everybody's next token waits for.
    """

    __slots__ = ("allowed", "banned", "banned_after", "bias_tokens", "bias_values", "num_rows")

    def __init__(self, sampling: SamplingParams, num_rows: int) -> None:
        """For rows of `num_rows` logits."""
        self.num_rows = num_rows
        self.allowed: np.ndarray | None = None  # bool [V]
        if sampling.allowed_token_ids is not None:
            self.allowed = np.zeros(num_rows, bool)
            self.allowed[np.array(sampling.allowed_token_ids, np.int64)] = True
        self.banned = [word[0] for word in sampling.bad_words_ids if len(word) == 1]
        self.banned_after: dict[int, list[tuple[int, ...]]] = {}  # last token of a beginning -> words
        for word in sampling.bad_words_ids:
            if len(word) > 1:
                self.banned_after.setdefault(word[-2], []).append(word)
        bias = sampling.logit_bias or {}
        self.bias_tokens, self.bias_values = np.array([*bias], np.int64), np.array([*bias.values()], np.float32)


@dataclass(slots=True)
class SamplerState:
    """Per request: its random numbers, and for penalties the tokens it has seen."""

    random: random.Random
    masks: Masks | None = None  # where there is anything to mask
    returned: list[float] = field(default_factory=list)  # numbers that were drawn but not used; the next is the last
    seen: SeenTokens | None = None


class Sampler:
    """Draws one token per row. Holds no request's state; that travels on `Request.sampler_state`."""

    def __init__(self, seed: int = 0, draw: DrawTokens | None = None, ops: LogitOps | None = None) -> None:
        """`draw`: an executor's own way to draw, which follows the same rules faster. `ops`: what works where its
        logits lie, if they are no numpy arrays."""
        self._random = random.Random(seed)
        self.draw_tokens: DrawTokens = draw or host_logits.draw
        self.ops: LogitOps = ops or HostLogits()
        self._shared_masks: tuple[SamplingParams, Masks] | None = None  # of the request before: its siblings share them

    def sample(self, logits: Array, requests: list[LiveRequest]) -> list[SampledToken]:
        """logits float32 [S, V], row i for requests[i]; modified in place. Returns a token (and logprobs) per row."""
        # Rows that want equally many of the likeliest tokens stand together.
        wanted = sorted(
            (request.sampling.logprobs, row)
            for row, request in enumerate(requests)
            if request.sampling.logprobs is not None
        )
        scored = [row for _, row in wanted]
        raw = self.ops.take(logits, scored) if scored else None
        self._process(logits, requests)
        tokens = self.draw_tokens(logits, [self.next_draw(request) for request in requests])
        sampled = [SampledToken(token) for token in tokens]
        if scored:
            scores = self.ops.token_logprobs(raw, [tokens[row] for row in scored], [number for number, _ in wanted])
            for row, score in zip(scored, scores, strict=True):
                sampled[row].logprobs = score
        return sampled

    # --- what the request asks of its logits

    def state(self, request: LiveRequest) -> SamplerState:
        if request.sampler_state is None:
            seed = request.sampling.seed
            source = random.Random(seed if seed is not None else self._random.getrandbits(64))
            request.sampler_state = SamplerState(source)
        return request.sampler_state

    def _process(self, logits: Array, requests: list[LiveRequest]) -> None:
        """Apply masks, bias and penalties to logits [S, V] in place."""
        for row, request in enumerate(requests):
            if needs_processing(request):
                self._constrain(logits[row], request)
        penalised = [(row, r, self._seen(r)) for row, r in enumerate(requests) if has_penalties(r)]
        if penalised:
            self.ops.penalise(logits, penalised)

    def _seen(self, request: LiveRequest) -> SeenTokens:
        state = self.state(request)
        if state.seen is None:
            state.seen = SeenTokens()
        return state.seen

    def _constrain(self, row: Array, request: LiveRequest) -> None:
        """Apply masks and bias to one row [V] in place."""
        sampling, masks = request.sampling, self._masks(request, len(row))
        if request.grammar is not None:
            mask = np.unpackbits(request.grammar.bitmask().view(np.uint8), bitorder="little")[: len(row)]
            allowed = np.zeros(len(row), bool)
            allowed[: len(mask)] = mask
            self.ops.mask(row, allowed)
        if masks.allowed is not None:
            self.ops.mask(row, masks.allowed)
        if masks.banned:
            row[masks.banned] = -math.inf
        output = request.output_token_ids
        for word in masks.banned_after.get(output[-1], ()) if output else ():
            if tuple(output[1 - len(word) :]) == word[:-1]:
                row[word[-1]] = -math.inf
        if len(request.output_token_ids) < sampling.min_tokens:
            banned = list(sampling.stop_token_ids | sampling.eos_token_ids)
            row[banned] = -math.inf
        if sampling.logit_bias:
            self.ops.add(row, masks.bias_tokens, masks.bias_values)

    def _masks(self, request: LiveRequest, num_rows: int) -> Masks:
        state = self.state(request)
        if state.masks is None or state.masks.num_rows != num_rows:
            shared = self._shared_masks
            if shared is None or shared[1].num_rows != num_rows or not _say_the_same(shared[0], request.sampling):
                self._shared_masks = shared = request.sampling, Masks(request.sampling, num_rows)
            state.masks = shared[1]
        return state.masks

    # --- the draw

    def uniform(self, request: LiveRequest) -> float:
        """The request's next random number."""
        state = self.state(request)
        return state.returned.pop() if state.returned else state.random.random()

    def next_draw(self, request: LiveRequest) -> Draw:
        sampling = request.sampling
        if sampling.is_greedy:
            return GREEDY
        return Draw(sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k, self.uniform(request))

    def give_back(self, request: LiveRequest, draw: Draw) -> None:
        """A draw that did not take place; the latest first, if there are several."""
        if not request.sampling.is_greedy:
            self.state(request).returned.append(draw.uniform)

    def race(self, weights: Array, request: LiveRequest) -> int:
        """A token by weights [V], which need not sum to 1, and the request's next random number."""
        plain = Draw(temperature=1.0, top_p=1.0, min_p=0.0, top_k=0, uniform=self.uniform(request))
        return self.draw_tokens(self.ops.log(weights)[None], [plain])[0]

    def probabilities(self, logits: Array, requests: list[LiveRequest]) -> Array:
        """Of all tokens, [S, V]: temperature and min_p alone."""
        draws = [Draw(r.sampling.temperature, 1.0, r.sampling.min_p, 0, 0.0) for r in requests]
        return self.ops.probabilities(logits, draws)


def _say_the_same(one: SamplingParams, other: SamplingParams) -> bool:
    """Whether these are the very lists of one HTTP request."""
    return (
        one.allowed_token_ids is other.allowed_token_ids
        and one.bad_words_ids is other.bad_words_ids
        and one.logit_bias is other.logit_bias
    )


def is_plain_greedy(request: LiveRequest) -> bool:
    """Whether the likeliest token is all that the request wants of its logits."""
    return request.sampling.is_greedy and request.sampling.logprobs is None and not needs_processing(request)


def needs_processing(request: LiveRequest) -> bool:
    sampling = request.sampling
    return bool(
        request.grammar is not None
        or sampling.allowed_token_ids is not None
        or sampling.bad_words_ids
        or len(request.output_token_ids) < sampling.min_tokens
        or sampling.logit_bias
        or has_penalties(request)
    )


def has_penalties(request: LiveRequest) -> bool:
    sampling = request.sampling
    return bool(sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)
