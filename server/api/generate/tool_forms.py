"""How models write their tool calls, by what their chat templates teach.

  hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, anywhere; Qwen 2.5 and 3, Hermes
  llama3   the whole answer is {"name": ..., "parameters": {...}}, several with `;` between; may follow <|python_tag|>
  mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] or [TOOL_CALLS]name[ARGS]{...}
  generic  hermes or llama3: for a template that shows no form

In each of them an answer that is nothing but one call's JSON is a call: models forget their marks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a model writes its calls."""

    name: str
    opening: str = ""  # mark in front of a call, anywhere in the text
    closing: str = ""
    bare: bool = False  # an answer that is nothing but JSON objects may be calls
    prefix: str = ""  # mark that may precede those

    @staticmethod
    def of(template: str) -> ToolForm:
        """The form that a chat template teaches."""
        if "[TOOL_CALLS]" in template:
            return MISTRAL
        if "<tool_call>" in template:
            return HERMES
        if "<|python_tag|>" in template or '"parameters":' in template.replace("'", '"'):
            return LLAMA3
        return GENERIC

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens and must not be skipped."""
        extra = ("[ARGS]", "[CALL_ID]") if self is MISTRAL else ()
        return tuple(mark for mark in (self.opening, self.closing, self.prefix, *extra) if mark)


HERMES = ToolForm("hermes", "<tool_call>", "</tool_call>", bare=True)
LLAMA3 = ToolForm("llama3", bare=True, prefix="<|python_tag|>")
MISTRAL = ToolForm("mistral", "[TOOL_CALLS]", bare=True)
GENERIC = ToolForm("generic", "<tool_call>", "</tool_call>", bare=True, prefix="<|python_tag|>")
