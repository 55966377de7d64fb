"""From settings to a model that can serve: load the pair, size the KV cache, build the engine and its policy."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_store.arrays import need_torch
from model_store.store import store_root
from server.api.generate.catalog import Catalog, size_infos
from server.api.generate.sampling_defaults import read_sampling_defaults
from server.api.generate.tokenizer import ServingTokenizer
from server.api.http.auth import KeyRing
from server.api.http.state import ServedModel
from server.config import GiB, Settings
from server.core.machine import available_memory
from server.core.width import EXACT
from server.engine.queue import WaitingQueue
from server.forms import load_weights, open_settings_pair, pick_device, weight_form
from server.kernels.threads import available_threads
from server.observe.startup import StartupClock
from server.sizing.points import points_of, write_points
from server.sizing.spec import SizeError, SizeSpec, describe_widths, parse_precision
from server.sizing.tenants import Tenants

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from model_store.loaded import LoadedPair
    from model_store.pair import Pair
    from model_store.weight_form import WeightForm
    from server.core.config import EngineConfig
    from server.core.executor import Executor
    from server.core.size_policy import SizePolicy
    from server.cost.frontier import QualityTable
    from server.engine.runner import StepRunner
    from server.engine.sleep import Sleeper
    from server.engine.stats import MetricsSink

logger = logging.getLogger(__name__)

_KV_SHARE, _KV_CAP_CPU = 0.4, 4 * GiB  # of what is free; a server is seldom alone on a CPU machine
_DEFAULT_CONTEXT = 8192


def speculation(settings: Settings, pair: Pair) -> tuple[int | None, int | None]:
    """(size, width) that guess, where None is the request's own; ValueError if they could guess for none."""
    text, sizes = settings.speculative_size.strip().lower(), pair.elasticity.sizes
    if text == "off":
        return None, None
    if text == "auto":
        return (sizes[0] if len(sizes) > 1 else None), None
    try:
        if text.startswith("q"):
            size, width = sizes[-1], parse_precision(text)
        else:
            spec = SizeSpec.parse(text)
            size, width = spec.resolve(sizes, {size: pair.parameters(size) for size in sizes}), spec.width
        widths = (EXACT,) if width in (None, EXACT) else weight_form(settings, pair).widths
        if width is not None and width not in widths:
            raise SizeError(f"precisions are {describe_widths(widths)} (--precision-dial)")
    except SizeError as error:
        raise ValueError(f"--speculative-size: {error}") from None
    if size < sizes[-1]:
        return size, width
    if width in (None, widths[-1]):
        raise ValueError(f"--speculative-size: {text} is all that there is, it can guess for none")
    return None, width


