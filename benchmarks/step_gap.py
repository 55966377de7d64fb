"""The time between two model calls under HTTP load, by cause, as a share of a step.

    python -m benchmarks.step_gap [--streams 16 64] [--seconds 10] [--size 30L] [--json FILE] [-- SERVE FLAGS...]

Starts a server, keeps that many streaming completions open (raw HTTP from another process, which costs little), and
reads the server's own counters before and after. `wait` is the part of the gap in which the engine thread did not run;
`clients` is the share of one core that the load itself took, which on a small machine slows the server too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path

from benchmarks.local_server import LocalServer

_SAMPLE = re.compile(r"^(boomerang:[a-z_]+)(?:\{([^}]*)\})? ([0-9.e+-]+)$", re.MULTILINE)


def counters(url: str) -> dict[str, float]:
    """Gap seconds by part, model seconds, steps."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    values: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        part = re.search(r'part="(\w+)"', labels)
        values[name + (f":{part[1]}" if part else "")] = float(value)
    return values


async def stream_forever(port: int, body: dict, until: float) -> None:
    """Streaming completions one after the other on connections of their own; the bytes are read, not parsed."""
    payload = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}"
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + payload)
        while time.monotonic() < until:
            if not await reader.read(1 << 16):
                break
        writer.close()


def load(port: int, streams: int, size: str, seconds: float, cpu) -> None:
    """Runs in a process of its own."""

    async def run() -> None:
        until = time.monotonic() + seconds
        body = {"model": "x", "prompt": "Once upon a time", "max_tokens": 400, "stream": True, "ignore_eos": True,
                "size": size, "temperature": 0.8}  # fmt: skip
        await asyncio.gather(*(stream_forever(port, body | {"seed": i}, until) for i in range(streams)))

    started = time.process_time()
    asyncio.run(run())
    cpu.value = (time.process_time() - started) / seconds


def measure(url: str, streams: int, size: str, seconds: float) -> dict[str, float]:
    port = urllib.parse.urlsplit(url).port
    cpu = multiprocessing.Value("d", 0.0)
    client = multiprocessing.Process(target=load, args=(port, streams, size, seconds + 4, cpu))
    client.start()
    time.sleep(3)  # prompts are through
    before = counters(url)
    time.sleep(seconds)
    after = counters(url)
    client.join()
    delta = {name: after[name] - before.get(name, 0.0) for name in after}
    steps = delta["boomerang:engine_steps_total"]
    model, gap = delta["boomerang:step_model_seconds_sum"], delta["boomerang:step_gap_seconds_total"]
    prefix = "boomerang:step_gap_part_seconds_total:"
    parts = {name.removeprefix(prefix): value / gap for name, value in delta.items() if name.startswith(prefix)}
    return {"streams": streams, "model_ms": 1e3 * model / steps, "gap_ms": 1e3 * gap / steps, "gap_share": gap / model,
            "clients": cpu.value, **parts}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--size", default="30L")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("flags", nargs="*", help="flags of `serve`, after --")
    args = parser.parse_args()
    with LocalServer(["--served-model-name", "x", "--no-access-log", *args.flags]) as server:
        rows = [measure(server.url, streams, args.size, args.seconds) for streams in args.streams]
    names = list(rows[0])
    print("  ".join(f"{name:>9}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]:>9.3f}" for name in names))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
