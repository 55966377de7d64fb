"""A student beside a teacher that is in memory already: nothing of the teacher is read again to be kept.

An executor has packed the teacher's tensors by now, so what a student shares with it is found in the files.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from model_store import nested_store
from model_store.loaded import LoadedPair, is_same_layer, join_ends
from model_store.lowrank import LowRankDelta
from model_store.pair import Pair, PairError
from model_store.store import store_root
from model_store.weight_form import WeightForm
from model_store.weights import Checkpoint, EndWeights, LayerWeights


def load_beside(pair: Pair, served: LoadedPair, form: WeightForm) -> LoadedPair:
    """`pair` in memory, its teacher's tensors those of `served`, which is the same teacher alone or beside another
    student; only the student is read, in `form`.

    Raises PairError if it is another teacher, or if the store has no nested codes of the student where rows choose
    their widths; WeightError.
    """
    if pair.spec != served.spec or pair.student_path is None:
        raise PairError(f"{pair.student_path} is no student of the teacher that is served")
    num_teacher = pair.spec.num_layers
    checkpoint = Checkpoint(pair.teacher_path, pair.store)
    layers: dict[int, LayerWeights] = {i: layer for i, layer in served.layers.items() if i < num_teacher}
    student: dict[int, LayerWeights] = {}
    factors: dict[int, LowRankDelta] = {}
    ends = served.ends
    if pair.is_low_rank:
        reader = pair.low_rank_student
        for index, origin in enumerate(reader.kept):
            if not reader.has_own_layer(index):
                student[num_teacher + index] = layers[origin]
            elif form.low_rank and reader.is_difference(index):
                factors[num_teacher + index] = reader.delta(index, checkpoint.layer(origin, form), form.dtype)
            else:
                student[num_teacher + index] = pair.read_layer(num_teacher + index, form)
    else:
        for index, origin in enumerate(pair.elasticity.kept):
            if not pair.may_own(index):
                student[num_teacher + index] = layers[origin]
                continue
            own = pair.read_layer(num_teacher + index, form)
            same = is_same_layer(own, checkpoint.layer(origin, form))
            student[num_teacher + index] = layers[origin] if same else own
        if not pair.shares_ends:
            ends = _ends(
                checkpoint.end_tensors(form), Checkpoint(pair.student_path, pair.store).end_tensors(form), served
            )
    if len(served.widths) > 1:
        _put_codes(pair, served, student, form)
    return dataclasses.replace(
        served, name=pair.name, elasticity=pair.elasticity, sizes=pair.elasticity.sizes, layers=layers | student,
        ends=ends, missing_sizes={}, low_rank=factors,
    )  # fmt: skip


def _ends(teacher: dict[str, Any], student: dict[str, Any], served: LoadedPair) -> dict[str, EndWeights]:
    """Both sides' ends; what is the teacher's is what is served."""
    joined, ours = join_ends(teacher, student), served.ends["teacher"]
    loaded = {id(value): getattr(ours, name) for name, value in teacher.items() if value is not None}
    if joined["teacher"] is joined["student"]:
        return dict.fromkeys(("teacher", "student"), ours)
    own = {field.name: getattr(joined["student"], field.name) for field in dataclasses.fields(EndWeights)}
    mine = {name: loaded.get(id(value), value) for name, value in own.items()}
    return {"teacher": ours, "student": EndWeights(**mine)}


def _put_codes(pair: Pair, served: LoadedPair, student: dict[int, LayerWeights], form: WeightForm) -> None:
    """Nested codes for the student's own layers, from the pair's file."""
    file = nested_store.nested_file(pair, store_root(pair.store))
    if not nested_store.is_current(file):
        raise PairError(f"the store has no nested codes of {pair.student_path} yet")
    own = {i: layer for i, layer in student.items() if layer not in served.layers.values()}
    nested_store.put(dataclasses.replace(served, layers=own, ends={}), file, form)
