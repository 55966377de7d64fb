"""Paged attention over KV in 8 bits, in plain torch: the reference of the kernels that do the same with integers.

A key is rounded to 255 steps per block of 32 channels, a value per head; the scales are float16, as in Q8_0 blocks of
llama.cpp. Products take queries and weights in 8 bits too: queries by blocks of 32 channels, weights (times the scales
of the values) by blocks of 32 positions of a page.

T = tokens, R = requests, H = query heads, K = KV heads, G = H / K, D = head dim, P = page size, C = context.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from model_store.quantized import ACTIVATION_BLOCK as BLOCK
from model_store.spec import int8_kv_bytes
from server.model.attention import Lane, TorchAttention, zeros
from server.model.linear import round_activations


class Int8Attention(TorchAttention):
    """As TorchAttention; every token reads what lies in the pages, those of its own step among them."""

    kind = " in int8"

    def token_bytes(self, dtype: torch.dtype) -> int:
        return int8_kv_bytes(self.num_kv_heads, self.head_dim)

    def allocate(self, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, size, dim = self.num_kv_heads, self.page_size, self.head_dim
        shape = num_pages, heads, size
        self.k_pages, self.v_pages = (zeros((*shape, dim), torch.int8, device) for _ in "kv")
        self.k_scales = zeros((*shape, -(-dim // BLOCK)), torch.float16, device)
        self.v_scales = zeros((*shape, 1), torch.float16, device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.k_pages, self.v_pages, self.k_scales, self.v_scales

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, lane: Lane, window: int | None = None
    ) -> torch.Tensor:
        """q [T, H, D], k and v [T, K, D], rotated -> [T, H, D]."""
        table = lane.block_tables[layer]  # [max_num_seqs, max_blocks]
        self._write(k, v, table[lane.write_slots, lane.write_blocks], lane.write_offsets)
        out = torch.empty_like(q)
        for group in lane.decode:
            pages = table[group.slots, : group.num_blocks]
            out[group.rows] = self._attend(q[group.rows][:, None], pages, group.seen(window))[:, 0].to(q.dtype)
        for chunk in lane.chunks:
            mask = chunk.seen(window)
            if mask is None:
                mask = q.new_ones(chunk.context_len, chunk.context_len, dtype=torch.bool).tril_()
            mask = F.pad(mask, (0, chunk.num_blocks * self.page_size - chunk.context_len))
            pages = table[chunk.slot : chunk.slot + 1, : chunk.num_blocks]
            rows = slice(chunk.start, chunk.stop)
            out[rows] = self._attend(q[rows][None], pages, mask)[0].to(q.dtype)
        return out

    def _attend(self, q: torch.Tensor, pages: np.ndarray, visible: torch.Tensor) -> torch.Tensor:
        """q [R, T, H, D] over pages [R, blocks], of whose positions `visible` [.., T, C] are seen -> float32 like q."""
        num_requests, num_tokens = q.shape[:2]
        keys, k_scales, values, v_scales = (self._gather_one(tensor, pages) for tensor in self._all())
        query = round_activations(q).view(num_requests, num_tokens, self.num_kv_heads, -1, self.head_dim)
        query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [R, K, G * T, D]
        keys = keys.float() * k_scales.float().repeat_interleave(BLOCK, dim=-1)[..., : self.head_dim]
        scores = (query @ keys.transpose(-1, -2) * self.scale).unflatten(2, (-1, num_tokens))
        weights = scores.masked_fill(~visible.unsqueeze(-3), -torch.inf).softmax(dim=-1).flatten(2, 3)
        weights = self._round_by_page(weights * v_scales.float().transpose(-1, -2))
        attended = (weights @ values.float()).unflatten(2, (-1, num_tokens))  # [R, K, G, T, D]
        return attended.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _round_by_page(self, weights: torch.Tensor) -> torch.Tensor:
        """[.., C]: blocks begin anew on each page."""
        return round_activations(weights.unflatten(-1, (-1, self.page_size))).flatten(-2)

    def _all(self) -> tuple[torch.Tensor, ...]:
        return self.k_pages, self.k_scales, self.v_pages, self.v_scales

    def _gather_one(self, tensor: torch.Tensor, pages: np.ndarray) -> torch.Tensor:
        """Pages [R, blocks] of [pages, K, P, X] -> [R, K, blocks * P, X]."""
        index = torch.from_numpy(pages.astype(np.int64)).to(tensor.device)
        return tensor[index].transpose(1, 2).flatten(2, 3)

    def _write(self, k: torch.Tensor, v: torch.Tensor, pages: np.ndarray, offsets: torch.Tensor) -> None:
        index = torch.from_numpy(pages.astype(np.int64)).to(k.device)
        for x, block, codes, scales in (
            (k, BLOCK, self.k_pages, self.k_scales),
            (v, self.head_dim, self.v_pages, self.v_scales),
        ):
            codes[index, :, offsets], scales[index, :, offsets] = round_to_codes(x, block)


def round_to_codes(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[.., D] -> int8 like x, and float16 scales [.., ceil(D / block)], no numbers where x holds some that are none."""
    blocks = F.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    scales = (blocks.abs().amax(dim=-1) / 127.0).to(torch.float16)
    wide = scales.float()[..., None]
    codes = torch.where(wide > 0, blocks / wide, 0.0).round().clamp(-127, 127)
    return codes.to(torch.int8).flatten(-2)[..., : x.shape[-1]], scales
