"""What a tokenizer puts around every text: models that learned with it are lost without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def put_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that stand before and after every text. `tokenizer`: of tokenizers, or a fast one of transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    plain, whole = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]


def opening(tokenizer: Any) -> list[int]:
    """Token ids that stand before every text: mostly none or one, the BOS token."""
    return put_around(tokenizer)[0]


def in_windows(ids: Sequence[Any], length: int, opening: Sequence[Any] = (), limit: int | None = None) -> list[list]:
    """Consecutive windows of `length`, each of which begins with `opening`; the remainder is dropped."""
    step = length - len(opening)
    count = min(len(ids) // step, limit or len(ids))
    return [[*opening, *ids[i * step : (i + 1) * step]] for i in range(count)]
