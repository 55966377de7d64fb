"""Decode speed of the CUDA executor against the memory's limit and against transformers, in one run on one GPU.

    python -m benchmarks.cuda [--json cuda.json]            Qwen3-4B shapes, random weights: a file's codes, bfloat16
    python -m benchmarks.cuda --weights int8 q8 q5 q4 --skip-transformers              the same in other forms

    TRITON_INTERPRET=1 python -m benchmarks.cuda --shape tiny --device cpu --dtype float32 --batches 1 2 --mixed 4 \
        --product-rows 1 5 --context 6 --steps 2 --repeats 1             that it runs, without a GPU; no figure counts

Measures, in this order: bandwidth of the memory and two matrix products, which bound everything below; for each form of
the weights the layers' products alone at several numbers of rows, decode at every batch size, through the engine and
without it, tokens drawn with top_k and top_p instead of the likeliest, and a batch of four sizes against the same
requests run apart; then decode with transformers' generate over a static cache, which it compiles. Medians over the
repetitions. "codes" are those of a file called Q4_K_M: Q4_K, values, down projections and head in Q6_K.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.random_pair import SHAPES, random_pair, spec_of, transformers_config
from model_store.arrays import dtype_of
from model_store.loaded import LoadedPair
from model_store.spec import ModelSpec
from model_store.weight_form import Storage, WeightForm
from model_store.weights import MATRICES
from server.core.config import EngineConfig
from server.core.executor import GREEDY, Draw
from server.core.request import LiveRequest, Request, SamplingParams
from server.engine.engine import Engine
from server.kernels.cuda.graphs import Graphs
from server.kernels.cuda.linear import linear
from server.kernels.cuda.weights import bytes_of_product


def timed(device: torch.device, function: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, the device's work included; the first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- limits


def limits(spec: ModelSpec, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, Any]:
    """Bytes/s of a large copy (both ways) and of a large read; FLOP/s of a large and of a decode-shaped product."""
    big = device.type == "cuda"
    count = (1 << 30) if big else (1 << 22)
    a = torch.zeros(count, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / timed(device, functools.partial(b.copy_, a), repeats)
    read = a.nbytes / timed(device, a.sum, repeats)
    del a, b
    rows = 8192 if big else 256
    products = {}
    for name, m, n, k in (("large", rows, rows, rows), ("decode", 256, 2 * spec.intermediate_size, spec.hidden_size)):
        left, right = (torch.randn(shape, dtype=dtype, device=device) for shape in ((m, k), (n, k)))
        out = torch.empty(m, n, dtype=dtype, device=device)
        seconds = timed(device, functools.partial(torch.mm, left, right.t(), out=out), repeats)
        products[name] = {"m": m, "n": n, "k": k, "flops": 2 * m * n * k / seconds}
    return {"copy_bytes_per_s": copy, "read_bytes_per_s": read, "products": products}


def step_bytes(pair: LoadedPair, sizes: list[int], context: int) -> int:
    """What a decode step must read: the matrices of the union of the paths, the heads, and every request's KV."""
    spec, paths = pair.spec, [pair.elasticity.path(size) for size in sizes]
    layers = {layer for path in paths for layer in path.layers}
    heads = {id(pair.ends[path.head_from].head): pair.ends[path.head_from].head for path in paths}
    matrices = [*(getattr(pair.layers[layer], name) for layer in layers for name in MATRICES), *heads.values()]
    kv = spec.kv_bytes_per_token_layer(pair.ends["teacher"].final_norm_weight.dtype.itemsize)
    return round(sum(map(bytes_of_product, matrices))) + sum(path.size for path in paths) * context * kv


