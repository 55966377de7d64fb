"""Draws one token per row on the device, by the sampler's rules (server/engine/sampler.py): an exponential race whose
noise is a hash of the token and of the row's number, so a seed gives the same text here as anywhere, up to rounding.

Nothing is sorted and nothing waits for the host. What top_k and top_p need of an order by likelihood is the mass or the
number of entries above a value; that falls as the value rises, so each is found by bisection over the bits of the
logit (16 steps for bfloat16). Equal logits count in the order of their ids.

S = rows, V = vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from server.kernels.cuda.runtime import INTERPRETED

# Bits of a float32 that a wider copy of a narrower type leaves zero: bisection need not look at them.
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The float of a key. For negative numbers the spare bits of the ordered form are ones."""
    bits = (key << SHIFT).to(tl.int32)
    bits = tl.where(key < 0, (bits | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, top, scale, min_p):
    """Likelihood of a logit relative to the largest one; 0 below min_p."""
    weight = tl.exp((x - top) * scale)
    return tl.where(weight >= min_p, weight, 0.0)


@triton.jit
def _from(row_ptr, vocab, key, top, scale, min_p, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Mass and number of the entries at or above `key`."""
    mass = tl.zeros([], tl.float64)
    count = tl.zeros([], tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        is_in = (ids < vocab) & (_key(x, SHIFT) >= key)
        mass += tl.sum(tl.where(is_in, _weight(x, top, scale, min_p), 0.0), axis=0).to(tl.float64)
        count += tl.sum(is_in.to(tl.int32), axis=0)
    return mass, count


@triton.jit
def _search(
    row_ptr, vocab, low, high, target, top, scale, min_p, BY_COUNT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key of [low, high) from which on mass (or count) reaches the target."""
    while high - low > 1:
        middle = low + (high - low) // 2
        mass, count = _from(row_ptr, vocab, middle, top, scale, min_p, SHIFT, BLOCK)
        if BY_COUNT:
            reached = count.to(tl.float64) >= target
        else:
            reached = mass >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def _times(ids, weights, low, high):
    """When each token arrives: exponential noise of its id and the row's number over its weight; without one, never."""
    h = ids.to(tl.uint32) * 0x9E3779B9 + low
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15) ^ high) * 0x846CA68B
    h = h ^ (h >> 16)
    v = (h.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    # Close to 0, 1 - v would lose what tells unlikely tokens apart.
    noise = tl.where(v < 0.01, v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25))), -tl.log(1.0 - v))
    return tl.where(weights > 0.0, noise / weights, float("inf"))


@triton.jit
def _race(
    row_ptr, vocab, low, high, bound, num_equal, top, scale, min_p, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The first to arrive of the entries above the key `bound` and the first `num_equal`, by id, at it."""
    best = tl.full([], float("inf"), tl.float32)
    token = tl.zeros([], tl.int32)
    seen = tl.zeros([], tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        key = _key(x, SHIFT)
        is_equal = (ids < vocab) & (key == bound)
        rank = seen + tl.cumsum(is_equal.to(tl.int32), axis=0) - 1
        is_in = (ids < vocab) & ((key > bound) | (is_equal & (rank < num_equal)))
        times = _times(ids, tl.where(is_in, _weight(x, top, scale, min_p), 0.0), low, high)
        first = tl.min(times, axis=0)
        here = tl.min(tl.where(times == first, ids, vocab), axis=0)
        token = tl.where(first < best, here, token)
        best = tl.minimum(first, best)
        seen += tl.sum(is_equal.to(tl.int32), axis=0)
    return token


@triton.jit
def _cut(row_ptr, vocab, top_p, top_k, top, scale, min_p, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """What top_k and top_p keep: the entries above a key, and how many at it."""
    lowest = _key(tl.full([], float("-inf"), tl.float32), SHIFT)
    above = _key(top, SHIFT) + 1
    bound = lowest
    num_equal = tl.full([], 2147483647, tl.int32)
    kept, count = _from(row_ptr, vocab, lowest, top, scale, min_p, SHIFT, BLOCK)
    if (top_k > 0) & (top_k < vocab):
        bound = _search(row_ptr, vocab, lowest, above, top_k.to(tl.float64), top, scale, min_p, True, SHIFT, BLOCK)
        mass, count = _from(row_ptr, vocab, bound + 1, top, scale, min_p, SHIFT, BLOCK)
        num_equal = top_k - count
        kept = mass + num_equal * _weight(_value(bound, SHIFT), top, scale, min_p).to(tl.float64)
    if top_p < 1.0:
        target = top_p * kept
        at_k = bound
        bound = _search(row_ptr, vocab, bound, above, target, top, scale, min_p, False, SHIFT, BLOCK)
        mass, count = _from(row_ptr, vocab, bound + 1, top, scale, min_p, SHIFT, BLOCK)
        weight = tl.maximum(_weight(_value(bound, SHIFT), top, scale, min_p).to(tl.float64), 1e-300)
        wanted = tl.minimum(tl.maximum(tl.ceil((target - mass) / weight), 1.0), 1e9).to(tl.int32)
        num_equal = tl.where(bound == at_k, tl.minimum(num_equal, wanted), wanted)
    return bound, num_equal


# The stride is the number of rows: without this, variants for 1, for multiples of 16 and for the rest are compiled.
@triton.jit(do_not_specialize=["settings_stride"])
def draw_kernel(
    logits_ptr, settings_ptr, tokens_ptr, vocab, row_stride, settings_stride, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_ids = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        best_ids = tl.where(x > best, ids, best_ids)
        best = tl.where(x > best, x, best)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, best_ids, vocab), axis=0)
    is_finite = (top > float("-inf")) & (top < float("inf"))
    temperature = tl.load(settings_ptr + row)
    if (temperature > 0.0) & is_finite:
        top_p = tl.load(settings_ptr + settings_stride + row)
        min_p = tl.load(settings_ptr + 2 * settings_stride + row).to(tl.float32)
        top_k = tl.load(settings_ptr + 3 * settings_stride + row).to(tl.int32)
        number = tl.load(settings_ptr + 4 * settings_stride + row).to(tl.int64, bitcast=True)
        low, high = (number & 0xFFFFFFFF).to(tl.uint32), ((number >> 32) & 0xFFFFFFFF).to(tl.uint32)
        scale = (1.0 / temperature).to(tl.float32)
        bound = _key(tl.full([], float("-inf"), tl.float32), SHIFT)
        num_equal = tl.full([], 2147483647, tl.int32)
        if (top_p < 1.0) | ((top_k > 0) & (top_k < vocab)):
            bound, num_equal = _cut(row_ptr, vocab, top_p, top_k, top, scale, min_p, SHIFT, BLOCK)
        token = _race(row_ptr, vocab, low, high, bound, num_equal, top, scale, min_p, SHIFT, BLOCK)
    tl.store(tokens_ptr + row, tl.where(is_finite, token, -1))


def draw(logits: torch.Tensor, settings: torch.Tensor, tokens: torch.Tensor) -> None:
    """One token per row of logits [S, V] into tokens int32 [>= S]; -1 where no logit is a finite number.

    settings float64 [5, >= S]: temperature (0: the likeliest), top_p, min_p, top_k, uniform number of [0, 1).
    """
    num_rows, vocab = logits.shape
    if num_rows:
        draw_kernel[(num_rows,)](
            logits, settings, tokens, vocab, logits.stride(0), settings.stride(0), SHIFT=_SPARE_BITS[logits.dtype],
            BLOCK=min(triton.next_power_of_2(vocab), 1 << 16 if INTERPRETED else 4096), num_warps=8,
        )  # fmt: skip
