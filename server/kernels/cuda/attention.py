"""Paged attention: flash attention over work items, with the keys of an item split among programs where items are few.

An item is a run of consecutive query tokens of one request; a decoding request is an item of one token. The G query
heads of a KV head are extra rows of the same tile, so each K and V element is read once for all of them. What is left
of a prompt behind a cached prefix, or guesses to be verified, make one or two items with thousands of keys: those are
split as decoding ones are.

T = tokens, H = query heads, K = KV heads, G = H / K, D = head dim, P = page size, S = splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
MAX_SPLITS = 32
# A chunk's tile of partial results is as much traffic as two blocks of keys, and joining them is one more launch.
MIN_BLOCKS = 4  # of keys, for a split of a chunk

# Views that start anywhere.
_MOVING = ["tokens_ptr", "lengths_ptr", "slots_ptr", "positions_ptr", "count_ptr"]
_MOVING_TO_REDUCE = ["tokens_ptr", "lengths_ptr", "count_ptr"]


@triton.jit(do_not_specialize=["first_token"], do_not_specialize_on_alignment=_MOVING)
def attention_kernel(
    q_ptr, out_ptr, partial_ptr, score_ptr, k_pages_ptr, v_pages_ptr, table_ptr, tokens_ptr, lengths_ptr, slots_ptr,
    positions_ptr, count_ptr, first_token, max_blocks, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """SPLITS 0: as many as the grid has, and one compilation for all of them. QUERIES: most of an item."""
    item, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if item >= tl.load(count_ptr):
        return
    G: tl.constexpr = H // K
    length = tl.load(lengths_ptr + item)
    position = tl.load(positions_ptr + item)  # of the item's first query
    row = tl.load(tokens_ptr + item) - first_token
    table_ptr += tl.load(slots_ptr + item).to(tl.int64) * max_blocks

    rows = tl.arange(0, BLOCK_M)
    queries, heads = rows // G, kv_head * G + rows % G
    channels = tl.arange(0, WIDTH)
    in_head = channels < D
    q_mask = (queries < length)[:, None] & in_head[None, :]
    q_offsets = ((row + queries).to(tl.int64) * H + heads) * D
    q = tl.load(q_ptr + q_offsets[:, None] + channels[None, :], mask=q_mask, other=0.0)

    num_keys = position + length
    splits = SPLITS if SPLITS else tl.num_programs(2)
    share = tl.cdiv(tl.cdiv(num_keys, splits), BLOCK_N) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, num_keys)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        is_key = keys < stop
        pages = tl.load(table_ptr + keys // PAGE, mask=is_key, other=0).to(tl.int64)
        offsets = ((pages * K + kv_head) * PAGE + keys % PAGE) * D
        k = tl.load(
            k_pages_ptr + offsets[None, :] + channels[:, None], mask=is_key[None, :] & in_head[:, None], other=0.0
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        is_seen = is_key[None, :] & (keys[None, :] <= position + queries[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # A row that has seen no key yet has no best score to subtract.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(best - shift)
        total = total * fade + tl.sum(weights, axis=1)
        v = tl.load(
            v_pages_ptr + offsets[:, None] + channels[None, :], mask=is_key[:, None] & in_head[None, :], other=0.0
        )
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = new_best

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS == 1:
        tl.store(out_ptr + q_offsets[:, None] + channels[None, :], acc.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        # Row of the partial results = item, query, head. One that sees no key of this split scores -inf: weight 0.
        is_row = queries < length if QUERIES > 1 else queries < 1
        first_row = item * QUERIES + queries if QUERIES > 1 else item
        slots = (first_row * H + heads) * splits + split
        tl.store(score_ptr + slots, best + tl.log2(total), mask=is_row)
        tl.store(
            partial_ptr + slots[:, None].to(tl.int64) * D + channels[None, :], acc,
            mask=is_row[:, None] & in_head[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_token"], do_not_specialize_on_alignment=_MOVING_TO_REDUCE)
def reduce_kernel(
    partial_ptr, score_ptr, out_ptr, tokens_ptr, lengths_ptr, count_ptr, first_token,
    H: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0), tl.program_id(1)
    query = tl.program_id(2) if QUERIES > 1 else 0
    if item >= tl.load(count_ptr):
        return
    if QUERIES > 1 and query >= tl.load(lengths_ptr + item):
        return
    splits, channels = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    base = ((item * QUERIES + query) * H + head) * SPLITS + splits
    scores = tl.load(score_ptr + base)  # the first split holds the first key, which all see, so the best is finite
    weights = tl.exp2(scores - tl.max(scores, axis=0))
    mask = (weights > 0.0)[:, None] & (channels < D)[None, :]
    partial = tl.load(partial_ptr + base[:, None].to(tl.int64) * D + channels[None, :], mask=mask, other=0.0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    row = tl.load(tokens_ptr + item) - first_token + query
    target = out_ptr + (row.to(tl.int64) * H + head) * D + channels
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=channels < D)


@dataclass(slots=True)
class Items:
    """Work items of one kind in a lane. int32 [n] each but for `count`, int32 [1]: items beyond it do nothing."""

    tokens: torch.Tensor  # first query, as a token of the step
    lengths: torch.Tensor  # queries, at most `max_queries`
    slots: torch.Tensor
    positions: torch.Tensor  # of the first query
    count: torch.Tensor
    is_decode: bool  # one query each
    max_keys: int | None = None  # no item has more, where the host knows

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile shapes for one model: rows of queries x heads, keys of one turn, channels."""

    decode_rows: int
    chunk_rows: int
    keys: int
    width: int

    @classmethod
    def of(cls, *, num_heads: int, num_kv_heads: int, head_dim: int, item_bytes: int) -> Tiles:
        width = max(triton.next_power_of_2(head_dim), 16)
        decode_rows = max(triton.next_power_of_2(num_heads // num_kv_heads), 16)
        return cls(decode_rows, max(64, decode_rows), 64 if width * item_bytes <= 256 else 32, width)


class PagedAttention:
    """One model's tiles and the scratch of split items."""

    def __init__(
        self, *, num_heads: int, num_kv_heads: int, head_dim: int, scale: float, max_rows: int, num_programs: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """`max_rows`: most decoding items of a lane; `num_programs`: as many as fill the device twice over.

        Scratch holds what decoding items or up to `num_programs` tiles of chunks leave: with more nothing is split.
        """
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = scale * LOG2_E
        self.num_programs = num_programs
        self.tiles = Tiles.of(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, item_bytes=dtype.itemsize
        )
        self.max_queries = self.tiles.chunk_rows // (num_heads // num_kv_heads)
        max_chunks = num_programs // (2 * num_kv_heads)  # that are split
        queries = max(self._most_partial(max_rows), self._most_partial(max_chunks) * self.max_queries)
        rows = queries * num_heads
        self._partial = torch.empty(rows, head_dim, dtype=torch.float32, device=device)
        self._scores = torch.empty(rows, dtype=torch.float32, device=device)

    def _most_partial(self, max_items: int) -> int:
        """Most of items times splits, with any number of items up to this one."""
        return max((n * self.num_splits(n) for n in range(1, max_items + 1)), default=0)

    def num_splits(self, num_items: int, max_keys: int | None = None) -> int:
        """A power of two. Without `max_keys` it depends on the number of items only: a captured grid stays right."""
        wanted = self.num_programs // max(num_items * self.num_kv_heads, 1)
        if max_keys is not None:
            wanted = min(wanted, max_keys // (MIN_BLOCKS * self.tiles.keys))
        return min(1 << max(wanted.bit_length() - 1, 0), MAX_SPLITS) if wanted > 1 else 1

    def run(
        self, q: torch.Tensor, out: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: torch.Tensor,
        items: Items, first_token: int,
    ) -> None:  # fmt: skip
        """q and out [T, H, D], rows of the tokens from `first_token` on; their own K and V are already in the pages."""
        if not len(items):
            return
        tiles, page_size = self.tiles, k_pages.shape[2]
        splits = self.num_splits(len(items), items.max_keys)
        queries, rows = (1, tiles.decode_rows) if items.is_decode else (self.max_queries, tiles.chunk_rows)
        attention_kernel[(len(items), self.num_kv_heads, splits)](
            q, out, self._partial, self._scores, k_pages, v_pages, table, items.tokens, items.lengths, items.slots,
            items.positions, items.count, first_token, table.shape[1], self.scale,
            # Decode steps compile for each number before they are recorded; chunks would while somebody waits.
            H=self.num_heads, K=self.num_kv_heads, D=self.head_dim, PAGE=page_size,
            SPLITS=splits if items.is_decode or splits == 1 else 0, QUERIES=queries,
            BLOCK_M=rows, BLOCK_N=tiles.keys, WIDTH=tiles.width, num_warps=4, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            reduce_kernel[(len(items), self.num_heads, queries)](
                self._partial, self._scores, out, items.tokens, items.lengths, items.count, first_token,
                H=self.num_heads, D=self.head_dim, SPLITS=splits, QUERIES=queries, WIDTH=tiles.width, num_warps=1,
            )  # fmt: skip
