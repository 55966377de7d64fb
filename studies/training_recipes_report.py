"""Tables and plots of `studies.training_recipes` and `.second_family`, from the results kept in docs/data."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from model_store.evaluate.report import markdown, plot_svg, svg_pyplot, svg_text

PLAIN, PATCHED = "plain", "pure-0.5"
TITLES = {  # name in studies.training_recipes -> in tables and plots
    "pruned": "pruned, not trained",
    "start": "closed-form fit, not trained",
    "published": "published recipe",
    "published-losses": "published losses, our optimizer",
    "cosine": "cosine alone",
    PLAIN: "KL + cosine, student alone",
    PATCHED: "patching, half of the rows",
    "stored-at-160": "whole layers (Muon), cut down to rank 160 afterwards",
    "rank-160": "rank 160 (AdamW)",
    "whole-adamw": "whole layers (AdamW)",
    "start-at-160": "the fit cut down to rank 160, not trained",
    "pure-0.75": "patching, a quarter",
    "pure-0.25": "patching, three quarters",
    "even-sizes": "half, sizes evenly",
    "small-sizes": "half, mostly small sizes",
    "no-noise": "half, fixed order",
    "quarter-small-fixed": "patching, a quarter, mostly small sizes, fixed order",
    "eighth-small-fixed": "patching, an eighth, mostly small sizes, fixed order",
    "plain-then-patching": "alone, then half",
    "patching-then-plain": "half, then alone",
    "cosine-then-patching": "cosine alone, then half",
}
RECIPES = ("pruned", "start", "published", "published-losses", "cosine", PLAIN, PATCHED, "eighth-small-fixed")
RANKS = ("start", "start-at-160", PATCHED, "stored-at-160", "whole-adamw", "rank-160")
SCHEDULES = (
    "eighth-small-fixed", "quarter-small-fixed", "pure-0.75", PATCHED, "pure-0.25", "even-sizes", "small-sizes",
    "no-noise", "plain-then-patching", "patching-then-plain", "cosine-then-patching",
)  # fmt: skip
ORDERS = {"served": "KLPatch", "last_to_first": "last-to-first", "first_to_last": "first-to-last"}
DRAWS = {"recipes.json": "first draw", "recipes_second.json": "second draw"}  # of rows and order: file -> title
SECOND_FAMILY = ("second_family", "second_family_seed_1", "second_family_mild")  # results of studies.second_family
SECOND_STUDENTS = ("pruned", "published", "cosine+patching")  # those of the page on stochastic patching
SHORT_SCHEDULES, SHORT_SIZES = ("eighth-small-fixed", PATCHED, "pure-0.25"), ("16", "17", "19", "22", "25", "28")
Rows = dict[str, dict[str, Any]]
Cell = Callable[[dict[str, Any]], str]


def tables(data: Path) -> dict[str, str]:
    """Generated tables by name."""
    found = {}
    if students := _students(data / "recipes.json"):
        found["recipes"] = comparison(_text(students, RECIPES))
        found["recipes_chat"] = comparison(_chat(students, RECIPES), _kl)
        found["recipe_orders"] = by_line(_along(students, ("last_to_first", "first_to_last")), _kl)
        trained = RECIPES[2:]
        for name, rows in (("recipe_gains", _text), ("recipe_gains_chat", _chat)):
            found[name] = by_line(gains(rows(students, trained), TITLES[PLAIN]), _difference)
        for name, rows in (("rank_gains", _text), ("rank_gains_chat", _chat)):
            found[name] = by_line(gains(rows(students, RANKS[2:]), TITLES["whole-adamw"]), _difference)
        found["ranks"] = comparison(_text(students, RANKS))
        found["ranks_chat"] = comparison(_chat(students, RANKS), _kl)
        found["schedules"] = by_line(_text(students, ("start", PLAIN, *SCHEDULES)), _kl)
        over_plain = _over_plain(students)
        found["schedule_gains"] = by_line(over_plain, _difference) + verdict(over_plain)
        found["schedules_in_short"] = by_line(_in_short(over_plain), _difference)
    if draws := _draws(data):
        found["draws"] = by_line(draws, _difference) + verdict(draws)
    for name in SECOND_FAMILY:
        if results := _read(data / f"{name}.json"):
            table = comparison(results, _family)
            if name == SECOND_FAMILY[0]:
                found["second_family_in_short"] = comparison({key: results[key] for key in SECOND_STUDENTS}, _family)
            found[name] = f"{table}\n![Perplexity and KL by size](../images/{name}.svg)\n"
    return found


def plots(data: Path) -> dict[str, str]:
    """Plots by file name, as SVG."""
    found = {}
    if students := _students(data / "recipes.json"):
        drawn = [name for name in RECIPES if name != "pruned"]
        found["recipes.svg"] = recipes_svg(_text(students, drawn), _chat(students, drawn))
        trained = {TITLES[name]: students[name]["curve"] for name in RECIPES if name in students}
        found["recipes_training.svg"] = curves_svg(trained)
        found["schedules.svg"] = gains_svg(_over_plain(students))
    if draws := _draws(data):
        found["draws.svg"] = gains_svg(draws)
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
    lines = [["size", *columns]]
    for size in sizes:
        lines.append([f"{size}L", *(cell(rows[str(size)]) if str(size) in rows else "-" for rows in columns.values())])
    return lines


def gains(students: dict[str, Rows], base: str) -> dict[str, Rows]:
    """KL of every other student minus that of `base`, by size; nothing without `base`."""
    if base not in students:
        return {}
    return {
        name: {size: gain(students[base][size], row) for size, row in rows.items()}
        for name, rows in students.items() if name != base
    }  # fmt: skip


def gain(that: dict[str, Any], this: dict[str, Any]) -> dict[str, Any]:
    """KL of `this` minus that of `that` and, from three windows kept up, the 95 % half width over windows (paired)."""
    found: dict[str, Any] = {"kl": this["kl"] - that["kl"]}
    pairs = list(zip(this.get("kl_windows", ()), that.get("kl_windows", ()), strict=False))
    if len(pairs) > 2:
        found["kl_ci"] = 1.96 * statistics.stdev(a - b for a, b in pairs) / len(pairs) ** 0.5
    return found


def verdict(found: dict[str, Rows]) -> str:
    """In words, per line: at how many sizes the KL is lower, and the mean difference."""
    lines = []
    for name, rows in found.items():
        differences = [row["kl"] for row in rows.values()]
        lower, mean = sum(value < 0 for value in differences), statistics.fmean(differences)
        lines.append(f"- {name}: lower at {lower} of {len(differences)} sizes, mean difference {mean:+.3f}")
    return "\n" + "\n".join(lines) + "\n"


def _family(row: dict[str, Any]) -> str:
    return f"{row['perplexity']:.1f} / {row['kl']:.2f}"


def _in_short(found: dict[str, Rows]) -> dict[str, Rows]:
    """Three schedules at six sizes: what the page on stochastic patching shows."""
    chosen = {TITLES[name]: found[TITLES[name]] for name in SHORT_SCHEDULES if TITLES[name] in found}
    return {title: {size: rows[size] for size in SHORT_SIZES} for title, rows in chosen.items()}


def _kl(row: dict[str, Any]) -> str:
    return f"{row['kl']:.3f}"


def _difference(row: dict[str, Any]) -> str:
    return f"{row['kl']:+.3f}" + (f" ± {row['kl_ci']:.3f}" if "kl_ci" in row else "")


def recipes_svg(text: dict[str, Rows], chat: dict[str, Rows]) -> str:
    """KL by size on logarithmic axes, on text and on chat."""
    figure, axes = svg_pyplot().subplots(1, 2, figsize=(12, 4.6))
    for axis, title, columns in zip(axes, ("held-out text", "the teacher's answers"), (text, chat), strict=True):
        _kl_lines(axis, columns)
        axis.set_yscale("log")
        axis.set(title=f"KL to the teacher on {title}, nats per token")
    axes[0].legend(fontsize=7)
    return svg_text(figure)


def gains_svg(found: dict[str, Rows]) -> str:
    """KL of each minus that of the student trained alone, by size."""
    figure, axis = svg_pyplot().subplots(figsize=(8, 4.4))
    _kl_lines(axis, found)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(ylabel="KL, minus that of: student alone")
    axis.legend(fontsize=7)
    return svg_text(figure)


def _kl_lines(axis: Any, columns: dict[str, Rows]) -> None:
    """KL by size, a line per name."""
    for name, rows in columns.items():
        sizes = sorted(map(int, rows))
        axis.plot(sizes, [rows[str(s)]["kl"] for s in sizes], marker="o", markersize=3, linewidth=1.2, label=name)
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


def _students(file: Path) -> dict[str, Any]:
    return (_read(file) or {"students": {}})["students"]


def _text(students: dict[str, Any], names: Iterable[str]) -> dict[str, Rows]:
    """Each student's sizes by its title, along the order that is served."""
    return {TITLES[name]: students[name]["orders"]["served"] for name in names if name in students}


