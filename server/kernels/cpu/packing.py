"""Weights in the layout of the kernels (panels.h), packed once at load into one arena of huge pages.

Streaming hundreds of megabytes per step through 4 KiB pages misses the TLB all the time. Matrices lie in the order in
which a step reads them. A packed tensor keeps its identity, only its storage becomes a part of the arena (in the shape
of the panels), so what was shared stays shared and nothing exists twice.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass

import numpy as np
import torch

from model_store.loaded import LoadedPair
from model_store.weights import EndWeights, LayerWeights
from server.kernels.cpu import library

logger = logging.getLogger(__name__)

MATRICES = ("qkv", "o", "up", "down")
_HUGE = 2 << 20
_MADV_HUGEPAGE = 14
_TYPES = {torch.float32: library.FLOAT, torch.bfloat16: library.BF16, torch.int8: library.INT8}


@dataclass(frozen=True, slots=True)
class _Matrix:
    tensor: torch.Tensor
    is_gated: bool
    num_bytes: int  # packed
    num_channels: int  # with padding


class PackedWeights:
    """Packs all matrices of a pair: layers, heads, and embeddings that are also heads."""

    def __init__(self, pair: LoadedPair, lib: ctypes.CDLL, dtype: torch.dtype, num_threads: int) -> None:
        """`dtype` of the packed weights: the pair's, or int8 (symmetric, one scale per output channel)."""
        self._lib, self.dtype, self._num_threads = lib, dtype, num_threads
        self._where: dict[int, library.Weights] = {}  # by address of the tensor's (packed) storage
        groups = [[getattr(layer, f"{name}_weight") for name in MATRICES] for _, layer in sorted(pair.layers.items())]
        gated = {id(group[2]) for group in groups} if pair.spec.gated_mlp else set()
        groups.append([pair.ends["teacher"].head, pair.ends["student"].head])
        seen: set[int] = set()
        matrices: list[list[_Matrix]] = []
        for group in groups:
            distinct = [t for t in group if not (t.data_ptr() in seen or seen.add(t.data_ptr()))]
            matrices.append([self._measure(tensor, id(tensor) in gated) for tensor in distinct])
        everyone = list(pair.tensors())
        self._arena = huge_pages(sum(m.num_bytes for group in matrices for m in group))
        self._scales = np.zeros(sum(m.num_channels for group in matrices for m in group), np.float32)
        offset = channel = 0
        for group in matrices:  # originals of one layer are freed before the next is packed
            offset, channel = self._pack(group, offset, channel, everyone)

    def of(self, tensor: torch.Tensor) -> library.Weights | None:
        """The packed form of a tensor, None if it was not packed."""
        return self._where.get(tensor.data_ptr())

    def num_bytes(self) -> int:
        return self._arena.nbytes + (self._scales.nbytes if self.dtype == torch.int8 else 0)

    def _measure(self, tensor: torch.Tensor, is_gated: bool) -> _Matrix:
        n, k = tensor.shape
        num_bytes = self._lib.bs_packed_bytes(n, k, is_gated, _TYPES[self.dtype])
        return _Matrix(tensor, is_gated, num_bytes, self._lib.bs_packed_channels(n, is_gated))

    def _pack(
        self, group: list[_Matrix], offset: int, channel: int, everyone: list[torch.Tensor]
    ) -> tuple[int, int]:
        items = (library.Pack * len(group))()
        targets = []
        for item, m in zip(items, group, strict=True):
            assert m.tensor.is_contiguous()
            n, k = m.tensor.shape
            target = self._arena[offset : offset + m.num_bytes]
            scale = self._scales[channel : channel + m.num_channels]
            item.source, item.target, item.scale = m.tensor.data_ptr(), target.data_ptr(), scale.ctypes.data
            item.N, item.K, item.gated = n, k, m.is_gated
            item.source_type, item.type = _TYPES[m.tensor.dtype], _TYPES[self.dtype]
            targets.append((m, target, scale))
            offset, channel = offset + m.num_bytes, channel + m.num_channels
        self._lib.bs_pack(items, len(group), self._num_threads)
        for m, target, scale in targets:
            address = m.tensor.data_ptr()
            packed = target.view(self.dtype).view(m.num_channels // 32, -1, 32)
            for tensor in [t for t in everyone if t.data_ptr() == address]:
                tensor.data = packed
            is_int8 = self.dtype == torch.int8
            self._where[packed.data_ptr()] = library.Weights(target.data_ptr(), scale.ctypes.data if is_int8 else None)
        return offset, channel


def layer_table(pair: LoadedPair, packed: PackedWeights, num_layers: int) -> ctypes.Array:
    """The layers by global id, as the library takes them."""
    table = (library.Layer * num_layers)()
    for index, weights in pair.layers.items():
        table[index] = library.Layer(
            **{name: packed.of(getattr(weights, f"{name}_weight")) for name in MATRICES},
            **{short: _address(weights, long) for short, long in _SMALL.items()},
        )
    return table


def end_table(pair: LoadedPair, packed: PackedWeights) -> ctypes.Array:
    """Teacher's and student's ends."""

    def end(weights: EndWeights) -> library.End:
        packed_embed = packed.of(weights.embed)
        return library.End(
            embed=None if packed_embed else weights.embed.data_ptr(), positions=_address(weights, "positions"),
            norm_w=weights.final_norm_weight.data_ptr(), norm_b=_address(weights, "final_norm_bias"),
            head_b=_address(weights, "head_bias"), packed_embed=packed_embed or library.Weights(),
            head=packed.of(weights.head),
        )  # fmt: skip

    return (library.End * 2)(end(pair.ends["teacher"]), end(pair.ends["student"]))


_SMALL = {
    "attn_norm_w": "attn_norm_weight", "attn_norm_b": "attn_norm_bias", "qkv_b": "qkv_bias", "o_b": "o_bias",
    "q_norm_w": "q_norm_weight", "k_norm_w": "k_norm_weight", "mlp_norm_w": "mlp_norm_weight",
    "mlp_norm_b": "mlp_norm_bias", "up_b": "up_bias", "down_b": "down_bias",
}  # fmt: skip


def _address(weights: LayerWeights | EndWeights, name: str) -> int | None:
    tensor = getattr(weights, name)
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def huge_pages(num_bytes: int) -> torch.Tensor:
    """Uninitialised bytes that start on a huge page; ordinary memory where the system has none."""
    raw = torch.empty(num_bytes + _HUGE, dtype=torch.uint8)
    start = -raw.data_ptr() % _HUGE
    arena = raw[start : start + num_bytes]
    advise = ctypes.CDLL(None, use_errno=True).madvise
    if advise(ctypes.c_void_p(arena.data_ptr()), ctypes.c_size_t(num_bytes // _HUGE * _HUGE), _MADV_HUGEPAGE):
        logger.info("no huge pages for the weights (errno %d)", ctypes.get_errno())
    return arena
