"""`response_format`, `structured_outputs` and forced tool calls -> constraints for the sampler."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from server.api.generate.grammar_trial import Trial
from server.api.generate.protocol import ResponseFormat, SamplingFields, Structure, StructuredOutputs
from server.api.generate.schemas import prepare_schema
from server.api.http.errors import invalid
from server.config import Settings

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from server.api.generate.tokenizer import ServingTokenizer
    from server.api.http.state import ServerState
    from server.engine.extras.grammar import Grammar

_CACHED = 128
_COMPILE_SECONDS = 10.0
# Between JSON tokens. Without a bound a small model falls into writing blanks until its tokens run out.
_BLANKS = r" |\n[ \t]{0,20}"


class Compiler:
    """Compiles grammars off the event loop and keeps the recent ones."""

    def __init__(self, tokenizer: ServingTokenizer, settings: Settings) -> None:
        self._tokenizer = tokenizer
        self._max_bytes = settings.max_grammar_bytes
        self._compiler: Any = None  # made on first use: it takes a third of a second
        self._trial = Trial(tokenizer)
        self._cache: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = asyncio.Lock()  # one compilation at a time: abuse costs one core at most

    async def factory(self, grammar: str, param: str) -> Callable[[], Grammar]:
        """A function that makes a fresh constraint. 400 if the grammar is too large, invalid or too complex."""
        from server.engine.extras.grammar import GrammarError

        if len(grammar) > self._max_bytes:
            raise invalid(f"{param} is too large: at most {self._max_bytes} bytes.", param)
        matcher = self._cache.get(grammar)
        if matcher is None:
            async with self._lock:
                try:
                    async with asyncio.timeout(_COMPILE_SECONDS):
                        await self._trial.check(grammar)
                        matcher = await asyncio.to_thread(self._compile, grammar)
                except GrammarError as error:
                    raise invalid(f"{param} cannot be used: {error}", param) from None
                except TimeoutError:
                    raise invalid(f"{param} is too complex to compile.", param) from None
            self._cache[grammar] = matcher
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(grammar)
        return lambda: self._compiler.start(matcher)

    def _compile(self, grammar: str) -> LLMatcher:
        from server.engine.extras.grammar import GrammarCompiler

        if self._compiler is None:
            tokenizer = self._tokenizer
            self._compiler = GrammarCompiler(tokenizer.backend.to_str(), tokenizer.vocab_size, tokenizer.eos_token_ids)
        return self._compiler.compile(grammar)


async def grammar_factory(
    body: SamplingFields,
    state: ServerState,
    forced_schema: dict[str, Any] | None = None,
    call_tags: list[tuple[str, dict[str, Any], str]] | None = None,
) -> Callable[[], Grammar] | None:
    """What constrains the text of this request, or None.

    `forced_schema` is that of a tool call to be made; `call_tags` are (begin, schema, end) of calls that may be made.
    """
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
    grammar, param = found
    return await state.grammars.factory(grammar, param)


def _requested(body: SamplingFields) -> tuple[str, str] | None:
    """(llguidance grammar, parameter it came from)."""
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
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def _choice(texts: list[str], param: str) -> str:
    from llguidance import grammar_from

    if not 0 < len(texts) <= 1000:
        raise invalid(f"{param} needs 1 to 1000 texts.", param)
    return grammar_from("choice", texts)  # type: ignore[arg-type]  # it takes the list that its own docstring shows


def _grammar(text: str, param: str) -> str:
    """Lark or llama.cpp's GBNF."""
    from llguidance import grammar_from

    try:
        return grammar_from("grammar", text)
    except Exception as error:
        raise invalid(f"{param} cannot be read: {str(error)[:300]}", param) from None


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
    from llguidance import LLMatcher, StructTag

    tags = []
    for structure in structures:
        trigger = next((text for text in triggers if text and structure.begin.startswith(text)), None)
        if trigger is None:
            raise invalid(f"{param}: no trigger begins {structure.begin[:100]!r}.", param)
        schema = prepare_schema(structure.schema_, param)
        tags.append(StructTag(trigger=trigger, begin=structure.begin, grammar=schema, end=structure.end))
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


def _loads(text: str, param: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param} is not valid JSON: {error}", param) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _json(schema: Any, param: str, whitespace: str | None = None, compact: bool = False) -> str:
    from llguidance import LLMatcher

    options: Any = {"whitespace_flexible": False}
    if not compact:
        options = {"whitespace_pattern": _BLANKS if whitespace is None else whitespace}
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(prepare_schema(schema, param)), overrides=options)
    except (ValueError, TypeError) as error:
        raise invalid(f"{param} is not a usable JSON schema: {str(error)[:300]}", param) from None
