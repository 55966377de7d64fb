"""Paged attention in plain torch: the portable backend, and the reference the faster ones are tested against.

T = tokens, R = requests, H = query heads, K = KV heads, G = H / K, D = head dim, P = page size, C = context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from model_store.spec import Rope
from server.core.batch import ForwardBatch
from server.kernels.memory import zero_bytes


@dataclass(slots=True)
class DecodeGroup:
    """Requests that advance by one token and are attended to in one padded call."""

    rows: torch.Tensor  # [R'] token rows, relative to the lane
    slots: np.ndarray  # [R']
    num_blocks: int  # of the longest context in the group
    contexts: torch.Tensor  # [R', 1]
    mask: torch.Tensor  # bool [R', 1, 1, num_blocks * P]: positions that exist

    def seen(self, window: int | None) -> torch.Tensor:
        """The mask of a layer with this window."""
        if window is None:
            return self.mask
        positions = torch.arange(self.mask.shape[-1], device=self.mask.device)
        return self.mask & (positions >= self.contexts - window)[:, None, None]


@dataclass(slots=True)
class Chunk:
    """One request that advances by several tokens."""

    start: int  # first token row, relative to the lane
    stop: int
    slot: int
    num_blocks: int
    context_len: int
    device: torch.device
    mask: torch.Tensor | None  # bool [q, C]; None: the chunk is the whole context, plain causal

    def seen(self, window: int | None) -> torch.Tensor | None:
        """The mask of a layer with this window."""
        if window is None or window >= self.context_len:
            return self.mask
        count, first = self.stop - self.start, self.context_len - (self.stop - self.start)
        causal = torch.ones(count, self.context_len, dtype=torch.bool, device=self.device).tril_(first)
        return causal & ~causal.tril(first - window)


@dataclass(slots=True)
class Lane:
    """Requests [start, stop) of the sorted batch, with what attention needs to know about them.

    A step has at most (distinct sizes + 1) different cuts, so lanes are built once per (start, stop) and reused by
    every layer that runs the same requests.
    """

    start: int
    stop: int
    tokens: slice
    block_tables: np.ndarray  # of the batch
    write_slots: np.ndarray  # [T] block-table row of each token
    write_blocks: np.ndarray  # [T] block index of each token
    write_offsets: torch.Tensor  # [T] position within the page
    decode: list[DecodeGroup]
    chunks: list[Chunk]
    # By the kind of angles: cos and sin [T, 1, rotary_dim].
    rotary: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class TorchAttention:
    """Writes this step's K and V, gathers the pages of one layer and calls scaled_dot_product_attention: decode rows
    padded together, chunks one by one."""

    kind = ""  # of pages, for the start-up log

    def __init__(self, *, page_size: int, scale: float, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.page_size = page_size
        self.scale = scale
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.k_pages = self.v_pages = torch.empty(0)  # [pages, K, P, D] once allocated

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What holds KV, the page being the first dimension."""
        return self.k_pages, self.v_pages

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Of K and V of one token of one layer."""
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize

    def allocate(self, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        # Zeroed, because padded positions are read (and masked): NaN would survive a mask.
        self.k_pages, self.v_pages = (zeros(shape, dtype, device) for _ in "kv")

    def prepare(self, batch: ForwardBatch, start: int, stop: int) -> Lane:
        """Everything about requests [start, stop) that does not depend on the layer."""
        device = self.k_pages.device
        tokens = batch.tokens(start, stop)
        positions = batch.positions[tokens]
        counts = np.diff(batch.query_start[start : stop + 1])
        offsets = batch.query_start[start:stop] - tokens.start
        contexts, slots = batch.context_lens[start:stop], batch.slots[start:stop]
        decode = []
        for group in _similar(contexts, np.flatnonzero(counts == 1)):
            num_blocks = -(-int(contexts[group].max()) // self.page_size)
            exists = np.arange(num_blocks * self.page_size) < contexts[group][:, None]
            decode.append(
                DecodeGroup(
                    torch.from_numpy(offsets[group].astype(np.int64)).to(device),
                    slots[group],
                    num_blocks,
                    torch.from_numpy(contexts[group].astype(np.int64))[:, None].to(device),
                    torch.from_numpy(exists)[:, None, None, :].to(device),
                )
            )
        chunks = []
        for row in np.flatnonzero(counts > 1):
            count, context, first = int(counts[row]), int(contexts[row]), int(offsets[row])
            mask = None
            if count != context:
                # Query i sits at position context - count + i and sees positions up to its own.
                mask = torch.ones(count, context, dtype=torch.bool, device=device).tril_(context - count)
            num_blocks = -(-context // self.page_size)
            chunks.append(Chunk(first, first + count, int(slots[row]), num_blocks, context, device, mask))
        return Lane(
            start=start,
            stop=stop,
            tokens=tokens,
            block_tables=batch.block_tables,
            write_slots=np.repeat(slots, counts),
            write_blocks=positions // self.page_size,
            write_offsets=torch.from_numpy((positions % self.page_size).astype(np.int64)).to(device),
            decode=decode,
            chunks=chunks,
        )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, lane: Lane, window: int | None = None
    ) -> torch.Tensor:
        """q [T, H, D], k and v [T, K, D], rotated -> [T, H, D]. A token sees `window` tokens up to itself, or all."""
        table = lane.block_tables[layer]  # [max_num_seqs, max_blocks]
        self._write(k, v, table[lane.write_slots, lane.write_blocks], lane.write_offsets)
        out = torch.empty_like(q)
        groups = self.num_heads // self.num_kv_heads
        for group in lane.decode:
            keys, values = self._gather(table[group.slots, : group.num_blocks])
            # The G query heads of a KV head become G query positions, so K and V need no repetition.
            query = q[group.rows].view(-1, self.num_kv_heads, groups, self.head_dim)
            attended = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=group.seen(window), scale=self.scale
            )
            out[group.rows] = attended.reshape(-1, self.num_heads, self.head_dim)
        for chunk in lane.chunks:
            rows = slice(chunk.start, chunk.stop)
            query = q[rows].transpose(0, 1)[None]
            if chunk.mask is None:
                keys, values = k[rows].transpose(0, 1)[None], v[rows].transpose(0, 1)[None]
            else:
                keys, values = self._gather(table[chunk.slot : chunk.slot + 1, : chunk.num_blocks])
                keys, values = keys[:, :, : chunk.context_len], values[:, :, : chunk.context_len]
            mask = chunk.seen(window)
            attended = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, is_causal=mask is None, scale=self.scale,
                enable_gqa=groups > 1,
            )  # fmt: skip
            out[rows] = attended[0].transpose(0, 1)
        return out

    def _write(self, k: torch.Tensor, v: torch.Tensor, pages: np.ndarray, offsets: torch.Tensor) -> None:
        index = torch.from_numpy(pages.astype(np.int64)).to(k.device)
        self.k_pages[index, :, offsets] = k
        self.v_pages[index, :, offsets] = v

    def _gather(self, pages: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, blocks] page ids -> K and V of [R, K, blocks * P, D]."""
        num_requests, num_blocks = pages.shape
        index = torch.from_numpy(pages.astype(np.int64).ravel()).to(self.k_pages.device)
        shape = (num_requests, num_blocks, self.num_kv_heads, self.page_size, self.head_dim)
        flat = (num_requests, self.num_kv_heads, num_blocks * self.page_size, self.head_dim)
        keys = self.k_pages.index_select(0, index).view(shape).transpose(1, 2).reshape(flat)
        values = self.v_pages.index_select(0, index).view(shape).transpose(1, 2).reshape(flat)
        return keys, values


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(zero_bytes(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)


def _similar(contexts: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Split decode rows into groups whose longest context is at most about twice the shortest, to bound padding."""
    rows = rows[np.argsort(contexts[rows], kind="stable")]
    groups, first = [], 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or contexts[rows[i]] > 2 * contexts[rows[first]] + 64:
            groups.append(rows[first:i])
            first = i
    return groups
