"""The scheduler with both dials, on the simulator's clock: bits before layers, layers before the queue, and back."""

import dataclasses
import itertools

import numpy as np
import pytest

from server.core.width import EXACT
from server.cost.devices import Device, roofline_cost_model
from server.cost.frontier import Point
from server.cost.price import StepPrice
from server.simulation.replica import Replica, ReplicaSpec
from server.simulation.report import mean_kl, summarise
from server.sizing.candidates import CandidateTable
from server.sizing.policy import BudgetPolicy
from server.sizing.quality import quality_table
from server.sizing.tenants import Tenant, Tenants
from tests.sizing import machines
from tests.sizing.machines import CONFIG, DEVICE, ELASTICITY, machine, make_request, play, profile, steady

WIDTHS = (4, 5, 6, 8, EXACT)
LIMITS = {"ttft": 1.0, "tpot": 0.04}
TABLE = quality_table({}, {}, ELASTICITY.sizes, WIDTHS)
FAST = dataclasses.replace(DEVICE, flops=4e12)  # decode waits for memory up to some hundred rows
PLACES = dataclasses.replace(CONFIG, max_num_seqs=128)


def make_spec(widths=WIDTHS, tenants: Tenants | None = None, device: Device = FAST, **changes) -> ReplicaSpec:
    cost = roofline_cost_model(profile(widths), device)
    make = lambda: BudgetPolicy(roofline_cost_model(profile(widths), device), tenants=tenants)  # noqa: E731
    spec = machines.make_spec(tenants, make=make, config=PLACES, **changes)
    spec.machine = cost
    return spec


def kl_of(records) -> float:
    return mean_kl([record for record in records if not record.error_status], TABLE)


def narrowest(record) -> int:
    return min(record.tokens_at)


def test_an_idle_server_gives_all_layers_and_all_bits():
    records = play(steady(2.0, 5.0, **LIMITS), make_spec()).records
    assert {record.size for record in records} == {12} and {narrowest(record) for record in records} == {EXACT}


def test_bits_go_first_then_layers_and_limits_are_kept():
    seen = []
    for rate in (4.0, 140.0, 200.0):
        records = play(steady(rate, 6.0, **LIMITS), make_spec()).records
        assert summarise(records, 12)["attainment"] > 0.98, rate
        late = [record for record in records if record.job.arrival > 2]
        seen.append((np.mean([record.size for record in late]), np.mean([narrowest(record) for record in late])))
    (size, width), (bits_size, bits_width), (least_size, least_width) = seen
    assert (size, width) == (12, EXACT)
    assert bits_size == 12 and bits_width < 12  # layers stay while bits pay
    assert least_size < 11 and least_width < 5


@pytest.mark.parametrize("rate, share", [(140.0, 0.05), (200.0, 0.8)])
def test_two_dials_serve_better_than_one(rate, share):
    jobs = steady(rate, 6.0, **LIMITS)
    one, two = (play(jobs, make_spec(widths=widths)).records for widths in ((EXACT,), WIDTHS))
    assert summarise(two, 12)["attainment"] >= summarise(one, 12)["attainment"] - 0.005
    assert kl_of(two) < share * kl_of(one)


def test_where_arithmetic_binds_layers_go_and_bits_stay():
    """A machine that reads at once: a width changes nothing, so nobody loses bits for it."""
    reads_at_once = dataclasses.replace(DEVICE, bandwidth=1e15)
    records = play(steady(50.0, 6.0, prompt=128, **LIMITS), make_spec(device=reads_at_once)).records
    sizes = [record.size for record in records if record.job.arrival > 2]
    assert np.mean(sizes) < 11.9 and {narrowest(record) for record in records} == {EXACT}


def test_both_come_back_after_a_rush_without_flapping():
    jobs = (
        steady(4.0, 10.0, **LIMITS) + steady(220.0, 5.0, start=10.0, **LIMITS) + steady(4.0, 35.0, start=15.0, **LIMITS)
    )
    replica_widths: list[tuple[float, int]] = []
    spec = make_spec()
    make = spec.make_policy

    def watched():
        policy = make()
        turn = policy.valve._turn

        def noted(width, now):
            replica_widths.append((now, width))
            turn(width, now)

        policy.valve._turn = noted
        return policy

    spec.make_policy = watched
    records = sorted(play(jobs, spec).records, key=lambda record: record.job.arrival)
    rush = [record for record in records if 12 < record.job.arrival < 15]
    calm = [record for record in records if record.job.arrival > 40]
    assert min(record.size for record in rush) < 12 and min(map(narrowest, rush)) == 4
    assert {record.size for record in calm} == {12} and {narrowest(record) for record in calm} == {EXACT}
    turns = [(now, before, after) for (_, before), (now, after) in itertools.pairwise([(0.0, EXACT), *replica_widths])]
    ups = [turn for turn in turns if turn[2] > turn[1]]
    assert all(later[0] - earlier[0] >= 0.99 for earlier, later in itertools.pairwise(ups))
    assert len(turns) <= 24  # some ten rungs down and up, few relapses


