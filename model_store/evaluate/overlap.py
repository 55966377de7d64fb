"""Refuses to measure on text that was trained on: shared runs of words, found by hashing.

What is looked for is every run of 13 words of a held-out text, and a text of fewer words (most chat prompts) as a
whole: a line or a turn of the training text that has just these words. Case, punctuation and spaces do not count.

`distill` leaves a fingerprint of its text with the pair, so that `evaluate` can check where the text is not at hand.
"""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from model_store.distill.data import Document, read_documents
from model_store.errors import BoomerangError

NGRAM_WORDS = 13  # as is usual since GPT-3 (arXiv 2005.14165, appendix C)
FINGERPRINT_FILE = "training_text.npz"
KEPT_HASHES = 1 << 16  # of each kind: half a MiB; text of up to 65,536 runs is kept whole
_BATCH = 1 << 20  # hashes that wait to be sorted in
_WORD = re.compile(r"[^\W_]+")
_ALL = np.uint64(2**64 - 1)


class OverlapError(BoomerangError, ValueError):
    """Held-out text shares runs of words with training text."""


def _words(text: str) -> np.ndarray:
    """64-bit hashes of the words of a text, uint64 [W]."""
    return np.array([_word_hash(word) for word in _WORD.findall(text.lower())], np.uint64)


@functools.lru_cache(1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest())


