"""Training students as low-rank differences to the teacher's layers: weight = teacher's + B A, and only A and B train.

The layers keep whole weights (so that they run, compile and are saved like any other); the optimizer alone knows that
they are products. By the chain rule dA = B^T dW and dB = dW A^T, so this equals training A and B directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model_store.distill.elastic import ElasticModel
from model_store.distill.write import low_rank_factors


@dataclass(slots=True, eq=False)
class Factors:
    """One linear's weight [out, in] = base + b @ a; a [r, in] and b [out, r] are what is trained."""

    weight: nn.Parameter
    base: torch.Tensor
    a: nn.Parameter
    b: nn.Parameter

    @torch.no_grad()
    def project_gradient(self) -> None:
        slope = self.weight.grad.to(torch.bfloat16)
        self.a.grad = (self.b.to(torch.bfloat16).T @ slope).float()
        self.b.grad = (slope @ self.a.to(torch.bfloat16).T).float()

    @torch.no_grad()
    def merge(self) -> None:
        # The product runs in bfloat16, as the layers do; the difference is small beside the weight it is added to.
        self.weight.copy_(self.base + (self.b.to(torch.bfloat16) @ self.a.to(torch.bfloat16)).float())


def make_low_rank(
    model: ElasticModel, rank: int, moments: dict[int, dict[str, torch.Tensor]] | None = None
) -> list[Factors]:
    """Cut the student's difference to the teacher down to `rank`; returns the factors, one entry per linear.

    They come from an SVD of the present difference, weighted by the inputs' second `moments` if given; directions that
    are zero start random in A and zero in B.
    """
    found = []
    for key, layer in model.student.items():
        teacher = model.body.layers[model.elasticity.stations[int(key)].start]
        for name, linear in layer.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            base = teacher.get_submodule(name).weight.detach().float()
            moment = moments[int(key)].get(name) if moments else None
            a, b = low_rank_factors(linear.weight.detach().float() - base, rank, moment)
            empty = b.norm(dim=0) < 1e-6
            a[empty] = torch.randn_like(a[empty]) / a.shape[1] ** 0.5
            factors = Factors(linear.weight, base, nn.Parameter(a), nn.Parameter(b))
            factors.merge()
            found.append(factors)
    return found


class LowRankOptimizer(torch.optim.Optimizer):
    """AdamW on the factors, and on the other parameters (norms) at a tenth of the rate."""

    def __init__(self, factors: list[Factors], others: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.factors = factors
        self.parts = [
            torch.optim.AdamW(
                [side for f in factors for side in (f.a, f.b)], lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay
            )
        ]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr / 10, betas=(0.9, 0.95), weight_decay=0.0))
        super().__init__([f.weight for f in factors], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:
        touched = [f for f in self.factors if f.weight.grad is not None]
        for factors in touched:
            factors.project_gradient()
        for part in self.parts:
            part.step()
        for factors in touched:
            factors.merge()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for factors in self.factors:
            factors.weight.grad = None
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        factors = [(f.a.detach(), f.b.detach()) for f in self.factors]
        return {"parts": [part.state_dict() for part in self.parts], "factors": factors}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for factors, (a, b) in zip(self.factors, state_dict["factors"], strict=True):
            factors.a.copy_(a)
            factors.b.copy_(b)
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
