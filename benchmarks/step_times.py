"""What a step of the native CPU executor costs, part by part, against what memory and matrix products allow.

    python -m benchmarks.step_times [--repeats 5] [--size 30L] [--variant amx]

Steps are real ones through the engine, without scheduling and HTTP. `limit` is the larger of the bytes of weights and
KV over the read bandwidth and the operations of the products over the rate of a large bfloat16 product in torch, both
measured in the same run. `restless` is the 95th percentile of how far one and the same step is from its own median
(relative to what it took): what a prediction misses by that knows the step but not the moment.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from server.config import Settings
from server.cost.calibrate import batches
from server.engine.engine import Engine
from server.forms import open_settings_pair, weight_form
from server.loading import engine_config

SHAPES = {  # name: (requests, tokens each, context before)
    "decode 1": (1, 1, 128), "decode 1, context 1024": (1, 1, 1024), "decode 4": (4, 1, 128),
    "decode 16": (16, 1, 128), "decode 16, context 1024": (16, 1, 1024), "decode 64": (64, 1, 128),
    "prefill 512": (1, 512, 0), "prefill 512 x 8": (8, 512, 0),
}  # fmt: skip


def read_bandwidth(num_bytes: int = 256 << 20) -> float:
    """Bytes per second that torch's threads sum from memory, the best of several passes."""
    data = torch.ones(num_bytes // 4)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def product_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """Operations per second of a square matrix product in torch."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, help="layers; default the largest")
    parser.add_argument("--variant", help="force a variant of the kernels")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization")
    parser.add_argument("--low-rank", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--weight-compression", default="auto", choices=("auto", "off"))
    parser.add_argument("--only", help="names of steps, separated by semicolons")
    arguments = parser.parse_args()
    if arguments.variant:
        os.environ["BOOMERANG_CPU_VARIANT"] = arguments.variant
    settings = Settings(
        executor="native",
        dtype=arguments.dtype,
        weight_compression=arguments.weight_compression,
        quantization=arguments.quantization,
        low_rank=arguments.low_rank,
    )
    pair, dtype = open_settings_pair(settings), getattr(torch, arguments.dtype)
    loaded = pair.load(weight_form(settings, pair))
    config = dataclasses.replace(
        engine_config(settings, pair, dtype, "cpu"),
        max_num_seqs=64, max_model_len=2048, max_num_batched_tokens=4096, kv_cache_bytes=1 << 30,
    )  # fmt: skip
    start = time.perf_counter()
    engine = Engine(loaded, config)
    packed_in = time.perf_counter() - start
    executor, size = engine.executor, arguments.size or engine.sizes[-1]
    bandwidth, rate = read_bandwidth(), product_rate(dtype)
    print(f"{executor.describe()}; engine ready in {packed_in:.2f} s")
    print(f"limits: {bandwidth / 1e9:.1f} GB/s, {rate / 1e12:.2f} TFLOP/s")
    spec, path = loaded.spec, pair.elasticity.path(size)
    own = [loaded.low_rank.get(layer) or loaded.layers[layer] for layer in path.layers]
    bases = [loaded.layers[loaded.low_rank[layer].base] for layer in path.layers if layer in loaded.low_rank]
    weight_bytes = sum(
        tensor.nbytes for layer in {id(part): part for part in [*own, *bases]}.values() for tensor in layer.tensors()
    )
    head_bytes = loaded.ends["teacher"].head.nbytes
    weight_item = executor.bytes_per_weight
    parameters = weight_bytes / weight_item
    table = Table(title=f"{size} layers, milliseconds, median of {arguments.repeats}")
    for column in ("step", "all", "tok/s", "limit", "of limit", "restless", *executor.times()):
        table.add_column(column, justify="right" if column != "step" else "left")
    names = [name.strip() for name in arguments.only.split(";")] if arguments.only else list(SHAPES)
    for name in names:
        count, tokens, context = SHAPES[name]
        (batch,) = batches(engine.runner, [(executor.widths[-1], [(count, tokens, context, size)])])
        engine.runner.run(batch)
        executor.times()
        walls, parts = [], []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            engine.runner.run(batch)
            walls.append(time.perf_counter() - start)
            parts.append(executor.times())
        wall = statistics.median(walls)
        rows = count * tokens
        kv_bytes = count * (context + tokens) * 2 * spec.kv_size * dtype.itemsize * len(path.layers)
        attention = 4 * spec.num_heads * spec.head_dim * len(path.layers) * count * tokens * (context + tokens / 2)
        operations = 2 * parameters * rows + 2 * head_bytes / weight_item * count + attention
        limit = max((weight_bytes + head_bytes + kv_bytes) / bandwidth, operations / rate)
        table.add_row(
            name, f"{1e3 * wall:.2f}", f"{rows / wall:.0f}", f"{1e3 * limit:.2f}", f"{limit / wall:.0%}",
            f"{np.quantile(np.abs(wall / np.asarray(walls) - 1.0), 0.95):.0%}",
            *(f"{1e3 * statistics.median(part[key] for part in parts):.2f}" for key in parts[0]),
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
