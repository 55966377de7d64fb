"""How many replicas there should be: a pure function of what was observed and of the little it remembers.

Load changes the *size* of new requests within milliseconds, so by the time anything queues the sizes have already
shrunk. That loss of size is what replicas are added for: serving every request at a fraction f of its ceiling means
that about 1/f as many replicas would have served them whole. Processor or GPU use says nothing here (an engine with
one request is as busy as one with fifty) and is not looked at.

No clock, no I/O, no randomness: `decide(policy, state, observation) -> (state, decision)`. The same function runs in
the autoscaler, in the Ray policy and in the discrete-event simulator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = ["Decision", "Observation", "ScalingPolicy", "ScalingState", "Signal", "decide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPolicy:
    """Limits and set points. Shares are 0..1, times in seconds."""

    min_replicas: int = 1
    max_replicas: int = 4
    degraded_high: float = 0.05  # share of requests below their ceiling that asks for more replicas
    degraded_low: float = 0.01  # at or below this share (and the rest calm) replicas may go
    kl_high: float = 0.05  # the same in nats per token lost to load, where the server knows what sizes cost
    kl_low: float = 0.01
    slo_target: float = 0.99  # share of requests meeting all their limits
    queue_high: float = 2.0  # waiting requests per ready replica
    headroom: float = 0.75  # fill of the learned capacity per replica that scaling down may lead to
    up_factor: float = 2.0  # at most this multiple in one decision (always at least one more)
    down_fraction: float = 0.1  # at most this share in one decision (always at least one)
    down_stabilisation: float = 180.0  # down to the highest number wanted within this window
    down_interval: float = 30.0  # between two steps down, so that the effect of one is seen before the next
    capacity_doubling: float = 3600.0  # of calm, after which the learned capacity counts twice: old lessons fade

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"1 <= min_replicas <= max_replicas, not {self.min_replicas} and {self.max_replicas}")
        if not 0 <= self.degraded_low <= self.degraded_high <= 1:
            raise ValueError("0 <= degraded_low <= degraded_high <= 1")
        if not 0 <= self.kl_low <= self.kl_high:
            raise ValueError("0 <= kl_low <= kl_high")
        if not 0 < self.headroom <= 1 or not 0 < self.slo_target <= 1:
            raise ValueError("headroom and slo_target lie in (0, 1]")
        if self.up_factor <= 1 or not 0 < self.down_fraction <= 1 or self.capacity_doubling <= 0:
            raise ValueError("up_factor > 1, 0 < down_fraction <= 1 and capacity_doubling > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What the replicas report together, averaged over the last window. None: no request said anything about it."""

    request_rate: float = 0.0  # finished requests per second
    degraded_share: float | None = None  # served below the size they could have had on an idle server
    kl_loss: float | None = None  # expected KL of what runs beyond that of what it allows, nats per token, in the mean
    size_fraction: float | None = None  # layers x bits served over those of that ceiling, over all requests
    slo_attainment: float | None = None
    running: float = 0.0
    waiting: float = 0.0
    rejected_rate: float = 0.0  # 503s per second

    @property
    def in_flight(self) -> float:
        return self.running + self.waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One look at the deployment. `signal` is None while Prometheus cannot be read."""

    now: float
    ready: int
    starting: int = 0
    signal: Signal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingState:
    """What is remembered from one decision to the next."""

    target: int
    capacity: float | None = None  # requests in flight per replica that were served whole (learned)
    wanted: tuple[tuple[float, int], ...] = ()  # (time, replicas wanted) within the stabilisation window
    last_down: float = -math.inf
    last_look: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The target and why. `wanted` is the answer to this observation alone, before limits and stabilisation."""

    target: int
    wanted: int
    reason: str
    detail: str = ""


def decide(policy: ScalingPolicy, state: ScalingState, observation: Observation) -> tuple[ScalingState, Decision]:
    """The next target. Up at once (bounded by `up_factor`), down slowly and only on a full window of calm data."""
    low, high = policy.min_replicas, policy.max_replicas
    current = min(max(state.target, low), high)
    now, signal = observation.now, observation.signal
    if signal is None or observation.ready == 0:
        # Without data nothing is learned and nothing is taken away; a missing window also restarts stabilisation.
        reason = "no_data" if signal is None else "no_replica_ready"
        state = replace(state, target=current, wanted=((now, current),))
        return state, Decision(target=current, wanted=current, reason=reason)

    elapsed = 0.0 if state.last_look is None else max(0.0, now - state.last_look)
    capacity = _learn_capacity(policy, state.capacity, observation.ready, signal, elapsed)
    state = replace(state, capacity=capacity, last_look=now)
    wanted, reason, detail = _wanted(policy, state, current, observation.ready, signal)
    wanted = min(max(wanted, low), high)
    start = now - policy.down_stabilisation
    # The one entry older than the window is kept: it proves that the window is covered by data.
    history = _trim((*state.wanted, (now, wanted)), start)
    state = replace(state, wanted=history)

    target = current
    if wanted > current:
        ceiling = max(current + 1, math.floor(current * policy.up_factor))
        target = min(wanted, ceiling, high)
    elif wanted < current:
        floor = max(n for _, n in history)
        if history[0][0] > start or floor >= current:
            reason, detail = "stabilising", f"{reason}: {wanted} wanted"
        elif now - state.last_down < policy.down_interval:
            reason, detail = "settling", f"{wanted} wanted"
        else:
            step = max(1, math.floor(current * policy.down_fraction))
            target = max(floor, current - step, low)
            state = replace(state, last_down=now)
    state = replace(state, target=target)
    return state, Decision(target=target, wanted=wanted, reason=reason, detail=detail)


