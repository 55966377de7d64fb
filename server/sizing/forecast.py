"""Where the load is heading: the batch at which requests leave as fast as they arrive, for every size.

Little's law on the decode side: N requests run when N = rate * answer tokens * time per token, and the time per token
is a decode step of N rows stretched by the prompts in between. The smallest fixed point of that is where a server that
gave everyone this size would settle; without one it would never settle. A decision that only looked at the present
would hand out large sizes until the present hurts, and those it handed them to keep them for their whole answer.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.cost.model import CostModel
from server.sizing.candidates import CandidateTable
from server.sizing.demand import Demand
from server.sizing.outlook import NEVER
from server.sizing.tenants import Tenants

if TYPE_CHECKING:
    from server.core.load import LoadView

_REFRESH = 0.1  # seconds of clock for which a forecast holds


@dataclass(slots=True)
class Forecast:
    """By position in `CandidateTable.sizes`, if everyone were given that size."""

    tpot: list[float]
    ttft: list[float]
    occupancy: list[float]  # of slots, KV pages or time, whichever is tightest; 1 = full
    time: float


class Forecaster:
    def __init__(self, cost: CostModel, table: CandidateTable, demand: Demand, tenants: Tenants, sigmas: float) -> None:
        self.cost = cost
        self.table = table
        self.demand = demand
        self.tenants = tenants
        self.sigmas = sigmas
        self._weights: list[float] = table.path_weights(table.all.on_teacher).tolist()
        self._cache: dict[str, Forecast] = {}

    def forecast(self, tenant: str, view: LoadView, now: float) -> Forecast:
        found = self._cache.get(tenant)
        if found is not None and 0.0 <= now - found.time < _REFRESH:
            return found
        if len(self._cache) > 1024:
            self._cache.clear()
        found = self._cache[tenant] = self._compute(tenant, view, now)
        return found

    def _compute(self, tenant: str, view: LoadView, now: float) -> Forecast:
        limit = view.load.tightest_tpot()
        rate, prompt = self._rate(tenant, view, limit, now)
        return self.settle(
            rate,
            prompt,
            self.demand.mean_output,
            limit=limit,
            max_num_seqs=view.config.max_num_seqs,
            max_tokens=view.config.max_num_batched_tokens,
            tokens_of_kv=view.kv_cache.num_pages * view.kv_cache.page_size,
            now=now,
        )

    def settle(
        self,
        rate: float,
        prompt: float,
        output: float,
        *,
        limit: float | None,
        max_num_seqs: int,
        max_tokens: int,
        tokens_of_kv: int,
        now: float = 0.0,
    ) -> Forecast:
        """`rate` requests/s of `prompt` and `output` tokens; `limit`: TPOT that chunks of prompt respect."""
        cost = self.cost
        scale, prompt_scale = cost.correction["decode"], cost.prompt_scale(1)
        knots, g, g_slopes, h, h_slopes = cost.step_curves
        context = cost.decode_context * (prompt + 0.5 * output) + cost.request_layers
        attention, head_first = cost.prefill_context * 0.5 * prompt**2, cost.head_seconds_of(1.0)
        piece, answers = min(prompt, max_tokens), rate * output
        cap = 4.0 * max_num_seqs
        # By size: weight of its path, seconds of a step's row beside layers and head, of a prompt's tokens and beside.
        columns = [
            (weight, context * size + cost.overhead_per_request, prompt * weight / piece, attention * size + head_first)
            for weight, size in zip(self._weights, self.table.sizes, strict=True)
        ]
        start = cost.fixed + cost.overhead
        rows = [1.0] * len(columns)
        for _ in range(16):
            found, seen, change = [], 0.0, 0.0
            for n, (weight, per_row, per_token, beside) in zip(rows, columns, strict=True):
                if n != seen:  # in the first round, and under a light load in all, sizes have the same rows
                    seen = n
                    i = bisect(knots, n) - 1
                    beyond = n - knots[i]
                    alone = g[i] + beyond * g_slopes[i]
                    around = start + h[i] + beyond * h_slopes[i]
                    i = bisect(knots, n + piece) - 1
                    more = g[i] + (n + piece - knots[i]) * g_slopes[i] - alone
                step = (around + weight * alone + per_row * n) * scale
                prefill = (per_token * more + beside) * prompt_scale
                busy = rate * prefill
                tpot = step / (1.0 - (busy if busy < 0.95 else 0.95))
                new = answers * tpot
                if new < 1.0:
                    new = 1.0
                elif new > cap:
                    new = cap
                moved = new - n if new > n else n - new
                if moved > change:
                    change = moved
                found.append((new, tpot, step, prefill, busy))
            rows = [one[0] for one in found]
            if change < 0.05:
                break
        forecast = Forecast([], [], [], now)
        paced = None if limit is None else 0.9 * limit
        other_slots, kv_share = max(max_num_seqs - 1, 1), (prompt + output) / tokens_of_kv
        for size, (n, tpot, step, prefill, busy) in zip(self.table.sizes, found, strict=True):
            per_step = max_tokens
            if paced is not None:
                left, least = paced - step, 0.1 * step
                fits = (left if left > least else least) * prompt / (prefill if prefill > 1e-12 else 1e-12)
                if fits < per_step:
                    per_step = fits
            service = prefill + prompt / per_step * step
            used = rate * service
            wait = NEVER
            if used < 1.0:
                # M/D/1 waiting, and as much again for the tail that attainment is about.
                idle = 1.0 - used
                wait = used / (idle if idle > 1e-3 else 1e-3) * service
            # Somebody always runs: slots fill up from the second request on.
            slots, kv = (n - 1.0) / other_slots, n * size * kv_share
            full = slots if slots > kv else kv
            forecast.tpot.append(tpot)
            forecast.ttft.append(wait + service + step)
            forecast.occupancy.append(full if full > busy else busy)
        return forecast

    def _rate(self, tenant: str, view: LoadView, limit: float | None, now: float) -> tuple[float, float]:
        """Arrivals this tenant must reckon with: its own, and those of others up to their shares of the machine."""
        own, prompt = self.demand.rate(tenant, now, self.sigmas)
        others = [name for name in self.demand.tenants(now) if name != tenant]
        if not others:
            return own, prompt
        weight = self.tenants.weight
        total_weight = weight(tenant) + sum(map(weight, others))
        # Requests per second that the machine carries at full size with its batch as large as the limit lets it be.
        config = view.config
        rows = float(config.max_num_seqs)
        if limit is not None:
            per_layer = (0.9 * limit - self.cost.fixed - self.cost.overhead) / self._weights[-1]
            rows = min(max(self.cost.tokens_within(per_layer), 1.0), rows)
        g = self.cost.layer_seconds_of
        step = self.cost.fixed + self.cost.overhead + g(rows) * self._weights[-1]
        output = self.demand.mean_output * step * self.cost.correction["decode"] / rows
        total, tokens, alone = own, own * prompt, g(rows)
        for name in others:
            rate, length = self.demand.rate(name, now, self.sigmas)
            piece = min(max(length, 1.0), config.max_num_batched_tokens)
            more = (g(rows + piece) - alone) * self.cost.prompt_scale(rows)
            work = length * more / piece * self._weights[-1] + output
            rate = min(rate, weight(name) / total_weight / work)
            total += rate
            tokens += rate * length
        return total, tokens / max(total, 1e-9)
