"""Does guessing with a smaller size pay? Measured, and the arithmetic beside it.

    python -m benchmarks.speculation [--draft-sizes 16 22 28] [--batches 1 4] [--guesses 1 2] [--output-len 48]

Greedy answers of the full size to chat prompts, with and without guesses, interleaved. `c` is the measured time of a
decode step of the draft size over one of the full size; `ideal` is what acceptance and c allow if verifying were free:
(1 - a^(g+1)) / ((1 - a) (c g + 1)).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from model_store.weight_form import WeightForm

PROMPTS = Path(__file__).with_name("quality_chat_prompts.txt")


def decode_seconds(engine, prompts: list[list[int]], output_len: int, size: int) -> float:
    """Seconds from the first token of all to the last."""
    from server.core.request import Request, SamplingParams

    sampling = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    asked = [Request(f"r{i}", prompt, sampling, sizes=(size,)) for i, prompt in enumerate(prompts)]
    requests = [engine.add_request(request) for request in asked]
    while not all(request.output_token_ids for request in requests):
        engine.step()
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft-sizes", type=int, nargs="+", default=[16, 22, 28])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    from model_store.pair import open_pair
    from server.api.generate.tokenizer import ServingTokenizer
    from server.core.config import EngineConfig
    from server.engine.engine import Engine
    from server.engine.extras.drafts import DraftPool
    from server.engine.extras.speculation import Speculator

    pair = open_pair()
    tokenizer = ServingTokenizer.from_folder(pair.tokenizer_path)
    texts = [line for line in PROMPTS.read_text().splitlines() if line.strip()]
    wrap = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    prompts = [tokenizer.encode(wrap.format(text)) for text in texts]
    config = EngineConfig(max_num_seqs=2 * max(args.batches), max_model_len=1024, speculative_size=args.draft_sizes[0])
    engine = Engine(pair.load(WeightForm(torch.bfloat16)), config)
    full, slots = engine.sizes[-1], engine.speculator.pool._slots
    print(f"{'batch':>5} {'draft':>5} {'guesses':>7} {'accepted':>8} {'c':>5} {'ideal':>6} {'measured':>8}")
    for batch in args.batches:
        for size in args.draft_sizes:
            for guesses in args.guesses:
                pool = engine.scheduler.drafts = DraftPool(engine.kv_cache, engine.elasticity.path(size), slots)
                speculator = Speculator(engine.runner, engine.scheduler, engine.sampler, pool, guesses)
                plain, guessed, small = [], [], []
                for repeat in range(args.repeats + 1):
                    some = [prompts[(repeat * batch + i) % len(prompts)] for i in range(batch)]
                    for used, times, run_size in (
                        (None, plain, full), (speculator, guessed, full), (None, small, size)
                    ):  # fmt: skip
                        engine.speculator = used
                        seconds = decode_seconds(engine, some, args.output_len, run_size)
                        if repeat:
                            times.append(seconds)
                stats = speculator.stats
                accepted = sum(stats.accepted[full]) / stats.draft_tokens[full]
                stood = stats.accepted[full][0] / stats.drafts[full]
                c = statistics.median(one / two for one, two in zip(small, plain, strict=True))
                ideal = sum(stood**i for i in range(guesses + 1)) / (c * guesses + 1)
                speedup = statistics.median(one / two for one, two in zip(plain, guessed, strict=True))
                print(f"{batch:>5} {size:>5} {guesses:>7} {accepted:>8.2f} {c:>5.2f} {ideal:>6.2f} {speedup:>8.2f}")


if __name__ == "__main__":
    main()
