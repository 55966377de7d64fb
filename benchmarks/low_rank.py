"""What a student costs as a low-rank difference and expanded: memory, and the time of steps of several mixes.

    python -m benchmarks.low_rank [--context 64] [--repeats 25] [--json FILE]

Decode steps of the default pair, both forms interleaved in one process; medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

# name -> (requests at the smallest size, at full size)
MIXES = {"1 small": (1, 0), "1 full": (0, 1), "16 small": (16, 0), "8 small + 8 full": (8, 8), "16 full": (0, 16)}


def decode_batch(engine, num_small: int, num_full: int, context: int):
    """A decode step of such requests, with pages of the engine's pool that are not given back."""
    from server.core.request import LiveRequest, Request, SamplingParams

    rng = np.random.default_rng(0)
    scheduled = []
    for slot, size in enumerate([engine.sizes[0]] * num_small + [engine.sizes[-1]] * num_full):
        prompt = rng.integers(0, engine.spec.vocab_size, context + 1).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=4)
        request = LiveRequest(Request(f"r{slot}", prompt, sampling, sizes=(size,)))
        request.path, request.slot = engine.elasticity.path(size), slot
        assert engine.kv_cache.allocate(request, context + 1)
        request.num_computed_tokens = context
        scheduled.append((request, 1))
    batch = engine.build_batch(scheduled)
    # Block tables are the engine's: every batch needs a copy of its own.
    batch.block_tables = batch.block_tables.copy()
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()

    from model_store.pair import open_pair
    from model_store.weight_form import WeightForm
    from server.core.config import EngineConfig
    from server.engine.engine import Engine

    pair = open_pair()
    engines, batches, times = {}, {}, {}
    for form, low_rank in (("expanded", False), ("difference", True)):
        config = EngineConfig(executor=args.executor, max_num_seqs=16, max_model_len=1024)
        engines[form] = Engine(pair.load(WeightForm(torch.bfloat16, low_rank)), config)
        executor = engines[form].executor  # bytes are those of the form that runs
        kept_as = executor.weight_form
        sizes = pair.elasticity.sizes
        teacher, both = (pair.union_bytes(of, kept_as, executor.matrix_bytes) for of in (sizes[-1:], sizes))
        share = f"{both / teacher:.3f} of the teacher's {teacher / 2**20:.1f}"
        print(f"{form} ({kept_as}): {both / 2**20:.1f} MiB, {share}")
        for mix, (small, full) in MIXES.items():
            batches[form, mix] = decode_batch(engines[form], small, full, args.context)
            times[form, mix] = []
    for repeat in range(args.repeats + 2):
        for (form, mix), batch in batches.items():
            started = time.perf_counter()
            engines[form].runner.run(batch)
            if repeat >= 2:
                times[form, mix].append(time.perf_counter() - started)
    medians = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    print(f"{'step':<18} expanded  difference  ratio  over 16 full")
    for mix in MIXES:
        one, two = medians["expanded", mix], medians["difference", mix]
        whole = medians["expanded", "16 full"]
        print(f"{mix:<18} {one:8.2f}  {two:10.2f}  {two / one:5.2f}  {one / whole:5.2f} {two / whole:5.2f}")
    if args.json:
        content = {f"{form} {mix}": value for (form, mix), value in medians.items()}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