def engine_config(settings: Settings, pair: Pair, dtype: np.dtype, device: str) -> EngineConfig:
    """Fill in what the settings leave to the machine. Called after the weights are loaded: free memory is measured."""
    from server.core.config import EngineConfig
    from server.kernels.cuda.memory import workspace_bytes

    is_cuda = device != "cpu"
    guessing_size, guessing_width = speculation(settings, pair)
    max_model_len = settings.max_model_len or min(_DEFAULT_CONTEXT, pair.spec.max_context)
    if max_model_len > pair.spec.max_context:
        raise ValueError(f"--max-model-len {max_model_len} is above the {pair.spec.max_context} that the model can do")
    max_num_seqs = settings.max_num_seqs or (256 if is_cuda else 64)
    token_bytes = pair.elasticity.sizes[-1] * pair.spec.kv_bytes_per_token_layer(
        dtype.itemsize, settings.kv_cache_dtype
    )
    most = max_num_seqs * max_model_len * token_bytes
    max_num_batched_tokens = settings.max_num_batched_tokens or (8192 if is_cuda else 1024)
    free = _free_bytes(settings, device)
    if is_cuda:
        sizes, num_blocks = pair.elasticity.sizes, -(-max_model_len // settings.page_size)
        free -= workspace_bytes(
            pair.spec,
            max_tokens=max_num_batched_tokens * sizes[-1] // sizes[0],
            max_num_seqs=max_num_seqs,
            table_entries=2 * pair.elasticity.num_global_layers * max_num_seqs * num_blocks,
            bytes_per_value=dtype.itemsize,
        )
    state_bytes = settings.size_change_memory
    if state_bytes is None:
        state_bytes = (
            0
            if is_cuda
            else (  # no executor there keeps states of a request that decodes
                settings.kv_cache_memory or min(max(free, 0), most)
            )
            // 16
        )
    kv_bytes = settings.kv_cache_memory or min(free - state_bytes, most)
    if kv_bytes <= 0:
        raise ValueError(
            f"no memory is left for the KV cache on {device}: raise --gpu-memory-utilization, lower "
            "--max-num-batched-tokens or --max-num-seqs, or bound the weights with --memory-budget"
        )
    if kv_bytes < max_model_len * token_bytes:
        logger.warning(
            "the KV cache of %.2f GiB holds fewer than max_model_len (%d) tokens at full size; long requests will be "
            "refused or shrunk: raise --kv-cache-memory or lower --max-model-len",
            kv_bytes / GiB,
            max_model_len,
        )
    if not is_cuda and kv_bytes + state_bytes > (ram := available_memory(settings.max_replicas)):
        # Memory is committed on first use: without this warning, the first sign would be an OOM kill under load.
        logger.warning(
            "--kv-cache-memory: the KV cache may grow to %.2f GiB and %.2f GiB are available: lower it",
            (kv_bytes + state_bytes) / GiB,
            ram / GiB,
        )
    return EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        page_size=settings.page_size,
        kv_cache_bytes=kv_bytes,
        kv_cache_dtype=settings.kv_cache_dtype,
        state_bytes=state_bytes,
        compress_weights=settings.weight_compression == "auto",
        enable_prefix_caching=settings.enable_prefix_caching,
        executor=settings.executor,
        enforce_eager=settings.enforce_eager,
        speculative_size=guessing_size,
        speculative_width=guessing_width,
        num_speculative_tokens=settings.num_speculative_tokens,
        seed=settings.seed,
        num_threads=settings.num_threads or available_threads(settings.max_replicas),
    )


def _free_bytes(settings: Settings, device: str) -> int:
    """Bytes that the KV cache may take by default."""
    if device != "cpu":
        free, total = need_torch(device).cuda.mem_get_info(device)
        return max(int(free - (1 - settings.gpu_memory_utilization) * total), 0)
    return min(int(available_memory(settings.max_replicas) * _KV_SHARE), _KV_CAP_CPU)


def load_model(
    settings: Settings, clock: StartupClock | None = None, metrics: MetricsSink | None = None
) -> ServedModel:
    """Open and load the pair and build its engine. Takes seconds to minutes; raises with a reason if it cannot.

    `metrics` hears of the engine's steps and requests.
    """
    clock = clock or StartupClock()
    from server.engine.engine import Engine
    from server.engine.runner import StepRunner

    clock.mark("engine's modules")
    pair = open_settings_pair(settings)
    check_sizes(settings, pair)
    template = read_template(settings.chat_template)
    folders = [pair.tokenizer_path, pair.notes_path] if settings.generation_config == "auto" else []
    defaults = read_sampling_defaults(folders, settings.override_generation_config)
    floor = sleep_size(settings, pair)
    form, device = weight_form(settings, pair), pick_device(settings)
    loaded = load_weights(settings, pair, form, device)
    clock.mark("weights")
    config = engine_config(settings, pair, form.dtype, device)
    runner = StepRunner(loaded, config)
    clock.mark("executor and KV cache")
    tokenizer = ServingTokenizer.from_folder(
        pair.tokenizer_path,
        chat_template=template,
        vocab_size=pair.spec.vocab_size,
        store=settings.store,
    )
    if settings.default_max_tokens is not None:
        defaults = dataclasses.replace(defaults, max_new_tokens=settings.default_max_tokens)
    if text := defaults.described():
        logger.info("sampling defaults: %s", text)
    catalog = make_catalog(settings, pair, loaded, runner.executor, form, config)
    tenants = KeyRing.from_settings(settings).sizing(resolver(catalog))
    clock.mark("tokenizer and tables")
    policy = make_policy(runner, loaded, pair, settings, tenants)
    catalog = with_points(settings, pair, catalog, policy)
    queue = WaitingQueue(tenants.weight, tenants.rank)
    sleeper = None if floor is None else make_sleeper(settings, pair, loaded, runner, form, floor)
    engine = Engine(loaded, config, policy=policy, queue=queue, runner=runner, metrics=metrics, sleeper=sleeper)
    clock.mark("cost model")
    logger.info(
        "%s: sizes %dL to %dL, %s on %s, context %d, KV cache %.2f GiB",
        catalog.name,
        engine.sizes[0],
        engine.sizes[-1],
        form,
        device,
        config.max_model_len,
        config.kv_cache_bytes / GiB,
    )
    model = ServedModel(engine, tokenizer, catalog, fingerprint(pair, form), tenants, resolver(catalog), defaults)
    model.pair, model.loaded = pair, loaded
    return model


