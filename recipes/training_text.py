"""Prepares the text that the default student was trained on: python -m recipes.training_text.

Long prompts of the T0 set are passages (encyclopaedia, news, reviews, stories) with a task around them. The student is
to continue prose as the teacher does, so a part of them is used as plain text; the rest stays a conversation.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

_PASSAGE = 600  # characters: a prompt at least this long is mostly a passage
_PLAIN_SHARE = 0.8
_LONGEST = 6000

# Chat prompts for the teacher to answer (`distill --self-generate`): every request about every topic, shuffled.
REQUESTS = (
    "What is {}?", "Explain {} in simple words.", "Write a short story about {}.", "Why does {} matter?",
    "Give me three facts about {}.", "Write a short poem about {}.", "What are the pros and cons of {}?",
    "How did {} change over the last century?", "I want to learn about {}. Where should I begin?",
    "Write a polite e-mail that asks for information about {}.", "Summarise the history of {} in one paragraph.",
    "List five questions that a beginner would ask about {}.",
)  # fmt: skip
TOPICS = (
    "volcanoes", "the printing press", "honey bees", "the Silk Road", "steam engines",
    "the French Revolution", "jazz", "coral reefs", "the Moon", "vaccines", "bread", "bridges", "glaciers",
    "the Roman army", "coffee", "electric cars", "libraries", "owls", "earthquakes", "the human heart", "football",
    "castles", "the Amazon river", "microscopes", "tea", "railways", "penguins", "democracy", "gold", "lighthouses",
    "the violin", "rainbows", "whales", "the Great Wall", "money", "maps", "gardening", "the telephone", "mountains",
    "sleep", "sharks", "the Olympic Games", "paper", "windmills", "black holes", "horses", "cinema", "salt", "clocks",
    "deserts", "robots", "the Vikings", "swimming", "cheese", "satellites", "public parks", "time zones", "spiders",
    "opera", "batteries", "forests", "the alphabet", "submarines", "recycling", "rice", "kites", "museums",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path, nargs="+", help=".jsonl.gz files with prompt and response, or text")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--short-share", type=float, default=0.3, help="share of the short prompts that is kept")
    parser.add_argument("--chat-prompts", type=int, default=0, help="add prompts for the teacher to answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with args.out.open("w") as out:
        for source in args.sources:
            with gzip.open(source, "rt", encoding="utf-8") as lines:
                for line in lines:
                    if (row := prepared(json.loads(line), rng, args.short_share)) is not None:
                        out.write(json.dumps(row) + "\n")
        for prompt in chat_prompts(rng)[: args.chat_prompts]:
            out.write(json.dumps({"prompt": prompt}) + "\n")


def prepared(row: dict[str, str], rng: random.Random, short_share: float) -> dict[str, str] | None:
    """The document as it is trained on, or None to leave it out."""
    if "text" in row:
        return {"text": row["text"][: 4 * _LONGEST]}
    prompt, response = (row[key].replace("<|endoftext|>", "").strip() for key in ("prompt", "response"))
    if len(prompt) >= _PASSAGE:
        if rng.random() < _PLAIN_SHARE:
            return {"text": f"{prompt}\n{response}"[:_LONGEST]}
        return {"prompt": prompt[:_LONGEST], "response": response}
    return {"prompt": prompt, "response": response} if rng.random() < short_share else None


def chat_prompts(rng: random.Random) -> list[str]:
    prompts = [request.format(topic) for request in REQUESTS for topic in TOPICS]
    rng.shuffle(prompts)
    return prompts


if __name__ == "__main__":
    main()
