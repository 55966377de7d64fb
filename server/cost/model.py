"""Predicts how long a step takes from its lanes, and what KV memory a request takes. Pure Python and numpy.

A step costs

    fixed
    + sum over segments of weight(layer) * g(tokens of the segment)     weights read once per segment, then products
      (a segment that teacher and student rows share counts all tokens once, and the factors for the student's)
    + h(logits rows)                                                    head and sampling
    + a * sum over decode rows of layers * context                      KV read
    + b * sum over prompt chunks of layers * tokens * mean context      attention products of prefill
    + c * sum over requests of layers                                   attention call overhead

`g` and `h` are monotone piecewise-linear functions on fixed knots, so they follow whatever the machine does between
the memory-bound and the compute-bound end (a roofline's max, its sum, cliffs of a kernel's tiles) instead of assuming
one. All coefficients are non-negative seconds and enter linearly: a handful of calibration steps fits them, a ring of
recent steps corrects them.
"""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from server.core.step_times import KINDS, ErrorStats, StepShape
from server.cost.profile import CostProfile

if TYPE_CHECKING:
    from server.core.batch import ForwardBatch

KNOTS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048], dtype=np.float64)
HEAD_KNOTS = np.array([1, 4, 16, 64, 256], dtype=np.float64)

_G = slice(1, 1 + len(KNOTS))
_H = slice(_G.stop, _G.stop + len(HEAD_KNOTS))
_DECODE_CONTEXT, _PREFILL_CONTEXT, _REQUEST_LAYERS = _H.stop, _H.stop + 1, _H.stop + 2
NUM_FEATURES = _H.stop + 3

_REFIT_EVERY = 64  # observed steps between fits while young; grows to _REFIT_AT_MOST
_REFIT_AT_MOST = 512
_TABLE = 4097  # entries of `CostModel.layer_table`
_HUBER = 0.15  # relative residual beyond which a step counts as an outlier


