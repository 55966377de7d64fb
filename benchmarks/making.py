"""What the making of a student costs those who are served meanwhile: time between tokens with it on and off.

    python -m benchmarks.making --repeats 4 --seconds 20

Two servers of the default teacher, one alone and one with `--student make`, get the same requests in turns: arrivals
of a Poisson process, so often that requests run half of the time. The other server and its maker are stopped (SIGSTOP)
meanwhile. Prints quantiles of the time between tokens and to the first one, as clients see them, and the share of
both cores that making got.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil

from benchmarks.local_server import LocalServer
from model_store.sources import default_teacher

_PROMPT = "The harbour was quiet when the first boats came in, and nobody had expected the bridge to hold that long."
_TOKENS = 64


async def ask(client: httpx.AsyncClient, url: str, number: int) -> tuple[float, list[float]]:
    """Seconds to the first token and between the others of one answer."""
    body = {"prompt": f"{number}. {_PROMPT}", "max_tokens": _TOKENS, "ignore_eos": True, "stream": True, "size": "30L"}
    started, times = time.perf_counter(), []
    async with client.stream("POST", url + "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                times.append(time.perf_counter())
    return times[0] - started, np.diff(times).tolist()


async def load(url: str, rate: float, seconds: float, seed: int) -> tuple[list[float], list[float]]:
    """First tokens and gaps of all requests that arrive in `seconds`, `rate` a second."""
    draw, found = random.Random(seed), []
    async with httpx.AsyncClient(timeout=120) as client, asyncio.TaskGroup() as group:
        ends = time.perf_counter() + seconds
        while time.perf_counter() < ends:
            found.append(group.create_task(ask(client, url, seed * 10_000 + len(found))))
            await asyncio.sleep(draw.expovariate(rate))
    answers = [task.result() for task in found]
    return [first for first, _ in answers], [gap for _, gaps in answers for gap in gaps]


@contextmanager
def only(server: LocalServer, other: LocalServer):
    """The other one and its maker stand still meanwhile."""
    stopped = [psutil.Process(other.process.pid), *psutil.Process(other.process.pid).children(recursive=True)]
    for process in stopped:
        process.suspend()
    try:
        yield server
    finally:
        for process in stopped:
            process.resume()


def maker_seconds(server: LocalServer) -> float:
    """Processor time of what makes the student."""
    times = [child.cpu_times() for child in psutil.Process(server.process.pid).children(recursive=True)]
    return sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20, help="of load in each turn")
    parser.add_argument("--warm-up", type=float, default=30, help="seconds that making has before the first turn")
    arguments = parser.parse_args()
    teacher = str(default_teacher())
    with ExitStack() as stack:
        stores = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2)]
        common = ["--teacher", teacher, "--precision-dial", "off"]
        alone, making = (
            stack.enter_context(LocalServer([*common, "--student", student, "--store", store]))
            for student, store in zip(("none", "make"), stores, strict=True)
        )
        with only(alone, making):
            asyncio.run(load(alone.url, 2, 3, 999))
            _, gaps = asyncio.run(load(alone.url, 1, 4, 998))
        seconds = _TOKENS * float(np.median(gaps))
        rate = math.log(2) / seconds  # of requests that last `seconds` each, none is there half of the time
        with only(making, alone):
            time.sleep(arguments.warm_up)
        firsts: dict[str, list[float]] = {"off": [], "on": []}
        between: dict[str, list[float]] = {"off": [], "on": []}
        spent = 0.0
        for repeat in range(arguments.repeats):
            for name, server, other in (("off", alone, making), ("on", making, alone)):
                with only(server, other):
                    before = maker_seconds(making)
                    first, gaps = asyncio.run(load(server.url, rate, arguments.seconds, repeat))
                    spent += maker_seconds(making) - before if name == "on" else 0.0
                firsts[name] += first
                between[name] += gaps
        progress = next(Path(stores[1]).glob("students/*/progress.json"), None)
    print(f"{rate:.2f} requests/s of {_TOKENS} tokens; {len(between['on'])} times between tokens each way")
    print("\n| ms | making off | making on | on / off |\n|---|---|---|---|")
    for what, values in (("between tokens", between), ("to the first token", firsts)):
        for quantile in (0.5, 0.9, 0.99):
            off, on = (1e3 * float(np.quantile(values[name], quantile)) for name in ("off", "on"))
            print(f"| {what}, p{100 * quantile:g} | {off:.2f} | {on:.2f} | {on / off:.3f} |")
    share = spent / (arguments.repeats * arguments.seconds * (psutil.cpu_count() or 1))
    print(f"\nmaking got {share:.0%} of the cores under that load" + ("" if progress else "; it had not begun"))


if __name__ == "__main__":
    main()
