"""The parts that a step's time is made of, by name: features of a step, and the coefficient of each in seconds.

    fixed             1
    layers            sum over segments of weight(layer) * ramps(tokens of the segment): weights are read once per
                      segment, then multiplied by (a segment that teacher and student rows share counts all tokens
                      once, and the low-rank factors for the student's)
    head              ramps(rows whose logits are wanted): norm, head and sampling, of each head tensor
    decode_context    sum over decode rows of layers * context: KV read
    prefill_context   sum over prompt chunks of layers * tokens * mean context: attention products
    request_layers    sum over requests of layers: attention calls

A layer's weight is its bytes over those of the heaviest layer (`CostProfile.layer_weights`).

These are the parts of the widest width that a server offers (`server.core.width`). Every narrower one has a further
`layers` and `head` after them, on fewer knots: its curves are its own, because fewer bits change what is read, what is
multiplied and how.

Rows of several widths in one segment share the planes of the nested codes: n rows at the widest of them cost what n
rows cost, and each narrower width adds what its rows add to a step of that width. EXACT beside nested codes is a copy
of its own, read for its rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from server.core.step_times import StepShape
from server.core.width import EXACT

KNOTS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048], dtype=np.float64)  # tokens of a segment
HEAD_KNOTS = np.array([1, 4, 16, 64, 256], dtype=np.float64)  # rows; a subset of KNOTS
NARROW_KNOTS = np.array([1, 4, 16, 64, 256, 1024], dtype=np.float64)  # of narrower widths; a subset of KNOTS
NARROW_HEAD_KNOTS = np.array([1, 16, 256], dtype=np.float64)


class Layout(NamedTuple):
    """Where each part lies in a vector of features or of coefficients."""

    fixed: int
    layers: slice
    head: slice
    decode_context: int
    prefill_context: int
    request_layers: int
    narrow: dict[int, tuple[slice, slice]]  # width -> its layers and its head
    size: int


@cache
def layout(widths: tuple[int, ...] = (EXACT,)) -> Layout:
    """Of a server that offers these, ascending."""
    head = 1 + len(KNOTS)
    rest = head + len(HEAD_KNOTS)
    narrow, end = {}, rest + 3
    for width in widths[:-1]:
        middle = end + len(NARROW_KNOTS)
        narrow[width] = slice(end, middle), slice(middle, middle + len(NARROW_HEAD_KNOTS))
        end = middle + len(NARROW_HEAD_KNOTS)
    return Layout(0, slice(1, head), slice(head, rest), rest, rest + 1, rest + 2, narrow, end)


AT = layout()
NUM_FEATURES = AT.size


def ramps(values: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Basis of the monotone piecewise-linear functions: [n] -> [n, len(knots)]; column 0 is the value at knots[0]."""
    basis = np.empty((len(values), len(knots)))
    basis[:, 0] = 1.0
    basis[:, 1:] = (values[:, None] - knots[:-1]) / np.diff(knots)
    np.clip(basis[:, 1:-1], 0.0, 1.0, out=basis[:, 1:-1])
    np.maximum(basis[:, -1], 0.0, out=basis[:, -1])  # the last piece goes on for ever
    return basis


class Union(NamedTuple):
    """What rows of one width add to a segment: from `above` tokens of it to `upto`."""

    width: int
    upto: float
    above: float


def union(tokens: Mapping[int, float]) -> list[Union]:
    """The parts that a segment with `tokens` of each width takes, the widest first."""
    found, above = [], 0.0
    for width in sorted(tokens, reverse=True):
        count = tokens[width]
        if not count:
            continue
        if width == EXACT:
            found.append(Union(width, count, 0.0))
        else:
            found.append(Union(width, above + count, above))
            above += count
    return found


def weight_features(
    segments: Mapping[Union, float], head_rows: Iterable[Union], widths: tuple[int, ...] = (EXACT,)
) -> np.ndarray:
    """Features of what is read and multiplied once for all rows. `segments`: summed layer weight by what is run;
    `head_rows`: rows of each head tensor that has some. `widths`: those that the server offers."""
    at = layout(widths)
    x = np.zeros(at.size)
    x[at.fixed] = 1.0
    for width in widths:
        own = [(run, weight) for run, weight in segments.items() if run.width == width]
        layers, head = at.narrow.get(width, (at.layers, at.head))
        knots, head_knots = (NARROW_KNOTS, NARROW_HEAD_KNOTS) if width in at.narrow else (KNOTS, HEAD_KNOTS)
        if own:
            x[layers] = np.array([weight for _, weight in own]) @ _added([run for run, _ in own], knots)
        if rows := [run for run in head_rows if run.width == width]:
            x[head] = _added(rows, head_knots).sum(axis=0)
    return x


def _added(runs: Sequence[Union], knots: np.ndarray) -> np.ndarray:
    """[runs, knots]: what each adds to the basis of `ramps`."""
    basis = ramps(np.array([run.upto for run in runs], np.float64), knots)
    if any(run.above for run in runs):
        above = np.array([run.above for run in runs], np.float64)
        basis -= np.where(above[:, None] > 0, ramps(above, knots), 0.0)
    return basis


def step_shape(features: np.ndarray, counts: np.ndarray, context_lens: np.ndarray, sizes: np.ndarray) -> StepShape:
    """The step with these `weight_features` whose requests have `counts` tokens and, after it, `context_lens`, and run
    `sizes` layers: arrays of R."""
    x = features.copy()
    decode = counts == 1
    layer_context = sizes * np.asarray(context_lens, np.float64)
    num_decode = int(np.count_nonzero(decode))
    if num_decode == len(counts):
        x[AT.decode_context] = layer_context.sum()
        kind = "decode"
    else:
        x[AT.decode_context] = layer_context[decode].sum()
        x[AT.prefill_context] = (sizes * counts * (context_lens - counts * 0.5))[~decode].sum()
        kind = "mixed" if num_decode else "prefill"
    x[AT.request_layers] = sizes.sum()
    return StepShape(x, kind)
