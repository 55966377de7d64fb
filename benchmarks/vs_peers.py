"""Against vLLM (CPU) and llama.cpp: same weights, same machine, one run, interleaved. Peers are installed on first use.

    python -m benchmarks.vs_peers [--repeats 3] [--only decode,prefill,ratio,sizes,int8,codes] [--json FILE]
        [--plot FILE]

Every engine is a process of its own that is stopped while another is measured. A job is timed inside the worker: `T(n)`
seconds for n greedy tokens of every prompt; prefill is T(1), decode is T(n) - T(1) over n - 1 tokens. The limit of the
machine is measured in the same rounds, by a worker that only reads bytes and multiplies matrices.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import folder, python_of, versions
from benchmarks.peers.models import checkpoint, gguf
from benchmarks.peers.process import Worker

HERE = Path(__file__).parent / "peers"
PARTS = ("decode", "prefill", "ratio", "int8", "codes", "sizes")
NUM_NEW = 64
MIXED = (16, 20, 25, 30)


class Run:
    """Workers by name, started on demand and all stopped but the one that works."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[dict[str, Any]] = []
        self.workers: dict[str, Worker] = {}
        self.logs = folder() / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def start(self, *names: str) -> None:
        """Those that do not run yet, side by side: loading takes some of them a minute."""
        new = {}
        for name in names:
            if name not in self.workers:
                kind, _, variant = name.partition(":")
                command, env = _command(kind, variant)
                print(f"starting {name}", file=sys.stderr)
                log = self.logs / f"{name.replace(':', '-')}.log"
                new[name] = self.workers[name] = Worker(name, command, log, env)
        for worker in new.values():
            worker.wait_ready()
        for worker in new.values():
            worker.run([[1, 2, 3]], 2)
            worker.pause()

    def interleaved(self, jobs: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
        """Seconds per worker: one warm-up round, then `repeats` rounds in which every worker runs its job once."""
        self.start(*jobs)
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        for round_ in range(self.repeats + 1):
            for name, job in jobs.items():
                worker = self.workers[name]
                worker.resume()
                taken = worker.run(**job)
                worker.pause()
                if round_:
                    seconds[name].append(taken)
        return seconds

    def close(self, *names: str) -> None:
        for name in names or list(self.workers):
            if name in self.workers:
                self.workers.pop(name).close()

    def add(self, what: str, figures: dict[str, float], unit: str, **more: Any) -> None:
        self.rows.append({"what": what, "unit": unit, "figures": figures, **more})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{what}: {shown} ({unit})", flush=True)


def _command(kind: str, variant: str) -> tuple[list[str], dict[str, str]]:
    if kind == "boomerang":
        options = [] if variant == "codes" else ["--quantization", variant or "none"]
        return [sys.executable, "-m", "benchmarks.peers.worker_boomerang", *options], {}
    if kind == "vllm":
        size, _, core = variant.partition("@")
        size = int(size or MIXED[-1])
        cores = [core] if core else [str(core) for core in sorted(os.sched_getaffinity(0))]
        env = {
            "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(cores),
            "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": str(len(cores)),
        }  # fmt: skip
        return [python_of("vllm"), str(HERE / "worker_vllm.py"), str(checkpoint(size))], env
    if kind == "limit":
        return [sys.executable, "-m", "benchmarks.peers.worker_limit", str(_weight_bytes(variant == "compressed"))], {}
    model = gguf(MIXED[-1], quantised=variant == "q8_0")
    return [python_of("llamacpp"), str(HERE / "worker_llamacpp.py"), str(model)], {}


def _prompts(num: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(100, 40000), k=length) for _ in range(num)]


def _decode(run: Run, names: list[str], num: int, prompt: int = 64, **extra: Any) -> dict[str, float]:
    """Decode tokens per second of all requests together."""
    prompts = _prompts(num, prompt)
    long = run.interleaved({name: {"prompts": prompts, "num_new": NUM_NEW, **extra} for name in names})
    short = run.interleaved({name: {"prompts": prompts, "num_new": 1, **extra} for name in names})
    med = statistics.median
    return {name: num * (NUM_NEW - 1) / (med(long[name]) - med(short[name])) for name in names}


def measure_decode(run: Run) -> None:
    for num in (1, 16, 64):
        names = ["boomerang", "vllm"] + (["llamacpp", "limit", "limit:compressed"] if num == 1 else [])
        run.add(f"decode, {num} request{'s' * (num > 1)}", _decode(run, names, num), "tokens/s")


def measure_prefill(run: Run) -> None:
    for num in (1, 8):
        names = ["boomerang", "vllm"] + (["llamacpp"] if num == 1 else []) + ["limit"]
        prompts = _prompts(num, 512)
        seconds = run.interleaved({name: {"prompts": prompts, "num_new": 1} for name in names})
        figures = {name: num * 512 / statistics.median(taken) for name, taken in seconds.items()}
        run.add(f"prefill, {num} x 512", figures, "tokens/s")


def measure_ratio(run: Run) -> None:
    from model_store.pair import open_pair

    pair = open_pair()
    small, large = pair.elasticity.sizes[0], pair.elasticity.sizes[-1]
    speeds = {f"{size}L": _decode(run, ["boomerang"], 1, sizes=[size])["boomerang"] for size in (small, large)}
    weights = {row["size"]: row["weight_bytes"] for row in pair.size_table()}
    run.add(
        "decode, 1 request, smallest against full size",
        {**speeds, "ratio": speeds[f"{small}L"] / speeds[f"{large}L"], "bytes ratio": weights[large] / weights[small]},
        "tokens/s",
    )


