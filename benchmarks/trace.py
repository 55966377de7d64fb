"""Auto against the pinned teacher and the pinned student under a real trace: real server, real HTTP, open loop.

    python -m benchmarks.trace plan                         # limits and loads for this machine: trace_plan.json
    python -m benchmarks.trace run                          # every load and policy: trace_results.jsonl
    python -m benchmarks.trace run --load 2 --policy auto   # or piece by piece
    python -m benchmarks.trace report --plot docs/scheduling.svg

Arrivals are a slice of the Azure LLM inference trace of 2023 (benchmarks/traces), scaled in time, lengths clipped. All
loads play the same requests, faster. Limits are multiples of what the pinned teacher takes on this machine when idle,
unless they are given. Load 1 is the highest rate tried at which the teacher meets the limits for 99 % of the requests:
`plan` begins where the simulator expects it, with the cost model that a server has calibrated, and goes up or down in
steps of 7 % with the real server. It says what it is doing, and how long a try will take, on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.local_server import LocalServer
from benchmarks.trace_client import ask, play
from server.core.request import Budget
from server.simulation.jobs import Job, Record
from server.simulation.traces import read_trace, shape_trace

TRACE = Path(__file__).parent / "traces" / "azure_conv_2023.csv"
TTFT_TIMES, TPOT_TIMES = 10.0, 8.0  # limits over the pinned teacher's idle figures
POLICIES = {"teacher": "teacher", "student": "student", "auto": "auto"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=Path("trace_plan.json"))
    parser.add_argument("--results", type=Path, default=Path("trace_results.jsonl"))
    parser.add_argument("--server-args", default="", help="further flags of the server, in one string")
    steps = parser.add_subparsers(dest="step", required=True)
    plan = steps.add_parser("plan", help="calibrate, choose load 1")
    plan.add_argument("--requests", type=int, default=300)
    plan.add_argument("--max-prompt", type=int, default=256)
    plan.add_argument("--max-output", type=int, default=64)
    plan.add_argument("--ttft-ms", type=float, help=f"limit on the first token [{TTFT_TIMES:g} times the idle figure]")
    plan.add_argument("--tpot-ms", type=float, help=f"limit per token after it [{TPOT_TIMES:g} times the idle figure]")
    plan.add_argument("--rate", type=float, help="load 1 in requests per second, instead of asking the simulator")
    run = steps.add_parser("run", help="play loads against policies")
    run.add_argument("--load", type=float, nargs="*", default=[1.0, 2.0, 4.0])
    run.add_argument("--policy", nargs="*", choices=sorted(POLICIES), default=list(POLICIES))
    report = steps.add_parser("report", help="tables, and the same runs through the simulator")
    report.add_argument("--plot", type=Path, help="load, sizes and limits met over time of one auto run")
    report.add_argument("--plot-load", type=float, default=2.0)
    args = parser.parse_args()
    if args.step == "report":
        from benchmarks.trace_report import print_report

        print_report(json.loads(args.plan.read_text()), read_results(args.results), args.plot, args.plot_load)
    elif args.step == "plan":
        make_plan(args)
    else:
        run_all(args, json.loads(args.plan.read_text()))


# --- plan


def make_plan(args: argparse.Namespace) -> None:
    from benchmarks.trace_report import rate_of_teacher

    say("starting a server, which calibrates if it has not run here before")
    with LocalServer(args.server_args.split()) as server:
        say("measuring the idle server: six requests")
        idle = asyncio.run(measure_idle(server.url, args.max_prompt))
        say("letting the cost model learn from 183 requests at up to 40 at a time")
        asyncio.run(keep_busy(server.url, args.max_prompt, args.max_output))
        models = httpx.get(server.url + "/v1/models").json()["data"]
    sizes = {
        card["layers"]: card["quality"] or {}
        for card in models
        if card.get("precision") in (None, "exact") and "layers" in card
    }
    plan: dict[str, Any] = {
        "requests": args.requests,
        "max_prompt": args.max_prompt,
        "max_output": args.max_output,
        "idle": idle,
        "ttft": args.ttft_ms / 1000 if args.ttft_ms else round(TTFT_TIMES * idle["ttft"], 3),
        "tpot": args.tpot_ms / 1000 if args.tpot_ms else round(TPOT_TIMES * idle["tpot"], 4),
        "sizes": sorted(sizes),
        "quality": {size: {key: row.get(key) for key in ("kl", "top1_agreement")} for size, row in sizes.items()},
        "calibration": calibration(server),
    }
    say(f"limits: {1e3 * plan['ttft']:.0f} ms to the first token, then {1e3 * plan['tpot']:.1f} ms per token")
    if not args.rate:
        say("asking the simulator for the rate that the teacher carries")
    plan["rate"] = args.rate or measured_rate(args, plan, rate_of_teacher(plan))
    args.plan.write_text(json.dumps(plan, indent=1) + "\n")
    print(
        f"idle: first token of a {args.max_prompt}-token prompt after {1e3 * idle['ttft']:.0f} ms, then "
        f"{1e3 * idle['tpot']:.1f} ms per token; limits {1e3 * plan['ttft']:.0f} / {1e3 * plan['tpot']:.0f} ms; "
        f"load 1 = {plan['rate']:.3f} requests/s"
    )


def say(text: str) -> None:
    print(f"plan: {text}", file=sys.stderr, flush=True)


def measured_rate(args: argparse.Namespace, plan: dict[str, Any], rate: float, wanted: float = 0.99) -> float:
    """The highest of `rate` times or over 1.07, 1.07^2, ... at which the teacher is on time for `wanted` of all."""
    best, step = None, 1.0
    for _ in range(12):
        plan["rate"] = round(rate, 4)
        say(f"the teacher at {rate:.3f} requests/s, which takes about {args.requests / rate / 60:.1f} minutes")
        result = run_one(args, plan, 1.0, "teacher")
        met = statistics.mean(record["met"] for record in result["records"])
        print(f"teacher at {rate:.3f} requests/s: {met:.1%} met (others took {result['others']:.2f} cores)", flush=True)
        if met >= wanted:
            best = plan["rate"]
        if step == 1.0:
            step = 1.07 if best else 1 / 1.07
        elif (met >= wanted) == (step < 1.0):
            break  # going down: the first that holds; going up: the first that does not
        rate *= step
    if best is None:
        raise SystemExit("the teacher does not meet these limits at any load: choose others")
    return best


async def measure_idle(url: str, prompt_tokens: int) -> dict[str, float]:
    """Medians of five requests at full size, one after the other; the first is not counted."""
    rng = random.Random(1)
    rows = [await ask(url, Job(0.0, prompt_tokens, 24), "teacher", rng) for _ in range(6)][1:]
    return {
        "ttft": statistics.median(row.ttft for row in rows),
        "tpot": statistics.median(row.tpot for row in rows),
    }


async def keep_busy(url: str, max_prompt: int, max_output: int) -> None:
    """Let the cost model learn from steps as they are while serving: beside this client, sampling, other threads."""
    rng = random.Random(2)
    for concurrency in (1, 4, 16, 40):
        gate = asyncio.Semaphore(concurrency)

        async def one(size: str, gate: asyncio.Semaphore = gate) -> None:
            async with gate:
                job = Job(0.0, rng.randint(16, max_prompt), rng.randint(8, max_output))
                await ask(url, job, size, rng)

        await asyncio.gather(*(one(rng.choice(("teacher", "student", "23L"))) for _ in range(3 * concurrency)))


def jobs_of(plan: dict[str, Any], load: float, rows: list[Job] | None = None) -> list[Job]:
    """The plan's slice of the trace, or other `rows` of one, at `load`."""
    return shape_trace(
        rows or read_trace(TRACE, limit=plan["requests"]),
        max_prompt=plan["max_prompt"],
        max_output=plan["max_output"],
        budget=Budget(ttft=plan["ttft"], tpot=plan["tpot"]),
        rate=plan["rate"] * load,
    )


