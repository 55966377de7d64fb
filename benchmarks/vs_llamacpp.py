"""Against llama.cpp's server on one GGUF file, over HTTP, in one run, interleaved; another version of ours beside it.

    python -m benchmarks.vs_llamacpp --gguf FILE [--repeats 5] [--baseline-path FOLDER] [--variant avx2]
    python -m benchmarks.vs_llamacpp --gguf FILE --context 4096 [--repeats 3]

The second form measures what a long context costs one request that decodes, with KV in 16 and in 8 bits on both sides.
Peer: `xllamacpp`, a wheel that holds llama.cpp and its server (installed into an environment of its own on first use).
Every engine is stopped while another is measured. Prompts are random tokens, answers greedy and without end.
No prompt is seen twice.

llama.cpp clears its whole KV cache at the start. Ours takes memory as it is used, and what a virtual machine has never
used can be slow to get (4 ms for 2 MiB where this was noticed). So our servers have a pool of 768 MiB, and have written
to all of it before anything is measured, as a server has after minutes.

The limit is what memory allows a single request: the bytes per second that torch's threads sum in the same rounds, over
the bytes of the file, which is read once per token.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.peers.environments import python_of, versions
from benchmarks.step_times import read_bandwidth

HERE, ROOT = Path(__file__).parent / "peers", Path(__file__).parents[1]
SLOTS, CONTEXT, NUM_NEW = 64, 1024, 64
POOL = 768 << 20  # bytes of KV of our servers: five times what 64 requests need here
# A connection for each request: llama.cpp's server closes kept ones at moments of its own.
LIMITS = httpx.Limits(max_connections=SLOTS, max_keepalive_connections=0)


class Engine:
    """A server in a process group of its own, stopped while it is not measured."""

    def __init__(self, name: str, command: list[str], cwd: Path, env: dict[str, str]) -> None:
        self.name, self.log = name, Path(tempfile.mkdtemp()) / "log"
        started = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=os.environ | env, stdout=log, stderr=log, start_new_session=True
            )
        self.url = self._address()
        self.client = httpx.Client(base_url=self.url, timeout=600, limits=LIMITS)
        while not self._is_healthy():
            time.sleep(0.01)
        self.ready_seconds = time.perf_counter() - started
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    def _address(self) -> str:
        for _ in range(30000):
            if match := re.search(r"listening on (http\S+)$", self.log.read_text(errors="replace"), re.MULTILINE):
                return match[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise RuntimeError(f"{self.name} did not start: {self.log.read_text(errors='replace')[-2000:]}")

    def _is_healthy(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def body(self, prompt: list[int], num_new: int, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model, "prompt": prompt, "max_tokens": num_new, "temperature": 0, "ignore_eos": True, **more
        }  # fmt: skip

    def one(self, prompt: list[int], num_new: int) -> tuple[float, float]:
        """Seconds to the first token, and tokens a second after it."""
        start, times = time.perf_counter(), []
        with self.client.stream("POST", "/v1/completions", json=self.body(prompt, num_new, stream=True)) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter() - start)
        return times[0], (num_new - 1) / (times[-1] - times[0]) if num_new > 1 else 0.0

    def many(self, prompts: list[list[int]], num_new: int) -> float:
        """Tokens a second of all requests together, prompts included in the time."""

        def ask(prompt: list[int]) -> None:
            answer = self.client.post("/v1/completions", json=self.body(prompt, num_new))
            answer.raise_for_status()
            assert answer.json()["usage"]["completion_tokens"] == num_new

        with ThreadPoolExecutor(len(prompts)) as threads:
            start = time.perf_counter()
            list(threads.map(ask, prompts))
            return len(prompts) * num_new / (time.perf_counter() - start)

    def fill(self, prompt: Callable[[], list[int]]) -> None:
        """Answer prompts until that takes no more memory."""
        before = 0.0
        while self.memory() > before + 1.0:
            before = self.memory()
            for _ in range(8):
                self.one(prompt(), 1)

    def memory(self) -> float:
        """Resident megabytes of the group."""
        parent = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]) / 1e6

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        for number in (signal.SIGCONT, signal.SIGTERM):
            self.send(number)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--baseline-path", type=Path, help="folder of another version of this project")
    parser.add_argument("--variant", help="of the native kernels of both versions")
    parser.add_argument("--options", default="", help="further flags of this version's server")
    parser.add_argument("--context", type=int, help="tokens before the decode steps; one request only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    serve = [
        sys.executable,
        "-m",
        "server",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--max-num-seqs",
        str(SLOTS),
        *([] if arguments.context else ["--kv-cache-memory", str(POOL)]),
    ]
    env = {"BOOMERANG_CPU_VARIANT": arguments.variant} if arguments.variant else {}
    count, length = (1, arguments.context + 256) if arguments.context else (SLOTS, CONTEXT)
    peer = [python_of("xllamacpp"), str(HERE / "server_llamacpp.py"), str(arguments.gguf), str(count), str(length)]
    peer, ours = [*peer, str(threads)], [*serve, *arguments.options.split()]
    env_of_ours = env | {"PYTHONPATH": str(ROOT)}
    commands: dict[str, tuple[list[str], Path, dict[str, str]]] = {
        "llama.cpp": (peer, ROOT, {}), "boomerang": (ours, ROOT, env_of_ours)
    }  # fmt: skip
    if arguments.context:
        commands["llama.cpp, q8_0 KV"] = ([*peer, "q8_0"], ROOT, {})
        commands["boomerang, int8 KV"] = ([*ours, "--kv-cache-dtype", "int8"], ROOT, env_of_ours)
    if arguments.baseline_path:
        folder = arguments.baseline_path
        commands["baseline"] = (serve, folder, env | {"PYTHONPATH": str(folder)})
    rng = random.Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [rng.choices(range(100, 40000), k=length) for _ in range(count)]

    jobs = {
        "decode, 1 request, tokens/s": lambda e: e.one(prompts(1, 20)[0], 128)[1],
        "16 requests, tokens/s": lambda e: e.many(prompts(16, 20), NUM_NEW),
        "64 requests, tokens/s": lambda e: e.many(prompts(64, 20), NUM_NEW),
        "first token of 512, ms": lambda e: 1e3 * e.one(prompts(1, 512)[0], 1)[0],
    }
    if arguments.context:
        long = arguments.context
        jobs = {
            "decode after 20 tokens, ms": lambda e: 1e3 / e.one(prompts(1, 20)[0], NUM_NEW)[1],
            f"decode after {long:,} tokens, ms": lambda e: 1e3 / e.one(prompts(1, long)[0], NUM_NEW)[1],
        }
    figures: dict[str, dict[str, list[float]]] = {job: {name: [] for name in commands} for job in jobs}
    ready: dict[str, list[float]] = {name: [] for name in commands}
    bandwidth: list[float] = []
    engines: dict[str, Engine] = {}
    try:
        for _ in range(3):  # the first one reads files
            for name, command in commands.items():
                if name in engines:
                    engines.pop(name).close()
                engines[name] = Engine(name, *command)
                ready[name].append(engines[name].ready_seconds)
                engines[name].send(signal.SIGSTOP)
        for engine in engines.values():
            engine.send(signal.SIGCONT)
            engine.fill(lambda: prompts(1, arguments.context or 512)[0])
            engine.send(signal.SIGSTOP)
        for round_ in range(arguments.repeats + 1):
            bandwidth.append(read_bandwidth())
            for job, run in jobs.items():
                for name, engine in engines.items():
                    engine.send(signal.SIGCONT)
                    figure = run(engine)
                    engine.send(signal.SIGSTOP)
                    if round_:
                        figures[job][name].append(figure)
        memory = {name: [engine.memory()] for name, engine in engines.items()}
    finally:
        for engine in engines.values():
            engine.close()
    rows = figures | {"resident memory, MB": memory, "ready, warm, s": {name: r[1:] for name, r in ready.items()}}
    medians = {what: {name: statistics.median(values) for name, values in row.items()} for what, row in rows.items()}
    if arguments.context:
        near, far = (medians[job] for job in jobs)
        medians["added by the context, ms"] = {name: far[name] - near[name] for name in commands}
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    print(f"{versions('xllamacpp')}; {model.partition(': ')[2] or platform.processor()}, {threads} threads\n")
    print(f"| | {' | '.join(commands)} |\n|---|{'---|' * len(commands)}")
    for what, row in medians.items():
        print(f"| {what} | {' | '.join(f'{value:.4g}' for value in row.values())} |")
    if not arguments.context:
        read = statistics.median(bandwidth)
        limit = read / arguments.gguf.stat().st_size
        share = medians["decode, 1 request, tokens/s"]["boomerang"] / limit
        print(f"\n{read / 1e9:.1f} GB/s would decode {limit:.0f} tokens/s: {share:.0%} of it")
    if arguments.json:
        arguments.json.write_text(json.dumps({"medians": medians, "all": rows, "cpu": model}, indent=1))


if __name__ == "__main__":
    main()
