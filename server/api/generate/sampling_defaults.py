"""How the model's makers say that it is to be sampled: what a request leaves out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.api.generate.protocol import RepetitionDetection
from server.api.http.errors import from_validation

# Allowed ranges, those of the request fields of the same names.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 2**31),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "max_new_tokens": (0, 2**31),
}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Names are those of generation_config.json. Without one: OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 0  # of chats that set no limit; 0: what the context holds
    repetition_detection: RepetitionDetection | None = None  # of chats whose text nothing constrains

    def updated(self, values: Mapping[str, Any], source: str) -> SamplingDefaults:
        """With those of `values` that are sampling fields. ValueError names `source` and the field that is wrong."""
        changes: dict[str, Any] = {}
        if (asked := values.get("repetition_detection")) is not None:
            try:
                changes["repetition_detection"] = RepetitionDetection.model_validate(asked)
            except ValidationError as error:
                raise ValueError(f"{source}: repetition_detection: {from_validation(error).message}") from None
        for field in fields(self):
            value = values.get(field.name)
            if value is None or field.name not in _RANGES:
                continue
            low, high = _RANGES[field.name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{source}: {field.name} must be a number from {low:g} to {high:g}, not {value!r}")
            changes[field.name] = type(getattr(self, field.name))(value)
        return replace(self, **changes)

    def described(self) -> str:
        """Those that differ from OpenAI's, for the log."""
        plain, names = SamplingDefaults(), list(_RANGES)
        changed = [name for name in names if getattr(self, name) != getattr(plain, name)]
        return ", ".join(f"{name} {getattr(self, name):g}" for name in changed)


def read_sampling_defaults(folders: list[Path], overrides: str | None) -> SamplingDefaults:
    """From each folder's generation_config.json, then `overrides` (JSON object); later ones win. ValueError why not."""
    defaults = SamplingDefaults()
    for folder in folders:
        file = folder / "generation_config.json"
        if file.is_file():
            values = _object(file.read_text(), str(file))
            defaults = defaults.updated(values, str(file))
    if overrides:
        name = "--override-generation-config"
        values = _object(overrides, name)
        known = [field.name for field in fields(SamplingDefaults)]
        if unknown := values.keys() - set(known):
            raise ValueError(f"{name}: {sorted(unknown)[0]!r} is no sampling default; {', '.join(known)} are")
        defaults = defaults.updated(values, name)
    return defaults


def _object(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} is not a JSON object")
    return value
