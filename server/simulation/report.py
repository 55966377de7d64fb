"""Figures of a trace that was played, simulated or real: attainment, goodput, sizes; and a plot of them over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from server.core.width import precision_name
from server.cost.frontier import QualityTable
from server.simulation.jobs import Record


def summarise(
    records: Sequence[Record],
    top: int,
    quality: Callable[[int], float] | None = None,
    seconds: float | None = None,
    kl: QualityTable | None = None,
) -> dict[str, Any]:
    """`top`: the largest size; `quality` of a size in [0, 1] (left out: share of its layers); over `seconds`.

    `kl`: what points are worth, for the mean KL of what was served.

    Attainment is the share of all requests that met every limit they came with; goodput is those per second;
    quality-weighted goodput counts each with the quality of its size.
    """
    quality = quality or (lambda size: size / top)
    answered = [record for record in records if record.error_status == 0]
    met = [record for record in answered if record.met]
    if seconds is None:
        arrivals = [record.job.arrival for record in records]
        ends = [record.job.arrival + record.e2e for record in answered]
        seconds = max([*ends, *arrivals], default=0.0) - min(arrivals, default=0.0)
    seconds = max(seconds, 1e-9)

    def quantiles(values: list[float]) -> dict[str, float]:
        if not values:
            return {}
        return {f"p{q}": round(float(np.quantile(values, q / 100)), 4) for q in (50, 95, 99)}

    def sizes(of: Sequence[Record]) -> dict[str, int]:
        return {f"{size}L": count for size, count in sorted(Counter(record.size for record in of).items())}

    return {
        "requests": len(records),
        "seconds": round(seconds, 3),
        "attainment": _share(len(met), len(records)),
        "refused": len(records) - len(answered),
        "goodput": round(len(met) / seconds, 4),
        "quality_goodput": round(sum(quality(record.size) for record in met) / seconds, 4),
        "mean_size": round(float(np.mean([r.size for r in answered])), 3) if answered else None,
        "mean_kl": round(mean_kl(answered, kl), 5) if answered and kl else None,
        "full_size": _share(sum(record.size == top for record in answered), len(records)),
        "ttft": quantiles([record.ttft for record in answered]),
        "tpot": quantiles([record.tpot for record in answered]),
        "sizes": sizes(answered),
        "precisions": _precisions(answered),
        "reasons": dict(Counter(record.reason for record in records).most_common()),
        "preemptions": sum(record.preemptions for record in answered),
    }


def mean_kl(records: Sequence[Record], table: QualityTable) -> float:
    """Nats per token over all answers, each counted once."""
    return float(np.mean([table.mean_kl(record.size, record.tokens_at) for record in records]))


def _precisions(records: Sequence[Record]) -> dict[str, int]:
    """Tokens of answers by width."""
    total: Counter[int] = Counter()
    for record in records:
        total.update(record.tokens_at)
    return {precision_name(width): total[width] for width in sorted(total, reverse=True)}


def _share(count: int, total: int) -> float:
    return round(count / total, 4) if total else 0.0


def over_time(records: Sequence[Record], bin_seconds: float) -> dict[str, list[float | None]]:
    """By time of arrival, in bins: arrivals per second, mean size, share that met its limits."""
    if not records:
        return {"time": [], "rate": [], "mean_size": [], "attainment": []}
    bins: dict[int, list[Record]] = {}
    for record in records:
        bins.setdefault(int(record.job.arrival // bin_seconds), []).append(record)
    series: dict[str, list[float | None]] = {"time": [], "rate": [], "mean_size": [], "attainment": []}
    for index in range(max(bins) + 1):
        here = bins.get(index, [])
        answered = [record.size for record in here if record.error_status == 0]
        series["time"].append(index * bin_seconds)
        series["rate"].append(len(here) / bin_seconds)
        series["mean_size"].append(float(np.mean(answered)) if answered else None)
        series["attainment"].append(sum(record.met for record in here) / len(here) if here else None)
    return series


def plot(
    path: Path | str,
    records: Sequence[Record],
    *,
    top: int,
    floor: int,
    bin_seconds: float,
    replicas: Sequence[tuple[float, int]] = (),
    title: str = "",
) -> None:
    """Load, sizes given and limits met over time, as SVG or PNG. RuntimeError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("a plot needs matplotlib: pip install 'boomerang-serve[train]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "boomerang"  # the same figures give the same file
    series = over_time(records, bin_seconds)
    times = [_nan(time) + bin_seconds / 2 for time in series["time"]]
    panels = 4 if replicas else 3
    figure, axes = pyplot.subplots(panels, 1, sharex=True, figsize=(9, 1.9 * panels), layout="constrained")
    axes[0].step(times, series["rate"], where="mid", color="tab:gray")
    axes[0].set_ylabel("arrivals / s")
    answered = [record for record in records if record.error_status == 0]
    axes[1].scatter(
        [r.job.arrival for r in answered], [r.size for r in answered], s=5, color="tab:blue", alpha=0.35, linewidths=0
    )
    axes[1].plot(times, [_nan(value) for value in series["mean_size"]], color="tab:red", label="mean")
    axes[1].set_ylim(floor - 0.7, top + 0.7)
    axes[1].set_ylabel("size (layers)")
    axes[1].legend(loc="lower left", frameon=False)
    axes[2].plot(times, [100 * _nan(value) for value in series["attainment"]], color="tab:green")
    axes[2].set_ylim(-3, 103)
    axes[2].set_ylabel("limits met (%)")
    if replicas:
        axes[3].step(*zip(*replicas, strict=True), where="post", color="tab:purple")
        axes[3].set_ylabel("replicas")
    axes[-1].set_xlabel("time (s)")
    for axis in axes:
        axis.grid(alpha=0.25)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Date": None} if str(path).endswith(".svg") else None)
    pyplot.close(figure)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
