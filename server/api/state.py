"""What the routes share: settings, the engine once it is loaded, and whether new work is taken."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.api.auth import KeyRing
from server.api.catalog import Catalog
from server.api.errors import APIError
from server.api.grammar import Compiler
from server.api.size_choice import SizeChooser
from server.api.tokenizer import ServingTokenizer
from server.config import Settings
from server.metrics import Metrics

if TYPE_CHECKING:
    from server.engine.async_engine import AsyncEngine
    from server.engine.engine import Engine

# A step that runs longer than this is taken for hung; the largest prefill on the slowest machine is far below.
WEDGED_SECONDS = 300.0


@dataclass(slots=True)
class ServedModel:
    """Everything that loading a pair yields."""

    engine: Engine
    tokenizer: ServingTokenizer
    catalog: Catalog
    fingerprint: str = ""


class ServerState:
    """One per application; only the event loop touches it."""

    def __init__(self, settings: Settings, keys: KeyRing, metrics: Metrics) -> None:
        self.settings = settings
        self.keys = keys
        self.metrics = metrics
        self.admission = Admission(settings, metrics)
        self.started = time.time()
        self.is_draining = False
        self.load_error: str | None = None
        self.num_active = 0  # inference requests between first byte in and last byte out
        self.async_engine: AsyncEngine | None = None
        self.model: ServedModel | None = None
        self.chooser: SizeChooser | None = None
        self.grammars: Compiler | None = None

    def attach(self, model: ServedModel, async_engine: AsyncEngine) -> None:
        """The pair is loaded and its engine runs: take work from here on."""
        self.model = model
        self.chooser = SizeChooser(model.catalog, self.settings)
        self.grammars = Compiler(model.tokenizer, self.settings)
        self.async_engine = async_engine

    # Shorthands for the routes, which run only when the model is there (`Gateway` sees to it).
    @property
    def engine(self) -> AsyncEngine:
        assert self.async_engine is not None
        return self.async_engine

    @property
    def tokenizer(self) -> ServingTokenizer:
        assert self.model is not None
        return self.model.tokenizer

    @property
    def catalog(self) -> Catalog:
        assert self.model is not None
        return self.model.catalog

    def problem(self) -> str | None:
        """Why no new work is taken now, or None."""
        if self.load_error is not None:
            return f"the model could not be loaded: {self.load_error}"
        if self.async_engine is None:
            return "the model is loading"
        if self.is_draining:
            return "the server is shutting down"
        if not self.async_engine.is_alive:
            return f"the engine has stopped ({self.async_engine.failure or 'on request'})"
        if self.async_engine.seconds_in_step > WEDGED_SECONDS:
            return "the engine is stuck in a step"
        return None


    @property
    def is_broken(self) -> bool:
        """Whether only a restart helps: loading failed, the engine thread died or hangs."""
        if self.load_error is not None:
            return True
        engine = self.async_engine
        return engine is not None and (not engine.is_alive or engine.seconds_in_step > WEDGED_SECONDS)


class Admission:
    """Counts work that was accepted and not yet admitted by the scheduler; refuses what exceeds the queue limits.

    Everything happens on the event loop, so a check and its booking cannot be torn apart.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.max_reqs = settings.max_num_queued_reqs or None
        self.max_tokens = settings.max_num_queued_tokens or None
        self.metrics = metrics
        self.num_reqs = 0
        self.num_tokens = 0

    def check(self, num_reqs: int = 1, num_tokens: int = 0) -> None:
        """503 with Retry-After if so much more does not fit into the queue."""
        # One request larger than the whole queue is let through when nothing waits, or it could never run.
        if self.max_reqs is not None and self.num_reqs and self.num_reqs + num_reqs > self.max_reqs:
            self._refuse("max_num_queued_reqs", f"{self.num_reqs} requests are waiting")
        if self.max_tokens is not None and self.num_tokens and self.num_tokens + num_tokens > self.max_tokens:
            self._refuse("max_num_queued_tokens", f"{self.num_tokens} prompt tokens are waiting")

    def enter(self, num_tokens: int) -> None:
        self.num_reqs += 1
        self.num_tokens += num_tokens

    def leave(self, num_tokens: int) -> None:
        self.num_reqs -= 1
        self.num_tokens -= num_tokens

    def _refuse(self, reason: str, detail: str) -> None:
        self.metrics.admission_rejected(reason)
        raise APIError(
            f"The server is overloaded: {detail}. Try again later.", status=503, code="server_overloaded", retry_after=1
        )
