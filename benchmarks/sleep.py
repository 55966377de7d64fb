"""What sleep to the student gives back, and what it costs: memory before, asleep and after; the first answers.

    python -m benchmarks.sleep [--repeats 3] [-- SERVE FLAGS...]

Memory is the process's resident set, seen from outside. Asleep, a request of `auto` gets the student, and one for the
largest size wakes it; `to wake` is the server's own figure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import httpx

from benchmarks.local_server import LocalServer

MiB = 1 << 20


def first_token(client: httpx.Client, **body: object) -> float:
    """Milliseconds to a one-token answer."""
    started = time.perf_counter()
    asked = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, **body}
    client.post("/v1/completions", json=asked).raise_for_status()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("server", nargs="*", help="flags of the server, after --")
    args = parser.parse_args()
    rows: dict[str, list[float]] = defaultdict(list)
    with (
        LocalServer(["--enable-sleep-mode", *args.server]) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):
        for _ in range(args.repeats):
            for size in ("student", "teacher"):
                first_token(client, size=size)
            rows["awake, first token of the largest, ms"].append(first_token(client, size="teacher"))
            rows["resident awake, MiB"].append(server.memory() / MiB)
            started = time.perf_counter()
            slept = client.post("/sleep").raise_for_status().json()
            rows["to fall asleep, ms"].append((time.perf_counter() - started) * 1e3)
            rows["given back, MiB"].append(slept["bytes_released"] / MiB)
            rows["resident asleep, MiB"].append(server.memory() / MiB)
            rows["asleep, first token of the student, ms"].append(first_token(client))
            rows["asleep, first token of the largest, ms"].append(first_token(client, size="teacher"))
            woken = client.get("/is_sleeping").json()
            rows["to wake, ms"].append(woken["seconds_to_wake"] * 1e3)
            rows["resident after, MiB"].append(server.memory() / MiB)
    print("| what | median |\n|---|---|")
    for what, values in rows.items():
        print(f"| {what} | {statistics.median(values):.4g} |")


if __name__ == "__main__":
    main()
