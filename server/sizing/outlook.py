"""The machine as it is, seen from one request: what each candidate size would make of this moment's load.

C candidates, S stations. Times in seconds. Layer-tokens are tokens times layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from server.engine.request import Request
from server.engine.size_policy import Pace
from server.sizing.candidates import Candidates, CandidateTable
from server.sizing.cost_model import KNOTS, CostModel
from server.sizing.demand import Demand
from server.sizing.tenants import Tenants

if TYPE_CHECKING:
    from server.engine.scheduler import Scheduler

_CATCH_UP = 8  # steps within which a request makes up for being behind
NEVER = 1e6  # seconds; stands for "not at all" where infinity would breed NaN


@dataclass(slots=True)
class View:
    """Predictions for C candidate sizes of one request."""

    step: np.ndarray  # [C] a decode step of the running mix with this request in it
    tpot: np.ndarray  # [C] time per output token with those who wait in it too, prompts of others in between
    ttft: np.ndarray  # [C] from arrival to the first token, if admitted now
    queue_ttft: np.ndarray  # [C] the same for the last of those who wait, if all take this size
    kv: np.ndarray  # [C] KV pages wanted over pages to be had
    num_output: float  # expected tokens of the answer
    tightest_tpot: float | None  # limit of those who run, within their share
    guarded_tpot: float | None  # what admission must not break
    guard_share: float


class Outlook:
    """Reads the scheduler's totals, and keeps nothing but what follows from the cost model alone."""

    def __init__(
        self, cost: CostModel, table: CandidateTable, demand: Demand, tenants: Tenants, min_chunk: int
    ) -> None:
        self.cost = cost
        self.table = table
        self.demand = demand
        self.tenants = tenants
        self.min_chunk = min_chunk
        self._capacity = (-1.0, -1, 0.0)  # limit, version of the cost model, `capacity_rows` for them
        self._all_sizes = np.arange(cost.profile.elasticity.num_teacher_layers + 1, dtype=np.float64)
        self._full_weight = float(self.table.teacher_weights.sum()) + self.table.joint_weight

    def view(self, candidates: Candidates, request: Request, scheduler: Scheduler, now: float) -> View:
        cost, load, config = self.cost, scheduler.load, scheduler.config
        sampling = request.sampling
        num_output = self.demand.expected_output(sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos)
        sizes = candidates.sizes_array
        waiting = len(scheduler.waiting)
        own_waiting, own_waiting_tokens = scheduler.waiting.waiting_of(request.tenant)
        free_slots = config.max_num_seqs - load.num_rows
        joining = min(max(own_waiting - 1, 0), max(free_slots - 1, 0))

        rows, guarded, guard_share, crowd = self._fair(request, scheduler)
        total = math.ceil(rows.sum())
        num_tokens = request.num_tokens
        layers = self._layer_seconds(candidates, rows, total, joining)
        weighted_rows = load.layer_rows * crowd
        base = cost.fixed + cost.overhead + cost.decode_context * load.layer_context * crowd
        base += cost.request_layers * weighted_rows + cost.overhead_per_request * (total + 1)
        scale = cost.correction["decode"]
        own = cost.decode_context * (num_tokens + 0.5 * num_output) + cost.request_layers  # per layer
        step = (layers[0] + own * sizes + (base + cost.head_seconds_of(total + 1))) * scale
        many = step
        if joining:
            more = 1 + joining
            many = (layers[1] + (own * more) * sizes + (base + cost.head_seconds_of(total + more))) * scale

        # Prompts: seconds per layer-token beside the rows that decode, and how many of them a step takes.
        prompt = max(num_tokens - 1, 1)
        backlog = max(load.layer_pending - load.layer_rows, 0)
        limit_tokens = config.max_num_batched_tokens
        rate = self._token_rate(total, min(max(prompt + backlog / self._full_weight, 1.0), limit_tokens))
        own_work = prompt * sizes + backlog
        work = rate * own_work + (cost.prefill_context * 0.5 * prompt * prompt) * sizes
        per_step = limit_tokens * self._full_weight
        guard = load.tightest_tpot()
        beside = step if total else cost.fixed + cost.overhead
        if guard is not None and total:
            room = (0.9 * guard - step) / max(rate, 1e-12)
            per_step = np.minimum(np.maximum(room, self.min_chunk * sizes), per_step)
        waited = now - request.arrival_time
        first = cost.head_seconds_of(1)
        steps = own_work / per_step
        ttft = work + np.ceil(steps) * beside + (waited + first)
        behind = max(own_waiting_tokens - num_tokens, 0)
        queue = work + steps * beside + (first + 0.5 * waited)
        if behind:
            queue += behind * sizes * (rate + beside / per_step)
        overflow = waiting - max(free_slots, 0)
        if overflow > 0 and load.num_rows:
            # The queue is fair: of others' requests no more go first than their weights entitle them to.
            names = {request.tenant, *scheduler.waiting.tenants()}
            total_weight = sum(self.tenants.weight(name) for name in names)
            ahead = min(waiting, own_waiting * total_weight / self.tenants.weight(request.tenant))
            overflow = max(ahead - max(free_slots, 0), 0)
            queue = queue + overflow * num_output * step / load.num_rows

        arrivals, mean_prompt = self.demand.rate(request.tenant, now)
        busy = np.minimum((arrivals * mean_prompt * rate) * sizes, 0.9)
        kv_cache = scheduler.kv_cache
        page = kv_cache.page_size
        own_pages = (num_tokens + num_output) / page + 1.0
        others = joining * (behind / max(own_waiting - 1, 1) + num_output) / page if joining else 0.0
        growth = weighted_rows * 0.5 * num_output / page
        free = max(kv_cache.num_free_pages - growth, 1.0)
        return View(
            step=step,
            tpot=many / (1.0 - busy),
            ttft=ttft,
            queue_ttft=queue,
            kv=sizes * ((own_pages + others) / free),
            num_output=num_output,
            tightest_tpot=guarded,
            guarded_tpot=guarded,
            guard_share=guard_share,
        )

    def _layer_seconds(self, candidates: Candidates, rows: np.ndarray, total: int, joining: int) -> np.ndarray:
        """[2, C] seconds of all layers of a decode step of `rows` with this request in it, and `joining` more like it.

        Because the order is nested, a station has either one row more on the teacher's side or on the student's: two
        prices per station, whichever the size.
        """
        table = self.table
        sides = np.empty((2, 1, len(table.thresholds)), np.intp)
        on_teacher = np.ceil(rows[::-1].cumsum()[::-1][table.thresholds])
        sides[0, 0] = on_teacher
        sides[1, 0] = total - on_teacher
        more = np.array(((0,), (1,), (1 + joining,)))
        if total + 1 + joining < len(self.cost.layer_table):
            prices = self.cost.layer_table[sides + more] * table.side_weights
        else:
            prices = self.cost.layer_seconds(sides + more) * table.side_weights
        teacher, student = prices
        with_teacher, with_student = teacher[1:] + student[0], teacher[0] + student[1:]
        layers = (with_teacher - with_student) @ candidates.on_teacher.T + with_student.sum(axis=1)[:, None]
        if table.joint_weight:
            joint = [self.cost.layer_seconds_of(total + n) for n in (1, 1 + joining)]
            layers += table.joint_weight * np.array(joint)[:, None]
        return layers

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

    def pace(self, scheduler: Scheduler, now: float, margin: float) -> Pace | None:
        """What fits of prompts beside this step's decode rows without breaking their TPOT.

        A request that is ahead of its limit may spend half of its lead at once; one that is behind makes it up within
        a few steps, which also corrects predictions that are a little low. One that can no longer meet its limit binds
        nobody. None: nothing binds.
        """
        load = scheduler.load
        if load.tightest_tpot() is None:
            return None
        decode = self.mix_seconds(np.asarray(load.rows, np.float64), load.context)
        allowed = None
        for request in scheduler.running:
            limit = request.budget.tpot
            num_output = len(request.output_token_ids)
            if limit is None or not num_output:
                continue
            # Measured against the paced limit: who lives off a lead should end with a little of it left.
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
        full = self._full_weight
        per_layer = max(allowed - decode, 0.0) / full
        rows = load.num_rows
        tokens = self.cost.tokens_within(float(self.cost.layer_seconds(rows)) + per_layer) - rows
        budget = int(max(tokens, self.min_chunk) * self.cost.profile.elasticity.num_teacher_layers)
        return Pace(budget, max(allowed, decode))

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

    def pays_to_shrink(self, requests: list[Request], scheduler: Scheduler) -> bool:
        """Whether steps get so much shorter that computing these texts again at their floors is worth it."""
        load = scheduler.load
        rows, context = np.asarray(load.rows, np.float64), list(load.context)
        before = self.mix_seconds(rows, context)
        rate = self._token_rate(load.num_rows, scheduler.config.max_num_batched_tokens)
        cost = remaining = 0.0
        for request in requests:
            size, floor, tokens = request.path.size, request.sizes[0], request.num_tokens
            rows[size] -= 1.0
            rows[floor] += 1.0
            context[size] -= tokens
            context[floor] += tokens
            kept = scheduler.kv_cache.num_kept_layers(request, scheduler.elasticity.path(floor))
            cost += self.change_seconds(tokens, floor - kept, rate)
            remaining += request.sampling.max_tokens - len(request.output_token_ids)
        saved = (before - self.mix_seconds(rows, context)) * remaining / len(requests)
        return saved > 2.0 * cost

    def change_seconds(self, num_tokens: int, num_layers: int, rate: float) -> float:
        """What a change of size costs: the text so far, at `rate` seconds per token and layer, on the layers that it
        has to be computed on (those of the new size, less those below a hidden state that was kept)."""
        return num_tokens * num_layers * (rate + self.cost.prefill_context * 0.5 * num_tokens)

    def drain_seconds(self, scheduler: Scheduler) -> float:
        """Until everything that waits now is admitted, at the smallest size: its prompts, and slots that fall free."""
        load, waiting, slots = scheduler.load, scheduler.waiting, scheduler.config.max_num_seqs
        count, size = len(waiting), self.table.sizes[0]
        if not count:
            return 0.0
        full = min(load.num_rows + count, slots)
        rows = np.asarray(load.rows, np.float64)
        rows[size] += full - load.num_rows
        rate = self._token_rate(full, min(waiting.num_tokens, scheduler.config.max_num_batched_tokens))
        overflow = max(count - (slots - load.num_rows), 0)
        return waiting.num_tokens * size * rate + overflow * self.demand.mean_output * self.mix_seconds(rows) / full

    def capacity_rows(self, limit: float | None, max_num_seqs: int) -> float:
        """Rows of full size whose decode step stays within `limit` seconds."""
        if limit is None:
            return float(max_num_seqs)
        if self._capacity[:2] != (limit, self.cost.version):
            per_layer = (0.9 * limit - self.cost.fixed - self.cost.overhead) / self._full_weight
            self._capacity = limit, self.cost.version, max(self.cost.tokens_within(per_layer), 1.0)
        return min(self._capacity[2], float(max_num_seqs))

    # --- parts

    def _token_rate(self, rows: float, tokens: float) -> float:
        """Seconds per token and layer of `tokens` more tokens in a step that has `rows` already."""
        g = self.cost.layer_seconds_of
        return (g(rows + tokens) - g(rows)) / max(tokens, 1.0)

    def _fair(self, request: Request, scheduler: Scheduler) -> tuple[np.ndarray, float | None, float, float]:
        """Rows by size as this tenant may see them, the limit admission must keep, how much of it, rows kept / rows.

        Others count up to their share of the machine: what a flood takes beyond that is not this tenant's load. And
        while others are there, a tenant beyond its share must leave room for them.
        """
        load = scheduler.load
        rows = np.asarray(load.rows, np.float64)
        tenant = request.tenant
        running = load.tenant_rows
        if not running or (len(running) == 1 and tenant in running and len(scheduler.waiting.tenants()) <= 1):
            return rows, load.tightest_tpot(), 1.0, 1.0
        names = set(running) | set(scheduler.waiting.tenants()) | {tenant}
        total_weight = sum(self.tenants.weight(name) for name in names)
        capacity = self.capacity_rows(load.tightest_tpot(), scheduler.config.max_num_seqs)
        over = set()
        seen = rows
        for name, counts in running.items():
            share = self.tenants.weight(name) / total_weight * capacity
            held = sum(counts)
            if held > share:
                over.add(name)
            keep = 1.0 if name == tenant else min(1.0, share / held)
            if keep < 1.0:
                seen = seen - np.asarray(counts, np.float64) * (1.0 - keep)
        crowd = seen.sum() / max(load.num_rows, 1)
        is_over = tenant in over
        guarded = load.tightest_tpot(skip=over - {tenant} if not is_over else frozenset())
        return seen, guarded, 0.85 if is_over else 1.0, crowd
