"""JSON schemas as clients write them -> schemas that the grammar library follows to the letter.

What llguidance 1.9.1 would refuse or round is rewritten so that every text it allows fits the caller's schema:
annotations are left out, bounds that a double cannot hold move inwards, and what cannot be kept exactly is 400.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from server.api.http.errors import invalid

# `format`s that the library enforces; all others are annotations (JSON Schema 2020-12, Validation, section 7.2.1).
ENFORCED_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
)
# Numbers pass through a double and then an int64 there: up to 2**53 every integer survives; this is the last that can.
_EXACT = 2**53
_LARGEST = 2**63 - 1024

_ONE = (
    *("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains"),
    *("propertyNames", "not", "if", "then", "else"),
)
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def prepare_schema(schema: Any, param: str) -> dict[str, Any]:
    """A schema that means no more than `schema` and can be compiled. 400 names `param` if there is none."""
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        problem = "no text fits the schema false" if schema is False else "a schema is an object or true"
        raise invalid(f"{param}: {problem}.", param)
    try:
        return _rewrite(schema, lambda part: _prepare(part, param))
    except RecursionError:
        raise invalid(f"{param} is nested too deeply.", param) from None


def forced_call_schema(tools: Iterable[tuple[str, dict[str, Any] | None]]) -> dict[str, Any]:
    """The schema of one call: {"name", "arguments"} of one of `tools`, (name, schema of its parameters).

    Each tool's schema keeps its own root under `$defs`, so that references in it still mean what they meant.
    """
    calls, definitions = [], {}
    for index, (name, parameters) in enumerate(tools):
        place = f"tool_{index}"
        definitions[place] = _rooted(parameters_schema(parameters), f"#/$defs/{place}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{place}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | {"$defs": definitions}


def parameters_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """What a forced call's arguments must be: an object; a function that declares none is called with `{}`.

    Where `properties` stand alone they are the parameters, and a model may not invent others. 400 for another type.
    """
    parameters = parameters or {}
    kind = parameters.get("type", "object")
    if isinstance(kind, list) and "object" in kind:
        kind, parameters = "object", parameters | {"type": "object"}
    if kind != "object":
        raise invalid(f"tools: the parameters of a function are an object, not {str(kind)[:40]!r}.", "tools")
    described = {key for key, value in parameters.items() if value not in ({}, [], None)}
    if not described - {"type", "title", "description", "$schema", "$id", "required", "strict"} or (
        described <= {"type", "additionalProperties"} and parameters.get("additionalProperties") is False
    ):
        return {"type": "object", "properties": {}, "additionalProperties": False}
    known, required = parameters.get("properties"), parameters.get("required") or []
    if not isinstance(known, dict) or not isinstance(required, list) or parameters.keys() & _EXTENDING:
        return parameters
    is_listed = all(isinstance(name, str) and name in known for name in required)
    return parameters | {"additionalProperties": False} if is_listed else parameters


# Keywords beside `properties` that say more of the properties.
_EXTENDING = frozenset(
    {"additionalProperties", "unevaluatedProperties", "patternProperties", "dependentSchemas", "propertyNames"}
    | {"allOf", "anyOf", "oneOf", "if", "not", "$ref", "$dynamicRef", "minProperties"}
)


def _rooted(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """The schema with `#...` references counted from `place` instead of the root."""
    own = schema.get("$id")

    def move(part: dict[str, Any]) -> dict[str, Any]:
        target = part.get("$ref")
        if isinstance(own, str) and isinstance(target, str) and target.split("#")[0] == own.rstrip("#"):
            target = "#" + target.partition("#")[2]
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            part = part | {"$ref": place + target[1:]}
        return part

    schema = {key: value for key, value in schema.items() if key not in ("$id", "$schema")}
    try:
        return _rewrite(schema, move)
    except RecursionError:
        raise invalid("tools: a schema is nested too deeply.", "tools") from None


def _rewrite(schema: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """`change` applied to every schema in it, from the outside in; values of enum, const and the like stay."""
    schema = change(schema)
    result = dict(schema)

    def inner(value: Any) -> Any:
        return _rewrite(value, change) if isinstance(value, dict) else value

    for key in _ONE:
        if isinstance(schema.get(key), dict):
            result[key] = inner(schema[key])
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            result[key] = [inner(value) for value in schema[key]]
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            result[key] = {name: inner(value) for name, value in schema[key].items()}
    return result


def _prepare(schema: dict[str, Any], param: str) -> dict[str, Any]:
    named = schema.get("format", "")
    if not isinstance(named, str):
        raise invalid(f"{param}: format is {str(named)[:40]!r}, not a text.", param)
    if named not in ENFORCED_FORMATS:
        schema = {key: value for key, value in schema.items() if key != "format"}
    for value in _constants(schema):
        if _is_integer(value) and abs(value) > _EXACT and (abs(value) > _LARGEST or int(float(value)) != value):
            raise invalid(f"{param}: {str(value)[:40]} cannot be generated exactly; a double does not hold it.", param)
    return _bounded(schema, param)


def _bounded(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """Large integer bounds, which the library would round to a double, moved inwards to the next double."""
    for name in _BOUNDS:
        if not isinstance(value := schema.get(name, 0), int | float) or isinstance(value, bool):
            raise invalid(f"{param}: {name} is {str(value)[:40]!r}, not a number.", param)
    bounds = {name: schema[name] for name in _BOUNDS if _is_integer(schema.get(name))}
    if not any(abs(bound) > _EXACT for bound in bounds.values()):
        return schema
    is_integer = schema.get("type") == "integer"
    low, high = ([bounds.pop(name)] if name in bounds else [] for name in ("minimum", "maximum"))
    if is_integer:  # then the exclusive ones say the same as the next inclusive ones
        low += [bounds.pop(name) + 1 for name in ("exclusiveMinimum",) if name in bounds]
        high += [bounds.pop(name) - 1 for name in ("exclusiveMaximum",) if name in bounds]
    rest = {key: value for key, value in schema.items() if key not in _BOUNDS}
    # What is left are bounds that are no integers, and exclusive ones of numbers that need not be whole.
    changed = {name: schema[name] for name in _BOUNDS if name in schema and not _is_integer(schema[name])}
    for name, bound in bounds.items():
        changed[name] = _round(bound, math.inf if name == "exclusiveMinimum" else -math.inf)
    if low:
        changed["minimum"] = max(_round(max(low), math.inf), -_LARGEST)
    if high:
        changed["maximum"] = min(_round(min(high), -math.inf), _LARGEST)
    if changed.get("minimum", -_LARGEST) > changed.get("maximum", _LARGEST):
        raise invalid(f"{param}: no integer between these bounds can be generated exactly.", param)
    return rest | changed


_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def _round(bound: int, towards: float) -> int:
    """The next integer towards there that a double holds."""
    try:
        double = float(bound)
    except OverflowError:
        return _LARGEST if bound > 0 else -_LARGEST
    if (int(double) < bound) if towards > 0 else (int(double) > bound):
        double = math.nextafter(double, towards)
    return int(double)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _constants(schema: dict[str, Any]) -> Iterator[Any]:
    """All values inside enum and const."""
    listed = schema.get("enum")
    left = [*(listed if isinstance(listed, list) else ()), schema.get("const")]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        else:
            yield value
