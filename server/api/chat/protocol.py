"""Body of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.generate.protocol import SamplingFields
from server.api.http.body import MAX_MESSAGES, MAX_PARTS, AtMost, Body


class ContentPart(Body):
    type: str = Field(description="text")
    text: str | None = None


class ToolCallFunction(Body):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: ToolCallFunction


class ChatMessage(Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[ContentPart], AtMost(1024)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], AtMost(128)] | None = None
    tool_call_id: str | None = None


class ToolFunction(Body):
    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.:-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of the arguments")
    strict: bool | None = Field(default=None, description="ignored: forced calls always follow the schema")


class Tool(Body):
    type: Literal["function"]
    function: ToolFunction


class NamedToolFunction(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"]
    function: NamedToolFunction


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1), AtMost(MAX_MESSAGES, MAX_PARTS)] = Field(
        description="the conversation, oldest first"
    )
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="the newer name of max_tokens"
    )
    logprobs: bool | None = Field(default=None, description="log-probability of every generated token")
    top_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        default=None, description="and of so many likeliest ones; -1: all"
    )
    tools: Annotated[list[Tool], AtMost(128)] | None = Field(default=None, description="functions to call")
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        default=None, description="none, auto, required or one function; the last two hold the text to a call"
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false: at most one call")
    add_generation_prompt: bool | None = Field(default=None, description="open the answer; default true")
    continue_final_message: bool | None = Field(default=None, description="go on with the last message")
    add_special_tokens: bool | None = Field(default=None, description="on top of those of the template; default false")
    echo: bool | None = Field(default=None, description="put the last message in front, if it is of the answer's role")
    documents: Annotated[list[dict[str, Any]], AtMost(1024)] | None = Field(
        default=None, description="for the template"
    )
    reasoning_effort: str | None = Field(default=None, description="for the template")
    enable_thinking: bool | None = Field(default=None, description="for the template: whether to reason first")
    chat_template: str | None = Field(default=None, description="needs --trust-request-chat-template")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="further variables for the template")
