"""Spoils a request: in its JSON tree, in its bytes, in its headers. Deterministic for a given random source."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from tests.fuzz import generate
from tests.fuzz.seeds import SEEDS

STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, 2**31, 2**63, 2**64, 10**30, "", " ", "\x00",
    "a" * 5000, "🌍" * 300, "\u202e", "NaN", "auto", "5L", "0L", "-1L", "999L", "1e9M", "1000%", "nan%", "\n",
    "{{ x }}", [], [[]], [[[[]]]], {}, {"": {}}, {"type": None}, [None], [1, "a", None], [-1], [0] * 600, ["a"] * 200,
    list(range(300)), {"a": {"a": {"a": {"a": {}}}}}, "(a|b)*a(a|b){20}", {"$ref": "#"}, {"type": ["string", "null"]},
    "../../etc/passwd",
]  # fmt: skip
FIELDS = sorted({name for _, body in SEEDS for name in body})


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside a JSON value."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((*path, key))
        found += places(inner, (*path, key))
    return found


def spoil_tree(body: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One to four changes: a value replaced, removed, doubled, nested, moved from another request."""
    body = copy.deepcopy(body)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 4])):
        where = places(body)
        kind = draw.choice(["replace", "replace", "replace", "remove", "add", "wrap", "number"])
        if kind == "add" or not where:
            name = draw.choice(FIELDS)
            other = draw.choice([seed for _, seed in SEEDS if name in seed])
            body[name] = copy.deepcopy(other[name]) if draw.random() < 0.5 else copy.deepcopy(draw.choice(STRANGE))
            continue
        *parents, last = draw.choice(where)
        holder: Any = body
        for key in parents:
            holder = holder[key]
        if kind == "remove":
            del holder[last]
        elif kind == "wrap":
            holder[last] = draw.choice([[holder[last]], {"a": holder[last]}, [holder[last]] * 3, str(holder[last])])
        elif kind == "number" and type(holder[last]) in (int, float):
            holder[last] = draw.choice([-1, 0, 1, 2, 1.5, 300, 10**6, -holder[last], holder[last] * 1000])
        else:
            holder[last] = copy.deepcopy(draw.choice(STRANGE))
    return body


def spoil_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, or put in."""
    data = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(data) + 1)
        kind = draw.choice(["flip", "cut", "insert", "truncate", "double"])
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[at : at + draw.randrange(1, 9)]
        elif kind == "insert":
            pieces = (b"\xff", b"\x00", b'"', b"{", b"[" * 600, b"\\ud800", b"1e999", b"NaN", b",")
            data[at:at] = draw.choice(pieces)
        elif kind == "truncate":
            del data[at:]
        else:
            data += data[:at]
    return bytes(data)


def spoil_headers(draw: random.Random) -> dict[str, str]:
    names = ("x-slo-ttft-ms", "x-slo-tpot-ms", "x-request-id", "authorization", "content-type", "accept", "origin")
    values = ("", "0", "-1", "nan", "1e999", "text/plain", "Bearer ", "Bearer x", "a" * 3000, "\x7f", "*/*", "5")
    return {draw.choice(names): draw.choice(values) for _ in range(draw.randrange(1, 4))}


def request(draw: random.Random, schemas: generate.FromSchemas) -> tuple[str, bytes, dict[str, str]]:
    """(path, body, headers): a real request that is spoilt, or one made from nothing; some are left as they were."""
    path, body = draw.choice(SEEDS)
    headers = {"content-type": "application/json"}
    kinds = {
        "tree": 36,
        "bytes": 8,
        "headers": 4,
        "path": 5,
        "none": 4,
        "schema": 20,
        "grammar": 10,
        "nested": 8,
        "product": 5,
    }
    (kind,) = draw.choices(list(kinds), list(kinds.values()))
    if kind == "path":
        path = draw.choice(schemas.paths)
    if kind == "schema":
        path = draw.choice(schemas.paths)
        body = schemas.body(draw, path)
    if kind == "grammar":
        path, body = generate.constrained(draw)
    if kind == "product":
        path, body = generate.product(draw)
    if kind == "tree" or (kind in ("path", "schema", "grammar") and isinstance(body, dict) and draw.random() < 0.4):
        body = spoil_tree(body, draw)
    if kind == "nested":
        body = generate.nested(draw, body, places)
    raw = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        raw = spoil_bytes(raw, draw)
    if kind == "headers":
        headers |= spoil_headers(draw)
    return path, raw, headers
