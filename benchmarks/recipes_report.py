"""Tables and plots of `benchmarks.recipes`, `.schedules` and `.second_family`, from the results kept in docs/data."""

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
DRAWS = {"recipes.json": "first draw", "recipes_second.json": "second draw"}  # of training text; file -> title
COMPARED = (  # this one's KL minus that one's
    ("stochastic", "plain"), ("stochastic-klpatch", "plain"), ("published-objective", "plain"),
    ("stochastic-rank-160", "stochastic"),
)  # fmt: skip
SCHEDULES = {  # name in benchmarks.schedules -> in tables and plots, in this order
    "start": "start, not trained",
    "plain": "student alone",
    "pure-0.75": "a quarter of the rows patched",
    "pure-0.5": "half",
    "pure-0.25": "three quarters",
    "even-sizes": "half, sizes evenly",
    "small-sizes": "half, mostly small sizes",
    "no-noise": "half, order never shuffled",
    "plain-then-patching": "alone, then half",
    "patching-then-plain": "half, then alone",
    "cosine-then-patching": "cosine alone, then half",
}
SECOND_FAMILY = ("second_family", "second_family_six")  # results of benchmarks.second_family: nine, six layers kept
Rows = dict[str, dict[str, Any]]
Cell = Callable[[dict[str, Any]], str]


def tables(data: Path) -> dict[str, str]:
    """Generated tables by name."""
    found = {}
    for file, name in (("recipes.json", "recipes"), ("recipes_second.json", "recipes_second")):
        if results := _read(data / file):
            students = _in_order(results["students"])
            found[name] = by_line({TITLES[n]: s["orders"]["klpatch"] for n, s in students})
            orders = {f"{TITLES[n]}: {order}": rows for n, s in students for order, rows in _by_order(s).items()}
            found[name.replace("recipes", "recipe_orders")] = by_line(orders)
    draws = {title: results["students"] for file, title in DRAWS.items() if (results := _read(data / file))}
    for this, that in COMPARED:
        if found_gains := gains(draws, this, that):
            found[f"gain_{this}".replace("-", "_")] = by_line(found_gains, _difference) + verdict(found_gains)
    if results := _read(data / "recipes_long.json"):
        students = _in_order(results["students"])
        found["recipes_long"] = by_line(
            {f"{TITLES[n]}: {order}": rows for n, s in students for order, rows in _by_order(s).items()}
        )
    if students := _schedules(data):
        found["schedules"] = by_line(students, lambda row: f"{row['kl']:.3f}")
        gains_over_plain = _over_plain(students)
        found["schedule_gains"] = by_line(gains_over_plain, _difference) + verdict(gains_over_plain)
    for name in SECOND_FAMILY:
        if results := _read(data / f"{name}.json"):
            table = comparison(results, lambda row: f"{row['perplexity']:.1f} / {row['kl']:.2f}")
            found[name] = f"{table}\n![Perplexity and KL by size](images/{name}.svg)\n"
    return found


def plots(data: Path) -> dict[str, str]:
    """Plots by file name, as SVG."""
    found = {}
    for file, name in (("recipes.json", "recipes"), ("recipes_second.json", "recipes_second")):
        if results := _read(data / file):
            students = [item for item in _in_order(results["students"]) if item[0] != "pruned"]
            found[f"{name}.svg"] = recipes_svg({n: _sizes(s["orders"]["klpatch"]) for n, s in students})
            found[f"{name}_training.svg"] = curves_svg({TITLES[n]: s["curve"] for n, s in students})
    if results := _read(data / "recipes.json"):
        by_order = [(n, s) for n, s in _in_order(results["students"]) if n in ("plain", "stochastic")]
        found["recipe_orders.svg"] = plot_svg(
            {f"{TITLES[n]}, {order}": _sizes(rows) for n, s in by_order for order, rows in _by_order(s).items()}
        )
    draws = {title: results["students"] for file, title in DRAWS.items() if (results := _read(data / file))}
    if len(patching := gains(draws, "stochastic", "plain")) > len(ORDERS):
        found["recipe_gains.svg"] = gains_svg(patching)
    if results := _read(data / "recipes_long.json"):
        found["recipes_long.svg"] = plot_svg(
            {TITLES[n]: _sizes(s["orders"]["klpatch"]) for n, s in _in_order(results["students"])}
        )
    if students := _schedules(data):
        found["schedules.svg"] = schedules_svg(_over_plain(students))
    for name in SECOND_FAMILY:
        if results := _read(data / f"{name}.json"):
            found[f"{name}.svg"] = plot_svg({student: _sizes(rows) for student, rows in results.items()})
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


def gains(draws: dict[str, dict[str, Any]], this: str, that: str) -> dict[str, Rows]:
    """By patch order and draw: the difference of two students' KL at every size, for draws that have both."""
    found: dict[str, Rows] = {}
    for order, title in ORDERS.items():
        for draw, students in draws.items():
            if this in students and that in students:
                ours, theirs = (students[name]["orders"][order] for name in (this, that))
                found[f"{title}: {draw}"] = {size: gain(theirs[size], row) for size, row in ours.items()}
    return found


