"""A conversation as chat templates expect it; for a template without tools, with the tools in words."""

from __future__ import annotations

import itertools
import json
from typing import Any

from server.api.chat.protocol import ChatMessage
from server.api.generate.chat_template import Arguments, to_json
from server.api.generate.tool_forms import HERMES
from server.api.http.body import WrittenFloats
from server.api.http.errors import invalid

# What Hermes and Qwen 2.5 were taught, and what most later models have seen.
_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content as text, call arguments as objects, no empty fields."""
    result, numbers = [], WrittenFloats("messages")
    for index, message in enumerate(messages):
        item: dict[str, Any] = dict(message.model_extra or {})
        item["role"] = "system" if message.role == "developer" else message.role
        item["content"] = message_text(message, f"messages.{index}.content")
        for name in ("name", "tool_call_id"):
            if getattr(message, name) is not None:
                item[name] = getattr(message, name)
        if message.tool_calls:
            item["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
            for call in item["tool_calls"]:
                call["function"]["arguments"] = Arguments.read(call["function"]["arguments"], numbers)
        result.append(item)
    return result


def message_text(message: ChatMessage, param: str = "messages") -> str:
    """The text of a message; APIError names `param` if there is none or it is not text."""
    if message.content is None:
        if message.role != "assistant":
            raise invalid(f"{param} is missing.", param)
        return ""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for place, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise invalid(f"{param}.{place}: only text is understood, not {part.type[:40]!r}.", f"{param}.{place}")
        texts.append(part.text)
    return "\n".join(texts)


def with_tools_in_words(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The same conversation for a template that knows no tools: descriptions, calls and results as text.

    `messages` as `plain_messages` returns them. Descriptions go to the end of the system message.
    """
    result: list[dict[str, Any]] = []
    for is_result, group in itertools.groupby(messages, key=lambda message: message["role"] == "tool"):
        if is_result:
            texts = [f"<tool_response>\n{message['content']}\n</tool_response>" for message in group]
            result.append({"role": "user", "content": "\n".join(texts)})
            continue
        for message in group:
            calls = message.get("tool_calls")
            if not calls:
                result.append(message)
                continue
            texts = [message["content"]] if message["content"] else []
            texts += [_call_text(call["function"]) for call in calls]
            result.append({"role": message["role"], "content": "\n".join(texts)})
    if tools:
        described = _PROMPT.format(tools="\n".join(map(to_json, tools)))
        if result and result[0]["role"] == "system":
            result[0] = result[0] | {"content": f"{result[0]['content']}\n\n{described}".lstrip()}
        else:
            result.insert(0, {"role": "system", "content": described})
    return result


def _call_text(function: dict[str, Any]) -> str:
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'{HERMES.opening}\n{{"name": {name}, "arguments": {to_json(function["arguments"])}}}\n{HERMES.closing}'
