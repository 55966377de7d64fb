"""Training text against loops: python -m recipes.loop_text SAID.jsonl ... --out FILE.

Of what sizes of the pair said greedily (`teacher_text --size`) it takes the answers that collapse into repetition, and
others if asked; the rest, text to learn from as a whole, is drawn from articles, and from passages and conversations of
the base text.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model_store.evaluate.chat import is_repetitive

Record = dict[str, Any]
CONVERSATIONS = 0.1  # of the drawn characters


def mixed(
    said: Sequence[Record], articles: Sequence[Record], base: Sequence[Record], encode: Callable[[str], list[int]],
    characters: int, share_of_articles: float, plain: float, seed: int,
) -> list[Record]:  # fmt: skip
    """Documents in random order: answers of `said` in loops, `plain` times as many others, `characters` of text."""
    rng = random.Random(seed)
    loops: list[Record] = []
    others: list[Record] = []
    for record in said:
        (loops if is_repetitive(encode(record["response"])) else others).append(record)
    rng.shuffle(others)
    rows = loops + others[: int(plain * len(loops))]
    passages = [record for record in base if "text" in record]
    conversations = [record for record in base if record.get("prompt") and record.get("response")]
    passage_share = 1 - CONVERSATIONS - share_of_articles
    for source, share in ((articles, share_of_articles), (passages, passage_share), (conversations, CONVERSATIONS)):
        got = 0
        while source and got < share * characters:
            rows.append(rng.choice(source))
            got += _length(rows[-1])
    rng.shuffle(rows)
    return rows


def _length(record: Record) -> int:
    return len(record["text"]) if record.get("text") else len(record["prompt"]) + len(record["response"])


def _read(paths: Sequence[Path]) -> list[Record]:
    return [json.loads(line) for path in paths for line in path.read_text().split("\n") if line]


def main() -> None:
    from transformers import AutoTokenizer

    from model_store.pair import open_pair

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("said", type=Path, nargs="+", help="what sizes said: JSON lines with prompt, response, said_by")
    parser.add_argument("--articles", type=Path, required=True, help="JSON lines of encyclopaedia_text")
    parser.add_argument("--base", type=Path, required=True, help="JSON lines of training_text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=420_000, help="of drawn text (default %(default)s)")
    parser.add_argument("--share-of-articles", type=float, default=0.55, help="of these (default %(default)s)")
    parser.add_argument(
        "--plain", type=float, default=0.0, help="answers without a loop, per loop (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(open_pair(None, None).tokenizer_path, local_files_only=True)
    rows = mixed(
        _read(args.said), _read([args.articles]), _read([args.base]), lambda text: tokenizer(text).input_ids,
        args.characters, args.share_of_articles, args.plain, args.seed,
    )  # fmt: skip
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spoken = sum("said_by" in row for row in rows)
    print(f"{len(rows)} documents, {spoken} of them the sizes' own answers, {sum(map(_length, rows))} characters")


if __name__ == "__main__":
    main()
