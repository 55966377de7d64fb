"""Training a student as a low-rank difference to the teacher's layers: weight = teacher's + B A, only A and B train."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from model_store.distill.elastic import ElasticModel
from model_store.distill.write import low_rank_factors


class PlusLowRank(nn.Module):
    """Parametrisation `weight + B @ A`; A [r, in], B [out, r]."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def make_low_rank(model: ElasticModel, rank: int) -> None:
    """Replace every linear of the student layers by the teacher's plus factors, which start at the present difference.

    The factors come from an SVD of the difference; directions that are zero start random in A and zero in B.
    """
    for key, layer in model.student.items():
        base = model.body.layers[model.elasticity.stations[int(key)].start]
        for name, linear in list(layer.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            start = base.get_submodule(name).weight.detach().float()
            a, b = low_rank_factors(linear.weight.detach().float() - start, rank)
            empty = a.norm(dim=1) < 1e-6
            a[empty] = torch.randn_like(a[empty]) / a.shape[1] ** 0.5
            with torch.no_grad():
                linear.weight.copy_(start)
            linear.weight.requires_grad_(False)
            parametrize.register_parametrization(linear, "weight", PlusLowRank(a, b))


def merge_low_rank(model: ElasticModel) -> None:
    """Back to plain weights (their values as trained)."""
    for layer in model.student.values():
        for linear in layer.modules():
            if parametrize.is_parametrized(linear, "weight"):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
