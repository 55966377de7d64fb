"""The size policy: the largest size whose predicted latencies hold, for this request and for those already running.

A decision compares, for every size the caller allows at once, predictions with limits. Each comparison is a ratio; the
largest one is the size's *pressure*, and a size is feasible while its pressure stays under `margin`. Predictions look
at two things: the machine as it is (running mix, backlog, queue, KV pages: `Outlook`) and what the arrival rate will
make of it (the batch at which arrivals and departures balance: `server.sizing.forecast`). Sizes above the one last
given out need more room still (hysteresis). Given the same state and the same clock, the answer is the same.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from server.core.request import LiveRequest, SizeDecision
from server.core.size_policy import MAX_RETRY_AFTER, PrefillBudget, Refusal, SizePolicy
from server.core.width import EXACT, offered_width
from server.cost.frontier import QualityTable
from server.cost.model import CostModel
from server.cost.price import StepPrice
from server.sizing.candidates import Candidate, Candidates, CandidateTable
from server.sizing.demand import Demand
from server.sizing.forecast import Forecaster
from server.sizing.look import Look
from server.sizing.outlook import Outlook
from server.sizing.tenants import Tenants
from server.sizing.valve import Valve

if TYPE_CHECKING:
    from pathlib import Path

    from server.core.batch import ForwardBatch, Scheduled
    from server.core.load import LoadView
    from server.cost.profile import CostProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Seconds unless the name says otherwise."""

    queue_delay: float = 2.0  # `auto` shrinks when requests without a TTFT limit would wait longer than this
    margin: float = 0.85  # predictions for a size may use this share of a limit: it is kept for a whole answer
    step_margin: float = 0.97  # and those for one step's prompts this one: the next step can make up for it
    regrow: float = 0.85  # sizes above the last one given out may use this share of that
    hold: float = 1.0  # and not sooner than this after the last shrink
    window: float = 20.0  # arrival rates are averaged over about this long
    sigmas: float = 0.0  # and taken this many standard errors high
    squeeze: float = 0.5  # running requests may shrink this long after a decision for which no size held
    min_chunk: int = 16  # prompt tokens a step takes at least, however tight the limits of those who decode


# What binds, in the order in which ties are reported.
REASONS = ("slo_ttft", "slo_tpot", "slo_e2e", "kv_pressure", "load")
_TRIED_IN_TURN = 4  # candidates that are tried from the best down; of more, those around the last choice


