"""Renders a conversation with a Hugging Face chat template, in a sandbox."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols

from server.api.generate.template_sandbox import TemplateEnvironment
from server.api.http.body import WrittenFloat, WrittenFloats

# What a template can raise over a conversation that it was not written for.
_CLASHES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)
_MOST_OF_A_DATE = 256  # characters of its form

# Marks where the final message ends, to cut off whatever the template adds after it.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class TemplateError(ValueError):
    """The template refused the conversation or failed on it."""


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; in serving it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it as a class attribute

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class Arguments(dict):
    """A call's arguments for templates: a mapping whose JSON is the text that the model once wrote."""

    text: str

    @classmethod
    def read(cls, value: str | dict[str, Any], numbers: WrittenFloats) -> Any:
        """From the wire. Text that is no JSON object stays text; none at all is an empty object.

        `numbers` counts the fractions of all calls together.
        """
        if isinstance(value, dict):
            return value
        if not value.strip() or value.strip() == "null":
            value = "{}"
        try:
            parsed = json.loads(value, parse_float=numbers)
        except (ValueError, RecursionError):
            return value
        if not isinstance(parsed, dict):
            return parsed if parsed is not None else cls.read("{}", numbers)
        arguments = cls(parsed)
        arguments.text = value
        return arguments


# Stands for what has a text of its own while JSON is written; nobody outside can know it.
_PLACE = secrets.token_hex(16)
_PLACES = re.compile(f'"{_PLACE}:(\\d+)"')


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which would change the prompt. Call arguments stay as the model wrote them."""
    if indent is not None or options or ensure_ascii:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
    texts: list[str] = []
    written = json.dumps(_replaced(value, texts), ensure_ascii=False)
    return _PLACES.sub(lambda match: texts[int(match[1])], written) if texts else written


def _replaced(value: Any, texts: list[str]) -> Any:
    if isinstance(value, Arguments | WrittenFloat):
        texts.append(value.text)
        return f"{_PLACE}:{len(texts) - 1}"
    if isinstance(value, dict):
        return {key: _replaced(item, texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, texts) for item in value]
    return value


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form[:_MOST_OF_A_DATE])


def _environment() -> TemplateEnvironment:
    environment = TemplateEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=32)
def _compile(source: str) -> tuple[TemplateEnvironment, jinja2.Template]:
    environment = _environment()
    return environment, environment.counted(source)


class ChatTemplate:
    """A compiled template and the special tokens that it may print."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """TemplateError if `source` is not valid Jinja."""
        self.source = source
        self.special_tokens = special_tokens
        try:
            self._environment, self._template = _compile(source)
        except (jinja2.TemplateError, *_CLASHES) as error:
            raise TemplateError(f"the chat template is not valid: {error}") from None

    @property
    def mentions_tools(self) -> bool:
        return "tools" in self.source

    @property
    def thinks(self) -> bool:
        """Whether answers may begin with reasoning between <think> and </think>."""
        return "</think>" in self.source

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text; `variables` are further names for the template.

        TemplateError if the template raises (wrong order of roles, missing field).
        """
        if continue_final_message:
            final = messages[-1].get("content")
            if not isinstance(final, str):
                raise TemplateError("the final message has no text to continue")
            messages = [*messages[:-1], {**messages[-1], "content": final + _TAG}]
        try:
            self._environment.begin(sum(len(message.get("content") or "") for message in messages))
            # One mapping: as keywords a variable called `self` would clash with the library's own parameter.
            text = self._template.render(
                {
                    **self.special_tokens,
                    **(variables or {}),
                    "messages": messages,
                    "tools": tools,
                    "documents": documents,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, *_CLASHES) as error:
            raise TemplateError(f"the chat template failed: {error}") from None
        if not continue_final_message:
            return text
        end = text.rfind(_TAG.strip())
        if end < 0:
            raise TemplateError("the chat template drops the final message, so it cannot be continued")
        # A template that trims messages has taken the tag's trailing blank with it: trim the message as well.
        return text[:end] if text[end : end + len(_TAG)] == _TAG else text[:end].rstrip()
