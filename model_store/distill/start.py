"""Starting from students that exist: layers that stand for the same block of the teacher are taken over.

A source is a pair's student folder (whole layers or low-rank differences, with student_config.json beside them), or a
checkpoint of a run of `distill` that was cut short. With several sources a layer is their mean: fine-tuned from one
ancestor, means are often better than either. Weights that sum to one may also be negative: 1.5 of a student and -0.5
of the one it was trained from goes half as far again in the direction of that training ("task arithmetic", Ilharco et
al., arXiv 2212.04089).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from model_store.assembly import Elasticity
from model_store.distill.elastic import ElasticModel
from model_store.lowrank import LOW_RANK_FILE

_LAYERS = "model.layers."


def start_from(model: ElasticModel, folders: Sequence[Path], weights: Sequence[float] | None = None) -> dict[int, int]:
    """Load the student's layers in place; returns how many sources each station had. ValueError if none fits.

    `weights`: one per folder, 1 in all (default: a mean of those that have the layer); every folder must have it then.
    """
    if weights and (len(weights) != len(folders) or abs(sum(weights) - 1) > 1e-6):
        raise ValueError(f"--start-weights: {len(folders)} numbers that sum to 1, one for each of --start-from")
    found: dict[int, list[dict[str, torch.Tensor]]] = {int(key): [] for key in model.student}
    blocks = {(s.start, s.stop): s.index for s in model.elasticity.stations}
    for folder in folders:
        kept = json.loads(_config_of(folder).read_text())["copied_teacher_layers"]
        sources = Elasticity.last_to_first(model.elasticity.num_teacher_layers, kept).stations
        tensors = _read(folder)
        for source in sources:
            station = blocks.get((source.start, source.stop))
            prefix = f"{_LAYERS}{source.index}."
            layer = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if station in found and layer:
                found[station].append(_whole(layer, model.body.layers[source.start]))
    if not any(found.values()):
        raise ValueError("--start-from: no layer there stands for a block of this student (see --keep)")
    with torch.no_grad():
        for station, layers in found.items():
            if weights and layers and len(layers) < len(folders):
                raise ValueError(f"--start-weights: not all of --start-from have the layer of station {station}")
            if layers:
                shares = weights or [1] * len(layers)
                mean = {
                    name: sum(share * layer[name] for share, layer in zip(shares, layers, strict=True)) / sum(shares)
                    for name in layers[0]
                }
                model.student[str(station)].load_state_dict(mean)
    return {station: len(layers) for station, layers in found.items()}


def order_of(folder: Path, kept: Sequence[int]) -> list[int]:
    """The thresholds of a student's patch order. ValueError if it has none for a student that keeps `kept`."""
    config = _config_of(folder)
    manifest, order = config.with_name("pair.json"), config.with_name("order.json")  # of a pair; of a run's checkpoints
    found = None
    if manifest.is_file():
        found = json.loads(manifest.read_text()).get("thresholds")
    elif order.is_file():
        found = json.loads(order.read_text())
    if found is None or json.loads(config.read_text())["copied_teacher_layers"] != list(kept):
        raise ValueError(f"--order start: {folder} has no patch order for a student that keeps these layers")
    return found


def source_name(folder: Path) -> str:
    """What a source is called in records: a checkpoint with the run it is of."""
    folder = folder.absolute()
    return "/".join(folder.parts[-3:]) if folder.name.startswith("checkpoint-") else folder.name


def _config_of(folder: Path) -> Path:
    places = [place / "student_config.json" for place in (folder, folder.parent)]
    config = next((place for place in places if place.is_file()), None)
    if config is None:
        raise ValueError(f"--start-from: {folder} has no student_config.json")
    return config


def _read(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / LOW_RANK_FILE).is_file():
        return load_file(folder / LOW_RANK_FILE)
    files = [file for file in sorted(folder.glob("*.safetensors")) if "lowrank" not in file.name]
    if not files:
        raise ValueError(f"--start-from: {folder} has no safetensors")
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    return {re.sub(r"^student\.(?=\d+\.)", _LAYERS, name): value for name, value in tensors.items()}


def _whole(layer: dict[str, torch.Tensor], base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A layer's float32 weights in main memory; low-rank differences are added to the teacher's `base`."""
    linears = {name.removesuffix(".lora_A") for name in layer if name.endswith(".lora_A")}
    whole = {name: value.float() for name, value in layer.items() if ".lora_" not in name}
    for name, value in base.named_parameters():
        if name.endswith((".bias", "_norm.weight")):  # the teacher's, unless a difference stored its own
            whole.setdefault(name, value.detach().cpu().float())
    for name in linears:
        a, b = (_factor(layer, f"{name}.lora_{side}") for side in "AB")
        whole[f"{name}.weight"] = base.get_submodule(name).weight.detach().cpu().float() + b @ a
    return whole


def _factor(layer: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    scale = layer.get(f"{name}_scale")
    return layer[name].float() if scale is None else layer[name].float() * scale.float()[:, None]
