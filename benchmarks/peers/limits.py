"""What this machine can do at most, measured with torch in the same run as the engines.

    python -m benchmarks.peers.limits    prints {"bandwidth": bytes/s, "products": flop/s}
"""

from __future__ import annotations

import json
import statistics
import time

import torch
import torch.nn.functional as F

# (outputs, inputs) of the layer products of SmolLM2-135M: qkv, output, gate and up, down
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))


def bandwidth(num_bytes: int = 1 << 30, repeats: int = 7) -> float:
    """Bytes per second that all threads read together, best of `repeats` passes over float32 values."""
    values = torch.ones(num_bytes // 4)
    return num_bytes / min(_seconds(lambda: values.sum()) for _ in range(repeats))


def products(rows: int = 4096, rounds: int = 4, seconds: float = 1.0) -> float:
    """bfloat16 multiply-adds (x 2) per second of the model's layer products at `rows` rows.

    The median of each round of `seconds`, the best round: the first tenth of a second after something else, or a
    neighbour on the machine, can halve the rate, and a limit that is too low flatters.
    """
    work = [(torch.randn(rows, k).bfloat16(), torch.randn(n, k).bfloat16()) for n, k in SHAPES]
    flops = sum(2 * rows * n * k for n, k in SHAPES)

    def layer() -> None:
        for x, weight in work:
            F.linear(x, weight)

    layer()
    best = float("inf")
    for _ in range(rounds):
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            times.append(_seconds(layer))
        best = min(best, statistics.median(times))
    return flops / best


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps({"bandwidth": bandwidth(), "products": products()}))
