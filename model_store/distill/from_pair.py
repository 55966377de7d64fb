"""Opens a pair as an ElasticModel, and lends any of its sizes as an ordinary transformers model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from model_store.arrays import dtype_of, to_torch
from model_store.distill.elastic import ElasticModel, Ends, body_of, window_of
from model_store.pair import Pair
from model_store.weight_form import WeightForm
from model_store.weights import Checkpoint, split_layer


def load_transformers(path: Path, dtype: torch.dtype, store: Path | str | None = None) -> PreTrainedModel:
    """The checkpoint as transformers' model. What this server refuses is refused here too, before anything is loaded.

    Where a file has no head although its config promises one, transformers would make one up: it is tied, as served.
    """
    tied = Checkpoint(path, store).spec.tie_word_embeddings
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, tie_word_embeddings=tied)


def load_elastic(pair: Pair, dtype: torch.dtype, device: torch.device | str = "cpu") -> ElasticModel:
    """Teacher and student as transformers modules in `dtype`; low-rank differences are added up as the server does."""
    teacher = load_transformers(pair.teacher_path, dtype, pair.store).to(device)
    body, stations = body_of(teacher), pair.elasticity.stations
    student: dict[int, nn.Module] = {}
    own_ends = None
    if pair.is_low_rank:
        for station in stations:
            if pair.low_rank_student.has_own_layer(station.index):
                layer = copy.deepcopy(body.layers[station.start])
                weights = pair.read_layer(pair.spec.num_layers + station.index, WeightForm(dtype_of(dtype)))
                with torch.no_grad():
                    for name, value in split_layer(weights, pair.spec):
                        layer.get_parameter(name).copy_(to_torch(value))
                student[station.index] = layer
    elif pair.student_path is not None:
        other_body = body_of(load_transformers(pair.student_path, dtype, pair.store).to(device))
        student = dict(enumerate(other_body.layers))
        own_ends = other_body.ends
    model = ElasticModel(teacher, pair.elasticity, student)
    if own_ends is not None and not pair.shares_ends:
        model.set_ends(own_ends)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def lend_size(model: ElasticModel, size: int) -> Iterator[PreTrainedModel]:
    """The pair at one size as a transformers model, for as long as the context lasts.

    Modules are shared, not copied: the teacher's layer list is swapped and layers are renumbered (transformers keeps
    the index of the KV cache on the module), so only one size can be lent at a time.
    """
    teacher, body, path = model.teacher, model.body, model.elasticity.path(size)
    num_teacher = model.elasticity.num_teacher_layers
    layers = [body.layers[i] if i < num_teacher else _student_or_teacher(model, i - num_teacher) for i in path.layers]
    types = getattr(teacher.config, "layer_types", None)
    sides = (model.side(from_ == "teacher") for from_ in (path.embed_from, path.norm_from, path.head_from))
    embed, norm, head = sides
    try:
        teacher.config.num_hidden_layers = size
        if types:
            teacher.config.layer_types = [_type_of(layer) for layer in layers]
        _put(teacher, nn.ModuleList(layers), Ends(embed.embed, norm.norm, head.head, embed.positions))
        yield teacher
    finally:
        teacher.config.num_hidden_layers = len(body.layers)
        if types:
            teacher.config.layer_types = types
        _put(teacher, body.layers, body.ends)


def _put(teacher: PreTrainedModel, layers: nn.ModuleList, ends: Ends) -> None:
    base: Any = teacher.base_model
    setattr(base, "layers" if hasattr(base, "layers") else "h", layers)
    setattr(base, next(name for name in ("norm", "final_layer_norm", "ln_f") if hasattr(base, name)), ends.norm)
    teacher.set_input_embeddings(ends.embed)
    teacher.set_output_embeddings(ends.head)
    if ends.positions is not None:
        base.wpe = ends.positions
    if hasattr(base, "has_sliding_layers"):
        base.has_sliding_layers = "sliding_attention" in teacher.config.layer_types
    for index, layer in enumerate(layers):
        _renumber(layer, index)


def _type_of(layer: nn.Module) -> str:
    return "full_attention" if window_of(layer) is None else "sliding_attention"


def _student_or_teacher(model: ElasticModel, index: int) -> nn.Module:
    key = str(index)
    return model.student[key] if key in model.student else model.body.layers[model.elasticity.stations[index].start]


def _renumber(layer: nn.Module, index: int) -> None:
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index
