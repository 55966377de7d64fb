"""This build against an earlier one under the same absolute loads: two real servers in turn, one comparison.

    python -m benchmarks.trace_compare --base ../e5d4d51 --minutes 8
    python -m benchmarks.trace_compare --base ../e5d4d51 --own-args "--quantization none --precision-dial on"
    BOOMERANG_CPU_VARIANT=avx2 python -m benchmarks.trace_compare --base ../e5d4d51 --limits 3000,120 --rate 2

`--base` is a checkout of the earlier build (`git worktree add ../e5d4d51 e5d4d51`). Its limits are ten times its idle
time to the first token and eight times its idle time per token; load 1 is the rate at which its teacher meets them for
99 % of the requests by its own simulator, with the cost model that its own server has calibrated. Both builds then play
the same requests at 1, 2 and 4 times that rate with `auto`, as many as fit into the minutes. KL is the mean over
answers of what each token's size and precision were measured to cost, by this build's table, on the worst kind of text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.local_server import ROOT, LocalServer
from benchmarks.trace import TPOT_TIMES, TTFT_TIMES, calibration, jobs_of, keep_busy, measure_idle
from benchmarks.trace_client import play
from server.simulation.jobs import Record
from server.sizing.spec import size_name

LOADS = (1.0, 2.0, 4.0)
_START = 20.0  # seconds that a server takes to start and stop, when it is guessed how many requests fit
# Bars of a load: least share of limits met, most KL as a share of the earlier build's at load 2 (at load 1: of nothing)
BARS = {1.0: (1.0, 0.0), 2.0: (0.99, 0.125), 4.0: (0.95, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="checkout of the earlier build")
    parser.add_argument("--minutes", type=float, default=8.0, help="that planning and runs may take together")
    parser.add_argument("--max-prompt", type=int, default=256)
    parser.add_argument("--max-output", type=int, default=64)
    parser.add_argument("--server-args", default="", help="flags of both servers, in one string")
    parser.add_argument("--own-args", default="", help="further flags of this build's, in one string")
    parser.add_argument("--rate", type=float, help="load 1 in requests per second, instead of the earlier build's plan")
    parser.add_argument("--limits", help="ms to the first token and per token, instead of multiples of idle ones")
    parser.add_argument("--out", type=Path, help="write plan and records here (JSON)")
    args = parser.parse_args()
    say("starting this build once: it may make nested codes and calibrates, which is not counted")
    with LocalServer(flags_of(args, ROOT), patience=1800) as server:
        asyncio.run(keep_busy(server.url, args.max_prompt, args.max_output))
    begun = time.monotonic()
    plan = make_plan(args)
    seconds = 60.0 * args.minutes - (time.monotonic() - begun) - 2 * len(LOADS) * _START
    fits = int(seconds * plan["rate"] / (2 * sum(1 / load for load in LOADS)))
    plan["requests"] = max(min(fits, 300), 20)
    say(
        f"limits {1e3 * plan['ttft']:.0f} / {1e3 * plan['tpot']:.1f} ms, load 1 = {plan['rate']:.3f} requests/s, "
        f"{plan['requests']} requests of each load and build"
    )
    results: dict[str, dict[float, list[Record]]] = {"earlier": {}, "this": {}}
    kl: dict[str, float] = {}
    for load in LOADS:
        for build, root in (("earlier", args.base.resolve()), ("this", ROOT)):
            results[build][load] = run_one(args, plan, load, root, kl)
            met = statistics.mean(record.met for record in results[build][load])
            say(f"load {load:g}, {build} build: {met:.1%} of limits met")
    print_comparison(plan, results, kl)
    if args.out:
        rows = {
            build: {load: [record_row(record) for record in records] for load, records in loads.items()}
            for build, loads in results.items()
        }
        args.out.write_text(json.dumps({"plan": plan, "kl": kl, "records": rows}) + "\n")


def say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


def flags_of(args: argparse.Namespace, root: Path) -> list[str]:
    return [*args.server_args.split(), *(args.own_args.split() if root == ROOT else [])]


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Limits and load 1, by the earlier build."""
    base = args.base.resolve()
    say("starting the earlier build, which calibrates if it has not run here before")
    with LocalServer(flags_of(args, base), root=base) as server:
        idle = asyncio.run(measure_idle(server.url, args.max_prompt))
        asyncio.run(keep_busy(server.url, args.max_prompt, args.max_output))
        models = httpx.get(server.url + "/v1/models").json()["data"]
    sizes = {card["layers"]: (card["quality"] or {}) for card in models if "layers" in card}
    ttft, tpot = TTFT_TIMES * idle["ttft"], TPOT_TIMES * idle["tpot"]
    if args.limits:
        ttft, tpot = (float(limit) / 1000 for limit in args.limits.split(","))
    plan = {
        "requests": 150,
        "max_prompt": args.max_prompt,
        "max_output": args.max_output,
        "idle": idle,
        "ttft": round(ttft, 3),
        "tpot": round(tpot, 4),
        "sizes": sorted(sizes),
        "quality": {size: {key: row.get(key) for key in ("kl", "top1_agreement")} for size, row in sizes.items()},
        "calibration": calibration(server),
    }
    plan["rate"] = args.rate or rate_by(base, plan)
    return plan


