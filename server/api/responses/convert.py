"""A `ResponsesRequest` as the chat request that means the same."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from server.api.chat.protocol import ChatCompletionRequest, ContentPart
from server.api.generate.protocol import SizeFields
from server.api.http.errors import from_validation, invalid
from server.api.responses.protocol import InputItem, ResponsesRequest

_LOGPROBS = "message.output_text.logprobs"
_SHARED = (
    *("model", "temperature", "top_p", "top_k", "seed", "stop", "stream", "structured_outputs"),
    *("parallel_tool_calls", "cache_salt", "request_id", "chat_template_kwargs", "enable_thinking", "user"),
    *SizeFields.model_fields,
)


def to_chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """APIError names the field of the body that cannot be served."""
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for index, item in enumerate(body.input):
            _add(messages, item, f"input.{index}")
    if not messages:
        raise invalid("input holds no message.", "input")
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SHARED} | {"messages": messages}
    fields["max_completion_tokens"] = body.max_output_tokens
    if _LOGPROBS in (body.include or ()):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    elif body.top_logprobs:
        raise invalid(f"top_logprobs needs {_LOGPROBS!r} in include.", "top_logprobs")
    if body.text is not None and body.text.format is not None:
        asked = body.text.format
        fields["response_format"] = {"type": asked.type}
        if asked.type != "json_schema" and asked.schema_ is not None:
            fields["response_format"]["schema"] = asked.schema_
        elif asked.type == "json_schema":
            fields["response_format"]["json_schema"] = {"schema": asked.schema_}
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    fields |= _tools(body)
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None


def _add(messages: list[dict[str, Any]], item: InputItem, param: str) -> None:
    """Append an item to the conversation; consecutive calls belong to one message of the assistant."""
    kind = item.type or "message"
    if kind == "message":
        if not item.role or item.content is None:
            raise invalid(f"{param} needs role and content.", param)
        messages.append({"role": item.role, "content": _text(item.content, f"{param}.content")})
    elif kind == "function_call":
        if not item.name or not item.call_id:
            raise invalid(f"{param} needs name and call_id.", param)
        call = {
            "id": item.call_id,
            "type": "function",
            "function": {"name": item.name, "arguments": item.arguments or "{}"},
        }
        if not (messages and messages[-1]["role"] == "assistant"):
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        if not item.call_id or item.output is None:
            raise invalid(f"{param} needs call_id and output.", param)
        content = _text(item.output, f"{param}.output")
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
    elif kind != "reasoning":  # what the model thought before is no part of what it is told
        raise invalid(f"{param}: {kind[:60]!r} is not understood.", param)


def _text(content: str | list[ContentPart], param: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise invalid(f"{param}.{place}: only text is understood, not {part.type[:40]!r}.", f"{param}.{place}")
        texts.append(part.text)
    return "\n".join(texts)


def _tools(body: ResponsesRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if body.tools:
        fields["tools"] = []
        for index, tool in enumerate(body.tools):
            if tool.type != "function" or tool.name is None:
                param = f"tools.{index}"
                raise invalid(f"{param}: only functions with a name are offered, not {tool.type[:60]!r}.", param)
            function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
            fields["tools"].append({"type": "function", "function": function})
    choice = body.tool_choice
    if choice is not None:
        if not isinstance(choice, str):
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            fields["tool_choice"] = choice
    return fields
