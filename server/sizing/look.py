"""One decision in the making: predictions for its candidates, each made when somebody asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.sizing.candidates import Candidate
from server.sizing.forecast import Forecast
from server.sizing.outlook import Prediction

if TYPE_CHECKING:
    from server.core.load import LoadView
    from server.core.request import LiveRequest
    from server.sizing.policy import BudgetPolicy


class Look:
    """What `policy` sees as it chooses for `request`."""

    def __init__(self, policy: BudgetPolicy, request: LiveRequest, view: LoadView, now: float) -> None:
        self.policy, self.request, self.view, self.now = policy, request, view, now
        self.moment = policy.outlook.moment(request, view, now)
        budget = request.budget
        self.key = (request.tenant, budget.ttft, budget.tpot, budget.e2e, request.asked.workload)
        # Steps read at least what some row insists on, and whoever holds more than its share is admitted only as far as
        # the others' precision stands.
        self.floor = view.load.demanded_width()
        if request.tenant in self.moment.visible.over:
            self.floor = max(self.floor, policy.valve.entitled(view, self.moment.visible.over))
        self._predictions: dict[Candidate, Prediction] = {}
        self._ratios: dict[Candidate, tuple[float, ...]] = {}
        self._forecasts: dict[int, Forecast] = {}

    def widths(self) -> tuple[int, ...]:
        """Those that the request may read; steps that read more than it needs anyway give it what it may have."""
        low, high = self.request.min_width, self.request.max_width
        low = max(low, min(self.floor, high))
        return tuple(width for width in self.view.widths if low <= width <= high) or (self.view.widths[-1],)

    def width(self, candidate: Candidate) -> int:
        """What the steps would read."""
        return max(candidate.width, self.floor)

    def prediction(self, candidate: Candidate) -> Prediction:
        found = self._predictions.get(candidate)
        if found is None:
            found = self._predictions[candidate] = self.moment.predict(candidate, self.width(candidate))
        return found

    def is_known(self, candidate: Candidate) -> bool:
        return candidate in self._ratios

    def holds(self, candidate: Candidate) -> bool:
        return self.pressure(candidate) <= self.policy.config.margin

    def pressure(self, candidate: Candidate) -> float:
        """The largest ratio of predicted to allowed."""
        return max(self.ratios(candidate))

    def ratios(self, candidate: Candidate) -> tuple[float, ...]:
        """Predicted over allowed, by `policy.REASONS`."""
        found = self._ratios.get(candidate)
        if found is None:
            found = self._ratios[candidate] = self._compare(candidate)
        return found

    def _compare(self, candidate: Candidate) -> tuple[float, ...]:
        _, tpot, ttft, queue_ttft, kv = self.prediction(candidate)
        budget, around = self.request.budget, self.moment.visible.tpot_limit
        width, k = self.width(candidate), candidate.position
        forecast = self._forecasts.get(width)
        if forecast is None:
            forecaster = self.policy.forecaster
            forecast = self._forecasts[width] = forecaster.forecast(self.request.tenant, self.view, self.now, width)
        tpot_later, ttft_later, load = forecast.tpot[k], forecast.ttft[k], forecast.occupancy[k]
        ttft_limit, tpot_limit, e2e_limit = budget.ttft, budget.tpot, budget.e2e
        # load: those behind and around this request, now and at the balance of arrivals and departures
        soft = self.policy.config.queue_delay if ttft_limit is None else ttft_limit
        later = around
        if tpot_limit is not None:
            later = tpot_limit if around is None else min(tpot_limit, around)
        e2e = 0.0
        if e2e_limit is not None:
            e2e = (ttft + max(tpot, tpot_later) * (self.moment.num_output - 1.0)) / e2e_limit
        own_ttft = 0.0 if ttft_limit is None else ttft / ttft_limit
        own_tpot = 0.0 if tpot_limit is None else tpot / tpot_limit
        first = (ttft_later if ttft_later > queue_ttft else queue_ttft) / soft
        load = first if first > load else load
        if around is not None and tpot / around > load:
            load = tpot / around
        if later is not None and tpot_later / later > load:
            load = tpot_later / later
        return own_ttft, own_tpot, e2e, kv, load