def time_products(pair: LoadedPair, bandwidth: float, arguments: argparse.Namespace) -> dict[str, dict[int, Any]]:
    """By matrix and rows: seconds of a product, alone, and its share of the time that reading the matrix takes.

    Those of all teacher layers one after the other, so that no cache holds them; recorded, so that nobody launches.
    """
    sample = pair.ends["teacher"].final_norm_weight
    found: dict[str, dict[int, Any]] = {}
    for name in MATRICES:
        matrices = [getattr(pair.layers[layer], name) for layer in range(pair.elasticity.num_teacher_layers)]
        least = sum(map(bytes_of_product, matrices)) / len(matrices) / bandwidth
        found[name.removesuffix("_weight")] = by_rows = {}
        for rows in arguments.product_rows:
            x = torch.randn(rows, matrices[0].shape[1], dtype=sample.dtype, device=sample.device)
            out = torch.empty(rows, matrices[0].shape[0], dtype=sample.dtype, device=sample.device)
            graphs = Graphs(sample.device)

            def run(x: torch.Tensor = x, out: torch.Tensor = out, matrices: list[Any] = matrices) -> None:
                for matrix in matrices:
                    linear(x, matrix, out=out)

            seconds = timed(sample.device, functools.partial(graphs.run, "all", run), arguments.repeats) / len(matrices)
            by_rows[rows] = {"product_s": seconds, "of_bandwidth": least / seconds}
    return found


# --- ours


SAMPLED = Draw(temperature=0.7, top_p=0.8, min_p=0.0, top_k=20, uniform=0.6)  # as Qwen3 recommends


def decode(engine: Engine, sizes: list[int], arguments: argparse.Namespace, draw: Draw = GREEDY) -> dict[str, float]:
    """Seconds of a decode step of one request per entry of `sizes`: through the engine, and enqueued back to back."""
    rng = random.Random(0)
    vocab, steps = engine.spec.vocab_size, arguments.steps
    sampling = SamplingParams(
        max_tokens=steps + 2, temperature=draw.temperature, top_p=draw.top_p, top_k=draw.top_k, ignore_eos=True
    )
    through, alone = [], []
    for repeat in range(arguments.repeats + 1):
        engine.kv_cache.reset_prefix_cache()
        asked = [
            Request(f"{repeat}-{i}", rng.choices(range(vocab), k=arguments.context), sampling, sizes=(size,))
            for i, size in enumerate(sizes)
        ]
        requests = [engine.add_request(request) for request in asked]
        while any(not request.output_token_ids for request in requests):
            engine.step()
        # Requests admitted first have gone on meanwhile: take the steps that all of them are still in.
        start, count = time.perf_counter(), 0
        while all(not request.is_finished for request in requests):
            engine.step()
            count += 1
        if repeat:
            through.append((time.perf_counter() - start) / max(count, 1))
        engine.abort([request.request_id for request in requests])
        if repeat:
            alone.append(_back_to_back(engine, sizes, arguments, draw))
    return {"engine_s": statistics.median(through), "device_s": statistics.median(alone)}


def _back_to_back(engine: Engine, sizes: list[int], arguments: argparse.Namespace, draw: Draw) -> float:
    """Seconds of a step when the host is always ahead: the same step, launched again and again."""
    executor, elasticity, kv_cache = engine.executor, engine.elasticity, engine.kv_cache
    requests = []
    try:
        for i, size in enumerate(sizes):
            sampling = SamplingParams(max_tokens=4, temperature=0.0)
            asked = Request(f"alone-{i}", [1] * (arguments.context + 1), sampling, sizes=(size,))
            request = LiveRequest(asked)
            request.path, request.slot = elasticity.path(size), i
            assert kv_cache.allocate(request, arguments.context + 1)
            request.num_computed_tokens = arguments.context
            requests.append(request)
        batch = engine.build_batch([(request, 1) for request in requests])
        draws = [draw] * len(sizes)
        rows = np.arange(len(sizes), dtype=np.int32)
        last = executor.launch(batch, draws)
        last.wait()
        start = time.perf_counter()
        for _ in range(arguments.steps):
            last = executor.launch(batch, draws, follows=(last, rows))
        last.wait()
        return (time.perf_counter() - start) / arguments.steps
    finally:
        for request in requests:
            kv_cache.free(request)


# --- transformers


