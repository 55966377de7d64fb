"""One step of the model: forward pass, head, sampling. Knows nothing of queues and books nothing.

A request whose own numbers go wrong (NaN, constraints that leave no token) spoils no other one's: it comes back as a
fault, and the engine decides what becomes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from model_store.arrays import Array
from model_store.pair import LoadedPair
from server.core.batch import BatchBuilder, ForwardBatch
from server.core.config import EngineConfig
from server.core.request import LiveRequest, SampledToken
from server.engine.isolation import NoTokenLeft
from server.engine.kv_cache import KVCacheManager
from server.engine.pooling import PooledStates
from server.engine.prompt_scores import PromptScores
from server.engine.sampler import Sampler, is_plain_greedy
from server.model.executor import allocate_states, create_executor

if TYPE_CHECKING:
    from server.core.executor import Executor
    from server.engine.extras.speculation import Speculator

_NO_NUMBER = "the logits hold no finite number to choose"

Faults = dict[str, Exception]  # request id -> what went wrong with its own numbers


class HeadRows(NamedTuple):
    """Rows that the head is applied to, as `Executor.logits` takes them."""

    hidden: Array
    num_teacher: int
    widths: np.ndarray | None


class StepRunner:
    """All that computes steps: one loaded pair, its executor, the KV pool, the sampler.

    Keeps nothing of a step but what sampling must know of the answers so far.
    """

    def __init__(self, pair: LoadedPair, config: EngineConfig) -> None:
        self.config = config
        self.spec, self.elasticity = pair.spec, pair.elasticity
        self.sizes: tuple[int, ...] = tuple(pair.sizes)
        self.executor = create_executor(pair, config)
        num_pages = max(config.kv_cache_bytes // self.executor.page_bytes(), 1)
        self.executor.allocate_kv(num_pages)
        self.kv_cache = KVCacheManager(
            num_pages=num_pages,
            page_size=config.page_size,
            num_layers=self.elasticity.num_global_layers,
            max_num_seqs=config.max_num_seqs
            * (1 if config.speculative_size is None else 2),  # and drafts with KV of their own
            max_model_len=config.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            num_state_pages=allocate_states(self.executor, config.state_bytes),
            widest=self.executor.widths[-1],
        )
        draw = self.executor.draw if self.executor.can_draw else None
        self.sampler = Sampler(config.seed, draw, self.executor.logit_ops)
        self.prompt_scores = PromptScores()
        self.pooled_states = PooledStates()
        self.build_batch = self._batch_builder()

    def _batch_builder(self) -> BatchBuilder:
        tables, shared = self.kv_cache.block_tables, self.executor.shared_stations
        return BatchBuilder(self.elasticity, tables, shared, self.config.page_size)

    def change_student(self, pair: LoadedPair, executor: Executor, held: list[LiveRequest]) -> None:
        """Go on with `executor`, which `Executor.beside` made for `pair`. `held`: as `KVCacheManager` has it."""
        self.elasticity, self.sizes, self.executor = pair.elasticity, tuple(pair.sizes), executor
        self.kv_cache.change_student(pair.elasticity.num_global_layers, held)
        if executor.can_draw:
            self.sampler.draw_tokens = executor.draw
        self.build_batch = self._batch_builder()

    def run(self, batch: ForwardBatch, speculator: Speculator | None = None) -> tuple[dict[str, SampledToken], Faults]:
        """Forward pass, logits and sampling of one step; books nothing. `speculator` settles guesses in the batch."""
        faults: Faults = {}
        found = self.forward_rows(batch, faults)
        if found is None:
            return {}, faults
        requests = [batch.requests[row] for row in batch.sample_requests]
        tokens = self._choose(found, requests, speculator, faults)
        for request, token in zip(requests, tokens, strict=True):
            if request.grammar is not None:
                request.grammar.accept(token.token_id)
        return {request.request_id: token for request, token in zip(requests, tokens, strict=True)}, faults

    def forward_rows(self, batch: ForwardBatch, faults: Faults) -> HeadRows | None:
        """Rows that tokens are drawn from; None if there are none.

        Requests whose prompt has no finite scores or states are added to `faults`.
        """
        hidden = self.executor.forward(batch)
        if not len(batch.logits_rows):
            return None
        rows = batch.sample_rows
        widths = batch.widths_of(batch.logits_start) if len(self.executor.widths) > 1 else None
        head_rows = int(batch.logits_start[batch.head_cut])
        if len(rows) < len(batch.logits_rows):
            for request in self.prompt_scores.score(self.executor, self.sampler.ops, batch, hidden, head_rows):
                faults[request.request_id] = ArithmeticError("the prompt's logits hold no number")
            for request in self.pooled_states.gather(batch, hidden):
                faults[request.request_id] = ArithmeticError("the prompt's states hold no number")
            if not len(rows):
                return None
            hidden = hidden[rows]
            head_rows = int((rows < head_rows).sum())
            widths = None if widths is None else widths[rows]
        return HeadRows(hidden, head_rows, widths)

    def greedy_tokens(self, rows: HeadRows, requests: list[LiveRequest]) -> list[int] | None:
        """The likeliest token per row, -1 where none is; None unless that is all these requests want."""
        if not all(is_plain_greedy(request) for request in requests):
            return None
        return self.executor.greedy(*rows)

    def _choose(
        self, rows: HeadRows, requests: list[LiveRequest], speculator: Speculator | None, faults: Faults
    ) -> list[SampledToken]:
        """A token per request, with those that follow; whoever has no finite number to choose is added to `faults`."""
        ids = self.greedy_tokens(rows, requests)
        if ids is None:
            return self._draw(rows, requests, speculator, faults)
        if min(ids) < 0:
            bad = [owner for owner, token in zip(_owners(requests), ids, strict=True) if token < 0]
            faults |= {request.request_id: ArithmeticError(_NO_NUMBER) for request in bad}
        tokens = [SampledToken(max(token, 0)) for token in ids]
        return tokens if speculator is None else speculator.settle(tokens, requests)

    def _draw(
        self, wanted: HeadRows, requests: list[LiveRequest], speculator: Speculator | None, faults: Faults
    ) -> list[SampledToken]:
        logits = self.executor.logits(*wanted)
        if speculator is None:
            tokens = self.sampler.sample(logits, requests)
        else:
            tokens = speculator.verify(logits, requests)
        # NaN anywhere below ends up here, and so does a request whose constraints leave it no token at all.
        chosen = [[one.token_id for one in (token, *token.following)] for token in tokens]
        rows: list[int] = []
        first = 0
        for request, own in zip(requests, chosen, strict=True):
            rows += range(first, first + len(own))
            first += 1 + len(request.draft_token_ids)
        owners = _owners(requests)
        drawn = [token for own in chosen for token in own]  # negative where an executor found no number to draw from
        values = logits[rows, [max(token, 0) for token in drawn]].tolist()
        for row, token, value in zip(rows, drawn, values, strict=True):
            if value == -math.inf and (token >= 0 or bool((logits[row] == -math.inf).all())):
                faults[owners[row].request_id] = NoTokenLeft("The constraints together leave no token to choose.")
            elif token < 0 or not math.isfinite(value):
                faults[owners[row].request_id] = ArithmeticError(_NO_NUMBER)
        return tokens

    def wipe(self, pages: np.ndarray) -> None:
        """Zero KV pages that may hold NaN: padded positions are read and masked, and NaN survives a mask."""
        for tensor in self.executor.kv_tensors():
            tensor[pages.astype(np.int64)] = 0


def _owners(requests: list[LiveRequest]) -> list[LiveRequest]:
    """The request of every row that tokens are drawn from."""
    return [request for request in requests for _ in range(1 + len(request.draft_token_ids))]


def outcome(requests: Sequence[LiveRequest], tokens: Sequence[int]) -> tuple[dict[str, SampledToken], Faults]:
    """What `StepRunner.run` returns, for tokens that were drawn elsewhere; -1 where there was no number to choose."""
    sampled: dict[str, SampledToken] = {}
    faults: Faults = {}
    for request, token in zip(requests, tokens, strict=True):
        if token < 0:
            faults[request.request_id] = ArithmeticError(_NO_NUMBER)
        sampled[request.request_id] = SampledToken(max(token, 0))
    return sampled, faults
