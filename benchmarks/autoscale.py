"""Load that rises and falls against the local stack: sizes shrink, a replica joins, sizes recover, the replica leaves.

    python -m benchmarks.autoscale                      # about six minutes; prints the table and writes the plot
    python -m benchmarks.autoscale --kill               # besides, ends one replica with SIGKILL at the peak

Needs haproxy and prometheus on PATH. Every replica gets one thread, so that a second one adds what a second machine
would: on two cores this is the smallest deployment in which scaling is real.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

import httpx

from deploy.autoscaler.decision import ScalingPolicy
from deploy.local.stack import LocalStack

TOPICS = (
    "the tides", "a lighthouse keeper", "how bread rises", "the rules of chess", "migrating birds", "a broken clock",
    "why leaves turn red", "the first train", "a letter to a friend", "what an engine does",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phase:
    """`seconds` of Poisson arrivals at `rate` requests per second."""

    seconds: float
    rate: float


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times in seconds; `at` since the start of the load."""

    at: float
    status: int = 0
    size: int = 0
    reason: str = ""
    ttft: float | None = None
    e2e: float | None = None
    tokens: int = 0
    is_complete: bool = False
    error: str = ""

    @property
    def tpot(self) -> float | None:
        if self.tokens < 2 or self.ttft is None or self.e2e is None:
            return None
        return (self.e2e - self.ttft) / (self.tokens - 1)


@dataclass(slots=True)
class Run:
    """What came out: one record per request, and samples of (time, ready, target, in flight)."""

    records: list[Record] = field(default_factory=list)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)


async def send(client: httpx.AsyncClient, record: Record, body: dict, started: float) -> None:
    """One streamed request; never raises."""
    begin = time.monotonic()
    record.at = begin - started
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            record.status = response.status_code
            if response.status_code != 200:
                record.error = (await response.aread()).decode(errors="replace")[:300]
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    record.is_complete = not record.error
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    record.error = event["error"]["message"]
                    continue
                if size := event.get("size"):
                    record.size, record.reason = size["layers"], size["reason"]
                if event.get("usage"):
                    record.tokens = event["usage"]["completion_tokens"]
                if event.get("choices") and event["choices"][0].get("text") and record.ttft is None:
                    record.ttft = time.monotonic() - begin
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        record.e2e = time.monotonic() - begin


async def drive(
    stack: LocalStack,
    phases: Sequence[Phase],
    make_body: Callable[[random.Random], dict],
    seed: int = 0,
    kill_at: float | None = None,
) -> Run:
    """Open-loop arrivals through the load balancer. `kill_at`: seconds after which one ready replica gets SIGKILL."""
    rng, run = random.Random(seed), Run()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    started = time.monotonic()
    in_flight: set[asyncio.Task] = set()
    is_over = asyncio.Event()

    async def watch() -> None:
        while not is_over.is_set():
            replicas = await asyncio.to_thread(stack.driver.replicas)
            ready = sum(replica.status == "ready" for replica in replicas)
            target = stack.controller.state.target if stack.controller.state else 0
            run.samples.append((time.monotonic() - started, ready, target, len(in_flight)))
            await asyncio.sleep(0.5)

    async def kill() -> None:
        await asyncio.sleep(kill_at)
        victim = next(r for r in await asyncio.to_thread(stack.driver.replicas) if r.status == "ready")
        os.kill(stack.driver.pid(victim.id), signal.SIGKILL)
        run.events.append((time.monotonic() - started, f"SIGKILL {victim.id}"))

    async with httpx.AsyncClient(base_url=stack.api_url, timeout=120, limits=limits, trust_env=False) as client:
        helpers = [asyncio.create_task(watch())]
        if kill_at is not None:
            helpers.append(asyncio.create_task(kill()))
        due = 0.0
        for end, rate in _ends(phases):
            while True:
                due += rng.expovariate(rate)
                if due >= end:
                    due = end
                    break
                await asyncio.sleep(max(0.0, started + due - time.monotonic()))
                record = Record(0.0)
                run.records.append(record)
                task = asyncio.create_task(send(client, record, make_body(rng), started))
                in_flight.add(task)
                task.add_done_callback(in_flight.discard)
            await asyncio.sleep(max(0.0, started + due - time.monotonic()))
        while in_flight:
            await asyncio.sleep(0.1)
        is_over.set()
        await asyncio.gather(*helpers)
    return run


