"""Writes the tables of docs/api.md from the code: `python -m server.api.reference [--check] docs/api.md`.

What stands between `<!-- table: NAME -->` and `<!-- end -->` is generated; the text around it is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel

from server.api.chat.protocol import ChatCompletionRequest
from server.api.completions.protocol import CompletionRequest
from server.api.embeddings.protocol import EmbeddingsRequest
from server.api.generate import protocol
from server.api.http.body import INSTEAD, UNSUPPORTED
from server.api.messages.protocol import MessagesRequest
from server.api.ollama import protocol as ollama
from server.api.responses.protocol import ResponsesRequest
from server.api.routes.operations import POSTS, ROUTERS
from server.api.routes.protocol import DetokenizeRequest, TokenizeRequest

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# name in docs/api.md -> model, and the model whose fields have a table of their own and are left out
MODELS: dict[str, tuple[type[BaseModel], type[BaseModel] | None]] = {
    "size": (protocol.SizeFields, None),
    "sampling": (protocol.SamplingFields, protocol.SizeFields),
    "completions": (CompletionRequest, protocol.SamplingFields),
    "chat": (ChatCompletionRequest, protocol.SamplingFields),
    "messages": (MessagesRequest, protocol.SizeFields),
    "responses": (ResponsesRequest, protocol.SizeFields),
    "embeddings": (EmbeddingsRequest, protocol.SizeFields),
    "ollama_embed": (ollama.OllamaEmbedRequest, protocol.SizeFields),
    "ollama": (ollama.OllamaRequest, protocol.SizeFields),
    "ollama_chat": (ollama.OllamaChatRequest, ollama.OllamaRequest),
    "ollama_generate": (ollama.OllamaGenerateRequest, ollama.OllamaRequest),
    "ollama_options": (ollama.OllamaOptions, None),
    "ollama_show": (ollama.OllamaShowRequest, None),
    "tokenize": (TokenizeRequest, None),
    "detokenize": (DetokenizeRequest, None),
    "slo": (protocol.SLO, None),
    "size_schedule": (protocol.ScheduledSize, None),
    "response_format": (protocol.ResponseFormat, None),
    "structured_outputs": (protocol.StructuredOutputs, None),
    "stream_options": (protocol.StreamOptions, None),
}


def tables() -> dict[str, str]:
    """All generated tables by name."""
    result = {name: _fields(model, base) for name, (model, base) in MODELS.items()}
    return result | {"endpoints": _endpoints(), "unsupported": _unsupported()}


def fill(text: str) -> str:
    """The document with every table as the code has it now. KeyError for a table that does not exist."""
    current = tables()
    return _TABLE.sub(lambda match: match[1] + current[match[2]] + match[3], text)


def _rows(header: str, rows: Iterable[Iterable[str]]) -> str:
    columns = header.split(" | ")
    lines = [f"| {header} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _fields(model: type[BaseModel], base: type[BaseModel] | None) -> str:
    schema = model.model_json_schema(by_alias=True)
    left_out = set(base.model_fields) if base is not None else set()
    required = set(schema.get("required", ()))
    rows = []
    for name, item in schema["properties"].items():
        if name not in left_out:
            label = f"`{name}`" + (" (required)" if name in required else "")
            rows.append((label, _type(item), item.get("description", "").replace("|", "\\|")))
    return _rows("field | type | meaning", rows)


def _type(item: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in item:
        return " or ".join(dict.fromkeys(_type(part) for part in item["anyOf"] if part.get("type") != "null")) or "null"
    if "$ref" in item:
        return "object"
    if "enum" in item:
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in item["enum"])
    if "const" in item:
        value = item["const"]
        return f"`{str(value).lower() if isinstance(value, bool) else value}`"
    kind = item.get("type", "any")
    if kind == "array":
        return f"list of {_type(item.get('items', {}))}"
    return kind + _range(item)


def _range(item: dict[str, Any]) -> str:
    low, high = item.get("minimum"), item.get("maximum")
    above, below = item.get("exclusiveMinimum"), item.get("exclusiveMaximum")
    if high is not None and high < 10**6:
        return f" {low:g} .. {high:g}" if low is not None else f" > {above:g}, at most {high:g}"
    if low is not None and low > -(10**6) and (below is None or below >= 10**6):
        return f" ≥ {low:g}"
    return f" > {above:g}" if above is not None else ""


def _endpoints() -> str:
    rows = [("POST", f"`{path}`", summary) for path, _, _, _, summary in POSTS]
    for route in (route for router in ROUTERS for route in router.routes):
        if isinstance(route, APIRoute) and route.include_in_schema:
            rows.append(("/".join(sorted(route.methods or ())), f"`{route.path}`", route.summary or ""))
    return _rows("method | path | purpose", rows)


def _unsupported() -> str:
    """A table of those that something else replaces, and a list of the others."""
    rows, others = [], []
    for name, neutral in sorted(UNSUPPORTED.items()):
        values = ", ".join(dict.fromkeys(f"`{_json(value)}`" for value in neutral if value is not None)) or "null"
        if name in INSTEAD:
            rows.append((f"`{name}`", values, f"`{INSTEAD[name]}`"))
        else:
            others.append(f"`{name}` ({values})")
    return _rows("field | accepted | use instead", rows) + f"\nWithout a substitute: {', '.join(others)}.\n"


def _json(value: Any) -> str:
    import orjson

    return orjson.dumps(value).decode()


def main(argv: list[str] | None = None) -> int:
    """0, or with `--check` 1 if the file is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables differ")
    arguments = parser.parse_args(argv)
    text = arguments.file.read_text()
    filled = fill(text)
    if arguments.check:
        if filled != text:
            print(f"out of date: run python -m server.api.reference {arguments.file}", file=sys.stderr)
        return int(filled != text)
    arguments.file.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
