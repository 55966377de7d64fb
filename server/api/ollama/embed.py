"""Ollama's /api/embed, and /api/embeddings before it: vectors in its shapes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from server.api.embeddings.route import each, numbers
from server.api.embeddings.vectors import embedding, vectors
from server.api.generate.generation import Generation, now
from server.api.generate.serving import json_response, read_body, read_prompts, respond
from server.api.generate.submission import Caller, PromptInput
from server.api.http.state import ServerState
from server.api.ollama.convert import model_name
from server.api.ollama.protocol import OllamaEmbeddingsRequest, OllamaEmbedRequest


async def ollama_embed(request: Request, state: ServerState) -> Response:
    body = await read_body(request, OllamaEmbedRequest, state)
    name = model_name(body.model, state)
    if not body.input:
        return json_response({"model": body.model, "embeddings": []})
    caller, most = Caller.of(request), state.catalog.max_model_len
    state.admission.check(caller.tenant)
    is_cut = None if body.truncate is False else "right"
    prompts = await read_prompts(body.input, state, "input", is_cut=is_cut)
    if is_cut:
        prompts = [PromptInput(prompt.token_ids[:most]) for prompt in prompts]

    async def whole(generation: Generation) -> Response:
        found = await vectors(generation, body.dimensions)
        answer = {
            "model": generation.model_id,
            "embeddings": await each(numbers, found),
            "total_duration": int((now() - caller.arrival_time) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": generation.usage()["prompt_tokens"],
            "size": generation.size_summary(),
        }
        return json_response(answer, generation.headers())

    return await respond(request, embedding(state, caller, name, body, prompts), False, whole)


async def ollama_embeddings(request: Request, state: ServerState) -> Response:
    body = await read_body(request, OllamaEmbeddingsRequest, state)
    name = model_name(body.model, state)
    if not body.prompt:
        return json_response({"embedding": []})
    caller = Caller.of(request)
    state.admission.check(caller.tenant)
    prompts = await read_prompts(body.prompt, state, "prompt")

    async def whole(generation: Generation) -> Response:
        (vector,) = await vectors(generation, body.dimensions)
        return json_response({"embedding": numbers(vector)}, generation.headers())

    return await respond(request, embedding(state, caller, name, body, prompts, "prompt"), False, whole)
