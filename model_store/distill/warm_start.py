"""Closed-form warm start: before any training, each student layer's last projection is fitted by least squares.

A decoder layer is linear in the weight of its MLP's last projection, so the weight that brings the layer's output
closest to the end of the teacher's block has a closed form: ridge regression on the projection's inputs. Layers are
fitted in running order, on two sets of inputs at once: the teacher's own states and those of the student as fitted so
far, so that later layers also learn to undo what earlier ones got wrong. Tokens are weighted by the inverse norm of
their target: without that a few tokens with massive activations would own the fit.

I = MLP width, E = hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from model_store.distill.elastic import ElasticModel
from model_store.families import FAMILIES

_LAST_PROJECTIONS = ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj")


def last_projection(layer: nn.Module) -> nn.Module:
    """The module that ends the layer's MLP; ValueError for an unknown layout."""
    for name in _LAST_PROJECTIONS:
        try:
            return layer.get_submodule(name)
        except AttributeError:
            continue
    raise ValueError(f"{type(layer).__name__} has none of {', '.join(_LAST_PROJECTIONS)}: start without --warm-start")


@torch.no_grad()
def fit_by_least_squares(
    model: ElasticModel,
    batches: Sequence[torch.Tensor],
    own_share: float = 0.5,
    ridge: float = 3e-3,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[int, float]:
    """Fit every student layer in place; returns the mean relative error of each station's output before the fit.

    `batches` are token ids [B, T]; their hidden states are held in memory (B T E values per batch and two stations).
    `own_share` is the weight of the student's own inputs against the teacher's; `ridge` (a fraction of the mean
    diagonal of the normal matrix) pulls towards the present weights.
    """
    own = [model.embed(ids, on_teacher=model.ends is None) for ids in batches]
    teacher = [model.embed(ids) for ids in batches]
    errors: dict[int, float] = {}
    for station in model.elasticity.stations:
        ropes = [model.rope(hidden) for hidden in teacher]
        targets = [
            model.run_station(station.index, hidden, rope, True) for hidden, rope in zip(teacher, ropes, strict=True)
        ]
        if str(station.index) in model.student:
            layer = model.student[str(station.index)]
            sources = [(teacher, 1.0 - own_share), (own, own_share)]
            errors[station.index] = _fit_layer(model, layer, sources, targets, ropes, ridge)
            progress(f"station {station.index}: relative error {errors[station.index]:.4f} before the fit")
        own = [model.run_station(station.index, h, rope, False) for h, rope in zip(own, ropes, strict=True)]
        teacher = targets
    return errors


def _fit_layer(
    model: ElasticModel, layer: nn.Module, sources: list[tuple[list[torch.Tensor], float]],
    targets: list[torch.Tensor], ropes: list, ridge: float,
) -> float:  # fmt: skip
    projection = last_projection(layer)
    if FAMILIES[model.config.model_type].norms != "before":
        raise ValueError("--warm-start: this family norms what a layer gives: no last projection is fitted in one go")
    scale_of_output = getattr(layer, "residual_multiplier", 1.0)
    seen: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    normal = moment = None
    error = weight_sum = 0.0
    try:
        for inputs, share in sources:
            for hidden, target, rope in zip(inputs, targets, ropes, strict=True):
                if share == 0:
                    continue
                seen.clear()
                dtype = next(layer.parameters()).dtype
                output = model.run_layer(layer, hidden.to(dtype), rope)
                features = seen[0].flatten(0, -2).float() * scale_of_output
                wanted = target.flatten(0, -2).float()
                residual = wanted - output.flatten(0, -2).float()
                scale = wanted.norm(dim=-1, keepdim=True).clamp_min(1e-6).reciprocal() * share**0.5
                features, residual = features * scale, residual * scale
                error += float(residual.square().sum())
                weight_sum += share * len(wanted)
                normal = features.T @ features if normal is None else normal.addmm_(features.T, features)
                moment = features.T @ residual if moment is None else moment.addmm_(features.T, residual)
    finally:
        handle.remove()
    assert normal is not None and moment is not None
    damping = ridge * normal.diagonal().mean() * torch.eye(len(normal), device=normal.device)
    change = torch.linalg.solve(normal + damping, moment)  # [I, E]
    is_conv1d = projection.weight.shape == change.shape and not isinstance(projection, nn.Linear)
    projection.weight.add_((change if is_conv1d else change.T).to(projection.weight.dtype))
    return error / weight_sum
