"""What `boomerang evaluate` measured of a pair, read from quality.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from model_store.errors import PairError
from model_store.files import read_json_if_there


def read_quality(file: Path) -> dict[int, dict[str, Any]]:
    """What `evaluate` wrote, by size; PairError for what it did not."""
    sizes = read_json_if_there(file).get("sizes", {})
    if isinstance(sizes, dict) and all(
        size.isdecimal() and isinstance(row, dict) and (row.get("kl") is None or _is_kl(row["kl"]))
        for size, row in sizes.items()
    ):
        return {int(size): row for size, row in sizes.items()}
    raise PairError(f"{file}: sizes does not give figures for each size: run boomerang evaluate, or delete the file")


def _is_kl(value: Any) -> bool:
    """Policies compare these, and metrics add them up."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6


def read_kinds(file: Path) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """What `evaluate` wrote of each kind of text; PairError for what it did not."""
    kinds = read_json_if_there(file).get("kinds", {})
    names = {"sizes": r"\d+", "widths": r"\d+", "points": r"[1-9]\d{0,4}L(-q[1-9])?"}

    def is_table(value: Any, pattern: str) -> bool:
        return isinstance(value, dict) and all(
            re.fullmatch(pattern, name) and isinstance(row, dict) and _is_kl(row.get("kl"))
            for name, row in value.items()
        )

    if isinstance(kinds, dict) and all(
        isinstance(kind, dict) and all(is_table(kind.get(name, {}), pattern) for name, pattern in names.items())
        for kind in kinds.values()
    ):
        return {name: {table: kind.get(table, {}) for table in names} for name, kind in kinds.items()}
    raise PairError(f"{file}: kinds does not give figures by kind of text: run boomerang evaluate, or delete the file")
