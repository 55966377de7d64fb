"""Logits on the device: what the engine does with them, all rows of a step together.

The host waits once for the scores of `MAX_ROWS` rows, and for nothing else. S = rows, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from server.core.executor import Draw
from server.core.request import LiveRequest, TokenLogprobs
from server.core.seen_tokens import SeenTokens

MAX_ROWS = 128  # that are scored at once: bounds the [rows, V] scratch


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A small array on the device, for operations enqueued from now on. On the CPU it shares the array's memory."""
    host = torch.from_numpy(array)
    if device.type == "cuda":
        host = host.pin_memory()  # else the copy would wait for all that the device has to do
    return host.to(device, non_blocking=True)


class DeviceLogits:
    """`LogitOps` on tensors."""

    def take(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return logits[send(np.array(rows), logits.device)]

    def mask(self, row: torch.Tensor, allowed: np.ndarray) -> None:
        row.masked_fill_(send(~allowed, row.device), -torch.inf)

    def add(self, row: torch.Tensor, tokens: np.ndarray, values: np.ndarray) -> None:
        row[send(tokens, row.device)] += send(values, row.device)

    def log(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.log()

    def probabilities(self, logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        settings = send(np.array([(how.temperature, how.min_p) for how in draws], np.float32), logits.device)
        probs = torch.softmax(logits / settings[:, :1], dim=-1)
        probs = probs.masked_fill_(probs < settings[:, 1:] * probs.amax(dim=-1, keepdim=True), 0.0)
        return probs / probs.sum(dim=-1, keepdim=True)

    def penalise(self, logits: torch.Tensor, rows: Sequence[tuple[int, LiveRequest, SeenTokens]]) -> None:
        """One copy to the device, and nothing waits for it."""
        # Runs of tokens that share (row, length, repetition penalty): prompts, then answers. A token in both runs of a
        # row comes to the same value twice, both from the logit as it was: nobody need sort out which tokens those are.
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
        run = torch.repeat_interleave(sent[1], output_size=sum(lengths))  # of each token; else it would wait for it
        row, token = sent[0][run].long(), torch.cat((*prompts, sent[3])).long()
        factor = sent[2].view(torch.float32)[run]
        values = logits[row, token]
        values = torch.where(values > 0, values / factor, values * factor)
        logits[row, token] = values
        first = len(token) - len(sent[3])  # of the answers
        logits[row[first:], token[first:]] = values[first:] - sent[4].view(torch.float32)

    def token_logprobs(
        self, logits: torch.Tensor, tokens: Sequence[int], num_top: Sequence[int]
    ) -> list[TokenLogprobs]:
        found = []
        for start in range(0, len(tokens), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            found += _score(torch.log_softmax(logits[rows], dim=-1), tokens[rows], num_top[rows])
        return found


def _score(logprobs: torch.Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    num_rows, vocab = logprobs.shape
    # No gather: a token may be -1, where a draw on the device found no finite logit.
    every_row = torch.arange(num_rows, device=logprobs.device)
    chosen = logprobs[every_row, send(np.array(tokens, np.int64), logprobs.device)][:, None]
    ranks = (logprobs > chosen).sum(dim=-1, dtype=torch.int32) + 1
    # One topk for each number wanted, not one for the largest: which of equal entries come first depends on it.
    runs = [(len(list(run)), vocab if wanted < 0 else wanted) for wanted, run in groupby(num_top)]
    parts, start = [chosen.view(torch.int32), ranks], 0
    for length, count in runs:
        values, ids = logprobs[start : start + length].topk(count, dim=-1)
        parts += [values.view(torch.int32), ids.int()]
        start += length
    packed = torch.cat([part.flatten() for part in parts]).cpu().numpy()
    scores = packed[:num_rows].view(np.float32).tolist(), packed[num_rows : 2 * num_rows].tolist()
    top, start = [], 2 * num_rows
    for length, count in runs:
        middle, stop = start + length * count, start + 2 * length * count
        top_values = packed[start:middle].view(np.float32).reshape(length, count).tolist()
        top_ids = packed[middle:stop].reshape(length, count).tolist()
        top += [tuple(zip(*row, strict=True)) for row in zip(top_ids, top_values, strict=True)]
        start = stop
    return [TokenLogprobs(*fields) for fields in zip(tokens, *scores, top, strict=True)]
