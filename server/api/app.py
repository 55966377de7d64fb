"""The application: routes, middleware, and the life of the engine behind them.

`create_app` needs no server of its own: uvicorn, Ray Serve and tests all run what it returns. Loading happens in the
background, so the port answers (with 503) from the first moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from server.api import protocol
from server.api.auth import KeyRing
from server.api.chat import create_chat_completion
from server.api.completions import create_completion
from server.api.errors import APIError, handle_api_error, handle_http_error, handle_unexpected
from server.api.gateway import Gateway
from server.api.playground import router as playground_router
from server.api.routes import detokenize, router, tokenize
from server.api.state import ServedModel, ServerState
from server.config import Settings
from server.metrics import Metrics
from server.version import __version__

logger = logging.getLogger(__name__)

# path, handler, request model, tag, summary
_POSTS: list[tuple[str, Callable[..., Any], type[BaseModel], str, str]] = [
    ("/v1/completions", create_completion, protocol.CompletionRequest, "inference", "Continue a prompt"),
    (
        "/v1/chat/completions",
        create_chat_completion,
        protocol.ChatCompletionRequest,
        "inference",
        "Answer a conversation",
    ),
    ("/tokenize", tokenize, protocol.TokenizeRequest, "tokenizer", "Text or messages to token ids"),
    ("/detokenize", detokenize, protocol.DetokenizeRequest, "tokenizer", "Token ids to text"),
]


def create_app(
    settings: Settings,
    load: Callable[[], ServedModel],
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """The application. `load` builds the engine and runs in a thread once the application starts.

    If it raises, every probe answers 503 with the reason and `on_failure` is told (the command line then exits).
    """
    state = ServerState(settings, KeyRing.from_settings(settings), Metrics(legacy_names=settings.metrics_legacy_names))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(_load(state, load, on_failure))
        try:
            yield
        finally:
            state.is_draining = True
            if not loading.done():
                loading.cancel()
            if state.async_engine is not None:
                await state.async_engine.stop()

    docs = {} if not settings.disable_fastapi_docs else {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(
        title="boomerang-serve",
        version=__version__,
        lifespan=lifespan,
        root_path=settings.root_path,
        **docs,
    )
    app.state.server = state
    app.include_router(router)
    for path, handler, model, tag, summary in _POSTS:
        _add_post(app, state, path, handler, model, tag, summary)
    app.include_router(playground_router)
    app.add_exception_handler(APIError, handle_api_error)
    app.add_exception_handler(HTTPException, handle_http_error)
    app.add_exception_handler(Exception, handle_unexpected)
    app.openapi = lambda: _openapi(app)
    # The last one added is the outermost: CORS headers belong on refusals too.
    app.add_middleware(Gateway, state=state)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.allowed_origins),
        allow_methods=list(settings.allowed_methods),
        allow_headers=list(settings.allowed_headers),
        allow_credentials=settings.allow_credentials,
        expose_headers=["x-request-id", "x-boomerang-size", "x-boomerang-size-reason", "retry-after"],
    )
    return app


async def _load(
    state: ServerState, load: Callable[[], ServedModel], on_failure: Callable[[BaseException], None] | None
) -> None:
    from server.engine.async_engine import AsyncEngine

    try:
        model = await asyncio.to_thread(load)
        # Smallest and largest size together run every layer: weights that yield no number are found out now.
        for size in {model.engine.sizes[0], model.engine.sizes[-1]}:
            await asyncio.to_thread(model.engine.probe, size)
        async_engine = AsyncEngine(model.engine)
        catalog = model.catalog
        state.metrics.attach(model.engine, catalog.name, catalog.max_model_len)
        async_engine.on_failure = on_failure
        await async_engine.start()
        state.attach(model, async_engine)
    except Exception as error:
        state.load_error = f"{type(error).__name__}: {error}" if not isinstance(error, APIError) else error.message
        if on_failure is None:
            logger.exception("the model could not be loaded")
        else:
            on_failure(error)


def _add_post(
    app: FastAPI,
    state: ServerState,
    path: str,
    handler: Callable[..., Any],
    model: type[BaseModel],
    tag: str,
    summary: str,
) -> None:
    """A route that reads its body itself (strictly, with orjson), documented as if FastAPI had."""

    if handler in (tokenize, detokenize):
        endpoint = handler
    else:

        async def endpoint(request: Request) -> Response:
            return await handler(request, state)

    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        tags=[tag],
        summary=summary,
        operation_id=path.strip("/").replace("/", "_"),
        response_class=Response,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document plus the request models and the error object."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema(
            [(model, "validation") for _, _, model, _, _ in _POSTS],
            by_alias=True,
            ref_template="#/components/schemas/{model}",
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        schemas["Error"] = _ERROR_SCHEMA
        error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
        for operations in document["paths"].values():
            for operation in operations.values():
                answers = operation["responses"]
                answers.pop("422", None)
                for status, text in (("400", "Bad request"), ("404", "Not found"), ("503", "Not now")):
                    answers.setdefault(status, {"description": text, **error})
        app.openapi_schema = document
    return app.openapi_schema


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
