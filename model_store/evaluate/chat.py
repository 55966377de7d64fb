"""Generation checks on held-out chat prompts: what a divergence on given text cannot show.

Small elastic models fail in generation first (they repeat themselves, or never stop), so every size answers the
prompts itself and is compared with the teacher's answers to the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model_store.distill.elastic import ElasticModel
from model_store.distill.from_pair import lend_size

# (size, prompts as token ids, most new tokens) -> answers as token ids, an end token included where one was drawn
Generate = Callable[[int, Sequence[list[int]], int], list[list[int]]]
_REPEAT_NGRAM = 4


@dataclass(frozen=True, slots=True)
class Answers:
    """Figures of the answers of one size."""

    repetition: float  # share of answers that collapsed into repetition
    stop_rate: float  # share that ended by themselves
    mean_tokens: float

    @classmethod
    def of(cls, answers: Sequence[list[int]], end_tokens: set[int]) -> Answers:
        stopped = [bool(answer) and answer[-1] in end_tokens for answer in answers]
        return cls(
            sum(map(is_repetitive, answers)) / len(answers),
            sum(stopped) / len(answers),
            sum(map(len, answers)) / len(answers),
        )


def is_repetitive(tokens: Sequence[int]) -> bool:
    """More than half of an answer's 4-grams have occurred in it before (answers under 16 tokens never count)."""
    grams = [tuple(tokens[i : i + _REPEAT_NGRAM]) for i in range(len(tokens) - _REPEAT_NGRAM + 1)]
    return len(tokens) >= 16 and len(set(grams)) < 0.5 * len(grams)


def transformers_generate(model: ElasticModel, end_tokens: set[int], batch_size: int = 16) -> Generate:
    """Greedy generation with transformers, left-padded batches; used where no engine is handed in."""

    @torch.no_grad()
    def generate(size: int, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        pad, answers = min(end_tokens), []
        with lend_size(model, size) as lent:
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                longest = max(map(len, batch))
                ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in batch])
                mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
                out = lent.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                    eos_token_id=sorted(end_tokens), pad_token_id=pad, use_cache=True,
                )  # fmt: skip
                answers += [_until_end(row[longest:].tolist(), end_tokens) for row in out]
        return answers

    return generate


def _until_end(tokens: list[int], end_tokens: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in end_tokens), len(tokens) - 1)
    return tokens[: stop + 1]


def chat_prompts(path: Path, limit: int) -> list[str]:
    """User messages, one per line (plain text), or the `prompt` of JSON lines."""
    import json

    lines = [line for line in path.read_text().splitlines() if line.strip()]
    prompts = [json.loads(line)["prompt"] if line.startswith("{") else line for line in lines]
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts[:limit]


def compare(answers: dict[int, Answers], teacher: int) -> dict[int, dict[str, float]]:
    """Figures per size, with the answer length as a multiple of the teacher's and a 95 % half width of repetition."""
    base = answers[teacher]
    return {
        size: {
            "repetition": a.repetition,
            "stop_rate": a.stop_rate,
            "answer_tokens": a.mean_tokens,
            "length_ratio": a.mean_tokens / base.mean_tokens if base.mean_tokens else math.nan,
        }
        for size, a in answers.items()
    }
