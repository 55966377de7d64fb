"""What a tenant may see of the load: others count up to their share of the machine, by weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.core.request import LiveRequest
from server.cost.model import CostModel
from server.sizing.candidates import CandidateTable
from server.sizing.tenants import Tenants

if TYPE_CHECKING:
    from server.core.load import LoadView


@dataclass(slots=True)
class Seen:
    """The running requests as one tenant may see them."""

    rows: list[float]  # by size, from the smallest on
    num_rows: float
    crowd: float  # of all rows
    limit: float | None  # TPOT that admission must keep
    limit_share: float  # and how much of it may be used


class Shares:
    """Divides the machine among those who run, wait or ask. Keeps only what follows from the cost model."""

    def __init__(self, cost: CostModel, table: CandidateTable, tenants: Tenants) -> None:
        self.cost = cost
        self.tenants = tenants
        self._smallest = table.sizes[0]
        self._full_weight = table.full_weight
        self._capacity = (-1.0, -1, 0.0)  # limit, version of the cost model, `capacity_rows` for them

    def seen_by(self, request: LiveRequest, view: LoadView, tightest: float | None) -> Seen:
        """What runs, as this tenant may see it; `tightest` is the smallest TPOT limit among all who run.

        Others count up to their share of the machine: what a flood takes beyond that is not this tenant's load. And
        while others are there, a tenant beyond its share must leave room for them.
        """
        load, tenant, low = view.load, request.tenant, self._smallest
        rows: list[float] = load.rows[low:]
        held, waiting = load.held, view.waiting.tenants()
        if not held or (len(held) == 1 and tenant in held and len(waiting) <= 1):
            return Seen(rows, load.num_rows, 1.0, tightest, 1.0)
        weight = self.tenants.weight
        total_weight = sum(map(weight, dict.fromkeys((*held, *waiting, tenant))))
        capacity = self.capacity_rows(tightest, view.config.max_num_seqs)
        over = set()
        for name, count in held.items():
            share = weight(name) / total_weight * capacity
            if count > share:
                over.add(name)
                if name != tenant:
                    lost = 1.0 - share / count
                    rows = [a - b * lost for a, b in zip(rows, load.tenant_rows[name][low:], strict=True)]
        num_rows = sum(rows)
        crowd = num_rows / max(load.num_rows, 1)
        if tenant in over:
            return Seen(rows, num_rows, crowd, tightest, 0.85)
        return Seen(rows, num_rows, crowd, load.tightest_tpot(skip=over), 1.0)

    def slots_before(self, request: LiveRequest, view: LoadView, own_waiting: int, free_slots: int) -> float:
        """Slots that must fall free before the last of those who wait gets one, as `request`'s tenant may see it.

        The queue is fair: of others' requests no more go first than their weights entitle them to.
        """
        waiting = len(view.waiting)
        if waiting <= free_slots or not view.load.num_rows:
            return 0.0
        weight = self.tenants.weight
        total_weight = sum(map(weight, dict.fromkeys((request.tenant, *view.waiting.tenants()))))
        return max(min(waiting, own_waiting * total_weight / weight(request.tenant)) - free_slots, 0.0)

    def capacity_rows(self, limit: float | None, max_num_seqs: int) -> float:
        """Rows of full size whose decode step stays within `limit` seconds."""
        if limit is None:
            return float(max_num_seqs)
        if self._capacity[:2] != (limit, self.cost.version):
            per_layer = (0.9 * limit - self.cost.fixed - self.cost.overhead) / self._full_weight
            self._capacity = limit, self.cost.version, max(self.cost.tokens_within(per_layer), 1.0)
        return min(self._capacity[2], float(max_num_seqs))
