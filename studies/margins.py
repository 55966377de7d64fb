"""What the policy's margins are worth on traffic that they were not chosen on: many slices of a trace, simulated.

    python -m studies.margins --trace AzureLLMInferenceTrace_conv.csv --slices 20 --set margin=0.75

Limits, quality and machine come from a plan of `benchmarks.trace`. Every slice has a load 1 of its own: the highest
rate at which the simulated teacher meets 99 % of the limits.

Answered 26 November 2026: 0.85 keeps the limits that 0.75 keeps, at larger sizes
(docs/log/2026-11-28-scheduling-runs.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import fields
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from benchmarks.trace import TRACE
from benchmarks.trace_report import getter, qualities, rate_of_teacher, simulate
from server.simulation.report import summarise
from server.simulation.traces import read_trace
from server.sizing.policy import PolicyConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=Path("trace_plan.json"))
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--loads", type=float, nargs="*", default=[1.0, 2.0, 4.0])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--set", nargs="+", action="append", default=[], metavar="NAME=VALUE", help="one more policy")
    args = parser.parse_args()
    plan, rows = json.loads(args.plan.read_text()), read_trace(args.trace)
    step = (len(rows) - plan["requests"]) // max(args.slices - 1, 1)
    slices = [rows[i * step : i * step + plan["requests"]] for i in range(args.slices)]
    policies = {"as it is": {}} | {" ".join(items): dict(map(_assignment, items)) for items in args.set}
    with Pool(args.jobs) as pool:
        rates = pool.starmap(rate_of_teacher, [(plan, part) for part in slices])
        print(f"load 1: {min(rates):.2f} to {max(rates):.2f} requests/s, median {statistics.median(rates):.2f}\n")
        print("| policy | load | limits met | in the worst slice | full size | mean size | goodput x quality (KL) |")
        print("|---|---|---|---|---|---|---|")
        for name, settings in policies.items():
            for load in args.loads:
                work = [(plan, part, rate * load, settings) for part, rate in zip(slices, rates, strict=True)]
                found = pool.starmap(play, work)
                met = [row["attainment"] for row in found]
                full, size, worth = (
                    statistics.mean(row[key] for row in found) for key in ("full_size", "mean_size", "quality_goodput")
                )
                print(
                    f"| {name} | {load:g} | {100 * statistics.mean(met):.2f} % | {100 * min(met):.1f} % "
                    f"| {100 * full:.1f} % | {size:.2f} | {worth:.3f} |",
                    flush=True,
                )


def play(plan: dict[str, Any], rows: list, rate: float, settings: dict[str, float]) -> dict[str, float]:
    """`server.simulation.report.summarise` of one slice at `rate` under `auto` with these settings."""
    records = simulate(plan | {"rate": rate}, 1.0, "auto", plan["calibration"], rows, PolicyConfig(**settings))
    return summarise(records, plan["sizes"][-1], getter(qualities(plan)["kl"]))


def _assignment(item: str) -> tuple[str, float]:
    name, _, value = item.partition("=")
    if name not in {field.name for field in fields(PolicyConfig)}:
        raise SystemExit(f"--set {item}: PolicyConfig has no such field")
    return name, float(value)


if __name__ == "__main__":
    main()
