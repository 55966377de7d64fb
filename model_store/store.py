"""The local store: one folder per model, complete or absent, with the digests of its files.

    <store>/models/<name>/          config.json, *.safetensors, tokenizer files, manifest.json
    <store>/incoming/               downloads and imports under way; never read by anyone else

A model folder is written under `incoming` and renamed when it is whole, so nothing half-valid is ever visible.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

MANIFEST = "manifest.json"


class StoreError(RuntimeError):
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


@contextlib.contextmanager
def incoming(name: str, store: Path | str | None = None) -> Iterator[Path]:
    """A folder to fill; renamed to its place if the block succeeds, removed if it raises."""
    target = model_dir(name, store)
    folder = store_root(store) / "incoming" / f"{target.name}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        write_manifest(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path, progress: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, tqdm(
        total=path.stat().st_size, unit="B", unit_scale=True, desc=f"checking {path.name}", disable=not progress
    ) as bar:  # fmt: skip
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def write_manifest(folder: Path, **facts: object) -> None:
    """Record size and digest of every file, and where the model came from."""
    file = folder / MANIFEST
    known = json.loads(file.read_text()) if file.is_file() else {}
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    file.write_text(json.dumps({**known, **facts, "files": files}, indent=1))


def verify(folder: Path, full: bool = False) -> None:
    """Raise StoreError if a file of a stored model is missing or not what was recorded.

    Digests are read again only for files that changed on disk since they were last checked (size and time of change,
    kept in `.verified`), so that a warm start stays fast; `full` reads them all.
    """
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        return  # a user's own folder, which the store never promised anything about
    stamp_file = folder / ".verified"
    stamps = {}
    with contextlib.suppress(OSError, ValueError):
        stamps = json.loads(stamp_file.read_text())
    fresh = {}
    for name, facts in json.loads(manifest_file.read_text())["files"].items():
        path = folder / name
        hint = "pull the model again"
        if not path.is_file():
            raise StoreError(f"{path} is missing: {hint}")
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, facts["sha256"]]
        if stat.st_size != facts["size"]:
            raise StoreError(f"{path} has {stat.st_size} bytes instead of {facts['size']}: {hint}")
        if (full or stamps.get(name) != stamp) and sha256(path) != facts["sha256"]:
            raise StoreError(f"{path} does not match its recorded digest: {hint}")
        fresh[name] = stamp
    if fresh != stamps:
        with contextlib.suppress(OSError):  # a read-only store is checked in full each time
            stamp_file.write_text(json.dumps(fresh))
