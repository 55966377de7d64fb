"""Fits the cost model to the machine at hand in a few seconds, and keeps it from one start to the next.

The steps that are timed are real ones: requests with pages of the runner's own KV pool, laid out by `build_batch` and
run by its executor and sampler. What is stored is keyed by everything that decides a step's time: the shapes
of the pair, the executor, data type, page size, threads and processor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from server.core.batch import ForwardBatch
from server.core.request import LiveRequest, Request, SamplingParams
from server.core.step_times import KINDS, StepShape
from server.core.width import EXACT
from server.cost.best import BestEver
from server.cost.features import (
    AT,
    HEAD_KNOTS,
    KNOTS,
    NARROW_HEAD_KNOTS,
    NARROW_KNOTS,
    Union,
    layout,
    weight_features,
)
from server.cost.model import CostModel, fit
from server.cost.profile import CostProfile

if TYPE_CHECKING:
    from model_store.pair import LoadedPair
    from model_store.spec import ModelSpec
    from server.core.executor import Executor
    from server.engine.runner import StepRunner

logger = logging.getLogger(__name__)

FORMAT = 4

# (requests, tokens each, context before, size) of one group. Sizes: t teacher, s student, or layers.
Group = tuple[int, int, int, str | int]
Step = tuple[int, list[Group]]  # width of all rows, and their groups


def profile_of(
    pair: LoadedPair,
    shared_stations: frozenset[int] = frozenset(),
    bytes_at: Mapping[int, float | None] | None = None,
    kv_bytes: int | None = None,
) -> CostProfile:
    """Bytes and shapes of a loaded pair; `shared_stations`, bytes of a weight by width (None: as it was loaded), and
    `kv_bytes` (K and V of one token of one layer) as the executor has them."""
    read = {EXACT: None} if bytes_at is None else bytes_at
    widths = tuple(sorted(read))
    widest = read[widths[-1]] or float(pair.ends["teacher"].head.dtype.itemsize)
    spec, elasticity = pair.spec, pair.elasticity
    num_layers = elasticity.num_teacher_layers
    item = pair.ends["teacher"].final_norm_weight.dtype.itemsize  # of K and V; weights may be quantized

    def num_bytes(layer: int) -> int:
        is_shared = layer - num_layers in shared_stations
        weights = pair.low_rank.get(layer) if is_shared else pair.layers.get(layer)
        return 0 if weights is None else sum(tensor.nbytes for tensor in weights.tensors())

    layer_bytes = [num_bytes(layer) for layer in range(num_layers + len(elasticity.stations))]
    return CostProfile(
        elasticity=elasticity,
        layer_bytes=tuple(layer_bytes),
        head_bytes=pair.ends["teacher"].head.nbytes,
        kv_bytes=kv_bytes or spec.kv_bytes_per_token_layer(item),
        attention_flops=4 * spec.num_heads * spec.head_dim,
        weight_bytes_per_parameter=widest,
        shared_head=pair.ends["teacher"].head is pair.ends["student"].head,
        shared_stations=shared_stations,
        widths=widths,
        width_bytes=tuple((read[width] or widest) / widest for width in widths),
    )


# --- what to time


def steps_to_time(max_num_seqs: int, max_tokens: int, max_len: int) -> list[list[Group]]:
    """Steps to time, the most telling first."""
    long = min(1024, max_len // 2)
    chunk = min(512, max_tokens, max_len - 1)
    steps: list[list[Group]] = [
        [(1, 1, 32, "t")],
        [(1, chunk, 0, "t")],
        [(min(16, max_num_seqs), 1, 64, "t")],
        [(1, 1, 32, "s")],
        [(1, min(64, chunk), 0, "t")],
        [(min(4, max_num_seqs), 1, 64, "t")],
        [(min(32, max_num_seqs), 1, 64, "t")],
        [(min(8, max_num_seqs), 1, long, "t")],
        [(1, min(16, chunk), 0, "t")],
        [(1, min(128, chunk, max_len - long), long, "t")],
        [(min(8, max_num_seqs // 2), 1, 64, "t"), (min(8, max_num_seqs // 2), 1, 64, "s")],
        [(min(2, max_num_seqs), 1, 64, "t")],
        [(min(8, max_num_seqs), 1, 64, "t")],
        [(min(8, max_num_seqs - 1), 1, 64, "t"), (1, min(128, chunk - 8), 0, "s")],
        [(1, min(256, chunk), 0, "t")],
        [(min(64, max_num_seqs), 1, 64, "t")],
        [(1, min(256, chunk), 0, "s")],
        [(min(4, max_num_seqs), min(32, chunk // 4), 0, "t")],
        [(min(16, max_num_seqs), 1, long, "s")],
        [(1, min(max_tokens, max_len - 1), 0, "t")],
    ]
    if max_num_seqs > 64:
        steps += [[(min(128, max_num_seqs), 1, 64, "t")], [(min(256, max_num_seqs), 1, 64, "t")]]
    return [[group for group in step if group[0] > 0 and group[1] > 0] for step in steps]


def narrow_steps(widths: tuple[int, ...], max_num_seqs: int, max_tokens: int, max_len: int) -> list[Step]:
    """Steps to time at each narrower width, the most telling first: what differs is weights alone."""
    chunk = min(256, max_tokens, max_len - 1)
    groups: list[Group] = [
        (1, 1, 32, "t"),
        (1, min(64, chunk), 0, "t"),
        (min(16, max_num_seqs), 1, 64, "t"),
        (min(4, max_num_seqs), 1, 64, "t"),
        (1, chunk, 0, "t"),
        (min(64, max_num_seqs), 1, 64, "t"),
    ]
    return [(width, [group]) for group in groups for width in reversed(widths[:-1])]


def batches(runner: StepRunner, steps: Iterable[Step]) -> Iterator[ForwardBatch]:
    """The steps as batches, with pages from the pool while each one is out."""
    kv_cache, elasticity = runner.kv_cache, runner.elasticity
    sides = {"t": runner.sizes[-1], "s": runner.sizes[0]}
    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=4)
    for width, step in steps:
        scheduled: list[tuple[LiveRequest, int]] = []
        try:
            for count, tokens, context, side in step:
                for _ in range(count):
                    prompt = rng.integers(0, runner.spec.vocab_size, context + tokens).tolist()
                    name = f"calibration-{len(scheduled)}"
                    size = side if isinstance(side, int) else sides[side]
                    request = LiveRequest(Request(name, prompt, sampling, sizes=(size,), arrival_time=0.0))
                    request.path, request.slot = elasticity.path(size), len(scheduled)
                    request.width = width
                    if not kv_cache.allocate(request, context + tokens):
                        break
                    request.num_computed_tokens = context
                    scheduled.append((request, tokens))
            if scheduled:
                yield runner.build_batch(scheduled)
        finally:
            for request, _ in scheduled:
                kv_cache.free(request)


def calibrate(
    runner: StepRunner, profile: CostProfile, *, seconds: float = 3.0, clock: Callable[[], float] = time.perf_counter
) -> CostModel:
    """Time steps on an idle runner for about `seconds`, beside what compiling takes, and fit. Overwrites the pool."""
    config, widths = runner.config, profile.widths
    limits = config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len
    plans = [(seconds, 5, [(widths[-1], groups) for groups in steps_to_time(*limits)])]
    plans.append((0.3 * seconds * (len(widths) - 1), 3 * (len(widths) - 1), narrow_steps(widths, *limits)))
    features: list[np.ndarray] = []
    times: list[float] = []
    blank = CostModel(profile, np.zeros(layout(widths).size))
    begun, beside = clock(), 0.0
    for budget, least, steps in plans:
        deadline = clock() + budget
        for index, batch in enumerate(batches(runner, steps), 1):
            took: list[float] = []
            for _ in range(3):
                started = clock()
                runner.run(batch)
                took.append(clock() - started)
                if len(took) > 1 and (clock() > deadline or took[-1] > 0.25):
                    break
            # The first run of a shape pays for page faults and, on some executors, for compilation.
            best = min(took[1:])
            deadline += max(took[0] - best, 0.0)
            beside += max(took[0] - best, 0.0)
            features.append(blank.shape(batch).features)
            times.append(best)
            if clock() > deadline and index >= least:
                break
    x, t = np.stack(features), np.asarray(times)
    model = CostModel(profile, fit(x, t, prior_from(profile, x, t), ridge=0.01, sweeps=400))
    error = np.abs(x @ model.coefficients / t - 1.0)
    logger.info(
        "cost model: fitted to %d steps in %.1f s, median error %.0f %%, worst %.0f %%",
        len(t), clock() - begun - beside, 100 * np.median(error), 100 * error.max(),
    )  # fmt: skip
    return model


def prior_from(profile: CostProfile, features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Coefficients guessed from the first two timed steps: one decode row, one large prompt, both at full size.

    The first gives the bandwidth (all weights are read once), the second the rate of products; the rest follows from
    the shapes, as in a roofline's sum.
    """
    weights = profile.layer_weights[: profile.elasticity.num_teacher_layers].sum()
    head = profile.head_bytes / profile.reference_bytes
    read = 0.8 * seconds[0] / (weights + head)  # of one layer
    # tokens of the large prompt, recovered from its ramp features: weight(layers) * sum of ramps over their spans
    spans = np.diff(KNOTS)
    tokens = 1.0 + float(features[1, AT.layers][1:] @ spans) / weights
    product = max(seconds[1] - seconds[0], 0.2 * seconds[1]) / (weights * max(tokens, 2.0))  # of one layer and token
    parameters = profile.reference_bytes / profile.weight_bytes_per_parameter
    at = layout(profile.widths)
    prior = np.zeros(at.size)
    prior[AT.fixed] = 0.1 * seconds[0]
    prior[AT.layers] = [read, *(product * spans)]
    prior[AT.head] = [read * head, *(product * head * np.diff(HEAD_KNOTS))]
    prior[AT.decode_context] = read * profile.kv_bytes / profile.reference_bytes
    prior[AT.prefill_context] = product * profile.attention_flops / (2.0 * parameters)
    prior[AT.request_layers] = 0.02 * read
    for share, (layers, own_head) in zip(profile.width_bytes, at.narrow.values(), strict=False):
        prior[layers] = [share * read, *(product * np.diff(NARROW_KNOTS))]
        prior[own_head] = [share * read * head, *(product * head * np.diff(NARROW_HEAD_KNOTS))]
    return prior


