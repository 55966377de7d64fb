"""The seam between the engine and whatever computes a step: C++ on CPU, torch anywhere, Triton on CUDA.

An executor owns the weights of one loaded pair and the KV memory. Which one runs is decided once at start by walking
a preference list in which every candidate passed over says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from server.core.batch import ForwardBatch

if TYPE_CHECKING:
    from model_store.loaded import LoadedPair
    from model_store.weight_form import WeightForm
    from server.core.config import EngineConfig

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Runs steps. Not thread-safe: one engine thread calls it.

    `block_tables` of a batch index pages of one layer each. A page holds K and V of `page_size` tokens of one layer,
    [num_kv_heads, page_size, head_dim] each; how the pool is laid out in memory is the executor's business.
    """

    name: str
    weight_form: WeightForm  # as kept here, packing included
    shared_stations: frozenset[int]  # at which batches may have one segment for teacher and student rows

    def matrix_bytes(self, num_rows: int, width: int) -> int:
        """Bytes that a weight matrix [num_rows, width] takes here."""

    def page_bytes(self) -> int:
        """Bytes of one page, K and V together."""

    def allocate_kv(self, num_pages: int) -> None:
        """Allocate (or replace) the KV pool."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the program over the batch, writing KV. Returns the final-normed hidden rows at `logits_rows`, [S, E].

        An executor with `allocate_states` also sees to the batch's `saves` and `restores`.
        """

    def logits(self, hidden: torch.Tensor, num_teacher: int) -> torch.Tensor:
        """Apply the head, the teacher's to rows [0, num_teacher), else the student's. [n, E] -> float32 [n, V]."""

    def describe(self) -> str:
        """One line for the start-up log."""


def allocate_states(executor: Executor, num_bytes: int) -> int:
    """Give an executor memory for the hidden states of changes of size. Returns pages of `page_size` tokens each.

    0 for an executor that has no `state_page_bytes` and `allocate_states`: there a text is computed from its beginning.
    """
    page_bytes = getattr(executor, "state_page_bytes", None)
    num_pages = 0 if page_bytes is None else num_bytes // page_bytes()
    if num_pages:
        executor.allocate_states(num_pages)
    return num_pages


Candidate = tuple[str, Callable[["LoadedPair", "EngineConfig"], "Executor | str"]]


def _cuda(pair: LoadedPair, config: EngineConfig) -> Executor | str:
    if pair.ends["teacher"].head.device.type != "cuda" and config.executor != "cuda":
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
    from server.model.torch_executor import TorchExecutor

    return TorchExecutor(pair, page_size=config.page_size)


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
            reasons += getattr(built, "passed_over", list)()
            logger.info("executor: %s%s", built.describe(), f" (passed over: {'; '.join(reasons)})" if reasons else "")
            return built
        reasons.append(f"{name}: {built}")
    raise ValueError("no executor can serve this pair: " + "; ".join(reasons))
