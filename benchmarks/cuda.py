"""Decode speed of the CUDA executor against the memory's limit and against transformers, in one run on one GPU.

    python -m benchmarks.cuda [--json cuda.json]                          Qwen3-4B shapes, random weights, bfloat16
    python -m benchmarks.cuda --quantization int8 --skip-transformers     the same with int8 weights

    TRITON_INTERPRET=1 python -m benchmarks.cuda --shape tiny --device cpu --dtype float32 --batches 1 2 --mixed 4 \
        --context 6 --steps 2 --repeats 1                                that it runs, without a GPU; no figure counts

Measures, in this order: bandwidth of the memory and two matrix products, which bound everything below; decode at every
batch size, through the engine and without it; tokens drawn with top_k and top_p instead of the likeliest; the same with
transformers' generate over a static cache, which it compiles; and a batch of four sizes against the same requests run
apart. Medians over the repetitions.
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

from benchmarks.random_pair import SHAPES, random_pair, transformers_config
from model_store.loaded import LoadedPair
from model_store.weight_form import Storage, WeightForm
from server.core.config import EngineConfig
from server.core.executor import GREEDY, Draw
from server.core.request import LiveRequest, Request, SamplingParams
from server.engine.engine import Engine


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


def limits(pair: LoadedPair, device: torch.device, repeats: int) -> dict[str, Any]:
    """Bytes/s of a large copy (both ways) and of a large read; FLOP/s of a large and of a decode-shaped product."""
    spec, dtype = pair.spec, pair.ends["teacher"].final_norm_weight.dtype
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
    """What a decode step must read: the union of the paths' weights, the heads, and every request's KV."""
    spec, paths = pair.spec, [pair.elasticity.path(size) for size in sizes]
    layers = {layer for path in paths for layer in path.layers}
    heads = {id(pair.ends[path.head_from].head): pair.ends[path.head_from].head for path in paths}
    weights = sum(tensor.nbytes for layer in layers for tensor in pair.layers[layer].tensors())
    kv = spec.kv_bytes_per_token_layer(pair.ends["teacher"].final_norm_weight.dtype.itemsize)
    return weights + sum(head.nbytes for head in heads.values()) + sum(path.size for path in paths) * context * kv


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


def _back_to_back(engine: Engine, sizes: list[int], arguments: argparse.Namespace, draw: tuple[float, ...]) -> float:
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


def transformers_decode(pair: LoadedPair, batches: list[int], arguments: argparse.Namespace) -> dict[int, Any]:
    """Seconds of a decode step of `generate` at full size; on a GPU it compiles decoding over a static cache itself."""
    from transformers import AutoModelForCausalLM

    sample = pair.ends["teacher"].final_norm_weight
    dtype, device = sample.dtype, sample.device
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(transformers_config(pair.spec), dtype=dtype).eval()
    model.generation_config.cache_implementation = "static"
    found: dict[int, Any] = {}
    for batch in batches:
        torch._dynamo.reset()  # what it has compiled for another batch size
        model.__dict__.pop("_compiled_call", None)
        ids = torch.randint(0, pair.spec.vocab_size, (batch, arguments.context), device=device)

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


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    storage = Storage(arguments.quantization or Storage.AS_LOADED)
    pair = random_pair(arguments.shape, WeightForm(dtype, storage=storage), device)
    batches, sizes = arguments.batches, four_sizes(pair)
    largest = max(*batches, arguments.mixed)
    length = arguments.context + arguments.steps + 8
    pages = largest * -(-length // 32) * pair.sizes[-1] + 64
    config = EngineConfig(
        max_model_len=length, max_num_seqs=largest, max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_bytes=pages * 32 * pair.spec.kv_bytes_per_token_layer(dtype.itemsize), executor="cuda",
        enable_prefix_caching=False,
    )  # fmt: skip
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted: figures are void",
        "torch": torch.__version__, "shape": arguments.shape, "dtype": arguments.dtype, "context": arguments.context,
        "quantization": arguments.quantization,
        "steps": arguments.steps, "repeats": arguments.repeats, "weight_bytes": pair.num_bytes(),
        "limits": limits(pair, device, arguments.repeats),
    }  # fmt: skip
    start = time.perf_counter()
    engine = Engine(pair, config)
    report["executor"] = engine.executor.describe()
    report["engine_start_s"] = time.perf_counter() - start
    bandwidth = max(report["limits"]["copy_bytes_per_s"], report["limits"]["read_bytes_per_s"])
    rows = []
    for size, batch in [(pair.sizes[-1], batch) for batch in batches] + [(pair.sizes[0], batches[0])]:
        row = {"size": size, "batch": batch, **decode(engine, [size] * batch, arguments)}
        row["floor_s"] = step_bytes(pair, [size] * batch, arguments.context) / bandwidth
        rows.append(row)
    report["decode"] = rows
    full = [pair.sizes[-1]] * arguments.mixed
    report["sampled"] = {"batch": arguments.mixed, **decode(engine, full, arguments, SAMPLED)}
    each = max(arguments.mixed // len(sizes), 1)
    mixed = sorted(sizes * each, reverse=True)
    report["mixed"] = {
        "sizes": sizes, "requests_each": each, "together": decode(engine, mixed, arguments),
        "apart": {size: decode(engine, [size] * each, arguments) for size in sizes},
        "floor_s": step_bytes(pair, mixed, arguments.context) / bandwidth,
    }  # fmt: skip
    if device.type == "cuda":
        report["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    del engine
    gc.collect()  # the KV pool makes room for the peer
    if not arguments.skip_transformers:
        report["transformers"] = transformers_decode(pair, batches, arguments)
    return report


def print_report(report: dict[str, Any]) -> None:
    found, ms = report["limits"], 1e3
    kind = ", ".join(filter(None, (report["dtype"], report["quantization"])))
    print(f"{report['device']}; torch {report['torch']}; {report['shape']} shapes, {kind}, random weights")
    print(f"{report['executor']}; engine ready in {report['engine_start_s']:.1f} s; context {report['context']}")
    products = ", ".join(f"{name} product {p['flops'] / 1e12:.1f} TFLOP/s" for name, p in found["products"].items())
    print(
        f"memory: copy {found['copy_bytes_per_s'] / 1e9:.0f} GB/s, read {found['read_bytes_per_s'] / 1e9:.0f} GB/s; "
        f"{products}"
    )
    heads = ("engine ms", "device ms", "floor ms", "x floor", "transformers ms")
    print(f"\n{'size':>5}{'requests':>9}{heads[0]:>11}{heads[1]:>11}{heads[2]:>10}{heads[3]:>9}{heads[4]:>17}")
    largest = max(row["size"] for row in report["decode"])
    for row in report["decode"]:
        peer = report.get("transformers", {}).get(row["batch"], {}) if row["size"] == largest else {}
        other = f"{peer['step_s'] * ms:.2f}" if "step_s" in peer else ("failed" if "error" in peer else "")
        print(
            f"{row['size']:>4}L{row['batch']:>9}{row['engine_s'] * ms:>11.2f}{row['device_s'] * ms:>11.2f}"
            f"{row['floor_s'] * ms:>10.2f}{row['engine_s'] / row['floor_s']:>9.2f}{other:>17}"
        )
    sampled = report["sampled"]
    print(
        f"{largest:>4}L{sampled['batch']:>9}{sampled['engine_s'] * ms:>11.2f}{sampled['device_s'] * ms:>11.2f}"
        "    drawn with temperature 0.7, top_k 20, top_p 0.8"
    )
    mixed = report["mixed"]
    for name in ("engine", "device"):
        together, apart = mixed["together"][f"{name}_s"], sum(one[f"{name}_s"] for one in mixed["apart"].values())
        print(
            f"{mixed['requests_each']} requests of each of {mixed['sizes']} layers, {name}: {together * ms:.2f} ms "
            f"together, {apart * ms:.2f} ms apart, {apart / together:.2f}x; floor {mixed['floor_s'] * ms:.2f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-4b", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--mixed", type=int, default=64, help="requests of the batch of four sizes")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    report = run(arguments)
    print_report(report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