def test_who_insists_on_bits_gets_them_and_everybody_who_shares_the_step():
    jobs = steady(180.0, 5.0, **LIMITS)
    insists = [dataclasses.replace(job, min_width=EXACT) for job in steady(1.0, 5.0, **LIMITS)]
    records = play(jobs + insists, make_spec()).records
    pinned = [record for record in records if record.job.min_width == EXACT]
    others = [record for record in records if record.job.min_width != EXACT and record.job.arrival > 2]
    assert {narrowest(record) for record in pinned} == {EXACT}
    # Rows that share a step with one of these are read at its width, for nothing.
    shared = [record for record in others if len(record.tokens_at) > 1 and EXACT in record.tokens_at]
    assert shared


def test_limits_of_precision_hold_under_any_load():
    jobs = [
        dataclasses.replace(job, min_width=low, max_width=high)
        for job, (low, high) in zip(
            steady(180.0, 4.0, **LIMITS), itertools.cycle([(6, 8), (0, 5), (8, 8)]), strict=False
        )
    ]
    for record in play(jobs, make_spec()).records:
        assert record.error_status or all(
            max(record.job.min_width, 4) <= width <= record.job.max_width for width in record.tokens_at
        )


def test_the_same_state_gives_the_same_points():
    jobs = steady(180.0, 3.0, **LIMITS)
    first, second = (play(jobs, make_spec()).records for _ in range(2))
    assert [(r.size, r.tokens_at, r.ttft) for r in first] == [(r.size, r.tokens_at, r.ttft) for r in second]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_a_flood_takes_neither_layers_nor_bits_of_another_tenant(weights):
    tenants = Tenants([Tenant(name="calm", weight=weights[0]), Tenant(name="flood", weight=weights[1])])
    calm = steady(4.0, 10.0, "calm", **LIMITS)
    spec = make_spec(tenants=tenants, max_queued_requests=4000)
    records = play(calm + steady(300.0, 10.0, "flood", start=2.0, **LIMITS), spec).records
    beside = [record for record in records if record.job.tenant == "calm" and record.job.arrival > 5]
    flooded = [record for record in records if record.job.tenant == "flood" and record.job.arrival > 5]
    assert summarise(beside, 12)["attainment"] >= 0.95 and np.mean([record.size for record in beside]) > 11.5
    assert kl_of(beside) < 0.5 * kl_of(flooded)


def test_only_points_that_nothing_beats_are_chosen_and_others_say_so():
    table = CandidateTable(StepPrice(machine(WIDTHS)), TABLE)
    found = table.candidates(ELASTICITY.sizes, WIDTHS, "", 1)
    assert [candidate.kl for candidate in found] == sorted((candidate.kl for candidate in found), reverse=True)
    seconds = [table.price.point_seconds(candidate.size, candidate.width, 1) for candidate in found]
    assert seconds == sorted(seconds)
    assert (found[-1].size, found[-1].width, found[0].width) == (12, EXACT, 4) and len(found) < 20
    best = table.best_in(ELASTICITY.sizes)
    assert best[Point(12, EXACT)] and best[Point(11, EXACT)] == ("prefill",)
    assert len(best) == len(ELASTICITY.sizes) * len(WIDTHS)


def test_the_kind_of_text_decides_which_points_are_worth_choosing():
    kinds = {
        "prose": {"sizes": {str(s): {"kl": 0.1 * (12 - s)} for s in range(6, 12)}, "widths": {"4": {"kl": 0.05}}},
        "code": {"sizes": {str(s): {"kl": 0.3 * (12 - s)} for s in range(6, 12)}, "widths": {"4": {"kl": 0.9}}},
    }
    quality = quality_table({}, kinds, ELASTICITY.sizes, WIDTHS)
    table = CandidateTable(StepPrice(machine(WIDTHS)), quality)
    prose, code, worst = (
        {(c.size, c.width) for c in table.candidates(ELASTICITY.sizes, WIDTHS, kind, 1)}
        for kind in ("prose", "code", "")
    )
    assert (12, 4) in prose and (12, 4) not in code and worst == code
    assert table.candidate(12, 4, "prose").kl == 0.05 and table.candidate(12, 4).kl == 0.9


def test_counts_of_what_runs_stay_right_at_every_width():
    replica = Replica(0, make_spec(widths=(4, 8)))
    for low, high in [(0, EXACT), (8, EXACT), (0, 4)] * 3:
        request = make_request(16, 8, min_width=low, max_width=high)
        replica.scheduler.prepare(request)
        replica.scheduler.add(request)
    now = 0.0
    while replica.scheduler.has_work:
        now, _ = replica.run_step(now)
        replica.scheduler.check_integrity()
