"""Training text by the teacher itself: python -m recipes.teacher_text base.jsonl --out own.jsonl.

Two kinds: prose that the teacher continues from an encyclopaedic first line found in the training text, and answers to
questions, about the subjects of those lines or (`--own-questions`) the teacher's own: given the start of a user's turn
it writes one (Magpie, arXiv 2406.08464). What the teacher says is what the student must learn to say, and nobody
else's rights are in it. With `--size` a smaller size speaks instead: text on which it learns what the teacher would
have said where it goes wrong itself, and (`distill --unlikelihood`) not to repeat itself. Prints how many answers do.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import Any

from recipes.training_text import REQUESTS, TOPICS

# "Ada Lovelace was an English ...": a capitalised subject, then what it is
_OPENING = re.compile(
    r"(?:^|[-.:\"]\s+)((?:The )?[A-Z][\w']+(?: (?:of|the|and|de|[A-Z\d][\w'.]*)){0,5}(?: \([^)\n]{2,40}\))?)"
    r",? (?:is|was|are|were) (?:a|an|the|one) [a-z][^.?!\n]{20,160}",
    re.MULTILINE,
)
_NOT_A_SUBJECT = re.compile(
    r"(?:It|This|That|There|He|She|They|We|What|Which|Who|Here|These|Those|Now|If|And|But|All|One|Our|My|His|Her|Their|Yes|So|As)\b"
)


def openings(texts: list[str]) -> list[tuple[str, str]]:
    """(subject, first words of a line about it), each subject once, in the order of the text."""
    found: dict[str, str] = {}
    for text in texts:
        for match in _OPENING.finditer(text):
            if not _NOT_A_SUBJECT.match(match[1]):
                found.setdefault(match[1], match[0][match.start(1) - match.start() :])
    return list(found.items())


def prompts(subjects: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` different questions: every request about the fixed topics, then requests about random subjects."""
    about = [request.format(topic) for request in REQUESTS for topic in TOPICS]
    plain = [f"{verb} {subject}." for subject in subjects for verb in ("Tell me about", "Write a paragraph about")]
    rng.shuffle(about)
    rng.shuffle(plain)
    chosen = (about + plain)[:count]
    rng.shuffle(chosen)
    return chosen


def own_questions(engine: Any, tokenizer: Any, size: int, count: int, seed: int) -> list[str]:
    """Up to `count` different questions, of twice as many samples that continue the start of a user's turn."""
    mark = "QUESTION"
    opening = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False).split(mark)[0]
    ids = tokenizer(opening, add_special_tokens=False).input_ids
    asked = engine.generate(size, [ids] * (2 * count), 64, 1.0, first_seed=100_000 * seed)
    texts = [
        tokenizer.decode(new, skip_special_tokens=True).strip() for new in asked if new[-1] in tokenizer.all_special_ids
    ]
    return [text for text in dict.fromkeys(texts) if len(text.split()) > 3][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help=".jsonl as training_text writes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--articles", type=int, default=900)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--own-questions", action="store_true", help="answer the teacher's own questions")
    parser.add_argument("--tokens", type=int, default=400, help="longest article or answer")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--size", type=int, help="layers of the size that speaks (default: the teacher)")
    parser.add_argument("--student", help="folder of another student than the default pair's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from model_store.evaluate.chat import is_repetitive, prompt_ids
    from model_store.pair import open_pair
    from server.config import Settings
    from server.offline import OfflineEngine

    rng = random.Random(args.seed)
    found = openings([row.get("text") or row["prompt"] for row in map(json.loads, args.text.open())])
    rng.shuffle(found)
    pair = open_pair(None, args.student)
    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_path, local_files_only=True)
    engine, teacher = OfflineEngine(pair, Settings(), 1024), pair.elasticity.sizes[-1]
    if args.own_questions:
        asked = own_questions(engine, tokenizer, teacher, args.answers, args.seed)
    else:
        asked = prompts([subject for subject, _ in found], args.answers, rng)
    chats = prompt_ids(tokenizer, asked)
    starts = [tokenizer(opening).input_ids for _, opening in found[: args.articles]]
    jobs = [("text", None, ids) for ids in starts] + [("chat", p, ids) for p, ids in zip(asked, chats, strict=True)]
    rng.shuffle(jobs)
    size = args.size or teacher
    began, made, answers, repeating = time.monotonic(), 0, 0, 0
    with args.out.open("w") as out:
        for first in range(0, len(jobs), 128):
            part = jobs[first : first + 128]
            said = engine.generate(size, [ids for *_, ids in part], args.tokens, args.temperature)
            for (kind, prompt, ids), new in zip(part, said, strict=True):
                text = tokenizer.decode(new, skip_special_tokens=True)
                if kind == "text":
                    row = {"text": tokenizer.decode(ids) + text}
                else:
                    row = {"prompt": prompt, "response": text.strip()}
                if size < teacher:
                    row["said_by"] = size
                out.write(json.dumps(row) + "\n")
                made += len(new)
                answers += kind == "chat"
                repeating += kind == "chat" and is_repetitive(new)
            out.flush()
            speed = made / (time.monotonic() - began)
            share = f"{repeating} of {answers} answers repeat themselves"
            print(f"{first + len(part)} of {len(jobs)}, {made} tokens, {speed:.0f}/s; {share}", flush=True)


if __name__ == "__main__":
    main()
