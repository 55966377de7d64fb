"""Perplexity, KL to the teacher and top-1 agreement of every size, from one pass of the teacher per window.

T = tokens of a window, V = vocabulary. All figures are means over predicted tokens, in nats where they are logarithms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from model_store.distill.elastic import ElasticModel
from model_store.opening import in_windows


@dataclass(slots=True)
class Scores:
    """Sums per window (one list entry each) of one size."""

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def windows(
    ids: Sequence[int], length: int, limit: int | None = None, opening: Sequence[int] = ()
) -> list[torch.Tensor]:
    """Consecutive windows of `length` tokens, the remainder dropped. Each begins with `opening` (opening.py).

    ValueError if there is not even one.
    """
    found = in_windows(ids, length, opening, limit)
    if not found:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    return [torch.tensor(window) for window in found]


@torch.no_grad()
def score(
    model: ElasticModel,
    sizes: Sequence[int],
    sequences: Sequence[torch.Tensor],
    starts: Sequence[int] | None = None,
    reference: ElasticModel | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[int, Scores]:
    """Score every size on every sequence of token ids, each predicted from its own beginning.

    They are compared with the teacher, or with that of `reference`, of which `model` is then a reduced form.
    `starts[i]` is the first token of sequence i whose prediction counts (1 if not given: all that have a context).
    """
    scores = {size: Scores() for size in sizes}
    paths = {size: model.elasticity.path(size) for size in sizes}
    for number, ids in enumerate(sequences):
        start, ids = starts[number] if starts else 1, ids.to(model.device)
        batch, target = ids[None], ids[start:]
        states = model.teacher_states(batch)
        rope = model.rope(states[0])
        teacher, last = (model, states[-1]) if reference is None else (reference, reference.teacher_states(batch)[-1])
        wanted = F.log_softmax(teacher.logits(last[0, start - 1 : -1]).float(), -1)
        best, probabilities = wanted.argmax(-1), wanted.exp()
        for size in sizes:
            path = paths[size]
            sides = path.teacher_stations
            own_embed = model.ends is not None and path.embed_from == "student"
            first = next((i for i, s in enumerate(sides) if not s and str(i) in model.student), len(sides))
            first = 0 if own_embed else first
            hidden = model.embed(batch, False) if own_embed else states[first]
            for index in range(first, len(sides)):
                hidden = model.run_station(index, hidden, rope, sides[index])
            ends = path.norm_from == "teacher", path.head_from == "teacher"
            ours = F.log_softmax(model.logits(hidden[0, start - 1 : -1], *ends).float(), -1)
            row = scores[size]
            row.nll.append(-float(ours.gather(-1, target[:, None]).sum()))
            row.kl.append(float((probabilities * (wanted - ours)).sum()))
            row.agree.append(float((ours.argmax(-1) == best).sum()))
            row.tokens.append(len(target))
        progress(number + 1)
    return scores


def summary(row: Scores, teacher: Scores) -> dict[str, float]:
    """One size in figures, each with the half width of its 95 % interval over windows (`_ci`).

    Ratios of sums; their error by linearisation, so that windows may differ in length. Perplexity as a multiple of
    the teacher's is a paired figure: its interval is that of the difference of log-likelihoods.
    """
    nll, nll_ci = ratio_of_sums(row.nll, row.tokens)
    gap, gap_ci = ratio_of_sums([a - b for a, b in zip(row.nll, teacher.nll, strict=True)], row.tokens)
    kl, kl_ci = ratio_of_sums(row.kl, row.tokens)
    agree, agree_ci = ratio_of_sums(row.agree, row.tokens)
    perplexity, multiple = math.exp(nll), math.exp(gap)
    return {
        "perplexity": perplexity, "perplexity_ci": perplexity * nll_ci,
        "perplexity_ratio": multiple, "perplexity_ratio_ci": multiple * gap_ci,
        "kl": max(kl, 0.0), "kl_ci": kl_ci, "top1_agreement": agree, "top1_agreement_ci": agree_ci,
    }  # fmt: skip


def ratio_of_sums(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Ratio of two totals and the half width of its 95 % interval, the entries being the sampling unit (linearised)."""
    total, n = sum(counts), len(sums)
    mean = sum(sums) / total
    if n < 2:
        return mean, float("nan")
    variance = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True)) * n / (n - 1)
    return mean, 1.96 * math.sqrt(variance) / total


def is_monotone(kl_by_size: dict[int, float]) -> list[int]:
    """Sizes at which the KL to the teacher does not fall although a layer was added; empty is what one wants."""
    sizes = sorted(kl_by_size)
    return [b for a, b in itertools.pairwise(sizes) if kl_by_size[b] >= kl_by_size[a]]