def transformers_decode(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, arguments: argparse.Namespace
) -> dict[int, Any]:
    """Seconds of a decode step of `generate` at full size; on a GPU it compiles decoding over a static cache itself."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(transformers_config(spec), dtype=dtype).eval()
    model.generation_config.cache_implementation = "static"
    found: dict[int, Any] = {}
    for batch in arguments.batches:
        torch._dynamo.reset()  # what it has compiled for another batch size
        model.__dict__.pop("_compiled_call", None)
        ids = torch.randint(0, spec.vocab_size, (batch, arguments.context), device=device)

        def generate(count: int, ids: torch.Tensor = ids) -> None:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=None,
                max_new_tokens=count, min_new_tokens=count, max_length=None,
            )  # fmt: skip

        try:
            first = timed(device, lambda: generate(1), arguments.repeats)
            whole = timed(device, lambda: generate(1 + arguments.steps), arguments.repeats)
            found[batch] = {"step_s": (whole - first) / arguments.steps}
        except Exception as error:  # a peer that fails is a result too
            found[batch] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return found


# --- the run


def four_sizes(pair: LoadedPair) -> list[int]:
    """The ends of the dial and two between."""
    sizes = pair.sizes
    return sorted({sizes[round(i * (len(sizes) - 1) / 3)] for i in range(4)})


WEIGHTS = ("codes", "plain", "int8", "q8", "q6", "q5", "q4")


def form_of(name: str, dtype: str) -> WeightForm:
    if name == "plain":
        return WeightForm(dtype_of(dtype))
    if name.startswith("q"):
        return WeightForm(dtype_of(dtype), storage=Storage.NESTED, bits=int(name[1:]))
    return WeightForm(dtype_of(dtype), storage=Storage(name))


def measure(name: str, bandwidth: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One form of the weights."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    pair = random_pair(arguments.shape, form_of(name, arguments.dtype), device)
    batches, sizes = arguments.batches, four_sizes(pair)
    largest = max(*batches, arguments.mixed)
    length = arguments.context + arguments.steps + 8
    pages = largest * -(-length // 32) * pair.sizes[-1] + 64
    config = EngineConfig(
        max_model_len=length, max_num_seqs=largest, max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_bytes=pages * 32 * pair.spec.kv_bytes_per_token_layer(dtype.itemsize), executor="cuda",
        enable_prefix_caching=False,
    )  # fmt: skip
    start = time.perf_counter()
    engine = Engine(pair, config)
    found = {
        "executor": engine.executor.describe(), "engine_start_s": time.perf_counter() - start,
        "weight_bytes": pair.num_bytes(), "products": time_products(pair, bandwidth, arguments),
    }  # fmt: skip
    rows = []
    for size, batch in [(pair.sizes[-1], batch) for batch in batches] + [(pair.sizes[0], batches[0])]:
        row = {"size": size, "batch": batch, **decode(engine, [size] * batch, arguments)}
        row["floor_s"] = step_bytes(pair, [size] * batch, arguments.context) / bandwidth
        rows.append(row)
    found["decode"] = rows
    full = [pair.sizes[-1]] * arguments.mixed
    found["sampled"] = {"batch": arguments.mixed, **decode(engine, full, arguments, SAMPLED)}
    each = max(arguments.mixed // len(sizes), 1)
    mixed = sorted(sizes * each, reverse=True)
    found["mixed"] = {
        "sizes": sizes, "requests_each": each, "together": decode(engine, mixed, arguments),
        "apart": {size: decode(engine, [size] * each, arguments) for size in sizes},
        "floor_s": step_bytes(pair, mixed, arguments.context) / bandwidth,
    }  # fmt: skip
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    spec = spec_of(arguments.shape)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted: figures are void",
        "torch": torch.__version__, "shape": arguments.shape, "dtype": arguments.dtype, "context": arguments.context,
        "steps": arguments.steps, "repeats": arguments.repeats,
        "limits": limits(spec, dtype, device, arguments.repeats), "weights": {},
    }  # fmt: skip
    print_limits(report)
    bandwidth = max(report["limits"]["copy_bytes_per_s"], report["limits"]["read_bytes_per_s"])
    for name in arguments.weights:
        report["weights"][name] = measure(name, bandwidth, arguments)
        gc.collect()  # weights and KV pool make room for the next
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print_weights(name, report["weights"][name])
    if not arguments.skip_transformers:
        report["transformers"] = transformers_decode(spec, dtype, device, arguments)
    return report


def print_limits(report: dict[str, Any]) -> None:
    found = report["limits"]
    print(f"{report['device']}; torch {report['torch']}; {report['shape']} shapes, {report['dtype']}, random weights")
    flops = ", ".join(f"{name} product {p['flops'] / 1e12:.1f} TFLOP/s" for name, p in found["products"].items())
    print(
        f"memory: copy {found['copy_bytes_per_s'] / 1e9:.0f} GB/s, read {found['read_bytes_per_s'] / 1e9:.0f} GB/s; "
        f"{flops}; context {report['context']}"
    )


def print_weights(name: str, found: dict[str, Any]) -> None:
    ms = 1e3
    print(f"\n{name}: {found['executor']}; engine ready in {found['engine_start_s']:.1f} s")
    by_rows = next(iter(found["products"].values()))
    print(f"{'product us (of bandwidth)':>26}" + "".join(f"{rows:>9} rows" for rows in by_rows))
    for matrix, row in found["products"].items():
        cells = (f"{one['product_s'] * 1e6:.1f} ({one['of_bandwidth']:.2f})" for one in row.values())
        print(f"{matrix:>26}" + "".join(f"{cell:>14}" for cell in cells))
    print(f"{'size':>5}{'requests':>9}{'engine ms':>11}{'device ms':>11}{'floor ms':>10}{'x floor':>9}")
    for row in found["decode"]:
        print(
            f"{row['size']:>4}L{row['batch']:>9}{row['engine_s'] * ms:>11.2f}{row['device_s'] * ms:>11.2f}"
            f"{row['floor_s'] * ms:>10.2f}{row['engine_s'] / row['floor_s']:>9.2f}"
        )
    sampled, largest = found["sampled"], max(row["size"] for row in found["decode"])
    print(
        f"{largest:>4}L{sampled['batch']:>9}{sampled['engine_s'] * ms:>11.2f}{sampled['device_s'] * ms:>11.2f}"
        "    drawn with temperature 0.7, top_k 20, top_p 0.8"
    )
    mixed = found["mixed"]
    for kind in ("engine", "device"):
        together, apart = mixed["together"][f"{kind}_s"], sum(one[f"{kind}_s"] for one in mixed["apart"].values())
        print(
            f"{mixed['requests_each']} requests of each of {mixed['sizes']} layers, {kind}: {together * ms:.2f} ms "
            f"together, {apart * ms:.2f} ms apart, {apart / together:.2f}x; floor {mixed['floor_s'] * ms:.2f} ms"
        )


def print_side_by_side(report: dict[str, Any]) -> None:
    """Engine milliseconds of a decode step at full size, a column for each form of the weights."""
    forms, peers = report["weights"], report.get("transformers", {})
    print("\nrequests" + "".join(f"{name:>10}" for name in forms) + (f"{'transformers':>14}" if peers else ""))
    steps = {name: {row["batch"]: row for row in reversed(found["decode"])} for name, found in forms.items()}
    for batch in next(iter(steps.values())):
        cells = "".join(f"{by_batch[batch]['engine_s'] * 1e3:>10.2f}" for by_batch in steps.values())
        peer = peers.get(batch, {})
        other = f"{peer['step_s'] * 1e3:>14.2f}" if "step_s" in peer else f"{'failed':>14}" if peer else ""
        print(f"{batch:>8}{cells}{other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-4b", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["codes", "plain"], help="in this order")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--product-rows", type=int, nargs="+", default=[1, 2, 16, 64, 512])
    parser.add_argument("--mixed", type=int, default=64, help="requests of the batch of four sizes")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    report = run(arguments)
    print_side_by_side(report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
