"""/v1/embeddings: vectors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.api.embeddings.protocol import EmbeddingsRequest
from server.api.embeddings.vectors import embedding, vectors
from server.api.generate.generation import Generation
from server.api.generate.serving import json_response, read_body, read_prompts, respond
from server.api.generate.submission import Caller
from server.api.http.sse import Written
from server.api.http.state import ServerState

T = TypeVar("T")


async def create_embeddings(request: Request, state: ServerState) -> Response:
    body = await read_body(request, EmbeddingsRequest, state)
    caller = Caller.of(request)
    state.admission.check(caller.tenant)
    prompts = await read_prompts(body.input, state, "input")
    generation = embedding(state, caller, body.model, body, prompts)

    async def whole(generation: Generation) -> Response:
        write = _base64 if body.encoding_format == "base64" else numbers
        found = await vectors(generation, body.dimensions)
        usage = generation.usage()
        answer = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(await each(write, found))
            ],
            "model": generation.model_id,
            "size": generation.size_summary(),
            "usage": {"prompt_tokens": usage["prompt_tokens"], "total_tokens": usage["total_tokens"]},
        }
        return json_response(answer, generation.headers())

    return await respond(request, generation, False, whole)


async def each(write: Callable[[np.ndarray], T], vectors: list[np.ndarray]) -> list[T]:
    """`write` of each; there may be a thousand of thousands of numbers, for which the event loop does not wait."""
    return await asyncio.to_thread(lambda: [write(vector) for vector in vectors])


def numbers(vector: np.ndarray) -> Written:
    """A JSON list, each number with as many digits as tell float32 apart."""
    return Written(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY))


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
