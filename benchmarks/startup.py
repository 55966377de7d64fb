"""From process start to the first answer: starts the server several times and shows where the time goes.

    python -m benchmarks.startup [--cold] [--repeats 5] [--json FILE] [-- SERVE FLAGS...]

The first start is left out: it may fetch the model, build the kernels and calibrate the cost model. With `--cold` all
starts calibrate, and build the kernels unless they were installed with the package; the model is there. `ready` is the
time until `/health` answers 200, seen from outside; the phases are the server's own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from model_store.store import store_root

TIMEOUT = 600.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def empty_caches() -> Iterator[dict[str, str]]:
    """Environment of a server that finds its models and nothing else that an earlier start has left."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        store.mkdir()
        (store / "models").symlink_to(store_root() / "models")
        yield {"BOOMERANG_STORE": str(store), "XDG_CACHE_HOME": folder}


def start_once(flags: list[str], env: dict[str, str] | None = None) -> dict[str, float]:
    """Seconds by phase, and `ready`; `env` is added to the environment."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--log-format", "json", *flags], stderr=log, env={**os.environ, **(env or {})}
        )
        try:
            while not is_ready(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.perf_counter() - started > TIMEOUT:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read()}")
                time.sleep(0.005)
            ready = time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        log.seek(0)
        entries = [json.loads(line) for line in log if line.startswith("{")]
    phases = next(entry["startup"] for entry in entries if "startup" in entry)
    return phases | {"ready": ready}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold", action="store_true", help="without what an earlier start has left")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("flags", nargs="*", help="flags of `serve`, after --")
    args = parser.parse_args()
    start_once(args.flags)
    runs = []
    for _ in range(args.repeats):
        with empty_caches() if args.cold else contextlib.nullcontext() as env:
            runs.append(start_once(args.flags, env))
    print(f"{'phase':<28} median s    min s")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:<28} {statistics.median(values):8.2f} {min(values):8.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
