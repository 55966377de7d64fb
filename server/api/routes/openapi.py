"""The OpenAPI document: FastAPI's own plus the request bodies and the error objects."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from server.api.routes.operations import POSTS


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document plus the request models and the error object."""
    if app.openapi_schema is None:
        routes = [_without_head(route) for route in app.routes]
        document = get_openapi(title=app.title, version=app.version, routes=routes)
        _, definitions = models_json_schema(
            [(model, "validation") for _, _, model, _, _ in POSTS],
            by_alias=True,
            ref_template="#/components/schemas/{model}",
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        schemas["Error"], schemas["AnthropicError"] = _ERROR_SCHEMA, _ANTHROPIC_ERROR_SCHEMA
        schemas["OllamaError"] = _OLLAMA_ERROR_SCHEMA
        for path, operations in document["paths"].items():
            name = "OllamaError" if path.startswith("/api/") else "Error"
            name = "AnthropicError" if path.startswith("/v1/messages") else name
            error = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
            for operation in operations.values():
                answers = operation["responses"]
                answers.pop("422", None)
                for status, text in (("400", "Bad request"), ("404", "Not found"), ("503", "Not now")):
                    answers.setdefault(status, {"description": text, **error})
        app.openapi_schema = document
    return app.openapi_schema


def _without_head(route: BaseRoute) -> BaseRoute:
    """HEAD is answered wherever GET is and documented nowhere: FastAPI would give both the same operation id."""
    if not isinstance(route, APIRoute):
        return route
    documented = copy.copy(route)
    documented.methods = (route.methods or set()) - {"HEAD"}
    return documented


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

_OLLAMA_ERROR_SCHEMA = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}

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
