"""The size policy and its ladder, on the simulator's clock: the same code that serves, no model."""

import dataclasses
import itertools
import math

import pytest

from server.core.request import LiveRequest
from server.core.size_policy import MAX_RETRY_AFTER, LargestSize
from server.core.width import EXACT
from server.cost.frontier import QualityTable
from server.simulation.report import summarise
from server.sizing.tenants import Tenant, Tenants
from tests.sizing.machines import CONFIG, make_policy, make_replica, make_request, make_spec, play, steady


def admit(request: LiveRequest, **changes):
    replica = make_replica(**changes)
    refusal = replica.scheduler.prepare(request)
    if refusal is None:
        replica.scheduler.add(request)
        replica.run_step(0.0)
    return refusal


def test_an_idle_server_gives_the_largest_size():
    request = make_request(budget={"ttft": 0.5, "tpot": 0.05})
    assert admit(request) is None and (request.decision.size, request.decision.reason) == (12, "auto")


def test_one_place_is_not_an_overload():
    spec = make_spec(config=dataclasses.replace(CONFIG, max_num_seqs=1))
    records = play(steady(0.5, 10.0, ttft=2.0, tpot=0.05), spec).records
    assert {record.size for record in records} == {12}


def test_a_tight_limit_shrinks_and_says_why():
    request = make_request(budget={"tpot": 0.0115})  # a full step takes about 13 ms
    assert admit(request) is None
    assert 6 <= request.decision.size < 12 and request.decision.reason in ("slo_tpot", "load")


@pytest.mark.parametrize("name, budget", [("ttft", {"ttft": 1e-4}), ("tpot", {"tpot": 1e-4}), ("e2e", {"e2e": 0.01})])
def test_the_impossible_is_refused_with_the_best_achievable_figure(name, budget):
    refusal = admit(make_request(output=32, budget=budget | {"strict": True}))
    assert refusal.status == 400 and refusal.param == f"slo.{name}_ms"
    assert "the best that this server is expected to reach" in refusal.message and "(at 6L)" in refusal.message


@pytest.mark.parametrize("budget", [{"ttft": 1e-4}, {"tpot": 1e-4}, {"e2e": 0.01}, {"ttft": 1e-4, "tpot": 1e-4}])
def test_best_effort_serves_what_it_cannot_keep_and_says_so(budget):
    request = make_request(budget=budget)
    assert admit(request) is None and (request.decision.size, request.decision.reason) == (6, "floor")
    pinned = make_request(sizes=(9,), size_reason="requested", budget=budget)
    assert admit(pinned) is None and (pinned.decision.size, pinned.decision.reason) == (9, "floor")


def test_limits_that_came_by_default_are_goals_unless_strict():
    inherited = {"tpot": 1e-4, "inherited": frozenset({"tpot"})}
    request, pinned = (
        make_request(budget=inherited),
        make_request(sizes=(9,), size_reason="requested", budget=inherited),
    )
    assert admit(request) is None and (request.decision.size, request.decision.reason) == (6, "floor")
    assert admit(pinned) is None and (pinned.decision.size, pinned.decision.reason) == (9, "requested")
    assert admit(make_request(budget=inherited | {"strict": True})).status == 400


def test_what_the_machine_misses_for_a_moment_is_no_400():
    """A neighbour makes steps four times as slow; limits that an idle machine has met before stay possible."""
    replica = make_replica()
    cost, scheduler = replica.policy.cost, replica.scheduler
    fast = make_request(budget={"tpot": 0.02, "strict": True})
    assert scheduler.prepare(fast) is None
    cost.correction.update(dict.fromkeys(cost.correction, 4.0))
    strict, effort = make_request(budget={"tpot": 0.02, "strict": True}), make_request(budget={"tpot": 0.02})
    for request in (strict, effort):
        assert scheduler.prepare(request) is None
        scheduler.add(request)
    _, outputs = replica.run_step(0.0)
    ((refused, status, retry_after),) = outputs
    assert refused == strict.request_id and status == 503 and 1 <= retry_after <= MAX_RETRY_AFTER
    assert (effort.decision.size, effort.decision.reason) == (6, "floor")
    assert scheduler.prepare(make_request(budget={"tpot": 1e-4, "strict": True})).status == 400


