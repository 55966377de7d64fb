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
from typing import Any

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
    fits_attention: bool = False,
) -> dict[int, float]:
    """Fit every student layer in place; returns the mean relative error of each station's output before the fit.

    `fits_attention`: attention's last projection too, first, where that makes the error smaller.

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
            errors[station.index] = fit_layer(model, layer, sources, targets, ropes, ridge, fits_attention)
            progress(f"station {station.index}: relative error {errors[station.index]:.4f} before the fit")
        own = [model.run_station(station.index, h, rope, False) for h, rope in zip(own, ropes, strict=True)]
        teacher = targets
    return errors


def fit_layer(
    model: ElasticModel, layer: nn.Module, sources: list[tuple[list[torch.Tensor], float]],
    targets: list[torch.Tensor], ropes: list, ridge: float, fits_attention: bool = False,
) -> float:  # fmt: skip
    """Fit one layer in place to give `targets` from the inputs of each source; returns the relative error before."""
    family = FAMILIES[model.config.model_type]
    mlp = last_projection(layer)
    data = [
        (hidden, target, rope, share)
        for inputs, share in sources
        if share
        for hidden, target, rope in zip(inputs, targets, ropes, strict=True)
    ]
    if family.norms != "before":
        return _fit_last_norm(model, layer, data, ridge)
    attention = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    if not fits_attention or attention is None:
        return _fit_projections(model, layer, data, ridge, [mlp], mlp)
    weights = [module.get_parameter("weight") for module in (attention, mlp)]
    before = [weight.detach().clone() for weight in weights]
    error = _fit_projections(model, layer, data, ridge, [attention, mlp], attention)
    _fit_projections(model, layer, data, ridge, [mlp], mlp)
    with_attention = [weight.detach().clone() for weight in weights]
    left = _error(model, layer, data)
    _put(weights, before)
    _fit_projections(model, layer, data, ridge, [mlp], mlp)
    if left < _error(model, layer, data):
        _put(weights, with_attention)
    return error


def _put(weights: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _residual(
    model: ElasticModel, layer: nn.Module, one: tuple[torch.Tensor, torch.Tensor, Any, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer's output lacks of its target, and the weight of each token: [B T, E] and [B T, 1]."""
    hidden, target, rope, share = one
    output = model.run_layer(layer, hidden.to(next(layer.parameters()).dtype), rope)
    wanted = target.flatten(0, -2).float()
    scale = wanted.norm(dim=-1, keepdim=True).clamp_min(1e-6).reciprocal() * share**0.5
    return wanted - output.flatten(0, -2).float(), scale


def _error(model: ElasticModel, layer: nn.Module, data: list) -> float:
    """Mean square of the weighted residual."""
    parts = [_residual(model, layer, one) for one in data]
    return sum(float((residual * scale).square().sum()) for residual, scale in parts)


def _fit_projections(
    model: ElasticModel, layer: nn.Module, data: list, ridge: float, projections: list[nn.Module], fitted: nn.Module
) -> float:
    """Least squares over the inputs of `projections` side by side, of which one, `fitted`, gets its part of the change.

    Exact for the MLP's; for attention's it takes the MLP's input for what it was. Returns the error before.
    """
    seen: dict[nn.Module, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, args: seen.__setitem__(module, args[0]))
        for module in projections
    ]
    scale_of_output = getattr(layer, "residual_multiplier", 1.0)
    normal = moment = None
    error = weight_sum = 0.0
    try:
        for one in data:
            residual, scale = _residual(model, layer, one)
            inputs = [seen[module].flatten(0, -2).float() for module in projections]
            features = torch.cat(inputs, dim=1) * scale_of_output * scale
            residual = residual * scale
            error += float(residual.square().sum())
            weight_sum += one[3] * len(residual)
            normal = features.T @ features if normal is None else normal.addmm_(features.T, features)
            moment = features.T @ residual if moment is None else moment.addmm_(features.T, residual)
    finally:
        for handle in handles:
            handle.remove()
    assert normal is not None and moment is not None
    damping = ridge * normal.diagonal().mean() * torch.eye(len(normal), device=normal.device)
    change = torch.linalg.solve(normal + damping, moment)  # [inputs, E]
    widths = [seen[module].shape[-1] for module in projections]
    change = change.split(widths)[projections.index(fitted)]
    weight = fitted.get_parameter("weight")
    is_conv1d = weight.shape == change.shape and not isinstance(fitted, nn.Linear)
    weight.add_((change if is_conv1d else change.T).to(weight.dtype))
    return error / weight_sum


def _fit_last_norm(model: ElasticModel, layer: nn.Module, data: list, ridge: float) -> float:
    """Where what the MLP gives is normed, the output is linear in the weights of that norm: one number per channel."""
    norm = layer.get_submodule("post_feedforward_layernorm")
    offset = FAMILIES[model.config.model_type].norm_offset
    weight = norm.get_parameter("weight")
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda module, args, out: seen.append(out))
    top, bottom = torch.zeros_like(weight, dtype=torch.float32), torch.zeros_like(weight, dtype=torch.float32)
    error = weight_sum = 0.0
    try:
        for one in data:
            seen.clear()
            residual, scale = _residual(model, layer, one)
            given = seen[0].flatten(0, -2).float()
            residual, given = residual * scale, given * scale
            error += float(residual.square().sum())
            weight_sum += one[3] * len(residual)
            top += (given * residual).sum(0)
            bottom += given.square().sum(0)
    finally:
        handle.remove()
    # The output of the norm grows by this share in each channel.
    weight.add_(((weight.float() + offset) * top / (bottom * (1 + ridge)).clamp_min(1e-20)).to(weight.dtype))
    return error / weight_sum
