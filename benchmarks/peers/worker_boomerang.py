"""This server's engine behind the same line protocol; a job may name a size per prompt ("sizes": [16, 30, ...])."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quantization")
    parser.add_argument("--low-rank", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--max-num-seqs", type=int, default=64)
    args = parser.parse_args()
    started = time.perf_counter()
    from server.config import Settings
    from server.core.request import Request, SamplingParams
    from server.engine.engine import Engine
    from server.forms import open_settings_pair, pick_device, weight_form
    from server.loading import engine_config

    settings = Settings(dtype="bfloat16", quantization=args.quantization, low_rank=args.low_rank)
    pair = open_settings_pair(settings)
    form, device = weight_form(settings, pair), pick_device(settings)
    config = dataclasses.replace(
        engine_config(settings, pair, form.dtype, device),
        max_num_seqs=args.max_num_seqs, max_model_len=2048, max_num_batched_tokens=4096, kv_cache_bytes=1 << 30,
        enable_prefix_caching=False,
    )  # fmt: skip
    engine = Engine(pair.load(form, device, settings.memory_budget), config)
    print(json.dumps({"ready": time.perf_counter() - started, "executor": engine.executor.describe()}), flush=True)
    for count, line in enumerate(sys.stdin):
        job = json.loads(line)
        sampling = SamplingParams(max_tokens=job["num_new"], temperature=0, ignore_eos=True)
        sizes = job.get("sizes") or [engine.sizes[-1]] * len(job["prompts"])
        start = time.perf_counter()
        for i, (prompt, size) in enumerate(zip(job["prompts"], sizes, strict=True)):
            engine.add_request(Request(f"{count}-{i}", prompt, sampling, sizes=(size,)))
        while engine.has_work:
            engine.step()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
