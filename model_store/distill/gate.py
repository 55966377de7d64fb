"""Which sizes of a new student are offered: those that held-out text shows to be worth what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from model_store.assembly import Elasticity
from model_store.distill.elastic import ElasticModel


def order_by_kl(model: ElasticModel, rows: torch.Tensor) -> ElasticModel:
    """The same model in the order that KLPatch finds on these rows."""
    from model_store.distill.order import greedy_order, kl_of_paths

    own = model.elasticity
    found = greedy_order(own, kl_of_paths(model, [rows]), "up")
    model.elasticity = Elasticity.from_order(own.num_teacher_layers, own.kept, found)
    return model


def gated(
    model: ElasticModel, rows: torch.Tensor, max_kl: float, say: Callable[[str], None] = lambda line: None
) -> tuple[ElasticModel, dict[int, float]]:
    """The model with the sizes that pass, and the KL of each on `rows`. ValueError if none does."""
    from model_store.distill.order import kl_of_paths

    own = model.elasticity
    divergence = kl_of_paths(model, [rows])
    measured = {size: divergence(own.path(size).teacher_stations) for size in own.sizes}
    say("KL on held-out text: " + ", ".join(f"{size}L {kl:.3f}" for size, kl in measured.items()))
    offered = offered_sizes(measured, max_kl)
    if len(offered) < 2:
        raise ValueError(f"no size is below --max-kl {max_kl:g}: the best has {min(list(measured.values())[:-1]):.3f}")
    if left := [size for size in measured if size not in offered]:
        say(f"not offered: {', '.join(f'{size}L' for size in left)}")
    elasticity, layers = only_sizes(own, offered)
    student: dict[int, nn.Module] = {
        station: model.student[str(old)] for station, old in layers.items() if str(old) in model.student
    }
    return ElasticModel(model.teacher, elasticity, student), {size: measured[size] for size in offered}


def offered_sizes(kl: Mapping[int, float], max_kl: float) -> list[int]:
    """Sizes, ascending, whose KL is at most `max_kl` and below that of every smaller one among them.

    Fewer bits need no look: at the narrowest width that a server offers only smaller sizes are cheaper, and what bits
    cost is added to the KL of every size alike. At other widths the server's choice passes over what is beaten.
    """
    offered: list[int] = []
    for size in sorted(kl):
        if kl[size] <= max_kl and all(kl[size] < kl[smaller] for smaller in offered):
            offered.append(size)
    return offered


def only_sizes(own: Elasticity, offered: Sequence[int]) -> tuple[Elasticity, dict[int, int]]:
    """The pair with these sizes only (ascending, the teacher's among them), and its stations -> those of `own`.

    A block that all of them run whole becomes stations of one layer; others are put back at the next size offered.
    """
    kept: list[int] = []
    thresholds: list[int] = []
    stations: dict[int, int] = {}
    smallest, second = offered[0], offered[1]
    for station, threshold in zip(own.stations, own.thresholds, strict=True):
        if station.num_layers > 1 and threshold > smallest:
            stations[len(kept)] = station.index
            kept.append(station.start)
            thresholds.append(next(size for size in offered if size >= threshold))
            continue
        if station.num_layers == 1:
            stations[len(kept)] = station.index
        kept += range(station.start, station.stop)
        thresholds += [second] * station.num_layers
    return Elasticity(own.num_teacher_layers, kept, thresholds), stations
