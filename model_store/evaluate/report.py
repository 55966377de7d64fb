"""The measured sizes as a table, a plot and one HTML page without external files."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COLUMNS = (
    ("perplexity", "perplexity", "{:.1f}"), ("perplexity_ratio", "x teacher's", "{:.2f}"), ("kl", "KL", "{:.3f}"),
    ("top1_agreement", "top-1", "{:.3f}"), ("chat_kl", "chat KL", "{:.3f}"),
    ("chat_top1_agreement", "chat top-1", "{:.3f}"), ("repetition", "repeats", "{:.2f}"),
    ("repetition_penalised", "repeats, penalised", "{:.2f}"),
    ("stop_rate", "stops", "{:.2f}"), ("length_ratio", "x teacher's length", "{:.2f}"),
    ("weight_bytes", "weight bytes", "{:,}"), ("tokens_per_second", "tokens/s", "{:.0f}"),
)  # fmt: skip


def table(sizes: dict[int, dict[str, Any]], columns: Sequence[str] | None = None) -> list[list[str]]:
    """Header and one row of text per size; a column appears if any size has it."""
    used = [c for c in _COLUMNS if any(c[0] in row for row in sizes.values()) and (columns is None or c[0] in columns)]
    rows = [["layers", *(title for _, title, _ in used)]]
    for size, row in sorted(sizes.items()):
        rows.append([str(size), *(_cell(row, key, form) for key, _, form in used)])
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


def plot_svg(series: dict[str, dict[int, dict[str, Any]]], keys: Sequence[str] = ("kl", "perplexity_ratio")) -> str:
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


def html_page(title: str, notes: Sequence[str], rows: list[list[str]], svg: str | None) -> str:
    """A page that stands alone: notes, plot (inlined), table."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows[1:])
    image = ""
    if svg:
        data = base64.b64encode(svg.encode()).decode()
        image = f'<img alt="Quality by size" src="data:image/svg+xml;base64,{data}">'
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}img{max-width:100%}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1>{paragraphs}{image}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></html>"
    )


def write_report(
    folder: Path, title: str, notes: Sequence[str], sizes: dict[int, dict[str, Any]],
    others: dict[str, dict[int, dict[str, Any]]] | None = None,
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
    files = {"quality.md": f"# {title}\n\n" + "\n\n".join(notes) + "\n\n" + markdown(rows) + "\n"}
    files["quality.html"] = html_page(title, notes, rows, svg)
    if svg:
        files["quality.svg"] = svg
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]