def resolver(catalog: Catalog) -> Callable[[Any], int]:
    """Sizes that API keys name, in layers."""
    return lambda size: catalog.resolve(SizeSpec.parse(size), "--api-key-file")


def make_catalog(
    settings: Settings, pair: Pair, loaded: LoadedPair, executor: Executor, form: WeightForm, config: EngineConfig
) -> Catalog:
    """What a pair offers as this executor runs it; `with_points` adds what each point is worth."""
    from model_store.nested import bytes_read

    lies = dataclasses.replace(executor.weight_form, kv_cache_dtype=form.kv_cache_dtype)
    return Catalog(
        names=tuple(dict.fromkeys(settings.served_model_name or (pair.name,))),
        infos=size_infos(pair.size_table(lies, executor.matrix_bytes)),
        sizes=tuple(loaded.sizes),
        widths=executor.widths,
        bytes_per_weight={
            width: executor.bytes_per_weight_at(width)
            or (float(form.dtype.itemsize) if width == EXACT else bytes_read(width))
            for width in executor.widths
        },
        missing=loaded.missing_sizes,
        max_model_len=config.max_model_len,
        page_size=config.page_size,
        root=str(settings.teacher or pair.name),
        total_bytes=pair.union_bytes(loaded.sizes, executor.weight_form, executor.matrix_bytes),
    )


def with_points(settings: Settings, pair: Pair, catalog: Catalog, policy: SizePolicy | None) -> Catalog:
    """The catalog with what is known of every point that is served; left in the store, too, where width is a dial."""
    from server.sizing.policy import BudgetPolicy

    quality = quality_of(pair, catalog.widths)
    table = policy.table if isinstance(policy, BudgetPolicy) else None
    best, seconds = (table.best_in(catalog.sizes), table.seconds_in(catalog.sizes)) if table else ({}, {})
    points = points_of(quality, best, catalog.sizes, catalog.widths, seconds)
    catalog = dataclasses.replace(catalog, points=points)
    if len(catalog.widths) > 1:
        write_points(points_file(settings.store, pair), catalog.points)
    return catalog


def quality_of(pair: Pair, widths: Sequence[int]) -> QualityTable:
    """KL by size and width."""
    from server.sizing.quality import quality_table

    return quality_table(pair.quality, pair.kinds, pair.elasticity.sizes, widths)


def sleep_size(settings: Settings, pair: Pair) -> int | None:
    """The size that answers while the others sleep; None: they never do. ValueError if there is nothing to sleep to."""
    if settings.sleep_after is None and not settings.enable_sleep_mode:
        return None
    sizes = pair.elasticity.sizes
    floor = sizes[0]
    if settings.min_size is not None and not (spec := SizeSpec.parse(settings.min_size)).is_auto:
        floor = spec.resolve(sizes, {size: pair.parameters(size) for size in sizes})
    if floor == sizes[-1]:
        why = "a teacher without a student has one size only" if len(sizes) == 1 else f"--min-size is {floor}L"
        raise ValueError(f"{_sleep_flag(settings)}: there is no smaller size to sleep to: {why}")
    return floor


