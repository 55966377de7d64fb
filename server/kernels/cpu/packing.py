"""Weights in the layout of the kernels (panels.h), packed once at load into one arena of huge pages.

Streaming hundreds of megabytes per step through 4 KiB pages misses the TLB all the time. Matrices lie in the order in
which a step reads them. A packed tensor keeps its identity, only its storage becomes a part of the arena (in the shape
of the panels), so what was shared stays shared and nothing exists twice. bfloat16 can be kept in twelve bits
(compressed.h): the same numbers in three quarters of the bytes.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from model_store.dual import DualMatrix, exact_of, head_width, nested_of
from model_store.int8 import Int8Matrix, Matrix
from model_store.loaded import LoadedPair
from model_store.nested import WIDTHS, NestedMatrix, bytes_in_memory, bytes_read
from model_store.quantized import CodedMatrix
from model_store.spec import ModelSpec, Rope
from model_store.weights import MATRICES, EndWeights, LayerWeights
from server.kernels.cpu import library

logger = logging.getLogger(__name__)

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14
TYPES = {torch.float32: library.FLOAT, torch.bfloat16: library.BF16, torch.int8: library.INT8}
_NESTED_BITS = {kind: bits for bits, kind in library.NESTED.items()}
_PLAIN = {library.FLOAT, library.BF16, library.BF12}  # not codes


def twelve_bit_bytes(num_rows: int, width: int) -> int:
    """Bytes of a compressed bfloat16 matrix (compressed.h): panels of 32 rows, inputs by 32, 1.5 bytes for each weight,
    64 for the exponents of a panel. Weights without a code, one in some 10,000, take 8 bytes more: not counted."""
    return -(-num_rows // 32) * (-(-width // 32) * 32 * 48 + 64)


@dataclass(frozen=True, slots=True)
class _Source:
    """One matrix to pack, or the rows of one type of a matrix in codes."""

    values: torch.Tensor
    shape: torch.Size
    type: int  # BsType
    num_bytes: int  # packed
    num_read: int  # of those, by a product
    num_channels: int  # with padding
    is_gated: bool = False
    scale: torch.Tensor | None = None  # int8: [N]; WIDE: [N, K / 16]
    minimum: torch.Tensor | None = None  # WIDE: [N, K / 16]


class PackedWeights:
    """Packs all matrices of a pair in one of their forms: layers, heads, and embeddings that are also heads."""

    def __init__(
        self, pair: LoadedPair, lib: ctypes.CDLL, num_threads: int, compress: bool = False,
        form: Callable[[Matrix], Matrix | None] = exact_of,
    ) -> None:  # fmt: skip
        """`compress` keeps bfloat16 matrices in twelve bits; others are packed as they are. `form`: of a matrix, what
        is packed here; matrices without it are left out."""
        self._lib, self._num_threads, self._compress = lib, num_threads, compress
        self._keep_alive: list[list[library.Weights]] = []  # `of` hands out copies whose `more` point here
        self._beside: list[torch.Tensor] = []  # what lies outside the arena: exponents and rest of compressed matrices
        self._where: dict[int, library.Weights] = {}  # by address of the tensor's (packed) storage
        self._num_weights: dict[int, int] = {}  # likewise
        layers = [layer for _, layer in sorted(pair.layers.items())]
        groups = [[form(getattr(layer, name)) for name in MATRICES] for layer in layers]
        gated = {id(group[2]) for group in groups} if pair.spec.gated_mlp else set()
        groups.append([form(pair.ends[side].head) for side in ("teacher", "student")])
        # Embeddings in codes, of a head that no size needs or of none.
        groups.append([form(end.embed) for end in pair.ends.values() if not isinstance(end.embed, torch.Tensor)])
        seen: set[int] = set()
        matrices: list[list[tuple[Matrix, list[_Source]]]] = []
        for group in groups:
            distinct = [m for m in group if m is not None and not (_start(m) in seen or seen.add(_start(m)))]
            matrices.append([(matrix, self._sources(matrix, id(matrix) in gated)) for matrix in distinct])
        sources = [source for group in matrices for _, parts in group for source in parts]
        types = {source.type for source in sources}
        self.type = types.pop() if types <= _PLAIN and len(types) == 1 else library.CODES
        self.is_compressed = self.type == library.BF12
        num_weights = sum(source.shape.numel() for source in sources)
        self.bytes_per_weight = sum(source.num_read for source in sources) / num_weights
        self._num_nested = dict.fromkeys((False, True), 0)  # weights that have nested codes: of layers, of heads
        everyone = list(pair.tensors())
        self._arena = huge_pages(sum(source.num_bytes for source in sources))
        self._scales = torch.zeros(sum(s.num_channels for s in sources if s.type == library.INT8))
        self._offset = self._channel = 0
        for sources_of_layer in matrices:  # originals of one layer are freed before the next is packed
            self._pack(sources_of_layer, everyone)

    def of(self, matrix: Matrix) -> library.Weights | None:
        """The packed form of a matrix, None if it was not packed."""
        return self._where.get(_start(matrix))

    def attach_nested(self, pair: LoadedPair) -> PackedWeights:
        """Have every matrix with nested codes point to them, packed into an arena of their own if they lie beside it.

        Returns what holds them.
        """
        matrices = [(getattr(layer, name), False) for layer in pair.layers.values() for name in MATRICES]
        matrices += [(end.head, True) for end in pair.ends.values()]
        is_dual = any(isinstance(matrix, DualMatrix) for matrix, _ in matrices)
        nested = PackedWeights(pair, self._lib, self._num_threads, form=nested_of) if is_dual else self
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
        assert isinstance(matrix, torch.Tensor), "one form is packed at a time"
        is_compressed = self._compress and matrix.dtype == torch.bfloat16
        return [self._source(matrix, matrix.shape, library.BF12 if is_compressed else TYPES[matrix.dtype], is_gated)]

    def _source(self, values: torch.Tensor, shape: torch.Size, kind: int, is_gated: bool, **more) -> _Source:
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
            minimum = torch.zeros_like(groups.scale) if groups.minimum is None else groups.minimum
            codes.append(groups.codes.flatten(1))
            scales.append(groups.scale.repeat_interleave(per_group, dim=1))
            minima.append(minimum.repeat_interleave(per_group, dim=1))
        return self._source(
            torch.cat(codes), matrix.shape, library.WIDE, is_gated, scale=torch.cat(scales), minimum=torch.cat(minima)
        )

    def _pack(self, group: list[tuple[Matrix, list[_Source]]], everyone: list[torch.Tensor]) -> None:
        """Pack the matrices of a layer."""
        sources = [source for _, parts in group for source in parts]
        items = (library.Pack * len(sources))()
        targets = []
        for item, source in zip(items, sources, strict=True):
            target = self._arena[self._offset : self._offset + source.num_bytes]
            self._offset += source.num_bytes
            scale = None
            if source.type == library.INT8:
                scale = self._scales[self._channel : self._channel + source.num_channels]
                self._channel += source.num_channels
            fill(item, source, target, scale)
            targets.append((target, scale))
        self._measure_exponents([item for item in items if item.type == library.BF12])
        self._lib.bs_pack(items, len(items), self._num_threads)
        packed = iter(zip(items, sources, targets, strict=True))
        for matrix, parts in group:
            here = [next(packed) for _ in parts]
            weights = [
                library.Weights(
                    data=item.target, scale=item.scale, exponents=item.exponents, rest_start=item.rest_start,
                    rest=item.rest, type=item.type, rows=source.shape[0],
                )
                for item, source, _ in here
            ]  # fmt: skip
            for one, below in pairwise(weights):
                one.more = ctypes.addressof(below)
            self._keep_alive.append(weights)
            tensors = [p.blocks for p in matrix.parts] if isinstance(matrix, CodedMatrix) else [source_of(matrix)]
            addresses = [tensor.data_ptr() for tensor in tensors]
            if len(here) < len(tensors):  # several runs became one matrix
                here += [here[0]] * (len(tensors) - len(here))
            for address, (_, source, (target, _)) in zip(addresses, here, strict=True):
                packed_values = target.view(source.values.dtype if source.values.is_floating_point() else torch.uint8)
                if source.type in _PLAIN or source.type == library.INT8:
                    packed_values = target.view(tensors[0].dtype).view(source.num_channels // 32, -1, 32)
                for tensor in [t for t in everyone if t.data_ptr() == address]:
                    tensor.data = packed_values
            if isinstance(matrix, Int8Matrix):
                matrix.scale.data = here[0][2][1]
            if isinstance(matrix, NestedMatrix):  # they lie with the codes now
                matrix.zero.data, matrix.scales.data = target[:0], target[:0]
            self._where[_start(matrix)] = weights[0]
            self._num_weights[_start(matrix)] = sum(source.shape.numel() for _, source, _ in here[: len(weights)])

    def _measure_exponents(self, items: list[library.Pack]) -> None:
        """Find the exponents that the codes of these matrices stand for, and make room for the weights without one."""
        array = (library.Pack * len(items))(*items)
        starts = []
        for item in array:
            num_panels = self._lib.bs_packed_channels(item.N, item.gated) // 32
            exponents = torch.empty(num_panels, 64, dtype=torch.uint8)
            start = torch.empty(num_panels + 1, dtype=torch.int32)
            item.exponents, item.rest_start = exponents.data_ptr(), start.data_ptr()
            starts.append(start)
            self._beside += [exponents, start]
        self._lib.bs_measure(array, len(array), self._num_threads)
        for item, measured, start in zip(items, array, starts, strict=True):
            rest = torch.empty(int(start[-1]), 2, dtype=torch.int32)  # BsRest
            item.exponents, item.rest_start, item.rest = measured.exponents, measured.rest_start, rest.data_ptr()
            self._beside.append(rest)


def fill(item: library.Pack, source: _Source, target: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Have `source` packed to the bytes `target`, and the scales of int8 to `scale`."""
    assert source.values.is_contiguous() and (source.scale is None or source.scale.is_contiguous())
    item.source, item.target, item.type = source.values.data_ptr(), target.data_ptr(), source.type
    item.source_scale = None if source.scale is None else source.scale.data_ptr()
    item.source_minimum = None if source.minimum is None else source.minimum.data_ptr()
    item.scale = None if scale is None else scale.data_ptr()
    item.N, item.K = source.shape
    item.gated = source.is_gated


