"""Tool calls: what goes into the prompt, what a forced call must look like, and how calls are read from the text."""

from __future__ import annotations

import uuid
from typing import Any

import orjson

from server.api.chat.protocol import ChatMessage, NamedToolChoice, Tool
from server.api.generate.chat_template import ChatTemplate
from server.api.http.errors import invalid

# The form that most templates teach (Hermes, Qwen); Llama 3 writes the bare JSON object.
OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolUse:
    """The tools of one request. `is_forced`: the text is one call and nothing else, held to it by a grammar."""

    def __init__(
        self,
        tools: list[Tool] | None,
        choice: str | NamedToolChoice | None,
        template: ChatTemplate | None,
        allows_several: bool = True,
    ) -> None:
        """400 if the choice names no given tool or the template knows no tools."""
        self.tools = tools or []
        self.allows_several = allows_several
        self.choice = choice if choice is not None else ("auto" if self.tools else "none")
        if not self.tools and self.choice not in ("none", "auto"):
            raise invalid("tool_choice needs tools.", "tool_choice")
        if self.tools and self.choice != "none" and not (template and template.mentions_tools):
            raise invalid("The chat template of this model knows no tools.", "tools")
        if isinstance(self.choice, NamedToolChoice):
            name = self.choice.function.name
            if name not in {tool.function.name for tool in self.tools}:
                raise invalid(f"tool_choice names {name[:100]!r}, which is not among tools.", "tool_choice")
        self.is_active = bool(self.tools) and self.choice != "none"
        self.is_forced = self.is_active and self.choice != "auto"

    def for_template(self) -> list[dict[str, Any]] | None:
        if not self.is_active:
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of a forced call, None if none is forced."""
        if not self.is_forced:
            return None
        tools = self.tools
        if isinstance(self.choice, NamedToolChoice):
            tools = [tool for tool in tools if tool.function.name == self.choice.function.name]
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": tool.function.parameters or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}

    def read(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """(content outside of calls or None, calls). Text that is not a well-formed call of a given tool stays text."""
        if not self.is_active:
            return text, []
        if OPEN in text:
            content, calls = self._read_tagged(text)
            return content, calls if self.allows_several else calls[:1]
        call = self._call(text)
        return (None, [call]) if call else (text, [])

    def _read_tagged(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        content, calls, rest = [], [], text
        while OPEN in rest:
            before, _, rest = rest.partition(OPEN)
            body, close, after = rest.partition(CLOSE)
            call = self._call(body)
            content.append(before)
            if call is None:
                content.append(OPEN + body + close)
            else:
                calls.append(call)
            rest = after
        content.append(rest)
        return "".join(content).strip() or None, calls

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            value = orjson.loads(text.strip())
        except orjson.JSONDecodeError:
            return None
        if not isinstance(value, dict) or value.get("name") not in {tool.function.name for tool in self.tools}:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        return {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": value["name"], "arguments": orjson.dumps(arguments).decode()},
        }


class ToolStream:
    """Holds text back while it may be a call; `push` returns what is certainly content."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._text = ""
        self._sent = 0

    def push(self, piece: str) -> str:
        self._text += piece
        if self._use.is_forced or self._text.lstrip()[:1] == "{":
            return ""
        marker = self._text.find(OPEN)
        end = marker if marker >= 0 else len(self._text) - _partial(self._text)
        new = self._text[self._sent : end]
        if not self._text[:end].strip():  # blanks in front of a call are not content
            return ""
        self._sent = max(self._sent, end)
        return new

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """(content not sent yet, calls)."""
        content, calls = self._use.read(self._text)
        if calls:
            return "", calls
        return (content or "")[self._sent :], []


def _partial(text: str) -> int:
    """Length of the longest end of `text` that begins the opening tag."""
    return next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content as text, call arguments as objects, no empty fields."""
    result = []
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
                call["function"]["arguments"] = _arguments(call["function"]["arguments"])
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


def _arguments(value: str | dict[str, Any]) -> Any:
    if isinstance(value, str):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value
