"""Draws the dashboards' panels from a live Prometheus: `python -m deploy.grafana.panels --out docs/images`.

For documentation and for a look at the data where there is no Grafana. The queries are the dashboards' own; only the
drawing is matplotlib's.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import httpx

from deploy.grafana.build import OPERATIONS, Panel, Row

__all__ = ["draw", "expand", "query_range"]

VARIABLES = {"$job": "boomerang", "$instance": ".*"}
_SCALES = {"s": (1, "s"), "percentunit": (100, "%"), "bytes": (2**-20, "MiB"), "reqps": (1, "/s"), "short": (1, "")}


def expand(expression: str, rate_interval: str) -> str:
    """The expression with Grafana's variables filled in."""
    for name, value in (*VARIABLES.items(), ("$__rate_interval", rate_interval)):
        expression = expression.replace(name, value)
    return expression


def query_range(
    url: str, expression: str, start: float, end: float, step: float
) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
    """[(labels, [(time, value)])]. Raises httpx.HTTPError; a query that Prometheus refuses is a ValueError."""
    response = httpx.get(
        url + "/api/v1/query_range",
        params={"query": expression, "start": start, "end": end, "step": step},
        timeout=10,
        trust_env=False,
    )
    if response.status_code == 400:
        raise ValueError(response.json()["error"])
    response.raise_for_status()
    result = response.json()["data"]["result"]
    return [(series["metric"], [(at, float(value)) for at, value in series["values"]]) for series in result]


def draw(
    url: str, path: Path, start: float, end: float, rows: tuple[Row, ...] = OPERATIONS, rate_interval: str = "15s"
) -> dict[str, int]:
    """Writes one picture of all rows. Returns the number of series with data for each query ("panel: legend")."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 7, "axes.titlesize": 8, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    lines = [line for row in rows for line in _lines(row)]
    heights = [0.45 if line[0].kind == "stat" else 1 for line in lines]
    figure = plt.figure(figsize=(14, 2.3 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(lines), 24, height_ratios=heights)
    found: dict[str, int] = {}
    for y, line in enumerate(lines):
        x = 0
        for panel in line:
            axes = figure.add_subplot(grid[y, x : x + panel.width])
            x += panel.width
            _draw_panel(axes, url, panel, start, end, rate_interval, found)
    figure.savefig(path, dpi=75)
    plt.close(figure)
    return found


def _lines(row: Row) -> list[list[Panel]]:
    """The panels of a row, broken where 24 columns are full."""
    lines: list[list[Panel]] = [[]]
    for panel in row.panels:
        if sum(other.width for other in lines[-1]) + panel.width > 24:
            lines.append([])
        lines[-1].append(panel)
    return lines


def _draw_panel(axes, url: str, panel: Panel, start: float, end: float, interval: str, found: dict[str, int]) -> None:
    import matplotlib

    scale, unit = _SCALES[panel.unit]
    named: list[tuple[str, list[float], list[float]]] = []
    for legend, expression in panel.queries.items():
        series = query_range(url, expand(expression, interval), start, end, max(1.0, (end - start) / 240))
        found[f"{panel.title}: {legend}"] = len(series)
        for labels, points in series:
            values = [scale * value if math.isfinite(value) else math.nan for _, value in points]
            named.append((_name(legend, labels), [at - start for at, _ in points], values))
    axes.set_title(panel.title + (f" ({unit})" if unit else ""))
    if panel.kind == "stat":
        known = [value for _, _, values in named for value in values if math.isfinite(value)]
        axes.axis("off")
        text = f"{known[-1]:.3g}" if known else "–"
        axes.text(0.5, 0.4, text, ha="center", va="center", fontsize=18, color="#2b3fa8", transform=axes.transAxes)
        return
    if panel.stacked:  # what never happened is no layer of a stack
        named = [item for item in named if any(value > 0 for value in item[2])] or named[:1]
    named.sort(key=lambda item: (len(item[0]), item[0]))
    if "{{size}}" in panel.queries:
        # Sizes are ordered, so their colours are: yellow is the student, violet the teacher, as in the playground.
        ramp = matplotlib.colormaps["viridis_r"]
        axes.set_prop_cycle(color=[ramp(i / max(1, len(named) - 1)) for i in range(len(named))])
    if panel.stacked and named:
        times = sorted({at for _, ats, _ in named for at in ats})
        rows = [[dict(zip(ats, values, strict=True)).get(at, 0.0) for at in times] for _, ats, values in named]
        rows = [[value if math.isfinite(value) else 0.0 for value in row] for row in rows]
        axes.stackplot(times, rows, labels=[name for name, _, _ in named], alpha=0.85)
    else:
        for name, ats, values in named:
            axes.plot(ats, values, linewidth=1.2, label=name)
    axes.set_xlim(0, end - start)
    axes.set_ylim(0, scale * panel.maximum * 1.02 if panel.maximum else None)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if named:
        axes.legend(fontsize=6, frameon=False, ncols=min(4, 1 + len(named) // 4), loc="best")


def _name(legend: str, labels: dict[str, str]) -> str:
    for label, value in labels.items():
        legend = legend.replace("{{" + label + "}}", value)
    return legend or labels.get("__name__", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    end = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, count in draw(args.url, args.out / "dashboard.png", end - 60 * args.minutes, end).items():
        print(f"{count:4d} series  {name}")


if __name__ == "__main__":
    main()