def source_of(matrix: Matrix) -> torch.Tensor:
    """The tensor that says which matrix it is: shared matrices share it."""
    matrix = exact_of(matrix)
    if isinstance(matrix, CodedMatrix):
        return matrix.parts[0].blocks
    if isinstance(matrix, NestedMatrix):
        return matrix.codes
    if isinstance(matrix, Int8Matrix):
        return matrix.values
    assert isinstance(matrix, torch.Tensor), "`exact_of` leaves nothing else"
    return matrix


def _start(matrix: Matrix) -> int:
    return source_of(matrix).data_ptr()


Angles = dict[Rope, tuple[torch.Tensor, torch.Tensor]]


def angle_tables(spec: ModelSpec, ropes: set[Rope], num_positions: int) -> Angles:
    """Cosines and sines [positions, rotary_dim / 2] of each kind of angles."""
    tables: Angles = {}
    for rope in ropes - {"none"}:
        inv_freq, factor = spec.rope_inv_freq(rope)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
        tables[rope] = (angles.cos() * factor).contiguous(), (angles.sin() * factor).contiguous()
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
            table[index].cos, table[index].sin = (turn.data_ptr() for turn in angles[weights.rope])
    return table


def end_table(pair: LoadedPair, packed: PackedWeights) -> ctypes.Array:
    """Teacher's and student's ends."""

    def end(weights: EndWeights) -> library.End:
        packed_embed = packed.of(weights.embed)
        plain = weights.embed.data_ptr() if isinstance(weights.embed, torch.Tensor) else None
        return library.End(
            embed=None if packed_embed else plain, positions=_address(weights, "positions"),
            norm_w=weights.final_norm_weight.data_ptr(), norm_b=_address(weights, "final_norm_bias"),
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
