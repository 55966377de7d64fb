"""A teacher and a student that interlock, by whatever names: `open_pair`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model_store import made, published
from model_store.assembly import AssemblyError, Elasticity
from model_store.errors import PairError
from model_store.figures import read_kinds, read_quality
from model_store.files import read_json_if_there
from model_store.interlock import interlock, read_order, read_own_layers, spec_of
from model_store.loaded import LoadedPair
from model_store.pair_files import Pair
from model_store.published import DEFAULT_PAIR, PublishedPair
from model_store.spec import SpecError
from model_store.store import store_root
from model_store.weights import weight_files

__all__ = ["DEFAULT_PAIR", "LoadedPair", "Pair", "PairError", "open_pair"]

DEFAULT_PAIR_DIR = Path(__file__).parent / "default_pair"
NO_STUDENT = "none"  # in the place of a student: the teacher alone
MAKE = "make"  # the newest that was made here, and the teacher alone as long as there is none


def open_pair(
    teacher: Path | str | None = None,
    student: Path | str | None = None,
    *,
    patch_order: str | None = None,
    thresholds: Sequence[int] | None = None,
    name: str | None = None,
    store: Path | str | None = None,
) -> Pair:
    """Open a teacher and a student; with neither, the default pair.

    Each is a folder, a hub id or a GGUF file. `teacher` alone may be the name of a known pair (published.py) or the
    teacher of one; any other teacher is opened with the newest student that was made for it here (`made.py`), as with
    the student "make", or alone, as with the student "none".
    The patch order is, in this order: `thresholds`, `patch_order`, what the student's pair.json says, the known
    pair's, last-to-first. Raises PairError if they do not interlock, StoreError if one cannot be had.
    """
    from model_store.sources import resolve

    teacher, student, known = _named(teacher, student, store)
    if student is None:
        if patch_order is not None or thresholds is not None:
            raise PairError("a teacher without a student has no patch order: name a student, or leave the order out")
        return _alone(teacher or published.DEFAULT_TEACHER, name, store)
    student_path = resolve(student, store)
    notes = Path(student).expanduser().parent if str(student).lower().endswith(".gguf") else student_path
    manifest = _read_manifest(notes)
    teacher = teacher or manifest.get("teacher") or published.DEFAULT_TEACHER
    teacher_path = _teacher_path(teacher, store)
    kept_layers = read_json_if_there(notes / "student_config.json")
    try:
        spec, student_spec, kept = interlock(teacher_path, student_path, kept_layers, known, store)
        recorded = read_order(
            spec, kept, manifest.get("patch_order") or (known.patch_order if known else None), manifest
        )
        order, elasticity = recorded
        if thresholds is not None:
            order, elasticity = "thresholds", Elasticity(spec.num_layers, kept, thresholds)
        elif patch_order is not None:
            order, elasticity = read_order(spec, kept, patch_order, {})
    except (AssemblyError, SpecError) as error:
        raise PairError(str(error)) from error
    is_recorded = elasticity.thresholds == recorded[1].thresholds
    return Pair(
        name=name or manifest.get("name") or (known.name if known else _name_of(teacher_path)),
        teacher_path=teacher_path,
        student_path=student_path,
        notes_path=notes,
        spec=spec,
        elasticity=elasticity,
        patch_order=order,
        quality=read_quality(notes / "quality.json") if is_recorded else {},
        kinds=read_kinds(notes / "quality.json") if is_recorded else {},
        student_spec=student_spec,
        store=store,
        shares_ends=kept_layers.get("ends") == "teacher",
        own_layers=read_own_layers(kept_layers, len(kept)),
    )


def _named(
    teacher: Path | str | None, student: Path | str | None, store: Path | str | None
) -> tuple[Path | str | None, Path | str | None, PublishedPair | None]:
    """What the arguments of `open_pair` mean: the teacher (None: the one that goes with the student), the student
    (None: no student), and the known pair that this is."""
    if str(student) == NO_STUDENT and not Path(NO_STUDENT).is_dir():
        known = _known_pair(teacher, None)
        return known.teacher if known and _is_pairs_name(teacher) else teacher, None, None
    wants_made = str(student) == MAKE and not Path(MAKE).is_dir()
    known = _known_pair(teacher, None if wants_made else student)
    if known and _is_pairs_name(teacher):
        teacher = known.teacher
    if wants_made or (student is None and known is None):
        return teacher, _newest_made(teacher or published.DEFAULT_TEACHER, store), known
    if student is None:
        assert known is not None
        student = known.student or DEFAULT_PAIR_DIR
    return teacher, student, known


def _is_pairs_name(teacher: Path | str | None) -> bool:
    """Whether what stands in the teacher's place names a whole pair; nothing does, the default one."""
    return teacher is None or published.find(str(teacher)) is not None


def _read_manifest(notes: Path) -> dict[str, Any]:
    """The student's pair.json. PairError if it is damaged."""
    manifest = read_json_if_there(notes / "pair.json")
    for key in ("name", "teacher"):
        if not isinstance(manifest.get(key, ""), str):
            raise PairError(f"{notes / 'pair.json'}: {key} is {manifest[key]!r}, not a text")
    return manifest


def _alone(teacher: Path | str, name: str | None, store: Path | str | None) -> Pair:
    path = _teacher_path(teacher, store)
    if not (path / "config.json").is_file():
        raise PairError(f"{path} has no config.json: it is not a checkpoint folder")
    spec = spec_of(path, store)
    name = name or _name_of(path)
    notes = store_root(store) / "notes" / f"{name}-{_stamp(path)}"
    return Pair(
        name=name,
        teacher_path=path,
        student_path=None,
        notes_path=notes,
        spec=spec,
        elasticity=Elasticity.of_teacher(spec.num_layers),
        patch_order="none",
        quality=read_quality(notes / "quality.json"),
        kinds=read_kinds(notes / "quality.json"),
        store=store,
    )


def made_folder(teacher: Path | str, store: Path | str | None) -> Path:
    """Where the store keeps students that were made for a teacher, there or not (`made.py`)."""
    path = _teacher_path(teacher, store)
    return store_root(store) / "students" / f"{_name_of(path)}-{_stamp(path)}"


def _newest_made(teacher: Path | str, store: Path | str | None) -> Path | None:
    # Without the folder of them all there is none, and the teacher need not be looked at.
    return made.newest(made_folder(teacher, store)) if (store_root(store) / "students").is_dir() else None


def _stamp(path: Path) -> str:
    """The same as long as a checkpoint's files are not touched; without reading them."""
    stamps = [str(path.resolve()), *(file.stat().st_ctime_ns for file in weight_files(path))]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


def _teacher_path(teacher: Path | str, store: Path | str | None) -> Path:
    from model_store.sources import default_teacher, resolve

    return default_teacher(store) if str(teacher) == published.DEFAULT_TEACHER else resolve(teacher, store)


def _name_of(path: Path) -> str:
    return path.name.rsplit("--", 1)[-1].lower()


def _known_pair(teacher: Path | str | None, student: Path | str | None) -> PublishedPair | None:
    if student is not None:
        return published.by_student(str(student))
    if teacher is None:
        return published.find(DEFAULT_PAIR)
    return published.find(str(teacher)) or published.by_teacher(str(teacher))
