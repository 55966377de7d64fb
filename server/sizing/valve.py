"""The fast one of the two dials: at how many bits a step reads the weights.

Bits go first: a decision that needs fewer takes them at once, for everybody's next step. They come back last, one
width after the other: once new requests get all their layers again, what runs leaves room, and the rate of arrivals
would leave room too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.core.load import LoadView
    from server.sizing.candidates import Candidate
    from server.sizing.look import Look
    from server.sizing.policy import BudgetPolicy

_INTERVAL = 0.1  # seconds between two looks at what runs
_ROOM = 0.9  # share of the TPOT limit up to which bits come back that a tenant within its share is entitled to


class Valve:
    def __init__(self, policy: BudgetPolicy) -> None:
        self.policy = policy
        self.last = policy.price.widest  # width of steps, where rows insist on none
        self._changed = -math.inf
        self._next = -math.inf  # when to look again
        self._granted: dict[str, int] = {}  # tenant -> width of its last decision
        self._over: frozenset[str] = frozenset()
        self._decision: tuple[str, int, bool] = ("", -1, True)  # tenant, position of its size, all layers it allowed

    def read(self, view: LoadView) -> int:
        """What steps read at the moment."""
        return max(self.last, min(view.load.demanded_width(), self.policy.price.widest))

    def entitled(self, view: LoadView, over: frozenset[str]) -> int:
        """The widest that was granted to somebody who runs and is not among those `over` their share."""
        return max((self._granted.get(name, 0) for name in view.load.held if name not in over), default=0)

    def decided(self, look: Look, candidate: Candidate) -> None:
        request = look.request
        self._over = look.moment.visible.over
        self._decision = request.tenant, candidate.position, candidate.size == request.sizes[-1]
        if request.min_width == request.max_width:
            return
        if len(self._granted) > 4096:
            self._granted.clear()
        self._granted[request.tenant] = candidate.width
        if candidate.width < self.last:
            self._turn(candidate.width, look.now)

    def width(self, view: LoadView, now: float) -> int:
        if len(view.widths) > 1 and now >= self._next:
            self._next = now + _INTERVAL
            self._look(view, now)
        return self.last

    def open(self) -> None:
        """Nothing is left to do: who comes next finds all bits."""
        self.last, self._changed = self.policy.price.widest, -math.inf

    def _turn(self, width: int, now: float) -> None:
        self.last, self._changed = width, now

    def _look(self, view: LoadView, now: float) -> None:
        config, widths, i = self.policy.config, view.widths, view.widths.index(self.last)
        here = self._share(self.last, view)
        if here > config.step_margin:
            for width in reversed(widths[:i]):
                there = self._share(width, view)
                if there < 0.98 * here:
                    self._turn(width, now)
                if there <= config.margin:
                    break
        elif i < len(widths) - 1:
            wider = widths[i + 1]
            there = self._share(wider, view)
            if wider <= self.entitled(view, self._over) and self._over and there <= _ROOM:
                self._turn(wider, now)
            elif now - self._changed >= config.hold and not len(view.waiting):
                is_deep = self._decision[2]
                is_free = 0.0 < there <= 1.01 * here
                if (is_deep or is_free) and max(there, self._later(wider, view, now)) <= config.margin * config.regrow:
                    self._turn(wider, now)

    def _share(self, width: int, view: LoadView) -> float:
        """Share of the tightest TPOT limit that a decode step of what runs takes; 0 without a limit."""
        load = view.load
        limit = load.tightest_tpot()
        if limit is None:
            return 0.0
        width = max(width, load.demanded_width())
        return self.policy.price.decode_seconds(load.rows, load.layer_context, width) / limit

    def _later(self, width: int, view: LoadView, now: float) -> float:
        """The same of what the arrival rate will make of it, and of slots, pages and the time to first tokens."""
        tenant, position, _ = self._decision
        forecast = self.policy.forecaster.forecast(tenant, view, now, width)
        limit = view.load.tightest_tpot()
        found = max(forecast.occupancy[position], forecast.ttft[position] / self.policy.config.queue_delay)
        return found if limit is None else max(found, forecast.tpot[position] / limit)
