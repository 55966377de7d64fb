"""What int8 weights cost in quality, by size: the native executor with and without them, on the same text.

    python -m benchmarks.int8_quality --text wikitext2_valid.txt [--windows 4] [--sizes 16,20,24,28,30]

KL (nats per token) and top-1 agreement are measured from the bfloat16 teacher, over windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from model_store.pair import Pair, open_pair
from server.config import Settings
from server.core.request import LiveRequest, Request, SamplingParams
from server.engine.engine import Engine
from server.forms import weight_form
from server.loading import engine_config

WINDOW = 512


def make_engine(pair: Pair, quantization: str | None) -> Engine:
    settings, dtype = Settings(executor="native", quantization=quantization), torch.bfloat16
    loaded = pair.load(weight_form(settings, pair))
    config = engine_config(settings, pair, dtype, "cpu")
    changes = {"max_num_seqs": 1, "max_model_len": WINDOW + 1, "max_num_batched_tokens": WINDOW}
    return Engine(loaded, dataclasses.replace(config, kv_cache_bytes=64 << 20, **changes))


@torch.inference_mode()
def logprobs(engine: Engine, size: int, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token, [T, V]."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    request = LiveRequest(Request("window", ids, sampling, sizes=(size,), arrival_time=0.0))
    request.path, request.slot = engine.elasticity.path(size), 0
    assert engine.kv_cache.allocate(request, len(ids))
    try:
        batch = engine.build_batch([(request, len(ids))])
        batch.logits_rows = np.arange(len(ids), dtype=np.int32)
        batch.logits_start = np.array([0, len(ids)], np.int32)
        hidden = engine.executor.forward(batch)
        logits = engine.executor.logits(hidden, int(batch.logits_start[batch.head_cut]))
    finally:
        engine.kv_cache.free(request)
    return torch.log_softmax(torch.from_numpy(logits), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--sizes", help="layers, separated by commas; default all")
    arguments = parser.parse_args()
    pair = open_pair()
    tokenizer = Tokenizer.from_file(str(pair.tokenizer_path / "tokenizer.json"))
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8")[: 8 * WINDOW * arguments.windows]).ids
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(arguments.windows)]
    engines = {"bfloat16": make_engine(pair, None), "int8": make_engine(pair, "int8")}
    teacher = engines["bfloat16"].sizes[-1]
    sizes = [int(s) for s in arguments.sizes.split(",")] if arguments.sizes else list(engines["bfloat16"].sizes)
    sums = {(size, kind): np.zeros(3) for size in sizes for kind in engines}
    for window in windows:
        target = torch.tensor(window[1:])[:, None]
        reference = logprobs(engines["bfloat16"], teacher, window)[:-1]
        for (size, kind), row in sums.items():
            ours = logprobs(engines[kind], size, window)[:-1]
            kl = (reference.exp() * (reference - ours)).sum(-1).mean()
            agreement = (ours.argmax(-1) == reference.argmax(-1)).float().mean()
            row += [kl.item(), agreement.item(), -ours.gather(1, target).mean().item()]
    table = Table(title=f"{pair.name}, {len(windows)} windows of {WINDOW} tokens")
    for column in ("size", *(f"{name}, {kind}" for name in ("KL", "top-1", "perplexity") for kind in engines)):
        table.add_column(column, justify="right")
    for size in sizes:
        mean = {kind: sums[size, kind] / len(windows) for kind in engines}
        table.add_row(
            f"{size}L", *(f"{mean[kind][0]:.4f}" for kind in engines), *(f"{mean[kind][1]:.3f}" for kind in engines),
            *(f"{math.exp(mean[kind][2]):.2f}" for kind in engines),
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