def measure_int8(run: Run) -> None:
    run.add("int8 weights, decode, 1 request", _decode(run, ["boomerang:int8", "llamacpp:q8_0"], 1), "tokens/s")
    run.close("boomerang:int8", "llamacpp:q8_0")


def measure_codes(run: Run) -> None:
    """The default pair in its file's four bits, against bfloat16 there: vLLM's CPU build reads no GGUF file."""
    for num in (16, 64):
        run.add(f"a file's codes, decode, {num} requests", _decode(run, ["boomerang:codes", "vllm"], num), "tokens/s")
    run.close("boomerang:codes")


def measure_sizes(run: Run) -> None:
    """16 requests of 4 sizes: one server of ours against four of vLLM's, one for each size, on the same cores.

    Theirs have a thread each and share the cores evenly: with a thread on every core they wait for each other.
    """
    run.close(*(name for name in run.workers if name != "boomerang"))
    prompts = _prompts(16, 64)
    sizes = [size for size in MIXED for _ in range(4)]
    cores = sorted(os.sched_getaffinity(0))
    apart = {f"vllm:{size}@{cores[i % len(cores)]}": prompts[4 * i : 4 * i + 4] for i, size in enumerate(MIXED)}
    run.start("boomerang", *apart)
    ours, theirs = [], []
    for round_ in range(run.repeats + 1):
        one = run.workers["boomerang"]
        one.resume()
        mine = one.run(prompts, NUM_NEW, sizes=sizes)
        one.pause()
        for name in apart:
            run.workers[name].resume()
        for name, own in apart.items():
            run.workers[name].send({"prompts": own, "num_new": NUM_NEW})
        taken = max(run.workers[name].receive() for name in apart)
        for name in apart:
            run.workers[name].pause()
        if round_:
            ours.append(mine)
            theirs.append(taken)
    tokens = 16 * NUM_NEW
    speeds = {"boomerang": tokens / statistics.median(ours), "4 x vllm": tokens / statistics.median(theirs)}
    run.add("16 requests of 4 sizes, prompt and answer", speeds, "tokens/s")
    memory = {"boomerang": run.workers["boomerang"].memory(), "4 x vllm": sum(run.workers[n].memory() for n in apart)}
    run.add("the same, memory (each engine reserves 1 GiB for KV)", {k: v / 1e9 for k, v in memory.items()}, "GB")


def _weight_bytes(compressed: bool) -> int:
    from model_store.pair import open_pair
    from model_store.weight_form import Storage, WeightForm
    from server.kernels.cpu.packing import twelve_bit_bytes

    rows = (
        open_pair().size_table(WeightForm(storage=Storage.TWELVE_BITS), twelve_bit_bytes) if compressed
        else open_pair().size_table()
    )  # fmt: skip
    return max(row["weight_bytes"] for row in rows)


def _machine() -> dict[str, str]:
    from server.cost.calibrate import processor_name

    return {
        "processor": processor_name(), "date": datetime.date.today().isoformat(), "python": platform.python_version(),
        "vllm": versions("vllm"), "llamacpp": versions("llamacpp"),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """Markdown: each figure, and ours over each peer's."""
    lines = ["| what | boomerang | vLLM | llama.cpp | limit | ratios |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        figures, cells = row["figures"], []
        ours = next((v for k, v in figures.items() if k.startswith("boomerang")), None)
        groups = (("boomerang",), ("vllm", "4 x vllm"), ("llamacpp",), ("limit",))
        for group in groups:
            found = [v for k, v in figures.items() if k.startswith(group)]
            cells.append(f"{found[0]:.4g}" if found else "")
        if ours is None:
            ratios = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        else:
            ratios = ", ".join(f"{ours / v:.2f} x {k}" for k, v in figures.items() if not k.startswith("boomerang"))
        lines.append(f"| {row['what']} ({row['unit']}) | {' | '.join(cells)} | {ratios} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], file: str) -> None:
    """Bars of speed, ours as 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if row["unit"] == "tokens/s" and any(k != "limit" for k in row["figures"])]
    rows = [row for row in rows if any(k.startswith("boomerang") for k in row["figures"])]
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(rows) + 1.4))
    colours = {"boomerang": "#2563eb", "llamacpp": "#10b981", "limit": "#9ca3af"}
    ticks = []
    for position, row in enumerate(reversed(rows)):
        figures = row["figures"]
        base = next(value for name, value in figures.items() if name.startswith("boomerang"))
        height = 0.8 / len(figures)
        for i, (name, value) in enumerate(figures.items()):
            at = position + 0.4 - height * (i + 0.5)
            axes.barh(at, value / base, height, color=colours.get(name.split(":")[0], "#f59e0b"))
            axes.text(value / base + 0.01, at, f"{name} {value:.0f}", va="center", fontsize=7)
        ticks.append(row["what"])
    axes.set_yticks(range(len(ticks)), ticks, fontsize=8)
    axes.set_xlabel("tokens/s, boomerang = 1")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--plot", help="draw them into this file")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    run = Run(args.repeats)
    try:
        for part in (name for name in PARTS if name in parts):
            globals()[f"measure_{part}"](run)
        hello = {name: worker.hello for name, worker in run.workers.items()}
    finally:
        run.close()
    report = {"machine": _machine(), "workers": hello, "rows": run.rows}
    print(f"\n{table(report)}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
