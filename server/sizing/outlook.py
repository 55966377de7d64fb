"""The machine as it is, seen from one request: what each candidate size would make of this moment's load.

C candidates, S stations. Times in seconds. Layer-tokens are tokens times layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from server.core.request import LiveRequest
from server.core.size_policy import PrefillBudget
from server.cost.model import KNOTS, CostModel
from server.sizing.candidates import Candidates, CandidateTable
from server.sizing.demand import Demand
from server.sizing.shares import Shares
from server.sizing.tenants import Tenants

if TYPE_CHECKING:
    from server.core.load import LoadView

_CATCH_UP = 8  # steps within which a request makes up for being behind
NEVER = 1e6  # seconds; stands for "not at all" where infinity would breed NaN


@dataclass(slots=True)
class Predictions:
    """Predictions for C candidate sizes of one request: lists of C, in seconds but for `kv`."""

    step: list[float]  # a decode step of the running mix with this request in it
    tpot: list[float]  # time per output token with those who wait in it too, prompts of others in between
    ttft: list[float]  # from arrival to the first token, if admitted now
    queue_ttft: list[float]  # the same for the last of those who wait, if all take this size
    kv: list[float]  # KV pages wanted over pages to be had
    num_output: float  # expected tokens of the answer
    tpot_limit: float | None  # the tightest of those who run, within their share: admission must not break it
    tpot_limit_share: float  # and how much of it may be used


class Outlook:
    """Reads the running totals, and keeps nothing but what follows from the cost model alone."""

    def __init__(
        self, cost: CostModel, table: CandidateTable, demand: Demand, tenants: Tenants, min_chunk: int
    ) -> None:
        self.cost = cost
        self.table = table
        self.demand = demand
        self.shares = Shares(cost, table, tenants)
        self.min_chunk = min_chunk
        self._all_sizes = np.arange(cost.profile.elasticity.num_teacher_layers + 1, dtype=np.float64)
        self._full_weight = table.full_weight

    def predict(self, candidates: Candidates, request: LiveRequest, view: LoadView, now: float) -> Predictions:
        """Plain numbers throughout: for the few sizes of a pair a loop costs less than numpy's calls."""
        cost, load, config = self.cost, view.load, view.config
        sampling = request.sampling
        num_output = self.demand.expected_output(sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos)
        own_waiting, own_waiting_tokens = view.waiting.waiting_of(request.tenant)
        free_slots = max(config.max_num_seqs - load.num_rows, 0)
        joining = min(max(own_waiting - 1, 0), max(free_slots - 1, 0))

        # A decode step, by size: (seconds of the layers + `own` per layer + `base`) * `scale`
        guard = load.tightest_tpot()
        seen = self.shares.seen_by(request, view, guard)
        total = math.ceil(seen.num_rows)
        num_tokens = request.num_tokens
        weighted_rows = load.layer_rows * seen.crowd
        base = cost.fixed + cost.overhead + cost.decode_context * load.layer_context * seen.crowd
        base += cost.request_layers * weighted_rows + cost.overhead_per_request * (total + 1)
        scale = cost.correction["decode"]
        own = cost.decode_context * (num_tokens + 0.5 * num_output) + cost.request_layers
        more = 1 + joining
        layers = self._layer_seconds(seen.rows, total, 1)
        if joining:
            layers_joined = self._layer_seconds(seen.rows, total, more)
            own_joined, base_joined = own * more, base + cost.head_seconds_of(total + more)
        base += cost.head_seconds_of(total + 1)

        # Prompts: seconds per layer-token beside the rows that decode, and how many of them a step takes.
        prompt = max(num_tokens - 1, 1)
        backlog = max(load.layer_pending - load.layer_rows, 0)
        limit_tokens = config.max_num_batched_tokens
        rate = self._token_rate(total, min(max(prompt + backlog / self._full_weight, 1.0), limit_tokens))
        rate_or_less = max(rate, 1e-12)
        attention = cost.prefill_context * 0.5 * prompt * prompt * cost.prompt_scale(total)
        full_step = limit_tokens * self._full_weight
        beside = cost.fixed + cost.overhead
        first = cost.head_seconds_of(1)
        waited = now - request.arrival_time
        behind = max(own_waiting_tokens - num_tokens, 0)
        turnover = self.shares.slots_before(request, view, own_waiting, free_slots) * num_output

        arrivals, mean_prompt = self.demand.rate(request.tenant, now)
        busy_layer = arrivals * mean_prompt * rate
        kv_cache = view.kv_cache
        page = kv_cache.page_size
        own_pages = (num_tokens + num_output) / page + 1.0
        others = joining * (behind / max(own_waiting - 1, 1) + num_output) / page if joining else 0.0
        growth = weighted_rows * 0.5 * num_output / page
        pages_layer = (own_pages + others) / max(kv_cache.num_free_pages - growth, 1.0)

        # The loop below runs for every size: names instead of attributes, comparisons instead of min and max.
        ceil, min_chunk, head_start, queue_start = math.ceil, self.min_chunk, waited + first, first + 0.5 * waited
        room = None if guard is None or not total else 0.9 * guard
        num_rows = load.num_rows
        steps, tpots, ttfts, queues = [], [], [], []
        for size, patched in candidates.columns:
            step = many = (layers[patched] + own * size + base) * scale
            if joining:
                many = (layers_joined[patched] + own_joined * size + base_joined) * scale
            if total:
                beside = step
            per_step = full_step
            if room is not None:
                left = (room - step) / rate_or_less
                least = min_chunk * size
                if left < least:
                    left = least
                if left < full_step:
                    per_step = left
            own_work = prompt * size + backlog
            work = rate * own_work + attention * size
            num_steps = own_work / per_step
            queue = work + num_steps * beside + queue_start
            if behind:
                queue += behind * size * (rate + beside / per_step)
            if turnover:
                queue += turnover * step / num_rows
            busy = busy_layer * size
            steps.append(step)
            tpots.append(many / (1.0 - (busy if busy < 0.9 else 0.9)))
            ttfts.append(work + ceil(num_steps) * beside + head_start)
            queues.append(queue)
        kv = [pages_layer * size for size in candidates.sizes]
        return Predictions(steps, tpots, ttfts, queues, kv, num_output, seen.limit, seen.limit_share)

    def _layer_seconds(self, rows: list[float], total: int, more: int) -> list[float]:
        """Seconds of all layers of a decode step with `more` rows of one size added to `rows` (from the smallest size
        on, `total` in all), by the number of stations at which that size runs the teacher's block: [stations + 1].

        Because the order is nested, a station has the new rows either on the teacher's side or on the student's: two
        prices per station, whichever the size, and each size takes one station more over to the teacher's.
        """
        table = self.table
        at_least = list(map(math.ceil, accumulate(reversed(rows))))  # rows of the largest size, of the two largest, ...
        # Shares of rows, summed in another order, may come out on the other side of a whole number.
        total = max(total, at_least[-1])
        g = self.cost.layer_table
        if total + more >= len(g):
            g = _Curve(self.cost.layer_seconds_of)
        base = table.joint_weight * g[total + more] if table.joint_weight else 0.0
        gains = []
        for reach, teacher, student in table.patches:
            above = at_least[reach]
            below = total - above
            without = g[above] * teacher + g[below + more] * student
            gains.append(g[above + more] * teacher + g[below] * student - without)
            base += without
        return list(accumulate(gains, initial=base))

    def idle(self, candidates: Candidates, num_prompt: int, max_batched: int = 1024) -> tuple[np.ndarray, np.ndarray]:
        """(TTFT, TPOT) [C] of one request alone, in seconds."""
        cost = self.cost
        weights = self.table.path_weights(candidates.on_teacher)
        sizes = candidates.sizes_array
        per_step = cost.fixed + cost.overhead
        whole, rest = divmod(num_prompt, max_batched)
        ttft = np.zeros(len(sizes))
        for count, tokens in ((whole, max_batched), (1 if rest else 0, rest)):
            ttft += count * (per_step + weights * float(cost.layer_seconds(tokens)))
        ttft += cost.prefill_context * sizes * 0.5 * num_prompt**2 + float(cost.head_seconds(1.0))
        tpot = per_step + weights * float(cost.layer_seconds(1.0)) + float(cost.head_seconds(1.0))
        tpot += sizes * (cost.decode_context * num_prompt + cost.request_layers)
        return ttft, tpot

    def prefill_budget(self, view: LoadView, now: float, margin: float) -> PrefillBudget | None:
        """What fits of prompts beside this step's decode rows without breaking their TPOT.

        A request that is ahead of its limit may spend half of its lead at once; one that is behind makes it up within
        a few steps, which also corrects predictions that are a little low. One that can no longer meet its limit binds
        nobody. None: nothing binds.
        """
        load = view.load
        if load.tightest_tpot() is None:
            return None
        decode = self.mix_seconds(np.asarray(load.rows, np.float64), load.context)
        allowed = None
        for request in view.running:
            limit = request.budget.tpot
            num_output = len(request.output_token_ids)
            if limit is None or not num_output:
                continue
            # Measured against the limit less the margin: who lives off a lead should end with a little of it left.
            lead = request.first_token_time + margin * limit * (num_output - 1) - now
            if lead < 0.0:
                remaining = request.sampling.max_tokens - num_output
                if now - request.first_token_time - limit * (num_output - 1) > remaining * max(limit - decode, 0.0):
                    continue  # lost
                lead = 2.0 * lead / max(min(remaining, _CATCH_UP), 1)
            span = margin * limit + 0.5 * lead
            if allowed is None or span < allowed:
                allowed = span
        if allowed is None:
            return None
        # A step with prompts is predicted with a correction of its own, for its decode rows too.
        without = decode / self.cost.correction["decode"]
        per_layer = max(allowed / self.cost.prompt_scale(load.num_rows) - without, 0.0) / self._full_weight
        rows = load.num_rows
        tokens = self.cost.tokens_within(float(self.cost.layer_seconds(rows)) + per_layer) - rows
        budget = int(max(tokens, self.min_chunk) * self.cost.profile.elasticity.num_teacher_layers)
        return PrefillBudget(budget, max(allowed, decode))

    def mix_seconds(self, rows: np.ndarray, context: list[int] | None = None) -> float:
        """A decode step of `rows[size]` requests, in seconds, overhead included."""
        cost = self.cost
        total = rows.sum()
        if total < 0.5:
            return cost.fixed + cost.overhead
        on_teacher = rows[::-1].cumsum()[::-1][self.table.thresholds]
        split = np.stack((on_teacher, total - on_teacher))
        seconds = np.interp(split, KNOTS, cost._g) * (split > 0.5)
        value = cost.fixed + cost.overhead + float(seconds[0] @ self.table.teacher_weights)
        value += float(seconds[1] @ self.table.student_weights) + float(cost.head_seconds(total))
        value += self.table.joint_weight * float(cost.layer_seconds(total))
        value += cost.request_layers * float(rows @ self._all_sizes) + cost.overhead_per_request * total
        if context is not None:
            value += cost.decode_context * float(np.asarray(context, np.float64) @ self._all_sizes)
        return value * cost.correction["decode"]

    def pays_to_shrink(self, requests: list[LiveRequest], view: LoadView) -> bool:
        """Whether steps get so much shorter that computing these texts again at their floors is worth it."""
        load = view.load
        rows, context = np.asarray(load.rows, np.float64), list(load.context)
        before = self.mix_seconds(rows, context)
        rate = self._token_rate(load.num_rows, view.config.max_num_batched_tokens)
        cost = remaining = 0.0
        for request in requests:
            size, floor, tokens = request.path.size, request.sizes[0], request.num_tokens
            rows[size] -= 1.0
            rows[floor] += 1.0
            context[size] -= tokens
            context[floor] += tokens
            kept = view.kv_cache.num_kept_layers(request, view.elasticity.path(floor))
            cost += self.change_seconds(tokens, floor - kept, rate)
            remaining += request.sampling.max_tokens - len(request.output_token_ids)
        saved = (before - self.mix_seconds(rows, context)) * remaining / len(requests)
        return saved > 2.0 * cost

    def change_seconds(self, num_tokens: int, num_layers: int, rate: float) -> float:
        """What a change of size costs: the text so far, at `rate` seconds per token and layer, on the layers that it
        has to be computed on (those of the new size, less those below a hidden state that was kept)."""
        attention = self.cost.prefill_context * self.cost.prompt_scale(1) * 0.5 * num_tokens
        return num_tokens * num_layers * (rate + attention)

    def drain_seconds(self, view: LoadView) -> float:
        """Until everything that waits now is admitted, at the smallest size: its prompts, and slots that fall free."""
        load, waiting, slots = view.load, view.waiting, view.config.max_num_seqs
        count, size = len(waiting), self.table.sizes[0]
        if not count:
            return 0.0
        full = min(load.num_rows + count, slots)
        rows = np.asarray(load.rows, np.float64)
        rows[size] += full - load.num_rows
        rate = self._token_rate(full, min(waiting.num_tokens, view.config.max_num_batched_tokens))
        overflow = max(count - (slots - load.num_rows), 0)
        return waiting.num_tokens * size * rate + overflow * self.demand.mean_output * self.mix_seconds(rows) / full

    # --- parts

    def _token_rate(self, rows: float, tokens: float) -> float:
        """Seconds per token and layer of `tokens` more tokens in a step that has `rows` already."""
        g = self.cost.layer_seconds_of
        return (g(rows + tokens) - g(rows)) / max(tokens, 1.0) * self.cost.prompt_scale(rows)


class _Curve:
    """A function of a number that is asked like a table."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self._function = function

    def __getitem__(self, x: float) -> float:
        return self._function(x)
