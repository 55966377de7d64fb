"""The routes that take a body: they read it themselves, strictly, and are documented as if FastAPI had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from server.api import protocol
from server.api.chat.route import create_chat_completion
from server.api.completions.route import create_completion
from server.api.http.state import ServerState
from server.api.messages import count_message_tokens, create_message
from server.api.messages.protocol import CountTokensRequest, MessagesRequest
from server.api.responses import create_response
from server.api.responses.protocol import ResponsesRequest
from server.api.routes import detokenize, tokenize

# path, handler, request model, tag, summary
POSTS: list[tuple[str, Callable[..., Any], type[BaseModel], str, str]] = [
    ("/v1/completions", create_completion, protocol.CompletionRequest, "inference", "Continue a prompt"),
    (
        "/v1/chat/completions",
        create_chat_completion,
        protocol.ChatCompletionRequest,
        "inference",
        "Answer a conversation",
    ),
    ("/v1/messages", create_message, MessagesRequest, "inference", "Answer a conversation, Anthropic's API"),
    ("/v1/responses", create_response, ResponsesRequest, "inference", "Answer a conversation, OpenAI's newer API"),
    (
        "/v1/messages/count_tokens",
        count_message_tokens,
        CountTokensRequest,
        "tokenizer",
        "Prompt tokens of a conversation",
    ),
    ("/tokenize", tokenize, protocol.TokenizeRequest, "tokenizer", "Text or messages to token ids"),
    ("/detokenize", detokenize, protocol.DetokenizeRequest, "tokenizer", "Token ids to text"),
]


def add_posts(app: FastAPI, state: ServerState) -> None:
    for post in POSTS:
        _add_post(app, state, *post)


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


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document plus the request models and the error object."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema(
            [(model, "validation") for _, _, model, _, _ in POSTS],
            by_alias=True,
            ref_template="#/components/schemas/{model}",
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        schemas["Error"], schemas["AnthropicError"] = _ERROR_SCHEMA, _ANTHROPIC_ERROR_SCHEMA
        for path, operations in document["paths"].items():
            name = "AnthropicError" if path.startswith("/v1/messages") else "Error"
            error = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
            for operation in operations.values():
                answers = operation["responses"]
                answers.pop("422", None)
                for status, text in (("400", "Bad request"), ("404", "Not found"), ("503", "Not now")):
                    answers.setdefault(status, {"description": text, **error})
        app.openapi_schema = document
    return app.openapi_schema


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}

_ANTHROPIC_ERROR_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
