"""Low-rank student layers in the layout of the kernels: `a` of all terms of a product one below the other, `b` by term.

int8 factors stay int8 (one scale per row, as stored); the kernels add their products to the teacher's.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from model_store.int8 import Factor, Int8Matrix, dense
from model_store.loaded import LoadedPair
from model_store.lowrank import LowRankDelta, LowRankTerm
from server.kernels.cpu import library
from server.kernels.cpu.packing import TYPES, huge_pages

_GROUPS = ("qkv", "o", "up", "down")
_PANEL = 32  # output channels of a panel: ranks are padded to it


class PackedDifferences:
    """Packs the factors of a pair's low-rank layers in place of the plain ones."""

    def __init__(self, pair: LoadedPair, lib: ctypes.CDLL, dtype: torch.dtype, num_threads: int) -> None:
        """`dtype` is the pair's. In float32 the factors are float32, else what they are stored in."""
        self._lib, self._num_threads = lib, num_threads
        terms = [term for delta in pair.low_rank.values() for group in delta.terms.values() for term in group]
        are_int8 = bool(terms) and all(isinstance(factor, Int8Matrix) for t in terms for factor in (t.a, t.b))
        is_int8 = dtype != torch.float32 and are_int8
        self.dtype = torch.int8 if is_int8 else dtype
        self._scales: list[torch.Tensor] = []
        self._by_layer = {layer: self._pack(delta) for layer, delta in sorted(pair.low_rank.items())}
        self._deltas = pair.low_rank  # norms are used where they lie

    def table(self, num_layers: int) -> ctypes.Array:
        """The differences by global id; without terms where there is none."""
        table = (library.Difference * num_layers)()
        for layer, factors in self._by_layer.items():
            delta = self._deltas[layer]
            table[layer] = library.Difference(
                attn_norm_w=delta.attn_norm_weight.data_ptr(), mlp_norm_w=delta.mlp_norm_weight.data_ptr(), **factors
            )
        return table

    def _pack(self, delta: LowRankDelta) -> dict[str, library.Factors]:
        """One layer's factors; the plain ones are freed."""
        sources: list[Factor] = []
        for name in _GROUPS:
            padded = [self._padded(term) for term in delta.terms[name]]
            sources += [_stacked([a for a, _ in padded]), *(b for _, b in padded)]
        kind = TYPES[self.dtype]
        sizes = [self._lib.bs_packed_bytes(*s.shape, False, kind) for s in sources]
        delta.packed = huge_pages(sum(sizes))
        items = (library.Pack * len(sources))()
        packed, offset = [], 0
        for item, source, size in zip(items, sources, sizes, strict=True):
            item.target, item.type = delta.packed[offset : offset + size].data_ptr(), kind
            item.N, item.K = source.shape
            if isinstance(source, Int8Matrix):
                scale = torch.zeros(self._lib.bs_packed_channels(source.shape[0], False))
                item.source, item.source_scale, item.scale = (
                    source.values.data_ptr(),
                    source.scale.data_ptr(),
                    scale.data_ptr(),
                )
                self._scales.append(scale)
            else:
                item.source = source.data_ptr()
            packed.append(library.Weights(data=item.target, scale=item.scale, type=kind, rows=source.shape[0]))
            offset += size
        self._lib.bs_pack(items, len(sources), self._num_threads)
        weights, factors = iter(packed), {}
        for name in _GROUPS:
            terms = delta.terms[name]
            factors[name] = library.Factors(a=next(weights), num_terms=len(terms))
            for i, term in enumerate(terms):
                factors[name].terms[i] = library.Term(next(weights), term.start, term.stop, _padded_rank(term))
        delta.terms = {}
        return factors

    def _padded(self, term: LowRankTerm) -> tuple[Factor, Factor]:
        """a and b with the rank filled up with zeros, in the type that is packed."""
        more = _padded_rank(term) - term.a.shape[0]
        if self.dtype != torch.int8:
            a, b = dense(term.a, self.dtype), dense(term.b, self.dtype)
            return F.pad(a, (0, 0, 0, more)).contiguous(), F.pad(b, (0, more)).contiguous()
        assert isinstance(term.a, Int8Matrix) and isinstance(term.b, Int8Matrix)
        padded = Int8Matrix(F.pad(term.a.values, (0, 0, 0, more)), F.pad(term.a.scale, (0, more)))
        return padded, Int8Matrix(F.pad(term.b.values, (0, more)).contiguous(), term.b.scale)


def _stacked(factors: list[Factor]) -> Factor:
    """One below the other; all are of one kind."""
    int8 = [factor for factor in factors if isinstance(factor, Int8Matrix)]
    if int8:
        return Int8Matrix(torch.cat([f.values for f in int8]), torch.cat([f.scale for f in int8]))
    return torch.cat([factor for factor in factors if isinstance(factor, torch.Tensor)])


def _padded_rank(term: LowRankTerm) -> int:
    return -(-term.a.shape[0] // _PANEL) * _PANEL
