"""The measured sizes as sentences, a table, a plot and one HTML page without external files."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = dict[int, dict[str, Any]]  # figures by size

_COLUMNS = (
    ("perplexity", "perplexity", "{:.1f}"), ("perplexity_ratio", "x teacher's", "{:.2f}"), ("kl", "KL", "{:.3f}"),
    ("top1_agreement", "top-1", "{:.3f}"), ("chat_kl", "chat KL", "{:.3f}"),
    ("chat_top1_agreement", "chat top-1", "{:.3f}"), ("repetition", "repeats", "{:.2f}"),
    ("repetition_penalised", "repeats, penalised", "{:.2f}"),
    ("stop_rate", "stops", "{:.2f}"), ("length_ratio", "x teacher's length", "{:.2f}"),
    ("weight_bytes", "weight bytes", "{:,}"), ("tokens_per_second", "tokens/s", "{:.0f}"),
)  # fmt: skip


def table(sizes: Rows, columns: Sequence[str] | None = None) -> list[list[str]]:
    """Header and one row of text per size; a column appears if any size has it."""
    used = [c for c in _COLUMNS if any(c[0] in row for row in sizes.values()) and (columns is None or c[0] in columns)]
    rows = [["size", *(title for _, title, _ in used)]]
    for size, row in sorted(sizes.items()):
        rows.append([f"{size}L", *(_cell(row, key, form) for key, _, form in used)])
    return rows


def kinds_table(kinds: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Header and one row per point that was measured: KL and multiple of the teacher's perplexity on each kind."""
    rows = [["point", *(f"{kind}: KL (x perplexity)" for kind in kinds)]]
    points: dict[str, dict[str, dict[str, float]]] = {}
    for kind, figures in kinds.items():
        for size, row in figures["sizes"].items():
            points.setdefault(f"{size}L", {})[kind] = row
        for name, row in figures["points"].items():
            points.setdefault(name, {})[kind] = row
    for name, found in points.items():
        cells = (found.get(kind) for kind in kinds)
        rows.append([name, *(f"{c['kl']:.4f} ({c['perplexity_ratio']:.2f})" if c else "-" for c in cells)])
    return rows


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    value, half_width = row.get(key), row.get(f"{key}_ci")
    if value is None:
        return "-"
    text = form.format(value)
    return f"{text} ± {form.format(half_width)}" if half_width is not None and half_width == half_width else text


def markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plot_svg(series: dict[str, Rows], keys: Sequence[str] = ("kl", "perplexity_ratio")) -> str:
    """One panel per key, one line with its intervals per named series, as SVG text. Needs matplotlib."""
    pyplot = svg_pyplot()
    titles = {key: title for key, title, _ in _COLUMNS} | {
        "kl": "KL to the teacher, nats per token", "perplexity_ratio": "perplexity, multiple of the teacher's",
        "chat_kl": "KL on the teacher's answers", "repetition": "share of answers that repeat",
        "weight_bytes": "bytes of weights", "tokens_per_second": "tokens per second, one request",
    }  # fmt: skip
    keys = [key for key in keys if any(key in row for rows in series.values() for row in rows.values())]
    columns = min(len(keys), 3)
    rows_of_panels = math.ceil(len(keys) / columns)
    size = (5.2 * columns, 3.6 * rows_of_panels)
    figure, axes = pyplot.subplots(rows_of_panels, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(keys) :]:
        axis.set_axis_off()
    for axis, key in zip(axes.flat, keys, strict=False):
        for name, rows in series.items():
            points = [(size, row[key], row.get(f"{key}_ci") or 0) for size, row in sorted(rows.items()) if key in row]
            if points:
                x, y, error = zip(*points, strict=True)
                spread = [0 if e != e else e for e in error]
                axis.errorbar(x, y, yerr=spread, marker="o", markersize=3, linewidth=1.2, elinewidth=0.6, label=name)
        if key == "perplexity_ratio" and max(row.get(key, 0) for rows in series.values() for row in rows.values()) > 10:
            axis.set_yscale("log")
        axis.set(xlabel="layers", title=titles.get(key, key))
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=8)
    return svg_text(figure)


