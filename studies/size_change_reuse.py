"""What a change of size in mid-answer costs, and what keeping a hidden state where two sizes part saves of it.

    python -m studies.size_change_reuse             # both tables
    python -m studies.size_change_reuse --layers    # the first alone: arithmetic, no model

First: of how many layers below the first station that differs two sizes of the default pair consist, in its own patch
order and in those that most published pairs have. Second: milliseconds from the last token at the first size to the
first one at the second (medians; nothing in the prefix cache), with and without a state kept, with the layers computed.

Answered 27 November 2026: a kept state saves the share of the layers that both sizes have
(docs/log/2026-11-27-size-change.md).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from model_store.assembly import Elasticity
from model_store.pair import open_pair
from model_store.weight_form import WeightForm

LENGTHS = (64, 256, 1024)


def orders() -> dict[str, Elasticity]:
    own = open_pair().elasticity
    build = (Elasticity.last_to_first, Elasticity.first_to_last)
    return {"its own": own} | {one.__name__: one(own.num_teacher_layers, own.kept) for one in build}


def shared_layers(elasticity: Elasticity, one: int, two: int) -> int:
    path, station = elasticity.path(two), elasticity.path(one).first_difference(elasticity.path(two))
    return path.starts[station] if station < len(path.starts) else path.num_layers


def print_layers() -> None:
    for name, elasticity in orders().items():
        sizes = elasticity.sizes[::2]
        print(f"order: {name}\n\n| | {' | '.join(f'{size}L' for size in sizes)} |\n{'|---' * (len(sizes) + 1)}|")
        for one in sizes[:-1]:
            cells = [str(shared_layers(elasticity, one, two)) if two > one else "" for two in sizes]
            print(f"| {one}L | {' | '.join(cells)} |")
        ups = [(a, b) for a in elasticity.sizes for b in elasticity.sizes if a < b]
        steps = list(zip(elasticity.sizes, elasticity.sizes[1:], strict=False))
        for what, pairs in (("all pairs", ups), ("neighbours", steps)):
            grow = statistics.mean(shared_layers(elasticity, a, b) / b for a, b in pairs)
            shrink = statistics.mean(shared_layers(elasticity, a, b) / a for a, b in pairs)
            print(f"\n{what}: {grow:.0%} of the layers of the larger, {shrink:.0%} of those of the smaller")
        print()


def measure(repeats: int) -> None:
    import torch

    from server.core.config import EngineConfig
    from server.core.request import Request, SamplingParams
    from server.engine.engine import Engine

    pairs = {
        "its own": ((16, 30), (16, 22), (22, 16), (28, 30), (30, 28)),
        "first_to_last": ((16, 30), (22, 30), (30, 26)),
    }
    print("| order | change | tokens | layers computed | computed again, ms | resumed, ms | saved |")
    print("|---" * 7 + "|")
    rng = random.Random(0)
    for order, changes in pairs.items():
        pair = open_pair(patch_order=None if order == "its own" else order)
        engine = Engine(
            pair.load(WeightForm(torch.bfloat16)),
            EngineConfig(max_num_seqs=2, max_model_len=2048, enable_prefix_caching=False, state_bytes=64 << 20, seed=0),
        )

        def change(one: int, two: int, length: int, keeps: bool, engine: Engine = engine) -> float:
            sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
            prompt = [rng.randrange(1000, 30000) for _ in range(length)]
            asked = Request("r", prompt, sampling, sizes=(one,), size_schedule=((one, 2), (two, 0)))
            request = engine.add_request(asked)
            keep_station = engine.scheduler._keep_station
            if not keeps:
                engine.scheduler._keep_station = lambda request: 0
            while len(request.output_token_ids) < 2:
                engine.step()
            start = time.perf_counter()
            while len(request.output_token_ids) < 3:
                engine.step()
            seconds = time.perf_counter() - start
            engine.scheduler._keep_station = keep_station
            while engine.has_work:
                engine.step()
            return seconds * 1e3

        change(*changes[0], LENGTHS[-1], True)
        for one, two in changes:
            kept = shared_layers(pair.elasticity, one, two)
            for length in LENGTHS:
                times: tuple[list[float], list[float]] = ([], [])
                for _ in range(repeats):
                    for keeps in (False, True):
                        times[keeps].append(change(one, two, length, keeps))
                again, resumed = (statistics.median(column) for column in times)
                print(
                    f"| {order} | {one}L to {two}L | {length} | {two - kept} of {two} | {again:.1f} | {resumed:.1f} | "
                    f"{1 - resumed / again:.0%} |", flush=True,
                )  # fmt: skip
        print(f"\n{order}: {engine.executor.describe()}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", action="store_true", help="print the first table alone")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print_layers()
    if not args.layers:
        measure(args.repeats)


if __name__ == "__main__":
    main()
