"""The compose file at its default settings under load that rises and falls, on a real Docker engine.

    docker compose build server autoscaler
    python -m benchmarks.autoscale_compose     # nine minutes; prints tables, draws the plot and the dashboard

Nothing is set but the project's name: the default pair, one replica at first and four at most, and the autoscaler as
it is. The limits come with the requests, relative to what one replica does on this machine with `--batch` requests at
once at full size; rates are multiples of the requests per second that it answers then. Ports 8000 and 9090 of this
machine must be free. `--store` fills the volume from a local store where containers reach no network.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import time
from pathlib import Path

import httpx

from benchmarks.autoscale import measured, plot, report
from benchmarks.autoscale_load import Phase, body_maker, capacity, drive
from deploy.grafana.panels import draw

ROOT = Path(__file__).parents[1]
PROJECT = "boomerang-autoscale"
API, PROMETHEUS = "http://127.0.0.1:8000", "http://127.0.0.1:9090"


def docker(*command: str) -> str:
    """Without what the shell or .env say about this project: defaults are what is to be seen."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BOOMERANG_")}
    return subprocess.run(["docker", *command], cwd=ROOT, env=environment, check=True, stdout=-1, text=True).stdout


def compose(*command: str) -> str:
    return docker("compose", "--env-file", os.devnull, "-p", PROJECT, *command)


def counts() -> tuple[int, int]:
    """(replicas ready, target), as the autoscaler last told Prometheus."""
    names = "boomerang_autoscaler_target_replicas|boomerang_autoscaler_replicas"
    query = f'{{__name__=~"{names}",status=~"|ready"}}'
    answer = httpx.get(PROMETHEUS + "/api/v1/query", params={"query": query}, trust_env=False).json()
    found = {series["metric"].get("status", "target"): float(series["value"][1]) for series in answer["data"]["result"]}
    return int(found.get("ready", 0)), int(found.get("target", 0))


def wait(url: str, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(url, trust_env=False, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, url
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default="40:0.1,100:1.6,330:0.1", help="seconds:load (1 = one replica), ...")
    parser.add_argument("--batch", type=int, default=8, help="requests at once for which the limits are made")
    parser.add_argument("--limit", type=float, default=1.5, help="limit per token, x what these take")
    parser.add_argument("--tokens", default="32:96", help="output tokens, lowest:highest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="copy this store into the volume first")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures")
    args = parser.parse_args()
    low, high = map(int, args.tokens.split(":"))
    try:
        compose("create", "--no-build", "server")
        if args.store:
            (container,) = compose("ps", "--all", "-q", "server").split()
            docker("cp", "-a", f"{args.store}/.", f"{container}:/store/")
        compose("up", "-d", "--no-build")
        wait(API + "/health")
        begin = time.time()
        cards = httpx.get(API + "/v1/models", trust_env=False).json()["data"]
        model, ceiling = cards[0]["id"], max(card.get("layers") or 0 for card in cards)
        rate, tpot, ttft = asyncio.run(capacity(API, model, args.batch, (low + high) // 2))
        time.sleep(35)  # the autoscaler's window forgets the measuring
        slo = {"tpot_ms": round(1000 * args.limit * tpot, 1), "ttft_ms": round(5000 * ttft)}
        shares = [tuple(map(float, part.split(":"))) for part in args.phases.split(",")]
        phases = [Phase(seconds, round(share * rate, 2)) for seconds, share in shares]
        run = asyncio.run(drive(API, phases, body_maker(model, slo, (low, high)), counts, args.seed, every=2))
        decisions = compose("exec", "-T", "autoscaler", "cat", "/decisions/decisions.jsonl")
        draw(PROMETHEUS, args.out / "dashboard.png", begin, time.time(), rate_interval="20s")
    finally:
        compose("down", "--remove-orphans", "--volumes")
    plot(run, phases, slo, args.out / "autoscale-compose.png")
    report(run, phases, slo, ceiling, decisions, f"{args.batch} at once, full size: {measured(rate, tpot, ttft)}")


if __name__ == "__main__":
    main()
