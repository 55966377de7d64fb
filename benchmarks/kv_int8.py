"""What KV in 8 bits costs in quality and saves in time: KL to the model in float32, and decode steps by context.

    python -m benchmarks.kv_int8 --text wikitext2_valid.txt [--windows 8] [--sizes 16,30] [--contexts 64,1024,4096]

KL (nats per token) and top-1 agreement are those of the native executor to the same weights in float32, on windows of
512 tokens, with the weights in bfloat16 and as the pair is loaded by default. Milliseconds are of a decode step of one
request whose context is that long, the median of 32, of both kinds of KV in turns, at the largest size.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.int8_quality import WINDOW, logprobs
from model_store.pair import Pair, open_pair
from model_store.weight_form import WeightForm
from server.config import Settings
from server.core.request import Request, SamplingParams
from server.engine.engine import Engine
from server.forms import load_weights, weight_form
from server.loading import engine_config

KINDS, STEPS = ("auto", "int8"), 32


def engine_of(pair: Pair, quantization: str | None, kind: str, length: int) -> Engine:
    settings = Settings(executor="native", quantization=quantization, kv_cache_dtype=kind, max_model_len=length)
    form, device = weight_form(settings, pair), "cpu"
    config = engine_config(settings, pair, form.dtype, device)
    config = dataclasses.replace(config, max_num_seqs=1, kv_cache_bytes=512 << 20, enable_prefix_caching=False)
    return Engine(load_weights(settings, pair, form, device), config)


def decode_milliseconds(engine: Engine, prompt: list[int]) -> list[float]:
    """Of steps in which one request decodes after `prompt`."""
    sampling = SamplingParams(max_tokens=STEPS + 5, temperature=0.0, ignore_eos=True)
    request = engine.add_request(Request(f"time-{time.monotonic_ns()}", prompt, sampling, sizes=engine.sizes[-1:]))
    times = []
    while engine.has_work:
        has_begun, start = bool(request.output_token_ids), time.perf_counter()
        engine.step()
        if has_begun:
            times.append(1000 * (time.perf_counter() - start))
    return times[4:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sizes", default="16,30", help="layers, separated by commas")
    parser.add_argument("--contexts", default="64,1024,4096", help="tokens before the decode steps")
    parser.add_argument("--repeats", type=int, default=3, help="of the decode steps")
    arguments = parser.parse_args()
    pair = open_pair()
    ids = Tokenizer.from_file(str(pair.tokenizer_path / "tokenizer.json")).encode(arguments.text.read_text()).ids
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(arguments.windows)]
    contexts = [int(count) for count in arguments.contexts.split(",")]
    length = max(WINDOW, *contexts) + STEPS + 8
    names = {"bfloat16": "none", "as loaded": None}
    engines = {(n, k): engine_of(pair, quantization, k, length) for n, quantization in names.items() for k in KINDS}
    if windows:
        quality(pair, engines, windows, [int(size) for size in arguments.sizes.split(",")])
    rng = random.Random(0)
    measured: dict[tuple[int, tuple[str, str]], list[float]] = {(c, key): [] for c in contexts for key in engines}
    for _ in range(arguments.repeats):
        for context in contexts:
            prompt = rng.choices(range(100, 40000), k=context)
            for key, engine in engines.items():
                measured[context, key] += decode_milliseconds(engine, prompt)
    print(
        f"| weights | KV | {' | '.join(f'decode at {count} tokens, ms' for count in contexts)} | KV of a token, KiB |"
    )
    print(f"|---|---|---|{'---|' * len(contexts)}")
    for key, engine in engines.items():
        times = " | ".join(f"{statistics.median(measured[context, key]):.2f}" for context in contexts)
        held = engine.executor.page_bytes() * engine.sizes[-1] / engine.config.page_size / 1024
        print(f"| {key[0]} | {key[1]} | {times} | {held:.1f} |")


def quality(pair: Pair, engines: dict[tuple[str, str], Engine], windows: list[list[int]], sizes: list[int]) -> None:
    """Print KL and top-1 agreement by size, weights and KV."""
    config = dataclasses.replace(
        next(iter(engines.values())).config, executor="torch", kv_cache_dtype="auto", max_model_len=WINDOW + 1
    )
    reference = Engine(pair.load(WeightForm(torch.float32)), config)
    sums = {(size, key): np.zeros(2) for size in sizes for key in engines}
    for window in windows:
        for size in sizes:
            itself = logprobs(reference, size, window)
            for key, engine in engines.items():
                ours = logprobs(engine, size, window)
                kl = (itself.exp() * (itself - ours)).sum(-1).mean().item()
                sums[size, key] += [kl, (ours.argmax(-1) == itself.argmax(-1)).float().mean().item()]
    print("| size | weights | KV | KL to float32 | top-1 as float32 |\n|---|---|---|---|---|")
    for (size, (weights, kind)), row in sums.items():
        kl, agreement = row / len(windows)
        print(f"| {size}L | {weights} | {kind} | {kl:.5f} | {agreement:.4f} |")
    print()


if __name__ == "__main__":
    main()
