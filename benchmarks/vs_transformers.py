"""Decode and prefill speed against `transformers` generate, same weights, same precision, one run, interleaved.

    python -m benchmarks.vs_transformers [--executor torch] [--batches 1 16] [--repeats 3]

Prints medians and the ratio. Both sides generate greedily, ignore end-of-text and start from the same random prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from model_store.weight_form import WeightForm


def measure_transformers(model, prompts: list[list[int]], num_new: int) -> tuple[float, float]:
    ids = torch.tensor(prompts)
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1, min_new_tokens=1, **kwargs)
    first = time.perf_counter()
    model.generate(ids, max_new_tokens=num_new, min_new_tokens=num_new, **kwargs)
    end = time.perf_counter()
    return first - start, (end - first) - (first - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    from model_store.pair import open_pair
    from server.commands.bench import measure
    from server.core.config import EngineConfig
    from server.engine.engine import Engine

    pair = open_pair()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(pair.teacher_path, dtype=dtype).eval()
    config = EngineConfig(executor=args.executor, max_num_seqs=max(args.batches), max_model_len=2048)
    engine = Engine(pair.load(WeightForm(dtype), "cpu"), config)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch in args.batches:
        prompts = torch.randint(100, 40000, (batch, args.prompt_len), generator=generator).tolist()
        ours, theirs = [], []
        for repeat in range(args.repeats + 1):
            one = measure(engine, prompts, args.output_len, engine.sizes[-1])
            two = measure_transformers(model, prompts, args.output_len)
            if repeat:  # the first round warms both up
                ours.append(one)
                theirs.append(two)
        phases = (("prefill", 0, batch * args.prompt_len), ("decode", 1, batch * (args.output_len - 1)))
        for name, index, tokens in phases:
            mine = tokens / statistics.median(t[index] for t in ours)
            peer = tokens / statistics.median(t[index] for t in theirs)
            rows.append({"phase": name, "batch": batch, "boomerang": mine, "transformers": peer, "ratio": mine / peer})
    print(f"{engine.executor.describe()}; {args.dtype}, {engine.sizes[-1]} layers, tokens/s, median of {args.repeats}")
    print(f"{'':10}{'requests':>9}{'boomerang':>12}{'transformers':>14}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['phase']:10}{row['batch']:>9}{row['boomerang']:>12.1f}{row['transformers']:>14.1f}{row['ratio']:>8.2f}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
