"""A replica without a model, for tests of what stands in front of it: `python -m tests.deploy.stub_replica HOST PORT`.

POST / streams `tokens` lines, one each `delay` seconds (both from the query), or answers at once with ?plain=1.
?refused_by=HOST is refused by that one, ?deadly=1 ends the process. /health is 503 after SIGTERM; uvicorn then finishes
what runs.
"""

from __future__ import annotations

import asyncio
import os
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

HOST, PORT = sys.argv[1], int(sys.argv[2])


async def health(request: Request):
    return PlainTextResponse("draining", 503) if server.should_exit else PlainTextResponse("ok")


async def work(request: Request):
    body = await request.body()
    query = request.query_params
    if query.get("refused_by") == HOST:
        return JSONResponse({"error": {"message": "full"}}, 503, {"Retry-After": "1"})
    if "deadly" in query:
        os._exit(1)
    delay, tokens = float(query.get("delay", 0.01)), int(query.get("tokens", 5))
    if "plain" in query:
        await asyncio.sleep(delay)
        return JSONResponse({"host": HOST, "bytes": len(body)})

    async def stream():
        for _ in range(tokens):
            yield f"data: {HOST}\n\n"
            await asyncio.sleep(delay)
        yield "data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


app = Starlette(routes=[Route("/health", health), Route("/", work, methods=["POST"])])
server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=PORT, log_level="warning", timeout_graceful_shutdown=30))

if __name__ == "__main__":
    server.run()
