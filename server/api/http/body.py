"""Bodies in general: strict JSON; unknown fields are logged, those that would change the answer refused.

Types are strict: a bool is no int, a float no int, NaN and infinity are refused by the JSON parser.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from server.api.http.errors import APIError, from_validation, invalid

logger = logging.getLogger(__name__)

# field -> values that mean "not used"
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "prompt_embeds": (None,),
    "logprob_token_ids": (None, []),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, [], ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "thinking_token_budget": (None,),
    "logits_processors": (None, []),
    "stop_regex": (None, []),
    "mirostat": (None, 0),
    "typical_p": (None, 1, 1.0),
    "tfs_z": (None, 1, 1.0),
    "xtc_probability": (None, 0, 0.0),
    "dry_multiplier": (None, 0, 0.0),
    "lora_request": (None,),
    "lora_path": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "grammar": (None, ""),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "mcp_servers": (None, []),
    "compaction": (None,),
}
# Where a caller of another server finds what that field did.
INSTEAD = {
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "grammar": "structured_outputs.grammar",
    "json_schema": "structured_outputs.json",
    "regex": "structured_outputs.regex",
    "ebnf": "structured_outputs.grammar",
    "functions": "tools",
    "function_call": "tool_choice",
    "lora_request": "model",
}
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_seen_unknown: set[str] = set()
MAX_NESTING, MAX_CONTAINERS = 64, 1 << 17
MAX_MESSAGES, MAX_PARTS = 4096, 16_384  # of a conversation
MAX_VALUES = 1 << 17  # of what a template may print as JSON
MAX_FRACTIONS = 1 << 17  # of one body, where they are kept as they were written


@dataclass(frozen=True, slots=True)
class AtMost:
    """Of a list or mapping: its raw length is checked before anything in it, and the first bad entry ends the check.

    `parts`: how many objects the lists within its entries may hold, all together.
    """

    most: int
    parts: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        inner: Any = handler(source)
        inner["max_length"] = self.most
        if inner["type"] == "list":
            inner["fail_fast"] = True
        return core_schema.no_info_before_validator_function(self._check, inner)

    def _check(self, value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > self.most:
            raise PydanticCustomError("too_long", f"has {len(value)} entries; at most {self.most} are allowed")
        if self.parts is not None and isinstance(value, list):
            self._check_parts(value, self.parts)
        return value

    @staticmethod
    def _check_parts(entries: list[Any], most: int) -> None:
        count = 0
        while entries:
            lists = (inner for entry in entries if isinstance(entry, dict) for inner in entry.values())
            entries = [part for inner in lists if isinstance(inner, list) for part in inner if isinstance(part, dict)]
            count += len(entries)
            if count > most:
                raise PydanticCustomError("too_long", f"has {count} parts and calls; at most {most} are allowed")


class WrittenFloat(float):
    """A number as it was written: 1e5 stays 1e5."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


class WrittenFloats:
    """Makes `WrittenFloat`s, which takes a microsecond each. 400 for more of them than any conversation holds."""

    def __init__(self, param: str | None = None) -> None:
        self._param, self._left = param, MAX_FRACTIONS

    def __call__(self, text: str) -> WrittenFloat:
        self._left -= 1
        if self._left < 0:
            raise invalid(f"There are more than {MAX_FRACTIONS} fractions in calls.", self._param)
        return WrittenFloat(text)


class Body(BaseModel):
    # Each is built by its first request: all together would be a tenth of a start.
    model_config = ConfigDict(
        strict=True, extra="allow", protected_namespaces=(), populate_by_name=True, defer_build=True
    )
    # Where a body may hold what a model once wrote as JSON itself: then its numbers must stay as they were written.
    written_mark: ClassVar[bytes | None] = None


T = TypeVar("T", bound=Body)


def parse_json(raw: bytes, written_mark: bytes | None = None) -> dict[str, Any]:
    """A JSON object, or APIError for anything else, and for one of too many parts or levels (`check_nesting`).

    Where `written_mark` occurs, fractions are `WrittenFloat`s.
    orjson refuses NaN, infinities, lone surrogates and bad UTF-8.
    """
    try:
        value = orjson.loads(raw)
        if written_mark is not None and written_mark in raw:
            value = json.loads(raw, parse_float=WrittenFloats())
        elif _LONG_NUMBER.search(raw):  # beyond 64 bits it would be a float
            value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise invalid(f"The request body is not valid JSON: {error}") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_NESTING:
        check_nesting(value)
    if not isinstance(value, dict):
        raise invalid("The request body must be a JSON object.")
    return value


def check_nesting(value: Any, param: str | None = None) -> None:
    """400 for lists and objects within each other deeper than `MAX_NESTING`, for what reads them next is recursive; and
    for more of them than any conversation or schema has."""
    level, count = [value] if isinstance(value, dict | list) else [], 0
    for _ in range(MAX_NESTING):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = list(itertools.islice((item for item in inner if isinstance(item, dict | list)), MAX_CONTAINERS + 1))
        if not level:
            return
        count += len(level)
        if count > MAX_CONTAINERS:
            raise invalid(f"The JSON holds more than {MAX_CONTAINERS} lists and objects.", param)
    raise invalid(f"The JSON is nested deeper than {MAX_NESTING} levels.", param)


def check_values(value: Any, param: str) -> None:
    """400 for more than `MAX_VALUES` in lists and objects: each is written and read again, a microsecond every time."""
    level, count = [value], 0
    while level:
        inner = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        count += sum(map(len, inner))
        if count > MAX_VALUES:
            raise invalid(f"{param} holds more than {MAX_VALUES} values.", param)
        level = [item for values in inner for item in values if isinstance(item, dict | list)]


def parse_body(model: type[T], raw: bytes) -> T:
    """Validate a request body; APIError 400 names the parameter."""
    try:
        body = model.model_validate(parse_json(raw, model.written_mark))
    except ValidationError as error:
        raise from_validation(error) from None
    if body.model_extra:
        check_extra(body.model_extra)
    return body


def check_extra(extra: dict[str, Any]) -> None:
    """Refuse unsupported fields that would change the answer; log other unknown ones once."""
    for name, value in extra.items():
        neutral = UNSUPPORTED.get(name)
        if neutral is not None:
            # `in` would call True equal to 1.
            if not any(value == ok and type(value) is type(ok) for ok in neutral):
                instead = f"; use {INSTEAD[name]}" if name in INSTEAD else ""
                raise APIError(f"{name} is not supported{instead}.", param=name, code="unsupported_parameter")
        elif len(_seen_unknown) < 1000 and (shown := name[:100]) not in _seen_unknown:
            _seen_unknown.add(shown)
            logger.info("ignoring unknown request field %r", shown)
