"""The tensors that only larger sizes need: which they are, and reading them again after they were given back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model_store import nested_store
from model_store.loaded import LoadedPair
from model_store.weight_form import WeightForm
from model_store.weights import Checkpoint, EndWeights, LayerWeights, WeightError, weight_files

if TYPE_CHECKING:
    from model_store.pair import Pair

# A teacher layer by its global id (all its matrices), or the teacher's "embed" or "head" (the former stands for both
# where they are tied).
Part = int | str


@dataclass(frozen=True, slots=True)
class Stage:
    """A size, and what it needs beyond the next smaller one."""

    size: int
    parts: tuple[Part, ...]


def stages_above(pair: LoadedPair, floor: int) -> tuple[Stage, ...]:
    """The loaded sizes above `floor`, ascending, each with what no smaller size needs. What is shared is there once."""
    known = {key for size in pair.sizes if size <= floor for key, _ in _needs(pair, size)}
    stages = []
    for size in pair.sizes:
        if size > floor:
            fresh: dict[int, Part] = {}
            for key, part in _needs(pair, size):
                if key not in known:
                    fresh.setdefault(key, part)
            known |= fresh.keys()
            stages.append(Stage(size, tuple(fresh.values())))
    return tuple(stages)


def _needs(pair: LoadedPair, size: int) -> Iterator[tuple[int, Part]]:
    """(identity, part) of all that a size runs."""
    path, num_teacher = pair.elasticity.path(size), pair.elasticity.num_teacher_layers
    for layer in path.layers:
        base = layer if layer in pair.layers else pair.elasticity.kept[layer - num_teacher]  # a difference to it
        yield id(pair.layers[base]), base
    for field, side in (("embed", path.embed_from), ("head", path.head_from)):
        yield id(getattr(pair.ends[side], field)), field


class BlockReader:
    """Reads parts of a pair's teacher in the form in which the pair was loaded. One thread at a time."""

    def __init__(self, pair: Pair, form: WeightForm, nested: Path | None = None) -> None:
        """`nested`: the file of the pair's nested codes, where the form has some. OSError if a file is gone."""
        self._path, self._store, self._form, self._nested = pair.teacher_path, pair.store, form, nested
        self._stamps = self._read_stamps()
        self._checkpoint: Checkpoint | None = None  # while somebody reads

    def _read_stamps(self) -> list[tuple[str, int, int, int]]:
        files = [*self._path.glob("*.json"), *self._path.glob("*.safetensors"), *weight_files(self._path)]
        files += [] if self._nested is None else [self._nested]
        states = [(str(file), file.stat()) for file in sorted(set(files))]
        return [(name, state.st_size, state.st_ino, state.st_mtime_ns) for name, state in states]

    def check(self) -> None:
        """WeightError unless the files are those that were loaded: others would change answers without a word."""
        try:
            is_same = self._read_stamps() == self._stamps
        except OSError as error:
            raise WeightError(f"the teacher cannot be read again: {error}") from error
        if not is_same:
            raise WeightError(f"the files of {self._path} have changed since they were loaded: restart to serve them")

    def read(self, part: Part) -> LayerWeights | EndWeights:
        """A layer's tensors, or the teacher's ends. WeightError, OSError."""
        if self._checkpoint is None:
            self._checkpoint = Checkpoint(self._path, self._store)
        if isinstance(part, int):
            layer = self._checkpoint.layer(part, self._form)
            return self._with_codes(f"layers.{part}", layer)
        return self._with_codes("teacher", self._checkpoint.ends(self._form))

    def close(self) -> None:
        """Nothing is read for now: no file stays mapped."""
        self._checkpoint = None

    def _with_codes(self, name: str, owner: LayerWeights | EndWeights) -> LayerWeights | EndWeights:
        if self._nested is not None:
            nested_store.NestedCodes(self._nested, self._form).give([(name, owner)])
        return owner
