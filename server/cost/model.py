"""Predicts how long a step takes, and learns from steps. Numpy; what decides in plain numbers uses `StepPrice`.

A step takes features x coefficients (`server.cost.features`), times a correction for its kind. The two functions among
the parts are monotone piecewise-linear on fixed knots, so they follow whatever the machine does between the
memory-bound and the compute-bound end (a roofline's max, its sum, cliffs of a kernel's tiles) instead of assuming one.
All coefficients are non-negative seconds and enter linearly: a handful of calibration steps fits them, a ring of
recent steps corrects them.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from server.core.step_times import KINDS, ErrorStats, StepShape
from server.cost.best import BestEver
from server.cost.curve import Curve
from server.cost.features import (
    AT,
    HEAD_KNOTS,
    KNOTS,
    NARROW_HEAD_KNOTS,
    NARROW_KNOTS,
    Union,
    layout,
    step_shape,
    union,
    weight_features,
)
from server.cost.profile import CostProfile

if TYPE_CHECKING:
    from server.core.batch import ForwardBatch

_REFIT_EVERY = 64  # observed steps between fits while young; grows to _REFIT_AT_MOST
_REFIT_AT_MOST = 512
_KEPT_SLOWDOWN = 1.5
_HUBER = 0.15  # relative residual beyond which a step counts as an outlier


class CostModel:
    """Coefficients in seconds, and their correction from measured steps."""

    def __init__(self, profile: CostProfile, coefficients: np.ndarray) -> None:
        self.profile, self.at = profile, layout(profile.widths)
        assert coefficients.shape == (self.at.size,) and (coefficients >= 0).all()
        self.prior = coefficients.copy()  # what fits are drawn to where no step tells
        self.correction = dict.fromkeys(KINDS, 1.0)  # follows drift between fits
        self.spread: dict[str, list[float]] = {}  # by kind, `ErrorStats.spread` of the run that saved this model
        # Seconds between the end of one model call and the start of the next, while busy: always, and per request.
        self.overhead = self.overhead_per_request = 0.0
        self.errors = {kind: ErrorStats() for kind in ("all", *KINDS)}
        self.num_observed = 0
        self.best = BestEver(coefficients)
        self._ring: deque[tuple[StepShape, float]] = deque(maxlen=2048)
        self.path: Path | None = None  # where it is kept
        self._since_fit = 0
        self._refit_every = _REFIT_EVERY
        self._weights = profile.layer_weights
        self._weight_features: dict[tuple[object, ...], np.ndarray] = {}  # of recent batches, by what they come from
        self._layout: tuple[int, bytes] = (0, b"")  # of the last batch that had one, and its widths
        self._layout_features = np.zeros(self.at.size)
        self.set_coefficients(coefficients)

    def fresh(self) -> CostModel:
        """A model that knows the same machine and has seen no step yet."""
        own = CostModel(self.profile, self.coefficients.copy())
        own.correction.update(self.correction)
        own.overhead, own.overhead_per_request = self.overhead, self.overhead_per_request
        return own

    def beside(self, profile: CostProfile) -> CostModel:
        """What is known of this machine, for the same teacher beside another student."""
        # The weight of a layer is its share of the heaviest one, which may be another now.
        scale = np.ones(self.at.size)
        for layers in (self.at.layers, *(layers for layers, _ in self.at.narrow.values())):
            scale[layers] = profile.reference_bytes / self.profile.reference_bytes
        own = CostModel(profile, self.coefficients * scale)
        own.correction.update(self.correction)
        own.overhead, own.overhead_per_request = self.overhead, self.overhead_per_request
        own.best = BestEver.from_json(self.best.to_json())
        own.best.coefficients *= scale
        return own

    def at_best(self) -> CostModel:
        """What this machine has been measured to be able to do, as a model of its own."""
        own = CostModel(self.profile, self.best.coefficients)
        own.correction.update(self.best.scale)
        own.overhead = self.best.overhead
        return own

    def set_coefficients(self, coefficients: np.ndarray) -> None:
        self.coefficients = coefficients
        self.layer = Curve(KNOTS, coefficients[AT.layers])  # of one layer of weight 1, by tokens
        self.head = Curve(HEAD_KNOTS, coefficients[AT.head])  # by rows
        widest = self.profile.widths[-1]
        self.layers, self.heads = {widest: self.layer}, {widest: self.head.at(KNOTS)}  # by width, on the same knots
        for width, (layers, head) in self.at.narrow.items():
            self.layers[width] = Curve(NARROW_KNOTS, coefficients[layers]).at(KNOTS)
            self.heads[width] = Curve(NARROW_HEAD_KNOTS, coefficients[head]).at(KNOTS)
        self.fixed = float(coefficients[AT.fixed])
        self.decode_context = float(coefficients[AT.decode_context])  # s per layer and context token of a decode row
        # Seconds per layer, chunk token and context token of a prompt chunk
        self.prefill_context = float(coefficients[AT.prefill_context])
        self.request_layers = float(coefficients[AT.request_layers])  # s per layer of a request

    def prompt_scale(self, rows: float) -> float:
        """The correction of steps with prompts beside `rows` that decode."""
        return self.correction["mixed" if rows else "prefill"]

    # --- steps

    def shape(self, batch: ForwardBatch) -> StepShape:
        """Features of a batch that is about to run or has run."""
        widths = b"" if batch.widths is None or len(self.profile.widths) == 1 else batch.widths.tobytes()
        if batch.layout and (batch.layout, widths) == self._layout:
            # Everybody decodes, as in the step before: contexts are all that has changed.
            features = self._layout_features.copy()
            features[AT.decode_context] = batch.sizes @ batch.context_lens.astype(np.float64)
            return StepShape(features, "decode")
        # Segments and head are often those of a step not long ago.
        num_logits = len(batch.logits_rows)
        key = (batch.program, batch.query_start.tobytes(), int(batch.logits_start[batch.head_cut]), num_logits, widths)
        of_weights = self._weight_features.get(key)
        if of_weights is None:
            if len(self._weight_features) >= 256:
                self._weight_features.clear()
            of_weights = self._weight_features[key] = self._features_of_weights(batch)
        depths = batch.sizes if batch.depths is None else batch.depths
        shape = step_shape(of_weights, np.diff(batch.query_start), batch.context_lens, depths)
        if batch.layout:
            self._layout, self._layout_features = (batch.layout, widths), shape.features
        return shape

    def _features_of_weights(self, batch: ForwardBatch) -> np.ndarray:
        tokens, rows = self._by_width(batch, batch.query_start), self._by_width(batch, batch.logits_start)
        segments: dict[Union, float] = {}

        def add(start: int, stop: int, weight: float) -> None:
            for run in union({width: sums[stop] - sums[start] for width, sums in tokens.items()}):
                segments[run] = segments.get(run, 0.0) + weight

        num_teacher = self.profile.elasticity.num_teacher_layers
        for layer, start, stop, station, split in batch.program:
            add(start, stop, self._weights[layer])
            if split is not None:
                add(split, stop, self._weights[num_teacher + station])
        cut, end = batch.head_cut, len(batch.requests)
        parts = [(0, end)] if self.profile.shared_head else [(0, cut), (cut, end)]
        heads = [union({width: sums[b] - sums[a] for width, sums in rows.items()}) for a, b in parts]
        return weight_features(segments, [run for runs in heads for run in runs], self.profile.widths)

    def _by_width(self, batch: ForwardBatch, starts: np.ndarray) -> dict[int, list[int]]:
        """Width -> how many tokens (or whatever `starts` counts) of that width the first n rows have: [R + 1]."""
        widths = self.profile.widths
        if batch.widths is None or len(widths) == 1 or not len(batch.widths):
            return {widths[-1]: starts.tolist()}
        own, counts = np.minimum(batch.widths, widths[-1]), np.diff(starts)
        return {width: [0, *np.cumsum(np.where(own == width, counts, 0)).tolist()] for width in set(own.tolist())}

    def seconds(self, shape: StepShape) -> float:
        """Predicted seconds of one step in the model (without what is between steps)."""
        return float(shape.features @ self.coefficients) * self.correction[shape.kind]

    def observe(self, shape: StepShape, measured: float) -> float:
        """Learn from a step that took `measured` seconds; returns what had been predicted."""
        predicted = self.seconds(shape)
        self.errors[shape.kind].add(predicted, measured)
        self.errors["all"].add(predicted, measured)
        self.best.observe(shape, measured)
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

    def settle(self) -> None:
        """Make this what the next start may begin with: the machine as all recent steps found it, and at most
        `_KEPT_SLOWDOWN` times as slow as it has been measured to be able to run."""
        if self.num_observed < _REFIT_EVERY:
            return
        self.refit(half_life=math.inf)  # what the last minute was like is of no use to the next start
        shapes = [shape for shape, _ in self._ring]
        for kind, correction in self.correction.items():
            own = [shape for shape in shapes if shape.kind == kind] or shapes
            most = _KEPT_SLOWDOWN * sum(map(self.best.seconds, own))
            predicted = sum(float(shape.features @ self.coefficients) * correction for shape in own)
            self.correction[kind] = correction * min(most / predicted, 1.0)
        most = _KEPT_SLOWDOWN * self.best.overhead
        if self.overhead > most > 0.0:
            self.overhead_per_request *= most / self.overhead
            self.overhead = most

    def observe_overhead(self, seconds: float, num_requests: int) -> None:
        """Time around a step of `num_requests`: scheduling, building the batch, handing out tokens."""
        self.best.observe_overhead(seconds)
        expected = self.overhead + self.overhead_per_request * num_requests
        error = min(seconds, 4 * expected + 1e-3) - expected
        # Normalised least mean squares; 32 requests weigh as much as the constant.
        x = num_requests / 32
        step = 0.03 * error / (1.0 + x * x)
        self.overhead = max(self.overhead + step, 0.0)
        self.overhead_per_request = max(self.overhead_per_request + step * x / 32, 0.0)


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
