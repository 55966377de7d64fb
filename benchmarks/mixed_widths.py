"""Rows of several precisions in one step: against what the step reads, and what a change between two steps costs.

    python -m benchmarks.mixed_widths [--rows 2,4,8] [--steps 60] [--size 30]

The default pair in bfloat16 with `--precision-dial on`. A mixed step reads the union of what its rows read. Nested
codes of the widest hold those of the others, so `all at the widest` reads the same bytes; rows that read the weights as
loaded share nothing with them: such a step reads both copies, and `bytes` is then the time that both would take at the
rate of a step of one row. `apart`: a step of its own for each width. Steps of the compared kinds take turns.
Milliseconds are medians of decode steps, microseconds of a step's time outside the model: of a change of precision they
are the difference between steps that change and those between them, in one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator

from model_store.pair import open_pair
from server.config import Settings
from server.core.batch import Scheduled
from server.core.config import EngineConfig
from server.core.load import LoadView
from server.core.request import Request, SamplingParams
from server.core.size_policy import LargestSize
from server.core.width import EXACT
from server.engine.engine import Engine
from server.forms import load_weights, weight_form

KINDS_OF_CHANGE: tuple[tuple[tuple[int | None, ...], str], ...] = (
    ((), "all change"),
    ((None, None, None, 6), "a quarter is pinned to 6 bits"),
)
MIXES = ((8, 4), (8, 6), (6, 4), (8, 6, 5, 4), (EXACT, 4), (EXACT, 8))


class Turns(LargestSize):
    """Another width at every step; rows with widths of their own keep them."""

    def __init__(self) -> None:
        self.widths: Iterator[int] = itertools.repeat(EXACT)

    def width(self, view: LoadView, now: float) -> int:
        return next(self.widths)

    def raises_rows(self, scheduled: Scheduled, width: int) -> bool:
        return False


class Bench:
    def __init__(self, size: int, steps: int) -> None:
        settings = Settings(device="cpu", quantization="none", low_rank="off", precision_dial="on", exact="on")
        pair = open_pair(store=settings.store)
        loaded = load_weights(settings, pair, weight_form(settings, pair), "cpu")
        self.policy, self.size, self.steps = Turns(), size, steps
        self.engine = Engine(loaded, EngineConfig(kv_cache_bytes=1 << 29, max_model_len=1024), policy=self.policy)
        self.model_seconds = 0.0
        executor = self.engine.executor
        for name in ("forward", "greedy"):
            setattr(executor, name, self._timed(getattr(executor, name)))

    def _timed(self, call):
        def timed(*arguments):
            started = time.perf_counter()
            result = call(*arguments)
            self.model_seconds += time.perf_counter() - started
            return result

        return timed

    def run(
        self, rows: int, widths: tuple[int | None, ...] = (), turns: tuple[int, ...] = (EXACT,)
    ) -> tuple[list[float], list[float]]:
        """Seconds of each decode step in the model, and outside; the first four are left out. `widths`: of the rows, in
        equal shares; None: as the step's, which are `turns`."""
        self.policy.widths = itertools.cycle(turns)
        sampling = SamplingParams(max_tokens=self.steps, temperature=0.0, ignore_eos=True)
        for row in range(rows):
            name, own = f"{time.monotonic_ns()}-{row}", widths[row * len(widths) // rows] if widths else None
            request = Request(name, [1, 2, 3, 4 + row], sampling, sizes=(self.size,))
            if own is not None:
                request = dataclasses.replace(request, min_width=own, max_width=own)
            self.engine.add_request(request)
        inside, outside = [], []
        while self.engine.has_work:
            started, self.model_seconds = time.perf_counter(), 0.0
            self.engine.step()
            inside.append(self.model_seconds)
            outside.append(time.perf_counter() - started - self.model_seconds)
        return inside[4:], outside[4:]

    def compare(self, rows: int, *kinds: tuple[int, ...]) -> list[float]:
        """Milliseconds of steps whose rows have these widths, the best of three turns."""
        found = [[statistics.median(self.run(rows, widths)[0]) for widths in kinds] for _ in range(3)]
        return [1000 * min(times) for times in zip(*found, strict=True)]

    def change(self, rows: int, widths: tuple[int | None, ...] = ()) -> tuple[float, float]:
        """Microseconds outside the model of steps between changes, and what a change adds: the median of five turns."""
        still, added = [], []
        for _ in range(5):
            outside = self.run(rows, widths, turns=(8, 8, 5, 5))[1]  # steps change where they have even numbers
            still.append(statistics.median(outside[1::2]))
            added.append(statistics.median(outside[::2]) - still[-1])
        return 1e6 * min(still), 1e6 * statistics.median(added)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="2,4,8")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=30)
    arguments = parser.parse_args()
    bench = Bench(arguments.size, arguments.steps)
    executor = bench.engine.executor
    print(f"{executor.describe()}; bytes of a weight read: ", end="")
    reads = {width: executor.bytes_per_weight_at(width) or 0.0 for width in executor.widths}
    print(", ".join(f"{width}: {read:.2f}" for width, read in reads.items()))
    alone = dict(zip(reads, bench.compare(1, *((width,) for width in reads)), strict=True))
    print("ms of one row: " + ", ".join(f"{width}: {ms:.2f}" for width, ms in alone.items()))
    print("| rows | widths | mixed, ms | all at the widest, ms | bytes, ms | mixed to that | apart, ms |")
    print("|---|---|---|---|---|---|---|")
    for rows in (int(text) for text in arguments.rows.split(",")):
        for widths in MIXES:
            if len(widths) > rows:
                continue
            mixed, widest = bench.compare(rows, widths, widths[:1])
            apart = sum(bench.compare(rows // len(widths), *((width,) for width in widths)))
            bound = widest
            if widths[0] == EXACT:
                bound = max(widest, alone[EXACT] * (reads[EXACT] + reads[widths[1]]) / reads[EXACT])
            print(
                f"| {rows} | {', '.join(map(str, widths))} | {mixed:.2f} | {widest:.2f} | {bound:.2f} "
                f"| {mixed / bound:.2f} | {apart:.2f} |"
            )
    for rows in (1, 16, 64):
        for own, kind in KINDS_OF_CHANGE:
            if rows > 1 or not own:
                still, added = bench.change(rows, own)
                print(f"{rows} rows, {kind}: {still:.0f} us outside the model, a change adds {added:.0f}")


if __name__ == "__main__":
    main()
