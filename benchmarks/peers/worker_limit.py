"""What this machine can do at most, behind the same line protocol as the engines, so that it is measured as they are.

    python -m benchmarks.peers.worker_limit WEIGHT_BYTES    a job: {"prompts": [[...], ...], "num_new": n}

The layer products of SmolLM2-135M over the prompts' tokens, as torch does them on bare matrices, then n - 1 passes over
as many bytes as the model's weights have, as torch sums them. No engine can be faster at prefill, nor at decode of one
request, but by reading or multiplying faster than torch. Neighbours on the machine can halve both rates within seconds:
a limit is worth something only if it is taken in the same minutes as what is held against it.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F

# (outputs, inputs) of the layer products of SmolLM2-135M: qkv, output, gate and up, down
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
NUM_LAYERS = 30


@torch.inference_mode()
def main() -> None:
    values = torch.ones(int(sys.argv[1]) // 4)
    layers = [[torch.randn(n, k).bfloat16() for n, k in SHAPES] for _ in range(NUM_LAYERS)]
    inputs: dict[tuple[int, int], torch.Tensor] = {}
    print(json.dumps({"executor": f"torch {torch.__version__}, {torch.get_num_threads()} threads"}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        rows = sum(map(len, job["prompts"]))
        for _, k in SHAPES:
            if (rows, k) not in inputs:
                inputs[rows, k] = torch.randn(rows, k).bfloat16()
        start = time.perf_counter()
        for layer in layers:
            for weight in layer:
                F.linear(inputs[rows, weight.shape[1]], weight)
        for _ in range(job["num_new"] - 1):
            values.sum()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
