"""Opens a pair as an ElasticModel, and lends any of its sizes as an ordinary transformers model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from model_store.distill.elastic import ElasticModel, body_of
from model_store.lowrank import LOW_RANK_FILE, LowRankStudent
from model_store.pair import Pair
from model_store.weight_form import WeightForm
from model_store.weights import Checkpoint, LayerWeights


def load_elastic(pair: Pair, dtype: torch.dtype, device: torch.device | str = "cpu") -> ElasticModel:
    """Teacher and student as transformers modules in `dtype`; low-rank differences are added up as the server does."""
    teacher = AutoModelForCausalLM.from_pretrained(pair.teacher_path, dtype=dtype, local_files_only=True).to(device)
    body, stations = body_of(teacher), pair.elasticity.stations
    student: dict[int, nn.Module] = {}
    own_ends = None
    if (pair.student_path / LOW_RANK_FILE).is_file():
        low_rank = LowRankStudent(pair.student_path / LOW_RANK_FILE, pair.elasticity.kept)
        exact = Checkpoint(pair.teacher_path)
        for station in stations:
            if low_rank.has_own_layer(station.index):
                base = exact.layer(station.start, WeightForm(torch.float32))
                layer = copy.deepcopy(body.layers[station.start])
                _assign(layer, low_rank.layer(station.index, base, WeightForm(dtype), device), pair)
                student[station.index] = layer
    else:
        other = AutoModelForCausalLM.from_pretrained(pair.student_path, dtype=dtype, local_files_only=True).to(device)
        other_body = body_of(other)
        student = dict(enumerate(other_body.layers))
        own_ends = other_body.ends
    model = ElasticModel(teacher, pair.elasticity, student)
    if own_ends is not None:
        model.set_ends(own_ends)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _assign(layer: nn.Module, weights: LayerWeights, pair: Pair) -> None:
    """Put the merged tensors of a Llama-named layer back into its module."""
    spec = pair.spec
    q, k, v = weights.qkv_weight.split([spec.q_size, spec.kv_size, spec.kv_size])
    gate, up = weights.up_weight.chunk(2)
    values = {
        "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": weights.o_weight,
        "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": weights.down_weight,
        "input_layernorm": weights.attn_norm_weight, "post_attention_layernorm": weights.mlp_norm_weight,
    }  # fmt: skip
    for name, value in values.items():
        layer.get_submodule(name).weight.copy_(value)


@contextlib.contextmanager
def lend_size(model: ElasticModel, size: int) -> Iterator[PreTrainedModel]:
    """The pair at one size as a transformers model, for as long as the context lasts.

    Modules are shared, not copied: the teacher's layer list is swapped and layers are renumbered (transformers keeps
    the index of the KV cache on the module), so only one size can be lent at a time.
    """
    teacher, body, path = model.teacher, model.body, model.elasticity.path(size)
    num_teacher = model.elasticity.num_teacher_layers
    layers = [body.layers[i] if i < num_teacher else _student_or_teacher(model, i - num_teacher) for i in path.layers]
    base, saved = teacher.base_model, teacher.config.num_hidden_layers
    name = "layers" if hasattr(base, "layers") else "h"
    ends = {"embed": body.ends.embed, "norm": body.ends.norm, "head": body.ends.head}
    norm_name = next(n for n in ("norm", "final_layer_norm", "ln_f") if hasattr(base, n))
    types = getattr(teacher.config, "layer_types", None)
    try:
        setattr(base, name, nn.ModuleList(layers))
        teacher.config.num_hidden_layers = size
        if types:
            teacher.config.layer_types = [types[0]] * size
        for index, layer in enumerate(layers):
            _renumber(layer, index)
        if model.ends is not None:
            own = model.side(on_teacher=False)
            if path.embed_from == "student":
                teacher.set_input_embeddings(own.embed)
            if path.norm_from == "student":
                setattr(base, norm_name, own.norm)
            if path.head_from == "student":
                teacher.set_output_embeddings(own.head)
        yield teacher
    finally:
        setattr(base, name, body.layers)
        setattr(base, norm_name, ends["norm"])
        teacher.set_input_embeddings(ends["embed"])
        teacher.set_output_embeddings(ends["head"])
        teacher.config.num_hidden_layers = saved
        if types:
            teacher.config.layer_types = types
        for index, layer in enumerate(body.layers):
            _renumber(layer, index)


def _student_or_teacher(model: ElasticModel, index: int) -> nn.Module:
    key = str(index)
    return model.student[key] if key in model.student else model.body.layers[model.elasticity.stations[index].start]


def _renumber(layer: nn.Module, index: int) -> None:
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index
