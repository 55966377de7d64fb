"""The size fields of a request -> the sizes that may serve it, and its budget. Contradictions are 400 by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from server.api.generate.catalog import Catalog
from server.api.generate.protocol import SizeFields
from server.api.http.errors import APIError, invalid
from server.config import MiB, Settings
from server.core.request import Budget
from server.sizing.spec import AUTO, SizeError, SizeSpec, describe_sizes
from server.sizing.tenants import Tenant, Tenants, merge_budget


@dataclass(frozen=True, slots=True)
class SizeChoice:
    """What a caller allows: `sizes` ascending (one entry: pinned), why, and limits."""

    sizes: tuple[int, ...]
    reason: str
    budget: Budget
    schedule: tuple[tuple[int, int], ...] = ()
    priority: int = 0

    def within_memory(self, catalog: Catalog, num_tokens: int) -> SizeChoice:
        """Drop sizes whose own weights plus KV for `num_tokens` exceed the memory budget; 400 if none is left."""
        limit = self.budget.memory
        if limit is None:
            return self
        wanted = tuple(size for size, _ in self.schedule) or self.sizes
        fits = tuple(size for size in wanted if catalog.memory_bytes(size, num_tokens) <= limit)
        if fits == wanted:
            return self
        if self.schedule or not fits:
            size = max(wanted) if self.schedule else wanted[0]
            which = "the largest of size_schedule" if self.schedule else "the smallest size allowed"
            need = catalog.memory_bytes(size, num_tokens) / MiB
            raise invalid(
                f"memory_budget_mb: {size}L, {which}, needs {need:.1f} MiB for its weights and the KV of {num_tokens} "
                f"tokens; the limit is {limit / MiB:g}.",
                "memory_budget_mb",
            )
        return replace(self, sizes=fits, reason="memory_budget")


class SizeChooser:
    """Parses size fields against one catalog, the server's own bounds and those of the caller's key."""

    def __init__(self, catalog: Catalog, settings: Settings, tenants: Tenants | None = None) -> None:
        """APIError if the size settings of the server or of a key cannot be met by this pair."""
        self.catalog = catalog
        self.tenants = tenants or Tenants()
        self.default = _parse(settings.size, "size")
        low = self.resolve(settings.min_size, "min_size") or catalog.sizes[0]
        high = self.resolve(settings.max_size, "max_size") or catalog.sizes[-1]
        self.served = tuple(size for size in catalog.sizes if low <= size <= high)
        if not self.served:
            raise invalid(f"min_size {low}L is above max_size {high}L", "min_size")
        if not self.default.is_auto:
            _check_served(catalog.resolve(self.default, "size"), "size", self.served)
        seconds = [_seconds(ms) for ms in (settings.slo_ttft_ms, settings.slo_tpot_ms, settings.slo_e2e_ms)]
        memory = settings.memory_budget_mb
        self.budget = Budget(
            ttft=seconds[0], tpot=seconds[1], e2e=seconds[2], memory=int(memory * MiB) if memory else None
        )
        self.is_strict = settings.slo_policy == "strict"
        self.priority = settings.priority

    def choose(
        self, body: SizeFields, model_spec: SizeSpec | None, headers: Mapping[str, str], tenant: str = ""
    ) -> SizeChoice:
        """`model_spec` is the size in the model id, if any. Memory is looked at later, when the prompt is counted."""
        who = self.tenants[tenant]
        served = who.bound(self.served)
        if not served:
            raise APIError("No size that this API key may use is served here.", param="size", status=403)
        choice = self._sizes(body, model_spec, served)
        if choice.reason == "auto" and choice.sizes[-1] == served[-1] < self.served[-1]:
            choice = replace(choice, reason="tenant_ceiling")
        priority = body.priority
        if priority is None:
            priority = self.priority if who.priority is None else who.priority
        return replace(choice, budget=self._budget(body, headers, who), priority=priority)

    def resolve(self, value: str | int | float | None, param: str) -> int | None:
        """A size in layers, None for none or `auto`; APIError names `param`."""
        if value is None:
            return None
        spec = _parse(value, param)
        return None if spec.is_auto else self.catalog.resolve(spec, param)

    # --- parts

    def _sizes(self, body: SizeFields, model_spec: SizeSpec | None, served: tuple[int, ...]) -> SizeChoice:
        spec, param = self._spec(body, model_spec)
        low = self._bounded(body.min_size, "min_size", served)
        high = self._bounded(body.max_size, "max_size", served)
        if low is not None and high is not None and low > high:
            raise invalid(f"min_size ({low}L) is above max_size ({high}L).", "min_size")
        if schedule := self._schedule(body, served):
            return _scheduled(schedule, spec, param, low, high)
        if not spec.is_auto:
            size, is_default = self.catalog.resolve(spec, param), param == "default"
            if is_default:
                size = min(max(size, served[0]), served[-1])
            _check_served(size, param, served)
            if low is not None and size < low and not is_default:
                raise invalid(f"{param} ({size}L) is below min_size ({low}L).", "min_size")
            if high is not None and size > high and not is_default:
                raise invalid(f"{param} ({size}L) is above max_size ({high}L).", "max_size")
            if not is_default or (low is None and high is None):
                return SizeChoice((size,), "default" if is_default else "requested", Budget())
        sizes = tuple(s for s in served if (low is None or s >= low) and (high is None or s <= high))
        return SizeChoice(sizes, "auto", Budget())

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

    def _bounded(self, value: str | int | float | None, param: str, served: tuple[int, ...]) -> int | None:
        size = self.resolve(value, param)
        return None if size is None else _check_served(size, param, served)

    def _schedule(self, body: SizeFields, served: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """((size, output tokens), ...); 0 tokens: until the end."""
        if body.size_schedule is None:
            return ()
        if not body.size_schedule:
            raise invalid("size_schedule is an empty list.", "size_schedule")
        legs = []
        for index, leg in enumerate(body.size_schedule):
            param = f"size_schedule.{index}.size"
            size = self._bounded(leg.size, param, served)
            if size is None:
                raise invalid(f"{param}: a schedule names sizes, not auto.", param)
            if leg.tokens is None and index < len(body.size_schedule) - 1:
                param = f"size_schedule.{index}.tokens"
                raise invalid(f"{param}: only the last entry may leave out tokens.", param)
            legs.append((size, leg.tokens or 0))
        return tuple(legs)

    def _budget(self, body: SizeFields, headers: Mapping[str, str], who: Tenant) -> Budget:
        slo = body.slo
        ttft = _latency("slo.ttft_ms", slo.ttft_ms if slo else None, headers.get("x-slo-ttft-ms"), "x-slo-ttft-ms")
        tpot = _latency("slo.tpot_ms", slo.tpot_ms if slo else None, headers.get("x-slo-tpot-ms"), "x-slo-tpot-ms")
        if body.slo_policy is None:
            strict = self.is_strict if who.strict is None else who.strict
        else:
            strict = body.slo_policy == "strict"
        memory = None if body.memory_budget_mb is None else int(body.memory_budget_mb * MiB)
        own = Budget(
            ttft=_seconds(ttft), tpot=_seconds(tpot), e2e=_seconds(slo.e2e_ms if slo else None), memory=memory,
            strict=strict,
        )  # fmt: skip
        return merge_budget(own, who.budget, self.budget)


def _scheduled(schedule, spec: SizeSpec, param: str, low: int | None, high: int | None) -> SizeChoice:
    if not spec.is_auto and param != "default":
        raise invalid("size_schedule cannot be combined with a fixed size.", "size_schedule")
    for size, _ in schedule:
        if (low is not None and size < low) or (high is not None and size > high):
            raise invalid(f"size_schedule: {size}L is outside min_size .. max_size.", "size_schedule")
    return SizeChoice((schedule[0][0],), "schedule", Budget(), schedule)


def _check_served(size: int, param: str, served: tuple[int, ...]) -> int:
    if size not in served:
        status, name = (404, "model") if param == "model" else (400, param)
        raise APIError(f"{name}: {size}L is not served here; {describe_sizes(served)} are.", param=name, status=status)
    return size


def _parse(value: str | int | float, param: str) -> SizeSpec:
    try:
        return SizeSpec.parse(value)
    except SizeError as error:
        raise invalid(f"{param}: {error}", param) from None


def _seconds(milliseconds: float | None) -> float | None:
    """0, like None, is no limit: the flags' way to say so."""
    return milliseconds / 1000 if milliseconds else None


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
