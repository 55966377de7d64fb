"""The application: routes, middleware, and the life of the engine behind them.

`create_app` needs no server of its own: uvicorn, Ray Serve and tests all run what it returns. Loading happens in the
background, so the port answers (with 503) from the first moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from server.api.http.auth import KeyRing
from server.api.http.errors import APIError, handle_api_error, handle_http_error, handle_recursion, handle_unexpected
from server.api.http.gateway import Gateway
from server.api.http.state import ServedModel, ServerState
from server.api.http.tracing import create_telemetry
from server.api.playground import router as playground_router
from server.api.routes.openapi import openapi_document
from server.api.routes.operations import add_operations, answer_head
from server.config import Settings
from server.observe.metrics import Metrics
from server.observe.throughput import SAMPLE_SECONDS, ThroughputLog
from server.version import __version__

if TYPE_CHECKING:
    from server.engine.stats import MetricsSink

logger = logging.getLogger(__name__)

_LAG_INTERVAL = 0.1  # seconds between two looks


def create_app(
    settings: Settings,
    load: Callable[[MetricsSink], ServedModel],
    on_failure: Callable[[BaseException], None] | None = None,
    on_ready: Callable[[], None] | None = None,
) -> FastAPI:
    """The application. `load` builds the engine and runs in a thread once the application starts.

    If it raises, every probe answers 503 with the reason and `on_failure` is told (the command line then exits).
    `on_ready` is called once requests are taken.
    """
    state = ServerState(settings, KeyRing.from_settings(settings), Metrics(legacy_names=settings.metrics_legacy_names))

    state.telemetry = create_telemetry(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(_load(state, load, on_failure, on_ready))
        watching = [asyncio.ensure_future(task) for task in (_watch_lag(state.metrics), _log_throughput(state))]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            if state.growing is not None:
                state.growing.cancel()
            if not loading.done():
                loading.cancel()
            await state.stop()
            if state.telemetry is not None:
                await asyncio.to_thread(state.telemetry.close)

    docs: dict[str, Any] = (
        {} if not settings.disable_fastapi_docs else {"docs_url": None, "redoc_url": None, "openapi_url": None}
    )
    make = FastAPI if settings.disable_fastapi_docs else FastAPIOffline  # whose pages load nothing from elsewhere
    app = make(
        title="boomerang-serve",
        version=__version__,
        lifespan=lifespan,
        root_path=settings.root_path,
        redirect_slashes=False,  # to an absolute http:// address, which loses keys behind a TLS proxy
        **docs,
    )
    app.state.server = state
    add_operations(app, state)
    app.router.routes.extend(playground_router.routes)
    answer_head(app)
    app.add_exception_handler(APIError, handle_api_error)  # type: ignore[arg-type]  # Starlette's own typing
    app.add_exception_handler(HTTPException, handle_http_error)
    app.add_exception_handler(RecursionError, handle_recursion)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, handle_unexpected)
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]  # FastAPI's documented way
    # The last one added is the outermost: CORS headers belong on refusals too.
    app.add_middleware(Gateway, state=state, routes=app.router.routes)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.allowed_origins),
        allow_methods=list(settings.allowed_methods),
        allow_headers=list(settings.allowed_headers),
        allow_credentials=settings.allow_credentials,
        expose_headers=["x-request-id", "x-boomerang-size", "x-boomerang-size-reason", "retry-after"],
    )
    return app


async def _watch_lag(metrics: Metrics) -> None:
    """How late the event loop runs what is due: everything that it does for anybody waits so long."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_INTERVAL
        await asyncio.sleep(_LAG_INTERVAL)
        metrics.observe_lag(max(0.0, loop.time() - due))


async def _in_daemon_thread(call: Callable[[], ServedModel]) -> ServedModel:
    """`asyncio.to_thread`, but the loop's end does not wait for it: loading may take minutes, a signal may not."""
    outcome: Future[ServedModel] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await asyncio.wrap_future(outcome)


async def _log_throughput(state: ServerState) -> None:
    log: ThroughputLog | None = None
    while not state.settings.disable_log_stats:
        await asyncio.sleep(SAMPLE_SECONDS)
        if log is not None:
            log.sample()
        elif state.model is not None:
            log = ThroughputLog(state.metrics, state.model.engine)


async def _load(
    state: ServerState,
    load: Callable[[MetricsSink], ServedModel],
    on_failure: Callable[[BaseException], None] | None,
    on_ready: Callable[[], None] | None,
) -> None:
    from server.engine.async_engine import AsyncEngine

    try:
        model = await _in_daemon_thread(lambda: load(state.metrics))
        # Smallest and largest size together run every layer: weights that yield no number are found out now.
        for size in {model.engine.sizes[0], model.engine.sizes[-1]}:
            await asyncio.to_thread(model.engine.probe, size)
        async_engine = AsyncEngine(model.engine, on_failure)
        catalog = model.catalog
        state.metrics.attach(model.engine, catalog.name, catalog.max_model_len, state.settings.gpu_memory_utilization)
        await async_engine.start()
        state.attach(model, async_engine)
        if model.grow is not None:
            state.growing = asyncio.ensure_future(model.grow(state))
        if on_ready is not None:
            on_ready()
    except Exception as error:
        state.load_error = f"{type(error).__name__}: {error}" if not isinstance(error, APIError) else error.message
        if on_failure is None:
            logger.exception("the model could not be loaded")
        else:
            on_failure(error)
