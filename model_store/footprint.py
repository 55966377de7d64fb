"""How many parameters and bytes each size needs: arithmetic on shapes, no tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from model_store.assembly import Elasticity
from model_store.layout import END_PARTS
from model_store.spec import ModelSpec
from model_store.weight_form import Storage, WeightForm

MatrixBytes = Callable[[int, int], int]  # (rows, inputs) -> bytes
# (side, layer of that side or end part, bytes of a weight without codes) -> bytes of its matrices where codes are kept
CodeBytes = Callable[[str, int | str, int], int]


class Footprint:
    """Counts every tensor once, however many sizes or sides refer to it."""

    def __init__(
        self,
        elasticity: Elasticity,
        teacher: ModelSpec,
        student: ModelSpec,
        shared_layers: Mapping[int, int],
        shared_ends: Collection[str],
        differences: Mapping[int, int] | None = None,
        code_bytes: CodeBytes | None = None,
    ) -> None:
        """`shared_layers`: student layers that are a teacher layer, by global id; `shared_ends`: equal end parts.

        `differences`: bytes of the student layers, by global id, that run as a difference to a teacher layer, which
        `shared_layers` names.
        """
        self.elasticity = elasticity
        self.specs = {"teacher": teacher, "student": student}
        self.shared_layers = shared_layers
        self.shared_ends = shared_ends
        self.differences = differences or {}
        self.code_bytes = code_bytes

    def parameters(self, sizes: Collection[int]) -> int:
        """Parameters that serving exactly `sizes` needs. For one size: of that size as assembled (a tied pair whose
        embeddings differ is untied in between)."""
        spec = self.specs["teacher"]
        matrix, norm = spec.vocab_size * spec.hidden_size, spec.hidden_size * (2 if spec.norm == "layer" else 1)
        positions = spec.max_position_embeddings * spec.hidden_size if spec.learned_positions else 0
        counts = {"embed": matrix, "head": matrix, "norm": norm, "positions": positions}
        ends = self._ends(sizes)
        embedding = [side for side, parts in self.end_parts(sizes).items() if "embed" in parts]
        ends |= {("positions", self._owner("embed", side)[1]) for side in embedding}
        return len(self._layers(sizes)) * spec.layer_parameters + sum(counts[part] for part, _ in ends)

    def num_bytes(self, sizes: Collection[int], form: WeightForm, matrix_bytes: MatrixBytes | None = None) -> int:
        """Bytes of weights in memory that serving exactly `sizes` needs, at all widths of `form` together.

        The storage of `form` is that of the matrices of layers, heads, and embeddings that are tied to a head;
        differences lie as stored. `matrix_bytes`: of an executor that packs them (default: the form's own).
        """
        dtype = form.dtype
        used = {layer for size in sizes for layer in self.elasticity.path(size).layers}
        extra = sum(num_bytes for layer, num_bytes in self.differences.items() if layer in used)
        plain = self.parameters(sizes) * dtype.itemsize + extra
        if form.storage is Storage.AS_LOADED and len(form.widths) == 1:
            return plain
        spec = self.specs["teacher"]
        num_ends = sum(
            part == "head" or (part == "embed" and self.specs[side].tie_word_embeddings)
            for part, side in self._ends(sizes)
        )
        shapes = [*spec.matrix_shapes.values()] * len(self._layers(sizes))
        shapes += [(spec.vocab_size, spec.hidden_size)] * num_ends
        if form.storage is Storage.CODES:
            assert self.code_bytes is not None
            layers, size, count = self._layers(sizes), dtype.itemsize, self.elasticity.num_teacher_layers
            plain -= len(layers) * sum(n * k for n, k in spec.matrix_shapes.values()) * size
            places: list[tuple[str, int | str]] = [
                ("teacher", i) if i < count else ("student", i - count) for i in layers
            ]
            ends = [(side, part) for part, side in self._ends(sizes) if part != "norm"]
            plain -= len(ends) * spec.vocab_size * spec.hidden_size * size
            plain += sum(form.bytes_beside(*shape) for shape in shapes)
            return plain + sum([self.code_bytes(side, what, size) for side, what in [*places, *ends]])
        matrix_bytes = matrix_bytes or form.matrix_bytes
        return plain - sum(n * k * dtype.itemsize - matrix_bytes(n, k) for n, k in shapes)

    def _layers(self, sizes: Collection[int]) -> set[int]:
        """Global ids of the distinct layers."""
        paths = [self.elasticity.path(size) for size in sizes]
        return {self.shared_layers.get(layer, layer) for path in paths for layer in path.layers}

    def _ends(self, sizes: Collection[int]) -> set[tuple[str, str]]:
        """(part, side) of the distinct tensors around the layers."""
        return {self._owner(part, side) for side, parts in self.end_parts(sizes).items() for part in parts}

    def end_parts(self, sizes: Collection[int]) -> dict[str, set[str]]:
        """Side -> which of embedding, norm and head some of the sizes take from it."""
        parts: dict[str, set[str]] = {"teacher": set(), "student": set()}
        for size in sizes:
            path = self.elasticity.path(size)
            for part, side in zip(END_PARTS, (path.embed_from, path.norm_from, path.head_from), strict=True):
                parts[side].add(part)
        return parts

    def _owner(self, part: str, side: str) -> tuple[str, str]:
        """Where an end's tensor really is: a tied head is the embedding, an equal tensor is the teacher's."""
        if side == "student" and part in self.shared_ends:
            side = "teacher"
        if part == "head" and self.specs[side].tie_word_embeddings:
            return self._owner("embed", side)
        return part, side

    def size_table(self, form: WeightForm, matrix_bytes: MatrixBytes | None = None) -> list[dict[str, Any]]:
        """One row per size: layers, parameters, fraction of the teacher, weight bytes, KV bytes per token."""
        sizes = self.elasticity.sizes
        teacher = self.parameters(sizes[-1:])
        kv_bytes = self.specs["teacher"].kv_bytes_per_token_layer(form.dtype.itemsize, form.kv_cache_dtype)
        return [
            {
                "size": size,
                "parameters": (parameters := self.parameters([size])),
                "fraction": parameters / teacher,
                "weight_bytes": self.num_bytes([size], form, matrix_bytes),
                "kv_bytes_per_token": size * kv_bytes,
            }
            for size in sizes
        ]

    def servable(self, form: WeightForm, budget: int | None) -> tuple[tuple[int, ...], dict[int, str]]:
        """The sizes, smallest first, whose weights fit `budget` bytes together, and why the others do not."""
        sizes = self.elasticity.sizes
        needs = [self.num_bytes(sizes[: i + 1], form) for i in range(len(sizes))]
        if budget is None:
            return sizes, {}
        fitting = sum(need <= budget for need in needs)  # needs grow with the size
        missing = {
            size: f"needs {_mib(need)} of weights in memory, the budget is {_mib(budget)}"
            for size, need in zip(sizes[fitting:], needs[fitting:], strict=True)
        }
        return sizes[:fitting], missing


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
