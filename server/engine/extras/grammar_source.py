"""What a request asks its text to follow -> a grammar for llguidance. Runs in the trial process only.

Some of these conversions take time that grows with the square of their input, and all of them read what somebody sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, StructTag, grammar_from

from server.engine.extras.grammar import GrammarError


def convert(source: str) -> str:
    """`source` is JSON: [kind, argument...]. GrammarError if it cannot be read."""
    kind, *arguments = json.loads(source)
    try:
        return _KINDS[kind](*arguments)
    except Exception as error:  # the library raises whatever its parser met
        raise GrammarError(" ".join(str(error).split())[:300] or type(error).__name__) from None


def _choice(texts: list[str]) -> str:
    return grammar_from("choice", texts)  # type: ignore[arg-type]  # it takes the list that its own docstring shows


def _grammar(text: str) -> str:
    """Lark or llama.cpp's GBNF."""
    return grammar_from("grammar", text)


def _json(schema: Any, options: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)  # type: ignore[arg-type]  # as above


def _tags(tags: list[dict[str, Any]]) -> str:
    """Free text in which a trigger opens a tag; what is inside a tag follows its schema."""
    return LLMatcher.grammar_from_lark(StructTag.to_grammar([StructTag(**tag) for tag in tags], assume_special=False))


_KINDS: dict[str, Callable[..., str]] = {
    "regex": LLMatcher.grammar_from_regex,
    "choice": _choice,
    "grammar": _grammar,
    "json": _json,
    "tags": _tags,
}
