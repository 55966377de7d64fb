"""CTRL's repetition penalty over prompt and answer; OpenAI's presence and frequency penalties over the answer.

All rows of a step together: one copy to the device, and nothing waits for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from server.core.request import LiveRequest
from server.engine.extras.transfer import send


@dataclass(slots=True)
class SeenTokens:
    """Of one request: the tokens of its prompt, and how often it has generated which."""

    prompt: torch.Tensor | None = None  # unique, int32, on the device; None until a repetition penalty asks for them
    generated: array = field(default_factory=lambda: array("i"))  # unique, in order of appearance
    counts: array = field(default_factory=lambda: array("i"))  # parallel to `generated`
    places: dict[int, int] = field(default_factory=dict)  # token -> where it stands in `generated`
    num_counted: int = 0

    def update(self, output_token_ids: list[int]) -> None:
        """Count what was generated since the last time."""
        for token in output_token_ids[self.num_counted :]:
            place = self.places.setdefault(token, len(self.generated))
            if place == len(self.generated):
                self.generated.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self.num_counted = len(output_token_ids)


def has_penalties(request: LiveRequest) -> bool:
    sampling = request.sampling
    return bool(sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)


def penalise(logits: torch.Tensor, rows: Sequence[tuple[int, LiveRequest, SeenTokens]]) -> None:
    """Penalise some rows of logits float32 [S, V] in place; `rows` has the number, the request and what it has seen."""
    # Runs of tokens that share (row, length, repetition penalty): prompts, then answers. A token in both runs of a row
    # comes to the same value twice, both from the logit as it was: nobody need sort out which tokens those are.
    prompts, prompt_runs, answers, answer_runs, taken = [], [], [], [], []
    for row, request, seen in rows:
        sampling = request.sampling
        seen.update(request.output_token_ids)
        if sampling.repetition_penalty != 1.0:
            if seen.prompt is None:
                seen.prompt = send(np.unique(np.array(request.prompt_token_ids, np.int32)), logits.device)
            prompts.append(seen.prompt)
            prompt_runs.append((row, len(seen.prompt), sampling.repetition_penalty))
        answers.append(np.array(seen.generated, np.int32))
        answer_runs.append((row, len(seen.generated), sampling.repetition_penalty))
        counts = np.array(seen.counts, np.float32)
        taken.append(sampling.presence_penalty + sampling.frequency_penalty * counts)
    numbers, lengths, factors = zip(*prompt_runs, *answer_runs, strict=True)
    parts = [np.array(numbers, np.int32), np.array(lengths, np.int32), np.array(factors, np.float32).view(np.int32)]
    parts += [np.concatenate(answers), np.concatenate(taken).view(np.int32)]
    sent = send(np.concatenate(parts), logits.device).split([len(part) for part in parts])
    run = torch.repeat_interleave(sent[1], output_size=sum(lengths))  # of each token; without the size it would wait
    row, token = sent[0][run].long(), torch.cat((*prompts, sent[3])).long()
    factor = sent[2].view(torch.float32)[run]
    values = logits[row, token]
    values = torch.where(values > 0, values / factor, values * factor)
    logits[row, token] = values
    first = len(token) - len(sent[3])  # of the answers
    logits[row[first:], token[first:]] = values[first:] - sent[4].view(torch.float32)
