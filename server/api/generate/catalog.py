"""What is served: names, sizes, and what each size costs and is worth. Built once when the pair is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.api.http.errors import APIError
from server.core.width import EXACT, precision_name
from server.sizing.points import PointInfo
from server.sizing.spec import SizeError, SizeSpec, describe_widths, size_name


@dataclass(frozen=True, slots=True)
class SizeInfo:
    """One depth. Bytes are those of its own weights, as if it were served alone; KV bytes cover its layers."""

    layers: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    fraction: float  # of the teacher's parameters
    quality: Mapping[str, Any] | None = None

    def summary(self, width: int, reason: str) -> dict[str, Any]:
        """The `size` object of an answer."""
        return {
            "name": size_name(self.layers, width),
            "layers": self.layers,
            "precision": precision_name(width),
            "parameters": self.parameters,
            "fraction": round(self.fraction, 4),
            "reason": reason,
        }


@dataclass(frozen=True, slots=True)
class Catalog:
    """Names, sizes and widths. `sizes` are those that can be served, `missing` maps the others to the reason."""

    names: tuple[str, ...]
    infos: Mapping[int, SizeInfo]
    sizes: tuple[int, ...]
    missing: Mapping[int, str]
    max_model_len: int
    page_size: int
    root: str = ""
    total_bytes: int = 0  # weights of all sizes together
    widths: tuple[int, ...] = (EXACT,)  # that rows may read, ascending
    bytes_per_weight: Mapping[int, float] = field(default_factory=dict)  # by width, as steps read it
    points: tuple[PointInfo, ...] = ()  # what was measured of (size, width); empty where precision is no dial
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def all_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({*self.sizes, *self.missing}))

    def model_id(self, size: int, width: int = EXACT) -> str:
        return f"{self.name}:{size_name(size, width)}"

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

    def width_of(self, spec: SizeSpec, param: str, *, status: int = 400) -> int:
        """The width that a size means: what it names, else as loaded. APIError if it is not served."""
        if spec.width is None:
            return self.widths[-1]
        return check_width(spec.width, param, self.widths, status=status)

    def weight_bytes(self, size: int, width: int = EXACT) -> int:
        """Own weights as a step reads them."""
        read = self.bytes_per_weight
        share = read[width] / read[self.widths[-1]] if width in read else 1.0
        return int(self.infos[size].weight_bytes * share)

    def memory_bytes(self, size: int, num_tokens: int, width: int = EXACT) -> int:
        """Own weights plus KV pages for `num_tokens` positions."""
        pages = -(-num_tokens // self.page_size)
        return self.weight_bytes(size, width) + pages * self.page_size * self.infos[size].kv_bytes_per_token

    def _parameters(self) -> dict[int, int]:
        return {size: info.parameters for size, info in self.infos.items()}

    def cards(self) -> list[dict[str, Any]]:
        """`/v1/models`: the name itself (size chosen by policy), one id per size as loaded, and one for each further
        point that `auto` may choose. Any other point is an id as well."""
        cards = [self._card(name, self.name if name != self.name else None) for name in self.names]
        exact = [(size, self.widths[-1]) for size in self.sizes]
        chosen = [(p.size, p.width) for p in self.points if p.best_in and p.size in self.sizes]
        return cards + [self._point_card(*point) for point in dict.fromkeys([*exact, *sorted(chosen, reverse=True)])]

    def card(self, model: str) -> dict[str, Any]:
        """One card; 404 if there is no such model. Any spelling of a size is understood."""
        spec = self.split_model(model)
        if spec is None or spec.is_auto:
            name = model if model in self.names else self.name
            return self._card(name, self.name if name != self.name else None)
        try:
            return self._point_card(self.resolve(spec, "model", status=404), self.width_of(spec, "model", status=404))
        except APIError as error:
            raise _no_model(model, error.message) from None

    def _point_card(self, size: int, width: int) -> dict[str, Any]:
        info = self.infos[size]
        card = self._card(self.model_id(size, width), self.name) | {
            "layers": info.layers,
            "precision": precision_name(width),
            "parameters": info.parameters,
            "bytes": self.weight_bytes(size, width),
            "kv_bytes_per_token": info.kv_bytes_per_token,
            "fraction": round(info.fraction, 4),
            "quality": dict(info.quality) if info.quality and width == self.widths[-1] else None,
        }
        point = next((point for point in self.points if (point.size, point.width) == (size, width)), None)
        return card if point is None else card | point.card()

    def _card(self, model: str, parent: str | None) -> dict[str, Any]:
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
        if parent is None or model in self.names:
            card["sizes"] = [f"{size}L" for size in self.sizes]
            card["precisions"] = [precision_name(width) for width in reversed(self.widths)]
            card["missing_sizes"] = {f"{size}L": reason for size, reason in self.missing.items()}
        return card


def check_width(width: int, param: str, served: tuple[int, ...], *, status: int = 400) -> int:
    """`width` if it is served; APIError names `param`."""
    if width not in served:
        verb = "is" if len(served) == 1 else "are"
        message = f"{param}: {precision_name(width)} is not served here; {describe_widths(served)} {verb}."
        raise APIError(message, param=param, status=status)
    return width


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