def _trim(history: tuple[tuple[float, int], ...], start: float) -> tuple[tuple[float, int], ...]:
    """Drops entries before `start`, all but the youngest of them."""
    first = 0
    while first + 1 < len(history) and history[first + 1][0] <= start:
        first += 1
    return history[first:]


def _is_degraded(policy: ScalingPolicy, signal: Signal) -> bool:
    """By what is lost, where that is known: bits that cost next to nothing are no reason for replicas."""
    if signal.kl_loss is not None:
        return signal.kl_loss > policy.kl_high
    return signal.degraded_share is not None and signal.degraded_share > policy.degraded_high


def _is_calm(policy: ScalingPolicy, signal: Signal, ready: int) -> bool:
    is_whole = (signal.degraded_share or 0.0) <= policy.degraded_low
    if signal.kl_loss is not None:
        is_whole = signal.kl_loss <= policy.kl_low
    return (
        is_whole
        and (signal.slo_attainment is None or signal.slo_attainment >= policy.slo_target)
        and signal.waiting <= 0.1 * policy.queue_high * ready
        and signal.rejected_rate == 0
    )


def _learn_capacity(
    policy: ScalingPolicy, capacity: float | None, ready: int, signal: Signal, elapsed: float
) -> float | None:
    """Requests in flight that one replica serves whole.

    Under degradation the running requests times their size fraction is what would have fitted at full size; without
    it, whatever runs evidently fits, so a higher figure replaces the estimate. A window that straddles the beginning of
    a rush teaches too little a capacity, and a faster build makes any lesson old: in calm times the estimate grows.
    """
    per_replica = signal.running / ready
    if _is_degraded(policy, signal) and signal.size_fraction is not None and per_replica > 1:
        sample = max(1.0, per_replica * signal.size_fraction)
        return sample if capacity is None else capacity + 0.3 * (sample - capacity)
    if capacity is not None and _is_calm(policy, signal, ready):
        return max(per_replica, capacity * 2 ** (min(elapsed, 60.0) / policy.capacity_doubling))
    return capacity


def _wanted(
    policy: ScalingPolicy, state: ScalingState, current: int, ready: int, signal: Signal
) -> tuple[int, str, str]:
    """Replicas this signal alone asks for, the reason, and the figures behind it."""
    factors: dict[str, float] = {}
    if _is_degraded(policy, signal):
        fraction = 1 - (signal.degraded_share or 0.0) if signal.size_fraction is None else signal.size_fraction
        factors["degraded"] = 1 / max(fraction, 0.1)
    if signal.rejected_rate > 0:
        factors["rejecting"] = 1 + signal.rejected_rate / max(signal.request_rate, signal.rejected_rate, 1e-9)
    if signal.waiting > policy.queue_high * ready:
        factors["queue"] = 1 + signal.waiting / max(signal.running, ready)
    if signal.slo_attainment is not None and signal.slo_attainment < policy.slo_target and signal.in_flight > 0:
        # Sizes should have given way first: limits missed besides are worth a replica, not a multiple.
        factors["slo"] = 1 + 1 / ready if ready < 10 else 1.1
    if factors:
        # Shrunk requests and queued or refused ones are different work and multiply; one SLO miss follows from either.
        factor = factors.get("degraded", 1.0) * max(factors.get("rejecting", 1.0), factors.get("queue", 1.0))
        factor = max(factor, factors.get("slo", 1.0))
        wanted = max(ready + 1, math.ceil(ready * factor - 1e-9))
        reason = next(name for name in ("degraded", "rejecting", "queue", "slo") if name in factors)
        detail = ", ".join(f"{name} x{value:.2f}" for name, value in factors.items())
        # A request runs on one replica: more replicas than requests in flight help nobody. Under pressure nothing is
        # taken away either, and replicas still starting count as the answer already given.
        useful = math.ceil(signal.in_flight - 1e-9)
        if useful < wanted and useful <= current:
            return current, "uncontended", detail
        return max(current, min(wanted, useful)), reason, detail
    if not _is_calm(policy, signal, ready):
        return current, "steady", ""
    if signal.in_flight == 0:
        return policy.min_replicas, "idle", ""
    if state.capacity is None:
        # Nothing was ever shrunk, so the capacity is unknown: try one fewer. Being wrong costs size for a moment,
        # never an error, and teaches the capacity.
        return current - 1, "calm", "capacity unknown"
    # One request always fits one replica; a quarter of a replica too many is what the headroom is for.
    wanted = max(1, math.ceil(signal.in_flight / max(1.0, state.capacity * policy.headroom) - 0.25))
    detail = f"{signal.in_flight:.1f} in flight, {state.capacity:.1f} fit one replica"
    return min(wanted, current), "calm", detail