class BudgetPolicy(SizePolicy):
    """Sizes by cost: see the module."""

    shrinks_running = True

    def __init__(
        self,
        cost: CostModel,
        *,
        tenants: Tenants | None = None,
        quality: QualityTable | None = None,
        config: PolicyConfig | None = None,
        keep: Callable[[CostModel], None] | None = None,
        demand: Demand | None = None,
    ) -> None:
        """`quality`: the KL that is to be least, by size and width. Left out: a guess that grows with what is missing.

        `keep` is given the cost model when the engine stops, to save what it learned.
        """
        self.cost: CostModel = cost
        self._keep = keep
        self.config = config or PolicyConfig()
        self.tenants = tenants or Tenants()
        self.price = StepPrice(cost)
        self.table = CandidateTable(self.price, quality)
        self.demand = demand or Demand(self.config.window)
        self.forecaster = Forecaster(cost, self.price, self.table, self.demand, self.tenants, self.config.sigmas)
        self.outlook = Outlook(cost, self.price, self.demand, self.tenants, self.config.min_chunk)
        self.num_decisions = 0
        # (tenant, limits, workload) -> (KL of the last point given out, when that last rose)
        self._levels: OrderedDict[tuple, tuple[float, float]] = OrderedDict()
        self.valve = Valve(self)
        self._last_end: float | None = None
        # Steps, what they took, and the time between each and the one before (negative: nobody knows)
        self._unlearned: list[tuple[ForwardBatch, float, float]] = []
        self._unlearned_seconds = 0.0
        self._pressed: dict[str, float] = {}  # tenant -> when no size held for it the last time

    def beside(self, profile: CostProfile, quality: QualityTable, path: Path | None) -> BudgetPolicy:
        """A policy for the same teacher beside another student, which knows what this one knows of the machine and of
        what arrives. `path`: where its cost model is kept."""
        cost = self.cost.beside(profile)
        cost.path = path
        return BudgetPolicy(
            cost, tenants=self.tenants, quality=quality, config=self.config, keep=self._keep, demand=self.demand
        )

    # --- before the queue

    def prepare(self, request: LiveRequest, view: LoadView, now: float) -> Refusal | None:
        """Refuse (400) strict requests whose limits are beyond this machine."""
        return self.impossible(request, view.config.max_num_batched_tokens)

    def impossible(self, request: LiveRequest, max_tokens: int) -> Refusal | None:
        """400 with the best figure if no allowed size, alone on the machine at its fastest ever, could meet the limits
        of a strict request. What is only missed at the moment is for `choose` to say; `best_effort` is always served.

        `max_tokens` of the largest size are what a step takes.
        """
        budget = request.budget
        named = (("ttft", budget.ttft), ("tpot", budget.tpot), ("e2e", budget.e2e))
        limits = {name: limit for name, limit in named if limit is not None}
        if not budget.strict or not limits:
            return None
        sampling = request.sampling
        num_output = sampling.max_tokens if sampling.ignore_eos else max(sampling.min_tokens, 1)
        best = StepPrice(self.cost.at_best())
        figures: dict[int, dict[str, float]] = {}
        widths = [offered_width(width, self.table.widths) for width in (request.min_width, request.max_width)]
        for size in {point.size for point in self.table.candidates(request.sizes, tuple(widths[1:]), "", 1)}:
            alone = [
                price.alone(size, request.num_prompt_tokens, max_tokens, width)
                for price in (best, self.price)
                for width in set(widths)
            ]
            ttft, tpot = map(min, zip(*alone, strict=True))
            figures[size] = {"ttft": ttft, "tpot": tpot, "e2e": ttft + tpot * max(num_output - 1, 0)}
        excess = {size: max(figure[name] / limit for name, limit in limits.items()) for size, figure in figures.items()}
        closest = min(excess, key=excess.__getitem__)
        if excess[closest] <= 1.0:
            return None
        sentences, params = [], []
        for name, limit in limits.items():
            size = min(figures, key=lambda size: figures[size][name])
            if figures[size][name] > limit:
                params.append(f"slo.{name}_ms")
                sentences.append(
                    f"slo.{name}_ms: {limit * 1e3:g} cannot be met; the best that this server is expected to reach for "
                    f"this request, idle and at its fastest, is {figures[size][name] * 1e3:.1f} (at {size}L)."
                )
        if sentences:
            return Refusal(" ".join(sentences), 400, param=params[0])
        message = f"slo: each limit can be met by some allowed size, but no size meets all; {closest}L comes closest."
        return Refusal(message, 400, param="slo")

    def on_arrival(self, request: LiveRequest, now: float) -> None:
        self.demand.arrived(request.tenant, request.num_prompt_tokens, now)

    def on_finish(self, request: LiveRequest, now: float) -> None:
        if request.status.finish_reason in ("stop", "length"):
            self.demand.finished(len(request.output_token_ids))

    # --- the decision

    def choose(self, request: LiveRequest, view: LoadView, now: float) -> SizeDecision | Refusal | None:
        """The size for a request about to run, None to keep it waiting, or a refusal (strict only)."""
        self.num_decisions += 1
        look = Look(self, request, view, now)
        allowed = look.widths()
        candidates = self.table.candidates(request.sizes, allowed, request.asked.workload, view.load.num_rows)
        index, level = self._pick(candidates, look)
        candidate = candidates[index]
        is_floor = not look.holds(candidate)
        if not is_floor:
            candidate = self._widen(candidate, allowed, look)
        must_wait = self._must_wait(look, candidate)
        if is_floor or must_wait:
            self._pressed[request.tenant] = now
        if must_wait:
            limit = request.budget.ttft
            is_late = limit is not None and now - request.arrival_time > limit * self.config.margin
            return self.refuse(view, now) if request.budget.strict and is_late else None
        if is_floor and request.budget.strict and self._own_limits_break(look, candidate):
            return self.refuse(view, now)
        if len(candidates) > 1:
            self._remember(look.key, level, candidate.kl, now)
            self.valve.decided(look, candidate)
        better = None if index == len(candidates) - 1 else candidates[index + 1]
        return SizeDecision(candidate.size, self._reason(candidate, better, look, is_floor, len(candidates)))

    def _pick(self, candidates: Candidates, look: Look) -> tuple[int, tuple[float, float]]:
        """The best candidate that holds, by index, and the level that this kind of request was at.

        Candidates above that level need more room. Few are tried from the best down. Of many the best, then those
        around the level: what is better than one that does not hold rarely does.
        """
        level = self._levels.get(look.key) or (-math.inf, -math.inf)
        roomy = self.config.margin * self.config.regrow if look.now - level[1] >= self.config.hold else -math.inf

        def holds(index: int) -> bool:
            is_growth = candidates[index].kl < level[0]
            return look.pressure(candidates[index]) <= (roomy if is_growth else self.config.margin)

        top = len(candidates) - 1
        if holds(top):
            return top, level
        index = top - 1
        if len(candidates) > _TRIED_IN_TURN:
            index = min(bisect_left(candidates, -level[0], key=lambda candidate: -candidate.kl), index)
            while index < top - 1 and holds(index) and holds(index + 1):
                index += 1
        while index >= 0 and not holds(index):
            index -= 1
        if index < 0:
            # Nothing holds: the one that breaks limits least. Mostly the floor, but beside large requests a distant
            # floor reads weights of its own and can be the worse choice: then a size that runs already is not.
            feasible = [i for i in range(top + 1) if look.is_known(candidates[i]) and look.holds(candidates[i])]
            narrowest, running = candidates[0].width, look.view.load.rows
            tried = [i for i in range(1, top) if candidates[i].width == narrowest and running[candidates[i].size]]
            tried = [0, *tried, *([top] if candidates[top].width == narrowest else [])]
            index = feasible[-1] if feasible else min(tried, key=lambda i: look.pressure(candidates[i]))
        return index, level

    def _widen(self, candidate: Candidate, allowed: tuple[int, ...], look: Look) -> Candidate:
        """The same layers with more bits, as long as those hold too: where prompts or pages bind, bits are free."""
        for width in allowed[allowed.index(candidate.width) + 1 :]:
            wider = self.table.candidate(candidate.size, width, look.request.asked.workload)
            if look.pressure(wider) > self.config.margin * self.config.regrow:
                break
            candidate = wider
        return candidate

    def _remember(self, key: tuple, level: tuple[float, float], kl: float, now: float) -> None:
        if kl != level[0] or key not in self._levels:
            self._levels[key] = (kl, now if kl > level[0] else level[1])
            if len(self._levels) > 512:
                self._levels.popitem(last=False)
        self._levels.move_to_end(key)

    def _must_wait(self, look: Look, candidate: Candidate) -> bool:
        """Whether admitting now would break the TPOT of running requests that are within their share."""
        visible = look.moment.visible
        if not look.view.running or visible.tpot_limit is None:
            return False
        return look.prediction(candidate).step > visible.tpot_limit * visible.tpot_limit_share

    def _own_limits_break(self, look: Look, candidate: Candidate) -> bool:
        budget, predicted = look.request.budget, look.prediction(candidate)
        e2e = predicted.ttft + predicted.step * (look.moment.num_output - 1.0)
        return (
            (budget.ttft is not None and predicted.ttft > budget.ttft)
            or (budget.tpot is not None and predicted.step > budget.tpot)
            or (budget.e2e is not None and e2e > budget.e2e)
        )

    def _reason(
        self, candidate: Candidate, better: Candidate | None, look: Look, is_floor: bool, num_candidates: int
    ) -> str:
        if is_floor and (num_candidates > 1 or self._misses_own_limit(look.ratios(candidate), look.request)):
            return "floor"
        if better is None:
            return look.request.size_reason
        binding = look.ratios(better)
        return REASONS[binding.index(max(binding))]

    def _misses_own_limit(self, ratios: tuple[float, ...], request: LiveRequest) -> bool:
        """Whether a limit that the caller brought itself is not predicted to hold."""
        inherited = request.budget.inherited
        return any(
            ratio > self.config.margin and name not in inherited
            for name, ratio in zip(("ttft", "tpot", "e2e"), ratios[:3], strict=True)
        )

    # --- a running request changes size

    def resize(self, view: LoadView, now: float) -> list[tuple[LiveRequest, SizeDecision]]:
        """Shrink large running requests while no size holds for new ones, if that pays for itself.

        Those that were given much while there was room keep their layers in every step until they end. Computing
        their text again at their floor costs once; two at a time, so that the prompts of others are not pushed aside.
        """
        if not self._pressed or len(view.running) < 2:
            return []
        self._pressed = {name: at for name, at in self._pressed.items() if now - at <= self.config.squeeze}
        found = [
            request
            for request in view.running
            if request.tenant in self._pressed  # nobody shrinks for the sake of another tenant
            and request.path.size > request.sizes[0]
            and request.output_token_ids
            and not request.size_schedule
            and request.sampling.max_tokens - len(request.output_token_ids) >= 8
        ]
        if not found:
            return []
        is_decoding = [request for request in found if request.num_tokens - request.num_computed_tokens == 1]
        under_way = sum(
            bool(request.output_token_ids) and request.num_tokens - request.num_computed_tokens > 1
            for request in view.running
        )
        width = self.valve.read(view)
        if under_way >= 2 or not is_decoding or not self.outlook.pays_to_shrink(is_decoding, view, width):
            return []
        is_decoding.sort(key=lambda r: (len(r.output_token_ids) - r.sampling.max_tokens) / r.num_tokens)
        return [(request, SizeDecision(request.sizes[0], "load")) for request in is_decoding[: 2 - under_way]]

    # --- beside the decision

    def estimated_wait(self, view: LoadView, now: float) -> float:
        return min(max(1.0, self.outlook.drain_seconds(view, self.valve.read(view))), MAX_RETRY_AFTER)

    def prefill_budget(self, view: LoadView, now: float) -> PrefillBudget | None:
        return self.outlook.prefill_budget(view, now, self.config.step_margin, self.valve.read(view))

    def width(self, view: LoadView, now: float) -> int:
        return self.valve.width(view, now)

    def raises_rows(self, scheduled: Scheduled, width: int) -> bool:
        tokens: dict[int, int] = {}
        for request, count in scheduled:
            tokens[request.width] = tokens.get(request.width, 0) + count
        return not self.price.is_cheaper_mixed(tokens, width)

    def expected_kl(self, request: LiveRequest) -> tuple[float, float]:
        if request.decision is None:
            return 0.0, 0.0
        points = (request.decision.size, request.width), (request.sizes[-1], request.max_width)
        kind, widths = request.asked.workload, self.table.widths
        now, best = (self.table.candidate(size, offered_width(width, widths), kind).kl for size, width in points)
        return now, min(now, best)

    def decode_seconds(self, rows: np.ndarray, width: int = EXACT) -> float:
        return self.price.decode_seconds(rows.astype(int).tolist(), width=offered_width(width, self.table.widths))

    def observe_step(self, batch: ForwardBatch, seconds: float, end: float | None = None) -> None:
        """Learn from a step of `seconds` in the model that ended at `end` on the scheduler's clock.

        Short steps are learned from some at a time: after a step's weights have passed through the caches the first
        one costs 0.15 ms, the others a tenth of that.
        """
        gap = -1.0 if end is None or self._last_end is None else end - seconds - self._last_end
        self._last_end = end
        self._unlearned.append((batch, seconds, gap))
        self._unlearned_seconds += seconds
        if len(self._unlearned) >= 32 or self._unlearned_seconds >= 0.1:
            self._learn()

    def _learn(self) -> None:
        for batch, seconds, gap in self._unlearned:
            self.cost.observe(self.cost.shape(batch), seconds)
            if 0.0 <= gap < 0.25:
                self.cost.observe_overhead(gap, len(batch.sizes))
        self._unlearned.clear()
        self._unlearned_seconds = 0.0

    def on_idle(self) -> None:
        self._learn()
        self._last_end = None
        self.valve.open()

    def on_stop(self) -> None:
        self._learn()
        if self._keep is not None:
            self.cost.settle()
            self._keep(self.cost)