def test_a_wait_that_nobody_can_foresee_is_told_as_one_that_can():
    replica = make_replica()
    for _ in range(3000):
        replica.scheduler.add(make_request(1024, 1000))
    assert replica.policy.refuse(replica.scheduler, 0.0).retry_after == MAX_RETRY_AFTER
    assert replica.policy.estimated_wait(replica.scheduler, 0.0) == MAX_RETRY_AFTER


def test_quality_not_depth_is_maximised():
    """A larger size that was measured to be worse is not chosen freely, but served to who asks for it."""
    kl = {6: 1.0, 7: 0.7, 8: 0.8, 9: 0.5, 10: 0.4, 11: 0.1, 12: 0.2}
    replica = make_replica(make=lambda: make_policy(quality=QualityTable({"text": kl}, {"text": {EXACT: 0.0}})))
    free, pinned = make_request(), make_request(sizes=(8,))
    for request in (free, pinned):
        replica.scheduler.add(request)
    replica.run_step(0.0)
    assert (free.decision.size, pinned.decision.size) == (11, 8)


def test_the_same_state_gives_the_same_sizes():
    jobs = steady(20.0, 6.0, ttft=1.0, tpot=0.04)
    first, second = play(jobs), play(jobs)
    assert [(r.size, r.reason, r.ttft) for r in first.records] == [(r.size, r.reason, r.ttft) for r in second.records]


def test_more_load_means_smaller_sizes_and_limits_are_kept():
    means, limits = [], {"ttft": 1.0, "tpot": 0.04}
    for rate in (4.0, 35.0, 55.0):
        result = play(steady(rate, 8.0, **limits))
        summary = summarise(result.records, 12)
        means.append(summary["mean_size"])
        assert summary["attainment"] > 0.98, rate
    assert means[0] == 12 and means[0] > means[1] > means[2]


def test_auto_keeps_limits_where_the_pinned_teacher_breaks_them():
    jobs = steady(50.0, 8.0, ttft=1.0, tpot=0.04)
    teacher = summarise(play(jobs, make_spec(make=LargestSize)).records, 12)
    auto = summarise(play(jobs).records, 12)
    assert teacher["attainment"] < 0.5 and auto["attainment"] > 0.98 and auto["mean_size"] > 6


def test_sizes_come_back_after_a_rush_without_flapping():
    limits = {"ttft": 1.0, "tpot": 0.04}
    jobs = steady(4.0, 10.0, **limits) + steady(4.0, 30.0, start=16.0, **limits)
    jobs += steady(50.0, 6.0, start=10.0, **limits)
    records = sorted(play(jobs).records, key=lambda record: record.job.arrival)
    sizes = [record.size for record in records]
    rush = [record.size for record in records if 11 < record.job.arrival < 16]
    calm = [record.size for record in records if record.job.arrival > 40]
    assert min(rush) < 10 and set(calm) == {12} and sizes[0] == 12
    after = [record.size for record in records if record.job.arrival > 17]
    assert sum(b < a for a, b in itertools.pairwise(after)) <= len(after) // 10  # it grows, with few relapses


def test_strict_is_refused_when_its_limits_cannot_be_met_now():
    jobs = steady(80.0, 3.0, ttft=0.3, tpot=0.03, strict=True)
    records = play(jobs).records
    refused = [record for record in records if record.error_status == 503]
    served = [record for record in records if not record.error_status]
    assert refused and served
    assert sum(record.met for record in served) > 0.7 * len(served)


def test_retry_after_is_the_time_the_queue_takes():
    replica = make_replica()
    for _ in range(200):
        replica.scheduler.add(make_request(256))
    replica.run_step(0.0)
    waiting = list(replica.scheduler.waiting)
    told, now = replica.scheduler.estimated_wait(), replica.now
    while any(request.decision is None for request in waiting):
        now, _ = replica.run_step(now)
    assert math.isfinite(told) and told / 3 < now < told * 3


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_a_flood_neither_shrinks_nor_starves_another_tenant(weights):
    limits = {"ttft": 1.0, "tpot": 0.04}
    tenants = Tenants([Tenant(name="calm", weight=weights[0]), Tenant(name="flood", weight=weights[1])])
    calm = steady(4.0, 10.0, "calm", **limits)
    alone = summarise(list(play(calm, make_spec(tenants)).records), 12)
    records = play(calm + steady(120.0, 10.0, "flood", **limits), make_spec(tenants, max_queued_requests=2000)).records
    beside = summarise([record for record in records if record.job.tenant == "calm"], 12)
    assert alone["attainment"] == 1.0 and alone["mean_size"] == 12
    assert beside["attainment"] >= 0.95 and beside["refused"] == 0 and beside["mean_size"] > 11.5
    flooded = summarise([record for record in records if record.job.tenant == "flood"], 12)
    assert flooded["mean_size"] < 7 and beside["ttft"]["p50"] < 0.1 * flooded["ttft"]["p50"]


