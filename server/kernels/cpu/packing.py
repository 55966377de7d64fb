"""Weights in the layout of the kernels (panels.h), packed once at load into one arena of huge pages.

Streaming hundreds of megabytes per step through 4 KiB pages misses the TLB all the time. Matrices lie in the order in
which a step reads them. Whoever referred to a matrix refers to its part of the arena afterwards, so what was shared
stays shared and nothing exists twice. bfloat16 can be kept in twelve bits (compressed.h): the same numbers in three
quarters of the bytes.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

import numpy as np

from model_store.arrays import BFLOAT16, FLOAT32, address
from model_store.dual import DualMatrix, exact_of, head_width, nested_of
from model_store.int8 import Int8Matrix, Matrix, is_plain
from model_store.loaded import LoadedPair
from model_store.nested import WIDTHS, NestedMatrix, bytes_in_memory, bytes_read
from model_store.quantized import CodedMatrix
from model_store.spec import ModelSpec, Rope
from model_store.weights import MATRICES, EndWeights, LayerWeights
from server.kernels.cpu import library
from server.kernels.memory import give_back

logger = logging.getLogger(__name__)

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14
TYPES = {FLOAT32: library.FLOAT, BFLOAT16: library.BF16, np.dtype(np.int8): library.INT8}
_NESTED_BITS = {kind: bits for bits, kind in library.NESTED.items()}
_PLAIN = {library.FLOAT, library.BF16, library.BF12}  # not codes


def twelve_bit_bytes(num_rows: int, width: int) -> int:
    """Bytes of a compressed bfloat16 matrix (compressed.h): panels of 32 rows, inputs by 32, 1.5 bytes for each weight,
    64 for the exponents of a panel. Weights without a code, one in some 10,000, take 8 bytes more: not counted."""
    return -(-num_rows // 32) * (-(-width // 32) * 32 * 48 + 64)


@dataclass(frozen=True, slots=True)
class _Source:
    """One matrix to pack, or the rows of one type of a matrix in codes."""

    values: np.ndarray
    shape: tuple[int, ...]
    type: int  # BsType
    num_bytes: int  # packed
    num_read: int  # of those, by a product
    num_channels: int  # with padding
    is_gated: bool = False
    scale: np.ndarray | None = None  # int8: [N]; WIDE: [N, K / 16]
    minimum: np.ndarray | None = None  # WIDE: [N, K / 16]


class PackedWeights:
    """Packs all matrices of a pair in one of their forms: layers, heads, and embeddings that are also heads."""

    type: int  # BsType
    bytes_per_weight: float

    def __init__(
        self, pair: LoadedPair, lib: ctypes.CDLL, num_threads: int, compress: bool = False,
        form: Callable[[Matrix], Matrix | None] = exact_of, beside: PackedWeights | None = None,
    ) -> None:  # fmt: skip
        """`compress` keeps bfloat16 matrices in twelve bits; others are packed as they are. `form`: of a matrix, what
        is packed here; matrices without it are left out. What `beside` packed stays there and counts as packed."""
        self._beside_of = beside  # whose arena some of it lies in
        self._lib, self._num_threads, self._compress = lib, num_threads, compress
        self._keep_alive: list[list[library.Weights]] = []  # `of` hands out copies whose `more` point here
        self._beside: list[np.ndarray] = []  # what lies outside the arena: exponents and rest of compressed matrices
        # By address of the tensor's (packed) storage
        self._where: dict[int, library.Weights] = {} if beside is None else dict(beside._where)
        self._num_weights: dict[int, int] = {} if beside is None else dict(beside._num_weights)
        # Likewise: how its parts were packed
        self._items: dict[int, list[library.Pack]] = {} if beside is None else dict(beside._items)
        layers = [layer for _, layer in sorted(pair.layers.items())]
        groups = [[form(getattr(layer, name)) for name in MATRICES] for layer in layers]
        gated = {id(group[2]) for group in groups} if pair.spec.gated_mlp else set()
        groups.append([form(pair.ends[side].head) for side in ("teacher", "student")])
        # Embeddings in codes, of a head that no size needs or of none.
        groups.append([form(end.embed) for end in pair.ends.values() if not is_plain(end.embed)])
        seen: set[int] = {*self._where}
        matrices: list[list[tuple[Matrix, list[_Source]]]] = []
        for group in groups:
            distinct = [m for m in group if m is not None and not (_start(m) in seen or seen.add(_start(m)))]
            matrices.append([(matrix, self._sources(matrix, id(matrix) in gated)) for matrix in distinct])
        sources = [source for group in matrices for _, parts in group for source in parts]
        types = {source.type for source in sources} | (set() if beside is None else {beside.type})
        self.type = types.pop() if types <= _PLAIN and len(types) == 1 else library.CODES
        self.is_compressed = self.type == library.BF12
        num_weights = sum(math.prod(source.shape) for source in sources)
        num_read: float = sum(source.num_read for source in sources)
        self._num_nested = dict.fromkeys((False, True), 0)  # weights that have nested codes: of layers, of heads
        if beside is not None:
            packed = sum(self._num_weights.values())
            num_weights, num_read = num_weights + packed, num_read + packed * beside.bytes_per_weight
            self._num_nested = dict(beside._num_nested)
        self.bytes_per_weight = num_read / num_weights
        self._arena = huge_pages(sum(source.num_bytes for source in sources))
        self._scales = np.zeros(sum(s.num_channels for s in sources if s.type == library.INT8), np.float32)
        self._offset = self._channel = 0
        users = _users(pair, form)
        del groups, group, distinct, sources
        while matrices:  # originals of one layer are freed before the next is packed
            self._pack(matrices.pop(0), users)

    def of(self, matrix: Matrix) -> library.Weights | None:
        """The packed form of a matrix, None if it was not packed."""
        return self._where.get(_start(matrix))

    def attach_nested(self, pair: LoadedPair, beside: PackedWeights | None = None) -> PackedWeights:
        """Have every matrix with nested codes point to them, packed into an arena of their own if they lie beside it.

        Returns what holds them. `beside`: what an earlier call returned, whose codes stay where they are.
        """
        matrices = [(getattr(layer, name), False) for layer in pair.layers.values() for name in MATRICES]
        matrices += [(end.head, True) for end in pair.ends.values()]
        is_dual = any(isinstance(matrix, DualMatrix) for matrix, _ in matrices)
        nested = self
        if is_dual:
            nested = PackedWeights(pair, self._lib, self._num_threads, form=nested_of, beside=beside)
        for matrix, is_head in matrices:
            codes, own = nested_of(matrix), self.of(matrix)
            if codes is not None and own is not None and not own.nested:
                own.nested = nested._where[_start(codes)].data
                self._num_nested[is_head] += nested._num_weights[_start(codes)]
        return nested

    def bytes_per_weight_at(self, width: int) -> float:
        """Bytes of one weight that products of rows of this width read."""
        if width not in WIDTHS:
            return self.bytes_per_weight
        layers, heads = self._num_nested[False], self._num_nested[True]
        read = layers * bytes_read(width) + heads * bytes_read(head_width(width))
        num_weights = sum(self._num_weights.values())
        return (read + (num_weights - layers - heads) * self.bytes_per_weight) / num_weights

    def release(self, matrices: Iterable[Matrix]) -> int:
        """Give the memory of packed matrices back to the system, neighbours at once. Their places stay. Bytes."""
        starts = sorted(start for matrix in matrices if (start := _start(matrix)) in self._items)
        spans: list[list[int]] = []
        for start in starts:
            last = self._items[start][-1]
            end = last.target + self._lib.bs_packed_bytes(last.N, last.K, last.gated, last.type)
            if spans and spans[-1][1] == start:
                spans[-1][1] = end
            else:
                spans.append([start, end])
        return sum(give_back(start, end - start) for start, end in spans)

    def restore(self, packed: Matrix, fresh: Matrix, num_threads: int) -> None:
        """Pack `fresh`, the numbers that `packed` was made of, to where that lies."""
        items = self._items[_start(packed)]
        sources = self._sources(fresh, bool(items[0].gated))
        array = (library.Pack * len(items))(*items)
        for item, source in zip(array, sources, strict=True):
            assert (item.type, item.N, item.K) == (source.type, *source.shape), "the same matrix as before"
            _point_to(item, source)
        self._lib.bs_pack(array, len(array), num_threads)

    def num_bytes(self) -> int:
        return self._arena.nbytes + self._scales.nbytes + sum(tensor.nbytes for tensor in self._beside)

    def _sources(self, matrix: Matrix, is_gated: bool) -> list[_Source]:
        if isinstance(matrix, CodedMatrix):
            ends = list(accumulate(len(part.blocks) for part in matrix.parts))
            # A panel is of one type.
            if any(end % 32 for end in ends[:-1]) or (is_gated and len(ends) > 1):
                return [self._wide(matrix, is_gated)]
            return [
                self._source(part.blocks, part.shape, library.BLOCK_TYPES[part.type.name], is_gated)
                for part in matrix.parts
            ]
        if isinstance(matrix, NestedMatrix):
            kind = library.NESTED[matrix.width]
            parts = {"scale": matrix.scales, "minimum": matrix.zero}
            return [self._source(matrix.codes, matrix.shape, kind, is_gated, **parts)]
        if isinstance(matrix, Int8Matrix):
            return [self._source(matrix.values, matrix.shape, library.INT8, is_gated, scale=matrix.scale)]
        assert isinstance(matrix, np.ndarray), "one form is packed at a time"
        is_compressed = self._compress and matrix.dtype == BFLOAT16
        return [self._source(matrix, matrix.shape, library.BF12 if is_compressed else TYPES[matrix.dtype], is_gated)]

    def _source(self, values: np.ndarray, shape: tuple[int, ...], kind: int, is_gated: bool, **more) -> _Source:
        num_bytes = num_read = self._lib.bs_packed_bytes(*shape, is_gated, kind)
        if kind in _NESTED_BITS:
            num_read = round(num_bytes * bytes_read(_NESTED_BITS[kind]) / bytes_in_memory())
        return _Source(
            values, shape, kind, num_bytes, num_read, self._lib.bs_packed_channels(shape[0], is_gated), is_gated, **more
        )

    def _wide(self, matrix: CodedMatrix, is_gated: bool) -> _Source:
        """Types that share panels as codes of eight bits with scale and minimum by 16 inputs, which hold them all."""
        codes, scales, minima = [], [], []
        for groups in (part.groups() for part in matrix.parts):
            per_group = groups.codes.shape[2] // 16
            minimum = np.zeros_like(groups.scale) if groups.minimum is None else groups.minimum
            codes.append(groups.codes.reshape(len(groups.codes), -1))
            scales.append(groups.scale.repeat(per_group, axis=1))
            minima.append(minimum.repeat(per_group, axis=1))
        return self._source(
            np.concatenate(codes),
            matrix.shape,
            library.WIDE,
            is_gated,
            scale=np.concatenate(scales),
            minimum=np.concatenate(minima),
        )

    def _pack(self, group: list[tuple[Matrix, list[_Source]]], users: _Users) -> None:
        """Pack the matrices of a layer; whoever has one gets the packed bytes in its place."""
        if not group:
            return
        sources = [source for _, parts in group for source in parts]
        items = (library.Pack * len(sources))()
        scales: dict[int, np.ndarray] = {}  # of int8, by address of the source
        for item, source in zip(items, sources, strict=True):
            if source.type == library.INT8:
                scales[address(source.values)] = self._scales[self._channel : self._channel + source.num_channels]
                self._channel += source.num_channels
            target = self._arena[self._offset : self._offset + source.num_bytes]
            fill(item, source, target, scales.get(address(source.values)))
            self._offset += source.num_bytes
        self._measure_exponents([item for item in items if item.type == library.BF12])
        self._lib.bs_pack(items, len(items), self._num_threads)
        packed, kept = iter(items), iter(items)
        for matrix, parts in group:
            weights = [
                library.Weights(
                    data=item.target, scale=item.scale, exponents=item.exponents, rest_start=item.rest_start,
                    rest=item.rest, type=item.type, rows=source.shape[0],
                )
                for source, item in zip(parts, packed, strict=False)
            ]  # fmt: skip
            for one, below in pairwise(weights):
                one.more = ctypes.addressof(below)
            self._keep_alive.append(weights)
            begin = weights[0].data - address(self._arena)
            values = self._arena[begin : begin + sum(source.num_bytes for source in parts)]
            scale = scales.get(address(parts[0].values))
            for use in users.pop(_start(matrix)):
                use(values, scale)
            self._where[address(values)] = weights[0]
            self._num_weights[address(values)] = sum(math.prod(source.shape) for source in parts)
            self._items[address(values)] = [next(kept) for _ in parts]

    def _measure_exponents(self, items: list[library.Pack]) -> None:
        """Find the exponents that the codes of these matrices stand for, and make room for the weights without one."""
        array = (library.Pack * len(items))(*items)
        starts = []
        for item in array:
            num_panels = self._lib.bs_packed_channels(item.N, item.gated) // 32
            exponents = np.empty((num_panels, 64), np.uint8)
            start = np.empty(num_panels + 1, np.int32)
            item.exponents, item.rest_start = address(exponents), address(start)
            starts.append(start)
            self._beside += [exponents, start]
        self._lib.bs_measure(array, len(array), self._num_threads)
        for item, measured, start in zip(items, array, starts, strict=True):
            rest = np.empty((int(start[-1]), 2), np.int32)  # BsRest
            item.exponents, item.rest_start, item.rest = measured.exponents, measured.rest_start, address(rest)
            self._beside.append(rest)


# Address of a matrix -> what puts packed bytes (and packed scales of int8) in its place, wherever it is referred to.
_Users = dict[int, list[Callable[[np.ndarray, np.ndarray | None], None]]]


def _users(pair: LoadedPair, form: Callable[[Matrix], Matrix | None]) -> _Users:
    users: _Users = {}
    fields: list[tuple[LayerWeights | EndWeights, tuple[str, ...]]] = [(o, MATRICES) for o in pair.layers.values()]
    fields += [(end, ("embed", "head")) for end in pair.ends.values()]
    for owner, names in fields:
        for name in names:
            if (matrix := form(getattr(owner, name))) is not None:
                users.setdefault(_start(matrix), []).append(partial(_replace, owner, name, matrix))
    return users


def _replace(
    owner: LayerWeights | EndWeights, name: str, matrix: Matrix, values: np.ndarray, scale: np.ndarray | None
) -> None:
    """A matrix keeps its kind, so that what it was can still be asked."""
    whole = getattr(owner, name)
    if isinstance(matrix, CodedMatrix):
        first, *others = matrix.parts
        rest = [replace(part, blocks=values[:0]) for part in others]
        matrix.parts = (replace(first, blocks=values), *rest)
    elif isinstance(matrix, NestedMatrix):
        matrix.codes, matrix.zero, matrix.scales = values, values[:0], values[:0]
    elif isinstance(matrix, Int8Matrix):
        matrix.values, matrix.scale = values, scale
    elif isinstance(whole, DualMatrix):
        whole.exact = values
    else:
        setattr(owner, name, values)


def fill(item: library.Pack, source: _Source, target: np.ndarray, scale: np.ndarray | None) -> None:
    """Have `source` packed to the bytes `target`, and the scales of int8 to `scale`."""
    _point_to(item, source)
    item.target, item.type = address(target), source.type
    item.scale = None if scale is None else address(scale)
    item.N, item.K = source.shape
    item.gated = source.is_gated


def _point_to(item: library.Pack, source: _Source) -> None:
    assert all(array is None or array.flags.c_contiguous for array in (source.values, source.scale, source.minimum))
    item.source = address(source.values)
    item.source_scale = None if source.scale is None else address(source.scale)
    item.source_minimum = None if source.minimum is None else address(source.minimum)


def source_of(matrix: Matrix) -> np.ndarray:
    """The array that says which matrix it is: shared matrices share it."""
    matrix = exact_of(matrix)
    if isinstance(matrix, CodedMatrix):
        return matrix.parts[0].blocks
    if isinstance(matrix, NestedMatrix):
        return matrix.codes
    if isinstance(matrix, Int8Matrix):
        return matrix.values
    assert isinstance(matrix, np.ndarray), "`exact_of` leaves nothing else"
    return matrix


def _start(matrix: Matrix) -> int:
    return address(source_of(matrix))


Angles = dict[Rope, tuple[np.ndarray, np.ndarray]]


def angle_tables(spec: ModelSpec, ropes: set[Rope], num_positions: int) -> Angles:
    """Cosines and sines [positions, rotary_dim / 2] of each kind of angles."""
    tables: Angles = {}
    for rope in ropes - {"none"}:
        inv_freq, factor = spec.rope_inv_freq(rope)
        angles = np.outer(np.arange(num_positions, dtype=np.float32), inv_freq)
        tables[rope] = np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)
    return tables


def layer_table(pair: LoadedPair, packed: PackedWeights, num_layers: int, angles: Angles) -> ctypes.Array:
    """The layers by global id, as the library takes them. `angles` must live as long as the table is used."""
    table = (library.Layer * num_layers)()
    for index, weights in pair.layers.items():
        table[index] = library.Layer(
            **{name.removesuffix("_weight"): packed.of(getattr(weights, name)) for name in MATRICES},
            **{short: _address(weights, long) for short, long in _SMALL.items()},
            window=weights.window or 0,
        )
        if weights.rope in angles:
            table[index].cos, table[index].sin = map(address, angles[weights.rope])
    return table


def end_table(pair: LoadedPair, packed: PackedWeights) -> ctypes.Array:
    """Teacher's and student's ends."""

    def end(weights: EndWeights) -> library.End:
        packed_embed = packed.of(weights.embed)
        plain = address(weights.embed) if is_plain(weights.embed) else None
        return library.End(
            embed=None if packed_embed else plain, positions=_address(weights, "positions"),
            norm_w=address(weights.final_norm_weight), norm_b=_address(weights, "final_norm_bias"),
            head_b=_address(weights, "head_bias"), packed_embed=packed_embed or library.Weights(),
            head=packed.of(weights.head),
        )  # fmt: skip

    return (library.End * 2)(end(pair.ends["teacher"]), end(pair.ends["student"]))


_SMALL = {
    "attn_norm_w": "attn_norm_weight", "attn_norm_b": "attn_norm_bias", "qkv_b": "qkv_bias", "o_b": "o_bias",
    "q_norm_w": "q_norm_weight", "k_norm_w": "k_norm_weight", "mlp_norm_w": "mlp_norm_weight",
    "mlp_norm_b": "mlp_norm_bias", "up_b": "up_bias", "down_b": "down_bias",
    "post_attn_norm_w": "post_attn_norm_weight", "post_mlp_norm_w": "post_mlp_norm_weight",
}  # fmt: skip


def _address(weights: LayerWeights | EndWeights, name: str) -> int | None:
    tensor = getattr(weights, name)
    if tensor is None:
        return None
    assert tensor.flags.c_contiguous
    return address(tensor)


def huge_pages(num_bytes: int) -> np.ndarray:
    """Uninitialised bytes that start on a huge page; ordinary memory where the system has none."""
    raw = np.empty(num_bytes + _HUGE, np.uint8)
    start = -address(raw) % _HUGE
    arena = raw[start : start + num_bytes]
    advise = ctypes.CDLL(None, use_errno=True).madvise
    if advise(ctypes.c_void_p(address(arena)), ctypes.c_size_t(num_bytes // _HUGE * _HUGE), _MADV_HUGEPAGE):
        logger.info("no huge pages for the weights (errno %d)", ctypes.get_errno())
    return arena
