"""The page at `/`: plain HTML, CSS and JavaScript served from this folder. No build step, no external network.

`router` is included by the application; it adds `/` and `/playground/*` and nothing to the OpenAPI schema.
Libraries lie in `vendor` as they were published (`python -m deploy.vendor`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from server.api.http.state import state_of
from server.core.width import precision_name

__all__ = ["router"]

FOLDER = Path(__file__).parent
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # Only this server, and no inline script: text of a model that ends up as markup could still do nothing.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidated by ETag: an upgraded server never runs with yesterday's script
}

router = APIRouter(include_in_schema=False)


def _file(name: str) -> Response:
    path = FOLDER / name
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)


@router.get("/")
async def index() -> Response:
    return _file("index.html")


@router.get("/playground/pair.json")
async def pair(request: Request) -> Response:
    """How teacher and student interlock, and every point of depth and precision: no more than `boomerang sizes` prints.

    Not public, other than the files: a key that may ask may also know what it can ask for.
    """
    state = state_of(request)
    elasticity, catalog = state.served.engine.elasticity, state.catalog
    stations = zip(elasticity.stations, elasticity.thresholds, strict=True)
    points: list[dict[str, Any]] = [
        {"layers": point.size, "precision": precision_name(point.width)}
        | {"bytes": catalog.weight_bytes(point.size, point.width)}
        | point.card()
        for point in catalog.points
    ]
    rows = [{"start": station.start, "stop": station.stop, "threshold": threshold} for station, threshold in stations]
    return JSONResponse({"stations": rows, "points": points}, headers=_HEADERS)


@router.get("/playground/{name:path}")
async def asset(name: str) -> Response:
    """One of the files that exist; a name from the URL never becomes a path."""
    if name not in {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.suffix in _TYPES}:
        message = f"There is no {name[:100]!r} here."
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": 404}
        return JSONResponse({"error": error}, status_code=404)
    return _file(name)


@router.get("/favicon.ico")
async def favicon() -> Response:
    return _file("icon.svg")
