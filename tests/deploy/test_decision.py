"""The decision function, alone: no clock, no processes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.autoscaler.decision import Observation, ScalingPolicy, ScalingState, Signal, decide

POLICY = ScalingPolicy(min_replicas=1, max_replicas=8, down_stabilisation=60, down_interval=10)
CALM = Signal(request_rate=1, degraded_share=0.0, size_fraction=1.0, slo_attainment=1.0, running=1.0)


def look(state, signal, *, now=0.0, ready=None, starting=0, policy=POLICY):
    ready = state.target if ready is None else ready
    return decide(policy, state, Observation(now=now, ready=ready, starting=starting, signal=signal))


def test_degradation_scales_by_the_lost_size():
    signal = Signal(request_rate=5, degraded_share=0.8, size_fraction=0.5, running=12)
    state, decision = look(ScalingState(target=2), signal)
    assert decision.target == 4 and decision.reason == "degraded"
    assert state.capacity == pytest.approx(3.0)  # 6 running on each, at half size: 3 would have fitted whole


def test_replicas_still_starting_count():
    signal = Signal(request_rate=5, degraded_share=0.8, size_fraction=0.5, running=12)
    _, decision = look(ScalingState(target=4), signal, ready=2, starting=2)
    assert decision.target == 4


def test_a_little_degradation_is_tolerated():
    signal = Signal(request_rate=5, degraded_share=0.04, size_fraction=0.98, running=8)
    assert look(ScalingState(target=2), signal)[1].target == 2


@pytest.mark.parametrize(
    ("signal", "reason"),
    [
        (Signal(request_rate=5, degraded_share=0.0, running=8, waiting=20), "queue"),
        (Signal(request_rate=5, degraded_share=0.0, running=8, rejected_rate=2), "rejecting"),
        (Signal(request_rate=5, degraded_share=0.0, running=8, slo_attainment=0.9), "slo"),
    ],
)
def test_other_reasons_scale_up(signal, reason):
    decision = look(ScalingState(target=2), signal)[1]
    assert decision.target > 2 and decision.reason == reason


def test_up_is_bounded_by_factor_and_maximum():
    signal = Signal(request_rate=50, degraded_share=1.0, size_fraction=0.1, running=300, rejected_rate=50)
    assert look(ScalingState(target=3), signal)[1].target == 6
    assert look(ScalingState(target=6), signal)[1].target == 8


def test_more_replicas_than_requests_help_nobody():
    signal = Signal(request_rate=1, degraded_share=1.0, size_fraction=0.5, running=1.0)
    decision = look(ScalingState(target=1), signal)[1]
    assert (decision.target, decision.reason) == (1, "uncontended")


def test_down_needs_a_full_calm_window_and_goes_one_at_a_time():
    state = ScalingState(target=4, capacity=4.0)
    targets = []
    for now in range(0, 131, 5):
        state, decision = look(state, CALM, now=float(now), ready=state.target)
        targets.append((now, decision.target))
    assert all(target == 4 for now, target in targets if now < 60)
    assert targets[-1][1] == 1
    steps = [now for (now, target), (_, before) in zip(targets[1:], targets, strict=False) if target < before]
    assert len(steps) == 3 and all(b - a >= POLICY.down_interval for a, b in itertools.pairwise(steps))


def test_one_busy_moment_restarts_the_window():
    state = ScalingState(target=2, capacity=4.0)
    busy = Signal(request_rate=4, degraded_share=0.03, size_fraction=0.99, running=6)
    for now in range(0, 200, 5):
        state, decision = look(state, busy if now % 50 == 0 else CALM, now=float(now), ready=2)
        assert decision.target == 2


def test_the_learned_capacity_stops_a_descent_that_would_degrade():
    state = ScalingState(target=2, capacity=4.0)
    full = dataclasses.replace(CALM, running=5.0)  # 5 in flight need 5 / (4 * 0.75) = 1.7 replicas
    for now in range(0, 300, 5):
        state, decision = look(state, full, now=float(now), ready=2)
    assert decision.target == 2


def test_a_lesson_too_low_fades_in_calm_times():
    policy = dataclasses.replace(POLICY, capacity_doubling=120.0)
    state = ScalingState(target=2, capacity=2.0)
    signal = dataclasses.replace(CALM, running=3.0)
    for now in range(0, 400, 5):
        state, decision = look(state, signal, now=float(now), ready=state.target, policy=policy)
    assert decision.target == 1


def test_an_outage_of_prometheus_freezes_and_forgets_the_window():
    state = ScalingState(target=3, capacity=4.0)
    for now in range(0, 58, 5):
        state, _ = look(state, CALM, now=float(now))
    state, decision = look(state, None, now=60.0)
    assert (decision.target, decision.reason) == (3, "no_data")
    state, decision = look(state, CALM, now=65.0)
    assert decision.target == 3 and decision.reason == "stabilising"


def test_no_traffic_returns_to_the_minimum():
    state = ScalingState(target=3)
    for now in range(0, 200, 5):
        state, decision = look(state, Signal(), now=float(now), ready=state.target)
    assert decision.target == 1


def test_limits_hold_whatever_was_remembered():
    assert look(ScalingState(target=0), None, ready=0)[1].target == 1
    assert look(ScalingState(target=99), None, ready=1)[1].target == 8


share = st.none() | st.floats(0, 1)
signals = st.none() | st.builds(
    Signal,
    request_rate=st.floats(0, 1e3),
    degraded_share=share,
    size_fraction=share,
    slo_attainment=share,
    running=st.floats(0, 1e4),
    waiting=st.floats(0, 1e4),
    rejected_rate=st.floats(0, 1e3),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(0, 1000), signals), max_size=30), st.integers(1, 1000))
def test_any_history_stays_within_limits(history, maximum):
    policy = ScalingPolicy(min_replicas=1, max_replicas=maximum)
    state, now = ScalingState(target=1), 0.0
    for step, ready, signal in history:
        now += step
        before = state.target
        state, decision = look(state, signal, now=now, ready=ready, policy=policy)
        assert policy.min_replicas <= decision.target <= policy.max_replicas
        assert decision.target <= max(before * policy.up_factor, before + 1)
        assert decision.target >= before - max(1, before * policy.down_fraction)
        assert len(state.wanted) <= policy.down_stabilisation / 0.1 + 2


@pytest.mark.parametrize(
    "wrong", [{"min_replicas": 0}, {"min_replicas": 5}, {"degraded_low": 0.5}, {"headroom": 0}, {"up_factor": 1}]
)
def test_contradictory_policies_are_refused(wrong):
    with pytest.raises(ValueError):
        ScalingPolicy(**wrong)
