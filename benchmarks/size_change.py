"""What it costs to go from one size to another: between two requests here, against loading another model.

    python -m benchmarks.size_change

Prints, in microseconds, the assembly of a layer path, and how much longer a request takes after one of another size
than after one of its own (medians over a random sequence): in the server's own work (scheduling, building the batch,
sampling) and in the model, where layers that have not run for a while are read from memory rather than from a cache.
In seconds: loading the other size as an ordinary checkpoint.
"""

from __future__ import annotations

import random
import statistics
import time

import torch

from model_store.weight_form import WeightForm


def main() -> None:
    from model_store.assembly import Elasticity
    from model_store.pair import open_pair
    from server.core.config import EngineConfig
    from server.core.request import Request, SamplingParams
    from server.engine.engine import Engine
    from server.engine.stats import MetricsSink

    pair = open_pair()
    own = pair.elasticity
    small, large = own.sizes[0], own.sizes[-1]

    def assemble() -> None:
        fresh = Elasticity(own.num_teacher_layers, [s.start for s in own.stations], own.thresholds)
        fresh.path(small)

    known = _microseconds(lambda: own.path(small), 10_000)
    fresh = _microseconds(assemble, 200)
    count = 0

    class Sink(MetricsSink):
        """Remembers the last step's seconds (whole, in the model)."""

        def on_step(self, stats) -> None:
            self.last = (stats.step_time, stats.model_time)

    sink, config = Sink(), EngineConfig(max_num_seqs=4, max_model_len=512, seed=0)
    engine = Engine(pair.load(WeightForm()), config, metrics=sink)

    def first_token(size: int) -> tuple[float, float]:
        nonlocal count
        count += 1
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        engine.add_request(Request(f"r{count}", [1, count % 1000 + 2, 3, 4], sampling, sizes=(size,)))
        while engine.has_work:
            engine.step()
        step, model = sink.last
        return step - model, model

    sequence = random.Random(0).choices((small, large), k=600)
    times: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for before, size in zip([large, *sequence], sequence, strict=False):
        times.setdefault((size, before != size), []).append(first_token(size))

    def extra(column: int) -> float:
        def median(size: int, changed: bool) -> float:
            return statistics.median(row[column] for row in times[size, changed])

        return statistics.mean(median(size, True) - median(size, False) for size in (small, large)) * 1e6

    print(f"path of a size, known to the pair: {known:.2f} us; with the pair's whole table made anew: {fresh:.0f} us")
    print(f"a request after one of another size: {extra(0):+.1f} us in the server, {extra(1):+.0f} us in the model")

    from transformers import AutoModelForCausalLM

    from benchmarks.peers.models import checkpoint

    folder = checkpoint(large)
    start = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    print(f"loading {large} layers as a checkpoint instead: {time.perf_counter() - start:.2f} s")


def _microseconds(call, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number * 1e6


if __name__ == "__main__":
    main()
