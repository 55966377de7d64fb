"""What the routes share: settings, the engine once it is loaded, and whether new work is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.api.generate.catalog import Catalog
from server.api.generate.grammar import Compiler
from server.api.generate.size_choice import SizeChooser
from server.api.generate.tokenizer import ServingTokenizer
from server.api.http.auth import KeyRing
from server.api.http.errors import APIError
from server.config import Settings
from server.observe.metrics import Metrics
from server.sizing.tenants import Tenants

if TYPE_CHECKING:
    from server.engine.async_engine import AsyncEngine
    from server.engine.engine import Engine
    from server.observe.tracing import Telemetry

# A step that runs longer than this is taken for hung; the largest prefill on the slowest machine is far below.
WEDGED_SECONDS = 300.0


@dataclass(slots=True)
class ServedModel:
    """Everything that loading a pair yields."""

    engine: Engine
    tokenizer: ServingTokenizer
    catalog: Catalog
    fingerprint: str = ""
    tenants: Tenants = field(default_factory=Tenants)


class ServerState:
    """One per application; only the event loop touches it."""

    def __init__(self, settings: Settings, keys: KeyRing, metrics: Metrics) -> None:
        self.settings = settings
        self.keys = keys
        self.metrics = metrics
        self.admission = Admission(settings, metrics)
        self.started = time.time()
        self.is_draining = False
        self.telemetry: Telemetry | None = None
        self.load_error: str | None = None
        self.num_active = 0  # inference requests between first byte in and last byte out
        self.body_bytes = 0  # of request bodies that are still arriving
        self.async_engine: AsyncEngine | None = None
        self.model: ServedModel | None = None
        self.chooser: SizeChooser | None = None
        self.grammars: Compiler | None = None

    def attach(self, model: ServedModel, async_engine: AsyncEngine) -> None:
        """The pair is loaded and its engine runs: take work from here on."""
        self.model = model
        self.chooser = SizeChooser(model.catalog, self.settings, model.tenants)
        self.admission.retry_after = lambda: model.engine.scheduler.estimated_wait()
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

    Everything happens on the event loop, so a check and its booking cannot be torn apart. A full queue refuses those
    who fill it: a tenant with less waiting than its equal share of the queue still gets in, so that a flood from one
    key costs the other keys no refusals. That can at most double the queue.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.max_reqs = settings.max_num_queued_reqs or None
        self.max_tokens = settings.max_num_queued_tokens or None
        self.metrics = metrics
        self.num_reqs = 0
        self.num_tokens = 0
        self._waiting: dict[str, tuple[int, int]] = {}  # tenant -> requests, tokens
        self.retry_after: Callable[[], float] = lambda: 1.0  # seconds until what waits now has been admitted

    def check(self, tenant: str, num_reqs: int = 1, num_tokens: int = 0) -> None:
        """503 with Retry-After if so much more of this tenant does not fit into the queue."""
        own_reqs, own_tokens = self._waiting.get(tenant, (0, 0))
        num_tenants = len(self._waiting.keys() | {tenant})

        def is_full(limit: int | None, waiting: int, own: int, more: int) -> bool:
            # One request larger than the whole queue is let through when nothing waits, or it could never run.
            if limit is None or not waiting or waiting + more <= limit:
                return False
            return num_tenants == 1 or own + more > limit / num_tenants

        if is_full(self.max_reqs, self.num_reqs, own_reqs, num_reqs):
            self._refuse("max_num_queued_reqs", f"{self.num_reqs} requests are waiting")
        if is_full(self.max_tokens, self.num_tokens, own_tokens, num_tokens):
            self._refuse("max_num_queued_tokens", f"{self.num_tokens} prompt tokens are waiting")

    def enter(self, tenant: str, num_tokens: int) -> None:
        self._book(tenant, 1, num_tokens)

    def leave(self, tenant: str, num_tokens: int) -> None:
        self._book(tenant, -1, -num_tokens)

    def _book(self, tenant: str, num_reqs: int, num_tokens: int) -> None:
        self.num_reqs += num_reqs
        self.num_tokens += num_tokens
        own_reqs, own_tokens = self._waiting.pop(tenant, (0, 0))
        if own_reqs + num_reqs:
            self._waiting[tenant] = own_reqs + num_reqs, own_tokens + num_tokens

    def _refuse(self, reason: str, detail: str) -> None:
        self.metrics.admission_rejected(reason)
        raise APIError(
            f"The server is overloaded: {detail}. Try again later.",
            status=503,
            code="server_overloaded",
            retry_after=self.retry_after(),
        )
