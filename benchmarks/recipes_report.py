"""Tables and plots of `benchmarks.recipes` and `benchmarks.second_family`, from the results kept in docs/data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model_store.evaluate.report import markdown, plot_svg, svg_pyplot, svg_text

TITLES = {  # name in benchmarks.recipes -> in tables and plots, in this order
    "pruned": "pruned, not trained",
    "warm-start": "warm start, not trained",
    "plain-from-pruned": "KL + cosine, from pruned layers",
    "published": "published recipe",
    "published-objective": "published objective, our optimizer",
    "cosine": "cosine alone",
    "plain": "KL + cosine, no patching",
    "stochastic": "stochastic patching",
    "stochastic-rank-160": "stochastic patching, rank 160",
}
Rows = dict[str, dict[str, float]]


def tables(data: Path) -> dict[str, str]:
    """Generated tables by name."""
    found = {}
    if results := _read(data / "recipes.json"):
        students = _in_order(results["students"])
        found["recipes"] = comparison({TITLES[name]: student["orders"]["klpatch"] for name, student in students})
        found["recipe_orders"] = "\n".join(
            f"{TITLES[name]}:\n\n" + comparison(_by_order(student)) for name, student in students
        )
    if results := _read(data / "recipes_long.json"):
        students = _in_order(results["students"])
        columns = {f"{TITLES[name]}, {order}": rows for name, s in students for order, rows in _by_order(s).items()}
        found["recipes_long"] = comparison(columns)
    if results := _read(data / "second_family.json"):
        table = comparison(results, lambda row: f"{row['perplexity']:.1f} / {row['kl']:.2f}")
        found["second_family"] = f"{table}\n![Perplexity and KL by size](images/second_family.svg)\n"
    return found


def plots(data: Path) -> dict[str, str]:
    """Plots by file name, as SVG."""
    found = {}
    if results := _read(data / "recipes.json"):
        students = [item for item in _in_order(results["students"]) if item[0] != "pruned"]
        found["recipes.svg"] = plot_svg({TITLES[n]: _sizes(s["orders"]["klpatch"]) for n, s in students})
        found["recipes_training.svg"] = curves_svg({TITLES[n]: s["curve"] for n, s in students})
        by_order = [(n, s) for n, s in students if n in ("plain", "stochastic")]
        found["recipe_orders.svg"] = plot_svg(
            {f"{TITLES[n]}, {order}": _sizes(rows) for n, s in by_order for order, rows in _by_order(s).items()}
        )
    if results := _read(data / "recipes_long.json"):
        found["recipes_long.svg"] = plot_svg(
            {TITLES[n]: _sizes(s["orders"]["klpatch"]) for n, s in _in_order(results["students"])}
        )
    if results := _read(data / "second_family.json"):
        found["second_family.svg"] = plot_svg({name: _sizes(rows) for name, rows in results.items()})
    return found


def comparison(columns: dict[str, Rows], cell: Callable[[dict[str, float]], str] | None = None) -> str:
    """One row per size, one column per name; by default the multiple of the teacher's perplexity and KL."""
    cell = cell or (lambda row: f"{row['perplexity_ratio']:.2f}x / {row['kl']:.3f}")
    sizes = sorted({int(size) for rows in columns.values() for size in rows})
    lines = [["layers", *columns]]
    for size in sizes:
        lines.append([str(size), *(cell(rows[str(size)]) if str(size) in rows else "-" for rows in columns.values())])
    return markdown(lines) + "\n"


def curves_svg(curves: dict[str, Sequence[dict[str, float]]]) -> str:
    """KL of the smallest size on training rows by tokens seen, as SVG; curves without it are left out."""
    figure, axis = svg_pyplot().subplots(figsize=(6.5, 3.8))
    for name, curve in curves.items():
        points = [(row["tokens"], row["pure"]) for row in curve if row.get("pure")]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=2, linewidth=1.1, label=name)
    axis.set(xlabel="tokens trained on", title="KL of the smallest size on training rows, nats per token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return svg_text(figure)


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _in_order(students: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, students[name]) for name in TITLES if name in students]


def _by_order(student: dict[str, Any]) -> dict[str, Rows]:
    titles = {"klpatch": "KLPatch", "last_to_first": "last-to-first", "first_to_last": "first-to-last"}
    return {titles[order]: rows for order, rows in student["orders"].items()}


def _sizes(rows: Rows) -> dict[int, dict[str, float]]:
    return {int(size): row for size, row in rows.items()}
