"""Requests made from nothing: bodies from the schemas of the OpenAPI document, grammars, deep nesting, long lists.

Deterministic for a given random source. What is asked for is small wherever it need not be large to be nasty: a fuzzer
that waits for long answers tries few requests.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

WORDS = (
    "", " ", "a", "The quick brown fox", "Grüße 世界 🌍", "\n\n", "<|im_end|>", "<tool_call>", '{"name": "f"}', "tiny",
    "tiny:5L", "5L", "75%", "auto", "none", "required", "user", "assistant", "system", "tool", "text", "function",
    "json", "e\u0301", "\u202e", "x" * 300, "exact", "q6", "5L-q8", "worst", "5m", '["\\ud800"]', "[0.1, 1e5]",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 255, 256, 0.0, 0.5, 1.0, -0.5, 1e-9, 1e9, 2**31 - 1, 2**31, 2**53, 10**18)
# Answers are short, and most requests name a model that is there.
SHORT = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "num_predict": 4, "model": "tiny"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


class FromSchemas:
    """Bodies of every operation that takes one, as the OpenAPI document describes them."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._bodies: dict[str, dict[str, Any]] = {}
        for path, operations in document["paths"].items():
            content = operations.get("post", {}).get("requestBody", {}).get("content", {})
            if "application/json" in content and "{" not in path:
                self._bodies[path] = content["application/json"]["schema"]
        self.paths = sorted(self._bodies)

    def body(self, draw: random.Random, path: str) -> dict[str, Any]:
        value = self.value(self._bodies[path], draw)
        if isinstance(value, dict):
            value |= {name: short for name, short in SHORT.items() if name in value and draw.random() < 0.8}
        return value

    def value(self, schema: Any, draw: random.Random, depth: int = 0) -> Any:
        """Something that fits, or nearly: bounds are tried on both sides."""
        if not isinstance(schema, dict) or depth > 8:
            return draw.choice(WORDS)
        if "$ref" in schema:
            found: Any = self._document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            return self.value(found, draw, depth + 1)
        for kind in ("anyOf", "oneOf", "allOf"):
            if kind in schema:
                return self.value(draw.choice(schema[kind]), draw, depth + 1)
        if "const" in schema or "enum" in schema:
            return copy.deepcopy(draw.choice(schema.get("enum") or [schema["const"]]))
        kind = schema.get("type", draw.choice(["string", "integer", "object"]))
        make: dict[str, Callable[[], Any]] = {
            "object": lambda: self._object(schema, draw, depth),
            "array": lambda: self._array(schema, draw, depth),
            "integer": lambda: int(_number(schema, draw)),
            "number": lambda: _number(schema, draw),
            "boolean": lambda: draw.random() < 0.5,
            "null": lambda: None,
        }
        return make.get(kind, lambda: draw.choice(WORDS))()

    def _object(self, schema: dict[str, Any], draw: random.Random, depth: int) -> dict[str, Any]:
        required, known = schema.get("required", ()), schema.get("properties", {})
        share = draw.choice([0.05, 0.15, 0.5]) if len(known) > 4 else 0.7
        chosen = [name for name in known if name in required or draw.random() < share]
        made = {name: self.value(known[name], draw, depth + 1) for name in chosen}
        if not known:
            made = {draw.choice(WORDS): draw.choice([*NUMBERS, *WORDS, None]) for _ in range(draw.randrange(4))}
        return made

    def _array(self, schema: dict[str, Any], draw: random.Random, depth: int) -> list[Any]:
        most = draw.choice([1, 1, 2, 3, 20 if depth < 4 else 2])
        return [self.value(schema.get("items", {}), draw, depth + 1) for _ in range(draw.randrange(most + 1))]


def _number(schema: dict[str, Any], draw: random.Random) -> float:
    bounds = [schema[name] for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if name in schema]
    near = [bound + step for bound in bounds for step in (-1, 0, 1)]
    return draw.choice([*near, 1, 1, 2, 0.5, 4]) if draw.random() < 0.8 else draw.choice(NUMBERS)


# --- grammars


def regex(draw: random.Random, depth: int = 0) -> str:
    if depth > 4 or draw.random() < 0.3:
        return draw.choice(
            ["a", "b", ".", "[a-z]", r"\d", "[^x]", r"\w", "é", "🌍", r"\n", "", "^", "$", r"\b", "(?i)x"]
        )
    one, other = regex(draw, depth + 1), regex(draw, depth + 1)
    low = draw.choice([0, 1, 2, 9])
    count = draw.choice(["*", "+", "?", "{3}", f"{{{low},{low + draw.choice([0, 1, 40])}}}", "{2,}"])
    return draw.choice(
        [one + other, f"({one}|{other})", f"({one}){count}", f"(?:{one})", f"({one}&{other})", f"[{one}]"]
    )


