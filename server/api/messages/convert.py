"""Anthropic's words to ours: a `MessagesRequest` as the chat request that means the same."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from server.api.chat.protocol import ChatCompletionRequest
from server.api.generate.chat_template import to_json
from server.api.generate.protocol import SizeFields
from server.api.http.body import check_values
from server.api.http.errors import APIError, from_validation, invalid
from server.api.messages.protocol import Block, CountTokensRequest, Message, MessagesRequest

_DROPPED = ("redacted_thinking",)


def to_chat(body: CountTokensRequest) -> ChatCompletionRequest:
    """APIError names the field of the Anthropic body that cannot be served."""
    if body.thread is not None:  # its clients send the whole conversation once they are told
        raise APIError(
            "thread: nothing is stored here, so send the whole conversation.",
            param="thread",
            details={"error_code": "thread_unsupported_request", "unsupported": []},
        )
    messages = [{"role": "system", "content": _texts(body.system, "system")}] if body.system else []
    for index, message in enumerate(body.messages):
        messages += _message(message, f"messages.{index}")
    fields: dict[str, Any] = {"model": body.model, "messages": messages, **_tools(body)}
    last = body.messages[-1]
    if last.role == "assistant" and "tool_calls" not in messages[-1]:
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.output_config is not None:
        if body.output_config.format is not None:
            schema = {"schema": body.output_config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        fields["reasoning_effort"] = body.output_config.effort
    if body.thinking is not None and body.thinking.get("type") in ("enabled", "disabled"):
        fields["enable_thinking"] = body.thinking["type"] == "enabled"
    if isinstance(body, MessagesRequest):
        shared = (
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "seed",
            "stream",
            "cache_salt",
            *SizeFields.model_fields,
        )
        fields |= {name: getattr(body, name) for name in shared}
        fields["stop"] = body.stop_sequences
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None


def _message(message: Message, param: str) -> list[dict[str, Any]]:
    """One of Anthropic's messages is several of OpenAI's when it carries tool results."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for place, block in enumerate(message.content):
        where = f"{param}.content.{place}"
        if block.type == "text":
            texts.append(_text(block, where))
        elif block.type == "tool_use" and message.role == "assistant":
            check_values(block.input or {}, where)
            arguments = to_json(block.input or {})
            call = {"type": "function", "function": {"name": block.name or "", "arguments": arguments}}
            calls.append(call | ({"id": block.id} if block.id else {}))
        elif block.type == "tool_result" and message.role == "user":
            content = _texts(block.content, f"{where}.content") if block.content else ""
            if block.is_error:  # templates have no field for it
                content = f"Error: {content}"
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif block.type == "thinking" and message.role == "assistant":
            thoughts.append(block.thinking or "")
        elif block.type not in _DROPPED:
            raise invalid(f"{where}: {block.type[:40]!r} is not understood in a message of the {message.role}.", where)
    # Results answer the calls of the message before, so they come first.
    own: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if thoughts:
        own["reasoning_content"] = "\n".join(thoughts)
    if calls:
        return [own | {"tool_calls": calls}]
    return results if results and not texts else [*results, own]


def _texts(content: str | list[Block], param: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text(block, f"{param}.{place}") for place, block in enumerate(content))


def _text(block: Block, param: str) -> str:
    if block.type != "text" or block.text is None:
        raise invalid(f"{param}: only text is understood, not {block.type[:40]!r}.", param)
    return block.text


def _tools(body: CountTokensRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if body.tools:
        tools = []
        for index, tool in enumerate(body.tools):
            if tool.type not in (None, "custom"):
                param = f"tools.{index}.type"
                raise invalid(f"{param}: {tool.type[:60]!r} is run by Anthropic and not offered here.", param)
            function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
            tools.append({"type": "function", "function": function})
        fields["tools"] = tools
    choice = body.tool_choice
    if choice is not None:
        if choice.type == "tool":
            if not choice.name:
                raise invalid("tool_choice.name is missing.", "tool_choice")
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            fields["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return fields
