"""What a size decision costs: microseconds per request with many running, and of a step's planning.

    python -m benchmarks.decision_cost

The real scheduler and policy on the default pair's shape (30 layers, 15 sizes; 75 points with five widths), without a
model: a roofline of a data centre device stands in for the machine, which changes coefficients and not the work of
deciding. The mean counts the forecasts that decisions make on the way (each holds for 0.1 s). A turn of the precision
is what the policy takes to say which width the next step reads.
"""

from __future__ import annotations

import argparse
import statistics
import time

from model_store.assembly import Elasticity
from server.core.config import EngineConfig
from server.core.request import Budget, LiveRequest, Request, SamplingParams
from server.core.width import EXACT
from server.cost.devices import DEVICES, roofline_cost_model
from server.cost.profile import CostProfile
from server.simulation.replica import Replica, ReplicaSpec
from server.sizing.policy import BudgetPolicy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--tenants", type=int, default=4)
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--widths", type=int, nargs="*", default=[4, 5, 6, 8, EXACT], help="16: as loaded")
    args = parser.parse_args()
    print("| running | decision, median | mean | p95 | plan of a decode step | a request's share of it | precision |")
    print("|---|---|---|---|---|---|---|")
    for running in args.running:
        replica = filled(running, args.tenants, tuple(args.widths))
        decisions = time_decisions(replica, args.decisions, args.tenants)
        plan = time_plans(replica)
        print(
            f"| {running} | {1e6 * statistics.median(decisions):.1f} us | {1e6 * statistics.fmean(decisions):.1f} us "
            f"| {1e6 * statistics.quantiles(decisions, n=20)[-1]:.1f} us | {1e6 * plan:.0f} us "
            f"| {1e6 * plan / running:.2f} us | {1e6 * time_widths(replica):.1f} us |"
        )


def make_request(index: int, tenants: int, elasticity: Elasticity, now: float) -> LiveRequest:
    sampling = SamplingParams(max_tokens=4000, temperature=0.0)
    budget = Budget(ttft=1.0 + index % 3, tpot=0.05 + 0.01 * (index % 4))
    asked = Request(
        f"r{index}", [0] * (64 + index % 200), sampling, sizes=elasticity.sizes, size_reason="auto", budget=budget,
        tenant=f"t{index % tenants}", arrival_time=now,
    )  # fmt: skip
    return LiveRequest(asked)


def filled(running: int, tenants: int, widths: tuple[int, ...] = (EXACT,)) -> Replica:
    """A replica whose batch holds `running` decoding requests of mixed sizes."""
    elasticity = Elasticity.last_to_first(30, [*range(0, 28, 2), 28, 29])
    profile = CostProfile(
        elasticity, (7_080_000,) * 46, 56_600_000, 768, 2304, widths=widths,
        width_bytes=tuple(min(width, 12) / min(widths[-1], 12) for width in widths),
    )  # fmt: skip
    machine = roofline_cost_model(profile, DEVICES["h100"])
    config = EngineConfig(max_num_seqs=running + 1, max_num_batched_tokens=8192)
    spec = ReplicaSpec(config, machine, 500_000, lambda: BudgetPolicy(roofline_cost_model(profile, DEVICES["h100"])))
    replica = Replica(0, spec)
    now = 0.0
    for index in range(running):
        request = make_request(index, tenants, elasticity, now)
        request.sizes = (elasticity.sizes[index % len(elasticity.sizes)],)
        replica.scheduler.add(request)
    while len(replica.scheduler.running) < running or replica.scheduler.load.pending != replica.scheduler.load.rows:
        now, _ = replica.run_step(now)
    return replica


def time_decisions(replica: Replica, count: int, tenants: int) -> list[float]:
    """Seconds of each `choose`, at moments far enough apart that forecasts are made anew as under load."""
    policy, scheduler, took = replica.policy, replica.scheduler, []
    for index in range(count):
        now = replica.now + 0.01 * index
        request = make_request(100_000 + index, tenants, replica.elasticity, now)
        policy.on_arrival(request, now)
        started = time.perf_counter()
        policy.choose(request, scheduler, now)
        took.append(time.perf_counter() - started)
    return took


def time_widths(replica: Replica, count: int = 2000) -> float:
    """Mean seconds of a step's question for its width, looks at what runs included."""
    started, now = time.perf_counter(), replica.now
    for index in range(count):
        replica.policy.width(replica.scheduler, now + 0.02 * index)
    return (time.perf_counter() - started) / count


def time_plans(replica: Replica, count: int = 200) -> float:
    """Median seconds of `Scheduler.schedule` for a step in which everyone decodes."""
    took, now = [], replica.now
    for _ in range(count):
        started = time.perf_counter()
        planned = replica.scheduler.schedule()
        took.append(time.perf_counter() - started)
        replica.now = now = now + 0.01
        replica.scheduler.update(planned, replica.sample(planned))
    return statistics.median(took)


if __name__ == "__main__":
    main()
