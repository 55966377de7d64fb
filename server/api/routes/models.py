"""Which models are served: NAME, and NAME:24L for every size."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.serving import json_response
from server.api.http.state import state_of

router = APIRouter()


@router.get("/v1/models", tags=["models"], summary="NAME, and NAME:24L for every size")
async def list_models(request: Request) -> Response:
    return json_response({"object": "list", "data": state_of(request).catalog.cards()})


@router.get("/v1/models/{model:path}", tags=["models"], summary="One model id")
async def get_model(request: Request, model: str) -> Response:
    return json_response(state_of(request).catalog.card(model))
