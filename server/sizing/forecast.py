"""Where the load is heading: the batch at which requests leave as fast as they arrive, for every size.

Little's law on the decode side: N requests run when N = rate * answer tokens * time per token, and the time per token
is a decode step of N rows stretched by the prompts in between. The smallest fixed point of that is where a server that
gave everyone this size would settle; without one it would never settle. A decision that only looked at the present
would hand out large sizes until the present hurts, and those it handed them to keep them for their whole answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from server.sizing.candidates import CandidateTable
from server.sizing.cost_model import KNOTS, CostModel
from server.sizing.demand import Demand
from server.sizing.outlook import NEVER
from server.sizing.tenants import Tenants

if TYPE_CHECKING:
    from server.engine.scheduler import Scheduler

_REFRESH = 0.1  # seconds of clock for which a forecast holds


@dataclass(slots=True)
class Forecast:
    """By position in `CandidateTable.sizes`, if everyone were given that size."""

    tpot: np.ndarray
    ttft: np.ndarray
    occupancy: np.ndarray  # of slots, KV pages or time, whichever is tightest; 1 = full
    rows: np.ndarray
    time: float


class Forecaster:
    def __init__(
        self, cost: CostModel, table: CandidateTable, demand: Demand, tenants: Tenants, sigmas: float
    ) -> None:
        self.cost = cost
        self.table = table
        self.demand = demand
        self.tenants = tenants
        self.sigmas = sigmas
        on = table.all.on_teacher
        self._weights = table.path_weights(on)
        self._sizes = table.all.sizes_array
        self._cache: dict[str, Forecast] = {}

    def forecast(self, tenant: str, scheduler: Scheduler, now: float) -> Forecast:
        found = self._cache.get(tenant)
        if found is not None and 0.0 <= now - found.time < _REFRESH:
            return found
        if len(self._cache) > 1024:
            self._cache.clear()
        found = self._cache[tenant] = self._compute(tenant, scheduler, now)
        return found

    def _compute(self, tenant: str, scheduler: Scheduler, now: float) -> Forecast:
        limit = scheduler.load.tightest_tpot()
        rate, prompt = self._rate(tenant, scheduler, limit, now)
        return self.settle(
            rate,
            prompt,
            self.demand.mean_output,
            limit=limit,
            max_num_seqs=scheduler.config.max_num_seqs,
            max_tokens=scheduler.config.max_num_batched_tokens,
            tokens_of_kv=scheduler.kv_cache.num_pages * scheduler.kv_cache.page_size,
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
        cost, sizes = self.cost, self._sizes
        scale = cost.correction["decode"]
        context = cost.decode_context * sizes * (prompt + 0.5 * output) + cost.request_layers * sizes
        context += cost.overhead_per_request
        head_first = float(cost.head_seconds(1.0))
        piece = min(prompt, max_tokens)
        rows = np.ones(len(sizes))
        cap = 4.0 * max_num_seqs
        for _ in range(16):
            g = np.interp(np.stack((rows + piece, rows)), KNOTS, cost._g)
            step = cost.fixed + cost.overhead + self._weights * g[1] + cost.head_seconds(rows) + context * rows
            step *= scale
            prefill = prompt * self._weights * (g[0] - g[1]) / piece + cost.prefill_context * sizes * 0.5 * prompt**2
            prefill += head_first
            busy = rate * prefill
            tpot = step / (1.0 - np.minimum(busy, 0.95))
            new = np.clip(rate * output * tpot, 1.0, cap)
            done = np.abs(new - rows).max() < 0.05
            rows = new
            if done:
                break
        per_step = np.full_like(step, float(max_tokens))
        if limit is not None:
            room = np.maximum(0.9 * limit - step, 0.1 * step) * prompt / np.maximum(prefill, 1e-12)
            per_step = np.minimum(room, per_step)
        service = prefill + prompt / per_step * step
        used = rate * service
        # M/D/1 waiting, and as much again for the tail that attainment is about.
        wait = np.where(used < 1.0, used / np.maximum(1.0 - used, 1e-3) * service, NEVER)
        # Somebody always runs: slots fill up from the second request on.
        slots = (rows - 1.0) / max(max_num_seqs - 1, 1)
        occupancy = np.maximum(slots, rows * (prompt + output) * sizes / tokens_of_kv)
        np.maximum(occupancy, busy, out=occupancy)
        return Forecast(tpot, wait + service + step, occupancy, rows, now)

    def _rate(self, tenant: str, scheduler: Scheduler, limit: float | None, now: float) -> tuple[float, float]:
        """Arrivals this tenant must reckon with: its own, and those of others up to their shares of the machine."""
        own, prompt = self.demand.rate(tenant, now, self.sigmas)
        others = [name for name in self.demand.tenants(now) if name != tenant]
        if not others:
            return own, prompt
        total_weight = self.tenants.weight(tenant) + sum(self.tenants.weight(name) for name in others)
        # Requests per second that the machine carries at full size with its batch as large as the limit lets it be.
        config = scheduler.config
        rows = float(config.max_num_seqs)
        if limit is not None:
            per_layer = (0.9 * limit - self.cost.fixed - self.cost.overhead) / self._weights[-1]
            rows = min(max(self.cost.tokens_within(per_layer), 1.0), rows)
        step = self.cost.fixed + self.cost.overhead + float(self.cost.layer_seconds(rows)) * self._weights[-1]
        total, tokens = own, own * prompt
        for name in others:
            rate, length = self.demand.rate(name, now, self.sigmas)
            piece = min(max(length, 1.0), config.max_num_batched_tokens)
            g = np.interp((rows + piece, rows), KNOTS, self.cost._g)
            work = length * (g[0] - g[1]) / piece * self._weights[-1] + self.demand.mean_output * step / rows
            rate = min(rate, self.tenants.weight(name) / total_weight / work)
            total += rate
            tokens += rate * length
        return total, tokens / max(total, 1e-9)
