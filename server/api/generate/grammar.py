"""`response_format`, `structured_outputs` and forced tool calls -> sources of grammars (`grammar_compiler`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from server.api.generate.protocol import ResponseFormat, SamplingFields, Structure, StructuredOutputs
from server.api.generate.schemas import prepare_schema
from server.api.generate.submission import num_choices
from server.api.http.body import check_nesting
from server.api.http.errors import invalid

if TYPE_CHECKING:
    from server.api.generate.tools import ToolUse
    from server.api.http.state import ServerState
    from server.engine.extras.grammar import Grammar

_MOST_TAGS = 128
# What is looked at at all, times the size that is allowed: the grammar is shorter than the request that asks for it.
_AS_WRITTEN = 4
# Between JSON tokens. Without a bound a small model falls into writing blanks until its tokens run out.
_BLANKS = r" |\n[ \t]{0,20}"


def _source(kind: str, *arguments: Any) -> str:
    """What the trial process makes a grammar from: `server.engine.extras.grammar_source`."""
    return json.dumps([kind, *arguments], ensure_ascii=False)


async def grammar_factory(
    body: SamplingFields, state: ServerState, tools: ToolUse | None = None, tenant: str = "", num_prompts: int = 1
) -> Callable[[], Grammar] | None:
    """What makes the constraint for each sequence of this request, or None. `tools` may have to be called, or called in
    a certain form."""
    most = _AS_WRITTEN * state.settings.max_grammar_bytes
    for name in ("response_format", "structured_outputs"):
        if (asked := getattr(body, name)) is not None and len(asked.model_dump_json()) > most:
            raise invalid(f"{name} is too large: at most {state.settings.max_grammar_bytes} bytes.", name)
    forced_schema, call_tags = None, None
    if tools is not None and tools.constrains:
        if sum(len(tool.model_dump_json()) for tool in tools.tools) > most:
            raise invalid(f"tools are too large: at most {state.settings.max_grammar_bytes} bytes.", "tools")
        forced_schema, call_tags = tools.schema(), tools.call_tags()
    found = _requested(body)
    if forced_schema is not None:
        if found is not None:
            raise invalid(f"{found[1]} cannot be combined with a forced tool call.", found[1])
        found = (_json(forced_schema, "tools"), "tools")
    elif call_tags is not None and found is None:
        tags = [Structure(begin=begin, schema=schema, end=end) for begin, schema, end in call_tags]
        found = (_tags(tags, [call_tags[0][0].split("\n")[0]], "tools"), "tools")
    if found is None:
        return None
    source, param = found
    count = num_prompts * num_choices(body, num_prompts, state.settings)
    return await state.grammars.factory(source, param, tenant, count)


def _requested(body: SamplingFields) -> tuple[str, str] | None:
    """(source of a grammar, parameter it came from)."""
    asked = body.response_format
    found: tuple[str, str] | None = None
    if asked is not None:
        _check_fields(asked)
    if asked is not None and asked.type != "text":
        found = (_response_format(asked), "response_format")
    if body.structured_outputs is not None:
        if found is not None:
            raise invalid("response_format and structured_outputs exclude each other.", "structured_outputs")
        found = (_structured(body.structured_outputs), "structured_outputs")
    return found


def _check_fields(asked: ResponseFormat) -> None:
    """400 for a field of another type: ignoring it would change the answer."""
    own: dict[str, tuple[str, ...]] = {
        "json_object": ("schema_",),
        "json_schema": ("json_schema",) if asked.json_schema is not None else ("schema_",),
        "structural_tag": ("structures", "triggers"),
    }
    for name in ("json_schema", "regex", "choice", "grammar", "structures", "triggers", "schema_"):
        if getattr(asked, name) is not None and name not in own.get(asked.type, (asked.type,)):
            param = f"response_format.{name.rstrip('_')}"
            raise invalid(f"{param} does not go with {asked.type}.", param)


def _response_format(asked: ResponseFormat) -> str:
    param = f"response_format.{asked.type}"
    if asked.type == "json_object":
        schema: Any = {"type": "object"} if asked.schema_ is None else asked.schema_
        return _json(schema, param if asked.schema_ is None else "response_format.schema")
    if asked.type == "json_schema":
        schema = asked.schema_ if asked.json_schema is None else asked.json_schema.schema_
        if schema is None:
            raise invalid("response_format.json_schema.schema is missing.", "response_format.json_schema")
        return _json(schema, param)
    if asked.type == "structural_tag":
        if not asked.structures or not asked.triggers:
            raise invalid(f"{param} needs structures and triggers.", param)
        return _tags(asked.structures, asked.triggers, param)
    value = getattr(asked, asked.type)
    if value is None:
        raise invalid(f"{param} is missing.", param)
    return _FORMATS[asked.type](value, param)


def _structured(asked: StructuredOutputs) -> str:
    param = "structured_outputs"
    kinds = ("json_", "regex", "choice", "grammar", "json_object", "structural_tag")
    wanted = asked.model_copy(update={"json_object": asked.json_object or None})
    given = [kind for kind in kinds if getattr(wanted, kind) is not None]
    if len(given) != 1:
        raise invalid(f"{param} needs exactly one of json, regex, choice, grammar, json_object, structural_tag.", param)
    kind = given[0]
    if kind in _FORMATS:
        return _FORMATS[kind](getattr(asked, kind), f"{param}.{kind}")
    if kind == "structural_tag":
        assert asked.structural_tag is not None
        return _structural_tag(asked.structural_tag, f"{param}.structural_tag")
    schema: Any = {"type": "object"} if kind == "json_object" else asked.json_
    if isinstance(schema, str):
        schema = _loads(schema, f"{param}.json")
    return _json(schema, f"{param}.json", asked.whitespace_pattern, bool(asked.disable_any_whitespace))


def _regex(regex: str, param: str) -> str:
    return _source("regex", regex)


def _choice(texts: list[str], param: str) -> str:
    if not 0 < len(texts) <= 1000:
        raise invalid(f"{param} needs 1 to 1000 texts.", param)
    return _source("choice", texts)


def _grammar(text: str, param: str) -> str:
    return _source("grammar", text)


_FORMATS: dict[str, Callable[[Any, str], str]] = {"regex": _regex, "choice": _choice, "grammar": _grammar}


def _structural_tag(text: str, param: str) -> str:
    value = _loads(text, param)
    try:
        asked = ResponseFormat.model_validate({"type": "structural_tag"} | value)
    except (ValidationError, TypeError):
        asked = None
    if asked is None or not asked.structures or not asked.triggers:
        raise invalid(f"{param} must be JSON with structures (begin, schema, end) and triggers.", param)
    return _tags(asked.structures, asked.triggers, param)


def _tags(structures: list[Structure], triggers: list[str], param: str) -> str:
    """Free text in which a trigger opens a tag, and what is inside a tag follows its schema."""
    if max(len(structures), len(triggers)) > _MOST_TAGS:
        raise invalid(f"{param}: at most {_MOST_TAGS} structures and triggers.", param)
    tags = []
    for structure in structures:
        trigger = next((text for text in triggers if text and structure.begin.startswith(text)), None)
        if trigger is None:
            raise invalid(f"{param}: no trigger begins {structure.begin[:100]!r}.", param)
        schema = prepare_schema(structure.schema_, param)
        tags.append({"trigger": trigger, "begin": structure.begin, "grammar": schema, "end": structure.end})
    return _source("tags", tags)


def _loads(text: str, param: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # escapes may name what no text can hold
        check_nesting(value, param)
        return value
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param} is not valid JSON: {error}", param) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _json(schema: Any, param: str, whitespace: str | None = None, compact: bool = False) -> str:
    options: dict[str, Any] = {"whitespace_flexible": False}
    if not compact:
        options = {"whitespace_pattern": _BLANKS if whitespace is None else whitespace}
    return _source("json", prepare_schema(schema, param), options)
