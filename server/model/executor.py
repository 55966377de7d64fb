"""Which executor runs: decided once at start, from a preference list in which every candidate passed over says why.

C++ on CPU, torch anywhere, Triton on CUDA. What an executor is: `server/core/executor.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from model_store.arrays import need_torch
from model_store.weight_form import Storage
from server.core.executor import Executor

if TYPE_CHECKING:
    from model_store.loaded import LoadedPair
    from server.core.config import EngineConfig

logger = logging.getLogger(__name__)


def allocate_states(executor: Executor, num_bytes: int) -> int:
    """Give an executor memory for the hidden states of changes of size. Returns pages of `page_size` tokens each.

    0 for an executor that keeps none: there a text is computed from its beginning.
    """
    page_bytes = executor.state_page_bytes()
    num_pages = num_bytes // page_bytes if page_bytes else 0
    if num_pages:
        executor.allocate_states(num_pages)
    return num_pages


Candidate = tuple[str, Callable[["LoadedPair", "EngineConfig"], Executor | str]]


def _cuda(pair: LoadedPair, config: EngineConfig) -> Executor | str:
    if pair.device != "cuda" and config.executor != "cuda":
        return "runs on cuda only"  # said without importing Triton, which takes a second
    try:
        from server.kernels.cuda.executor import create
    except ImportError as error:
        return f"not available ({error})"
    return create(pair, config)


def _native(pair: LoadedPair, config: EngineConfig) -> Executor | str:
    try:
        from server.kernels.cpu.executor import create
    except ImportError as error:
        return f"not available ({error})"
    return create(pair, config)


def _torch(pair: LoadedPair, config: EngineConfig) -> Executor | str:
    need_torch("the torch executor")
    import torch

    from server.model.torch_executor import TorchExecutor

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if pair.device != "cpu" and pair.form.storage is Storage.CODES:
        logger.info("the file's codes (%s) are widened: the torch executor reads them on a CPU only", pair.kinds())
        pair.widen_codes()

    return TorchExecutor(pair, page_size=config.page_size, kv_cache_dtype=config.kv_cache_dtype)


CANDIDATES: list[Candidate] = [("cuda", _cuda), ("native", _native), ("torch", _torch)]


def create_executor(pair: LoadedPair, config: EngineConfig) -> Executor:
    """The first executor of the preference list that can serve this pair; ValueError with all reasons if none can."""
    reasons = []
    for name, build in CANDIDATES:
        if config.executor not in ("auto", name):
            reasons.append(f"{name}: not asked for (--executor {config.executor})")
            continue
        built = build(pair, config)
        if not isinstance(built, str):
            reasons += built.passed_over()
            logger.info("executor: %s%s", built.describe(), f" (passed over: {'; '.join(reasons)})" if reasons else "")
            return built
        reasons.append(f"{name}: {built}")
    raise ValueError("no executor can serve this pair: " + "; ".join(reasons))