# --- run


def run_all(args: argparse.Namespace, plan: dict[str, Any]) -> None:
    for load in args.load:
        for policy in args.policy:
            result = run_one(args, plan, load, policy)
            with args.results.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
            met = sum(record["met"] for record in result["records"])
            print(
                f"load {load:g}, {policy}: {met} of {len(result['records'])} met their limits in "
                f"{result['seconds']:.0f} s (other processes took {result['others']:.2f} cores)",
                flush=True,
            )


def run_one(args: argparse.Namespace, plan: dict[str, Any], load: float, policy: str) -> dict[str, Any]:
    """A server of its own for each run, so that no run learns from another's traffic."""
    jobs = jobs_of(plan, load)
    with LocalServer(args.server_args.split()) as server:
        asyncio.run(measure_idle(server.url, 32))  # touches all code once
        before = scrape(server.url)
        begun, own, busy = time.perf_counter(), cpu_seconds(server), machine_seconds()
        client = time.process_time()
        records = asyncio.run(play(server.url, jobs, POLICIES[policy]))
        client = time.process_time() - client
        seconds = time.perf_counter() - begun
        others = machine_seconds() - busy - (cpu_seconds(server) - own)
        after = scrape(server.url)
    return {
        "load": load,
        "policy": policy,
        "seconds": seconds,
        "others": others / seconds,  # cores that other processes took meanwhile
        "client": client / seconds,  # and the load generator
        "records": [as_row(record) for record in records],
        "steps": step_figures(before, after),
        "calibration": calibration(server),
    }