def _ends(phases: Sequence[Phase]) -> list[tuple[float, float]]:
    ends, end = [], 0.0
    for phase in phases:
        end += phase.seconds
        ends.append((end, phase.rate))
    return ends


def body_maker(model: str, slo: dict, tokens: tuple[int, int]) -> Callable[[random.Random], dict]:
    def make(rng: random.Random) -> dict:
        return {
            "model": model,
            "prompt": f"Write a short text about {rng.choice(TOPICS)} ({rng.randrange(10_000)}).\n\n",
            "max_tokens": rng.randint(*tokens),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "slo": slo,
        }

    return make


# --- what came out


def table(run: Run, phases: Sequence[Phase], slo: dict) -> str:
    """One line per phase: requests, failures, mean size, limits met, latencies, replicas."""
    lines = [
        "| phase | requests | failed | mean size | limits met | TTFT p50 / p95 (ms) | TPOT p50 / p95 (ms) | replicas |",
        "|---|---|---|---|---|---|---|---|",
    ]
    start = 0.0
    for end, rate in _ends(phases):
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
    figure, axes = plt.subplots(3, 1, figsize=(9, 7), sharex=True, height_ratios=(2, 2, 1.2))
    times, ready, target, in_flight = zip(*run.samples, strict=True)
    axes[0].scatter([r.at for r in done], [r.size for r in done], s=9, alpha=0.5, color="#2b3fa8", linewidths=0)
    failed = [r for r in run.records if not r.is_complete]
    if failed:
        axes[0].scatter(
            [r.at for r in failed], [r.size for r in failed], s=30, marker="x", color="#c02020", label="cut"
        )
        axes[0].legend(loc="lower right", frameon=False)
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
    axes[2].set_xlabel("seconds")
    start = 0.0
    for end, rate in _ends(phases):
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


def server_command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "server", "serve", "--host", "{host}", "--port", "{port}", *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default="60:0.3,120:3,180:0.3", help="seconds:requests per second, ...")
    parser.add_argument("--slo-tpot-ms", type=float, default=80.0)
    parser.add_argument("--slo-ttft-ms", type=float, default=1500.0)
    parser.add_argument("--tokens", default="32:96", help="output tokens, lowest:highest")
    parser.add_argument("--max-replicas", type=int, default=2)
    parser.add_argument("--kill", action="store_true", help="SIGKILL one replica in the middle of the busiest phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of plot and JSON")
    parser.add_argument("server", nargs="*", help="further flags of the server, after --")
    args = parser.parse_args()
    phases = [Phase(*map(float, part.split(":"))) for part in args.phases.split(",")]
    slo = {"tpot_ms": args.slo_tpot_ms, "ttft_ms": args.slo_ttft_ms}
    low, high = map(int, args.tokens.split(":"))
    policy = ScalingPolicy(max_replicas=args.max_replicas, down_stabilisation=30, down_interval=10)
    name = "autoscale-kill" if args.kill else "autoscale"
    kill_at = None
    if args.kill:
        busiest = max(range(len(phases)), key=lambda i: phases[i].rate)
        kill_at = sum(phase.seconds for phase in phases[:busiest]) + phases[busiest].seconds * 0.7
    command = server_command("--num-threads", "1", "--shutdown-timeout", "60", *args.server)
    with (
        tempfile.TemporaryDirectory(prefix="boomerang-autoscale-") as folder,
        LocalStack(command, Path(folder), policy) as stack,
    ):
        stack.wait_ready(timeout=300)
        model = httpx.get(stack.api_url + "/v1/models", trust_env=False).json()["data"][0]["id"]
        run = asyncio.run(drive(stack, phases, body_maker(model, slo, (low, high)), args.seed, kill_at))
        decisions = (Path(folder) / "decisions.jsonl").read_text()
    args.out.mkdir(parents=True, exist_ok=True)
    plot(run, phases, slo, args.out / f"{name}.png")
    print(table(run, phases, slo))
    failed = [r for r in run.records if not r.is_complete]
    print(f"\n{len(run.records)} requests, {len(failed)} not completed")
    for record in failed[:20]:
        print(asdict(record))
    print("\nDecisions:")
    for line in decisions.splitlines():
        entry = json.loads(line)
        print(f"  {entry['target']} replicas, {entry['reason']}: {entry['detail']}")


if __name__ == "__main__":
    main()
