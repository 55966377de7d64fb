"""Which models are served: NAME, and NAME:24L for every size. To Anthropic's clients in Anthropic's form."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.serving import json_response
from server.api.http.errors import invalid
from server.api.http.state import ServerState, state_of
from server.api.routes.sleep import sleep_card

router = APIRouter()

_MOST_LISTED = 1000
_LISTED = 20  # of Anthropic's list, where no limit is given


@router.get("/v1/models", tags=["models"], summary="NAME, NAME:24L for every size, NAME:24L-q6 for points")
async def list_models(request: Request) -> Response:
    state = state_of(request)
    if "anthropic-version" in request.headers:
        return json_response(_page(state, request))
    return json_response({"object": "list", "data": [_with_sleep(state, card) for card in state.catalog.cards()]})


@router.get("/v1/models/{model:path}", tags=["models"], summary="One model id")
async def get_model(request: Request, model: str) -> Response:
    state = state_of(request)
    card = state.catalog.card(model)
    is_anthropic = "anthropic-version" in request.headers
    return json_response(_anthropic(state, card) if is_anthropic else _with_sleep(state, card))


def _with_sleep(state: ServerState, card: dict[str, Any]) -> dict[str, Any]:
    """A card with what is asleep, on a server that sleeps: sizes say whether they are, names say how it stands."""
    sleeper = state.served.engine.sleeper
    if sleeper is None:
        return card
    if "layers" in card:
        return card | {"is_asleep": card["layers"] > sleeper.report.largest}
    return card | {"sleep": sleep_card(sleeper)}


def _page(state: ServerState, request: Request) -> dict[str, Any]:
    """As many models as `limit` says after `after_id` or before `before_id`, and whether there are more that way."""
    query = request.query_params
    limit = query.get("limit", str(_LISTED))
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= _MOST_LISTED):
        raise invalid(f"limit must be 1 .. {_MOST_LISTED}.", "limit")
    cards = state.catalog.cards()
    ids = [card["id"] for card in cards]
    after, before = (_place(ids, query.get(name), name) for name in ("after_id", "before_id"))
    if after is not None and before is not None:
        raise invalid("after_id and before_id exclude each other.", "before_id")
    first = 0 if after is None else after + 1
    stop = len(cards)
    if before is not None:
        first, stop = max(before - int(limit), 0), before
    shown = cards[first : min(stop, first + int(limit))]
    return {
        "data": [_anthropic(state, card) for card in shown],
        "has_more": first > 0 if before is not None else first + len(shown) < len(cards),
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


def _place(ids: list[str], model: str | None, param: str) -> int | None:
    if model is None:
        return None
    if model not in ids:
        raise invalid(f"{param}: there is no model {model[:200]!r}.", param)
    return ids.index(model)


def _anthropic(state: ServerState, card: dict[str, Any]) -> dict[str, Any]:
    most = state.catalog.max_model_len
    return {
        "type": "model",
        "id": card["id"],
        "display_name": card["id"],
        "created_at": datetime.fromtimestamp(card["created"], UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": most,
        "max_tokens": most,
    }
