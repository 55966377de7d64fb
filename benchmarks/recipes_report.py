"""Tables and plots of `benchmarks.recipes` and `benchmarks.second_family`, from the results kept in docs/data."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model_store.evaluate.report import markdown, plot_svg, svg_pyplot, svg_text

TITLES = {  # name in benchmarks.recipes -> in tables and plots, in this order
    "pruned": "pruned, not trained",
    "warm-start": "warm start, not trained",
    "plain-from-pruned": "KL + cosine, from pruned layers",
    "published": "published recipe",
    "published-objective": "published losses, our optimizer",
    "cosine": "cosine alone",
    "plain": "KL + cosine, no patching",
    "stochastic": "stochastic patching",
    "stochastic-klpatch": "stochastic patching, towards KLPatch",
    "stochastic-rank-160": "stochastic patching, rank 160",
}
ORDERS = {"klpatch": "KLPatch", "last_to_first": "last-to-first", "first_to_last": "first-to-last"}
PATCHED = ("stochastic", "stochastic-klpatch")  # compared with "plain" in pairs
Rows = dict[str, dict[str, Any]]
Cell = Callable[[dict[str, Any]], str]


def tables(data: Path) -> dict[str, str]:
    """Generated tables by name."""
    found = {}
    if results := _read(data / "recipes.json"):
        students = _in_order(results["students"])
        found["recipes"] = by_line({TITLES[name]: student["orders"]["klpatch"] for name, student in students})
        found["recipe_orders"] = by_line(
            {f"{TITLES[n]}: {title}": rows for n, s in students for title, rows in _by_order(s).items()}
        )
    if gains := seed_gains(data):
        found["recipe_seeds"] = by_line(gains, _difference)
    if results := _read(data / "recipes_long.json"):
        students = _in_order(results["students"])
        found["recipes_long"] = by_line(
            {f"{TITLES[n]}: {title}": rows for n, s in students for title, rows in _by_order(s).items()}
        )
        found["recipes_long_gain"] = by_line(_gains(results["students"], ""), _difference)
    if results := _read(data / "second_family.json"):
        table = comparison(results, lambda row: f"{row['perplexity']:.1f} / {row['kl']:.2f}")
        found["second_family"] = f"{table}\n![Perplexity and KL by size](images/second_family.svg)\n"
    return found


def plots(data: Path) -> dict[str, str]:
    """Plots by file name, as SVG."""
    found = {}
    if results := _read(data / "recipes.json"):
        students = [item for item in _in_order(results["students"]) if item[0] != "pruned"]
        found["recipes.svg"] = recipes_svg({n: _sizes(s["orders"]["klpatch"]) for n, s in students})
        found["recipes_training.svg"] = curves_svg({TITLES[n]: s["curve"] for n, s in students})
        by_order = [(n, s) for n, s in students if n in ("plain", "stochastic")]
        found["recipe_orders.svg"] = plot_svg(
            {f"{TITLES[n]}, {order}": _sizes(rows) for n, s in by_order for order, rows in _by_order(s).items()}
        )
    if gains := seed_gains(data):
        found["recipe_seeds.svg"] = gains_svg(gains)
    if results := _read(data / "recipes_long.json"):
        found["recipes_long.svg"] = plot_svg(
            {TITLES[n]: _sizes(s["orders"]["klpatch"]) for n, s in _in_order(results["students"])}
        )
    if results := _read(data / "second_family.json"):
        found["second_family.svg"] = plot_svg({name: _sizes(rows) for name, rows in results.items()})
    return found


def comparison(columns: dict[str, Rows], cell: Cell | None = None) -> str:
    """One row per size, one column per name; by default the multiple of the teacher's perplexity and KL."""
    return markdown(_grid(columns, cell)) + "\n"


def by_line(lines: dict[str, Rows], cell: Cell | None = None) -> str:
    """The same table the other way round: one line per name, one column per size. Better for many names."""
    grid = _grid(lines, cell)
    return markdown([list(line) for line in zip(*grid, strict=True)]) + "\n"


