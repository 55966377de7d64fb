"""The tools of one request: what goes into the prompt, what a call must look like, how calls are read."""

from __future__ import annotations

import logging
from typing import Any

from server.api.chat.protocol import NamedToolChoice, Tool
from server.api.generate.answer_reader import AnswerReader
from server.api.generate.chat_template import ChatTemplate
from server.api.generate.schemas import forced_call_schema, parameters_schema
from server.api.generate.tool_forms import HERMES, ToolForm
from server.api.http.errors import invalid

logger = logging.getLogger(__name__)
_told: set[str] = set()


class ToolUse:
    """The tools of one request. `is_forced`: the text is one call and nothing else, held to it by a grammar."""

    def __init__(
        self,
        tools: list[Tool] | None,
        choice: str | NamedToolChoice | None,
        template: ChatTemplate,
        *,
        allows_several: bool = True,
        is_strict: bool = False,
    ) -> None:
        """400 if the choice names no given tool; `is_strict`: also if the template knows no tools."""
        self.tools = tools or []
        self.template = template
        self.allows_several = allows_several
        choice = choice if choice is not None else ("auto" if self.tools else "none")
        if not self.tools and choice not in ("none", "auto"):
            raise invalid("tool_choice needs tools.", "tool_choice")
        self.is_active = bool(self.tools) and choice != "none"
        self.is_forced = self.is_active and choice != "auto"
        # A template without tools gets a prompt in the form that most models have seen.
        self.is_generic = not template.mentions_tools and not is_strict
        if self.is_active and not template.mentions_tools:
            if is_strict:
                raise invalid("The chat template of this model knows no tools.", "tools")
            if not _told:
                _told.add("generic")
                logger.info("the chat template knows no tools: they are described in Hermes' form (--tool-template)")
        self.callable = [tool.function for tool in self.tools]
        if isinstance(choice, NamedToolChoice):
            name = choice.function.name
            self.callable = [function for function in self.callable if function.name == name]
            if not self.callable:
                raise invalid(f"tool_choice names {name[:100]!r}, which is not among tools.", "tool_choice")
        self.form = HERMES if self.is_generic else ToolForm.of(template.source)

    @property
    def constrains(self) -> bool:
        """Whether there is a `schema` or there are `call_tags`."""
        return self.is_forced or (self.is_active and self.is_generic)

    def for_template(self) -> list[dict[str, Any]] | None:
        return [tool.model_dump(exclude_none=True) for tool in self.tools] if self.is_active else None

    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of a forced call, None if none is forced."""
        if not self.is_forced:
            return None
        return forced_call_schema((function.name, function.parameters) for function in self.callable)

    def call_tags(self) -> list[tuple[str, dict[str, Any], str]] | None:
        """(begin, schema, end) of the calls that a model may make which was not trained to; None for all others."""
        if not self.constrains or self.is_forced:
            return None
        return [
            (
                f'{HERMES.opening}\n{{"name": "{function.name}", "arguments": ',
                parameters_schema(function.parameters),
                f"}}\n{HERMES.closing}",
            )
            for function in self.callable
        ]

    @property
    def reads(self) -> bool:
        """Whether an answer may hold more than content."""
        return self.is_active or self.template.thinks

    def reader(self, has_thought_begun: bool) -> AnswerReader | None:
        """Reads one choice; None where its text is content and nothing else."""
        if not self.reads:
            return None
        thinks = self.template.thinks
        return AnswerReader(
            [function.name for function in self.callable] if self.is_active else (),
            self.form,
            is_forced=self.is_forced,
            allows_several=self.allows_several,
            thinks=thinks and not self.is_forced,
            has_thought_begun=has_thought_begun and not self.is_forced,
        )
