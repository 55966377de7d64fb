"""Students made on this machine: where the store keeps them, and how far the next one is.

A teacher's students lie in one folder of the store as v1, v2, ...: each appears whole or not at all, and the newest one
is what is served where no student is named. Beside them `progress.json` says how the next one comes along.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from model_store.files import read_json_if_there

_WORK = "work"  # what is being made, and what it can go on from


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a student is. `kl` by size: the last that was measured, in nats per token of text held back."""

    stage: str
    share: float = 0.0  # of the work that is done, 0 to 1
    kl: Mapping[int, float] = field(default_factory=dict)
    updated: float = 0.0  # seconds since the epoch

    @property
    def is_done(self) -> bool:
        return self.share >= 1.0

    def __str__(self) -> str:
        kl = ", ".join(f"{size}L {value:.3f}" for size, value in sorted(self.kl.items(), reverse=True))
        return f"{self.share:.0%}, {self.stage}" + (f", KL so far {kl}" if kl else "")


def version_of(folder: Path) -> int:
    """The number in a student's folder name; 0 for any other name."""
    match = re.fullmatch(r"v(\d+)", folder.name)
    return int(match[1]) if match else 0


def newest(folder: Path) -> Path | None:
    """The newest student in a teacher's folder."""
    found = [path for path in folder.glob("v*") if version_of(path) and (path / "pair.json").is_file()]
    return max(found, key=version_of, default=None)


def work_folder(folder: Path) -> Path:
    """Where the next student is made."""
    work = folder / _WORK
    work.mkdir(parents=True, exist_ok=True)
    return work


def publish(folder: Path, made: Path) -> Path:
    """Move a finished student to its place as the newest one; all but the one before it are deleted."""
    last = newest(folder)
    number = 0 if last is None else version_of(last)
    target = folder / f"v{number + 1}"
    os.replace(made, target)
    for old in folder.glob("v*"):
        if 0 < version_of(old) < number:
            shutil.rmtree(old, ignore_errors=True)
    return target


def only_one(folder: Path) -> FileLock:
    """While it is held no other process makes students for this teacher: whoever comes second waits."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "making.lock")


def write_progress(folder: Path, progress: Progress) -> None:
    """A file that cannot be written costs a line of `boomerang sizes`, no more."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "progress.part"
        part.write_text(json.dumps(asdict(progress) | {"updated": time.time()}) + "\n")
        os.replace(part, folder / "progress.json")


def read_progress(folder: Path) -> Progress | None:
    """What was written last; None if nothing was, or it cannot be read."""
    try:
        content: dict[str, Any] = read_json_if_there(folder / "progress.json")
        kl = {int(size): float(value) for size, value in content.get("kl", {}).items()}
        return Progress(content["stage"], content["share"], kl, content["updated"])
    except (KeyError, ValueError, OSError, AttributeError):
        return None
