"""What the routes share: settings, the engine once it is loaded, and whether new work is taken."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from server.api.generate.catalog import Catalog
from server.api.generate.grammar_compiler import Compiler
from server.api.generate.sampling_defaults import SamplingDefaults
from server.api.generate.size_choice import SizeChooser
from server.api.generate.tokenizer import ServingTokenizer
from server.api.http.admission import Admission
from server.api.http.auth import KeyRing
from server.api.http.errors import APIError
from server.api.http.limits import KeyLimits
from server.config import Settings
from server.observe.metrics import Metrics
from server.options import SettingsError
from server.sizing.tenants import Tenants

if TYPE_CHECKING:
    from model_store.loaded import LoadedPair
    from model_store.pair import Pair
    from server.api.http.tracing import Telemetry
    from server.engine.async_engine import AsyncEngine
    from server.engine.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ServedModel:
    """Everything that loading a pair yields."""

    engine: Engine
    tokenizer: ServingTokenizer
    catalog: Catalog
    fingerprint: str = ""
    tenants: Tenants = field(default_factory=Tenants)
    resolve_size: Callable[[Any], int] | None = None  # "24L", "75%"... into layers
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    pair: Pair | None = None
    loaded: LoadedPair | None = None
    grow: Callable[[ServerState], Awaitable[None]] | None = None  # runs beside the server, and adds sizes to it


class ServerState:
    """One per application; only the event loop touches it."""

    def __init__(self, settings: Settings, keys: KeyRing, metrics: Metrics) -> None:
        self.settings = settings
        self.keys = keys
        self.metrics = metrics
        self.admission = Admission(settings, metrics)
        self.limits = KeyLimits(settings)
        self.started = time.time()
        self.is_draining = False
        self.telemetry: Telemetry | None = None
        self.load_error: str | None = None
        self.num_active = 0  # inference requests between first byte in and last byte out
        self.on_activity: Callable[[bool], None] | None = None  # is told when there are some, and when there are none
        self.arriving: Counter[str] = Counter()  # tenant -> bytes of request bodies that are not whole yet
        self.model: ServedModel | None = None  # until it is loaded
        self._async_engine: AsyncEngine | None = None
        self.growing: asyncio.Task[None] | None = None  # `ServedModel.grow`
        # Set by `attach`; routes run only after that (`Gateway` sees to it).
        self.chooser: SizeChooser
        self.grammars: Compiler
        self.sampling_defaults: SamplingDefaults

    def attach(self, model: ServedModel, async_engine: AsyncEngine) -> None:
        """The pair is loaded and its engine runs: take work from here on."""
        self.model = model
        self.chooser = SizeChooser(model.catalog, self.settings, model.tenants)
        self.admission.retry_after = lambda: model.engine.scheduler.estimated_wait()
        self.grammars = Compiler(model.tokenizer, self.settings)
        self.sampling_defaults = model.sampling_defaults
        self._async_engine = async_engine

    def change_model(self, model: ServedModel) -> None:
        """The engine serves another student by now: offer its sizes. Every size that was offered still is."""
        self.chooser = SizeChooser(model.catalog, self.settings, model.tenants)
        self.model = model
        if model.resolve_size is not None:
            try:
                model.tenants.take(self.keys.sizing(model.resolve_size))
            except APIError as error:
                logger.error("sizes of the API keys stay as they were: %s", error.message)

    def count_active(self, change: int) -> None:
        """An inference request comes (1) or goes (-1)."""
        self.num_active += change
        if self.on_activity is not None and self.num_active == max(change, 0):
            self.on_activity(self.num_active > 0)

    def reload_keys(self) -> None:
        """Read the API keys again, with what they stand for. If anything is wrong with them the old ones stay."""
        try:
            keys = KeyRing.from_settings(self.settings)
            if self.model is not None and self.model.resolve_size is not None:
                self.model.tenants.take(keys.sizing(self.model.resolve_size))
            self.keys.take(keys)
        except (SettingsError, APIError, ValueError) as error:
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.info("the API keys were read again: %d", len(keys.tenants))

    async def stop(self) -> None:
        """Take no more work and end the engine, if there is one."""
        self.is_draining = True
        if self._async_engine is not None:
            await self._async_engine.stop()

    @property
    def seconds_in_step(self) -> float:
        """How long the current step has been running; 0 while there is none."""
        return 0.0 if self._async_engine is None else self._async_engine.seconds_in_step

    # Shorthands for the routes.
    @property
    def async_engine(self) -> AsyncEngine:
        assert self._async_engine is not None
        return self._async_engine

    @property
    def served(self) -> ServedModel:
        assert self.model is not None
        return self.model

    @property
    def tokenizer(self) -> ServingTokenizer:
        return self.served.tokenizer

    @property
    def catalog(self) -> Catalog:
        return self.served.catalog

    def problem(self) -> str | None:
        """Why no new work is taken now, or None."""
        if self.load_error is not None:
            return f"the model could not be loaded: {self.load_error}"
        if self._async_engine is None:
            return "the model is loading"
        if self.is_draining:
            return "the server is shutting down"
        if not self.async_engine.is_alive:
            return f"the engine has stopped ({self.async_engine.failure or 'on request'})"
        if self.async_engine.seconds_in_step > self.settings.step_timeout:
            return "the engine is stuck in a step"
        return None

    def check_health(self) -> None:
        """503 unless requests are taken."""
        if (problem := self.problem()) is not None:
            raise APIError(f"Not ready: {problem}.", status=503, retry_after=5)

    def check_live(self) -> None:
        """503 if the process should be restarted."""
        if self.is_broken:
            raise APIError(f"Broken: {self.problem()}.", status=503)

    @property
    def is_broken(self) -> bool:
        """Whether only a restart helps: loading failed, the engine thread died or hangs."""
        if self.load_error is not None:
            return True
        engine = self._async_engine
        return engine is not None and (not engine.is_alive or engine.seconds_in_step > self.settings.step_timeout)


def state_of(request: Request) -> ServerState:
    return request.app.state.server
