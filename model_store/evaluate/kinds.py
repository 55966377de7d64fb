"""What sizes and widths are worth on several kinds of text: a figure for each kind, because they differ by factors."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model_store.arrays import FLOAT32, to_torch
from model_store.distill.elastic import ElasticModel
from model_store.evaluate.measure import score, summary
from model_store.nested import HEAD_BITS, NestedMatrix
from model_store.nested_store import places
from model_store.tensor_file import TensorFile
from model_store.weight_form import WeightForm
from model_store.weights import split_layer

if TYPE_CHECKING:
    from model_store.pair import Pair

_KEPT = ("kl", "kl_ci", "perplexity_ratio", "top1_agreement")

Kind = dict[str, dict[str, dict[str, float]]]  # `sizes` by layers, `widths` by bits, `points` by name (24L-q6)


class KindsOfText:
    """Measures a pair on one kind of text after the other."""

    def __init__(self, model: ElasticModel, pair: Pair, nested: Path | None, widths: Sequence[int]) -> None:
        """`nested`: the pair's nested codes, where `widths` (bits) are to be measured too."""
        self.model, self.pair, self.nested, self.widths = model, pair, nested, widths
        self._reduced: ElasticModel | None = None  # the same model, read at one width after the other

    def measure(self, name: str, sequences: Sequence[torch.Tensor], sizes: Sequence[int]) -> Kind:
        """Figures on windows of token ids: of `sizes` as loaded, of widths at full depth, and of widths at the smallest
        and the middle size, which tell whether the two losses add up."""
        top = self.model.elasticity.sizes[-1]
        scores = score(self.model, sorted({*sizes, top}), sequences)
        found: Kind = {
            "sizes": {str(size): _row(scores[size], scores[top]) for size in sizes},
            "widths": {},
            "points": {},
        }
        cells = sorted({self.model.elasticity.sizes[i] for i in (0, len(self.model.elasticity.sizes) // 2, -1)})
        for width in self.widths:
            print(f"{name}: {len(sequences)} windows at {width} bits", file=sys.stderr, flush=True)
            at_width = score(self._at(width), cells, sequences, reference=self.model)
            for size in cells:
                row = _row(at_width[size], scores[top])
                found["points"][f"{size}L-q{width}"] = row
                if size == top:
                    found["widths"][str(width)] = row
        return found

    def _at(self, width: int) -> ElasticModel:
        assert self.nested is not None
        if self._reduced is None:
            self._reduced = copy.deepcopy(self.model)
        read_at(self._reduced, self.pair, self.nested, width)
        return self._reduced


def _row(row: Any, teacher: Any) -> dict[str, float]:
    figures = summary(row, teacher)
    return {key: round(figures[key], 5) for key in _KEPT if figures[key] == figures[key]}


@torch.no_grad()
def read_at(model: ElasticModel, pair: Pair, file: Path, width: int) -> None:
    """Overwrite the matrices of `model` by the pair's nested codes in `file`, read at `width` bits, heads as served."""
    loaded = pair.load(WeightForm(FLOAT32))
    tensors = TensorFile(file)
    shared = json.loads(tensors.metadata["boomerang"])["shared"]
    for name, owner, field in list(places(loaded)):
        first = shared.get(name, name)
        codes, zero, scales = (tensors.tensor(f"{first}.{part}") for part in ("codes", "zero", "scales"))
        bits = HEAD_BITS[width] if field == "head" else width
        setattr(owner, field, NestedMatrix(codes, zero, scales, bits).dense(FLOAT32))
    num_teacher = pair.spec.num_layers
    for index, weights in loaded.layers.items():
        if index < num_teacher:
            layer = model.body.layers[index]
        elif str(index - num_teacher) in model.student:
            layer = model.student[str(index - num_teacher)]
        else:  # the teacher's own
            continue
        for name, value in split_layer(weights, pair.spec):
            layer.get_parameter(name).copy_(to_torch(value))
    for side, end in loaded.ends.items():
        head = model.side(side == "teacher").head
        head.weight.copy_(to_torch(end.head))
