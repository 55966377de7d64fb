"""Weights in the layout of the kernels (panels.h), packed once at load into one arena of huge pages.

Streaming hundreds of megabytes per step through 4 KiB pages misses the TLB all the time. Matrices lie in the order in
which a step reads them. A packed tensor keeps its identity, only its storage becomes a part of the arena (in the shape
of the panels), so what was shared stays shared and nothing exists twice. bfloat16 can be kept in twelve bits
(compressed.h): the same numbers in three quarters of the bytes.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass

import torch

from model_store.int8 import Int8Matrix, Matrix
from model_store.loaded import LoadedPair
from model_store.weights import MATRICES, EndWeights, LayerWeights
from server.kernels.cpu import library

logger = logging.getLogger(__name__)

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14
_TYPES = {torch.float32: library.FLOAT, torch.bfloat16: library.BF16, torch.int8: library.INT8}


def twelve_bit_bytes(num_rows: int, width: int) -> int:
    """Bytes of a compressed bfloat16 matrix (compressed.h): panels of 32 rows, inputs by 32, 1.5 bytes for each weight,
    64 for the exponents of a panel. Weights without a code, one in some 10,000, take 8 bytes more: not counted."""
    return -(-num_rows // 32) * (-(-width // 32) * 32 * 48 + 64)


@dataclass(frozen=True, slots=True)
class _Source:
    matrix: Matrix
    is_gated: bool
    num_bytes: int  # packed
    num_channels: int  # with padding


class PackedWeights:
    """Packs all matrices of a pair: layers, heads, and embeddings that are also heads."""

    def __init__(self, pair: LoadedPair, lib: ctypes.CDLL, num_threads: int, compress: bool = False) -> None:
        """`compress` keeps bfloat16 matrices in twelve bits; others are packed as they are."""
        self._lib, self._num_threads = lib, num_threads
        self.dtype = pair.ends["teacher"].head.dtype  # of all packed weights: the pair's, or int8
        self.is_compressed = compress and self.dtype == torch.bfloat16
        self.type = library.BF12 if self.is_compressed else _TYPES[self.dtype]
        self.bytes_per_weight = 1.5 if self.is_compressed else float(self.dtype.itemsize)
        self._beside: list[torch.Tensor] = []  # exponents and rest of compressed matrices
        self._where: dict[int, library.Weights] = {}  # by address of the tensor's (packed) storage
        groups = [[getattr(layer, name) for name in MATRICES] for _, layer in sorted(pair.layers.items())]
        gated = {id(group[2]) for group in groups} if pair.spec.gated_mlp else set()
        groups.append([pair.ends["teacher"].head, pair.ends["student"].head])
        # Embeddings tied to a head that no size needs.
        groups.append([end.embed for end in pair.ends.values() if isinstance(end.embed, Int8Matrix)])
        seen: set[int] = set()
        matrices: list[list[_Source]] = []
        for group in groups:
            distinct = [m for m in group if not (_start(m) in seen or seen.add(_start(m)))]
            matrices.append([self._measure(matrix, id(matrix) in gated) for matrix in distinct])
        everyone = list(pair.tensors())
        self._arena = huge_pages(sum(m.num_bytes for group in matrices for m in group))
        num_channels = sum(m.num_channels for group in matrices for m in group) if self.dtype == torch.int8 else 0
        self._scales = torch.zeros(num_channels)
        offset = channel = 0
        for group in matrices:  # originals of one layer are freed before the next is packed
            offset, channel = self._pack(group, offset, channel, everyone)

    def of(self, matrix: Matrix) -> library.Weights | None:
        """The packed form of a matrix, None if it was not packed."""
        return self._where.get(_start(matrix))

    def num_bytes(self) -> int:
        return self._arena.nbytes + self._scales.nbytes + sum(tensor.nbytes for tensor in self._beside)

    def _measure(self, matrix: Matrix, is_gated: bool) -> _Source:
        assert matrix.dtype == self.dtype
        n, k = matrix.shape
        num_bytes = self._lib.bs_packed_bytes(n, k, is_gated, self.type)
        return _Source(matrix, is_gated, num_bytes, self._lib.bs_packed_channels(n, is_gated))

    def _pack(self, group: list[_Source], offset: int, channel: int, everyone: list[torch.Tensor]) -> tuple[int, int]:
        items = (library.Pack * len(group))()
        targets = []
        for item, m in zip(items, group, strict=True):
            target = self._arena[offset : offset + m.num_bytes]
            scale = self._scales[channel : channel + m.num_channels]
            fill(item, m.matrix, target, scale, m.is_gated)
            targets.append((m, target, scale))
            offset, channel = offset + m.num_bytes, channel + m.num_channels
        if self.is_compressed:
            self._measure_exponents(items, group)
        self._lib.bs_pack(items, len(group), self._num_threads)
        for (m, target, scale), item in zip(targets, items, strict=True):
            address = _start(m.matrix)
            packed = target.view(self.dtype).view(m.num_channels // 32, -1, 32)
            for tensor in [t for t in everyone if t.data_ptr() == address]:
                tensor.data = packed
            if isinstance(m.matrix, Int8Matrix):
                m.matrix.scale.data = scale
            self._where[packed.data_ptr()] = library.Weights(
                item.target, item.scale, item.exponents, item.rest_start, item.rest
            )
        return offset, channel

    def _measure_exponents(self, items: ctypes.Array, group: list[_Source]) -> None:
        """Find the exponents that the codes of a group stand for, and make room for the weights without a code."""
        starts = []
        for item, m in zip(items, group, strict=True):
            num_panels = m.num_channels // 32
            exponents = torch.empty(num_panels, 64, dtype=torch.uint8)
            start = torch.empty(num_panels + 1, dtype=torch.int32)
            item.type, item.exponents, item.rest_start = self.type, exponents.data_ptr(), start.data_ptr()
            starts.append(start)
            self._beside += [exponents, start]
        self._lib.bs_measure(items, len(group), self._num_threads)
        for item, start in zip(items, starts, strict=True):
            rest = torch.empty(int(start[-1]), 2, dtype=torch.int32)  # BsRest
            item.rest = rest.data_ptr()
            self._beside.append(rest)


def fill(item: library.Pack, matrix: Matrix, target: torch.Tensor, scale: torch.Tensor, is_gated: bool = False) -> None:
    """Have `matrix` packed to the bytes `target`, and its scales, if it has any, to `scale`."""
    is_int8 = isinstance(matrix, Int8Matrix)
    values = matrix.values if is_int8 else matrix
    assert values.is_contiguous() and (not is_int8 or matrix.scale.is_contiguous())
    item.source, item.target, item.type = values.data_ptr(), target.data_ptr(), _TYPES[values.dtype]
    if is_int8:
        item.source_scale, item.scale = matrix.scale.data_ptr(), scale.data_ptr()
    item.N, item.K = matrix.shape
    item.gated = is_gated


def packed_weights(target: torch.Tensor, scale: torch.Tensor) -> library.Weights:
    """What `fill` had packed, as the kernels take it."""
    return library.Weights(target.data_ptr(), scale.data_ptr() if len(scale) else None)


def _start(matrix: Matrix) -> int:
    return (matrix.values if isinstance(matrix, Int8Matrix) else matrix).data_ptr()


def layer_table(pair: LoadedPair, packed: PackedWeights, num_layers: int) -> ctypes.Array:
    """The layers by global id, as the library takes them."""
    table = (library.Layer * num_layers)()
    for index, weights in pair.layers.items():
        table[index] = library.Layer(
            **{name.removesuffix("_weight"): packed.of(getattr(weights, name)) for name in MATRICES},
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
