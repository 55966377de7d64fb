"""What a checkpoint folder holds, found out once: transformers reads its config, the store remembers the result.

    <store>/descriptions/<folder>.json    the spec, by which transformers it was made, and from which files

A description holds as long as neither the files nor the library change (told by its stamp, which needs no import); a
start that finds it imports no transformers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_store.spec import ModelSpec
from model_store.store import sha256, store_root

_MANY = 256
_VERSION = 3  # of this file's form, of what ModelSpec means and of what is refused


def remembered_spec(
    folder: Path, weights: list[Path], store: Path | str | None, make: Callable[[], ModelSpec]
) -> ModelSpec:
    """The spec of `folder`: as remembered if nothing changed, else from `make`."""
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    file = store_root(store) / "descriptions" / f"{where}.json"
    library = importlib.util.find_spec("transformers")
    made_by = {"version": _VERSION, "transformers": _stamp(Path(library.origin)) if library and library.origin else []}
    config = folder / "config.json"
    stamps = {path.name: _stamp(path) for path in (config, *weights)}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(file.read_text())
        if known["made_by"] == made_by and known["stamps"] == stamps and known["config_sha256"] == sha256(config):
            return _from_json(known["spec"])
    spec = make()
    content = {
        "folder": str(folder.resolve()), "transformers": sys.modules["transformers"].__version__, "made_by": made_by,
        "stamps": stamps, "config_sha256": sha256(config), "spec": dataclasses.asdict(spec),
    }  # fmt: skip
    with contextlib.suppress(OSError):  # a read-only store: found out again at each start
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(content))
        scratch.replace(file)
        _forget_what_is_gone(file.parent)
    return spec


def _forget_what_is_gone(folder: Path) -> None:
    """Descriptions of folders that are no more, once there are many."""
    files = list(folder.glob("*.json"))
    for file in files if len(files) > _MANY else ():
        with contextlib.suppress(OSError, ValueError, KeyError):
            if not Path(json.loads(file.read_text())["folder"]).exists():
                file.unlink()


def _stamp(path: Path) -> list[int]:
    """Size and time of change: ctime, unlike mtime, cannot be set back by whoever changed the file."""
    stat = path.stat()
    return [stat.st_size, stat.st_ctime_ns]


def _from_json(fields: dict[str, Any]) -> ModelSpec:
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return ModelSpec(**fields | lists)
