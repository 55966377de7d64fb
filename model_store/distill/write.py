"""Writes what was trained as a pair that `serve` takes: a whole student checkpoint, or low-rank differences."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from model_store.distill.elastic import ElasticModel
from model_store.files import share
from model_store.lowrank import LOW_RANK_FILE

_NORMS = ("input_layernorm", "post_attention_layernorm")


def write_manifest(folder: Path, model: ElasticModel, manifest: dict[str, Any]) -> None:
    """pair.json (thresholds of the patch order, provenance) and student_config.json."""
    write_config(folder, model)
    manifest = {**manifest, "thresholds": list(model.elasticity.thresholds)}
    (folder / "pair.json").write_text(json.dumps(manifest, indent=1) + "\n")


def write_config(folder: Path, model: ElasticModel) -> None:
    """student_config.json: which layers of the teacher the student keeps, in the published format; which of them are
    its own, and that it has no embedding, norm and head of its own."""
    kept = [station.start for station in model.elasticity.stations]
    pruned = sorted(set(range(model.elasticity.num_teacher_layers)) - set(kept))
    config: dict[str, Any] = {"copied_teacher_layers": kept, "pruned_teacher_layers": pruned}
    if model.ends is None:
        config["ends"] = "teacher"
    config["own_layers"] = sorted(map(int, model.student))
    (folder / "student_config.json").write_text(json.dumps(config) + "\n")


def write_full(folder: Path, model: ElasticModel) -> None:
    """The student as an ordinary checkpoint of its family (bfloat16 safetensors and config)."""
    teacher, kept = model.teacher, [station.start for station in model.elasticity.stations]
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(kept)
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[i] for i in kept]
    if rotates := getattr(config, "no_rope_layers", None):
        config.no_rope_layers = [rotates[i] for i in kept]
    with torch.device("meta"):
        student = type(teacher)(config)
    layers = [
        model.student[str(i)] if str(i) in model.student else model.body.layers[start] for i, start in enumerate(kept)
    ]
    base = student.base_model
    setattr(base, "layers" if hasattr(base, "layers") else "h", nn.ModuleList(copy.deepcopy(layer) for layer in layers))
    norm = next(name for name in ("norm", "final_layer_norm", "ln_f") if hasattr(base, name))
    ends = model.side(on_teacher=False)
    setattr(base, norm, copy.deepcopy(ends.norm))
    student.set_input_embeddings(copy.deepcopy(ends.embed))
    student.set_output_embeddings(copy.deepcopy(ends.head))
    if ends.positions is not None:
        base.wpe = copy.deepcopy(ends.positions)
    if model.body.rotary is not None:
        base.rotary_emb = copy.deepcopy(model.body.rotary)
    student.tie_weights()
    student.to(torch.bfloat16).save_pretrained(folder)
    share(*folder.glob("*.safetensors"))


def input_moments(
    model: ElasticModel, batches: Iterable[torch.Tensor], paths: Iterable[tuple[bool, ...]]
) -> dict[int, dict[str, torch.Tensor]]:
    """Second moments [in, in] of what every linear of every student layer receives, along the given paths.

    With them the low-rank approximation minimises the error of the outputs rather than of the weights.
    """
    moments: dict[int, dict[str, torch.Tensor]] = {int(i): {} for i in model.student}
    handles = []
    for key, layer in model.student.items():
        for name, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                handles.append(linear.register_forward_pre_hook(_accumulator(moments[int(key)], name)))
    paths = list(paths)
    with torch.no_grad():
        for number, ids in enumerate(batches):
            model.hidden(ids, paths[number % len(paths)])
    for handle in handles:
        handle.remove()
    return moments


def _accumulator(store: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        # Tokens with massive activations would own the moment; a square root of the norm keeps them from it.
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6).sqrt()
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 the sum would not stay positive definite
            gram = x.T @ x
        store[name] = store[name] + gram if name in store else gram

    return hook


def low_rank_factors(
    difference: torch.Tensor, rank: int, moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] with B A closest to `difference` [out, in], in the norm weighted by `moment` [in, in].

    With C = L L^T the weighted problem is an ordinary one for D = `difference @ L` (Eckart-Young). Its singular vectors
    come from the eigenvectors of D's smaller Gram matrix, in double precision: several times faster than an SVD.
    """
    difference = difference.double()
    rank = min(rank, *difference.shape)
    root = None
    if moment is not None:
        ridge = 1e-2 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        root = torch.linalg.cholesky(moment.double() + ridge)
    weighted = difference if root is None else difference @ root
    if len(difference) <= difference.shape[1]:
        b = torch.linalg.eigh(weighted @ weighted.T).eigenvectors[:, -rank:].flip(1)
        a = b.T @ difference
    else:
        right = torch.linalg.eigh(weighted.T @ weighted).eigenvectors[:, -rank:].flip(1)
        b = weighted @ right
        a = right.T if root is None else torch.linalg.solve_triangular(root, right.T, upper=False, left=False)
    # Equal norms on both sides, so that neither loses bits when it is rounded.
    balance = (b.norm(dim=0) / a.norm(dim=1).clamp_min(1e-12)).clamp_min(1e-12).sqrt()
    return (a * balance[:, None]).float(), (b / balance).float()