# --- from one start to the next


def calibration_key(spec: ModelSpec, executor: Executor, profile: CostProfile, page_size: int) -> str:
    """Hex digest of what decides a step's time."""
    facts = [
        FORMAT, repr(spec), profile.layer_bytes, profile.elasticity.thresholds, profile.head_bytes,
        sorted(profile.shared_stations), profile.widths, profile.width_bytes,
        profile.kv_bytes, executor.describe(), page_size,
        processor_name(), os.cpu_count(), os.environ.get("OMP_NUM_THREADS"),
    ]  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def save(model: CostModel, path: Path) -> None:
    """Write what has been learned; replaces the file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "processor": processor_name(),
        "profile": model.profile.to_json(),
        "coefficients": model.coefficients.tolist(),
        "prior": model.prior.tolist(),
        "correction": model.correction,
        "overhead": model.overhead,
        "overhead_per_request": model.overhead_per_request,
        "spread": {kind: stats.spread() for kind, stats in model.errors.items() if stats.recent} or model.spread,
        "num_observed": model.num_observed,
        "best": model.best.to_json(),
    }
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    scratch.replace(path)


def from_json(content: Mapping[str, Any], profile: CostProfile | None = None) -> CostModel:
    """The cost model that `save` wrote, for the pair it was saved with or `profile`. ValueError if it is none."""
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        profile = profile or CostProfile.from_json(content["profile"])
        coefficients, prior = np.asarray(content["coefficients"]), np.asarray(content["prior"])
        best, shape = BestEver.from_json(content["best"]), (layout(profile.widths).size,)
        if any(values.shape != shape for values in (coefficients, prior, best.coefficients)):
            raise ValueError("a wrong number of coefficients")
        for values in (coefficients, best.coefficients):
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError("coefficients that are not finite or below 0")
        model = CostModel(profile, coefficients)
        model.prior, model.best = prior, best
        model.correction.update({kind: float(content.get("correction", {}).get(kind, 1.0)) for kind in KINDS})
        model.overhead = float(content["overhead"])
        model.overhead_per_request = float(content.get("overhead_per_request", 0.0))
        model.spread = {kind: [float(ratio) for ratio in ratios] for kind, ratios in content.get("spread", {}).items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"no calibration: {type(error).__name__}: {error}") from None
    return model


def load(profile: CostProfile | None, path: Path) -> CostModel | None:
    """What a former run saved, or None if there is nothing usable. `profile` None: the one it was saved with."""
    try:
        model = from_json(json.loads(path.read_text()), profile)
    except (OSError, ValueError):
        return None
    model.path = path
    return model


def cost_model_for(runner: StepRunner, pair: LoadedPair, folder: Path | None, *, seconds: float = 3.0) -> CostModel:
    """The saved model if there is one and a quick check agrees with it, else a fresh calibration (saved).

    `folder` is where calibrations are kept (None: nowhere).
    """
    profile, path = place_of(pair, runner.executor, runner.config.page_size, folder)
    model = load(profile, path) if path is not None else None
    if model is not None:
        ratio = _check(runner, model)
        if 0.5 < ratio < 2.0:
            logger.info("cost model: taken from %s (predicts %.2f of a quick check's time)", path, ratio)
            return model
        logger.info("cost model: %s does not fit this machine any more, calibrating", path)
    fresh = calibrate(runner, profile, seconds=seconds)
    if model is not None:
        top = profile.elasticity.sizes[-1]
        widths = profile.widths
        run = Union(widths[-1], 1, 0)
        one_row = StepShape(weight_features({run: profile.path_weights()[top]}, [run], widths), "decode")
        if model.best.seconds(one_row) < fresh.best.seconds(one_row):
            fresh.best = model.best  # the machine has been faster than it is now
    model = fresh
    model.path = path
    keep(model)
    return model


def place_of(
    pair: LoadedPair, executor: Executor, page_size: int, folder: Path | None
) -> tuple[CostProfile, Path | None]:
    """The profile of a pair as this executor runs it, and the file in `folder` where its cost model is kept."""
    read = {width: executor.bytes_per_weight_at(width) for width in executor.widths}
    profile = profile_of(pair, executor.shared_stations, read, executor.page_bytes() // page_size)
    if folder is None:
        return profile, None
    return profile, folder / f"{calibration_key(pair.spec, executor, profile, page_size)}.json"


def _check(runner: StepRunner, model: CostModel) -> float:
    """Predicted over measured time of one decode row. Milliseconds: a server is waiting to start.

    That one step reads all weights, so it tells another machine from this one; finer differences are left to the
    correction that goes on while serving.
    """
    for batch in batches(runner, [(runner.executor.widths[-1], [(1, 1, 32, "t")])]):
        took = []
        for _ in range(4):
            started = time.perf_counter()
            runner.run(batch)
            took.append(time.perf_counter() - started)
        return model.seconds(model.shape(batch)) / min(took[1:])
    return 1.0  # a KV pool too small for one block: nothing to measure with


def keep(model: CostModel) -> None:
    """Save to where the model belongs; a store that cannot be written is worth a warning, no more."""
    if model.path is not None:
        try:
            save(model, model.path)
            logger.info("cost model: kept in %s", model.path)
        except OSError as error:
            logger.warning("cost model: cannot write %s: %s", model.path, error)
