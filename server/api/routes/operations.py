"""Every route of the API. Those that take a body read it themselves, strictly, and are documented as if FastAPI had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.api.chat.protocol import ChatCompletionRequest
from server.api.chat.route import create_chat_completion
from server.api.completions.protocol import CompletionRequest
from server.api.completions.route import create_completion
from server.api.embeddings.protocol import EmbeddingsRequest
from server.api.embeddings.route import create_embeddings
from server.api.http.state import ServerState
from server.api.messages.protocol import CountTokensRequest, MessagesRequest
from server.api.messages.route import count_message_tokens, create_message
from server.api.ollama.embed import ollama_embed, ollama_embeddings
from server.api.ollama.models import ollama_show
from server.api.ollama.models import router as ollama_router
from server.api.ollama.protocol import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from server.api.ollama.route import ollama_chat, ollama_generate
from server.api.responses.protocol import ResponsesRequest
from server.api.responses.route import create_response
from server.api.routes import health, models, sleep, tokenizer
from server.api.routes.protocol import DetokenizeRequest, TokenizeRequest
from server.api.routes.tokenizer import detokenize, tokenize

ROUTERS = (models.router, tokenizer.router, ollama_router, health.router, sleep.router)

# path, handler, request model, tag, summary
POSTS: list[tuple[str, Callable[..., Any], type[BaseModel], str, str]] = [
    ("/v1/completions", create_completion, CompletionRequest, "inference", "Continue a prompt"),
    (
        "/v1/chat/completions",
        create_chat_completion,
        ChatCompletionRequest,
        "inference",
        "Answer a conversation",
    ),
    ("/v1/messages", create_message, MessagesRequest, "inference", "Answer a conversation, Anthropic's API"),
    ("/v1/responses", create_response, ResponsesRequest, "inference", "Answer a conversation, OpenAI's newer API"),
    ("/v1/embeddings", create_embeddings, EmbeddingsRequest, "inference", "Texts to vectors"),
    (
        "/v1/messages/count_tokens",
        count_message_tokens,
        CountTokensRequest,
        "tokenizer",
        "Prompt tokens of a conversation",
    ),
    ("/api/chat", ollama_chat, OllamaChatRequest, "ollama", "Answer a conversation, Ollama's API"),
    ("/api/generate", ollama_generate, OllamaGenerateRequest, "ollama", "Answer or continue a prompt, Ollama's API"),
    ("/api/embed", ollama_embed, OllamaEmbedRequest, "ollama", "Texts to vectors, Ollama's API"),
    ("/api/embeddings", ollama_embeddings, OllamaEmbeddingsRequest, "ollama", "The same, its older form"),
    ("/api/show", ollama_show, OllamaShowRequest, "ollama", "What a model is, Ollama's API"),
    ("/tokenize", tokenize, TokenizeRequest, "tokenizer", "Text or messages to token ids"),
    ("/detokenize", detokenize, DetokenizeRequest, "tokenizer", "Token ids to text"),
]


def add_operations(app: FastAPI, state: ServerState) -> None:
    for router in ROUTERS:
        # Not `include_router`: what it adds does not say which of its routes matches, and the gateway asks that.
        app.router.routes.extend(router.routes)
    for post in POSTS:
        _add_post(app, state, *post)


def answer_head(app: FastAPI) -> None:
    """HEAD wherever GET is; the server sends no body then."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods is not None and "GET" in route.methods:
            route.methods.add("HEAD")


def _add_post(
    app: FastAPI,
    state: ServerState,
    path: str,
    handler: Callable[..., Any],
    model: type[BaseModel],
    tag: str,
    summary: str,
) -> None:
    """A route that reads its body itself (strictly, with orjson), documented as if FastAPI had."""

    async def endpoint(request: Request) -> Response:
        return await handler(request, state)

    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        tags=[tag],
        summary=summary,
        operation_id=path.strip("/").replace("/", "_"),
        response_class=Response,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )
