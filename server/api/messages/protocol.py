"""Bodies of `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.generate.protocol import CacheSalt, SizeFields
from server.api.http.body import MAX_MESSAGES, MAX_PARTS, AtMost, Body


class Block(Body):
    """One block of content; which fields count depends on `type`."""

    type: str = Field(description="text, thinking, tool_use or tool_result; anything else is refused")
    text: str | None = Field(default=None, description="of text")
    thinking: str | None = Field(default=None, description="of thinking")
    id: str | None = Field(default=None, description="of tool_use")
    name: str | None = Field(default=None, description="of tool_use")
    input: dict[str, Any] | None = Field(default=None, description="of tool_use")
    tool_use_id: str | None = Field(default=None, description="of tool_result")
    content: str | Annotated[list[Block], AtMost(1024)] | None = Field(default=None, description="of tool_result")
    is_error: bool | None = Field(default=None, description="of tool_result")


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], AtMost(1024)]


class MessageTool(Body):
    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.:-]+$")]
    description: str | None = None
    input_schema: dict[str, Any] | None = Field(default=None, description="JSON schema of the input")
    type: str | None = Field(default=None, description="custom; the tools that Anthropic runs itself are refused")


class MessageToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, description="of tool")
    disable_parallel_tool_use: bool | None = Field(default=None, description="at most one call")


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema of the text")


class OutputConfig(Body):
    format: OutputFormat | None = Field(default=None, description="constrains the text")
    effort: str | None = Field(default=None, description="for the template, as reasoning_effort")


class CountTokensRequest(Body):
    written_mark = b"tool_use"

    model: str | None = Field(default=None, description="NAME, or NAME:24L for a size")
    messages: Annotated[list[Message], Field(min_length=1), AtMost(MAX_MESSAGES, MAX_PARTS)] = Field(
        description="the conversation; a last message of the assistant is continued"
    )
    system: str | Annotated[list[Block], AtMost(1024)] | None = Field(default=None, description="system prompt")
    tools: Annotated[list[MessageTool], AtMost(128)] | None = Field(default=None, description="functions to call")
    tool_choice: MessageToolChoice | None = Field(default=None, description="auto, any, none or one tool")
    thinking: dict[str, Any] | None = Field(
        default=None, description="type enabled or disabled: for templates that know enable_thinking"
    )
    output_config: OutputConfig | None = Field(default=None, description="format of the text")
    thread: dict[str, Any] | None = Field(default=None, description="not offered: nothing is stored")


class MessagesRequest(SizeFields, CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = Field(description="most tokens to generate")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None, description="0: greedy; default: the model's"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, description="nucleus; default: the model's")
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(default=None, description="0 or -1: all")
    stop_sequences: Annotated[list[str], AtMost(1024)] | None = Field(
        default=None, description="texts that end the answer"
    )
    stream: bool | None = Field(default=None, description="send server-sent events as tokens come")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(default=None, description="as for chat")
    metadata: dict[str, Any] | None = Field(default=None, description="ignored")
    service_tier: str | None = Field(default=None, description="ignored")
    cache_salt: CacheSalt | None = Field(default=None, description="as for chat")
