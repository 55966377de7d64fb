"""Body of `/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from pydantic.json_schema import WithJsonSchema

from server.api.generate.protocol import SamplingFields

Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    "minItems": 1,
                },
            ]
        }
    ),
]


class CompletionRequest(SamplingFields):
    prompt: Prompt = Field(description="text, texts, token ids, or lists of token ids")
    echo: bool | None = Field(default=None, description="put the prompt in front of the text")
    logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        default=None, description="so many likeliest tokens at every position; with echo also of the prompt; -1: all"
    )
    add_special_tokens: bool | None = Field(
        default=None, description="let the tokenizer add its own (BOS) to text prompts; default true"
    )
