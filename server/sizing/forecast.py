"""Where the load is heading: the batch at which requests leave as fast as they arrive, for every size.

Little's law on the decode side: N requests run when N = rate * answer tokens * time per token, and the time per token
is a decode step of N rows stretched by the prompts in between. The smallest fixed point of that is where a server that
gave everyone this size would settle; without one it would never settle. A decision that only looked at the present
would hand out large sizes until the present hurts, and those it handed them to keep them for their whole answer.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass

from server.core.load import LoadView
from server.cost.model import CostModel
from server.cost.price import HEADROOM, StepPrice
from server.sizing.candidates import CandidateTable
from server.sizing.demand import Demand
from server.sizing.outlook import MOST_BUSY, NEVER
from server.sizing.tenants import Tenants

_REFRESH = 0.1  # seconds of clock for which a forecast holds
_ROUNDS, _SETTLED = 16, 0.05  # at most so many rounds to the fixed point, fewer once no size's rows move by more


@dataclass(slots=True)
class Forecast:
    """By position in `CandidateTable.sizes`, if everyone were given that size."""

    tpot: list[float]
    ttft: list[float]
    occupancy: list[float]  # of slots, KV pages or time, whichever is tightest; 1 = full
    time: float


class Forecaster:
    def __init__(
        self,
        cost: CostModel,
        price: StepPrice,
        table: CandidateTable,
        demand: Demand,
        tenants: Tenants,
        sigmas: float,
    ) -> None:
        self.cost = cost
        self.price = price
        self.table = table
        self.demand = demand
        self.tenants = tenants
        self.sigmas = sigmas
        self._full_weight = price.path_weights[price.top]
        self._cache: dict[tuple[str, int], Forecast] = {}

    def forecast(self, tenant: str, view: LoadView, now: float, width: int) -> Forecast:
        """If all rows read `width`."""
        found = self._cache.get((tenant, width))
        if found is not None and 0.0 <= now - found.time < _REFRESH:
            return found
        if len(self._cache) > 1024:
            self._cache.clear()
        found = self._cache[tenant, width] = self._compute(tenant, view, now, width)
        return found

    def _compute(self, tenant: str, view: LoadView, now: float, width: int) -> Forecast:
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
            width=width,
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
        width: int | None = None,
    ) -> Forecast:
        """`rate` requests/s of `prompt` and `output` tokens; `limit`: TPOT that chunks of prompt respect.

        The loop prices a step of `n` rows of one size as `StepPrice` does.
        """
        cost = self.cost
        scale, prompt_scale = cost.correction["decode"], cost.prompt_scale(1)
        width = width or self.price.widest
        layer, head = cost.layers[width], cost.heads[width]
        knots, g, g_slopes, h, h_slopes = layer.knots, layer.values, layer.slopes, head.values, head.slopes
        fixed, overhead, overhead_per_request = cost.fixed, cost.overhead, cost.overhead_per_request
        row_layer = cost.decode_context * (prompt + 0.5 * output) + cost.request_layers
        attention, first_head = cost.prefill_context * 0.5 * prompt**2, head(1)
        piece, answers = min(prompt, max_tokens), rate * output
        cap = 4.0 * max_num_seqs
        # By size: its path's weight; seconds of a step's row beside weights, of a prompt's tokens, and beside tokens.
        columns = [
            (weight, row_layer * size, prompt * weight / piece, attention * size + first_head)
            for size, weight in self.price.path_weights.items()
        ]
        rows = [1.0] * len(columns)
        for _ in range(_ROUNDS):
            found, last_rows, change = [], 0.0, 0.0
            for n, (weight, per_row, per_token, per_prompt) in zip(rows, columns, strict=True):
                if n != last_rows:  # in the first round, and under a light load in all, sizes have the same rows
                    last_rows = n
                    i = bisect(knots, n) - 1
                    beyond = n - knots[i]
                    of_layer = g[i] + beyond * g_slopes[i]
                    fixed_and_head = fixed + h[i] + beyond * h_slopes[i]
                    between = overhead + overhead_per_request * n
                    i = bisect(knots, n + piece) - 1
                    of_piece = g[i] + (n + piece - knots[i]) * g_slopes[i] - of_layer
                in_model = fixed_and_head + weight * of_layer + per_row * n
                prefill = (per_token * of_piece + per_prompt) * prompt_scale
                busy = rate * prefill
                tpot = (in_model * scale + between) / (1.0 - (busy if busy < MOST_BUSY else MOST_BUSY))
                new = answers * tpot
                if new < 1.0:
                    new = 1.0
                elif new > cap:
                    new = cap
                moved = new - n if new > n else n - new
                if moved > change:
                    change = moved
                found.append((new, tpot, in_model, between, prefill, busy))
            rows = [one[0] for one in found]
            if change < _SETTLED:
                break
        forecast = Forecast([], [], [], now)
        room = None if limit is None else HEADROOM * limit
        other_slots, kv_share = max(max_num_seqs - 1, 1), (prompt + output) / tokens_of_kv
        for size, (n, tpot, in_model, between, prefill, busy) in zip(self.table.sizes, found, strict=True):
            without_prompt = in_model * prompt_scale + between
            per_step: float = max_tokens
            if room is not None:
                left, least = room - without_prompt, 0.1 * without_prompt
                fits = (left if left > least else least) * prompt / (prefill if prefill > 1e-12 else 1e-12)
                if fits < per_step:
                    per_step = fits
            service = prefill + prompt / per_step * without_prompt
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
            forecast.ttft.append(wait + service + in_model * scale + between)
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
        config, price = view.config, self.price
        rows = float(config.max_num_seqs)
        if limit is not None:
            rows = min(price.rows_within(HEADROOM * limit), rows)
        output_seconds = self.demand.mean_output * price.full_size_seconds(rows) / rows
        total, tokens = own, own * prompt
        for name in others:
            rate, length = self.demand.rate(name, now, self.sigmas)
            piece = min(max(length, 1.0), config.max_num_batched_tokens)
            prompt_seconds = length * price.token_rate(rows, piece) * self._full_weight
            rate = min(rate, weight(name) / total_weight / (prompt_seconds + output_seconds))
            total += rate
            tokens += rate * length
        return total, tokens / max(total, 1e-9)
