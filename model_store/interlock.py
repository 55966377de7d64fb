"""Whether a teacher and a student fit together, and in what order the student's layers are swapped back."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model_store import lowrank
from model_store.assembly import Elasticity
from model_store.errors import PairError
from model_store.layout import END_PARTS
from model_store.lowrank import LOW_RANK_FILE, LowRankStudent
from model_store.published import PublishedPair
from model_store.spec import ModelSpec, Rope
from model_store.vocabulary import other_tokens
from model_store.weights import Checkpoint

logger = logging.getLogger(__name__)

PATCH_ORDERS = ("last_to_first", "first_to_last")


def read_order(
    spec: ModelSpec, kept: Sequence[int], order: str | None, manifest: dict[str, Any]
) -> tuple[str, Elasticity]:
    """(name, sizes): the thresholds of pair.json, else the named order. PairError, AssemblyError."""
    if manifest.get("thresholds"):
        if not isinstance(manifest["thresholds"], list):
            raise PairError(f"pair.json: thresholds is {manifest['thresholds']!r}, not a list of sizes")
        ends = {f"{end}_threshold": manifest.get(f"{end}_threshold") for end in END_PARTS}
        for key, value in ends.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise PairError(f"pair.json: {key} is {value!r:.60}, not a size")
        return "thresholds", Elasticity(spec.num_layers, kept, manifest["thresholds"], **ends)
    if order is None:
        order = "last_to_first"
        logger.warning("this pair is not known by name: its patch order is taken to be %s", order)
    if order not in PATCH_ORDERS:
        raise PairError(f"unknown patch order {order!r} (known: {', '.join(PATCH_ORDERS)})")
    build = Elasticity.last_to_first if order == "last_to_first" else Elasticity.first_to_last
    return order, build(spec.num_layers, kept)


def interlock(
    teacher_path: Path,
    student_path: Path,
    config: dict[str, Any],
    known: PublishedPair | None,
    store: Path | str | None,
) -> tuple[ModelSpec, ModelSpec | None, list[int]]:
    """Specs of both (None for a low-rank student) and the kept layers; PairError if they do not fit together."""
    kept = config.get("copied_teacher_layers") or (list(known.kept) if known and known.kept else None)
    if kept is None:
        raise PairError(
            f"{student_path} has no student_config.json with copied_teacher_layers: which teacher layers its layers "
            "stand for is not known"
        )
    pruned = config.get("pruned_teacher_layers")
    for name, layers in (("copied_teacher_layers", kept), ("pruned_teacher_layers", pruned)):
        if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
            raise PairError(f"student_config.json: {name} is {layers!r}, not a list of layer numbers")
    if not (teacher_path / "config.json").is_file():
        raise PairError(f"{teacher_path} has no config.json: it is not a checkpoint folder")
    teacher = spec_of(teacher_path, store)
    if pruned is not None and sorted([*kept, *pruned]) != list(range(teacher.num_layers)):
        raise PairError(
            f"student_config.json does not describe this teacher: its {len(kept)} copied and {len(pruned)} pruned "
            f"layers are not the teacher's {teacher.num_layers}"
        )
    if (student_path / LOW_RANK_FILE).is_file():
        if teacher.family not in lowrank.FAMILIES:
            raise PairError(f"low-rank students of family {teacher.family} are not supported")
        LowRankStudent(student_path / LOW_RANK_FILE, tuple(kept)).check(teacher)
        return teacher, None, kept
    if not (student_path / "config.json").is_file():
        raise PairError(f"{student_path} has neither config.json nor {LOW_RANK_FILE}: it is not a student")
    student = spec_of(student_path, store)
    _compare(teacher, student)
    refusal, oddity = other_tokens(teacher_path, student_path)
    if refusal:
        raise PairError(f"teacher and student do not interlock: {refusal}")
    if oddity:
        logger.warning("%s", oddity)
    if student.num_layers != len(kept):
        raise PairError(
            f"the student has {student.num_layers} layers and student_config.json lists {len(kept)} copied layers"
        )
    # Both sides run on every text, so both must be exact up to the longest one.
    positions = min(teacher.max_position_embeddings, student.max_position_embeddings)
    return dataclasses.replace(teacher, max_position_embeddings=positions), student, kept


def spec_of(path: Path, store: Path | str | None) -> ModelSpec:
    """The spec of a checkpoint whose every tensor was checked; what is odd about it is said."""
    spec = Checkpoint(path, store).spec
    for note in spec.notes:
        logger.warning("%s: %s", path, note)
    return spec


def _compare(teacher: ModelSpec, student: ModelSpec) -> None:
    """PairError if the two compute their layers differently. Angles are compared, however they were spelled."""
    may_differ = {
        "num_layers", "tie_word_embeddings", "sliding_window", "layer_types", "unrotated_layers", "inv_freq",
        "local_inv_freq", "rope_factor",
    }  # fmt: skip
    if not teacher.learned_positions:
        may_differ.add("max_position_embeddings")
    for spec_field in dataclasses.fields(ModelSpec):
        ours, theirs = getattr(teacher, spec_field.name), getattr(student, spec_field.name)
        if spec_field.compare and spec_field.name not in may_differ and ours != theirs:
            raise PairError(
                f"teacher and student do not interlock: {spec_field.name} is {ours!r} in the teacher and {theirs!r} in "
                "the student"
            )
    if not teacher.rotary_dim:
        return
    ropes: list[Rope] = ["global"] if teacher.local_inv_freq is None else ["global", "local"]
    for rope in ropes:
        (ours, factor), (theirs, other) = teacher.rope_inv_freq(rope), student.rope_inv_freq(rope)
        if np.allclose(ours, theirs, rtol=1e-6, atol=0) and math.isclose(factor, other, rel_tol=1e-6):
            continue
        said = [f"rope_theta {spec.rope_theta:g}, scaling {spec.rope_scaling}" for spec in (teacher, student)]
        raise PairError(
            f"teacher and student do not interlock: their rotary angles differ ({said[0]} in the teacher, {said[1]} in "
            "the student)"
        )


def read_own_layers(config: dict[str, Any], num_layers: int) -> frozenset[int] | None:
    """The layers of an ordinary student that may differ from the teacher's (None: all). PairError."""
    found = config.get("own_layers")
    if found is not None and not (isinstance(found, list) and all(i in range(num_layers) for i in found)):
        raise PairError(
            f"student_config.json: own_layers is {found!r}, not a list of the student's {num_layers} layers"
        )
    return None if found is None else frozenset(found)
