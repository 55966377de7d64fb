"""OpenAI's Responses API, stateless: nothing is stored, so nothing can be referred to later."""

from server.api.responses.route import create_response

__all__ = ["create_response"]
