#!/usr/bin/env bash
# llguidance 1.9.1: the copies that LLMatcher.deep_copy() gives share one lexer, and so one max_lexer_states.
#
# A lexer builds its states as texts need them, up to max_lexer_states (250,000 by default, 2,000 here to be quick).
# What any copy has met stays, and counts for all of them. Once the limit is met the lexer is in error for good: every
# copy fails at its next mask, also a new copy of a matcher that itself has consumed nothing, also on a text that a copy
# followed before. Compiled anew, the grammar follows each of the texts. reset() does not help.
# Met by a server that compiles a grammar once and copies it for each request: requests fail by what earlier ones wrote.
#
# The Python stubs call it "a deep copy", and name no limit that copies share. In the source (after 1.8.0) it is Rust's
# clone(), of which a comment in parser/src/tokenparser.rs says that the lexer is shared; deep_clone() beside it copies
# the lexer too, and llg_clone_matcher() of the C interface calls that. LLInterpreter.deep_copy() is clone() as well.
# A search of the issues found none about it. guidance's issues 1042 and 1169 show the error, at a limit of 10,000, with
# long prompts and with batches; in 1169 a maintainer asks to upgrade. The changelog has only a higher default.
#
# Seen on 30 November 2026, Python 3.11, x86-64:
#   compiled anew for each text: 40 of 40 followed
#   copies of one matcher: 8 of 40 followed
#   then: lexer error: too many states: 2000 >= 2000
#   a new copy, on the first text again: lexer error: too many states: 2000 >= 2000
#   the matcher that was copied, untouched until now, on one letter: lexer error: too many states: 2000 >= 2000
# Exits 0 if the library behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import random

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

tokenizer = LLTokenizer("byte")
# A state for each pattern of the last 13 letters: 2^13, of which a text of 150 letters meets few.
grammar = LLMatcher.grammar_from_regex("[ab]*a[ab]{12}")
limits = LLParserLimits(max_lexer_states=2000, verbose_errors=False)
draw = random.Random(0)
texts = ["".join(draw.choices("ab", k=150)) for _ in range(40)]


def compiled() -> LLMatcher:
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def follow(matcher: LLMatcher, text: str) -> str:
    """The first line of the error, empty if the matcher takes the text; with a mask before each token, as a server."""
    for token in tokenizer.tokenize_str(text):
        matcher.compute_bitmask()
        if not matcher.consume_token(token):
            break
    return matcher.get_error().partition("\n")[0]


anew = [follow(compiled(), text) for text in texts]
print(f"compiled anew for each text: {anew.count('')} of {len(texts)} followed")
original = compiled()
copies = [follow(original.deep_copy(), text) for text in texts]
followed = copies.count("")
print(f"copies of one matcher: {followed} of {len(texts)} followed")
print(f"then: {copies[-1]}")
again = follow(original.deep_copy(), texts[0])
print(f"a new copy, on the first text again: {again}")
assert not original.is_error(), "changed: the original is in error before it is used"
letter = follow(original, "a")
print(f"the matcher that was copied, untouched until now, on one letter: {letter}")
original.reset()
assert set(anew) == {""}, "changed: a text alone is too much for the limit"
assert 1 < followed < len(texts), "changed: copies do not use up one another's states"
assert not any(copies[:followed]), "changed: the lexer recovers"
assert all("too many states" in error for error in [*copies[followed:], again, letter]), "changed: the error"
assert follow(original, "a") == letter, "changed: reset() brings the lexer back"
PYTHON
