"""Soak: hours of traffic in minutes, and what it left behind.

    python -m benchmarks.soak --minutes 30 [--cores 0] [-- flags of `boomerang serve`]

1. Capacity: a closed loop with the same traffic measures how many requests per second this machine can end.
2. Soak: Poisson arrivals at 80 % of that. 30 % of the clients leave at a random moment. Sizes, lengths, structured and
   plain, streamed and whole are mixed. Memory is sampled throughout.
3. Afterwards the server must be idle with every KV page free, and must say so again when it stops.
4. A fresh server answers every greedy request once, one at a time. What clients got under load must be the same text.

Exits with 1 if anything failed; growth of memory counts from ten minutes on. Weights and KV are float32, so that
batching cannot change a greedy answer; a file's codes round inputs to 8 bits, and then it can.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.local_server import LocalServer
from benchmarks.soak_load import Case, Clients, Outcome, catalogue

FLAGS = [
    *("--dtype", "float32", "--quantization", "none"),
    *("--kv-cache-memory", "192MiB", "--max-model-len", "1024", "--max-num-seqs", "32"),
]
FLAT, FLAT_FROM = 0.02, 10.0  # growth of memory that is none, and minutes from which it is judged: caches fill first


async def soak(server: LocalServer, cases: list[Case], args: argparse.Namespace) -> tuple[Outcome, dict[str, Any]]:
    """Phases 1 and 2. Returns what the clients saw and the figures."""
    outcome = Outcome()
    clients = Clients(server.url, cases, outcome, leave_share=args.leave_share, seed=args.seed)
    memory: list[tuple[float, int]] = []
    started = time.monotonic()

    async def watch() -> None:
        while True:
            memory.append((time.monotonic() - started, server.memory()))
            await asyncio.sleep(min(5.0, args.minutes * 60 / 50))

    watcher = asyncio.ensure_future(watch())
    try:
        await clients.closed_loop(args.capacity_seconds / 4, args.concurrency)  # first use of everything
        capacity = await clients.closed_loop(args.capacity_seconds, args.concurrency)
        print(f"capacity {capacity:.2f} requests/s; soaking at {args.load:.0%} of it", flush=True)
        begun = time.monotonic() - started
        outcome.latencies.clear()
        before = outcome.counts.total()
        await clients.open_loop(args.minutes * 60, capacity * args.load)
        seconds = time.monotonic() - started - begun
    finally:
        watcher.cancel()
        await clients.aclose()
    memory.append((time.monotonic() - started, server.memory()))
    figures = {
        "capacity_per_s": round(capacity, 3),
        "soak_seconds": round(seconds, 1),
        "soak_requests": outcome.counts.total() - before,
        "latency_p50_s": round(statistics.median(outcome.latencies), 3),
        "latency_p99_s": round(sorted(outcome.latencies)[int(len(outcome.latencies) * 0.99)], 3),
        **memory_figures([(at - begun, size) for at, size in memory if at >= begun]),
    }
    return outcome, figures


def memory_figures(samples: list[tuple[float, int]]) -> dict[str, Any]:
    """Growth between the second tenth of the soak and its last tenth; the first tenth may still fill caches."""
    end = samples[-1][0]
    early = [size for at, size in samples if 0.1 * end <= at <= 0.2 * end] or [samples[0][1]]
    late = [size for at, size in samples if at >= 0.9 * end]
    start, stop = statistics.median(early), statistics.median(late)
    return {
        "memory_mib": " ".join(f"{size / 2**20:.1f}" for _, size in samples[:: max(1, len(samples) // 20)]),
        "memory_early_mib": round(start / 2**20, 1),
        "memory_late_mib": round(stop / 2**20, 1),
        "memory_growth": round(stop / start - 1, 4),
    }


def left_behind(url: str, timeout: float = 30) -> dict[str, Any]:
    """The load report once the server is idle: everything in it should be zero."""
    deadline = time.monotonic() + timeout
    while True:
        load = httpx.get(url + "/load").json()
        busy = {name: load[name] for name in ("server_load", "num_running", "num_waiting", "kv_usage") if load[name]}
        if not busy or time.monotonic() > deadline:
            return busy
        time.sleep(0.1)


def compare(url: str, cases: list[Case], outcome: Outcome) -> tuple[int, list[str]]:
    """Phase 4: (requests compared, differences)."""
    differences, compared = [], 0
    with httpx.Client(base_url=url, timeout=600) as http:
        for case in cases:
            whole, partial = outcome.whole.get(case.name, set()), outcome.partial.get(case.name, set())
            if not case.is_fixed or not (whole or partial):
                continue
            text = http.post("/v1/completions", json=case.body).json()["choices"][0]["text"]
            compared += 1
            for got in whole - {text}:
                differences.append(f"{case.name}: {got[:200]!r} instead of {text[:200]!r}")
            for got in partial:
                if not text.startswith(got):
                    differences.append(f"{case.name}: {got[:200]!r} does not begin {text[:200]!r}")
    return compared, differences


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """All four phases: (report, problems)."""
    flags = [*FLAGS, *args.flags]
    problems = []
    with LocalServer(flags, args.cores) as server:
        model = httpx.get(server.url + "/v1/models").json()["data"][0]
        cases = catalogue(model, args.cases, args.seed)
        outcome, report = asyncio.run(soak(server, cases, args))
        if busy := left_behind(server.url):
            problems.append(f"left behind: {busy}")
        problems += [f"failed: {text}" for text in outcome.failures]
        if server.process.poll() is not None:
            problems.append("the server died")
        elif server.stop() != 0:
            problems.append(f"the server stopped with {server.process.returncode}")
        if not any("pages are free" in line for line in server.log):
            problems.append("the server did not report its pages as free when it stopped")
        problems += [f"logged: {line}" for line in server.errors]
    report["outcomes"] = {"failed": 0, "refused": 0, **outcome.counts}
    if args.minutes >= FLAT_FROM and report["memory_growth"] > FLAT:
        problems.append(f"memory grew by {report['memory_growth']:.1%}")
    with LocalServer(flags, args.cores) as server:
        compared, differences = compare(server.url, cases, outcome)
    report["greedy_cases_compared"] = compared
    report["greedy_texts_compared"] = sum(map(len, outcome.whole.values())) + sum(map(len, outcome.partial.values()))
    return report, problems + [f"differs: {text}" for text in differences]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=30)
    made.add_argument("--load", type=float, default=0.8, help="share of the measured capacity")
    made.add_argument("--leave-share", type=float, default=0.3, help="share of clients that leave early")
    made.add_argument("--capacity-seconds", type=float, default=60)
    made.add_argument("--concurrency", type=int, default=16, help="of the closed loop that measures capacity")
    made.add_argument("--cases", type=int, default=96, help="different requests")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--cores", help="pin the server to these cores (taskset -c)")
    made.add_argument("--json", type=Path, help="write the report there too")
    made.add_argument("flags", nargs="*", help="further flags of the server, after --")
    return made


def main() -> int:
    args = parser().parse_args()
    report, problems = run(args)
    report["problems"] = problems
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
