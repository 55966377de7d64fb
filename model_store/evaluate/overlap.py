"""Refuses to measure on text that was trained on: shared runs of words, found by hashing."""

from __future__ import annotations

import gzip
import json
import re
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

_WORD = re.compile(r"[a-z0-9]+")
NGRAM_WORDS = 13  # as is usual since GPT-3 (arXiv 2005.14165, appendix C)


class OverlapError(ValueError):
    """Held-out text shares runs of words with training text."""


def ngrams(text: str, n: int = NGRAM_WORDS) -> Iterator[int]:
    """64-bit hashes of every run of `n` words, lower case, punctuation ignored."""
    words = _WORD.findall(text.lower())
    for i in range(len(words) - n + 1):
        yield int.from_bytes(blake2b(" ".join(words[i : i + n]).encode(), digest_size=8).digest())


def read_texts(path: Path) -> Iterator[str]:
    """Documents of a .txt, .jsonl or .jsonl.gz file (keys text, or prompt and response), or of all in a folder."""
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file() and file.name.endswith((".txt", ".jsonl", ".jsonl.gz")):
                yield from read_texts(file)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()  # noqa: SIM115
        with opened as lines:
            for line in lines:
                row = json.loads(line)
                yield row.get("text") or "\n".join(str(row[k]) for k in ("prompt", "response") if k in row)
    else:
        yield path.read_text()


def shared_ngrams(held_out: Iterable[str], training: Iterable[str], n: int = NGRAM_WORDS) -> tuple[int, int]:
    """(n-grams of the held-out text that also occur in the training text, n-grams of the held-out text)."""
    ours = set().union(*(ngrams(text, n) for text in held_out)) if held_out else set()
    found: set[int] = set()
    for text in training:
        found.update(gram for gram in ngrams(text, n) if gram in ours)
    return len(found), len(ours)


def save_fingerprint(path: Path, training: Iterable[str], n: int = NGRAM_WORDS) -> None:
    """Write the sorted hashes of a training text, so that overlap can be checked where the text is not kept."""
    hashes = array("Q", sorted(set().union(*(ngrams(text, n) for text in training))))
    path.write_bytes(hashes.tobytes())


def check_overlap(held_out: list[str], training: Iterable[Path], allowed: float = 0.0, n: int = NGRAM_WORDS) -> float:
    """Share of the held-out n-grams found in the training files; OverlapError above `allowed`."""
    shared, total = shared_ngrams(held_out, (text for path in training for text in read_texts(path)), n)
    share = shared / max(total, 1)
    if share > allowed:
        raise OverlapError(
            f"{shared} of {total} {n}-word runs of the held-out text also occur in the training text "
            f"({share:.3%}, allowed {allowed:.3%}): take them out of the training data, or measure on other text"
        )
    return share