def lark(draw: random.Random) -> str:
    """Rules that refer to each other at random, themselves included; now and then to one that is not there."""
    names = ["start", *(f"r{i}" for i in range(draw.choice([1, 3, 8])))]
    terminals = ['"a"', '"b"', "/[a-z]+/", "/[0-9]{1,3}/", "WORD", '""', '"\\n"', "/(a|b)*/", "missing"]

    def item() -> str:
        chosen = draw.choice(terminals) if draw.random() < 0.6 else draw.choice(names)
        return chosen + draw.choice(["", "", "", "*", "+", "?", "~2..5"])

    def rule(name: str) -> str:
        options = (" ".join(item() for _ in range(draw.choice([1, 2, 3]))) for _ in range(draw.choice([1, 2, 4])))
        return f"{name}: " + " | ".join(options)

    return "\n".join(
        [*map(rule, names), "WORD: /[A-Z]+/", draw.choice(["", "%ignore / +/", "%import common.INT", "%"])]
    )


def gbnf(draw: random.Random) -> str:
    names = ["root", *(f"r{i}" for i in range(draw.choice([1, 4])))]
    atoms = ['"a"', "[a-z]", "[^\\n]", *names, '("x" | "y")', "[0-9]{2,4}"]
    rules = (f"{name} ::= {' '.join(draw.choice(atoms) for _ in range(draw.choice([1, 2, 4])))}" for name in names)
    return "\n".join(rules)


def schema(draw: random.Random, depth: int = 0) -> Any:
    """A JSON schema, from keywords that go together and some that do not."""
    if depth > 3 or draw.random() < 0.25:
        return draw.choice(_LEAVES)(draw)
    inner = [schema(draw, depth + 1) for _ in range(draw.choice([1, 2, 4]))]
    named = {draw.choice(["a", "b", "ü", "", "a b"]) + str(i): one for i, one in enumerate(inner)}
    low = draw.choice([0, 1, 3])
    made: Any = draw.choice([
        {"type": "object", "properties": named, "required": list(named)[:1]},
        {"type": "object", "properties": named, "additionalProperties": draw.choice([True, False, inner[0]])},
        {"type": "array", "items": inner[0], "minItems": low, "maxItems": draw.choice([0, 3, 60])},
        {"anyOf": inner}, {"oneOf": inner}, {"allOf": inner}, {"not": inner[0]},
        {"prefixItems": inner, "type": "array"}, {"if": inner[0], "then": inner[-1]},
        {"patternProperties": {draw.choice(["^a", ".*", "["]): inner[0]}},
    ])  # fmt: skip
    return made if depth else made | {"$defs": {"a": inner[-1]}}


_LEAVES: list[Callable[[random.Random], Any]] = [
    lambda draw: draw.choice([{}, True, False, {"type": "string"}, {"type": "made-up"}, {"const": "é"}]),
    lambda draw: {"type": "integer", "minimum": draw.choice([0, -5]), "maximum": draw.choice([0, 9, 10**6])},
    lambda draw: {"type": "number", "multipleOf": draw.choice([1, 0.01, 7])},
    lambda draw: {"enum": draw.sample(["a", 1, None, True, 1.5, [], {}], 3)},
    lambda draw: {"type": "string", "pattern": regex(draw, 2)},
    lambda draw: {"type": ["string", "null"], "maxLength": draw.choice([0, 3, 50]), "minLength": draw.choice([0, 5])},
    lambda draw: {"type": "string", "format": draw.choice(["date", "uuid", "email", "made-up"])},
    lambda draw: {"$ref": draw.choice(["#", "#/$defs/a", "#/nowhere"])},
]


