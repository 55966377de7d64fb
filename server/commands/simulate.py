"""`boomerang simulate`: play a trace against a cluster that does not exist, with the scheduler that serves."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from model_store.nested import bytes_in_memory
from server.core.config import EngineConfig
from server.core.request import Budget
from server.core.size_policy import LargestSize, SizePolicy
from server.core.width import EXACT
from server.cost.calibrate import load
from server.cost.devices import DEVICES, PAIRS, roofline_cost_model
from server.cost.model import CostModel
from server.cost.profile import CostProfile
from server.engine.queue import WaitingQueue
from server.options import parse_bytes
from server.simulation.report import plot, summarise
from server.simulation.simulator import Job, ReplicaSpec, Result, Simulator
from server.simulation.traces import read_trace, shape_trace
from server.sizing.policy import BudgetPolicy
from server.sizing.quality import quality_table
from server.sizing.spec import SizeError, SizeSpec, describe_widths, parse_precision

_DEFAULT_KV = 4 << 30  # with --calibration, as the server's own cap on a CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("trace")
    what.add_argument("--trace", required=True, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    what.add_argument("--requests", type=int, help="play only so many")
    what.add_argument("--rate", type=float, help="scale time to this many requests per second and replica")
    what.add_argument("--max-prompt", type=int, help="clip prompts to so many tokens [the context]")
    what.add_argument("--max-output", type=int, default=1024, help="clip answers to so many tokens")
    what.add_argument("--ttft-ms", type=float, help="limit of every request on time to first token")
    what.add_argument("--tpot-ms", type=float, help="limit of every request on time per output token")
    what.add_argument("--e2e-ms", type=float, help="limit of every request on total time")
    machine = parser.add_argument_group("cluster")
    machine.add_argument("--pair", choices=sorted(PAIRS), default="qwen3-4b", help="published pair")
    machine.add_argument("--device", choices=sorted(DEVICES), default="h200", help="priced by its data sheet")
    machine.add_argument("--calibration", metavar="FILE", help="a machine measured by the server, instead of both")
    machine.add_argument("--replicas", type=int, default=1)
    machine.add_argument("--autoscale", type=int, metavar="MAX", help="scale between --replicas and MAX by degradation")
    machine.add_argument("--startup", type=float, default=60.0, help="seconds until a new replica serves")
    machine.add_argument("--size", default="auto", help="auto, or every request at this size (24L, 24L-q6)")
    machine.add_argument("--precisions", nargs="*", default=[], metavar="q6",
                         help="served beside exact, from nested codes; with --calibration the file's")  # fmt: skip
    machine.add_argument("--noise", type=float, default=0.05, help="spread of a step's time (log standard deviation)")
    machine.add_argument("--delivery-ms", type=float, default=1.0, help="from a step's end to the client, one way")
    machine.add_argument("--max-num-seqs", type=int, help="[256; 64 with --calibration]")
    machine.add_argument("--max-num-batched-tokens", type=int, help="[8192; 1024 with --calibration]")
    machine.add_argument("--max-model-len", type=int, default=8192)
    machine.add_argument("--kv-cache-memory", type=parse_bytes, help="[what the device has left]")
    machine.add_argument(
        "--kv-cache-dtype", choices=("auto", "int8"), default="auto", help="with --device: KV in 8 bits"
    )
    machine.add_argument("--seed", type=int, default=0)
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="write summary and samples (- for standard output)")
    out.add_argument("--plot", metavar="FILE", help="load, sizes, limits met and replicas over time (SVG or PNG)")


def run(args: argparse.Namespace) -> int:
    """Simulate, print a summary, write what was asked for. ValueError for what does not fit together."""
    machine, config, num_pages = build_machine(args)
    profile = machine.profile
    spec = ReplicaSpec(
        config, machine, num_pages, policy_factory(args.size, machine),
        make_queue=WaitingQueue, noise=args.noise, delivery=args.delivery_ms / 1000,
    )  # fmt: skip
    jobs = read_jobs(args, config.max_model_len, pinned_sizes(args.size, profile), pinned_width(args.size, profile))
    begun = time.monotonic()
    result = simulate(spec, jobs, args)
    top = profile.elasticity.sizes[-1]
    kl = quality_table({}, {}, profile.elasticity.sizes, profile.widths)  # a trace names no pair: a guess
    summary = summarise(result.records, top, kl=kl) | {
        "replicas": args.replicas,
        "mean_replicas": round(sum(s.replicas for s in result.samples) / len(result.samples), 2),
        "steps": result.num_steps,
        "step_errors": result.step_errors,
        "simulated_in": round(time.monotonic() - begun, 2),
    }
    samples = [
        {"time": s.time, "replicas": s.replicas, "running": s.running, "waiting": s.waiting,
         "mean_size": None if s.mean_running_size != s.mean_running_size else round(s.mean_running_size, 3),
         "kv_usage": round(s.kv_usage, 4)}
        for s in result.samples
    ]  # fmt: skip
    if args.json != "-":
        print_summary(summary)
    if args.json:
        text = json.dumps({"arguments": _plain(args), "summary": summary, "samples": samples}, indent=1) + "\n"
        sys.stdout.write(text) if args.json == "-" else Path(args.json).write_text(text)
    if args.plot:
        span = max((job.arrival for job in jobs), default=1.0)
        plot(
            args.plot, result.records, top=top, floor=profile.elasticity.sizes[0], bin_seconds=max(span / 120, 1.0),
            replicas=[(sample.time, sample.replicas) for sample in result.samples], title=describe(args),
        )  # fmt: skip
    return 0


def build_machine(args: argparse.Namespace) -> tuple[CostModel, EngineConfig, int]:
    """(cost model, limits, KV pages) of one replica. ValueError if the calibration is unusable or nothing fits."""
    is_measured = args.calibration is not None
    config = EngineConfig(
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs or (64 if is_measured else 256),
        max_num_batched_tokens=args.max_num_batched_tokens or (1024 if is_measured else 8192),
        page_size=32,
    )
    if is_measured:
        if args.kv_cache_dtype != "auto":
            raise ValueError("--kv-cache-dtype: --calibration says itself in what KV was measured")
        machine = load(None, Path(args.calibration))
        if machine is None:
            raise ValueError(f"--calibration: {args.calibration} is no calibration that this version wrote")
        kv_bytes = args.kv_cache_memory or _DEFAULT_KV
    else:
        shape, device = PAIRS[args.pair], DEVICES[args.device]
        named = {width for width in map(parse_precision, args.precisions) if width is not None}
        widths = (*sorted(named - {EXACT}), EXACT)
        machine = roofline_cost_model(shape.profile(args.kv_cache_dtype, widths), device)
        weight_bytes = shape.weight_bytes
        if len(widths) > 1:
            weight_bytes += int(weight_bytes * bytes_in_memory() / 2)
        kv_bytes = args.kv_cache_memory or int(0.9 * device.memory) - weight_bytes
        if kv_bytes <= 0:
            raise ValueError(f"{args.pair} ({weight_bytes / 1e9:.1f} GB) does not fit on one {args.device}")
    num_pages = kv_bytes // (machine.profile.kv_bytes * config.page_size)
    return machine, config, num_pages


def policy_factory(size: str, machine: CostModel):
    """A fresh policy per replica: the cost model of each learns from its own steps."""

    def make() -> SizePolicy:
        if not SizeSpec.parse(size).is_auto:
            return LargestSize()
        return BudgetPolicy(machine.fresh())

    return make


def pinned_sizes(size: str, profile: CostProfile) -> tuple[int, ...] | None:
    """The one size that every request gets, or None for `auto`. SizeError if there is no such size."""
    spec = SizeSpec.parse(size)
    if spec.is_auto:
        return None
    weights = profile.layer_weights
    share = {s: float(weights[list(profile.elasticity.path(s).layers)].sum()) for s in profile.elasticity.sizes}
    return (spec.resolve(profile.elasticity.sizes, share),)


def pinned_width(size: str, profile: CostProfile) -> int | None:
    """What every request reads: the precision that is named, as loaded with a size that names none, None for `auto`."""
    spec, widths = SizeSpec.parse(size), profile.widths
    if spec.width not in (None, *widths):
        raise SizeError(f"--size {size}: this cluster serves {describe_widths(widths)} (--precisions)")
    return spec.width if spec.is_auto or spec.width is not None else widths[-1]


def read_jobs(
    args: argparse.Namespace, max_model_len: int, sizes: tuple[int, ...] | None, width: int | None = None
) -> list[Job]:
    seconds = [None if ms is None else ms / 1000 for ms in (args.ttft_ms, args.tpot_ms, args.e2e_ms)]
    max_output = min(args.max_output, max_model_len // 2)
    return shape_trace(
        read_trace(args.trace, limit=args.requests),
        max_prompt=min(args.max_prompt or max_model_len, max_model_len - max_output),
        max_output=max_output,
        budget=Budget(ttft=seconds[0], tpot=seconds[1], e2e=seconds[2]),
        rate=None if args.rate is None else args.rate * args.replicas,
        sizes=sizes,
        width=width,
    )


def simulate(spec: ReplicaSpec, jobs: list[Job], args: argparse.Namespace) -> Result:
    from tqdm import tqdm

    autoscaler = None
    if args.autoscale:
        from deploy.autoscaler.decision import ScalingPolicy
        from deploy.autoscaler.simulated import SimulatedAutoscaler

        bounds = ScalingPolicy(min_replicas=args.replicas, max_replicas=max(args.autoscale, args.replicas))
        autoscaler = SimulatedAutoscaler(bounds, spec.machine.profile.elasticity.sizes[-1])
    with tqdm(total=len(jobs), desc="requests", file=sys.stderr, disable=None) as bar:
        return Simulator(
            spec,
            args.replicas,
            autoscaler=autoscaler,
            startup=args.startup,
            sample_interval=max(jobs[-1].arrival / 600, 0.5),
            seed=args.seed,
            progress=lambda done, total: bar.update(done - bar.n),
        ).run(jobs, len(jobs))


def print_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for name, value in summary.items():
        if name == "step_errors":
            name = "step error, median / p95"
            shares = {kind: (100 * row["median"], 100 * row["p95"]) for kind, row in value.items()}
            value = ", ".join(f"{kind} {median:.1f} / {p95:.1f} %" for kind, (median, p95) in shares.items())
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif name in ("attainment", "full_size"):
            value = f"{100 * value:.1f} %"
        table.add_row(name.replace("_", " "), str(value))
    Console(soft_wrap=True).print(table)


def describe(args: argparse.Namespace) -> str:
    where = Path(args.calibration).stem if args.calibration else f"{args.pair} on {args.device}"
    return f"{where}, {args.replicas} replicas, size {args.size}, {Path(args.trace).name}"


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key != "run" and not callable(value)}