def _chat(students: dict[str, Any], names: Iterable[str]) -> dict[str, Rows]:
    return {TITLES[name]: students[name]["chat"] for name in names if name in students and students[name]["chat"]}


def _along(students: dict[str, Any], orders: Iterable[str]) -> dict[str, Rows]:
    """By title and order, those that were measured along it."""
    return {
        f"{TITLES[name]}: {ORDERS[order]}": student["orders"][order]
        for order in orders for name, student in students.items() if order in student["orders"]
    }  # fmt: skip


def _draws(data: Path) -> dict[str, Rows]:
    """Per schedule that all draws have, and draw: `_over_plain`."""
    draws = {title: _over_plain(_students(data / file)) for file, title in DRAWS.items()}
    shared = [name for name in map(TITLES.__getitem__, SCHEDULES) if all(name in found for found in draws.values())]
    return {f"{name}: {title}": found[name] for name in shared for title, found in draws.items()}


def _over_plain(students: dict[str, Any]) -> dict[str, Rows]:
    """Per schedule: KL minus that of the student trained alone, on text."""
    return gains(_text(students, (PLAIN, *SCHEDULES)), TITLES[PLAIN])


def _sizes(rows: Rows) -> dict[int, dict[str, Any]]:
    return {int(size): row for size, row in rows.items()}
