"""Training data: documents and conversations, cut into rows of equal length with a mask of what counts.

A file is .txt (one document), .jsonl or .jsonl.gz with `text`, `prompt` and `response`, or `messages`. Conversations
are written with the tokenizer's chat template; only answers count towards the loss unless asked otherwise. A row with
`said_by` (layers) is the words of a size of the pair: no cross-entropy is taken on it (it would learn to say
what it says already, and to stop where the answer was cut), and where it runs into a loop, `--unlikelihood` teaches
every size not to.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from model_store.opening import in_windows

Message = dict[str, str]
REPEAT_NGRAM = 4  # tokens of a run that counts as repeated
LOOP_TOKENS = 8  # as many repeated tokens on end are a loop: fewer are names and turns of phrase


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, or a conversation. `needs_answer`: its last message waits for the teacher's answer."""

    text: str | None = None
    messages: tuple[Message, ...] = ()
    said_by: int | None = None  # layers of the size that said it

    @property
    def needs_answer(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] != "assistant"


def read_documents(path: Path, option: str = "--data") -> Iterator[Document]:
    """Documents of a file, or of every file it knows in a folder. ValueError names the `option` and a line without."""
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.name.endswith((".txt", ".jsonl", ".jsonl.gz")):
                yield from read_documents(file, option)
        return
    if not path.is_file():
        raise ValueError(f"{option}: {path} does not exist")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        yield Document(text=path.read_text(errors="replace"))
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            yield _document(json.loads(line), f"{option}: {path.name} line {number}")


def _document(row: dict[str, Any], place: str) -> Document:
    clean = lambda text: text.replace("<|endoftext|>", "").strip()  # noqa: E731 - several public sets carry it as text
    said_by = row.get("said_by")
    if said_by is not None and (not isinstance(said_by, int) or isinstance(said_by, bool) or said_by < 1):
        raise ValueError(f"{place}: said_by is a number of layers, not {said_by!r}")
    if isinstance(row.get("text"), str):
        return Document(text=row["text"], said_by=said_by)
    if isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": clean(row["prompt"])}]
        if row.get("response"):
            messages.append({"role": "assistant", "content": clean(row["response"])})
        return Document(messages=tuple(messages), said_by=said_by)
    if row.get("messages"):
        return Document(messages=tuple(row["messages"]), said_by=said_by)
    raise ValueError(f"{place} has none of text, prompt, messages")


def check_speakers(documents: Iterable[Document], sizes: Sequence[int], are_needed: bool) -> None:
    """ValueError if a document was said by a size that there is not, or none by any where `are_needed`."""
    speakers = {document.said_by for document in documents if document.said_by is not None}
    if unknown := speakers - {*sizes}:
        raise ValueError(f"--data: said_by {min(unknown)}L is no size of the pair ({sizes[0]}L to {sizes[-1]}L)")
    if are_needed and not speakers:
        raise ValueError(
            "--unlikelihood: no document of --data has said_by, the size whose words it is: it would do nothing"
        )


def answer_prompts(
    documents: Iterable[Document], generate: Callable[[list[list[Message]]], list[str]], limit: int
) -> list[Document]:
    """Up to `limit` prompts without an answer, with the teacher's; further ones are dropped, the rest kept."""
    done: list[Document] = []
    waiting: list[Document] = []
    for document in documents:
        (waiting if document.needs_answer else done).append(document)
    waiting = waiting[:limit]
    if waiting:
        answers = generate([list(document.messages) for document in waiting])
        done += [
            Document(messages=(*document.messages, {"role": "assistant", "content": answer}))
            for document, answer in zip(waiting, answers, strict=True)
        ]
    return done


class PackedRows(Dataset):
    """Rows [n, T] of token ids, of what counts, of a size's own words, and of loops in these."""

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor, said: torch.Tensor, loops: torch.Tensor) -> None:
        self.ids, self.mask, self.said, self.loops = ids, mask, said, loops

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        names = {"input_ids": self.ids, "loss_mask": self.mask, "said": self.said, "loops": self.loops}
        return {name: rows[index] for name, rows in names.items()}

    def split(self, first: int) -> tuple[PackedRows, PackedRows]:
        """The first rows and the others."""
        tensors = (self.ids, self.mask, self.said, self.loops)
        return PackedRows(*(t[:first] for t in tensors)), PackedRows(*(t[first:] for t in tensors))


def repeated(ids: Sequence[int], length: int = REPEAT_NGRAM) -> list[bool]:
    """Which tokens complete a run of `length` that has occurred before."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for end in range(1, len(ids) + 1):
        gram = tuple(ids[max(0, end - length) : end])
        found.append(len(gram) == length and gram in seen)
        seen.add(gram)
    return found


def looping(ids: Sequence[int]) -> list[bool]:
    """Which tokens stand among `LOOP_TOKENS` or more repeated ones on end."""
    runs = ((again, len(list(run))) for again, run in itertools.groupby(repeated(ids)))
    return [again and length >= LOOP_TOKENS for again, length in runs for _ in range(length)]


def encode(document: Document, tokenizer: Any, loss_on: str) -> tuple[list[int], list[bool]]:
    """Token ids and the mask of one document. `loss_on`: "response" (of conversations) or "all"."""
    if not document.messages:
        whole = tokenizer(document.text, add_special_tokens=False).input_ids
        return whole, [True] * len(whole)
    ids: list[int] = []
    mask: list[bool] = []
    for end, message in enumerate(document.messages, 1):
        # Rendered turn by turn, so that the mask follows the template of any model.
        turns = list(document.messages[:end])
        opens = message["role"] != "assistant" and end < len(document.messages)
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=opens and document.messages[end]["role"] == "assistant"
        )
        now = tokenizer(text, add_special_tokens=False).input_ids
        fresh = now[len(ids) :]
        ids += fresh
        mask += [loss_on == "all" or message["role"] == "assistant"] * len(fresh)
    return ids, mask


def pack(
    documents: Sequence[Document], tokenizer: Any, tokens: int, row_tokens: int, loss_on: str, seed: int,
    opening: Sequence[int] = (),
) -> PackedRows:  # fmt: skip
    """Shuffle the documents, join them with the end token between, cut rows of `row_tokens`, about `tokens` in all.

    Every row begins with `opening` (opening.py), which does not count. Documents repeat in a new order if there are too
    few. ValueError if they do not fill one row.
    """
    rng = random.Random(seed)
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    ids: list[int] = []
    mask: list[bool] = []
    said: list[bool] = []
    loops: list[bool] = []
    order = list(range(len(documents)))
    while len(ids) < tokens:
        before = len(ids)
        rng.shuffle(order)
        for index in order:
            own, counts = encode(documents[index], tokenizer, loss_on)
            ids += [*own, separator]
            mask += [*counts, False]
            said += [documents[index].said_by is not None] * (len(own) + 1)
            loops += [*(looping(own) if documents[index].said_by else [False] * len(own)), False]
            if len(ids) >= tokens:
                break
        if len(ids) == before:
            raise ValueError("--data: there is no document with text in it")
    if len(ids) < row_tokens - len(opening):
        raise ValueError(f"--data: {len(ids)} tokens do not fill one row of {row_tokens}")
    count, nothing = max(tokens // row_tokens, 1), [False] * len(opening)
    kinds = ((ids, opening), (mask, nothing), (said, nothing), (loops, nothing))
    return PackedRows(*(torch.tensor(in_windows(values, row_tokens, first, count)) for values, first in kinds))