def constrained(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A request whose answer follows a random grammar, in each place where one can be given."""
    plain, chat = {"prompt": "a", "max_tokens": 12}, {"messages": HELLO, "max_tokens": 12}

    def form(**form: Any) -> tuple[str, dict[str, Any]]:
        return COMPLETIONS, plain | {"structured_outputs": form}

    def tags() -> dict[str, Any]:
        structures = [{"begin": f"<{draw.choice('ab')}>", "schema": schema(draw), "end": "</>"} for _ in range(2)]
        return {"type": "structural_tag", "structures": structures, "triggers": ["<"]}

    def tool() -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "parameters": schema(draw)}}

    def named() -> dict[str, Any]:
        return {"type": "json_schema", "name": "s", "schema": schema(draw)}

    makers: list[Callable[[], tuple[str, dict[str, Any]]]] = [
        lambda: form(regex=regex(draw)),
        lambda: form(grammar=lark(draw)),
        lambda: form(grammar=gbnf(draw)),
        lambda: form(json=schema(draw)),
        lambda: form(choice=draw.sample(WORDS, 5)),
        lambda: (COMPLETIONS, plain | {"response_format": tags()}),
        lambda: (CHAT, chat | {"response_format": {"type": "json_schema", "json_schema": named()}}),
        lambda: (CHAT, chat | {"tools": [tool()], "tool_choice": draw.choice(["auto", "required"])}),
        lambda: ("/v1/responses", {"input": "a", "max_output_tokens": 16, "text": {"format": named()}}),
        lambda: ("/v1/messages", chat | {"model": "tiny", "tool_choice": {"type": "any"},
                                         "tools": [{"name": "f", "input_schema": schema(draw)}]}),
        lambda: ("/api/generate", {"model": "tiny", "prompt": "a", "format": schema(draw),
                                   "options": {"num_predict": 12}}),
    ]  # fmt: skip
    return draw.choice(makers)()


# --- depth and length


def nested(draw: random.Random, body: dict[str, Any], places: Callable[[Any], list[tuple]]) -> dict[str, Any]:
    """Something in `body` becomes lists and objects within each other, around the limit or far beyond it."""
    body = copy.deepcopy(body)
    value: Any = draw.choice([1, "a", [], {}])
    for level in range(draw.choice([8, 60, 62, 63, 64, 65, 66, 300, 900])):
        value = (
            [value] if draw.choice([True, level % 2]) else {draw.choice(["a", "type", "properties", "items"]): value}
        )
    *parents, last = draw.choice(places(body))
    holder: Any = body
    for key in parents:
        holder = holder[key]
    holder[last] = value
    return body


def product(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Long lists, several at once, times many sequences: each may be allowed, what they cost together must be too."""

    def many() -> int:
        return draw.choice([1, 5, 64, 129, 1025, 20_000])

    def texts() -> list[str]:
        word, length = draw.choice(["x", "fox ", "é"]), draw.choice([1, 30, 400])
        return [word * length + str(i) for i in range(min(many(), 2_000_000 // length))]

    lists: dict[str, Callable[[], Any]] = {
        "stop": texts, "bad_words": texts, "n": lambda: draw.choice([1, 16, 128, 129]), "logprobs": lambda: 5,
        "logit_bias": lambda: {str(i): 1 for i in range(many())}, "allowed_token_ids": lambda: list(range(many())),
        "stop_token_ids": lambda: list(range(many())), "size_schedule": lambda: [{"size": "4L", "tokens": 1}] * many(),
        "prompt_logprobs": lambda: 3, "echo": lambda: True, "made_up": texts, "seed": lambda: 1,
        "structured_outputs": lambda: {"choice": texts()},
    }  # fmt: skip
    fields = {name: lists[name]() for name in draw.sample(sorted(lists), draw.choice([1, 2, 3]))}
    prompts: list[Callable[[], Any]] = [
        lambda: "a", lambda: ["a"] * draw.choice([8, 64, 1024, 1025]), lambda: [5] * many(), lambda: [[5, 6]] * many(),
        texts,
    ]  # fmt: skip
    prompt = draw.choice(prompts)()
    if draw.random() < 0.6:
        return COMPLETIONS, {"prompt": prompt, "max_tokens": draw.choice([1, 2]), **fields}
    model = {"model": "tiny", "max_tokens": 1}
    arguments = draw.choice(["{}", "[" + "0.1," * many() + "1]"])
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": arguments}} for i in range(128)]
    calls = calls[: max(1, 20_000 // len(arguments))]
    asked = [{"role": "assistant", "content": None, "tool_calls": calls}, *_RESULT] * draw.choice([1, 30, 200])
    functions = [{"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in range(many() % 200)]
    short = {"num_predict": 1}
    makers: list[Callable[[], tuple[str, dict[str, Any]]]] = [
        lambda: (CHAT, model | {"messages": HELLO * many(), **fields}),
        lambda: (CHAT, model | {"messages": [*HELLO, *asked], "tools": functions}),
        lambda: (CHAT, model | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * many()}]}),
        lambda: ("/v1/messages", model | {"messages": HELLO * many(), "stop_sequences": texts()}),
        lambda: ("/v1/embeddings", {"model": "tiny", "input": prompt}),
        lambda: (
            "/v1/responses",
            {"input": HELLO * many(), "metadata": {str(i): draw.choice(["a", 1]) for i in range(many())}},
        ),
        lambda: ("/api/embed", {"model": "tiny", "input": draw.choice([texts(), [1] * many()])}),
        lambda: ("/api/chat", {"model": "tiny", "messages": [*HELLO, *_of_ollama(asked)], "options": short}),
        lambda: ("/api/generate", {"model": "tiny", "prompt": "a", "options": short | {"stop": texts()}}),
        lambda: ("/tokenize", {"prompt": "The quick brown fox. " * many()}),
        lambda: ("/detokenize", {"tokens": [5] * many()}),
    ]
    return draw.choice(makers)()


_RESULT = [{"role": "tool", "tool_call_id": "z", "content": "x"}] * 4


def _of_ollama(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls, and results of calls that nobody made."""
    functions = [{"function": {"name": f"f{i}", "arguments": {}}} for i in range(128)]
    call, result = {"role": "assistant", "tool_calls": functions}, {"role": "tool", "tool_name": "g", "content": "x"}
    return [call if message["role"] == "assistant" else result for message in messages]