def ramps(values: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Basis of the monotone piecewise-linear functions: [n] -> [n, len(knots)]; column 0 is the value at knots[0]."""
    basis = np.empty((len(values), len(knots)))
    basis[:, 0] = 1.0
    basis[:, 1:] = (values[:, None] - knots[:-1]) / np.diff(knots)
    np.clip(basis[:, 1:-1], 0.0, 1.0, out=basis[:, 1:-1])
    np.maximum(basis[:, -1], 0.0, out=basis[:, -1])  # the last piece goes on for ever
    return basis


class CostModel:
    """Coefficients in seconds, and their correction from measured steps."""

    def __init__(self, profile: CostProfile, coefficients: np.ndarray) -> None:
        assert coefficients.shape == (NUM_FEATURES,) and (coefficients >= 0).all()
        self.profile = profile
        self.prior = coefficients.copy()  # what fits are drawn to where no step tells
        self.correction = dict.fromkeys(KINDS, 1.0)  # follows drift between fits
        self.spread: dict[str, list[float]] = {}  # by kind, `ErrorStats.spread` of the run that saved this model
        # Seconds between the end of one model call and the start of the next, while busy: always, and per request.
        self.overhead = self.overhead_per_request = 0.0
        self.errors = {kind: ErrorStats() for kind in ("all", *KINDS)}
        self.num_observed = 0
        self._ring: deque[tuple[StepShape, float]] = deque(maxlen=2048)
        self.path: Path | None = None  # where it is kept
        self._since_fit = 0
        self._refit_every = _REFIT_EVERY
        self._weights = profile.layer_weights
        self._weight_features: dict[tuple, np.ndarray] = {}  # of recent batches, by what they were made from
        self._layout, self._layout_features = 0, np.zeros(NUM_FEATURES)  # of the last batch that had a layout
        self.set_coefficients(coefficients)

    def fresh(self) -> CostModel:
        """A model that knows the same machine and has seen no step yet."""
        own = CostModel(self.profile, self.coefficients.copy())
        own.overhead, own.overhead_per_request = self.overhead, self.overhead_per_request
        return own

    def set_coefficients(self, coefficients: np.ndarray) -> None:
        self.coefficients = coefficients
        self.version = getattr(self, "version", -1) + 1
        # Values of g and h at their knots, for interpolation.
        self._g = np.cumsum(coefficients[_G])
        self._h = np.cumsum(coefficients[_H])
        self._curves = tuple(
            (knots.tolist(), values.tolist()) for knots, values in ((KNOTS, self._g), (HEAD_KNOTS, self._h))
        )
        # Flat pieces make the inverse of g jump; adding a hair of slope keeps it a function.
        self._inverse = KNOTS.tolist(), (self._g + np.arange(len(self._g)) * 1e-12).tolist()
        # g and h at the knots of g, each with its slopes, the last ones going on: a step of rows of one size.
        h = self.head_seconds(KNOTS)
        curves = (KNOTS, self._g, _slopes(self._g), h, _slopes(h))
        self.step_curves = tuple(values.tolist() for values in curves)
        self.layer_table = self.layer_seconds(np.arange(_TABLE)).tolist()  # g of 0, 1, 2, ... tokens
        self.fixed = float(coefficients[0])
        self.decode_context = float(coefficients[_DECODE_CONTEXT])  # s per layer and context token of a decode row
        # Seconds per layer, chunk token and context token of a prompt chunk
        self.prefill_context = float(coefficients[_PREFILL_CONTEXT])
        self.request_layers = float(coefficients[_REQUEST_LAYERS])  # s per layer of a request

    # --- parts of the formula, for whoever reasons about steps that do not exist yet

    def prompt_scale(self, rows: float) -> float:
        """The correction of what prompts take beside `rows` that decode."""
        return self.correction["mixed" if rows else "prefill"]

    def layer_seconds(self, tokens: np.ndarray | float) -> np.ndarray:
        """g: one layer of weight 1 over `tokens` tokens; 0 for none. Any shape."""
        tokens = np.asarray(tokens, dtype=np.float64)
        value = np.interp(tokens, KNOTS, self._g)
        if tokens.size and tokens.max() > KNOTS[-1]:
            slope = (self._g[-1] - self._g[-2]) / (KNOTS[-1] - KNOTS[-2])
            value = value + np.maximum(tokens - KNOTS[-1], 0.0) * slope
        return np.where(tokens > 0, value, 0.0)

    def layer_seconds_of(self, tokens: float) -> float:
        """`layer_seconds` of one number: a decision asks for too many single ones to build arrays of them."""
        return _at(tokens, *self._curves[0])

    def head_seconds_of(self, rows: float) -> float:
        return _at(rows, *self._curves[1])

    def tokens_within(self, seconds: float) -> float:
        """The inverse of g: tokens that one layer of weight 1 passes in `seconds`."""
        knots, g = self._inverse
        if seconds <= self._curves[0][1][0]:
            return 0.0
        if seconds >= g[-1]:
            slope = max((g[-1] - g[-2]) / (knots[-1] - knots[-2]), 1e-12)
            return knots[-1] + (seconds - g[-1]) / slope
        i = max(bisect(g, seconds), 1)
        return (knots[i] - knots[i - 1]) / (g[i] - g[i - 1]) * (seconds - g[i - 1]) + knots[i - 1]

    def head_seconds(self, rows: np.ndarray | float) -> np.ndarray:
        """h: norm, head and sampling of `rows` rows; 0 for none."""
        rows = np.asarray(rows, dtype=np.float64)
        value = np.interp(rows, HEAD_KNOTS, self._h)
        if rows.size and rows.max() > HEAD_KNOTS[-1]:
            slope = (self._h[-1] - self._h[-2]) / (HEAD_KNOTS[-1] - HEAD_KNOTS[-2])
            value = value + np.maximum(rows - HEAD_KNOTS[-1], 0.0) * slope
        return np.where(rows > 0, value, 0.0)

    # --- steps

    def shape(self, batch: ForwardBatch) -> StepShape:
        """Features of a batch that is about to run or has run."""
        if batch.layout and batch.layout == self._layout:
            # Everybody decodes, as in the step before: contexts are all that has changed.
            features = self._layout_features.copy()
            features[_DECODE_CONTEXT] = batch.sizes @ batch.context_lens.astype(np.float64)
            return StepShape(features, "decode")
        # Segments and head are often those of a step not long ago.
        key = (batch.program, batch.query_start.tobytes(), int(batch.logits_start[batch.head_cut]))
        key += (len(batch.logits_rows),)
        features = self._weight_features.get(key)
        if features is None:
            if len(self._weight_features) >= 256:
                self._weight_features.clear()
            features = self._weight_features[key] = self._features_of_weights(batch)
        depths = batch.sizes if batch.depths is None else batch.depths
        shape = _with_requests(features, np.diff(batch.query_start), batch.context_lens, depths)
        if batch.layout:
            self._layout, self._layout_features = batch.layout, shape.features
        return shape

    def _features_of_weights(self, batch: ForwardBatch) -> np.ndarray:
        starts = batch.query_start.tolist()
        segments: dict[int, float] = {}
        num_teacher = self.profile.elasticity.num_teacher_layers
        for layer, start, stop, station, split in batch.program:
            tokens = starts[stop] - starts[start]
            segments[tokens] = segments.get(tokens, 0.0) + self._weights[layer]
            if split is not None:
                tokens = starts[stop] - starts[split]
                segments[tokens] = segments.get(tokens, 0.0) + self._weights[num_teacher + station]
        head_rows = int(batch.logits_start[batch.head_cut])
        if self.profile.shared_head:
            head_rows = len(batch.logits_rows)
        return _weight_features(segments, [n for n in (head_rows, len(batch.logits_rows) - head_rows) if n])

    def shape_of(
        self,
        counts: np.ndarray,
        context_lens: np.ndarray,
        sizes: np.ndarray,
        segments: dict[int, float],
        head_rows: list[int],
    ) -> StepShape:
        """`counts`, `context_lens`, `sizes` per request; `segments`: tokens -> summed layer weight."""
        return _with_requests(_weight_features(segments, head_rows), counts, context_lens, sizes)

    def seconds(self, shape: StepShape) -> float:
        """Predicted seconds of one step in the model (without what is between steps)."""
        return float(shape.features @ self.coefficients) * self.correction[shape.kind]

    def observe(self, shape: StepShape, measured: float) -> float:
        """Learn from a step that took `measured` seconds; returns what had been predicted."""
        predicted = self.seconds(shape)
        self.errors[shape.kind].add(predicted, measured)
        self.errors["all"].add(predicted, measured)
        # Between fits a clipped multiplicative correction per kind follows the machine (a neighbour on the other core).
        ratio = min(max(measured / max(predicted, 1e-9), 0.7), 1.4)
        self.correction[shape.kind] = min(max(self.correction[shape.kind] * ratio**0.2, 0.25), 4.0)
        self._ring.append((shape, measured))
        self.num_observed += 1
        self._since_fit += 1
        if self._since_fit >= self._refit_every:
            self.refit()
            self._refit_every = min(self._refit_every * 2, _REFIT_AT_MOST)
        return predicted

    def refit(self, half_life: float = 256.0) -> None:
        """Fit the coefficients to recent steps, drawn to the prior; a step counts half `half_life` steps later.

        The fit is robust and so finds the typical step; slow ones are longer than fast ones are short. `correction`
        then brings sums of steps to what they were, kind by kind.
        """
        self._since_fit = 0
        features = np.stack([shape.features for shape, _ in self._ring])
        seconds = np.fromiter((t for _, t in self._ring), np.float64, len(self._ring))
        kinds = np.array([shape.kind for shape, _ in self._ring])
        weights = 0.5 ** (np.arange(len(seconds))[::-1] / half_life)
        self.set_coefficients(fit(features, seconds, self.prior, weights=weights, start=self.coefficients))
        predicted = features @ self.coefficients
        for kind in KINDS:
            own = weights * (kinds == kind)
            # Eight steps' worth of doubt keeps a kind that was hardly seen at 1.
            doubt = 8.0 * float(predicted.mean())
            self.correction[kind] = (own @ np.minimum(seconds, 1.5 * predicted) + doubt) / (own @ predicted + doubt)

    def observe_overhead(self, seconds: float, num_requests: int) -> None:
        """Time around a step of `num_requests`: scheduling, building the batch, handing out tokens."""
        expected = self.overhead + self.overhead_per_request * num_requests
        error = min(seconds, 4 * expected + 1e-3) - expected
        # Normalised least mean squares; 32 requests weigh as much as the constant.
        x = num_requests / 32
        step = 0.03 * error / (1.0 + x * x)
        self.overhead = max(self.overhead + step, 0.0)
        self.overhead_per_request = max(self.overhead_per_request + step * x / 32, 0.0)


def _weight_features(segments: dict[int, float], head_rows: list[int]) -> np.ndarray:
    """Features of what is read and multiplied once for all rows: layers and head."""
    x = np.zeros(NUM_FEATURES)
    x[0] = 1.0
    if segments:
        tokens = np.fromiter(segments.keys(), np.float64, len(segments))
        weights = np.fromiter(segments.values(), np.float64, len(segments))
        x[_G] = weights @ ramps(tokens, KNOTS)
    if head_rows:
        x[_H] = ramps(np.asarray(head_rows, np.float64), HEAD_KNOTS).sum(axis=0)
    return x


def _with_requests(features: np.ndarray, counts: np.ndarray, context_lens: np.ndarray, sizes: np.ndarray) -> StepShape:
    """The step whose requests have `counts` tokens and, after it, `context_lens`, and run `sizes` layers."""
    x = features.copy()
    decode = counts == 1
    layer_context = sizes * np.asarray(context_lens, np.float64)
    num_decode = int(np.count_nonzero(decode))
    if num_decode == len(counts):
        x[_DECODE_CONTEXT] = layer_context.sum()
        kind = "decode"
    else:
        x[_DECODE_CONTEXT] = layer_context[decode].sum()
        x[_PREFILL_CONTEXT] = (sizes * counts * (context_lens - counts * 0.5))[~decode].sum()
        kind = "mixed" if num_decode else "prefill"
    x[_REQUEST_LAYERS] = sizes.sum()
    return StepShape(x, kind)


def _slopes(values: np.ndarray) -> np.ndarray:
    """Of a function given at KNOTS, from every knot on; behind the last one the last slope."""
    slopes = np.diff(values) / np.diff(KNOTS)
    return np.append(slopes, slopes[-1])


def _at(x: float, knots: list[float], values: list[float]) -> float:
    """A monotone piecewise-linear function that goes on with its last slope; 0 for x <= 0."""
    if x <= knots[0]:
        return values[0] if x > 0 else 0.0
    i = min(bisect_left(knots, x), len(knots) - 1)
    return values[i - 1] + (values[i] - values[i - 1]) * (x - knots[i - 1]) / (knots[i] - knots[i - 1])


def fit(
    features: np.ndarray,
    seconds: np.ndarray,
    prior: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    start: np.ndarray | None = None,
    ridge: float = 0.02,
    sweeps: int = 40,
) -> np.ndarray:
    """Non-negative coefficients with the least robust relative error on [n, F] steps, drawn to `prior`.

    Minimises sum w (x.c / t - 1)^2 + ridge * sum(w) / F * ((c - prior) / scale)^2 by coordinate descent, with Huber
    weights from two passes.
    """
    scale = np.maximum(prior, np.max(prior) * 1e-9)
    design = features * scale / seconds[:, None]
    base = np.ones(len(seconds)) if weights is None else weights
    anchor = prior / scale
    value = anchor.copy() if start is None else start / scale
    robust = np.ones(len(seconds))
    for _ in range(3):
        w = base * robust
        pull = ridge * w.sum() / design.shape[1]
        gram = (design * w[:, None]).T @ design + pull * np.eye(design.shape[1])
        target = design.T @ w + pull * anchor
        diagonal = np.diag(gram)
        for _ in range(sweeps):
            change = 0.0
            for j in range(len(value)):
                new = max(value[j] + (target[j] - gram[j] @ value) / diagonal[j], 0.0)
                change = max(change, abs(new - value[j]))
                value[j] = new
            if change < 1e-4:
                break
        residual = np.abs(design @ value - 1.0)
        robust = np.minimum(1.0, _HUBER / np.maximum(residual, 1e-9))
    return value * scale
