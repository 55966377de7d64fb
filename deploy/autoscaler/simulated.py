"""`decide` in the shape that the simulator of the size scheduler calls (server.simulation.simulator.Autoscaler)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from deploy.autoscaler.decision import Decision, Observation, ScalingPolicy, ScalingState, Signal, decide

if TYPE_CHECKING:
    from server.simulation.simulator import ClusterState

__all__ = ["SimulatedAutoscaler"]


class SimulatedAutoscaler:
    """Averages what the simulator reports over `window` seconds, as Prometheus does, and asks `decide`.

    `ceiling` is the largest size of the pair in layers; `decisions` collects (time, decision) whenever the target or
    the reason changes.
    """

    def __init__(self, policy: ScalingPolicy, ceiling: int, window: float = 30.0) -> None:
        self.policy, self.ceiling, self.window = policy, ceiling, window
        self.state: ScalingState | None = None
        self.decisions: list[tuple[float, Decision]] = []
        self._ticks: deque[ClusterState] = deque()

    def __call__(self, state: ClusterState) -> int:
        """The replicas there should be."""
        self._ticks.append(state)
        while self._ticks[0].time <= state.time - self.window:
            self._ticks.popleft()
        if self.state is None:
            self.state = ScalingState(target=state.num_replicas + state.num_starting)
        observation = Observation(
            now=state.time, ready=state.num_replicas, starting=state.num_starting, signal=self._signal()
        )
        self.state, decision = decide(self.policy, self.state, observation)
        last = self.decisions[-1][1] if self.decisions else None
        if last is None or (last.target, last.reason) != (decision.target, decision.reason):
            self.decisions.append((state.time, decision))
        return decision.target

    def _signal(self) -> Signal:
        ticks = self._ticks
        decided = sum(tick.num_decided for tick in ticks)
        layers = sum(tick.mean_size * tick.num_decided for tick in ticks if tick.num_decided)
        seconds = max(ticks[-1].time - ticks[0].time, 1.0)
        return Signal(
            request_rate=decided / seconds,
            degraded_share=sum(tick.num_below_ceiling for tick in ticks) / decided if decided else None,
            kl_loss=sum(tick.kl_loss * tick.num_decided for tick in ticks) / decided if decided else None,
            size_fraction=min(1.0, layers / (decided * self.ceiling)) if decided else None,
            running=sum(tick.num_running for tick in ticks) / len(ticks),
            waiting=sum(tick.num_waiting for tick in ticks) / len(ticks),
            rejected_rate=sum(tick.num_refused for tick in ticks) / seconds,
        )
