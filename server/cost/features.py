"""The parts that a step's time is made of, by name: features of a step, and the coefficient of each in seconds.

    fixed             1
    layers            sum over segments of weight(layer) * ramps(tokens of the segment): weights are read once per
                      segment, then multiplied by (a segment that teacher and student rows share counts all tokens
                      once, and the low-rank factors for the student's)
    head              ramps(rows whose logits are wanted): norm, head and sampling, of each head tensor
    decode_context    sum over decode rows of layers * context: KV read
    prefill_context   sum over prompt chunks of layers * tokens * mean context: attention products
    request_layers    sum over requests of layers: attention calls

A layer's weight is its bytes over those of the heaviest layer (`CostProfile.layer_weights`). Weights kept in a second
form, of fewer bits, get a second block of `layers` with a curve and coefficients of their own: `Layout` is the place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from server.core.step_times import StepShape

KNOTS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048], dtype=np.float64)  # tokens of a segment
HEAD_KNOTS = np.array([1, 4, 16, 64, 256], dtype=np.float64)  # rows; a subset of KNOTS


class Layout(NamedTuple):
    """Where each part lies in a vector of features or of coefficients."""

    fixed: int
    layers: slice
    head: slice
    decode_context: int
    prefill_context: int
    request_layers: int


def _layout(num_knots: int, num_head_knots: int) -> Layout:
    head = 1 + num_knots
    rest = head + num_head_knots
    return Layout(0, slice(1, head), slice(head, rest), rest, rest + 1, rest + 2)


AT = _layout(len(KNOTS), len(HEAD_KNOTS))
NUM_FEATURES = AT.request_layers + 1


def ramps(values: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Basis of the monotone piecewise-linear functions: [n] -> [n, len(knots)]; column 0 is the value at knots[0]."""
    basis = np.empty((len(values), len(knots)))
    basis[:, 0] = 1.0
    basis[:, 1:] = (values[:, None] - knots[:-1]) / np.diff(knots)
    np.clip(basis[:, 1:-1], 0.0, 1.0, out=basis[:, 1:-1])
    np.maximum(basis[:, -1], 0.0, out=basis[:, -1])  # the last piece goes on for ever
    return basis


def weight_features(segments: Mapping[int, float], head_rows: Iterable[int]) -> np.ndarray:
    """Features of what is read and multiplied once for all rows. `segments`: tokens -> summed layer weight, for
    segments that have tokens; `head_rows`: rows of each head tensor that has some."""
    x = np.zeros(NUM_FEATURES)
    x[AT.fixed] = 1.0
    if segments:
        tokens = np.fromiter(segments.keys(), np.float64, len(segments))
        weights = np.fromiter(segments.values(), np.float64, len(segments))
        x[AT.layers] = weights @ ramps(tokens, KNOTS)
    if rows := list(head_rows):
        x[AT.head] = ramps(np.asarray(rows, np.float64), HEAD_KNOTS).sum(axis=0)
    return x


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
