"""Whether a teacher and a student mean the same by a token id: their tokenizers, compared by meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model_store.files import read_json


def other_tokens(teacher: Path, student: Path) -> tuple[str | None, str | None]:
    """What stands against a pair, and what is only odd: the first difference of each kind, in words.

    A pair whose ids name different tokens was not trained on the same text. Without a tokenizer.json on both sides
    there is nothing to compare.
    """
    files = [folder / "tokenizer.json" for folder in (teacher, student)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return None, None
    ours, theirs = (read_json(file) for file in files)
    try:
        return _compared(ours, theirs)
    except (TypeError, AttributeError, LookupError, ValueError) as error:  # what is used of them is read elsewhere
        return None, f"the tokenizers of teacher and student cannot be compared: {type(error).__name__}: {error}"


def _compared(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str | None, str | None]:
    tokens = [_tokens(tokenizer) for tokenizer in (ours, theirs)]
    for index in sorted(tokens[0].keys() & tokens[1].keys()):
        if tokens[0][index] != tokens[1][index]:
            said = f"token {index} is {tokens[0][index]!r} in the teacher's tokenizer and {tokens[1][index]!r} in the"
            return f"{said} student's", None
    for name, mine, yours in (("teacher", *tokens), ("student", *tokens[::-1])):
        if alone := sorted(mine.keys() - yours.keys()):
            return None, f"token {alone[0]} ({mine[alone[0]]!r}) is in the {name}'s tokenizer only"
    for name in ("merges", "normalizer", "pre_tokenizer", "post_processor"):
        mine, yours = (_merges(t) if name == "merges" else t.get(name) for t in (ours, theirs))
        if mine != yours:
            return None, f"the tokenizers of teacher and student differ in {name}: text is cut as by the teacher's"
    return None, None


def _tokens(tokenizer: dict[str, Any]) -> dict[int, str]:
    """Id -> token, added ones included."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, dict):
        found = {index: token for token, index in vocabulary.items()}
    else:  # Unigram: [token, score] in the order of ids
        found = {index: entry[0] for index, entry in enumerate(vocabulary)}
    return found | {added["id"]: added["content"] for added in tokenizer.get("added_tokens") or []}


def _merges(tokenizer: dict[str, Any]) -> list[tuple[str, ...]]:
    merges = (tokenizer.get("model") or {}).get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