def quantise_rows(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [r, c] and float32 scales [r]: symmetric, one scale per row."""
    scale = value.abs().amax(dim=1).clamp_min(1e-12) / 127
    return (value / scale[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous(), scale.float()


def freeze_vectors(model: ElasticModel) -> None:
    """Keep biases and query/key norms as the teacher's: a layer with its own cannot run as a low-rank difference."""
    for layer in model.student.values():
        for _, value in _vectors(layer):
            value.requires_grad_(False)


def _vectors(layer: nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Biases and query/key norms by name."""
    for name, value in layer.named_parameters():
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            yield name, value


def write_low_rank(
    folder: Path,
    model: ElasticModel,
    ranks: Callable[[str], int],
    moments: dict[int, dict[str, torch.Tensor]] | None = None,
    int8: bool = False,
) -> int:
    """Student layers as differences to the teacher's kept layers; returns the bytes written.

    Biases and query/key norms are stored where they are not the teacher's; such a layer is served expanded.

    `ranks(name)` is the rank of a linear ("mlp.down_proj"). ValueError for a family whose names the low-rank reader
    does not know, or a model whose ends were trained.
    """
    if model.ends is not None:
        raise ValueError("a low-rank student shares embedding, norm and head with the teacher: train without own ends")
    tensors: dict[str, torch.Tensor] = {}
    for key, layer in model.student.items():
        base = model.body.layers[model.elasticity.stations[int(key)].start]
        if not hasattr(base, _NORMS[0]) or not hasattr(base, "mlp") or not hasattr(base.mlp, "gate_proj"):
            raise ValueError(f"low-rank students are for Llama-named layers, not {type(base).__name__}")
        prefix = f"model.layers.{key}."
        for name, linear in layer.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            difference = linear.weight.detach().float() - base.get_submodule(name).weight.detach().float()
            moment = moments[int(key)].get(name) if moments else None
            for side, value in zip("AB", low_rank_factors(difference, ranks(name), moment), strict=True):
                tensor_name = f"{prefix}{name}.lora_{side}"
                if int8:
                    tensors[tensor_name], tensors[f"{tensor_name}_scale"] = quantise_rows(value)
                else:
                    tensors[tensor_name] = value.to(torch.bfloat16).contiguous()
        for name in _NORMS:
            tensors[f"{prefix}{name}.weight"] = layer.get_submodule(name).weight.detach().to(torch.bfloat16).clone()
        for name, value in _vectors(layer):
            if not torch.equal(value.float(), base.get_parameter(name).float()):
                tensors[f"{prefix}{name}"] = value.to(torch.bfloat16).clone()
    save_file(tensors, folder / LOW_RANK_FILE, metadata={"format": "pt"})
    share(folder / LOW_RANK_FILE)
    return (folder / LOW_RANK_FILE).stat().st_size
