"""The smaller routes: models, tokenizer, health, load, metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.conversation import chat_template, render
from server.api.generate.serving import json_response, read_body
from server.api.generate.tools import ToolUse
from server.api.http.errors import APIError, invalid
from server.api.http.state import ServerState
from server.api.protocol import DetokenizeRequest, TokenizeRequest
from server.version import __version__

router = APIRouter()


def state_of(request: Request) -> ServerState:
    return request.app.state.server


# --- models


@router.get("/v1/models", tags=["models"], summary="NAME, and NAME:24L for every size")
async def list_models(request: Request) -> Response:
    return json_response({"object": "list", "data": state_of(request).catalog.cards()})


@router.get("/v1/models/{model:path}", tags=["models"], summary="One model id")
async def get_model(request: Request, model: str) -> Response:
    return json_response(state_of(request).catalog.card(model))


# --- tokenizer


async def tokenize(request: Request, state: ServerState) -> Response:
    body = await read_body(request, TokenizeRequest, state)
    state.catalog.split_model(body.model)
    tokenizer = state.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Give either prompt or messages.", "prompt")
    if body.messages is not None:
        if not body.messages:
            raise invalid("messages is an empty list.", "messages")
        template = chat_template(body, state)
        text = render(body, template, ToolUse(body.tools, None, template).for_template())
        add_special = bool(body.add_special_tokens)
    else:
        text, add_special = body.prompt, body.add_special_tokens is not False
    token_ids = await tokenizer.encode_async(text, add_special)
    answer = {"count": len(token_ids), "max_model_len": state.catalog.max_model_len, "tokens": token_ids}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in token_ids]
    return json_response(answer)


async def detokenize(request: Request, state: ServerState) -> Response:
    body = await read_body(request, DetokenizeRequest, state)
    state.catalog.split_model(body.model)
    if body.tokens and max(body.tokens) >= state.tokenizer.vocab_size:
        raise invalid(f"tokens: {max(body.tokens)} is not in the vocabulary.", "tokens")
    return json_response({"prompt": state.tokenizer.decode(body.tokens)})


@router.get("/tokenizer_info", tags=["tokenizer"], summary="Special tokens and chat template")
async def tokenizer_info(request: Request) -> Response:
    return json_response(state_of(request).tokenizer.info())


# --- health and reports


@router.get("/health", tags=["health"], summary="200 when requests are taken; 503 while loading, draining or broken")
async def health(request: Request) -> Response:
    problem = state_of(request).problem()
    if problem is None:
        return json_response({"status": "ok"})
    raise APIError(f"Not ready: {problem}.", status=503, retry_after=5)


@router.get("/live", tags=["health"], summary="200 unless the process should be restarted")
async def live(request: Request) -> Response:
    if request.app.state.server.is_broken:
        raise APIError(f"Broken: {state_of(request).problem()}.", status=503)
    return json_response({"status": "ok"})


@router.get("/ping", tags=["health"], summary="The same as /health")
@router.post("/ping", tags=["health"], include_in_schema=False)
async def ping(request: Request) -> Response:
    return await health(request)


@router.get("/version", tags=["health"], summary="Version of the server")
async def version() -> Response:
    return json_response({"version": __version__})


@router.get("/load", tags=["health"], summary="How busy this replica is")
async def load(request: Request) -> Response:
    state = state_of(request)
    stats = state.engine.engine.stats()
    return json_response(
        {
            "server_load": state.num_active,
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "queued_tokens": stats.num_waiting_tokens,
            "kv_usage": round(stats.kv_usage, 4),
            "running_by_size": {f"{size}L": count for size, count in sorted(stats.running_by_size.items())},
            "is_draining": state.is_draining,
        }
    )


@router.get("/metrics", tags=["health"], summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    return Response(state_of(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
