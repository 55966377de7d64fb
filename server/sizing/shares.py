"""What a tenant may see of the load: others count up to their share of the machine, by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.core.load import LoadView
from server.core.request import LiveRequest
from server.cost.price import HEADROOM, StepPrice
from server.sizing.tenants import Tenants

_ROOM_FOR_OTHERS = 0.85  # share of a TPOT limit that a tenant beyond its share of the machine may use


@dataclass(slots=True)
class VisibleLoad:
    """The running requests as one tenant may see them."""

    rows: Sequence[float]  # by size, from the smallest on
    num_rows: float
    fraction: float  # of all rows
    tpot_limit: float | None  # that admission must keep
    tpot_limit_share: float  # and how much of it may be used
    over: frozenset[str] = frozenset()  # tenants that hold more than their share


class Shares:
    """Divides the machine among those who run, wait or ask. Keeps only what follows from the cost model."""

    def __init__(self, price: StepPrice, tenants: Tenants) -> None:
        self.price = price
        self.tenants = tenants
        self._smallest = price.cost.profile.elasticity.sizes[0]
        self._capacity = 1.0
        self._capacity_rests_on: tuple[object, ...] | None = None

    def visible_to(self, request: LiveRequest, view: LoadView, tightest: float | None) -> VisibleLoad:
        """What runs, as this tenant may see it; `tightest` is the smallest TPOT limit among all who run.

        Others count up to their share of the machine: what a flood takes beyond that is not this tenant's load. And
        while others are there, a tenant beyond its share must leave room for them.
        """
        load, tenant, low = view.load, request.tenant, self._smallest
        rows: Sequence[float] = load.rows[low:]
        held, waiting = load.held, view.waiting.tenants()
        if not held or (len(held) == 1 and tenant in held and len(waiting) <= 1):
            return VisibleLoad(rows, load.num_rows, 1.0, tightest, 1.0)
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
        fraction = num_rows / max(load.num_rows, 1)
        if tenant in over:
            return VisibleLoad(rows, num_rows, fraction, tightest, _ROOM_FOR_OTHERS, frozenset(over))
        return VisibleLoad(rows, num_rows, fraction, load.tightest_tpot(skip=over), 1.0, frozenset(over))

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
        cost = self.price.cost
        rests_on = limit, cost.layer, cost.correction["decode"], cost.overhead
        if rests_on != self._capacity_rests_on:
            self._capacity_rests_on, self._capacity = rests_on, self.price.rows_within(HEADROOM * limit)
        return min(self._capacity, float(max_num_seqs))
