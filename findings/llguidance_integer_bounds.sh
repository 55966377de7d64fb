#!/usr/bin/env bash
# llguidance 1.9.1: integers of a JSON schema above 2^53 are rounded to doubles, and int64's own bounds are refused.
#
# {"type": "integer", "minimum": 2^53 + 1, "maximum": 2^53 + 1} admits one integer by JSON Schema. The compiled grammar
# admits only 2^53, which the schema excludes, so every answer made under it is wrong and no error is raised. So it is with
# {"const": 2^53 + 1}. The bounds
# that generators for .NET, Java and Rust write for a 64-bit integer (-2^63 .. 2^63 - 1) are an error of compilation.
#
# Seen on 29 November 2026, Python 3.11, x86-64:
#   9007199254740992 (2^53) accepted: True
#   9007199254740993 (2^53 + 1, the only valid value) accepted: False
#   const 9007199254740993: 9007199254740992 accepted: True, itself: False
#   bounds of int64: Failed to generate regex for integer range: min=Some(-9223372036854775808), max=Some(9223372036854775807)
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import json

from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def matcher(schema: dict) -> LLMatcher:
    return LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))


def accepts(schema: dict, text: str) -> bool:
    found = matcher(schema)
    assert not found.is_error(), found.get_error()
    tokens = tokenizer.tokenize_str(text)
    return found.try_consume_tokens(tokens) == len(tokens) and found.is_accepting()


bound = 2**53 + 1
only = {"type": "integer", "minimum": bound, "maximum": bound}
print(f"{bound - 1} (2^53) accepted: {accepts(only, str(bound - 1))}")
print(f"{bound} (2^53 + 1, the only valid value) accepted: {accepts(only, str(bound))}")
constant = {"const": bound}
print(f"const {bound}: {bound - 1} accepted: {accepts(constant, str(bound - 1))}, itself: {accepts(constant, str(bound))}")
error = matcher({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}).get_error()
print(f"bounds of int64: {error}")
assert accepts(only, str(bound - 1)) and not accepts(only, str(bound)), "changed: bounds above 2^53"
assert accepts(constant, str(bound - 1)) and not accepts(constant, str(bound)), "changed: constants above 2^53"
assert "integer range" in error, "changed: the bounds of int64 compile"
PYTHON