def test_a_lower_rank_goes_first():
    tenants = Tenants([Tenant(name="paid", rank=0), Tenant(name="free", rank=1)])
    replica = make_replica(tenants)
    free, paid = make_request(tenant="free"), make_request(tenant="paid")
    for request in (free, paid):
        replica.scheduler.add(request)
    assert replica.scheduler.waiting.peek(0.0) is paid


def test_large_requests_shrink_in_mid_answer_when_that_pays():
    replica = make_replica()
    old = [make_request(16, 1000, budget={"tpot": 0.05}) for _ in range(16)]
    for request in old:
        replica.scheduler.add(request)
    now = 0.0
    for _ in range(20):
        now, _ = replica.run_step(now)
    assert {request.path.size for request in old} == {12}
    policy = replica.policy
    policy._pressed[""] = now  # what a decision without a feasible size leaves behind
    changed = policy.resize(replica.scheduler, now)
    assert len(changed) == 2 and all(decision.size == 6 for _, decision in changed)
    replica.run_step(now)
    replica.scheduler.check_integrity()
    assert replica.scheduler.num_resizes == 2
    for request in old:  # too little is left to pay for computing the text again
        object.__setattr__(request.sampling, "max_tokens", len(request.output_token_ids) + 8)
    assert policy.resize(replica.scheduler, now) == []


def test_a_forecast_counts_the_tokens_of_large_steps():
    """Steps of data-centre machines hold more tokens than the last knot of the cost model's curve."""
    policy = make_policy()
    cost, size, prompt = policy.cost, policy.table.sizes[-1], 8192
    steps = {"limit": None, "max_num_seqs": 64, "max_tokens": 16384, "tokens_of_kv": 10**7}
    ttft = policy.forecaster.settle(0.01, float(prompt), 8.0, **steps).ttft[-1]
    assert ttft > size * (cost.layer(prompt) + cost.prefill_context * 0.5 * prompt**2)


def test_prompts_are_predicted_with_the_correction_of_steps_that_have_some():
    """What measured steps say about prompts must reach decisions at once, not with the next fit."""

    def predict(correction: float) -> tuple[float, float, int, float]:
        replica = make_replica()
        now = 0.0
        for _ in range(8):
            replica.scheduler.add(make_request(16, 1000, budget={"tpot": 0.05}))
        for _ in range(20):
            now, _ = replica.run_step(now)
        policy, scheduler = replica.policy, replica.scheduler
        policy.cost.correction.update(dict.fromkeys(policy.cost.correction, 1.0) | {"mixed": correction})
        request = make_request(512, budget={"ttft": 1.0, "tpot": 0.05}, arrival_time=now)
        top = policy.table.candidate(12, EXACT)
        view = policy.outlook.moment(request, scheduler, now).predict(top, EXACT)
        steps = {"limit": 0.05, "max_num_seqs": 64, "max_tokens": 256, "tokens_of_kv": 10**6}
        forecast = policy.forecaster.settle(1.0, 512.0, 8.0, **steps)
        prefill = policy.prefill_budget(scheduler, now)
        scheduler.waiting.push(request)
        return view.ttft, forecast.ttft[-1], prefill.layer_tokens, policy.outlook.drain_seconds(scheduler, EXACT)

    ttft, forecast, tokens, drain = predict(1.0)
    slow_ttft, slow_forecast, slow_tokens, slow_drain = predict(1.5)
    assert slow_ttft > 1.3 * ttft and slow_forecast > 1.3 * forecast and slow_tokens < 0.8 * tokens
    assert slow_drain == pytest.approx(1.5 * drain)
