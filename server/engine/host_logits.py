"""Logits in main memory: penalties, log-probabilities and draws in numpy, row by row.

A native executor draws faster by the same rules; executors whose logits lie on a device have operations of their own
(`LogitOps` in `server/core/executor.py`). S = rows, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from server.core.executor import Draw
from server.core.request import LiveRequest, TokenLogprobs
from server.core.seen_tokens import SeenTokens

# Wide enough that a nucleus rarely needs a full sort of the vocabulary.
_NUCLEUS_WIDTH = 256
_BLOCK = 64  # entries whose largest is looked at first


class HostLogits:
    """`LogitOps` on numpy arrays."""

    def take(self, logits: np.ndarray, rows: list[int]) -> np.ndarray:
        return logits[rows]

    def mask(self, row: np.ndarray, allowed: np.ndarray) -> None:
        row[~allowed] = -np.inf

    def add(self, row: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> None:
        row[tokens] += values

    def log(self, weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(weights)

    def penalise(self, logits: np.ndarray, rows: Sequence[tuple[int, LiveRequest, SeenTokens]]) -> None:
        for number, request, seen in rows:
            row, sampling = logits[number], request.sampling
            seen.update(request.output_token_ids)
            generated = np.array(seen.generated, np.int32)
            if sampling.repetition_penalty != 1.0:
                if seen.prompt is None:
                    seen.prompt = np.unique(np.array(request.prompt_token_ids, np.int32))
                # A token in both comes to the same value twice, both from the logit as it was.
                tokens, factor = np.concatenate((seen.prompt, generated)), np.float32(sampling.repetition_penalty)
                values = row[tokens]
                row[tokens] = np.where(values > 0, values / factor, values * factor)
            counts = np.array(seen.counts, np.float32)
            row[generated] -= sampling.presence_penalty + sampling.frequency_penalty * counts

    def token_logprobs(self, logits: np.ndarray, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
        scratch = np.empty(logits.shape[-1], np.float32)
        found = []
        for row, token, wanted in zip(logits, tokens, num_top, strict=True):
            most = row.max()
            total = np.log(np.exp(np.subtract(row, most, out=scratch), out=scratch).sum())
            rank = int(np.count_nonzero(row > row[token])) + 1
            ids = largest(row, len(row) if wanted < 0 else wanted)
            top = tuple(zip(ids.tolist(), (row[ids] - most - total).tolist(), strict=True))
            found.append(TokenLogprobs(token, float(row[token] - most - total), rank, top))
        return found

    def probabilities(self, logits: np.ndarray, draws: Sequence[Draw]) -> np.ndarray:
        weights = np.stack([_weights(row, how) for row, how in zip(logits, draws, strict=True)])
        return weights / weights.sum(axis=-1, keepdims=True)


def draw(logits: np.ndarray, draws: Sequence[Draw]) -> list[int]:
    """`Executor.draw` on numpy arrays: the rules as they are written in sampler.py."""
    return [_draw(row, how) for row, how in zip(logits, draws, strict=True)]


def _draw(row: np.ndarray, how: Draw) -> int:
    best = int(row.argmax())
    if not np.isfinite(row[best]):
        return -1
    if how.temperature == 0:
        return best
    if how.top_p >= 1.0 and not 0 < how.top_k < len(row):
        return _race(_weights(row, how), np.arange(len(row)), how.uniform)
    return _draw_cut(row / np.float32(how.temperature), how)


def _weights(row: np.ndarray, how: Draw) -> np.ndarray:
    """Probabilities without top_k and top_p, up to a factor where min_p cut some off."""
    scaled = row / np.float32(how.temperature)
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    weights[weights < np.float32(how.min_p) * weights.max()] = 0.0
    return weights


def _draw_cut(scaled: np.ndarray, how: Draw) -> int:
    """top_k and/or top_p over the likeliest entries; the vocabulary is sorted only for a very wide nucleus."""
    vocab = len(scaled)
    top_k = how.top_k if 0 < how.top_k < vocab else vocab
    width = min(vocab, max(_NUCLEUS_WIDTH, how.top_k))
    while True:
        ids = largest(scaled, width)
        values = scaled[ids] - scaled[ids[0]]
        lowest = np.log(np.float32(how.min_p)) if how.min_p > 0 else -np.inf
        # Mass is relative to everything that survives min_p and top_k, including what lies beyond `width`.
        everyone = scaled - scaled[ids[0]] if width < vocab else values
        weights = np.where(values < lowest, np.float32(0), np.exp(values))
        weights[top_k:] = 0.0
        is_limited = top_k <= width
        probs = weights / (weights if is_limited else np.exp(everyone[everyone >= lowest])).sum()
        mass = probs.cumsum()
        if is_limited or width == vocab or mass[-1] >= min(how.top_p, 1.0 - 1e-6):
            break
        width = vocab
    # Keep the smallest set whose mass reaches top_p: an entry stays if the mass before it has not.
    probs[mass - probs >= how.top_p] = 0.0
    return _race(probs, ids, how.uniform)


def _race(weights: np.ndarray, ids: np.ndarray, uniform: float) -> int:
    """The token whose time comes first; weights need not sum to 1."""
    with np.errstate(divide="ignore"):
        return int(ids[(race_noise(ids, uniform) / weights.astype(np.float64)).argmin()])


def race_noise(ids: np.ndarray, uniform: float) -> np.ndarray:
    """Exponential(1) numbers float64 [n] of token ids [n] and the 64 bits of a number of [0, 1).

    The hash is Wellons' lowbias32 with the key put in before and between its rounds; the native draw
    (kernels/cpu/sampling.h) and the CUDA one (kernels/cuda/draw.py) compute the same.
    """
    key = int(np.float64(uniform).view(np.uint64))
    h: np.ndarray = ids.astype(np.uint32) * np.uint32(0x9E3779B9) + np.uint32(key & 0xFFFFFFFF)
    h = (h ^ h >> 16) * np.uint32(0x7FEB352D)
    h = (h ^ h >> 15 ^ np.uint32(key >> 32)) * np.uint32(0x846CA68B)
    h ^= h >> 16
    return -np.log1p(-(h.astype(np.float64) + 0.5) * 2.0**-32)


def largest(row: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest entries of [V], the largest first, equal ones in order."""
    if not count:
        return np.zeros(0, np.intp)
    # As many blocks as entries are wanted have a largest of at least this bound, so the wanted ones are all at it.
    whole = len(row) // _BLOCK
    places = np.arange(len(row))
    if count <= whole:
        most = row[: whole * _BLOCK].reshape(whole, _BLOCK).max(axis=1)
        found = np.flatnonzero(row >= np.partition(most, whole - count)[whole - count])
        places = found if len(found) >= count else places  # NaN is above nothing
    return places[np.argsort(-row[places], kind="stable")[:count]]
