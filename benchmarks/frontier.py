"""The two dials of a pair on this machine: step times of every point against its KL, and which points nothing beats.

    python -m benchmarks.frontier --server-args "--quantization none" [--sizes 16,22,28,30] [--plot frontier.svg]
        [--gguf FILE]

Decode of one and of sixteen requests and a prompt of 256 tokens are timed on the engine, the median of some
repetitions, interleaved over the points. KL is what the pair keeps (`boomerang evaluate --kind ... --precisions ...`),
on the kind of text on which a point is worst. `~` before a KL: not measured there but added up, or guessed.
`--gguf`: llama.cpp on this file beside them, over HTTP; its KL is that of the file's weights, which are the default
teacher's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
from pathlib import Path

from model_store.evaluate.report import svg_pyplot, svg_text
from server.cli import settings_of
from server.commands.bench import measure
from server.config import Settings
from server.core.width import precision_name
from server.cost.frontier import Point, front
from server.engine.engine import Engine
from server.forms import load_weights, open_settings_pair, pick_device, weight_form
from server.loading import engine_config
from server.sizing.points import points_of
from server.sizing.quality import quality_table
from server.sizing.spec import size_name

REGIMES = {"decode, 1 request": (1, 16, 33), "decode, 16 requests": (16, 16, 17), "prompt of 256": (1, 256, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-args", default="", help="which pair, in which form, in one string")
    parser.add_argument("--sizes", help="layers, separated by commas [all]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="KL against step time, one panel for each regime (SVG)")
    parser.add_argument("--gguf", type=Path)
    args = parser.parse_args()
    peer = time_peer(args.gguf) if args.gguf else {}
    settings = settings_of(["--precision-dial", "on", *args.server_args.split()])
    engine, kl = load(settings)
    sizes = [int(size) for size in args.sizes.split(",")] if args.sizes else list(engine.sizes)
    points = [Point(size, width) for size in sizes for width in engine.executor.widths]
    seconds = time_points(engine, points, args.repeats)
    fronts = {name: set(front(taken, {point: kl[point][0] for point in points})) for name, taken in seconds.items()}
    print(f"| point | KL | {' | '.join(f'{name}, ms' for name in REGIMES)} | nothing beats it in |")
    print("|---|---|" + "---|" * (len(REGIMES) + 1))
    for point in sorted(points, key=lambda point: kl[point][0]):
        value, is_measured = kl[point]
        times = " | ".join(f"{1e3 * seconds[name][point]:.2f}" for name in REGIMES)
        where = ", ".join(name for name, best in fronts.items() if point in best) or "-"
        print(f"| {size_name(*point)} | {'' if is_measured else '~'}{value:.4f} | {times} | {where} |")
    if peer:
        print(f"| llama.cpp, the file | 0 | {' | '.join(f'{1e3 * peer[name]:.2f}' for name in REGIMES)} | |")
    if args.plot:
        args.plot.write_text(plot(seconds, {point: kl[point][0] for point in points}, fronts, peer))


def load(settings: Settings) -> tuple[Engine, dict[Point, tuple[float, bool]]]:
    """The engine, and (KL, whether it was measured) of every point."""
    pair = open_settings_pair(settings)
    form, device = weight_form(settings, pair), pick_device(settings)
    loaded = load_weights(settings, pair, form, device)
    config = dataclasses.replace(
        engine_config(settings, pair, form.dtype, device), max_num_seqs=16, max_model_len=512,
        max_num_batched_tokens=1024, kv_cache_bytes=256 << 20, enable_prefix_caching=False,
    )  # fmt: skip
    engine = Engine(loaded, config)
    widths = engine.executor.widths
    infos = points_of(quality_table(pair.quality, pair.kinds, pair.elasticity.sizes, widths), {}, engine.sizes, widths)
    return engine, {Point(p.size, p.width): (max(p.kl.values()), p.is_measured) for p in infos}


def time_points(engine: Engine, points: list[Point], repeats: int) -> dict[str, dict[Point, float]]:
    """Median seconds of a step by regime and point."""
    rng = random.Random(0)
    vocab = range(min(100, engine.spec.vocab_size - 1), engine.spec.vocab_size)
    prompts = {name: [rng.choices(vocab, k=length) for _ in range(rows)] for name, (rows, length, _) in REGIMES.items()}
    found: dict[str, dict[Point, list[float]]] = {name: {point: [] for point in points} for name in REGIMES}
    for repeat in range(repeats + 1):
        for name, (_, _, tokens) in REGIMES.items():
            for point in points:
                prefill, decode = measure(engine, prompts[name], tokens, *point)
                if repeat:  # the first pays for page faults
                    found[name][point].append(decode / (tokens - 1) if tokens > 1 else prefill)
    return {name: {point: statistics.median(taken) for point, taken in rows.items()} for name, rows in found.items()}


def time_peer(gguf: Path) -> dict[str, float]:
    """Seconds of llama.cpp by regime: of a token, of a token of each of sixteen, to a first token. Medians of five."""
    from benchmarks.vs_llamacpp import HERE, ROOT, Engine, python_of

    command = [python_of("xllamacpp"), str(HERE / "server_llamacpp.py"), str(gguf), "16", "512"]
    server = Engine("llama.cpp", [*command, str(len(os.sched_getaffinity(0)))], ROOT, {})
    rng = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in REGIMES}
    try:
        for _ in range(6):
            for name, (rows, length, tokens) in REGIMES.items():
                prompts = [rng.choices(range(100, 40000), k=length) for _ in range(rows)]
                if rows > 1:
                    found[name].append(rows / server.many(prompts, 4 * tokens))
                else:
                    first, rate = server.one(prompts[0], tokens)
                    found[name].append(1 / rate if tokens > 1 else first)
    finally:
        server.close()
    return {name: statistics.median(taken[1:]) for name, taken in found.items()}


def plot(
    seconds: dict[str, dict[Point, float]], kl: dict[Point, float], fronts: dict[str, set[Point]],
    peer: dict[str, float],
) -> str:  # fmt: skip
    pyplot = svg_pyplot()
    figure, axes = pyplot.subplots(1, len(seconds), figsize=(4.6 * len(seconds), 3.8), squeeze=False)
    for axis, (name, taken) in zip(axes.flat, seconds.items(), strict=True):
        for width in sorted({point.width for point in taken}):
            own = sorted((point for point in taken if point.width == width), key=lambda point: point.depth)
            label = precision_name(width)
            axis.plot(
                [1e3 * taken[p] for p in own],
                [kl[p] for p in own],
                marker="o",
                markersize=3,
                linewidth=0.8,
                label=label,
            )
        best = sorted(fronts[name], key=lambda point: taken[point])
        axis.step([1e3 * taken[p] for p in best], [kl[p] for p in best], where="post", color="black", linewidth=1.4)
        if peer:
            axis.plot([1e3 * peer[name]], [0.0], marker="*", linestyle="none", color="black", label="llama.cpp, Q4_1")
            axis.set_xscale("log")
        axis.set(xlabel="ms", title=name)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("KL to the teacher, nats per token")
    axes[0, -1].legend(fontsize=8)
    return svg_text(figure)


if __name__ == "__main__":
    main()
