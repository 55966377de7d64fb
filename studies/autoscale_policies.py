"""Scaling signals compared on a simulated cluster: the real size scheduler and the real decision, simulated machines.

    python -m studies.autoscale_policies                               # up to 40 replicas, minutes of computing
    python -m studies.autoscale_policies --replicas 1000 --minutes 6   # up to 1,000

The load doubles, then falls to a quarter. Compared: degradation (deploy/autoscaler/decision.py), queue length as in the
usual KEDA recipe (5 waiting requests per replica), running requests against a target (Ray's default), and no scaling.

Answered 26 November 2026: degradation keeps the largest sizes at the same limits
(docs/log/2026-11-26-scaling-signals.md).
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from statistics import mean

from deploy.autoscaler.decision import ScalingPolicy
from deploy.autoscaler.simulated import SimulatedAutoscaler
from server.core.config import EngineConfig
from server.core.request import Budget
from server.cost.devices import DEVICES, PAIRS, roofline_cost_model
from server.simulation.simulator import ClusterState, Job, ReplicaSpec, Result, Simulator
from server.sizing.policy import BudgetPolicy


def trace(rate: float, seconds: float, budget: Budget, seed: int = 0) -> Iterator[Job]:
    """Poisson arrivals at `rate` for a fifth of the time, twice that for two fifths, then a quarter of it."""
    rng, now = random.Random(seed), 0.0
    while now < seconds:
        share = now / seconds
        now += rng.expovariate(rate * (1.0 if share < 0.2 else 2.0 if share < 0.6 else 0.25))
        prompt = min(4096, int(rng.lognormvariate(6.0, 0.8)))
        yield Job(now, max(16, prompt), max(8, min(512, int(rng.lognormvariate(4.6, 0.6)))), budget=budget)


class Queue:
    """Replicas for `threshold` waiting requests each; down after `hold` seconds without any."""

    def __init__(self, low: int, high: int, threshold: float = 5.0, hold: float = 180.0) -> None:
        self.low, self.high, self.threshold, self.hold, self.last = low, high, threshold, hold, -math.inf

    def __call__(self, state: ClusterState) -> int:
        now = state.num_replicas + state.num_starting
        wanted = math.ceil(state.num_waiting / self.threshold)
        if wanted >= now or state.num_waiting:
            self.last = state.time
            return min(self.high, max(now, wanted))
        return max(self.low, now - max(1, now // 10)) if state.time - self.last > self.hold else now


class Ongoing:
    """Replicas for `target` running requests each; down after `hold` seconds of wanting fewer."""

    def __init__(self, low: int, high: int, target: float, hold: float = 180.0) -> None:
        self.low, self.high, self.target, self.hold, self.last = low, high, target, hold, -math.inf

    def __call__(self, state: ClusterState) -> int:
        now = state.num_replicas + state.num_starting
        wanted = min(self.high, max(self.low, math.ceil((state.num_running + state.num_waiting) / self.target)))
        if wanted >= now:
            self.last = state.time
            return wanted
        return max(wanted, now - max(1, now // 10)) if state.time - self.last > self.hold else now


def simulate(
    spec: ReplicaSpec, jobs: Iterator[Job], replicas: int, autoscaler: Callable | None, startup: float
) -> Result:
    return Simulator(spec, replicas, autoscaler=autoscaler, startup=startup, sample_interval=5.0).run(jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=40, help="most replicas; the load starts at half of them")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--pair", default="qwen3-4b", choices=sorted(PAIRS))
    parser.add_argument("--device", default="l4", choices=sorted(DEVICES))
    parser.add_argument("--rate", type=float, default=0.3, help="requests per second and replica at the start")
    parser.add_argument("--tpot-ms", type=float, default=60.0)
    parser.add_argument("--ttft-ms", type=float, default=3000.0)
    parser.add_argument("--startup", type=float, default=60.0, help="seconds until a new replica serves")
    parser.add_argument("--only", default="", help="run only the policies whose name contains this")
    args = parser.parse_args()
    shape, device = PAIRS[args.pair], DEVICES[args.device]
    profile = shape.profile()
    config = EngineConfig(max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=2048, page_size=32)
    kv = device.memory * 0.9 - shape.weight_bytes
    if kv <= 0:
        parser.error(f"{args.pair} does not fit {args.device}")
    machine = roofline_cost_model(profile, device)
    spec = ReplicaSpec(
        config,
        machine,
        int(kv // (profile.kv_bytes * config.page_size)),
        lambda: BudgetPolicy(roofline_cost_model(profile, device)),
        noise=0.05,
    )
    high, low, start = args.replicas, max(1, args.replicas // 10), max(1, args.replicas // 2)
    ceiling = profile.elasticity.sizes[-1]
    budget = Budget(ttft=args.ttft_ms / 1000, tpot=args.tpot_ms / 1000)
    policies: dict[str, Callable | None] = {
        "degradation": SimulatedAutoscaler(ScalingPolicy(min_replicas=low, max_replicas=high), ceiling),
        "queue (5 waiting)": Queue(low, high),
        "running (32 each)": Ongoing(low, high, 32.0),
        "none": None,
    }
    print(f"{args.pair} on {args.device}, {start} replicas at the start, {low} to {high}, "
          f"{args.minutes:g} minutes, limits {args.ttft_ms:g} / {args.tpot_ms:g} ms\n")  # fmt: skip
    print("| scales on | requests | limits met | mean size | served whole | mean replicas | refused | simulated in |")
    print("|---|---|---|---|---|---|---|---|")
    for name, autoscaler in policies.items():
        if args.only not in name:
            continue
        began = time.monotonic()
        jobs = trace(args.rate * start, 60 * args.minutes, budget)
        result = simulate(spec, jobs, start, autoscaler, args.startup)
        done = [record for record in result.records if record.error_status == 0]
        within = list(itertools.takewhile(lambda sample: sample.time <= 60 * args.minutes, result.samples))
        print(
            f"| {name} | {len(result.records)} | {100 * mean(r.met for r in result.records):.1f} % "
            f"| {mean(r.size for r in done):.2f} of {ceiling} | {100 * mean(r.size == ceiling for r in done):.1f} % "
            f"| {mean(sample.replicas for sample in within):.1f} | {len(result.records) - len(done)} "
            f"| {time.monotonic() - began:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
