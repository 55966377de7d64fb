"""What is served: names, sizes, and what each size costs and is worth. Built once when the pair is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.api.http.errors import APIError
from server.sizing.spec import SizeError, SizeSpec


@dataclass(frozen=True, slots=True)
class SizeInfo:
    """One size. Bytes are those of its own weights, as if it were served alone; KV bytes cover its layers."""

    layers: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    fraction: float  # of the teacher's parameters
    quality: Mapping[str, Any] | None = None

    def summary(self, reason: str) -> dict[str, Any]:
        """The `size` object of an answer."""
        return {
            "layers": self.layers,
            "parameters": self.parameters,
            "fraction": round(self.fraction, 4),
            "reason": reason,
        }


@dataclass(frozen=True, slots=True)
class Catalog:
    """Names and sizes. `sizes` are those that can be served, `missing` maps the others to the reason."""

    names: tuple[str, ...]
    infos: Mapping[int, SizeInfo]
    sizes: tuple[int, ...]
    missing: Mapping[int, str]
    max_model_len: int
    page_size: int
    root: str = ""
    total_bytes: int = 0  # weights of all sizes together
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def all_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({*self.sizes, *self.missing}))

    def model_id(self, size: int) -> str:
        return f"{self.name}:{size}L"

    def split_model(self, model: str | None) -> SizeSpec | None:
        """The size in a model id, None if it names none. 404 for a model or size that is not served here."""
        if model is None or model in self.names:
            return None
        name, separator, suffix = model.rpartition(":")
        if separator and name in self.names:
            try:
                return SizeSpec.parse(suffix)
            except SizeError as error:
                raise _no_model(model, str(error)) from None
        raise _no_model(model, f"served here: {', '.join(self.names)}")

    def resolve(self, spec: SizeSpec, param: str, *, status: int = 400) -> int:
        """A size that can be served; APIError names `param` and says why not."""
        try:
            size = spec.resolve(self.all_sizes, self._parameters())
        except SizeError as error:
            raise APIError(f"{param}: {error}", param=param, status=status) from None
        if size in self.missing:
            raise APIError(f"{param}: {size}L is not served here: {self.missing[size]}", param=param, status=status)
        return size

    def memory_bytes(self, size: int, num_tokens: int) -> int:
        """Own weights plus KV pages for `num_tokens` positions."""
        info = self.infos[size]
        pages = -(-num_tokens // self.page_size)
        return info.weight_bytes + pages * self.page_size * info.kv_bytes_per_token

    def _parameters(self) -> dict[int, int]:
        return {size: info.parameters for size, info in self.infos.items()}

    def cards(self) -> list[dict[str, Any]]:
        """`/v1/models`: the name itself (size chosen by policy), then one id per size."""
        cards = [self._card(name, self.name if name != self.name else None) for name in self.names]
        return cards + [self._card(self.model_id(size), self.name, self.infos[size]) for size in self.sizes]

    def card(self, model: str) -> dict[str, Any]:
        """One card; 404 if there is no such model. Any spelling of a size is understood."""
        spec = self.split_model(model)
        if spec is None or spec.is_auto:
            name = model if model in self.names else self.name
            return self._card(name, self.name if name != self.name else None)
        try:
            size = self.resolve(spec, "model", status=404)
        except APIError as error:
            raise _no_model(model, error.message) from None
        return self._card(self.model_id(size), self.name, self.infos[size])

    def _card(self, model: str, parent: str | None, info: SizeInfo | None = None) -> dict[str, Any]:
        card: dict[str, Any] = {
            "id": model,
            "object": "model",
            "created": self.created,
            "owned_by": "boomerang",
            "root": self.root or self.name,
            "parent": parent,
            "max_model_len": self.max_model_len,
            "permission": [],
        }
        if info is None:
            card["sizes"] = [f"{size}L" for size in self.sizes]
            card["missing_sizes"] = {f"{size}L": reason for size, reason in self.missing.items()}
        else:
            card |= {
                "layers": info.layers,
                "parameters": info.parameters,
                "bytes": info.weight_bytes,
                "kv_bytes_per_token": info.kv_bytes_per_token,
                "fraction": round(info.fraction, 4),
                "quality": dict(info.quality) if info.quality else None,
            }
        return card


def _no_model(model: str, detail: str) -> APIError:
    shown = model if len(model) <= 200 else model[:200] + "..."
    return APIError(f"The model {shown!r} does not exist: {detail}", param="model", status=404, code="model_not_found")


def size_infos(rows: list[dict[str, Any]]) -> dict[int, SizeInfo]:
    """From `Pair.size_table`: every size of the pair, loaded or not."""
    return {
        row["size"]: SizeInfo(
            layers=row["size"],
            parameters=row["parameters"],
            weight_bytes=row["weight_bytes"],
            kv_bytes_per_token=row["kv_bytes_per_token"],
            fraction=row["fraction"],
            quality=row["quality"] or None,
        )
        for row in rows
    }