def rate_by(base: Path, plan: dict[str, Any]) -> float:
    """Requests per second that the earlier build's simulator says its teacher carries."""
    say("asking its simulator for the rate that the teacher carries")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(plan, file)
        file.flush()
        code = "import json, sys; from benchmarks.trace_report import rate_of_teacher as rate; "
        code += "print(rate(json.load(open(sys.argv[1]))))"
        out = subprocess.run([sys.executable, "-c", code, file.name], cwd=base, env=LocalServer.environment(base),
                             capture_output=True, text=True, check=True)  # fmt: skip
    return float(out.stdout.split()[-1])


def run_one(
    args: argparse.Namespace, plan: dict[str, Any], load: float, root: Path, kl: dict[str, float]
) -> list[Record]:
    """Play one load against a server of its own, and note the KL of points that were served."""
    with LocalServer(flags_of(args, root), root=root) as server:
        asyncio.run(measure_idle(server.url, 32))  # touches all code once
        records = asyncio.run(play(server.url, jobs_of(plan, load), "auto"))
        models = httpx.get(server.url + "/v1/models").json()["data"]
        served = {size_name(record.size, width) for record in records if record.size for width in record.tokens_at}
        for name in {*served, *map(size_name, plan["sizes"])} - kl.keys() if root == ROOT else ():
            card = httpx.get(f"{server.url}/v1/models/{models[0]['id']}:{name}").json()
            kl[name] = max(card["expected_kl"].values())
    return records


def kl_of(record: Record, kl: dict[str, float]) -> float:
    """Nats per token of an answer."""
    counts = {size_name(record.size, width): count for width, count in record.tokens_at.items()}
    return sum(count * kl[name] for name, count in counts.items()) / max(sum(counts.values()), 1)


def print_comparison(plan: dict[str, Any], results: dict[str, dict[float, list[Record]]], kl: dict[str, float]) -> None:
    top, worst = max(plan["sizes"]), max(kl.values(), default=1.0) or 1.0
    print("| load | build | limits met | mean KL | mean layers | tokens by precision | all layers, exact "
          "| goodput x quality /s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    figures = {}
    for load in LOADS:
        for build, loads in results.items():
            records = loads[load]
            answered = [record for record in records if not record.error_status]
            met = [record for record in records if record.met]
            mean = statistics.mean(kl_of(record, kl) for record in answered) if answered else float("nan")
            seconds = max(record.job.arrival for record in records)
            goodput = sum(1 - kl_of(record, kl) / worst for record in met) / seconds
            share, whole = len(met) / len(records), [r for r in answered if r.size == top and set(r.tokens_at) <= {16}]
            total: dict[int, int] = {}
            for record in answered:
                for width, count in record.tokens_at.items():
                    total[width] = total.get(width, 0) + count
            tokens = sum(total.values()) or 1
            widths = ", ".join(
                f"{'exact' if width == 16 else f'q{width}'} {count / tokens:.0%}"
                for width, count in sorted(total.items(), reverse=True)
            )
            layers = statistics.mean(record.size for record in answered) if answered else 0.0
            print(f"| {load:g} | {build} | {share:.1%} | {mean:.4f} | {layers:.2f} | {widths} "
                  f"| {len(whole) / len(records):.1%} | {goodput:.3f} |")  # fmt: skip
            figures[load, build] = share, mean, goodput
    reference = figures[2.0, "earlier"][1]
    print()
    for load, (least, share_of_kl) in BARS.items():
        share, mean, goodput = figures[load, "this"]
        is_met = share >= least and mean <= share_of_kl * reference + 1e-9
        print(f"load {load:g}: {share:.1%} of limits (wanted {least:.0%}), KL {mean:.4f} (wanted at most "
              f"{share_of_kl * reference:.4f}): {'met' if is_met else 'missed'}")  # fmt: skip
    before, now = figures[4.0, "earlier"][2], figures[4.0, "this"][2]
    if before > 0:
        print(f"load 4: goodput times quality {now / before:.2f} times the earlier build's (wanted 2)")


def record_row(record: Record) -> dict[str, Any]:
    return {"arrival": record.job.arrival, "size": record.size, "tokens_at": record.tokens_at, "met": record.met,
            "ttft": record.ttft, "tpot": record.tpot, "status": record.error_status}  # fmt: skip


if __name__ == "__main__":
    main()
