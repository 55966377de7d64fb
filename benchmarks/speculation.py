"""Does guessing with less of the weights pay? Measured, and the arithmetic beside it.

    python -m benchmarks.speculation [--drafts 16L q4 22L-q4] [--batches 1 4] [--guesses 1 2] [--output-len 48]

Greedy answers of the full size as loaded to chat prompts, with and without guesses, interleaved; of one request the
texts must be equal. A draft is a smaller size, fewer bits of the same layers (q4), or both. `c` is the measured time of
a decode step of the draft over one of the full size; `ideal` is what acceptance and c allow if verifying were free:
(1 - a^(g+1)) / ((1 - a) (c g + 1)).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from server.api.generate.tokenizer import ServingTokenizer
from server.cli import settings_of
from server.core.config import EngineConfig
from server.core.request import Request, SamplingParams
from server.engine.engine import Engine
from server.engine.extras.drafts import DraftPool, Drafts, OwnDrafts
from server.engine.extras.speculation import Speculator
from server.forms import load_weights, open_settings_pair, pick_device, weight_form
from server.sizing.spec import SizeSpec

PROMPTS = Path(__file__).with_name("quality_chat_prompts.txt")


def decode_seconds(
    engine: Engine, prompts: list[list[int]], output_len: int, size: int, width: int
) -> tuple[float, list[list[int]]]:
    """Seconds from the first token of all to the last, and the answers."""
    sampling = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    limits = {"sizes": (size,), "min_width": width, "max_width": width}
    asked = [Request(f"r{i}", prompt, sampling, **limits) for i, prompt in enumerate(prompts)]
    requests = [engine.add_request(request) for request in asked]
    while not all(request.output_token_ids for request in requests):
        engine.step()
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started, [request.output_token_ids for request in requests]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", nargs="+", default=["16L", "22L", "q4", "q5", "22L-q4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--server-args", default="--quantization none --precision-dial on", help="in one string")
    args = parser.parse_args()
    settings = settings_of(args.server_args.split())
    pair = open_settings_pair(settings)
    form, device = weight_form(settings, pair), pick_device(settings)
    loaded = load_weights(settings, pair, form, device)
    tokenizer = ServingTokenizer.from_folder(pair.tokenizer_path)
    texts = [line for line in PROMPTS.read_text().splitlines() if line.strip()]
    wrap = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    prompts = [tokenizer.encode(wrap.format(text)) for text in texts]
    config = EngineConfig(
        max_num_seqs=max(args.batches), max_model_len=1024, kv_cache_bytes=1 << 29,
        speculative_size=pair.elasticity.sizes[0],
    )  # fmt: skip
    engine = Engine(loaded, config)
    slots = range(config.max_num_seqs, 2 * config.max_num_seqs)
    full, widest = engine.sizes[-1], engine.executor.widths[-1]

    def drafts_of(text: str) -> tuple[Drafts, int, int]:
        """What guesses, and the size and width that it runs at."""
        spec = SizeSpec.parse(text if not text.startswith("q") else f"{full}L-{text}")
        size, width = spec.resolve(pair.elasticity.sizes, {}), spec.width
        if size == full:
            return OwnDrafts(width), size, width
        return DraftPool(engine.kv_cache, engine.elasticity.path(size), slots, width), size, width or widest

    print(f"{'batch':>5} {'draft':>7} {'guesses':>7} {'accepted':>8} {'c':>5} {'ideal':>6} {'measured':>8}")
    for batch in args.batches:
        for text in args.drafts:
            for guesses in args.guesses:
                pool, size, width = drafts_of(text)
                engine.scheduler.drafts = pool
                speculator = Speculator(engine.runner, engine.scheduler, engine.sampler, pool, guesses)
                plain, guessed, small = [], [], []
                for repeat in range(args.repeats + 1):
                    some = [prompts[(repeat * batch + i) % len(prompts)] for i in range(batch)]
                    answers = []
                    runs = (None, plain, full, widest), (speculator, guessed, full, widest), (None, small, size, width)
                    for used, times, *point in runs:
                        engine.speculator = used
                        seconds, texts = decode_seconds(engine, some, args.output_len, *point)
                        answers.append(texts)
                        if repeat:
                            times.append(seconds)
                    assert batch > 1 or answers[0] == answers[1], "guesses change no text"
                stats = speculator.stats
                accepted = sum(stats.accepted[full]) / stats.draft_tokens[full]
                stood = stats.accepted[full][0] / stats.drafts[full]
                c = statistics.median(one / two for one, two in zip(small, plain, strict=True))
                ideal = sum(stood**i for i in range(guesses + 1)) / (c * guesses + 1)
                speedup = statistics.median(one / two for one, two in zip(plain, guessed, strict=True))
                print(f"{batch:>5} {text:>7} {guesses:>7} {accepted:>8.2f} {c:>5.2f} {ideal:>6.2f} {speedup:>8.2f}")


if __name__ == "__main__":
    main()
