"""Load that rises and falls against the local stack: sizes shrink, a replica joins, sizes recover, the replica leaves.

    python -m benchmarks.autoscale             # about four minutes; prints tables, draws the plot and the dashboard
    python -m benchmarks.autoscale --kill      # besides, ends one replica with SIGKILL at the peak

Limits and load are relative to what one replica does on this machine: it has places for `--batch` requests, limits are
multiples of the latencies with all places taken at full size, and rates are multiples of the requests per second that
are answered then. Needs haproxy and prometheus on PATH. Every replica gets one thread and its own places, which is what
a second machine would add; on two cores this is the smallest deployment in which scaling is real.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean

import httpx

from benchmarks.autoscale_load import Phase, Record, Run, body_maker, capacity, drive, ends
from deploy.autoscaler.decision import ScalingPolicy
from deploy.grafana.panels import draw
from deploy.local.stack import LocalStack


def table(run: Run, phases: Sequence[Phase], slo: dict) -> str:
    """One line per phase: requests, failures, mean size, limits met, latencies, replicas."""
    lines = [
        "| phase | requests | failed | mean size | limits met | TTFT p50 / p95 (ms) | TPOT p50 / p95 (ms) | replicas |",
        "|---|---|---|---|---|---|---|---|",
    ]
    start = 0.0
    for end, rate in ends(phases):
        part = [r for r in run.records if start <= r.at < end]
        done = [r for r in part if r.is_complete]
        met = [r for r in done if _is_met(r, slo)]
        replicas = [ready for at, ready, _, _ in run.samples if start <= at < end]
        ttft = sorted(1000 * r.ttft for r in done if r.ttft is not None)
        tpot = sorted(1000 * r.tpot for r in done if r.tpot is not None)
        lines.append(
            f"| {start:.0f} to {end:.0f} s, {rate:g}/s | {len(part)} | {len(part) - len(done)} "
            f"| {mean(r.size for r in done) if done else 0:.1f} | {100 * len(met) / max(1, len(part)):.1f} % "
            f"| {_at(ttft, 0.5):.0f} / {_at(ttft, 0.95):.0f} | {_at(tpot, 0.5):.0f} / {_at(tpot, 0.95):.0f} "
            f"| {min(replicas, default=0)} to {max(replicas, default=0)} |"
        )
        start = end
    return "\n".join(lines)


def _is_met(record: Record, slo: dict) -> bool:
    return not (
        (record.ttft is not None and "ttft_ms" in slo and 1000 * record.ttft > slo["ttft_ms"])
        or (record.tpot is not None and "tpot_ms" in slo and 1000 * record.tpot > slo["tpot_ms"])
    )


def _at(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def plot(run: Run, phases: Sequence[Phase], slo: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [r for r in run.records if r.is_complete]
    figure, axes = plt.subplots(4, 1, figsize=(9, 7.6), sharex=True, height_ratios=(2, 2, 1.2, 0.6))
    times, ready, target, in_flight = zip(*run.samples, strict=True)
    axes[0].scatter([r.at for r in done], [r.size for r in done], s=9, alpha=0.5, color="#2b3fa8", linewidths=0)
    failed = sorted(r.at for r in run.records if not r.is_complete)
    axes[3].step([0.0, *failed, times[-1]], [*range(len(failed) + 1), len(failed)], where="post", color="#c02020")
    axes[3].set_ylim(-0.1, max(1, len(failed)) * 1.2)
    axes[3].set_ylabel("refused\nor broken")
    axes[0].set_ylabel("layers served")
    axes[1].scatter([r.at for r in done if r.tpot], [1000 * r.tpot for r in done if r.tpot], s=9, alpha=0.5,
                    color="#b3470a", linewidths=0)  # fmt: skip
    if "tpot_ms" in slo:
        axes[1].axhline(slo["tpot_ms"], color="#555", linestyle="--", linewidth=1)
        axes[1].annotate("limit", (0, slo["tpot_ms"]), xytext=(2, 3), textcoords="offset points", fontsize=8)
    axes[1].set_ylabel("ms per token")
    axes[1].set_ylim(0)
    axes[2].step(times, ready, where="post", color="#1d7f4f", linewidth=2, label="replicas ready")
    axes[2].step(times, target, where="post", color="#1d7f4f", linewidth=1, linestyle=":", label="target")
    axes[2].set_ylabel("replicas")
    axes[2].set_ylim(0, max(max(ready), max(target)) + 0.5)
    load = axes[2].twinx()
    load.plot(times, in_flight, color="#888", linewidth=1)
    load.set_ylabel("in flight", color="#888")
    axes[2].legend(loc="upper left", frameon=False, fontsize=8)
    axes[3].set_xlabel("seconds")
    start = 0.0
    for end, rate in ends(phases):
        axes[0].annotate(f"{rate:g} requests/s", ((start + end) / 2, 1.02), xycoords=("data", "axes fraction"),
                         ha="center", fontsize=9)  # fmt: skip
        for axis in axes:
            axis.axvline(end, color="#ddd", linewidth=0.8, zorder=0)
        start = end
    for at, name in run.events:
        for axis in axes:
            axis.axvline(at, color="#c02020", linewidth=1)
        axes[0].annotate(name, (at, axes[0].get_ylim()[0]), fontsize=8, color="#c02020")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def timeline(run: Run, phases: Sequence[Phase], ceiling: int) -> str:
    """When what happened, from the busiest phase's beginning on."""
    busiest = max(range(len(phases)), key=lambda i: phases[i].rate)
    bounds = [0.0, *(end for end, _ in ends(phases))]
    rise, fall = bounds[busiest], bounds[busiest + 1]
    small = [r.at + (r.ttft or 0.0) for r in run.records if r.size and r.size < ceiling and r.at >= rise]
    counts = [(at, ready, target) for at, ready, target, _ in run.samples]
    target = next((at for at, _, target in counts if at >= rise and target > 1), math.nan)
    joined = next((at for at, ready, _ in counts if at >= rise and ready > 1), math.nan)
    left = next((at for at, ready, _ in counts if at >= fall and ready == 1), math.nan)
    whole = [r.size == ceiling for r in run.records if joined + 5 <= r.at < fall and r.size]
    lines = [
        f"first smaller size {min(small, default=math.nan) - rise:.2f} s after the load rose",
        f"second replica decided on after {target - rise:.1f} s, ready after {joined - rise:.1f} s",
        f"from 5 s after that until the load fell: {100 * mean(whole) if whole else math.nan:.0f} % at full size",
        f"the replica left {left - fall:.1f} s after the load fell",
    ]
    return "\n".join("- " + line for line in lines)


