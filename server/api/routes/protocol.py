"""Bodies of `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from server.api.chat.protocol import ChatMessage, Tool
from server.api.generate.protocol import TokenId
from server.api.http.body import MAX_MESSAGES, MAX_PARTS, AtMost, Body


class TokenizeRequest(Body):
    model: str | None = Field(default=None, description="checked, otherwise without effect")
    prompt: str | None = Field(default=None, description="a text, or:")
    messages: Annotated[list[ChatMessage], AtMost(MAX_MESSAGES, MAX_PARTS)] | None = Field(
        default=None, description="a conversation"
    )
    add_special_tokens: bool | None = Field(default=None, description="default true for a text, false for messages")
    add_generation_prompt: bool | None = Field(default=None, description="as for chat")
    continue_final_message: bool | None = Field(default=None, description="as for chat")
    chat_template: str | None = Field(default=None, description="as for chat")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="as for chat")
    tools: Annotated[list[Tool], AtMost(128)] | None = Field(default=None, description="as for chat")
    return_token_strs: bool | None = Field(default=None, description="add token_strs")


class DetokenizeRequest(Body):
    model: str | None = Field(default=None, description="checked, otherwise without effect")
    tokens: Annotated[list[TokenId], AtMost(1 << 18)] = Field(description="token ids")
