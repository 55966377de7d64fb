"""The size fields of a request -> the sizes that may serve it, and its budget. Contradictions are 400 by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from server.api.catalog import Catalog
from server.api.errors import APIError, invalid
from server.api.protocol import SizeFields
from server.config import MiB, Settings
from server.engine.request import Budget
from server.sizing.spec import AUTO, SizeError, SizeSpec


@dataclass(frozen=True, slots=True)
class SizeChoice:
    """What a caller allows: `sizes` ascending (one entry: pinned), why, and limits."""

    sizes: tuple[int, ...]
    reason: str
    budget: Budget
    schedule: tuple[tuple[int, int], ...] = ()

    def within_memory(self, catalog: Catalog, num_tokens: int) -> SizeChoice:
        """Drop sizes whose own weights plus KV for `num_tokens` exceed the memory budget; 400 if none is left."""
        limit = self.budget.memory
        if limit is None:
            return self
        fits = tuple(size for size in self.sizes if catalog.memory_bytes(size, num_tokens) <= limit)
        if not fits:
            need = catalog.memory_bytes(self.sizes[0], num_tokens) / MiB
            raise invalid(
                f"memory_budget_mb: {self.sizes[0]}L, the smallest size allowed, needs {need:.1f} MiB for its weights "
                f"and the KV of {num_tokens} tokens.",
                "memory_budget_mb",
            )
        if fits == self.sizes:
            return self
        if self.schedule and not {size for size, _ in self.schedule} <= set(fits):
            raise invalid("memory_budget_mb: size_schedule names a size that does not fit.", "memory_budget_mb")
        return replace(self, sizes=fits, reason="memory_budget")


class SizeChooser:
    """Parses size fields against one catalog and the server's own bounds."""

    def __init__(self, catalog: Catalog, settings: Settings) -> None:
        """APIError if the server's own size settings cannot be met by this pair."""
        self.catalog = catalog
        self.default = _parse(settings.size, "size")
        low = self._size(settings.min_size, "min_size") or catalog.sizes[0]
        high = self._size(settings.max_size, "max_size") or catalog.sizes[-1]
        self.served = tuple(size for size in catalog.sizes if low <= size <= high)
        if not self.served:
            raise invalid(f"min_size {low}L is above max_size {high}L", "min_size")
        if not self.default.is_auto:
            self._check_served(catalog.resolve(self.default, "size"), "size")
        self.ttft, self.tpot, self.e2e = settings.slo_ttft_ms, settings.slo_tpot_ms, settings.slo_e2e_ms
        self.is_strict = settings.slo_policy == "strict"

    def choose(self, body: SizeFields, model_spec: SizeSpec | None, headers: Mapping[str, str]) -> SizeChoice:
        """`model_spec` is the size in the model id, if any. Memory is looked at later, when the prompt is counted."""
        spec, param = self._spec(body, model_spec)
        low = self._bounded(body.min_size, "min_size")
        high = self._bounded(body.max_size, "max_size")
        if low is not None and high is not None and low > high:
            raise invalid(f"min_size ({low}L) is above max_size ({high}L).", "min_size")
        schedule = self._schedule(body)
        budget = self._budget(body, headers)
        if schedule:
            return self._scheduled(schedule, spec, param, low, high, budget)
        if not spec.is_auto:
            size = self._check_served(self.catalog.resolve(spec, param), param)
            is_default = param == "default"
            if low is not None and size < low and not is_default:
                raise invalid(f"{param} ({size}L) is below min_size ({low}L).", "min_size")
            if high is not None and size > high and not is_default:
                raise invalid(f"{param} ({size}L) is above max_size ({high}L).", "max_size")
            if not is_default or (low is None and high is None):
                return SizeChoice((size,), "default" if is_default else "requested", budget)
        sizes = tuple(s for s in self.served if (low is None or s >= low) and (high is None or s <= high))
        if not sizes:
            raise invalid("min_size and max_size leave no size that is served.", "min_size")
        return SizeChoice(sizes, "auto", budget)

    # --- parts

    def _spec(self, body: SizeFields, model_spec: SizeSpec | None) -> tuple[SizeSpec, str]:
        named = _parse(body.size, "size") if body.size is not None else None
        if model_spec is None or model_spec.is_auto:
            if named is not None:
                return named, "size"
            return (AUTO, "model") if model_spec is not None else (self.default, "default")
        if named is not None and not named.is_auto:
            by_model = self.catalog.resolve(model_spec, "model", status=404)
            by_size = self.catalog.resolve(named, "size")
            if by_model != by_size:
                raise invalid(f"model asks for {by_model}L and size for {by_size}L.", "size")
        elif named is not None:
            raise invalid("model names a size and size says auto.", "size")
        return model_spec, "model"

    def _size(self, value: str | int | float | None, param: str) -> int | None:
        if value is None:
            return None
        spec = _parse(value, param)
        return None if spec.is_auto else self.catalog.resolve(spec, param)

    def _bounded(self, value: str | int | float | None, param: str) -> int | None:
        size = self._size(value, param)
        return None if size is None else self._check_served(size, param)

    def _check_served(self, size: int, param: str) -> int:
        if size not in self.served:
            served = f"{self.served[0]}L .. {self.served[-1]}L"
            status, name = (404, "model") if param == "model" else (400, param)
            raise APIError(f"{name}: {size}L is not served here; {served} are.", param=name, status=status)
        return size

    def _schedule(self, body: SizeFields) -> tuple[tuple[int, int], ...]:
        if not body.size_schedule:
            return ()
        legs = []
        for index, leg in enumerate(body.size_schedule):
            param = f"size_schedule.{index}.size"
            size = self._bounded(leg.size, param)
            if size is None:
                raise invalid(f"{param}: a schedule names sizes, not auto.", param)
            is_last = index == len(body.size_schedule) - 1
            if leg.tokens is None and not is_last:
                param = f"size_schedule.{index}.tokens"
                raise invalid("size_schedule: only the last entry may leave out tokens.", param)
            legs.append((size, leg.tokens or 0))
        return tuple(legs)

    def _scheduled(self, schedule, spec: SizeSpec, param: str, low, high, budget: Budget) -> SizeChoice:
        if not spec.is_auto and param != "default":
            raise invalid("size_schedule cannot be combined with a fixed size.", "size_schedule")
        for size, _ in schedule:
            if (low is not None and size < low) or (high is not None and size > high):
                raise invalid(f"size_schedule: {size}L is outside min_size .. max_size.", "size_schedule")
        return SizeChoice((schedule[0][0],), "schedule", budget, schedule)

    def _budget(self, body: SizeFields, headers: Mapping[str, str]) -> Budget:
        slo = body.slo
        ttft = _latency("slo.ttft_ms", slo.ttft_ms if slo else None, headers.get("x-slo-ttft-ms"), "x-slo-ttft-ms")
        tpot = _latency("slo.tpot_ms", slo.tpot_ms if slo else None, headers.get("x-slo-tpot-ms"), "x-slo-tpot-ms")
        e2e = slo.e2e_ms if slo else None
        ttft, tpot, e2e = ttft or self.ttft, tpot or self.tpot, e2e or self.e2e
        strict = self.is_strict if body.slo_policy is None else body.slo_policy == "strict"
        memory = None if body.memory_budget_mb is None else int(body.memory_budget_mb * MiB)
        seconds = [None if value is None else value / 1000 for value in (ttft, tpot, e2e)]
        return Budget(ttft=seconds[0], tpot=seconds[1], e2e=seconds[2], memory=memory, strict=strict)


def _parse(value: str | int | float, param: str) -> SizeSpec:
    try:
        return SizeSpec.parse(value)
    except SizeError as error:
        raise invalid(f"{param}: {error}", param) from None


def _latency(param: str, value: float | None, header: str | None, name: str) -> float | None:
    """Milliseconds from the body or the header; 400 if they disagree."""
    if header is None:
        return value
    try:
        number = float(header)
    except ValueError:
        number = -1.0
    if not 0 < number <= 1e12:
        raise invalid(f"{name}: {header[:40]!r} is not a positive number of milliseconds.", name)
    if value is not None and value != number:
        raise invalid(f"{param} and the header {name} disagree.", param)
    return number