def _grid(columns: dict[str, Rows], cell: Cell | None) -> list[list[str]]:
    cell = cell or (lambda row: f"{row['perplexity_ratio']:.2f}x / {row['kl']:.3f}")
    sizes = sorted({int(size) for rows in columns.values() for size in rows})
    lines = [["layers", *columns]]
    for size in sizes:
        lines.append([str(size), *(cell(rows[str(size)]) if str(size) in rows else "-" for rows in columns.values())])
    return lines


def seed_gains(data: Path) -> dict[str, Rows]:
    """KL of patching minus KL of plain training, by order, variant and seed, from docs/data/recipes[_seedN].json."""
    gains: dict[str, Rows] = {}
    for file in sorted(data.glob("recipes*.json")):
        if file.name == "recipes.json" or file.name.startswith("recipes_seed"):
            results = json.loads(file.read_text())
            gains |= _gains(results["students"], f", seed {results['settings']['seed']}")
    order = list(ORDERS.values())
    return dict(sorted(gains.items(), key=lambda item: (order.index(item[0].split(":")[0]), item[0])))


def _gains(students: dict[str, Any], suffix: str) -> dict[str, Rows]:
    """By order and variant: KL difference to the plain student, paired over windows where these were kept."""
    gains: dict[str, Rows] = {}
    for order, title in ORDERS.items():
        for name in PATCHED:
            if name not in students or "plain" not in students:
                continue
            plain, patched = (students[n]["orders"][order] for n in ("plain", name))
            gains[f"{title}: {TITLES[name]}{suffix}"] = {s: gain(plain[s], patched[s]) for s in plain if s in patched}
    return gains


def gain(plain: dict[str, Any], patched: dict[str, Any]) -> dict[str, Any]:
    """Difference of KL (negative: patching is better) and, from three windows up, its 95 % half width over windows."""
    found: dict[str, Any] = {"kl": patched["kl"] - plain["kl"]}
    pairs = list(zip(patched.get("kl_windows", ()), plain.get("kl_windows", ()), strict=False))
    if len(pairs) > 2:
        found["kl_ci"] = 1.96 * statistics.stdev(a - b for a, b in pairs) / len(pairs) ** 0.5
    return found


def _difference(row: dict[str, Any]) -> str:
    return f"{row['kl']:+.3f}" + (f" ± {row['kl_ci']:.3f}" if "kl_ci" in row else "")


def recipes_svg(students: dict[str, dict[int, dict[str, Any]]]) -> str:
    """KL by size on a logarithmic axis, and as a multiple of the plain student's, which shows the small differences."""
    figure, (left, right) = svg_pyplot().subplots(1, 2, figsize=(12, 4.6))
    for name, rows in students.items():
        sizes = sorted(rows)
        left.plot(sizes, [rows[s]["kl"] for s in sizes], marker="o", markersize=3, linewidth=1.2, label=TITLES[name])
        if "plain" in students:
            ratio = [rows[s]["kl"] / students["plain"][s]["kl"] for s in sizes]
            right.plot(sizes, ratio, marker="o", markersize=3, linewidth=1.2)
    left.set_yscale("log")
    left.set(xlabel="layers", title="KL to the teacher, nats per token")
    right.set(xlabel="layers", title="KL, multiple of the plain student's", ylim=(0.6, 1.6))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    return svg_text(figure)


def gains_svg(gains: dict[str, Rows]) -> str:
    """KL of patching minus KL of plain by size, a panel per order, a line per variant and seed."""
    figure, axes = svg_pyplot().subplots(1, len(ORDERS), figsize=(5 * len(ORDERS), 3.8), sharey=True)
    for axis, order in zip(axes, ORDERS.values(), strict=True):
        for name, rows in gains.items():
            if name.startswith(f"{order}: "):
                sizes = sorted(map(int, rows))
                values = [rows[str(s)]["kl"] for s in sizes]
                axis.plot(sizes, values, marker="o", markersize=3, linewidth=1.2, label=name.split(": ")[1])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="layers", title=f"along {order}")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="KL, patching minus plain")
    axes[0].legend(fontsize=7)
    return svg_text(figure)


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
    return {ORDERS[order]: rows for order, rows in student["orders"].items()}


def _sizes(rows: Rows) -> dict[int, dict[str, Any]]:
    return {int(size): row for size, row in rows.items()}
