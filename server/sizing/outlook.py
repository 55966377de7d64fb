"""The machine as it is, seen from one request: what each candidate size would make of this moment's load.

C candidates, S stations. Times in seconds. Layer-tokens are tokens times layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from server.core.load import LoadView
from server.core.request import LiveRequest
from server.core.size_policy import PrefillBudget
from server.cost.model import CostModel
from server.cost.price import HEADROOM, StepPrice
from server.sizing.candidates import Candidates
from server.sizing.demand import Demand
from server.sizing.shares import Shares
from server.sizing.tenants import Tenants

_CATCH_UP = 8  # steps within which a request makes up for being behind
NEVER = 1e6  # seconds; stands for "not at all" where infinity would breed NaN
MOST_BUSY = 0.95  # share of time that prompts take at most, where decode steps are stretched by them


@dataclass(slots=True)
class Predictions:
    """For C candidate sizes of one request: lists of C, in seconds but for `kv`."""

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

    def __init__(self, cost: CostModel, price: StepPrice, demand: Demand, tenants: Tenants, min_chunk: int) -> None:
        self.cost = cost
        self.price = price
        self.demand = demand
        self.shares = Shares(price, tenants)
        self.min_chunk = min_chunk
        self._smallest = cost.profile.elasticity.sizes[0]
        self._full_weight = price.path_weights[price.top]

    def predict(self, candidates: Candidates, request: LiveRequest, view: LoadView, now: float) -> Predictions:
        """Plain numbers throughout: for the few sizes of a pair a loop costs less than numpy's calls.

        The loop prices a step as `StepPrice` does, taking apart what a size changes and what it does not.
        """
        cost, price, load, config = self.cost, self.price, view.load, view.config
        sampling = request.sampling
        num_output = self.demand.expected_output(sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos)
        own_waiting, own_waiting_tokens = view.waiting.waiting_of(request.tenant)
        free_slots = max(config.max_num_seqs - load.num_rows, 0)
        joining = min(max(own_waiting - 1, 0), max(free_slots - 1, 0))

        # A decode step with one more row: (layers + head and what no size changes + `per_layer` * size) * `scale`,
        # and `between` it and the next.
        guard = load.tightest_tpot()
        visible = self.shares.visible_to(request, view, guard)
        # Shares of rows, summed in another order, may come out on the other side of a whole number.
        at_least = list(map(math.ceil, accumulate(reversed(visible.rows))))
        num_rows = max(math.ceil(visible.num_rows), at_least[-1])
        num_tokens = request.num_tokens
        layer_rows = load.layer_rows * visible.fraction
        fixed = cost.fixed + cost.decode_context * load.layer_context * visible.fraction
        fixed += cost.request_layers * layer_rows
        per_layer = cost.decode_context * (num_tokens + 0.5 * num_output) + cost.request_layers
        scale, prompt_scale = cost.correction["decode"], cost.prompt_scale(num_rows)
        layers = self._layer_seconds(at_least, num_rows, 1)
        heads = self._head_seconds(at_least, num_rows, 1, fixed)
        between = price.between(num_rows + 1)
        if joining:
            many = 1 + joining
            layers_joined = self._layer_seconds(at_least, num_rows, many)
            heads_joined = self._head_seconds(at_least, num_rows, many, fixed)
            per_layer_joined, between_joined = per_layer * many, price.between(num_rows + many)

        # Prompts: seconds per layer-token beside the rows that decode, and how many of them a step takes.
        prompt = max(num_tokens - 1, 1)
        backlog = max(load.layer_pending - load.layer_rows, 0)
        limit_tokens = config.max_num_batched_tokens
        rate = price.token_rate(num_rows, min(max(prompt + backlog / self._full_weight, 1.0), limit_tokens))
        rate_or_less = max(rate, 1e-12)
        attention = cost.prefill_context * 0.5 * prompt * prompt * prompt_scale
        full_step = limit_tokens * self._full_weight
        first_head = cost.head(1) * prompt_scale
        waited = now - request.arrival_time
        behind = max(own_waiting_tokens - num_tokens, 0)
        turnover = self.shares.slots_before(request, view, own_waiting, free_slots) * num_output

        arrivals, mean_prompt = self.demand.rate(request.tenant, now)
        busy_layer = arrivals * mean_prompt * rate
        pages = view.kv_cache
        own_pages = (num_tokens + num_output) / pages.page_size + 1.0
        others = joining * (behind / max(own_waiting - 1, 1) + num_output) / pages.page_size if joining else 0.0
        growth = layer_rows * 0.5 * num_output / pages.page_size
        pages_layer = (own_pages + others) / max(pages.num_free_pages - growth, 1.0)

        # The loop below runs for every size: names instead of attributes, comparisons instead of min and max.
        ceil, min_chunk, most_busy = math.ceil, self.min_chunk, MOST_BUSY
        head_start, queue_start = waited + first_head, first_head + 0.5 * waited
        alone_fixed, alone_layer = cost.fixed * prompt_scale + between, cost.request_layers * prompt_scale
        room = None if guard is None or not num_rows else HEADROOM * guard
        running = load.num_rows
        steps, tpots, ttfts, queues = [], [], [], []
        for size, num_on_teacher, weight, is_teacher_head in candidates.columns:
            in_model = layers[num_on_teacher] + per_layer * size + heads[is_teacher_head]
            step = joined = in_model * scale + between
            if joining:
                in_model_joined = (
                    layers_joined[num_on_teacher] + per_layer_joined * size + heads_joined[is_teacher_head]
                )
                joined = in_model_joined * scale + between_joined
            # What a step with prompts takes beside their tokens.
            without_prompt = in_model * prompt_scale + between if num_rows else alone_fixed + alone_layer * size
            per_step = full_step
            if room is not None:
                left = (room - without_prompt) / rate_or_less
                least = min_chunk * size
                if left < least:
                    left = least
                if left < full_step:
                    per_step = left
            own_work = prompt * weight + backlog
            work = rate * own_work + attention * size
            num_steps = own_work / per_step
            queue = work + num_steps * without_prompt + queue_start
            if behind:
                queue += behind * weight * (rate + without_prompt / per_step)
            if turnover:
                queue += turnover * step / running
            busy = busy_layer * weight
            steps.append(step)
            tpots.append(joined / (1.0 - (busy if busy < most_busy else most_busy)))
            ttfts.append(work + ceil(num_steps) * without_prompt + head_start)
            queues.append(queue)
        kv = [pages_layer * size for size in candidates.sizes]
        limit, share = visible.tpot_limit, visible.tpot_limit_share
        return Predictions(steps, tpots, ttfts, queues, kv, num_output, limit, share)

    def _layer_seconds(self, at_least: Sequence[int], num_rows: int, more: int) -> list[float]:
        """Seconds of all layers of a decode step with `more` rows of one size added to `num_rows`, by the number of
        stations at which that size runs the teacher's block: [stations + 1]. `at_least`: rows of the largest size, of
        the two largest, ... down to the smallest.

        Because the order is nested, a station has the new rows either on the teacher's side or on the student's: two
        prices per station, whichever the size, and each size takes one station more over to the teacher's.
        """
        price = self.price
        g = self.cost.layer.upto(num_rows + more)
        seconds = price.joint_weight * g[num_rows + more]
        gains = []
        for reach, teacher, student in price.stations:
            above = at_least[reach]
            below = num_rows - above
            without = g[above] * teacher + g[below + more] * student
            gains.append(g[above + more] * teacher + g[below] * student - without)
            seconds += without
        return list(accumulate(gains, initial=seconds))

    def _head_seconds(self, at_least: Sequence[int], num_rows: int, more: int, fixed: float) -> tuple[float, float]:
        """`fixed` and the heads, with `more` rows of a size that uses the student's head, and the teacher's."""
        threshold = self.price.head_threshold
        h = self.cost.head.upto(num_rows + more)
        if threshold is None:
            seconds = fixed + h[num_rows + more]
            return seconds, seconds
        above = at_least[self.price.top - threshold]
        below = num_rows - above
        return fixed + h[above] + h[below + more], fixed + h[above + more] + h[below]

    def prefill_budget(self, view: LoadView, now: float, margin: float) -> PrefillBudget | None:
        """What fits of prompts beside this step's decode rows without breaking their TPOT.

        A request that is ahead of its limit may spend half of its lead at once; one that is behind makes it up within
        a few steps, which also corrects predictions that are a little low. One that can no longer meet its limit binds
        nobody. None: nothing binds.
        """
        load = view.load
        if load.tightest_tpot() is None:
            return None
        rows = load.num_rows
        price = self.price
        step = price.decode_step(load.rows, load.layer_context)
        in_model, between = price.model_seconds(step), price.between(rows)
        decode = in_model * self.cost.correction["decode"] + between
        allowed = None
        for request in view.running:
            limit, first_token_time = request.budget.tpot, request.first_token_time
            num_output = len(request.output_token_ids)
            if limit is None or first_token_time is None:
                continue
            # Measured against the limit less the margin: who lives off a lead should end with a little of it left.
            lead = first_token_time + margin * limit * (num_output - 1) - now
            if lead < 0.0:
                remaining = request.sampling.max_tokens - num_output
                if now - first_token_time - limit * (num_output - 1) > remaining * max(limit - decode, 0.0):
                    continue  # lost
                lead = 2.0 * lead / max(min(remaining, _CATCH_UP), 1)
            span = margin * limit + 0.5 * lead
            if allowed is None or span < allowed:
                allowed = span
        if allowed is None:
            return None
        # A step with prompts has a correction of its own, for its decode rows too.
        left = max((allowed - between) / self.cost.prompt_scale(rows) - in_model, 0.0)
        layer = self.cost.layer
        tokens = layer.inverse(layer(rows) + left / self._full_weight) - rows
        return PrefillBudget(int(max(tokens, self.min_chunk) * price.top), max(allowed, decode))

    def pays_to_shrink(self, requests: list[LiveRequest], view: LoadView) -> bool:
        """Whether steps get so much shorter that computing these texts again at their floors is worth it."""
        load, price = view.load, self.price
        rows, layer_context = list(load.rows), load.layer_context
        before = price.decode_seconds(rows, layer_context)
        rate = price.token_rate(load.num_rows, view.config.max_num_batched_tokens)
        change_seconds, remaining = 0.0, 0
        for request in requests:
            size, floor, tokens = request.path.size, request.sizes[0], request.num_tokens
            rows[size] -= 1
            rows[floor] += 1
            layer_context -= (size - floor) * tokens
            kept = view.kv_cache.num_kept_layers(request, view.elasticity.path(floor))
            change_seconds += self.change_seconds(tokens, floor - kept, rate)
            remaining += request.sampling.max_tokens - len(request.output_token_ids)
        saved = (before - price.decode_seconds(rows, layer_context)) * remaining / len(requests)
        return saved > 2.0 * change_seconds

    def change_seconds(self, num_tokens: int, num_layers: int, rate: float) -> float:
        """What a change of size costs: the text so far, at `rate` seconds per token and layer, on the layers that it
        has to be computed on (those of the new size, less those below a hidden state that was kept)."""
        attention = self.cost.prefill_context * self.cost.prompt_scale(1) * 0.5 * num_tokens
        return num_tokens * num_layers * (rate + attention)

    def drain_seconds(self, view: LoadView) -> float:
        """Until everything that waits now is admitted, at the smallest size: its prompts, and slots that fall free."""
        load, waiting, slots = view.load, view.waiting, view.config.max_num_seqs
        count, price = len(waiting), self.price
        if not count:
            return 0.0
        full = min(load.num_rows + count, slots)
        rows = list(load.rows)
        rows[self._smallest] += full - load.num_rows
        rate = price.token_rate(full, min(waiting.num_tokens, view.config.max_num_batched_tokens))
        prompts = waiting.num_tokens * price.path_weights[self._smallest] * rate
        overflow = max(count - (slots - load.num_rows), 0)
        return prompts + overflow * self.demand.mean_output * price.decode_seconds(rows) / full