def _sleep_flag(settings: Settings) -> str:
    return "--enable-sleep-mode" if settings.sleep_after is None else "--sleep-after"


def make_sleeper(
    settings: Settings, pair: Pair, loaded: LoadedPair, runner: StepRunner, form: WeightForm, floor: int
) -> Sleeper:
    """Gives back what sizes above `floor` need. ValueError if nothing can be given back."""
    from model_store import nested_store
    from model_store.blocks import BlockReader, stages_above
    from model_store.store import store_root
    from model_store.weight_form import Storage
    from server.engine.sleep import Sleeper

    if not runner.executor.can_release:
        raise ValueError(f"{_sleep_flag(settings)}: the {runner.executor.name} executor cannot give weights back here")
    stages = stages_above(loaded, floor)
    if not stages:
        raise ValueError(f"{_sleep_flag(settings)}: --memory-budget leaves no size above {floor}L that could sleep")
    has_codes = form.storage is Storage.NESTED or len(form.widths) > 1
    nested = nested_store.nested_file(pair, store_root(settings.store)) if has_codes else None
    return Sleeper(runner.executor, runner.sizes, stages, BlockReader(pair, form, nested), settings.sleep_after)


def make_policy(
    runner: StepRunner, loaded: LoadedPair, pair: Pair, settings: Settings, tenants: Tenants
) -> SizePolicy | None:
    """Lets load and latency choose among the sizes a request allows; None (the largest) if the settings say so."""
    if settings.size_policy == "largest":
        return None
    from server.cost.calibrate import cost_model_for, keep
    from server.sizing.policy import BudgetPolicy

    cost = cost_model_for(runner, loaded, store_root(settings.store) / "calibration")
    return BudgetPolicy(cost, tenants=tenants, quality=quality_of(pair, runner.executor.widths), keep=keep)


def points_file(store: Path | str | None, pair: Pair) -> Path:
    """Where a server leaves what it found of the points of a pair, for `boomerang sizes`."""

    return store_root(store) / "points" / f"{pair.name.replace('/', '--')}.json"


def check_sizes(settings: Settings, pair: Pair) -> None:
    """ValueError for a size or precision that this pair has in no form: said before anything is loaded."""
    from model_store.pair import MAKE

    sizes, found = pair.elasticity.sizes, {}
    for name in ("size", "min_size", "max_size"):
        try:
            spec = SizeSpec.parse(getattr(settings, name) or "auto")
            if not spec.is_auto and settings.student != MAKE:  # whose sizes come later
                found[name] = spec.resolve(sizes, {size: pair.parameters(size) for size in sizes})
        except SizeError as error:
            raise ValueError(f"--{name.replace('_', '-')}: {error}") from None
    if found.get("min_size", sizes[0]) > found.get("max_size", sizes[-1]):
        raise ValueError(f"--min-size: {found['min_size']}L is above --max-size, {found['max_size']}L")
    for name in ("precision", "min_precision", "max_precision"):
        try:
            parse_precision(getattr(settings, name) or "auto")
        except SizeError as error:
            raise ValueError(f"--{name.replace('_', '-')}: {error}") from None
    speculation(settings, pair)


def read_template(value: str | None) -> str | None:
    """`--chat-template` is a file, the template itself, or the name of one that the model brings."""
    if value is None or "{" in value or "\n" in value or (value.isidentifier() and not Path(value).exists()):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--chat-template: cannot read {value}: {error.strerror}") from None


def fingerprint(pair: Pair, form: WeightForm) -> str:
    """The same for servers that give the same answers: pair, order, precision."""
    text = f"{pair.name}|{pair.patch_order}|{pair.elasticity.thresholds}|{form}"
    return "bm_" + hashlib.sha256(text.encode()).hexdigest()[:12]
