"""Body of `/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.chat.protocol import ContentPart
from server.api.generate.protocol import CacheSalt, JSONSchemaFormat, SizeFields, StructuredOutputs
from server.api.http.body import MAX_MESSAGES, MAX_PARTS, AtMost, Body


class InputItem(Body):
    """A message, a call the model made, or what a call returned."""

    type: str | None = Field(default=None, description="message (default), function_call, function_call_output")
    role: str | None = Field(default=None, description="of message")
    content: str | Annotated[list[ContentPart], AtMost(1024)] | None = Field(default=None, description="of message")
    call_id: str | None = Field(default=None, description="of function_call and function_call_output")
    name: str | None = Field(default=None, description="of function_call")
    arguments: str | None = Field(default=None, description="of function_call")
    output: str | Annotated[list[ContentPart], AtMost(1024)] | None = Field(
        default=None, description="of function_call_output"
    )


class TextFormat(JSONSchemaFormat):
    type: Literal["text", "json_object", "json_schema"] = Field(description="what the text must be")


class TextConfig(Body):
    format: TextFormat | None = Field(default=None, description="constrains the text")
    verbosity: str | None = Field(default=None, description="ignored")


class Reasoning(Body):
    effort: str | None = Field(default=None, description="for the template, as reasoning_effort")
    summary: str | None = Field(default=None, description="ignored: there is no reasoning to sum up")


class ResponseTool(Body):
    type: str = Field(description="function; the tools that OpenAI runs itself are refused")
    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.:-]+$")] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of the arguments")
    strict: bool | None = Field(default=None, description="ignored: forced calls always follow the schema")


class FunctionChoice(Body):
    type: Literal["function"]
    name: str


class ResponsesRequest(SizeFields):
    model: str | None = Field(default=None, description="NAME, or NAME:24L for a size")
    input: Annotated[str | Annotated[list[InputItem], AtMost(MAX_MESSAGES, MAX_PARTS)], Field(min_length=1)] = Field(
        description="a text, or messages, calls and their results"
    )
    instructions: str | None = Field(default=None, description="system prompt")
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="most tokens to generate; what the context holds if left out"
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None, description="0: greedy; default: the model's"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, description="nucleus; default: the model's")
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(default=None, description="0 or -1: all")
    top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="likeliest tokens at every position, with include"
    )
    include: Annotated[list[str], AtMost(128)] | None = Field(
        default=None, description="message.output_text.logprobs; others are ignored"
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(default=None, description="as for chat")
    stop: str | Annotated[list[str], AtMost(1024)] | None = Field(default=None, description="as for chat")
    stream: bool | None = Field(default=None, description="send server-sent events as tokens come")
    stream_options: dict[str, Any] | None = Field(default=None, description="ignored")
    text: TextConfig | None = Field(default=None, description="format of the text")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="as for chat")
    tools: Annotated[list[ResponseTool], AtMost(128)] | None = Field(default=None, description="functions to call")
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = Field(
        default=None, description="as for chat"
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false: at most one call")
    reasoning: Reasoning | None = Field(default=None, description="effort, for templates that know it")
    truncation: Literal["disabled"] | None = Field(default=None, description="a prompt that is too long is refused")
    store: bool | None = Field(default=None, description="ignored: nothing is stored")
    background: Literal[False] | None = Field(default=None, description="not offered: nothing is stored")
    previous_response_id: None = Field(default=None, description="not offered: nothing is stored")
    conversation: None = Field(default=None, description="not offered: nothing is stored")
    prompt: None = Field(default=None, description="not offered: nothing is stored")
    max_tool_calls: int | None = Field(default=None, description="ignored: it counts tools that OpenAI runs")
    cache_salt: CacheSalt | None = Field(default=None, description="as for chat")
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="part of the answer's id"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="as for chat")
    enable_thinking: bool | None = Field(default=None, description="as for chat")
    metadata: Annotated[dict[str, str], AtMost(1024)] | None = Field(default=None, description="returned as it is")
    user: str | None = Field(default=None, description="returned as it is")
    service_tier: str | None = Field(default=None, description="ignored")