# --- what is kept of a run


def as_row(record: Record) -> dict[str, Any]:
    job = record.job
    return {
        "arrival": round(job.arrival, 4), "prompt": job.prompt_tokens, "output": job.output_tokens,
        "size": record.size, "tokens_at": record.tokens_at, "reason": record.reason, "status": record.error_status,
        "met": record.met,
        "ttft": record.ttft, "tpot": record.tpot, "e2e": record.e2e,
    }  # fmt: skip


def record_of(row: dict[str, Any], plan: dict[str, Any]) -> Record:
    job = Job(row["arrival"], row["prompt"], row["output"], budget=Budget(ttft=plan["ttft"], tpot=plan["tpot"]))
    tokens_at = {int(width): count for width, count in row.get("tokens_at", {}).items()}
    times = row["ttft"], row["tpot"], row["e2e"]
    return Record(job, row["size"], row["reason"], *times, 0, 0, row["status"], tokens_at)


def machine_seconds() -> float:
    """Core-seconds that all processes of the machine have used."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def cpu_seconds(server: LocalServer) -> float:
    """Core-seconds that the server and this process have used."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in (server.process.pid, os.getpid()))


def scrape(url: str) -> dict[str, float]:
    """Every sample of /metrics by its full name with labels."""
    lines = httpx.get(url + "/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def calibration(server: LocalServer) -> dict[str, Any] | None:
    """What the cost model of a server that has stopped had learned; None without one."""
    found = re.findall(r"cost model: kept in (\S+\.json)", "".join(server.log))
    return json.loads(Path(found[-1]).read_text()) if found else None


def step_figures(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Prediction error by kind of step, and seconds in and between model calls, from the server's metrics."""

    def change(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    errors: dict[str, dict[str, float]] = {}
    for name, value in after.items():
        if name.startswith("boomerang:step_prediction_error{"):
            labels = dict(part.split("=") for part in name[name.index("{") + 1 : -1].replace('"', "").split(","))
            errors.setdefault(labels["kind"], {})[labels["quantile"]] = round(value, 4)
    model = {key: value for key, value in after.items() if key.startswith("boomerang:step_model_seconds_sum")}
    (total,) = [value - before.get(key, 0.0) for key, value in model.items()]
    (gap,) = [change(key) for key in after if key.startswith("boomerang:step_gap_seconds_total")]
    parts = [change(key) for key in after if key.startswith("boomerang:step_gap_part") and 'part="schedule"' in key]
    schedule = sum(parts)
    (steps,) = [change(key) for key in after if key.startswith("boomerang:engine_steps_total")]
    return {"errors": errors, "steps": steps, "model_seconds": total, "gap_seconds": gap, "schedule_seconds": schedule}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The latest result of each load and policy."""
    latest = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        latest[result["load"], result["policy"]] = result
    return [latest[key] for key in sorted(latest)]


if __name__ == "__main__":
    sys.exit(main())
