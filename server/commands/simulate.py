"""`boomerang simulate`: play a trace against a cluster that does not exist, with the scheduler that serves."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from model_store.nested import bytes_in_memory
from server.config import Bytes
from server.core.config import EngineConfig
from server.core.request import Budget
from server.core.size_policy import LargestSize, SizePolicy
from server.core.width import EXACT
from server.cost.calibrate import load
from server.cost.devices import DEVICES, PAIRS, roofline_cost_model
from server.cost.model import CostModel
from server.cost.profile import CostProfile
from server.engine.queue import WaitingQueue
from server.simulation.report import plot, summarise
from server.simulation.simulator import Job, ReplicaSpec, Result, Simulator
from server.simulation.traces import read_trace, shape_trace
from server.sizing.policy import BudgetPolicy
from server.sizing.quality import quality_table
from server.sizing.spec import SizeError, SizeSpec, describe_widths, parse_precision

_DEFAULT_KV = 4 << 30  # with --calibration, as the server's own cap on a CPU


def _of(group: str, default: Any, help: str, **more: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"group": group}, **more)


class SimulateOptions(BaseModel):
    """Flags of `simulate`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    trace: Path = _of("Trace", ..., "CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    requests: int | None = _of("Trace", None, "play only so many", ge=1)
    rate: float | None = _of("Trace", None, "scale time to this many requests per second and replica", gt=0)
    max_prompt: int | None = _of("Trace", None, "clip prompts to so many tokens [the context]", ge=1)
    max_output: int = _of("Trace", 1024, "clip answers to so many tokens", ge=1)
    ttft_ms: float | None = _of("Trace", None, "limit of every request on time to first token", gt=0)
    tpot_ms: float | None = _of("Trace", None, "limit of every request on time per output token", gt=0)
    e2e_ms: float | None = _of("Trace", None, "limit of every request on total time", gt=0)
    pair: Literal[tuple(sorted(PAIRS))] = _of("Cluster", "qwen3-4b", "published pair")  # type: ignore[valid-type]
    device: Literal[tuple(sorted(DEVICES))] = _of(  # type: ignore[valid-type]
        "Cluster", "h200", "priced by its data sheet"
    )
    calibration: Path | None = _of("Cluster", None, "a machine measured by the server, instead of both")
    replicas: int = _of("Cluster", 1, "at the start", ge=1)
    autoscale: int | None = _of("Cluster", None, "scale between --replicas and so many by degradation", ge=1)
    startup: float = _of("Cluster", 60.0, "seconds until a new replica serves", ge=0)
    size: str = _of("Cluster", "auto", "auto, or every request at this size (24L, 24L-q6)")
    precisions: tuple[str, ...] = _of(
        "Cluster", (), "served beside exact, from nested codes (q6 q4); with --calibration the file's"
    )
    noise: float = _of("Cluster", 0.05, "spread of a step's time (log standard deviation)", ge=0)
    delivery_ms: float = _of("Cluster", 1.0, "from a step's end to the client, one way", ge=0)
    max_num_seqs: int | None = _of("Cluster", None, "sequences at once [256; 64 with --calibration]", ge=1)
    max_num_batched_tokens: int | None = _of("Cluster", None, "of a step [8192; 1024 with --calibration]", ge=1)
    max_model_len: int = _of("Cluster", 8192, "longest prompt plus output, in tokens", ge=2)
    kv_cache_memory: Bytes | None = _of("Cluster", None, "bytes of KV cache [what the device has left]", ge=1)
    kv_cache_dtype: Literal["auto", "int8"] = _of("Cluster", "auto", "with --device: KV in 8 bits")
    seed: int = _of("Cluster", 0, "of noise")
    json_: str | None = _of("Output", None, "write summary and samples to this file (- for standard output)")
    plot: Path | None = _of("Output", None, "draw load, sizes, limits met and replicas over time (SVG or PNG)")

    @field_validator("trace", "calibration")
    @classmethod
    def _is_there(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError(f"there is no file {path}")
        return path


def run(args: SimulateOptions) -> int:
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
    if args.json_ != "-":
        print_summary(summary)
    if args.json_:
        text = (
            json.dumps({"arguments": args.model_dump(mode="json"), "summary": summary, "samples": samples}, indent=1)
            + "\n"
        )
        sys.stdout.write(text) if args.json_ == "-" else Path(args.json_).write_text(text)
    if args.plot:
        span = max((job.arrival for job in jobs), default=1.0)
        plot(
            args.plot, result.records, top=top, floor=profile.elasticity.sizes[0], bin_seconds=max(span / 120, 1.0),
            replicas=[(sample.time, sample.replicas) for sample in result.samples], title=describe(args),
        )  # fmt: skip
    return 0


def build_machine(args: SimulateOptions) -> tuple[CostModel, EngineConfig, int]:
    """(cost model, limits, KV pages) of one replica. ValueError if the calibration is unusable or nothing fits."""
    is_measured = args.calibration is not None
    config = EngineConfig(
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs or (64 if is_measured else 256),
        max_num_batched_tokens=args.max_num_batched_tokens or (1024 if is_measured else 8192),
        page_size=32,
    )
    if args.calibration is not None:
        if args.kv_cache_dtype != "auto":
            raise ValueError("--kv-cache-dtype: --calibration says itself in what KV was measured")
        machine = load(None, args.calibration)
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
    args: SimulateOptions, max_model_len: int, sizes: tuple[int, ...] | None, width: int | None = None
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


def simulate(spec: ReplicaSpec, jobs: list[Job], args: SimulateOptions) -> Result:
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


def describe(args: SimulateOptions) -> str:
    where = args.calibration.stem if args.calibration else f"{args.pair} on {args.device}"
    return f"{where}, {args.replicas} replicas, size {args.size}, {args.trace.name}"