def _runs(words: np.ndarray, n: int) -> np.ndarray:
    """One evenly spread hash for every run of `n` words: uint64 [W - n + 1]."""
    count = max(len(words) - n + 1, 0)
    hashes = np.full(count, n, np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[i : i + count]
    # The finaliser of splitmix64: the smallest hashes of a fingerprint are then a fair sample of all.
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _units(text: str) -> np.ndarray:
    """What is looked for of a held-out text: its runs, or the whole of it if it is shorter."""
    words = _words(text)
    return _runs(words, min(NGRAM_WORDS, len(words))) if len(words) else np.empty(0, np.uint64)


def _turns(document: Document) -> list[str]:
    return [str(message["content"]) for message in document.messages]


def _trained(document: Document) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of a document's runs, and of its lines (of a conversation, its turns) that are shorter than a run."""
    pieces = _turns(document) or (document.text or "").splitlines()
    short = [_units(piece) for piece in pieces if len(_WORD.findall(piece)) < NGRAM_WORDS]
    return _runs(_words("\n".join(pieces)), NGRAM_WORDS), np.concatenate([np.empty(0, np.uint64), *short])


class Sketch:
    """A set of hashes, or if they are too many the `KEPT_HASHES` smallest, which stand for all."""

    def __init__(self, hashes: np.ndarray | None = None, bound: np.uint64 = _ALL) -> None:
        """`hashes`: uint64, sorted; every hash of the set up to `bound` is among them."""
        self.hashes = np.empty(0, np.uint64) if hashes is None else hashes
        self.bound = bound
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def add(self, hashes: np.ndarray) -> None:
        self._waiting.append(hashes[hashes <= self.bound])
        self._num_waiting += len(self._waiting[-1])
        if self._num_waiting >= _BATCH:
            self.settle()

    def settle(self) -> None:
        """Sort in what was added; until then it is not found."""
        found = np.unique(np.concatenate([self.hashes, *self._waiting]))
        if len(found) > KEPT_HASHES:
            self.bound = found[KEPT_HASHES - 1]
        self.hashes, self._waiting, self._num_waiting = found[found <= self.bound], [], 0

    def merge(self, other: Sketch) -> None:
        self.bound = min(self.bound, other.bound)
        self._waiting.append(other.hashes)
        self.settle()


class Fingerprint:
    """Hashes of a training text: its runs of words, and its short lines and turns."""

    def __init__(self, runs: Sketch, short: Sketch, unknown: Iterable[str] = ()) -> None:
        """`unknown`: students that the training started from and whose own training text is not in it."""
        self.runs, self.short, self.unknown = runs, short, tuple(unknown)

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Fingerprint:
        found = cls(Sketch(), Sketch())
        for document in documents:
            runs, short = _trained(document)
            found.runs.add(runs)
            found.short.add(short)
        found.runs.settle()
        found.short.settle()
        return found

    @classmethod
    def of_unknown(cls, name: str) -> Fingerprint:
        """Of the text of a student that left none."""
        return cls(Sketch(), Sketch(), [name])

    def merge(self, other: Fingerprint) -> None:
        """Add the text of another run."""
        self.runs.merge(other.runs)
        self.short.merge(other.short)
        self.unknown += tuple(name for name in other.unknown if name not in self.unknown)

    def save(self, path: Path) -> None:
        bounds = np.array([self.runs.bound, self.short.bound], np.uint64)
        np.savez(
            path, words=NGRAM_WORDS, runs=self.runs.hashes, short=self.short.hashes, bounds=bounds,
            unknown=np.array(self.unknown, dtype=np.str_),
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Fingerprint:
        """ValueError for a file that is none, or of runs of another length."""
        try:
            with np.load(path, allow_pickle=False) as file:
                words, bounds = int(file["words"]), file["bounds"]
                sketches = Sketch(file["runs"], bounds[0]), Sketch(file["short"], bounds[1])
                unknown = file["unknown"].tolist()
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a fingerprint of a training text: {error}") from error
        if words != NGRAM_WORDS:
            raise ValueError(f"{path} is of runs of {words} words, not {NGRAM_WORDS}")
        return cls(*sketches, unknown)


def fingerprint_of(folder: Path) -> Fingerprint | None:
    """The fingerprint of a pair's student folder, or of a checkpoint of a run of `distill`; None if it has none."""
    if folder.name.startswith("checkpoint-"):
        folder = folder.parent  # all of a run have the one beside them
    file = folder / FINGERPRINT_FILE
    return Fingerprint.load(file) if file.is_file() else None


def read_texts(path: Path, option: str) -> Iterator[str]:
    """The documents of a file or folder as `distill` reads them, each as one text."""
    for document in read_documents(path, option):
        yield document.text or "\n".join(_turns(document))


def check_overlap(
    option: str, texts: Sequence[str], training: Sequence[Path], known: Fingerprint | None, allowed: float = 0.0
) -> dict[str, Any] | None:
    """Look for held-out `texts`, given with `option`, in the training files and in the `known` fingerprint.

    Returns the `share` of their runs (and short texts) found there, how many were `checked` (a fingerprint of much
    text can tell of a sample of them only) and `against` what; None if there is nothing to check against. OverlapError
    if the share is above `allowed`.
    """
    if not training and known is None:
        return None
    own = [_units(text) for text in texts]
    short = np.array([len(_WORD.findall(text)) < NGRAM_WORDS for text in texts], bool)
    units, first = np.unique(np.concatenate([np.empty(0, np.uint64), *own]), return_index=True)
    is_short = np.repeat(short, [len(part) for part in own])[first]
    counts = []  # by source: which were found there, of which
    found = np.zeros(len(units), bool)
    for path in training:
        for document in read_documents(path, "--training-data"):
            for hashes in _trained(document):
                places = np.searchsorted(units, hashes)
                places, hashes = places[places < len(units)], hashes[places < len(units)]
                found[places[units[places] == hashes]] = True
    if training:
        counts.append((found, np.ones(len(units), bool)))
    if known is not None:
        found, checked = np.zeros(len(units), bool), np.zeros(len(units), bool)
        for sketch, kind in ((known.runs, ~is_short), (known.short, is_short)):
            checked |= kind & (units <= sketch.bound)
            found |= kind & np.isin(units, sketch.hashes)
        counts.append((found, checked))
    # The larger share: that of a sample must not drown in all that files were searched for.
    found, checked = max(counts, key=lambda count: _share(*count))
    against = [path.name for path in training] + ([FINGERPRINT_FILE] if known is not None else [])
    share = _share(found, checked)
    if share > allowed:
        example = _first_found(texts, set(units[found].tolist()))
        raise OverlapError(
            f"{option}: {found.sum()} of {checked.sum()} {NGRAM_WORDS}-word runs (or shorter texts) are also in the "
            f"training text ({', '.join(against)}; {share:.3%}, allowed {allowed:.3%}), as {example!r}: take them out "
            "of the training data, measure on other text, or set --allow-overlap"
        )
    return {"share": share, "checked": int(checked.sum()), "against": against}


def _share(found: np.ndarray, checked: np.ndarray) -> float:
    return float(found.sum() / max(checked.sum(), 1))


def _first_found(texts: Sequence[str], found: set[int]) -> str:
    for text in texts:
        for start, unit in enumerate(_units(text).tolist()):
            if unit in found:
                return " ".join(_WORD.findall(text.lower())[start : start + NGRAM_WORDS])
    return ""
