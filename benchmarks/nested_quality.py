"""What nested codes cost in quality and time: KL of each width to the pair's own bfloat16, by size.

    python -m benchmarks.nested_quality --text wikitext2_valid.txt [--windows 48] [--sizes 16,22,30]

KL (nats per token) and top-1 agreement are those of the native executor, 8-bit activations included, to the float32
model on windows of 512 tokens. Milliseconds are of a decode step of one request, the median of 60.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.codes_quality import make_engine
from benchmarks.int8_quality import WINDOW, logprobs
from model_store.nested import WIDTHS
from model_store.pair import Pair, open_pair
from model_store.weight_form import WeightForm
from server.config import Settings
from server.core.request import Request, SamplingParams
from server.engine.engine import Engine
from server.forms import load_weights, weight_form


def engine_of(pair: Pair, quantization: str, store: str | None) -> Engine:
    settings = Settings(quantization=quantization, low_rank="off", store=store, device="cpu")
    return make_engine(load_weights(settings, pair, weight_form(settings, pair), "cpu"), pair)


def decode_milliseconds(engine: Engine, size: int, steps: int = 60) -> float:
    """Median of steps in which one request decodes."""
    sampling = SamplingParams(max_tokens=steps + 8, temperature=0.0, ignore_eos=True)
    engine.add_request(Request(f"time-{size}", [1, 2, 3, 4], sampling, sizes=(size,)))
    times = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[8:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--sizes", default="16,22,30", help="layers, separated by commas")
    parser.add_argument("--store", help="folder of the model store")
    arguments = parser.parse_args()
    pair = open_pair(store=arguments.store)
    tokenizer = Tokenizer.from_file(str(pair.tokenizer_path / "tokenizer.json"))
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8")[: 8 * WINDOW * arguments.windows]).ids
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(arguments.windows)]
    sizes = [int(size) for size in arguments.sizes.split(",")]
    engines = {f"q{bits}": engine_of(pair, f"q{bits}", arguments.store) for bits in WIDTHS}
    engines["none"] = engine_of(pair, "none", arguments.store)
    reference = make_engine(dataclasses.replace(pair.load(WeightForm(torch.float32))), pair)
    sums = {(size, name): np.zeros(2) for size in sizes for name in engines}
    for window in windows:
        for size in sizes:
            itself = logprobs(reference, size, window)
            for name, engine in engines.items():
                ours = logprobs(engine, size, window)
                kl = (itself.exp() * (itself - ours)).sum(-1).mean().item()
                sums[size, name] += [kl, (ours.argmax(-1) == itself.argmax(-1)).float().mean().item()]
    print("| size | quantization | KL to itself | top-1 as itself | decode step, ms | bytes of a weight read |")
    print("|---|---|---|---|---|---|")
    for (size, name), row in sums.items():
        kl, agreement = row / len(windows)
        engine = engines[name]
        step, read = decode_milliseconds(engine, size), engine.executor.bytes_per_weight
        print(f"| {size}L | {name} | {kl:.4f} | {agreement:.3f} | {step:.2f} | {read:.2f} |")


if __name__ == "__main__":
    main()
