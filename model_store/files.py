"""Reads the small JSON files of a model folder. What is wrong with one is said with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model_store.errors import BoomerangError


class FileError(BoomerangError, ValueError):
    """A file that is not what its name says, with the reason."""


_LFS = b"version https://git-lfs"  # how a pointer begins that a clone without Git LFS has in place of a large file


def refuse_pointer(file: Path) -> None:
    """FileError for a pointer of Git LFS in place of the file itself."""
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise FileError(f"{file} is a pointer of Git LFS, not the file itself: git lfs pull")


def share(*files: Path) -> None:
    """Give files the mode that anything else written there gets: safetensors and tempfile leave theirs to one user."""
    for file in files:
        example = file.with_name(f".{file.name}.mode")
        example.touch()
        file.chmod(example.stat().st_mode & 0o777)
        example.unlink()


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. FileError if it cannot be read, is empty, not JSON in UTF-8, or no object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{file} is not text in UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        refuse_pointer(file)
        reason = "it is empty" if not file.stat().st_size else str(error)
        raise FileError(f"{file} is not valid JSON: {reason}") from error
    if not isinstance(value, dict):
        raise FileError(f"{file} is a JSON {type(value).__name__}, not an object")
    return value


def read_json_if_there(file: Path) -> dict[str, Any]:
    """As `read_json`; empty if there is no such file."""
    return read_json(file) if file.is_file() else {}
