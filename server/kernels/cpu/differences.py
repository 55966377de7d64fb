"""Low-rank student layers in the layout of the kernels: `a` of all terms of a product one below the other, `b` by term.

int8 factors stay int8 (one scale per row, as stored); the kernels add their products to the teacher's.
"""

from __future__ import annotations

import ctypes

import numpy as np

from model_store.arrays import FLOAT32, address
from model_store.int8 import Factor, Int8Matrix, dense
from model_store.loaded import LoadedPair
from model_store.lowrank import LowRankDelta, LowRankTerm
from server.kernels.cpu import library
from server.kernels.cpu.packing import TYPES, huge_pages

_GROUPS = ("qkv", "o", "up", "down")
_PANEL = 32  # output channels of a panel: ranks are padded to it


class PackedDifferences:
    """Packs the factors of a pair's low-rank layers in place of the plain ones."""

    def __init__(self, pair: LoadedPair, lib: ctypes.CDLL, dtype: np.dtype, num_threads: int) -> None:
        """`dtype` is the pair's. In float32 the factors are float32, else what they are stored in."""
        self._lib, self._num_threads = lib, num_threads
        terms = [term for delta in pair.low_rank.values() for group in delta.terms.values() for term in group]
        are_int8 = bool(terms) and all(isinstance(factor, Int8Matrix) for t in terms for factor in (t.a, t.b))
        is_int8 = dtype != FLOAT32 and are_int8
        self.dtype = np.dtype(np.int8) if is_int8 else dtype
        self._scales: list[np.ndarray] = []
        self._by_layer = {layer: self._pack(delta) for layer, delta in sorted(pair.low_rank.items())}
        self._deltas = pair.low_rank  # norms are used where they lie

    def table(self, num_layers: int) -> ctypes.Array:
        """The differences by global id; without terms where there is none."""
        table = (library.Difference * num_layers)()
        for layer, factors in self._by_layer.items():
            delta = self._deltas[layer]
            table[layer] = library.Difference(
                attn_norm_w=address(delta.attn_norm_weight), mlp_norm_w=address(delta.mlp_norm_weight), **factors
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
            item.target, item.type = address(delta.packed) + offset, kind
            item.N, item.K = source.shape
            if isinstance(source, Int8Matrix):
                scale = np.zeros(self._lib.bs_packed_channels(source.shape[0], False), np.float32)
                item.source, item.source_scale, item.scale = (
                    address(source.values),
                    address(source.scale),
                    address(scale),
                )
                self._scales.append(scale)
            else:
                item.source = address(source)
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
        if self.dtype != np.int8:
            a, b = dense(term.a, self.dtype), dense(term.b, self.dtype)
            return _more_rows(a, more), _more_columns(b, more)
        assert isinstance(term.a, Int8Matrix) and isinstance(term.b, Int8Matrix)
        padded = Int8Matrix(_more_rows(term.a.values, more), _more_rows(term.a.scale, more))
        return padded, Int8Matrix(_more_columns(term.b.values, more), term.b.scale)


def _more_rows(values: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate((values, np.zeros((count, *values.shape[1:]), values.dtype)))


def _more_columns(values: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate((values, np.zeros((len(values), count), values.dtype)), axis=1)


def _stacked(factors: list[Factor]) -> Factor:
    """One below the other; all are of one kind."""
    int8 = [factor for factor in factors if isinstance(factor, Int8Matrix)]
    if int8:
        return Int8Matrix(np.concatenate([f.values for f in int8]), np.concatenate([f.scale for f in int8]))
    return np.concatenate([factor for factor in factors if not isinstance(factor, Int8Matrix)])


def _padded_rank(term: LowRankTerm) -> int:
    return -(-term.a.shape[0] // _PANEL) * _PANEL