def svg_pyplot() -> Any:
    """matplotlib's pyplot, set up for `svg_text`. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "boomerang"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    return pyplot


def svg_text(figure: Any) -> str:
    """The figure as SVG, closed."""
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg_pyplot().close(figure)
    return buffer.getvalue()


# KL below which a size is recommended, and for what. Where they lie is a matter of taste, so the report names them.
_CLOSE, _USEFUL = 0.1, 0.5


def meanings(sizes: Rows) -> list[str]:
    """What the columns of the table say, in sentences: those that were measured."""
    known = {key for row in sizes.values() for key in row}
    found = []
    if "kl" in known:
        size, row = _middle(sizes)
        found.append(
            "KL (Kullback-Leibler divergence, nats per token) says how far a size's probabilities for the next token "
            f"are from the teacher's. 0 is the teacher itself. {size}L has {row['kl']:.2f}: it gives what the teacher "
            f"would say {math.exp(-row['kl']):.2f} times the probability that the teacher gives it, on average."
        )
    texts = {
        "perplexity_ratio": "Perplexity says how surprised a size is by the held-out text; 1.2 x the teacher's is as "
        "if it chose between 1.2 times as many tokens.",
        "top1_agreement": "Top-1 is the share of tokens at which a size's first choice is the teacher's.",
        "repetition": "Repeats is the share of greedy answers that go round in circles, which a repetition penalty or "
        "sampling prevents.",
    }
    return found + [text for key, text in texts.items() if key in known]


def uses(sizes: Rows) -> list[str]:
    """Which size to use for what, in sentences; none where no KL was measured."""
    order = [size for size in sorted(sizes) if "kl" in sizes[size]]
    if len(order) < 2:
        return []
    top, smallest = order[-1], order[0]
    close = next(size for size in order if sizes[size]["kl"] <= _CLOSE or size == top)
    useful = next(size for size in order if sizes[size]["kl"] <= _USEFUL or size == top)
    found = [f"{top}L, the teacher: where every answer counts and there is time."]
    if close < top:
        found.append(
            f"{close}L{_than(sizes, close, top)}: for answers that should read like the teacher's. It is the smallest "
            f"with a KL of at most {_CLOSE}."
        )
    if useful < close:
        found.append(
            f"{useful}L{_than(sizes, useful, top)}: for chat, summaries and drafts under load. It is the smallest with "
            f"a KL of at most {_USEFUL}."
        )
    if smallest < useful:
        found.append(
            f"{smallest}L{_than(sizes, smallest, top)}: for what a grammar or a short list of answers holds in place, "
            "for guesses that a larger size checks (--speculative-size), and where nothing else fits."
        )
    loops = [size for size in order if sizes[size].get("repetition", 0) - sizes[top].get("repetition", 0) > 0.05]
    if loops:
        found.append(
            f"Up to {loops[-1]}L greedy answers go round in circles more often than the teacher's: sample, or set a "
            "repetition penalty."
        )
    return [*found, "A server picks among them by itself, by load and limits (size auto)."]


def _middle(sizes: Rows) -> tuple[int, dict[str, Any]]:
    measured = [(size, row) for size, row in sorted(sizes.items()) if "kl" in row]
    return measured[len(measured) // 2]


def _than(sizes: Rows, size: int, top: int) -> str:
    """What the smaller size saves and keeps, as far as it was measured."""
    row, best, parts = sizes[size], sizes[top], []
    if "tokens_per_second" in row and best.get("tokens_per_second"):
        parts.append(f"{row['tokens_per_second'] / best['tokens_per_second']:.2f} x the speed")
    if "weight_bytes" in row and best.get("weight_bytes"):
        parts.append(f"{row['weight_bytes'] / best['weight_bytes']:.0%} of the bytes")
    if "top1_agreement" in row:
        parts.append(f"the teacher's first choice at {row['top1_agreement']:.0%} of the tokens")
    return f" ({', '.join(parts)})" if parts else ""


def html_page(title: str, notes: Sequence[str], sizes: Rows, rows: list[list[str]], svg: str | None) -> str:
    """A page that stands alone: sentences, plot (inlined), table, and how it was measured."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text())
    image = base64.b64encode(svg.encode()).decode() if svg else ""
    return template.render(title=title, notes=notes, uses=uses(sizes), meanings=meanings(sizes), rows=rows, image=image)


def write_report(
    folder: Path, title: str, notes: Sequence[str], sizes: Rows,
    others: dict[str, Rows] | None = None,
) -> list[Path]:  # fmt: skip
    """quality.md, quality.svg and quality.html in `folder`; without matplotlib the plot is left out.

    `others` are further series for the plot, by name: other patch orders, other students.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(sizes)
    try:
        series = {"this pair": sizes, **(others or {})}
        svg = plot_svg(series, ("kl", "perplexity_ratio", "repetition", "weight_bytes", "tokens_per_second"))
    except ImportError:
        svg = None
    parts = [f"# {title}", *(f"- {line}" for line in uses(sizes)), *meanings(sizes), markdown(rows), *notes]
    files = {"quality.md": "\n\n".join(parts) + "\n", "quality.html": html_page(title, notes, sizes, rows, svg)}
    if svg:
        files["quality.svg"] = svg
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]
