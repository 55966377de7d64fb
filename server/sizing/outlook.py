"""The machine as it is, seen from one request: what a candidate would make of this moment's load.

S stations. Times in seconds. Layer-tokens are tokens times layers.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

from server.core.load import LoadView
from server.core.request import LiveRequest
from server.core.size_policy import PrefillBudget
from server.cost.model import CostModel
from server.cost.price import HEADROOM, StepPrice
from server.sizing.candidates import Candidate
from server.sizing.demand import Demand
from server.sizing.shares import Shares, VisibleLoad
from server.sizing.tenants import Tenants

_CATCH_UP = 8  # steps within which a request makes up for being behind
NEVER = 1e6  # seconds; stands for "not at all" where infinity would breed NaN
MOST_BUSY = 0.95  # share of time that prompts take at most, where decode steps are stretched by them


class Prediction(NamedTuple):
    """For one candidate, in seconds but for `kv`."""

    step: float  # a decode step of the running mix with this request in it
    tpot: float  # time per output token with those who wait in it too, prompts of others in between
    ttft: float  # from arrival to the first token, if admitted now
    queue_ttft: float  # the same for the last of those who wait, if all take this size
    kv: float  # KV pages wanted over pages to be had


class Frame(NamedTuple):
    """What all sizes have in common at one width. Seconds."""

    layers: list[float]  # of a decode step with this request, by the stations at which it runs the teacher's block
    heads: tuple[float, float]  # the heads, and what no candidate changes: with the student's head, the teacher's
    layers_joined: list[float]  # the same with those who wait
    heads_joined: tuple[float, float]
    rate: float  # per layer-token of prompts beside the rows that decode
    head_start: float  # until the first token, beside the steps
    queue_start: float


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

    def moment(self, request: LiveRequest, view: LoadView, now: float) -> Moment:
        """This moment as `request` may see it."""
        tightest = view.load.tightest_tpot()
        return Moment(self, request, view, now, tightest, self.shares.visible_to(request, view, tightest))

    def prefill_budget(self, view: LoadView, now: float, margin: float, width: int) -> PrefillBudget | None:
        """What fits of prompts beside this step's decode rows, all at `width`, without breaking their TPOT.

        A request that is ahead of its limit may spend half of its lead at once; one that is behind makes it up within
        a few steps, which also corrects predictions that are a little low. One that can no longer meet its limit binds
        nobody. None: nothing binds.
        """
        load = view.load
        if load.tightest_tpot() is None:
            return None
        rows = load.num_rows
        price = self.price
        step = price.decode_step(load.rows, load.layer_context, width)
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
        layer = self.cost.layers[width]
        tokens = layer.inverse(layer(rows) + left / self._full_weight) - rows
        return PrefillBudget(int(max(tokens, self.min_chunk) * price.top), max(allowed, decode))

    def pays_to_shrink(self, requests: list[LiveRequest], view: LoadView, width: int) -> bool:
        """Whether steps get so much shorter that computing these texts again at their floors is worth it."""
        load, price = view.load, self.price
        rows, layer_context = list(load.rows), load.layer_context
        before = price.decode_seconds(rows, layer_context, width)
        rate = price.token_rate(load.num_rows, view.config.max_num_batched_tokens, width)
        change_seconds, remaining = 0.0, 0
        for request in requests:
            size, floor, tokens = request.path.size, request.sizes[0], request.num_tokens
            rows[size] -= 1
            rows[floor] += 1
            layer_context -= (size - floor) * tokens
            kept = view.kv_cache.num_kept_layers(request, view.elasticity.path(floor))
            change_seconds += self.change_seconds(tokens, floor - kept, rate)
            remaining += request.sampling.max_tokens - len(request.output_token_ids)
        saved = (before - price.decode_seconds(rows, layer_context, width)) * remaining / len(requests)
        return saved > 2.0 * change_seconds

    def change_seconds(self, num_tokens: int, num_layers: int, rate: float) -> float:
        """What a change of size costs: the text so far, at `rate` seconds per token and layer, on the layers that it
        has to be computed on (those of the new size, less those below a hidden state that was kept)."""
        attention = self.cost.prefill_context * self.cost.prompt_scale(1) * 0.5 * num_tokens
        return num_tokens * num_layers * (rate + attention)

    def drain_seconds(self, view: LoadView, width: int) -> float:
        """Until everything that waits now is admitted, at the smallest size: its prompts, and slots that fall free."""
        load, waiting, slots = view.load, view.waiting, view.config.max_num_seqs
        count, price = len(waiting), self.price
        if not count:
            return 0.0
        full = min(load.num_rows + count, slots)
        rows = list(load.rows)
        rows[self._smallest] += full - load.num_rows
        rate = price.token_rate(full, min(waiting.num_tokens, view.config.max_num_batched_tokens), width)
        prompts = waiting.num_tokens * price.path_weights[self._smallest] * rate
        overflow = max(count - (slots - load.num_rows), 0)
        return prompts + overflow * self.demand.mean_output * price.decode_seconds(rows, width=width) / full


class Moment:
    """One request and the load of one moment: predicts what a candidate would make of them.

    Plain numbers throughout: for the few candidates of a decision a loop costs less than numpy's calls. A step is
    priced as `StepPrice` does, taking apart what a candidate changes, what its width changes, and what neither does.
    """

    __slots__ = (
        *("outlook", "visible", "num_output", "_at_least", "_num_rows", "_many", "_fixed", "_per_layer"),
        *("_scale", "_prompt_scale", "_between", "_between_joined", "_prompt", "_backlog", "_chunk", "_attention"),
        *("_full_step", "_waited", "_behind", "_turnover", "_arrivals", "_pages_layer", "_alone", "_room", "_running"),
        "_frames",
    )

    def __init__(
        self, outlook: Outlook, request: LiveRequest, view: LoadView, now: float, guard: float | None,
        visible: VisibleLoad,
    ) -> None:  # fmt: skip
        cost, price, load, config = outlook.cost, outlook.price, view.load, view.config
        self.outlook, self.visible = outlook, visible
        sampling, demand = request.sampling, outlook.demand
        num_output = demand.expected_output(sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos)
        self.num_output = num_output  # expected tokens of the answer
        own_waiting, own_waiting_tokens = view.waiting.waiting_of(request.tenant)
        free_slots = max(config.max_num_seqs - load.num_rows, 0)
        joining = min(max(own_waiting - 1, 0), max(free_slots - 1, 0))

        # A decode step with one more row: (layers + head and what no candidate changes + `per_layer` * size) * `scale`,
        # and `between` it and the next. Shares of rows, summed in another order, may come out on the other side of a
        # whole number.
        self._at_least = at_least = list(map(math.ceil, accumulate(reversed(visible.rows))))
        self._num_rows = num_rows = max(math.ceil(visible.num_rows), at_least[-1])
        num_tokens = request.num_tokens
        layer_rows = load.layer_rows * visible.fraction
        self._fixed = cost.fixed + cost.decode_context * load.layer_context * visible.fraction
        self._fixed += cost.request_layers * layer_rows
        self._per_layer = cost.decode_context * (num_tokens + 0.5 * num_output) + cost.request_layers
        self._scale, self._prompt_scale = cost.correction["decode"], cost.prompt_scale(num_rows)
        self._between = price.between(num_rows + 1)
        self._many = 1 + joining
        self._between_joined = price.between(num_rows + self._many)

        # Prompts: layer-tokens that wait, and how many of them a step takes.
        self._prompt = prompt = max(num_tokens - 1, 1)
        self._backlog = max(load.layer_pending - load.layer_rows, 0)
        limit_tokens = config.max_num_batched_tokens
        self._chunk = min(max(prompt + self._backlog / outlook._full_weight, 1.0), limit_tokens)
        self._attention = cost.prefill_context * 0.5 * prompt * prompt * self._prompt_scale
        self._full_step = limit_tokens * outlook._full_weight
        self._waited = now - request.arrival_time
        self._behind = behind = max(own_waiting_tokens - num_tokens, 0)
        self._turnover = outlook.shares.slots_before(request, view, own_waiting, free_slots) * num_output
        arrivals, mean_prompt = demand.rate(request.tenant, now)
        self._arrivals = arrivals * mean_prompt
        pages = view.kv_cache
        own_pages = (num_tokens + num_output) / pages.page_size + 1.0
        others = joining * (behind / max(own_waiting - 1, 1) + num_output) / pages.page_size if joining else 0.0
        growth = layer_rows * 0.5 * num_output / pages.page_size
        self._pages_layer = (own_pages + others) / max(pages.num_free_pages - growth, 1.0)
        alone = (cost.fixed * self._prompt_scale + self._between, cost.request_layers * self._prompt_scale)
        self._alone = None if num_rows else alone  # what a step with prompts takes beside their tokens: fixed, a layer
        self._room = None if guard is None or not num_rows else HEADROOM * guard
        self._running = load.num_rows
        self._frames: dict[int, Frame] = {}

    def predict(self, candidate: Candidate, width: int) -> Prediction:
        """If all rows of its steps read `width`."""
        frame = self._frames.get(width) or self._frame(width)
        size, weight, num_on_teacher = candidate.size, candidate.path_weight, candidate.num_on_teacher
        in_model = frame.layers[num_on_teacher] + self._per_layer * size + frame.heads[candidate.is_teacher_head]
        step = joined = in_model * self._scale + self._between
        if self._many > 1:
            joined = frame.layers_joined[num_on_teacher] + self._per_layer * self._many * size
            joined = (joined + frame.heads_joined[candidate.is_teacher_head]) * self._scale + self._between_joined
        if self._alone is None:
            without_prompt = in_model * self._prompt_scale + self._between
        else:
            without_prompt = self._alone[0] + self._alone[1] * size
        rate, per_step = frame.rate, self._full_step
        if self._room is not None:
            left = (self._room - without_prompt) / (rate if rate > 1e-12 else 1e-12)
            least = self.outlook.min_chunk * size
            if left < least:
                left = least
            if left < per_step:
                per_step = left
        own_work = self._prompt * weight + self._backlog
        work = rate * own_work + self._attention * size
        num_steps = own_work / per_step
        queue = work + num_steps * without_prompt + frame.queue_start
        if self._behind:
            queue += self._behind * weight * (rate + without_prompt / per_step)
        if self._turnover:
            queue += self._turnover * step / self._running
        busy = self._arrivals * rate * weight
        tpot = joined / (1.0 - (busy if busy < MOST_BUSY else MOST_BUSY))
        ttft = work + math.ceil(num_steps) * without_prompt + frame.head_start
        return Prediction(step, tpot, ttft, queue, self._pages_layer * size)

    def _frame(self, width: int) -> Frame:
        cost, price, rows = self.outlook.cost, self.outlook.price, self._num_rows
        first_head = cost.heads[width](1) * self._prompt_scale
        layers, heads = self._layer_seconds(1, width), self._head_seconds(1, width)
        joined = layers, heads
        if self._many > 1:
            joined = self._layer_seconds(self._many, width), self._head_seconds(self._many, width)
        frame = self._frames[width] = Frame(
            layers, heads, *joined, price.token_rate(rows, self._chunk, width), self._waited + first_head,
            first_head + 0.5 * self._waited,
        )  # fmt: skip
        return frame

    def _layer_seconds(self, more: int, width: int) -> list[float]:
        """Seconds of all layers of a decode step with `more` rows of one size added, by the number of stations at which
        that size runs the teacher's block: [stations + 1].

        Because the order is nested, a station has the new rows either on the teacher's side or on the student's: two
        prices per station, whichever the size, and each size takes one station more over to the teacher's.
        """
        price, num_rows, at_least = self.outlook.price, self._num_rows, self._at_least
        g = self.outlook.cost.layers[width].upto(num_rows + more)
        seconds = price.joint_weight * g[num_rows + more]
        gains = []
        for reach, teacher, student in price.stations:
            above = at_least[reach]
            below = num_rows - above
            without = g[above] * teacher + g[below + more] * student
            gains.append(g[above + more] * teacher + g[below] * student - without)
            seconds += without
        return list(accumulate(gains, initial=seconds))

    def _head_seconds(self, more: int, width: int) -> tuple[float, float]:
        """The heads and what no candidate changes, with `more` rows of a size that uses the student's head, and the
        teacher's."""
        price, num_rows, fixed = self.outlook.price, self._num_rows, self._fixed
        threshold = price.head_threshold
        h = self.outlook.cost.heads[width].upto(num_rows + more)
        if threshold is None:
            seconds = fixed + h[num_rows + more]
            return seconds, seconds
        above = self._at_least[price.top - threshold]
        below = num_rows - above
        return fixed + h[above] + h[below + more], fixed + h[above + more] + h[below]
