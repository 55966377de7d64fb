"""What `benchmarks.trace` prints: tables of real runs, and the same requests through the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.core.config import EngineConfig
from server.core.request import Budget
from server.core.size_policy import LargestSize
from server.cost.calibrate import from_json
from server.simulation.jobs import Job, Record
from server.simulation.report import plot, summarise
from server.simulation.simulator import ReplicaSpec, Simulator
from server.sizing.policy import BudgetPolicy, PolicyConfig
from server.sizing.quality import quality_by_size, quality_table

KV_BYTES = 4 << 30
DELIVERY = 0.002  # seconds from a step's end to the client, and from the client to the queue
NOISE = 0.05


def rate_of_teacher(plan: dict[str, Any], rows: list[Job] | None = None, wanted: float = 0.99) -> float:
    """Requests per second at which the simulated teacher still meets its limits for `wanted` of the requests."""
    low, high = 0.02, 50.0
    while high / low > 1.03:
        middle = (low * high) ** 0.5
        records = simulate(plan | {"rate": middle}, 1.0, "teacher", plan["calibration"], rows)
        is_good = sum(record.met for record in records) >= wanted * len(records)
        low, high = (middle, high) if is_good else (low, middle)
    return low


def simulate(
    plan: dict[str, Any], load: float, policy: str, calibration: dict[str, Any],
    rows: list[Job] | None = None, settings: PolicyConfig | None = None,
) -> list[Record]:  # fmt: skip
    """The requests of a run (or `rows` in their place) through the simulator, on the machine of `calibration`."""
    from benchmarks.trace import jobs_of
    from benchmarks.trace_client import GIVE_UP

    machine = from_json(calibration)
    sizes = machine.profile.elasticity.sizes
    config = EngineConfig(max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=1024, page_size=32)
    measured = {int(size): row for size, row in plan["quality"].items()}
    quality = quality_table(measured, {}, sizes, machine.profile.widths)

    def make_policy() -> BudgetPolicy | LargestSize:
        if policy != "auto":
            return LargestSize()
        return BudgetPolicy(machine.fresh(), quality=quality, config=settings)

    jobs, budget = jobs_of(plan, load, rows), Budget(ttft=plan["ttft"], tpot=plan["tpot"])
    if policy != "auto":
        # As in the real run, a pinned server is not told of limits: its queue is first come, first served.
        for job in jobs:
            job.sizes, job.budget = (sizes[-1] if policy == "teacher" else sizes[0],), Budget()
    pages = KV_BYTES // (machine.profile.kv_bytes * config.page_size)
    spec = ReplicaSpec(config, machine, pages, make_policy, noise=NOISE, delivery=DELIVERY)
    records = Simulator(spec, 1).run(jobs).records
    for record in records:
        record.job.budget = budget
        # The real client leaves at this time.
        if not record.error_status and record.job.arrival + record.e2e > jobs[-1].arrival + GIVE_UP:
            record.error_status = 599
    return records


def qualities(plan: dict[str, Any]) -> dict[str, dict[int, float] | None]:
    """Two measures of what a size is worth: 1 - KL / KL(student), and agreement with the teacher's first choice."""
    measured = {int(size): row for size, row in plan["quality"].items()}
    sizes = plan["sizes"]
    top1 = {size: measured[size].get("top1_agreement") for size in sizes}
    top1[sizes[-1]] = 1.0
    return {
        "kl": quality_by_size(measured, sizes),
        "top1": None if None in top1.values() else top1,
    }


def print_report(plan: dict[str, Any], results: list[dict[str, Any]], plot_to: Path | None, plot_load: float) -> None:
    from benchmarks.trace import record_of

    top, measures = plan["sizes"][-1], qualities(plan)
    print(
        f"{plan['requests']} requests, prompts up to {plan['max_prompt']} and answers up to {plan['max_output']} "
        f"tokens; limits: first token {1e3 * plan['ttft']:.0f} ms, then {1e3 * plan['tpot']:.0f} ms per token; "
        f"load 1 = {plan['rate']:.3f} requests/s\n"
    )
    print("| load | policy | limits met | goodput /s | goodput x quality (KL) | x quality (top 1) | mean size "
          "| full size | simulated: limits met | simulated: mean size |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = {}
    for result in results:
        records = [record_of(row, plan) for row in result["records"]]
        seconds = max(record.job.arrival for record in records)
        by = {name: summarise(records, top, getter(table), seconds) for name, table in measures.items()}
        row = by["kl"]
        rows[result["load"], result["policy"]] = records
        simulated = summarise(
            simulate(plan, result["load"], result["policy"], result["calibration"]), top, seconds=seconds
        )
        print(
            f"| {result['load']:g} | {result['policy']} | {100 * row['attainment']:.1f} % | {row['goodput']:.3f} "
            f"| {row['quality_goodput']:.3f} | {by['top1']['quality_goodput']:.3f} | {row['mean_size'] or 0:.2f} "
            f"| {100 * row['full_size']:.1f} % | {100 * simulated['attainment']:.1f} % "
            f"| {simulated['mean_size'] or 0:.2f} |",
            flush=True,
        )
    print("\n| load | policy | steps | predicted against measured step time: median / p95 error, by kind "
          "| schedule, share of step | between model calls | cores: load generator | others |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for result in results:
        steps = result["steps"]
        errors = ", ".join(
            f"{kind} {100 * values['0.5']:.1f} / {100 * values['0.95']:.1f} %"
            for kind, values in steps["errors"].items()
            if values["0.5"] == values["0.5"]
        )
        busy = steps["model_seconds"] + steps["gap_seconds"]
        print(
            f"| {result['load']:g} | {result['policy']} | {steps['steps']:.0f} | {errors} "
            f"| {100 * steps['schedule_seconds'] / busy:.2f} % | {100 * steps['gap_seconds'] / busy:.2f} % "
            f"| {result.get('client', 0.0):.2f} | {result.get('others', 0.0):.2f} |"
        )
    if plot_to is not None:
        records = rows[plot_load, "auto"]
        span = records[-1].job.arrival
        plot(
            plot_to, records, top=top, floor=plan["sizes"][0], bin_seconds=max(span / 40, 1.0),
            title=f"auto at load {plot_load:g}: {len(records)} requests of the Azure conversation trace",
        )  # fmt: skip
        print(f"\nplot: {plot_to}")


def getter(table: dict[int, float] | None):
    """The table as a function of the size, for `summarise`."""
    return None if table is None else lambda size: table[size]