def measured(rate: float, tpot: float, ttft: float) -> str:
    return f"{rate:.2f} requests/s, {1000 * tpot:.1f} ms per token, first token after {1000 * ttft:.0f} ms"


def report(run: Run, phases: Sequence[Phase], slo: dict, ceiling: int, decisions: str, one: str) -> None:
    """Prints what one replica can do (`one`), a line per phase, when what happened, failures, and all decisions."""
    print(f"One replica, {one}. Limits: {slo}\n")
    print(table(run, phases, slo))
    print("\n" + timeline(run, phases, ceiling))
    failed = [r for r in run.records if not r.is_complete]
    print(f"\n{len(run.records)} requests, {len(failed)} not completed")
    for record in failed[:20]:
        print(asdict(record))
    print("\nDecisions:")
    for line in decisions.splitlines():
        entry = json.loads(line)
        print(f"  {entry['target']} replicas, {entry['reason']}: {entry['detail']}")


def counts(stack: LocalStack) -> tuple[int, int]:
    """(replicas ready, target)."""
    target = stack.controller.state.target if stack.controller.state else 0
    return stack.num_ready(), target


def kill_one(stack: LocalStack) -> str:
    """SIGKILL for one ready replica; its name."""
    victim = next(replica for replica in stack.driver.replicas() if replica.status == "ready")
    os.kill(stack.driver.pid(victim.id), signal.SIGKILL)
    return victim.id


def server_command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "server", "serve", "--host", "{host}", "--port", "{port}", *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default="20:0.25,60:1.2,80:0.25", help="seconds:load (1 = one replica), ...")
    parser.add_argument("--batch", type=int, default=8, help="requests that one replica runs at once")
    parser.add_argument("--tokens", default="32:96", help="output tokens, lowest:highest")
    parser.add_argument("--max-replicas", type=int, default=2)
    parser.add_argument("--kill", action="store_true", help="SIGKILL one replica in the middle of the busiest phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of plot and JSON")
    parser.add_argument("server", nargs="*", help="further flags of the server, after --")
    args = parser.parse_args()
    low, high = map(int, args.tokens.split(":"))
    # The defaults are for days; this is for minutes.
    policy = ScalingPolicy(max_replicas=args.max_replicas, down_stabilisation=20, down_interval=5, capacity_doubling=60)
    name = "autoscale-kill" if args.kill else "autoscale"
    places = ("--max-num-seqs", str(args.batch))
    command = server_command("--num-threads", "1", *places, "--shutdown-timeout", "60", *args.server)
    with (
        tempfile.TemporaryDirectory(prefix="boomerang-autoscale-") as folder,
        LocalStack(command, Path(folder), policy) as stack,
    ):
        stack.wait_ready(timeout=300)
        begin = time.time()
        cards = httpx.get(stack.api_url + "/v1/models", trust_env=False).json()["data"]
        model, ceiling = cards[0]["id"], max(card.get("layers") or 0 for card in cards)
        rate, tpot, ttft = asyncio.run(capacity(stack.api_url, model, args.batch, (low + high) // 2))
        slo = {"tpot_ms": round(1500 * tpot, 1), "ttft_ms": round(5000 * ttft)}
        shares = [tuple(map(float, part.split(":"))) for part in args.phases.split(",")]
        phases = [Phase(seconds, round(share * rate, 2)) for seconds, share in shares]
        busiest = max(range(len(phases)), key=lambda i: phases[i].rate)
        kill_at = sum(phase.seconds for phase in phases[:busiest]) + phases[busiest].seconds * 0.7
        kill = partial(kill_one, stack) if args.kill else None
        make_body = body_maker(model, slo, (low, high))
        run = asyncio.run(
            drive(stack.api_url, phases, make_body, partial(counts, stack), args.seed, kill=kill, kill_at=kill_at)
        )
        args.out.mkdir(parents=True, exist_ok=True)
        draw(stack.prometheus_url, args.out / f"{name.replace('autoscale', 'dashboard')}.png", begin, time.time())
        decisions = (Path(folder) / "decisions.jsonl").read_text()
    plot(run, phases, slo, args.out / f"{name}.png")
    report(run, phases, slo, ceiling, decisions, f"{args.batch} at once, full size: {measured(rate, tpot, ttft)}")


if __name__ == "__main__":
    main()
