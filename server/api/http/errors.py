"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from model_store.errors import BoomerangError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "overloaded_error",
}


_LONGEST_RETRY = 30.0  # seconds
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class APIError(BoomerangError):
    """Ends a request with a status and OpenAI's error object. `param` names the field at fault."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        """`details` are what clients of `/v1/messages` act on."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.extra_headers = headers or {}
        self.details = details

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "internal_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code or self.status}}

    def anthropic_body(self) -> dict[str, Any]:
        """The same in the shape of Anthropic's API."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        details = {} if self.details is None else {"details": self.details}
        return {"type": "error", "error": {"type": kind, "message": self.message, **details}}

    def ollama_body(self) -> dict[str, Any]:
        return {"error": self.message}

    def rename(self, param: str, to: str) -> None:
        """Another route's word for a parameter and all that is inside of it."""
        if self.param is not None and (self.param == param or self.param.startswith(f"{param}.")):
            self.message = self.message.replace(self.param, to)
            self.param = to

    def headers(self) -> dict[str, str]:
        """openai-python obeys both: when to come back, and whether that can help at all.

        openai-python 3.54 sleeps what it is told up to two minutes and above that does not come back at all.
        """
        if self.status in (429, 503):
            seconds = min(self.retry_after or 1, _LONGEST_RETRY)
            return {"retry-after": str(max(1, math.ceil(seconds))), **self.extra_headers}
        return {"x-should-retry": "false", **self.extra_headers}

    def response(self, path: str = "", is_anthropic: bool = False) -> Response:
        """`path` is that of the route: clients of `/v1/messages` and of `/api/` expect other shapes.

        `is_anthropic`: the client says by a header that it speaks Anthropic's API.
        """
        body = self.ollama_body() if path.startswith("/api/") else self.body()
        body = self.anthropic_body() if is_anthropic or path.startswith("/v1/messages") else body
        return Response(orjson.dumps(body), self.status, headers=self.headers(), media_type="application/json")


def invalid(message: str, param: str | None = None) -> APIError:
    """400 for a field that is wrong."""
    return APIError(message, param=param)


def from_validation(error: ValidationError) -> APIError:
    """Pydantic's complaints about one parameter as a sentence that names it."""
    first, messages = None, []
    for complaint in error.errors(include_url=False, include_context=False, include_input=False):
        path = ".".join(str(part) for part in complaint["loc"] if not _is_branch(part))
        message = complaint["msg"].removeprefix("Value error, ")
        if first is None:
            first = path
            messages.append(message)
        elif path == first and message not in messages:  # another branch of the same union
            messages.append(message.removeprefix("Input should be "))
    text = " or ".join(messages)
    return APIError(f"{first}: {text}" if first else text, param=first or None)


def _is_branch(part: int | str) -> bool:
    """Whether a piece of pydantic's path names a branch of a union (`str`, `list[str]`, `ToolCall`), not a field."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part or part[:1].isupper())


def _response(request: Request, error: APIError) -> Response:
    """In the shape of the route: in front of its path may stand a proxy's prefix."""
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    return error.response(path, "anthropic-version" in request.headers)


async def handle_api_error(request: Request, error: APIError) -> Response:
    return _response(request, error)


async def handle_http_error(request: Request, error: Any) -> Response:
    """Starlette's own 404 and 405, in the same shape."""
    return _response(request, APIError(str(error.detail), status=error.status_code, headers=error.headers))


async def handle_recursion(request: Request, error: RecursionError) -> Response:
    """Something that reads what the client sent is recursive: the client's to mend."""
    return _response(request, invalid("The request is nested too deeply."))


async def handle_unexpected(request: Request, error: Exception) -> Response:
    """A bug of ours. The text stays in the log: it may hold what other requests sent."""
    return _response(request, APIError("The server failed to handle this request.", status=500))
