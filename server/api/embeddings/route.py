"""/v1/embeddings: vectors in OpenAI's shape."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.api.embeddings.protocol import EmbeddingsRequest
from server.api.embeddings.vectors import embedding, vectors
from server.api.generate.generation import Generation
from server.api.generate.serving import json_response, read_body, read_prompts, respond
from server.api.generate.submission import Caller
from server.api.http.state import ServerState


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
            "data": [{"object": "embedding", "index": i, "embedding": write(one)} for i, one in enumerate(found)],
            "model": generation.model_id,
            "size": generation.size_summary(),
            "usage": {"prompt_tokens": usage["prompt_tokens"], "total_tokens": usage["total_tokens"]},
        }
        return json_response(answer, generation.headers())

    return await respond(request, generation, False, whole)


def numbers(vector: np.ndarray) -> Any:
    """A JSON list, each number with as many digits as tell float32 apart."""
    return orjson.Fragment(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY))


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
