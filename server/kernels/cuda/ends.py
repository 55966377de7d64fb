"""What surrounds the layers on the device: embedding, final norm, head, the teacher's or the student's.

T = tokens, S = rows whose logits are wanted, E = hidden, V = vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from model_store.int8 import Int8Matrix
from model_store.spec import ModelSpec
from model_store.weights import EndWeights
from server.core.width import EXACT
from server.kernels.cuda.coded_linear import coded_rows
from server.kernels.cuda.codes import DeviceCodes, DeviceDual, DeviceNested, Weight
from server.kernels.cuda.linear import linear
from server.kernels.cuda.norm import norm
from server.kernels.cuda.widths import head_widths, runs_of


class Ends:
    """Both sides of a pair; rows before a split take the teacher's, the others the student's."""

    def __init__(self, spec: ModelSpec, ends: dict[str, EndWeights]) -> None:
        self.spec, self.teacher, self.student = spec, ends["teacher"], ends["student"]

    def sides(self, split: int, num: int) -> list[tuple[EndWeights, slice]]:
        """(end weights, rows) of both sides; one entry where they are the same or one is empty."""
        if self.teacher is self.student:
            split = num
        sides = [(self.teacher, slice(0, split)), (self.student, slice(split, num))]
        return [(end, rows) for end, rows in sides if rows.start < rows.stop]

    def head(self, hidden: torch.Tensor, num_teacher: int, out: torch.Tensor, widths: np.ndarray | None = None) -> None:
        """Logits of normed rows [S, E] to out [S, V]. `widths` uint8 [S]: those of the rows; None: the widest."""
        read = head_widths(widths)
        for end, rows in self.sides(num_teacher, len(hidden)):
            linear(hidden[rows], end.head, end.head_bias, out[rows], runs_of(None if read is None else read[rows]))
        if self.spec.logit_scale != 1.0:
            out *= self.spec.logit_scale

    def norm(self, end: EndWeights, rows: torch.Tensor, out: torch.Tensor) -> None:
        spec = self.spec
        norm(rows, end.final_norm_weight, end.final_norm_bias, kind=spec.norm, eps=spec.stream_eps, out=out)

    def embed(self, end: EndWeights, ids: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Rows `ids` [T] of the embedding, with learned positions where there are such, to out [T, E]."""
        matrix: Weight = end.embed
        if isinstance(matrix, DeviceNested | DeviceDual):
            matrix = matrix.at(EXACT)
        if isinstance(matrix, DeviceCodes):
            coded_rows(ids, matrix, out)
        elif isinstance(matrix, Int8Matrix):
            values, scale = matrix.values.index_select(0, ids), matrix.scale.index_select(0, ids)
            out.copy_(values * scale[:, None])
        else:
            assert isinstance(matrix, torch.Tensor)
            torch.index_select(matrix, 0, ids, out=out)
        if self.spec.input_scale != 1.0:
            out *= self.spec.input_scale
        if end.positions is not None:
            out += F.embedding(positions, end.positions)
