"""The local store: one folder per model, complete or absent, with the digests of its files.

    <store>/models/<name>/          config.json, *.safetensors, tokenizer files, manifest.json
    <store>/incoming/               downloads and imports under way; never read by anyone else

A model folder is written under `incoming` and renamed when it is whole, so nothing half-valid is ever visible.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError
from tqdm import tqdm

from model_store.errors import BoomerangError

MANIFEST = "manifest.json"
IMPORT_RULES = 3  # counts up whenever the same file would be turned into something else
_STAMPS = ".verified"  # beside the manifest: [size, time of change, digest] of files whose digest was read
_Stamps = dict[str, list]


class StoreError(BoomerangError, RuntimeError):
    """A model that is missing, damaged or cannot be fetched, with what to do about it."""


def store_root(store: Path | str | None = None) -> Path:
    """The store's folder: the argument, else BOOMERANG_STORE, else the user's cache."""
    if store:
        return Path(store).expanduser()
    if configured := os.environ.get("BOOMERANG_STORE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "boomerang"


def model_dir(name: str, store: Path | str | None = None) -> Path:
    """Where a model lives; hub ids become one folder name."""
    return store_root(store) / "models" / name.replace("/", "--")


def install(
    name: str,
    fill: Callable[[Path], dict[str, Any]],
    store: Path | str | None = None,
    *,
    replace: bool = False,
    keep_partial: bool = False,
) -> Path:
    """Make the model `name` with `fill(folder)`, which writes its files and returns facts for the manifest.

    Only one process does so at a time; another that asked for the same model meanwhile finds it made. If `fill`
    raises, the store is as before; `keep_partial` keeps what it wrote for the next try (which finds it in `folder`).
    """
    target = model_dir(name, store)
    scratch = incoming_dir(store)
    with FileLock(scratch / f"{target.name}.lock"):
        if target.is_dir() and not replace:
            return target
        folder = scratch / target.name
        if folder.exists() and not keep_partial:
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        try:
            write_manifest(folder, **fill(folder))
        except BaseException as error:
            if not keep_partial:
                shutil.rmtree(folder, ignore_errors=True)
            if is_disk_full(error):
                raise StoreError(f"{target.name} could not be written: the disk of {scratch} is full") from error
            if isinstance(error, SafetensorError):
                raise StoreError(f"{target.name} could not be written: {error}") from error
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # a running server keeps its open files; the old folder only loses its name
            old = scratch / f"{target.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.rename(target)
    return target


def is_disk_full(error: BaseException) -> bool:
    """Whether the error, or one behind it, is that nothing more can be written; libraries wrap it."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if "os error 28" in str(chain) or "No space left" in str(chain):  # safetensors
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def require_space(folder: Path, size: int, what: str) -> None:
    """StoreError before anything is fetched that cannot fit: who starts a server again and again must not download
    again and again."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StoreError(f"the disk of {folder} is full: {what} needs {size >> 20} MiB and {free >> 20} MiB are free")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder. StoreError if there is no place for one, or none left in it."""
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:  # FileNotFoundError lists the places that were tried
        raise StoreError(f"no temporary folder: {error.strerror}; mount /tmp, or name a folder in TMPDIR") from error
    with folder as name:
        try:
            yield Path(name)
        except Exception as error:
            if is_disk_full(error):
                raise StoreError(f"the disk of {tempfile.gettempdir()} (temporary files) is full") from error
            raise


def incoming_dir(store: Path | str | None = None) -> Path:
    folder = store_root(store) / "incoming"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256(path: Path, progress: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, tqdm(
        total=path.stat().st_size, unit="B", unit_scale=True, desc=f"checking {path.name}", disable=not progress
    ) as bar:  # fmt: skip
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def write_manifest(folder: Path, **facts: Any) -> None:
    """Record size and digest of every file, and where the model came from."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths if path.name not in (MANIFEST, _STAMPS)]
    stamps = _digests(folder, names, {})
    files = {name: {"size": stamp[0], "sha256": stamp[2]} for name, stamp in stamps.items()}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1))
    _write_stamps(folder / _STAMPS, stamps)


def _recorded(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The files that the store recorded for a folder, None for a user's own, which may have some other manifest.json.

    StoreError for one of the store's that is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError):
        files = json.loads(file.read_text())["files"] if file.stat().st_size else {}
        if files and all(isinstance(fact["size"], int) and isinstance(fact["sha256"], str) for fact in files.values()):
            if outside := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
                raise StoreError(f"{file} names {outside[0]!r}, which is not a file of its folder")
            return files
    if (folder / _STAMPS).is_file():
        raise StoreError(f"{file} is damaged: pull the model again with --force")
    return None


def verify(folder: Path, full: bool = False) -> None:
    """Raise StoreError if a file of a stored model is missing or not what was recorded.

    Digests are read again only for files that changed on disk since they were last read, so that a warm start stays
    fast; `full` reads them all. A folder without a manifest is a user's own, which the store promised nothing about.
    """
    recorded = _recorded(folder)
    if recorded is None:
        return
    hint = "pull the model again with --force"
    for name, facts in recorded.items():
        path = folder / name
        if not path.is_file():
            raise StoreError(f"{path} is missing: {hint}")
        if path.stat().st_size != facts["size"]:
            raise StoreError(f"{path} has {path.stat().st_size} bytes instead of {facts['size']}: {hint}")
    known = {} if full else _read_stamps(folder / _STAMPS)
    stamps = _digests(folder, list(recorded), known)
    for name, facts in recorded.items():
        if stamps[name][2] != facts["sha256"]:
            raise StoreError(f"{folder / name} does not match its recorded digest: {hint}")
    if stamps != known:
        _write_stamps(folder / _STAMPS, stamps)


def folder_digest(folder: Path, store: Path | str | None = None) -> str:
    """One digest of what is in a checkpoint folder: weights, configs, tokenizer. Hex sha256.

    From the manifest where there is one; for a user's own folder from its files, remembered in the store.
    """
    recorded = _recorded(folder)
    if recorded is not None:
        digests = {name: fact["sha256"] for name, fact in recorded.items()}
    else:
        paths = [*sorted(folder.iterdir()), *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
        paths = [path for path in paths if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja")]
        names = [path.relative_to(folder).as_posix() for path in paths]
        where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
        memory = store_root(store) / "digests" / f"{where}.json"
        known = _read_stamps(memory)
        stamps = _digests(folder, names, known)
        if stamps != known:
            _write_stamps(memory, stamps)
        digests = {name: stamp[2] for name, stamp in stamps.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, names: list[str], known: _Stamps) -> _Stamps:
    stamps = {}
    for name in names:
        stat = (folder / name).stat()
        old = known.get(name)
        # ctime, unlike mtime, cannot be set back by whoever changed the file.
        is_known = old is not None and old[:2] == [stat.st_size, stat.st_ctime_ns]
        stamps[name] = old if old is not None and is_known else [stat.st_size, stat.st_ctime_ns, sha256(folder / name)]
    return stamps


def _read_stamps(file: Path) -> _Stamps:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return {}


def _write_stamps(file: Path, stamps: _Stamps) -> None:
    with contextlib.suppress(OSError):  # a read-only store is read in full each time
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(stamps))
