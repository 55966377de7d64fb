"""The device's copy of the block tables: only what has changed is sent before a step.

L = global layers, P = tokens per page.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from server.core.batch import ForwardBatch


@triton.jit(do_not_specialize=["num_updates"])
def scatter_kernel(table_ptr, updates_ptr, num_updates, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_update = i < num_updates
    where = tl.load(updates_ptr + 2 * i, mask=is_update, other=0)
    tl.store(table_ptr + where, tl.load(updates_ptr + 2 * i + 1, mask=is_update, other=0), mask=is_update)


class DeviceTables:
    """int32 [L, max_num_seqs, max_blocks] on the device."""

    def __init__(self, num_layers: int, num_slots: int, num_blocks: int, device: torch.device) -> None:
        self.tables = torch.zeros(num_layers, num_slots, num_blocks, dtype=torch.int32, device=device)
        # Slot -> (the list of blocks its row was written from, how many of them). A request's list is only ever
        # appended to, and replaced by a new one when its blocks are freed, so the list itself tells what is current.
        self._written: dict[int, tuple[object, int]] = {}

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.tables[layer]

    def changes(self, batch: ForwardBatch, page_size: int) -> np.ndarray:
        """int32 [n, 2] of (flat index, page) that the device lacks for this batch; counts them as sent."""
        num_slots, num_blocks = self.tables.shape[1:]
        found = []
        for request, slot, context in zip(
            batch.requests, batch.slots.tolist(), batch.context_lens.tolist(), strict=True
        ):
            stop = -(-context // page_size)
            if request is None:  # nobody vouches for the row
                first, layers = 0, np.arange(len(batch.block_tables))
            else:
                blocks, first = self._written.get(slot, (None, 0))
                if blocks is not request.blocks:
                    first = 0
                if first >= stop:
                    continue
                stop = max(stop, len(request.blocks))
                self._written[slot] = (request.blocks, stop)
                layers = np.asarray(request.path.layers)
            columns = np.arange(first, stop)
            where = (layers[:, None] * num_slots + slot) * num_blocks + columns
            pages = batch.block_tables[layers, slot, first:stop]
            found.append(np.stack((where.ravel(), pages.ravel()), axis=1))
        if not found:
            return np.zeros((0, 2), np.int32)
        return np.concatenate(found).astype(np.int32)

    def forget(self) -> None:
        """Send everything again: it is not known what the device has."""
        self._written.clear()

    def apply(self, updates: torch.Tensor) -> None:
        """updates int32 [n, 2] on the device."""
        if len(updates):
            block = 1024
            scatter_kernel[(triton.cdiv(len(updates), block),)](self.tables, updates, len(updates), BLOCK=block)
