"""Generation checks on held-out chat prompts: what a divergence on given text cannot show.

Small elastic models fail in generation first (they repeat themselves, or never stop), so every size answers the
prompts itself and is compared with the teacher's answers to the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_store.distill.data import REPEAT_NGRAM, repeated
from model_store.distill.elastic import ElasticModel
from model_store.distill.from_pair import lend_size
from model_store.evaluate.measure import ratio_of_sums

# (size, prompts as token ids, most new tokens, temperature = 0, repetition_penalty = 1) -> answers as token ids, with
# the end token if drawn
Generate = Callable[..., list[list[int]]]


@dataclass(frozen=True, slots=True)
class Answers:
    """One entry per answer of one size."""

    repetitive: list[bool]  # collapsed into repetition
    stopped: list[bool]  # ended by itself
    lengths: list[int]  # tokens

    @classmethod
    def of(cls, answers: Sequence[list[int]], end_tokens: set[int]) -> Answers:
        return cls(
            [is_repetitive(answer) for answer in answers],
            [bool(answer) and answer[-1] in end_tokens for answer in answers],
            [len(answer) for answer in answers],
        )


def is_repetitive(tokens: Sequence[int]) -> bool:
    """More than half of an answer's 4-grams have occurred in it before (answers under 16 tokens never count)."""
    return len(tokens) >= 16 and sum(repeated(tokens)) > 0.5 * (len(tokens) - REPEAT_NGRAM + 1)


def transformers_generate(model: ElasticModel, end_tokens: set[int], batch_size: int = 16) -> Generate:
    """Generation with transformers, left-padded batches; used where no engine is handed in."""

    @torch.no_grad()
    def generate(
        size: int, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> list[list[int]]:  # fmt: skip
        sampling: dict[str, Any] = {"do_sample": bool(temperature), "repetition_penalty": repetition_penalty}
        if temperature:
            sampling |= {"temperature": temperature, "top_k": 0}
        pad, answers = min(end_tokens), []
        with lend_size(model, size) as lent:
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                longest = max(map(len, batch))
                ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in batch])
                mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
                out = lent.generate(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                    max_new_tokens=max_new_tokens, **sampling, eos_token_id=sorted(end_tokens), pad_token_id=pad,
                    use_cache=True,
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


def prompt_ids(tokenizer: Any, messages: Sequence[str]) -> list[list[int]]:
    """Each user message as the token ids that ask the model for its answer."""
    turns = ([{"role": "user", "content": message}] for message in messages)
    return [tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]


def compare(answers: dict[int, Answers], teacher: int) -> dict[int, dict[str, float]]:
    """Figures per size with the half widths of their 95 % intervals over prompts (`_ci`).

    Shares have Wilson intervals (half their width: the interval itself is not centred on the share), because with a
    few dozen prompts shares near 0 and 1 are the rule. The length is a multiple of the teacher's on the same prompts.
    """
    base = answers[teacher].lengths
    figures = {}
    for size, own in answers.items():
        row = share("repetition", own.repetitive) | share("stop_rate", own.stopped)
        row["answer_tokens"] = sum(own.lengths) / len(own.lengths)
        row["length_ratio"], row["length_ratio_ci"] = ratio_of_sums([float(n) for n in own.lengths], base)
        figures[size] = row
    return figures


def share(name: str, outcomes: Sequence[bool]) -> dict[str, float]:
    """How many of them are true, as columns of a size's row, with the interval."""
    low, high = wilson_interval(sum(outcomes), len(outcomes))
    return {
        name: sum(outcomes) / len(outcomes), f"{name}_low": low, f"{name}_high": high, f"{name}_ci": (high - low) / 2,
    }  # fmt: skip


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a share."""
    share, weight = hits / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / weight
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / weight
    return max(0.0, centre - half), min(1.0, centre + half)