def gain(that: dict[str, Any], this: dict[str, Any]) -> dict[str, Any]:
    """KL of `this` minus that of `that` and, from three windows kept up, the 95 % half width over windows (paired)."""
    found: dict[str, Any] = {"kl": this["kl"] - that["kl"]}
    pairs = list(zip(this.get("kl_windows", ()), that.get("kl_windows", ()), strict=False))
    if len(pairs) > 2:
        found["kl_ci"] = 1.96 * statistics.stdev(a - b for a, b in pairs) / len(pairs) ** 0.5
    return found


def verdict(found: dict[str, Rows]) -> str:
    """In words, per order and draw: at how many sizes the KL is lower, and the mean difference."""
    lines = []
    for name, rows in found.items():
        differences = [row["kl"] for row in rows.values()]
        lower, mean = sum(value < 0 for value in differences), statistics.fmean(differences)
        lines.append(f"- {name}: lower at {lower} of {len(differences)} sizes, mean difference {mean:+.3f}")
    return "\n" + "\n".join(lines) + "\n"


def _difference(row: dict[str, Any]) -> str:
    return f"{row['kl']:+.3f}" + (f" ± {row['kl_ci']:.3f}" if "kl_ci" in row else "")


def recipes_svg(students: dict[str, dict[int, dict[str, Any]]]) -> str:
    """KL by size on a logarithmic axis, and as a multiple of one student's, which shows the small differences."""
    base = next((name for name in ("plain", "stochastic") if name in students), None)
    figure, (left, right) = svg_pyplot().subplots(1, 2, figsize=(12, 4.6))
    for name, rows in students.items():
        sizes = sorted(rows)
        left.plot(sizes, [rows[s]["kl"] for s in sizes], marker="o", markersize=3, linewidth=1.2, label=TITLES[name])
        if base:
            ratio = [rows[s]["kl"] / students[base][s]["kl"] for s in sizes]
            right.plot(sizes, ratio, marker="o", markersize=3, linewidth=1.2)
    left.set_yscale("log")
    left.set(xlabel="layers", title="KL to the teacher, nats per token")
    right.set(xlabel="layers", title=f"KL, multiple of: {TITLES.get(base or '', '-')}", ylim=(0.6, 1.6))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    return svg_text(figure)


def gains_svg(found: dict[str, Rows]) -> str:
    """KL of patching minus KL of plain by size: a panel per order, a line per draw."""
    figure, axes = svg_pyplot().subplots(1, len(ORDERS), figsize=(5 * len(ORDERS), 3.8), sharey=True)
    for axis, order in zip(axes, ORDERS.values(), strict=True):
        own = {name: rows for name, rows in found.items() if name.startswith(f"{order}: ")}
        _gain_lines(axis, {name.split(": ")[1]: rows for name, rows in own.items()})
        axis.set(title=f"along {order}")
    axes[0].set(ylabel="KL, patching minus plain")
    axes[0].legend(fontsize=7)
    return svg_text(figure)


def schedules_svg(found: dict[str, Rows]) -> str:
    """KL of each schedule minus that of the student trained alone, by size."""
    figure, axis = svg_pyplot().subplots(figsize=(8, 4.4))
    _gain_lines(axis, found)
    axis.set(ylabel="KL, minus that of: student alone")
    axis.legend(fontsize=7)
    return svg_text(figure)


def _gain_lines(axis: Any, found: dict[str, Rows]) -> None:
    """Differences of KL by size around a line at 0, a line per name."""
    for name, rows in found.items():
        sizes = sorted(map(int, rows))
        axis.plot(sizes, [rows[str(s)]["kl"] for s in sizes], marker="o", markersize=3, linewidth=1.2, label=name)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="layers")
    axis.grid(alpha=0.3)


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


def _schedules(data: Path) -> dict[str, Rows]:
    """Every schedule's sizes by its title; nothing without results."""
    students = (_read(data / "schedules.json") or {"students": {}})["students"]
    return {title: students[name]["sizes"] for name, title in SCHEDULES.items() if name in students}


def _over_plain(students: dict[str, Rows]) -> dict[str, Rows]:
    """KL minus that of the student trained alone, for the trained ones."""
    base = students[SCHEDULES["plain"]]
    others = {title: rows for title, rows in students.items() if title not in (SCHEDULES["start"], SCHEDULES["plain"])}
    return {title: {size: gain(base[size], row) for size, row in rows.items()} for title, rows in others.items()}


def _in_order(students: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, students[name]) for name in TITLES if name in students]


def _by_order(student: dict[str, Any]) -> dict[str, Rows]:
    return {ORDERS[order]: rows for order, rows in student["orders"].items()}


def _sizes(rows: Rows) -> dict[int, dict[str, Any]]:
    return {int(size): row for size, row in rows.items()}
