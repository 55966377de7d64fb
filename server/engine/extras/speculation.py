"""Speculation within a pair: less of the same weights (fewer layers, fewer bits) guesses, the requested size and
precision verify several guesses at once.

Lossless. A guess is a row of the step like any other, and executors give rows the same numbers beside others as alone
(the native one to the last bit, where few rows decode). Where the text must not depend on anything else (greedy, a seed
of the request's own) and where a nucleus cuts the distribution, the guess is drawn with the very random number that the
requested size will use, and stands if that size draws the same token: the text is the one without speculation.
Otherwise rejection sampling accepts more: a guess x drawn from q stands with probability min(1, p(x) / q(x)), else a
token is drawn from what p has above q (Leviathan et al. 2023, arXiv 2211.17192).

S = rows, V = vocabulary.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from model_store.arrays import Array
from server.core.batch import ForwardBatch, Scheduled
from server.core.request import LiveRequest, SampledToken
from server.engine.extras.drafts import Drafts
from server.engine.extras.payoff import Payoff
from server.engine.sampler import Sampler, SamplerState, needs_processing
from server.engine.scheduler import Scheduler, SchedulerOutput

if TYPE_CHECKING:
    from server.engine.runner import HeadRows, StepRunner

logger = logging.getLogger(__name__)

# Tokens that a draft may be behind and still catch up beside its first guess; further ones catch up over several steps.
_CATCH_UP = 256


@dataclass(slots=True)
class SpeculationStats:
    """Counts since the start, by requested size."""

    drafts: dict[int, int] = field(default_factory=dict)
    draft_tokens: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, list[int]] = field(default_factory=dict)  # by position of the guess

    def add(self, size: int, num_guesses: int, num_accepted: int, max_guesses: int) -> None:
        self.drafts[size] = self.drafts.get(size, 0) + 1
        self.draft_tokens[size] = self.draft_tokens.get(size, 0) + num_guesses
        by_position = self.accepted.setdefault(size, [0] * max_guesses)
        for position in range(num_accepted):
            by_position[position] += 1


class Speculator:
    """Plans, draws and verifies guesses. Owned by the engine thread."""

    def __init__(
        self, runner: StepRunner, scheduler: Scheduler, sampler: Sampler, pool: Drafts, max_guesses: int
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.sampler = sampler
        self.pool = pool
        self.max_guesses = max_guesses
        self.payoff = Payoff(scheduler.elasticity.num_teacher_layers, max_guesses)
        self.stats = SpeculationStats()
        self._probs: dict[str, list[Array]] = {}  # request -> q of each guess, where rejection sampling wants it

    # --- before the step

    def draft(self, planned: SchedulerOutput) -> None:
        """Draw guesses for those requests of the plan for which it pays, and widen their part of the plan."""
        self._probs.clear()
        candidates = [request for request, count in planned.scheduled if count == 1 and self._can(request)]
        if not candidates:
            return
        seconds = self.scheduler.policy.decode_seconds
        drafting = self.payoff.rows((self.pool.size_of(request), 1) for request in candidates)
        one_guess = seconds(drafting, max(map(self.pool.width_of, candidates)))
        width = max(request.width for request, _ in planned.scheduled)
        depth = self.payoff.depth(planned.scheduled, candidates, partial(seconds, width=width), one_guess)
        room = self.scheduler.config.max_num_batched_tokens - sum(count for _, count in planned.scheduled)
        depth = min(depth, room // len(candidates))
        if depth <= 0:
            return
        try:
            ready = self._ready(candidates, depth)
            for guess in range(depth):
                ready = [(request, draft, limit) for request, draft, limit in ready if guess < limit]
                if not ready:
                    break
                self._guess(ready)
        except Exception:  # a luxury: the step goes on without it
            logger.exception("guessing failed")
            self.retract(planned)
            for request in candidates:
                self.pool.drop(request.request_id)
            return
        planned.scheduled = [(request, count + len(request.draft_token_ids)) for request, count in planned.scheduled]

    def retract(self, planned: SchedulerOutput) -> None:
        """Take the guesses out of a plan that could not be computed."""
        planned.scheduled = [(request, 1 if request.draft_token_ids else count) for request, count in planned.scheduled]
        for request, _ in planned.scheduled:
            request.draft_token_ids = []

    def _can(self, request: LiveRequest) -> bool:
        """Whether its next tokens can be guessed: nothing may depend on the tokens in between but the model."""
        return (
            self.pool.serves(request)
            and bool(request.output_token_ids)
            and request.num_computed_tokens + 1 == request.num_tokens
            and not request.size_schedule
            and not needs_processing(request)
            and len(request.output_token_ids) + 2 <= request.sampling.max_tokens
        )

    def _ready(self, candidates: list[LiveRequest], depth: int) -> list[tuple[LiveRequest, LiveRequest, int]]:
        """(request, draft, guesses) of those whose draft is level; the others' drafts catch up."""
        kv_cache, config = self.scheduler.kv_cache, self.scheduler.config
        ready, behind = [], []
        for request in candidates:
            draft = self.pool.draft_of(request)
            if draft is None:
                continue
            left = request.sampling.max_tokens - len(request.output_token_ids) - 1
            limit = min(depth, left, config.max_model_len - request.num_tokens - 1)
            pending = draft.num_tokens - draft.num_computed_tokens
            if pending > min(_CATCH_UP, config.max_num_batched_tokens):
                behind.append((draft, min(_CATCH_UP, config.max_num_batched_tokens)))
            elif (
                limit > 0
                and kv_cache.allocate(request, request.num_tokens + limit)
                and self.pool.allocate(draft, draft.num_tokens + limit)
            ):
                self._prepare_draws(request, draft)
                ready.append((request, draft, limit))
        for draft, count in behind:
            if self.pool.allocate(draft, draft.num_computed_tokens + count):
                self._run([(draft, count)])
                draft.num_computed_tokens += count
        return ready

    def _prepare_draws(self, request: LiveRequest, draft: LiveRequest) -> None:
        """Give the draft its random numbers: the request's next ones, or for rejection sampling its own."""
        if request.sampling.is_greedy:
            return
        source = self.sampler.state(request).random
        if draft.sampler_state is None:
            draft.sampler_state = SamplerState(random.Random(0))
        if _rejects(request):
            draft.sampler_state.random.seed(source.getrandbits(64))
        else:
            draft.sampler_state.random.setstate(source.getstate())

    def _guess(self, ready: list[tuple[LiveRequest, LiveRequest, int]]) -> None:
        """One more guess for each."""
        by_id = {draft.request_id: (request, draft) for request, draft, _ in ready}
        batch, found = self._run([(draft, draft.num_tokens - draft.num_computed_tokens) for _, draft, _ in ready])
        assert found is not None, "every draft is to get a token"
        pairs = [by_id[batch.requests[row].request_id] for row in batch.sample_requests]
        drafts = [draft for _, draft in pairs]
        tokens = self.runner.greedy_tokens(found, drafts)
        if tokens is None:
            tokens = self._draw(self.runner.executor.logits(*found), pairs)
        for (request, draft), token in zip(pairs, tokens, strict=True):
            token = max(token, 0)  # -1: no finite logit; a guess like any other, verified or found faulty later
            draft.num_computed_tokens = draft.num_tokens
            draft.output_token_ids.append(token)
            request.draft_token_ids.append(token)

    def _draw(self, logits: Array, pairs: list[tuple[LiveRequest, LiveRequest]]) -> list[int]:
        """A guess per row, for (request, its draft); keeps the distribution where rejection sampling asks for it."""
        tokens = [0] * len(pairs)
        exact = [row for row, (request, _) in enumerate(pairs) if not _rejects(request)]
        for row, token in zip(exact, self.sampler.sample(logits[exact], [pairs[i][1] for i in exact]), strict=True):
            tokens[row] = token.token_id
        for row, (request, draft) in enumerate(pairs):
            if _rejects(request):
                q = self.sampler.probabilities(logits[row : row + 1], [draft])[0]
                tokens[row] = self.sampler.race(q, draft)
                self._probs.setdefault(request.request_id, []).append(q)
        return tokens

    def _run(self, scheduled: Scheduled) -> tuple[ForwardBatch, HeadRows | None]:
        batch = self.runner.build_batch(scheduled)
        started = time.monotonic()
        found = self.runner.forward_rows(batch, {})
        end = time.monotonic()
        self.scheduler.policy.observe_step(batch, end - started, end)
        return batch, found

    # --- after the model

    def verify(self, logits: Array, requests: list[LiveRequest]) -> list[SampledToken]:
        """Tokens of this step; logits [S, V] has 1 + guesses rows for each request, in order."""
        widths = [1 + len(request.draft_token_ids) for request in requests]
        first = np.concatenate(([0], np.cumsum(widths)))
        exact = [i for i, request in enumerate(requests) if widths[i] == 1 or not _rejects(request)]
        rows = [row for i in exact for row in range(first[i], first[i + 1])]
        tokens: dict[int, SampledToken] = {}  # by row
        own = logits[rows] if len(rows) < len(logits) else logits
        chosen = self._verify_exact(own, [requests[i] for i in exact]) if exact else []
        if own is not logits:
            logits[rows] = own  # with masks applied, as whoever looks at the logits next expects
        for i, token in zip(exact, chosen, strict=True):
            tokens[i] = token
        for i, request in enumerate(requests):
            if i not in tokens:
                tokens[i] = self._verify_rejecting(logits[first[i] : first[i + 1]], request)
        verified = [tokens[i] for i in range(len(requests))]
        self._count(requests, verified)
        return verified

    def settle(self, drawn: list[SampledToken], requests: list[LiveRequest]) -> list[SampledToken]:
        """As `verify`, for requests whose rows were decided without logits."""
        tokens = self._accept(drawn, requests)
        self._count(requests, tokens)
        return tokens

    def _verify_exact(self, logits: Array, requests: list[LiveRequest]) -> list[SampledToken]:
        """A guess stands if the requested size draws it too. Random numbers of rows that fall are put back."""
        states = {
            request.request_id: self.sampler.state(request).random.getstate()
            for request in requests
            if request.draft_token_ids and not request.sampling.is_greedy
        }
        repeated = [request for request in requests for _ in range(1 + len(request.draft_token_ids))]
        tokens = self._accept(self.sampler.sample(logits, repeated), requests)
        for request, token in zip(requests, tokens, strict=True):
            if state := states.get(request.request_id):
                generator = self.sampler.state(request).random
                generator.setstate(state)
                for _ in range(1 + len(token.following)):
                    generator.random()
        return tokens

    def _accept(self, drawn: list[SampledToken], requests: list[LiveRequest]) -> list[SampledToken]:
        """From a token per row: those up to the first that differs from its guess."""
        tokens, rows = [], iter(drawn)
        for request in requests:
            own = [next(rows) for _ in range(1 + len(request.draft_token_ids))]
            tokens.append(_chain(own[: _common(request.draft_token_ids, [one.token_id for one in own]) + 1]))
        return tokens

    def _verify_rejecting(self, logits: Array, request: LiveRequest) -> SampledToken:
        guesses = request.draft_token_ids
        generator = self.sampler.state(request).random
        wanted = self.sampler.probabilities(logits, [request] * len(logits))
        kept: list[int] = []
        for p, q, guess in zip(wanted, self._probs[request.request_id], guesses, strict=False):
            if generator.random() * float(q[guess]) >= float(p[guess]):
                rest = p - q
                rest[rest < 0] = 0.0
                # Rounding can leave nothing above q where the two are the same distribution.
                last = rest if float(rest.sum()) > 0.0 else p
                break
            kept.append(guess)
        else:
            last = wanted[len(guesses)]
        kept.append(self.sampler.race(last, request))
        return _chain([SampledToken(token) for token in kept])

    def _count(self, requests: list[LiveRequest], tokens: list[SampledToken]) -> None:
        for request, token in zip(requests, tokens, strict=True):
            if num_guesses := len(request.draft_token_ids):
                self.stats.add(request.path.size, num_guesses, len(token.following), self.max_guesses)
                self.payoff.observe(request.path.size, num_guesses, len(token.following))


def _rejects(request: LiveRequest) -> bool:
    """Whether its guesses go through rejection sampling: plain sampling that nobody expects to repeat."""
    sampling = request.sampling
    return not (
        sampling.is_greedy
        or sampling.seed is not None
        or sampling.top_p < 1.0
        or sampling.top_k > 0
        or sampling.logprobs is not None
    )


def _common(guesses: list[int], drawn: list[int]) -> int:
    """How many guesses from the first on equal what was drawn."""
    count = 0
    while count < len(guesses) and guesses[count] == drawn[count]:
        count += 1
    return count


def _chain(tokens: list[SampledToken]) -> SampledToken:
    tokens[0].following = tuple(tokens[1:])
    return tokens[0]
