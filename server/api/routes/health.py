"""Probes and reports: health, version, load, metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.generate.serving import json_response
from server.api.http.errors import APIError
from server.api.http.state import state_of
from server.version import __version__

router = APIRouter()


@router.get("/health", tags=["health"], summary="200 when requests are taken; 503 while loading, draining or broken")
async def health(request: Request) -> Response:
    state_of(request).check_health()
    return json_response({"status": "ok"})


@router.get("/live", tags=["health"], summary="200 unless the process should be restarted")
async def live(request: Request) -> Response:
    state_of(request).check_live()
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
    stats, sleeper = state.served.engine.stats(), state.served.engine.sleeper
    return json_response(
        {
            "server_load": state.num_active,
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "queued_tokens": stats.num_waiting_tokens,
            "kv_usage": round(stats.kv_usage, 4),
            "running_by_size": {f"{size}L": count for size, count in sorted(stats.running_by_size.items())},
            "is_draining": state.is_draining,
            "sleep_state": "awake" if sleeper is None else str(sleeper.report.state),
        }
    )


@router.get("/metrics", tags=["health"], summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    if state_of(request).settings.metrics_port is not None:
        raise APIError("Metrics are served on a port of their own here.", status=404)
    return Response(state_of(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
