"""Logits to tokens and log-probabilities.

S = rows, V = vocabulary. Order of operations: raw logprobs -> grammar and allowed tokens -> bad words, min_tokens ->
logit bias -> repetition, presence and frequency penalties -> temperature -> min_p -> top_k -> top_p -> draw.

The draw is an exponential race: token i arrives after -log(1 - v_i) / weight_i, the first one wins, and v_i is a hash
of i and of one number per row that the host takes from the request's own generator. The winner has its distribution
(the Gumbel-max trick, Maddison et al. 2014), and a token whose logit moves by d loses to another with probability about
d. So a seed gives the same text on any device and in any batch, but for the rare race that rounding decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from server.core.executor import GREEDY, Draw
from server.core.request import LiveRequest, SampledToken
from server.engine.extras.transfer import send
from server.engine.logprobs import token_logprobs
from server.engine.penalties import SeenTokens, has_penalties, penalise

# Wide enough that a nucleus rarely needs a full sort of the vocabulary, which costs as much as a small model's step.
_NUCLEUS_WIDTH = 256


# An executor's own way to draw: (logits [S, V], how to draw from each row) -> token ids
DrawTokens = Callable[[torch.Tensor, list[Draw]], list[int]]


@dataclass(slots=True)
class SamplerState:
    """Per request: its random numbers, and for penalties the tokens it has seen."""

    random: random.Random
    returned: list[float] = field(default_factory=list)  # numbers that were drawn but not used; the next is the last
    seen: SeenTokens | None = None


class Sampler:
    """Draws one token per row. Holds no request's state; that travels on `Request.sampler_state`."""

    def __init__(self, seed: int = 0, draw: DrawTokens | None = None) -> None:
        """`draw`: an executor's own way to draw, which follows the same rules faster."""
        self._random = random.Random(seed)
        self._native_draw = draw

    def sample(self, logits: torch.Tensor, requests: list[LiveRequest]) -> list[SampledToken]:
        """logits float32 [S, V], row i for requests[i]; modified in place. Returns a token (and logprobs) per row."""
        # Rows that want equally many of the likeliest tokens stand together.
        wanted = sorted(
            (request.sampling.logprobs, row)
            for row, request in enumerate(requests)
            if request.sampling.logprobs is not None
        )
        scored = [row for _, row in wanted]
        raw = logits[send(np.array(scored), logits.device)] if scored else logits[:0]
        self._process(logits, requests)
        if self._native_draw is None and all(request.sampling.is_greedy for request in requests):
            tokens = logits.argmax(dim=-1).tolist()
        else:
            tokens = self._draw(logits, requests)
        sampled = [SampledToken(token) for token in tokens]
        if scored:
            scores = token_logprobs(raw, [tokens[row] for row in scored], [number for number, _ in wanted])
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

    def _process(self, logits: torch.Tensor, requests: list[LiveRequest]) -> None:
        """Apply masks, bias and penalties to logits [S, V] in place."""
        for row, request in enumerate(requests):
            if needs_processing(request):
                self._constrain(logits[row], request)
        penalised = [(row, r, self._seen(r)) for row, r in enumerate(requests) if has_penalties(r)]
        if penalised:
            penalise(logits, penalised)

    def _seen(self, request: LiveRequest) -> SeenTokens:
        state = self.state(request)
        if state.seen is None:
            state.seen = SeenTokens()
        return state.seen

    def _constrain(self, row: torch.Tensor, request: LiveRequest) -> None:
        """Apply masks and bias to one row [V] in place."""
        sampling = request.sampling
        if request.grammar is not None:
            mask = np.unpackbits(request.grammar.bitmask().view(np.uint8), bitorder="little")[: len(row)]
            allowed = torch.zeros(len(row), dtype=torch.bool, device=row.device)
            allowed[: len(mask)] = torch.from_numpy(mask.astype(bool)).to(row.device)
            row.masked_fill_(~allowed, -torch.inf)
        if sampling.allowed_token_ids is not None:
            keep = torch.tensor(sampling.allowed_token_ids, device=row.device)
            kept = row[keep]
            row.fill_(-torch.inf)
            row[keep] = kept
        for word in sampling.bad_words_ids:
            prefix = word[:-1]
            if not prefix or tuple(request.output_token_ids[-len(prefix) :]) == prefix:
                row[word[-1]] = -torch.inf
        if len(request.output_token_ids) < sampling.min_tokens:
            banned = list(sampling.stop_token_ids | sampling.eos_token_ids)
            row[banned] = -torch.inf
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype, device=row.device)

    # --- the draw

    def _draw(self, logits: torch.Tensor, requests: list[LiveRequest]) -> list[int]:
        if self._native_draw is not None:
            return self._native_draw(logits, [self.next_draw(request) for request in requests])
        tokens = [0] * len(requests)
        plain, cut, greedy = [], [], []
        for row, request in enumerate(requests):
            sampling = request.sampling
            if sampling.is_greedy:
                greedy.append(row)
            elif sampling.top_p < 1.0 or 0 < sampling.top_k < logits.shape[-1]:
                cut.append(row)
            else:
                plain.append(row)
        if greedy:
            _scatter(tokens, greedy, logits[greedy].argmax(dim=-1).tolist())
        if plain:
            _scatter(tokens, plain, self._draw_plain(logits[plain], [requests[row] for row in plain]))
        if cut:
            _scatter(tokens, cut, self._draw_cut(logits[cut], [requests[row] for row in cut]))
        return tokens

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

    def _draw_plain(self, logits: torch.Tensor, requests: list[LiveRequest]) -> list[int]:
        """No top_k, no top_p: the whole (min_p-masked) distribution, no sort. logits [S, V]."""
        return self.race(self.weights(logits, requests), requests).tolist()

    def weights(self, logits: torch.Tensor, requests: list[LiveRequest]) -> torch.Tensor:
        """Probabilities without top_k and top_p, up to a factor where min_p cut some off. [S, V] -> [S, V]."""
        probs = torch.softmax(logits / _column([r.sampling.temperature for r in requests], logits), dim=-1)
        min_p = _column([r.sampling.min_p for r in requests], logits)
        return probs.masked_fill_(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)

    def _draw_cut(self, logits: torch.Tensor, requests: list[LiveRequest]) -> list[int]:
        """top_k and/or top_p over the likeliest entries; the vocabulary is sorted only for a very wide nucleus."""
        vocab = logits.shape[-1]
        scaled = logits / _column([r.sampling.temperature for r in requests], logits)
        min_p = _column([r.sampling.min_p for r in requests], logits)
        top_p = _column([r.sampling.top_p for r in requests], logits)
        top_k = torch.tensor(
            [r.sampling.top_k if 0 < r.sampling.top_k < vocab else vocab for r in requests], device=logits.device
        )[:, None]
        limited = [r.sampling.top_k for r in requests if 0 < r.sampling.top_k < vocab]
        width = min(vocab, max([_NUCLEUS_WIDTH, *limited]))
        while True:
            values, ids = scaled.topk(width, dim=-1)
            # Mass is relative to everything that survives min_p and top_k, including what lies beyond `width`.
            kept = scaled if width < vocab else values
            mask_p = kept < values[:, :1] + min_p.log()
            total = torch.logsumexp(kept.masked_fill(mask_p, -torch.inf), dim=-1, keepdim=True)
            dropped = (values < values[:, :1] + min_p.log()) | (torch.arange(width, device=logits.device) >= top_k)
            probs = (values - total).exp().masked_fill_(dropped, 0.0)
            is_limited = (top_k <= width).squeeze(1)
            probs = torch.where(is_limited[:, None], probs / probs.sum(dim=-1, keepdim=True), probs)
            mass = probs.cumsum(dim=-1)
            enough = (mass[:, -1:] >= top_p.clamp(max=1.0 - 1e-6)).squeeze(1) | is_limited
            if width == vocab or bool(enough.all()):
                break
            width = vocab
        # Keep the smallest set whose mass reaches top_p: an entry stays if the mass before it has not.
        probs = probs.masked_fill_(mass - probs >= top_p, 0.0)
        choice = self.race(probs, requests, ids)
        return ids.gather(1, choice[:, None]).squeeze(1).tolist()

    def race(self, weights: torch.Tensor, requests: list[LiveRequest], ids: torch.Tensor | None = None) -> torch.Tensor:
        """Index [S] of each row's winner. weights [S, n] need not sum to 1; ids [S, n]: tokens, if not 0 .. n-1."""
        if ids is None:
            ids = torch.arange(weights.shape[-1], device=weights.device)[None]
        numbers = np.array([self.uniform(request) for request in requests])
        times = race_noise(ids, torch.from_numpy(numbers.view(np.int64)).to(weights.device)) / weights.double()
        return times.argmin(dim=-1)


_LOW = 0xFFFFFFFF


def race_noise(ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Exponential(1) numbers float64 [S, n] of token ids int64 [S or 1, n] and 64 bits per row, keys int64 [S].

    The hash is Wellons' lowbias32 with the key put in before and between its rounds; the native draw
    (kernels/cpu/sampling.h) and the CUDA one (kernels/cuda/draw.py) compute the same.
    """
    low, high = (keys & _LOW)[:, None], (keys >> 32 & _LOW)[:, None]
    h = (ids * 0x9E3779B9 + low) & _LOW
    h = ((h ^ h >> 16) * 0x7FEB352D) & _LOW
    h = ((h ^ h >> 15 ^ high) * 0x846CA68B) & _LOW
    h ^= h >> 16
    return -torch.log1p(-(h.double() + 0.5) * 2.0**-32)


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


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _scatter(tokens: list[int], rows: list[int], values: list[int]) -> None:
    for row, value in zip(rows, values, strict=True):
        tokens[row] = value
