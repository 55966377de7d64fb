"""Sleep to the student and back, by hand: for operators. vLLM's names work too (`/wake_up`, `/is_sleeping`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.serving import json_response
from server.api.http.errors import APIError, invalid
from server.api.http.state import ServerState, state_of
from server.engine.sleep import Sleeper, SleepReport, SleepState

router = APIRouter()

_LOOK_SECONDS = 0.01  # between two looks at a state that changes


@router.post("/sleep", tags=["operation"], summary="Give back the memory of larger sizes")
async def sleep(request: Request) -> Response:
    sleeper = _sleeper(request, {"level": ("1",)})
    state = state_of(request)
    before = sleeper.report.num_sleeps
    state.async_engine.sleep()
    await _until(state, sleeper, lambda r: r.state is SleepState.ASLEEP or r.num_sleeps > before)
    return json_response(sleep_card(sleeper))


@router.post("/wake", tags=["operation"], summary="Wake them; answers once every size is back")
@router.post("/wake_up", tags=["operation"], include_in_schema=False)
async def wake(request: Request) -> Response:
    sleeper = _sleeper(request, {"tags": ("weights", "kv_cache")})
    state = state_of(request)
    before = sleeper.report
    state.async_engine.wake()
    await _until(
        state,
        sleeper,
        lambda r: (
            r.state is SleepState.AWAKE or (r.num_wakes, r.num_failures) != (before.num_wakes, before.num_failures)
        ),
    )
    if sleeper.report.num_failures > before.num_failures:
        raise APIError(f"The larger sizes could not be woken: {sleeper.report.failure}.", status=503, retry_after=10)
    return json_response(sleep_card(sleeper))


@router.get("/is_sleeping", tags=["operation"], summary="Whether larger sizes are asleep, and what that saves")
async def is_sleeping(request: Request) -> Response:
    sleeper = state_of(request).served.engine.sleeper
    return json_response({"is_sleeping": False} if sleeper is None else sleep_card(sleeper))


def sleep_card(sleeper: Sleeper) -> dict[str, Any]:
    """What clients are told of it."""
    report = sleeper.report
    return {
        "is_sleeping": report.state is not SleepState.AWAKE,
        "state": str(report.state),
        "largest": f"{report.largest}L",
        "bytes_released": report.num_bytes,
        "seconds_to_wake": round(report.wake_seconds, 3) if report.num_wakes else None,
        "failure": report.failure,
    }


def _sleeper(request: Request, known: dict[str, tuple[str, ...]]) -> Sleeper:
    """APIError if the server cannot sleep, or the query holds what is not `known`."""
    for name, value in request.query_params.multi_items():
        if name not in known or value not in known[name]:
            allowed = " or ".join(f"{key}={text}" for key, texts in known.items() for text in texts)
            raise invalid(f"{name}={value[:40]} is not supported here; {allowed} is.", name)
    sleeper = state_of(request).served.engine.sleeper
    if sleeper is None:
        raise APIError("This server does not sleep: start it with --sleep-after SECONDS or --enable-sleep-mode.")
    return sleeper


async def _until(state: ServerState, sleeper: Sleeper, is_done: Callable[[SleepReport], bool]) -> None:
    """Wait for the engine; running answers may hold it for as long as they last."""
    while not is_done(sleeper.report):
        state.check_health()
        await asyncio.sleep(_LOOK_SECONDS)
