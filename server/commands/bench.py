"""`boomerang bench latency`: decode and prefill speed of every size, through the engine without HTTP."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from model_store.weight_form import WeightForm
from server.commands.sizes import speed_file
from server.config import Settings
from server.core.request import Request, SamplingParams
from server.core.width import EXACT, precision_name
from server.engine.engine import Engine
from server.forms import load_weights, open_settings_pair, pick_device, weight_form
from server.loading import engine_config
from server.sizing.spec import SizeError, SizeSpec, describe_widths, size_name


class LatencyOptions(BaseModel):
    """Flags of `bench latency`."""

    sizes: str | None = Field(None, description="sizes to measure, as 16L,30L [all]")
    batch_sizes: str = Field("1,16", description="requests at once", pattern=r"^[1-9]\d*(,[1-9]\d*)*$")
    input_len: int = Field(128, description="prompt tokens", ge=1)
    output_len: int = Field(64, description="tokens decoded", ge=2)
    repeats: int = Field(3, description="the median of so many is reported", ge=1)
    json_: str | None = Field(None, description="write the result as JSON to this file (- for standard output)")
    no_save: bool = Field(False, description="do not keep the figures for `boomerang sizes`")


if TYPE_CHECKING:
    from model_store.pair import Pair


def measure(
    engine: Engine, prompts: list[list[int]], num_new: int, size: int, width: int = EXACT
) -> tuple[float, float]:
    """Seconds until every request has its first token, and of the decode steps after that. Greedy, nothing cached."""
    engine.kv_cache.reset_prefix_cache()
    sampling = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
    stamp = time.monotonic_ns()
    requests = [
        Request(f"bench-{stamp}-{i}", prompt, sampling, sizes=(size,), min_width=width, max_width=width)
        for i, prompt in enumerate(prompts)
    ]
    start = time.perf_counter()
    running = [engine.add_request(request) for request in requests]
    while any(not request.output_token_ids for request in running):
        engine.step()
    first = time.perf_counter()
    while engine.has_work:
        engine.step()
    return first - start, time.perf_counter() - first


def run_latency(arguments: LatencyOptions, settings: Settings) -> int:
    """Measure, print a table, keep the figures in the store for `boomerang sizes`. Returns the exit status."""
    pair = open_settings_pair(settings)
    form, device = weight_form(settings, pair), pick_device(settings)
    batches = sorted({int(part) for part in arguments.batch_sizes.split(",")})
    length = arguments.input_len + arguments.output_len
    if length > pair.spec.max_context:
        raise ValueError(f"--input-len, --output-len: {length} tokens; the pair has room for {pair.spec.max_context}")
    named = _sizes(arguments.sizes, pair)
    loaded = load_weights(settings, pair, form, device)
    config = dataclasses.replace(
        engine_config(settings, pair, form.dtype, device),
        max_num_seqs=max(batches),
        max_model_len=length,
        kv_cache_bytes=int(1.1 * (length + settings.page_size) * max(batches) * _token_bytes(pair, form)),
    )
    engine = Engine(loaded, config)
    sizes = _points(named, engine.executor.widths)
    rng = random.Random(settings.seed)
    vocab = range(min(100, pair.spec.vocab_size - 1), pair.spec.vocab_size)
    prompts = [rng.choices(vocab, k=arguments.input_len) for _ in range(max(batches))]
    measure(engine, prompts[:1], 4, *sizes[-1])  # first use pays for page faults
    results: dict[int | str, dict[str, dict[str, float]]] = {}
    for size, width in sizes:
        row: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
        for batch in batches:
            times = [
                measure(engine, prompts[:batch], arguments.output_len, size, width) for _ in range(arguments.repeats)
            ]
            prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
            row["prefill"][str(batch)] = batch * arguments.input_len / prefill
            row["decode"][str(batch)] = batch * (arguments.output_len - 1) / decode
        results[size if width == engine.executor.widths[-1] else size_name(size, width)] = row
    report = {
        "pair": pair.name,
        "executor": engine.executor.describe(),
        "low_rank": form.low_rank,
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "repeats": arguments.repeats,
        "sizes": results,
    }
    if not arguments.no_save:
        file = speed_file(settings.store, pair, form)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1))
    if arguments.json_ == "-":
        json.dump(report, sys.stdout, indent=1)
        print()
        return 0
    if arguments.json_:
        with open(arguments.json_, "w") as out:
            json.dump(report, out, indent=1)
    _print(report, batches)
    return 0


def _print(report: dict[str, Any], batches: list[int]) -> None:
    form = "; low-rank student as a difference" if report["low_rank"] else ""
    table = Table(title=f"{report['pair']}: {report['executor']}{form}; tokens/s, median of {report['repeats']}")
    table.add_column("size", justify="right")
    for phase in ("decode", "prefill"):
        for batch in batches:
            table.add_column(f"{phase}, {batch} request{'s' * (batch > 1)}", justify="right")
    for size, row in report["sizes"].items():
        figures = [f"{row[phase][str(batch)]:.1f}" for phase in ("decode", "prefill") for batch in batches]
        table.add_row(f"{size}L" if isinstance(size, int) else size, *figures)
    Console().print(table)


def _sizes(text: str | None, pair: Pair) -> list[tuple[int, int | None]]:
    """(size, width if one is named) of each name; all sizes if none is named. SizeError for what is not there."""
    known = pair.elasticity.sizes
    if not text:
        return [(size, None) for size in known]
    parameters = {size: pair.parameters(size) for size in known}
    return [(spec.resolve(known, parameters), spec.width) for spec in map(SizeSpec.parse, text.split(","))]


def _points(sizes: list[tuple[int, int | None]], widths: Sequence[int]) -> list[tuple[int, int]]:
    """The same with the width that is measured. SizeError for a width that was not loaded."""
    if missing := {width for _, width in sizes if width is not None} - set(widths):
        raise SizeError(f"--sizes: {precision_name(min(missing))}: this pair is loaded at {describe_widths(widths)}")
    return sorted({(size, widths[-1] if width is None else width) for size, width in sizes})


def _token_bytes(pair: Any, form: WeightForm) -> int:
    return pair.elasticity.sizes[-1] * pair.spec.kv_bytes_per_token_layer(form.dtype.itemsize, form.kv_cache_dtype)
