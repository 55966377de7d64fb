"""Log-probabilities and ranks of tokens, and the likeliest tokens beside them. S = rows, V = vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from server.core.request import TokenLogprobs
from server.engine.extras.transfer import send

# Rows that are scored at once (and of a prompt, that go through the head at once): bounds the [rows, V] scratch.
MAX_ROWS = 128
# On a CPU, which nobody waits for: scratch that stays in its caches and that malloc does not give back every time.
_CPU_ROWS = 4


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Logprob and rank of tokens[i] and the num_top[i] likeliest (-1: all) by row i of logits float32 [S, V].

    A host with a GPU waits once for every `MAX_ROWS` rows. Rows with equal `num_top` should stand together.
    """
    found = []
    count = MAX_ROWS if logits.is_cuda else _CPU_ROWS
    for start in range(0, len(tokens), count):
        rows = slice(start, start + count)
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
