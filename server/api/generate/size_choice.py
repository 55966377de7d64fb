"""The size fields of a request -> the sizes that may serve it, and its budget. Contradictions are 400 by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from server.api.generate.catalog import Catalog, check_width
from server.api.generate.protocol import SizeFields
from server.api.http.errors import APIError, invalid
from server.config import MiB, Settings
from server.core.request import Budget
from server.core.width import EXACT
from server.sizing.quality import GUESS
from server.sizing.spec import (
    AUTO,
    SizeError,
    SizeSpec,
    describe_sizes,
    describe_widths,
    parse_precision,
    precision_name,
    size_name,
)
from server.sizing.tenants import Tenant, Tenants, merge_budget


@dataclass(frozen=True, slots=True)
class SizeChoice:
    """What a caller allows: `sizes` ascending (one entry: pinned), why, limits; and widths, equal where pinned."""

    sizes: tuple[int, ...]
    reason: str
    budget: Budget
    schedule: tuple[tuple[int, int, int], ...] = ()  # (size, output tokens, width)
    priority: int = 0
    min_width: int = 0
    max_width: int = EXACT
    workload: str = ""  # kind of text whose quality counts; "": the one on which a size is worst

    def largest(self) -> SizeChoice:
        """The same, pinned to the largest of these sizes."""
        return self if len(self.sizes) == 1 else replace(self, sizes=self.sizes[-1:], reason="default")

    def within_memory(self, catalog: Catalog, num_tokens: int) -> SizeChoice:
        """Drop sizes whose own weights plus KV for `num_tokens` exceed the memory budget, and widths at which the
        largest that is left would; 400 if none is left."""
        limit = self.budget.memory
        if limit is None:
            return self
        widths = [width for width in catalog.widths if self.min_width <= width <= self.max_width]
        if self.schedule:
            points = [(size, width) for size, _, width in self.schedule]
        else:
            points = [(size, widths[0]) for size in self.sizes]
        need = {point: catalog.memory_bytes(point[0], num_tokens, point[1]) for point in points}
        fits = [point for point in points if need[point] <= limit]
        if not fits or (self.schedule and len(fits) < len(points)):
            worst = max(points, key=need.__getitem__) if self.schedule else points[0]
            which = "the largest of size_schedule" if self.schedule else "the smallest size allowed"
            raise invalid(
                f"memory_budget_mb: {size_name(*worst)}, {which}, needs {need[worst] / MiB:.1f} MiB for its weights "
                f"and the KV of {num_tokens} tokens; the limit is {limit / MiB:g}.",
                "memory_budget_mb",
            )
        if self.schedule:
            return self
        top = fits[-1][0]
        widest = max(width for width in widths if catalog.memory_bytes(top, num_tokens, width) <= limit)
        if len(fits) == len(points) and widest == widths[-1]:
            return self
        sizes = tuple(size for size, _ in fits)
        return replace(self, sizes=sizes, max_width=min(self.max_width, widest), reason="memory_budget")


class SizeChooser:
    """Parses size fields against one catalog, the server's own bounds and those of the caller's key."""

    def __init__(self, catalog: Catalog, settings: Settings, tenants: Tenants | None = None) -> None:
        """APIError if the size settings of the server or of a key cannot be met by this pair."""
        self.catalog = catalog
        self.tenants = tenants or Tenants()
        self.default = _parse(settings.size, "size")
        low, high = (_parse_bound(getattr(settings, name), name) for name in ("min_size", "max_size"))
        smallest = catalog.sizes[0] if low is None or low.is_auto else catalog.resolve(low, "min_size")
        largest = catalog.sizes[-1] if high is None or high.is_auto else catalog.resolve(high, "max_size")
        self.served = tuple(size for size in catalog.sizes if smallest <= size <= largest)
        if not self.served:
            raise invalid(f"min_size {smallest}L is above max_size {largest}L", "min_size")
        bounds = _width_bounds(settings.min_precision, settings.max_precision, low, high)
        self.widths = _within(catalog.widths, *bounds)
        self.precision = _precision(settings.precision, "precision")
        for width, param in ((self.default.width, "size"), (self.precision, "precision")):
            if width is not None:
                check_width(width, param, self.widths)
        if not self.default.is_auto:
            _check_served(catalog.resolve(self.default, "size"), "size", self.served)
        self.workload = self._workload(settings.workload)
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
        widths = tuple(width for width in self.widths if who.min_width <= width <= who.max_width)
        if not served or not widths:
            raise APIError("No size that this API key may use is served here.", param="size", status=403)
        choice = self._sizes(body, model_spec, served, widths)
        if choice.reason == "auto" and choice.sizes[-1] == served[-1] < self.served[-1]:
            choice = replace(choice, reason="tenant_ceiling")
        priority = body.priority
        if priority is None:
            priority = self.priority if who.priority is None else who.priority
        elif not tenant:  # without keys anybody could go before all others
            priority = max(priority, self.priority)
        kind = who.workload if body.workload is None else body.workload
        workload = self.workload if kind is None else self._workload(kind)
        return replace(choice, budget=self._budget(body, headers, who), priority=priority, workload=workload)

    # --- parts

    def _sizes(
        self, body: SizeFields, model_spec: SizeSpec | None, served: tuple[int, ...], widths: tuple[int, ...]
    ) -> SizeChoice:
        spec, param = self._spec(body, model_spec)
        low_spec, high_spec = (_parse_bound(getattr(body, name), name) for name in ("min_size", "max_size"))
        low, high = self._bounded(low_spec, "min_size", served), self._bounded(high_spec, "max_size", served)
        if low is not None and high is not None and low > high:
            raise invalid(f"min_size ({low}L) is above max_size ({high}L).", "min_size")
        bounds = _width_bounds(body.min_precision, body.max_precision, low_spec, high_spec)
        is_default = param == "default"
        if schedule := self._schedule(body, served, widths):
            if body.precision is not None or any(bound is not None for bound in bounds):
                raise invalid("size_schedule names its precisions itself (24L-q6).", "size_schedule")
            return _scheduled(schedule, spec, param, low, high)
        narrowest, widest = self._widths(body, spec, param, bounds, widths)
        if not spec.is_auto:
            size = self.catalog.resolve(spec, param)
            if is_default:
                size = min(max(size, served[0]), served[-1])
            _check_served(size, param, served)
            if low is not None and size < low and not is_default:
                raise invalid(f"{param} ({size}L) is below min_size ({low}L).", "min_size")
            if high is not None and size > high and not is_default:
                raise invalid(f"{param} ({size}L) is above max_size ({high}L).", "max_size")
            if not is_default or (low is None and high is None):
                reason = "default" if is_default else "requested"
                return SizeChoice((size,), reason, Budget(), min_width=narrowest, max_width=widest)
        sizes = tuple(s for s in served if (low is None or s >= low) and (high is None or s <= high))
        return SizeChoice(sizes, "auto", Budget(), min_width=narrowest, max_width=widest)

    def _widths(
        self,
        body: SizeFields,
        spec: SizeSpec,
        param: str,
        bounds: tuple[int | None, int | None],
        served: tuple[int, ...],
    ) -> tuple[int, int]:
        """The narrowest and the widest that may answer.

        A precision that is named pins it. A size that names none means the weights as they were loaded, unless the
        request says something of precision; what else `auto` leaves open is the scheduler's to choose.
        """
        named, is_default = spec.width, param == "default"
        precision = None if body.precision is None else _precision(body.precision, "precision")
        if is_default and body.precision is not None:
            named = None
        if named is not None and precision is not None and precision != named:
            raise invalid(
                f"{param} asks for {precision_name(named)} and precision for {precision_name(precision)}.", "precision"
            )
        width, source = (precision, "precision") if named is None else (named, param)
        says_nothing = body.precision is None and bounds == (None, None)
        is_default = is_default and width is not None and width == named
        if width is None and says_nothing and (spec.is_auto or param == "default") and self.precision is not None:
            width, is_default = min(max(self.precision, served[0]), served[-1]), True
        elif width is None and says_nothing and not spec.is_auto:
            width = served[-1]
        allowed = _within(served, *bounds)
        if width is None:
            return allowed[0], allowed[-1]
        if is_default and width not in allowed:
            width = min(max(width, allowed[0]), allowed[-1])
        if width in served and width not in allowed:
            where, bound = ("below", "min_precision") if width < allowed[0] else ("above", "max_precision")
            raise invalid(f"{source} ({precision_name(width)}) is {where} {bound}.", bound)
        check_width(width, source, served, status=404 if source == "model" else 400)
        return width, width

    def _workload(self, kind: str | None) -> str:
        """A kind of text that this pair was measured on; "" for none and for `worst`. APIError for others."""
        known = sorted({name for point in self.catalog.points for name in point.kl} - {GUESS})
        if kind is None or kind == "worst":
            return ""
        if kind not in known:
            there = f"it was measured on {', '.join(known)}" if known else "it was measured on one kind only"
            raise invalid(f"workload: nothing is known of {kind[:40]!r} for this pair; {there}.", "workload")
        return kind

    def _spec(self, body: SizeFields, model_spec: SizeSpec | None) -> tuple[SizeSpec, str]:
        named = _parse(body.size, "size") if body.size is not None else None
        if model_spec is None or (model_spec.is_auto and model_spec.width is None):
            if named is not None:
                return named, "size"
            return (AUTO, "model") if model_spec is not None else (self.default, "default")
        if named is not None and named.is_auto != model_spec.is_auto:
            raise invalid("model names a size and size says auto.", "size")
        if named is not None and not named.is_auto:
            by_model = self.catalog.resolve(model_spec, "model", status=404)
            by_size = self.catalog.resolve(named, "size")
            if by_model != by_size:
                raise invalid(f"model asks for {by_model}L and size for {by_size}L.", "size")
        if named is not None and named.width != model_spec.width:
            if named.width is not None and model_spec.width is not None:
                raise invalid(f"model asks for {model_spec} and size for {named}.", "size")
            return replace(model_spec, width=named.width or model_spec.width), "model"
        return model_spec, "model"

    def _bounded(self, spec: SizeSpec | None, param: str, served: tuple[int, ...]) -> int | None:
        if spec is None or spec.is_auto:
            return None
        return _check_served(self.catalog.resolve(spec, param), param, served)

    def _schedule(
        self, body: SizeFields, served: tuple[int, ...], widths: tuple[int, ...]
    ) -> tuple[tuple[int, int, int], ...]:
        """((size, output tokens, width), ...); 0 tokens: until the end."""
        if body.size_schedule is None:
            return ()
        if not body.size_schedule:
            raise invalid("size_schedule is an empty list.", "size_schedule")
        legs = []
        for index, leg in enumerate(body.size_schedule):
            param = f"size_schedule.{index}.size"
            spec = _parse(leg.size, param)
            if spec.is_auto:
                raise invalid(f"{param}: a schedule names sizes, not auto.", param)
            size = _check_served(self.catalog.resolve(spec, param), param, served)
            width = widths[-1] if spec.width is None else check_width(spec.width, param, widths)
            if leg.tokens is None and index < len(body.size_schedule) - 1:
                param = f"size_schedule.{index}.tokens"
                raise invalid(f"{param}: only the last entry may leave out tokens.", param)
            legs.append((size, leg.tokens or 0, width))
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


def _scheduled(
    schedule: tuple[tuple[int, int, int], ...], spec: SizeSpec, param: str, low: int | None, high: int | None
) -> SizeChoice:
    if not spec.is_auto and param != "default":
        raise invalid("size_schedule cannot be combined with a fixed size.", "size_schedule")
    for size, _, _ in schedule:
        if (low is not None and size < low) or (high is not None and size > high):
            raise invalid(f"size_schedule: {size}L is outside min_size .. max_size.", "size_schedule")
    size, _, width = schedule[0]
    return SizeChoice((size,), "schedule", Budget(), schedule, min_width=width, max_width=width)


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


def _parse_bound(value: str | int | float | None, param: str) -> SizeSpec | None:
    """A bound; None for none or `auto`."""
    spec = None if value is None else _parse(value, param)
    return None if spec is None or (spec.is_auto and spec.width is None) else spec


def _precision(value: str | None, param: str) -> int | None:
    try:
        return None if value is None else parse_precision(value)
    except SizeError as error:
        raise invalid(f"{param}: {error}", param) from None


def _width_bounds(
    low: str | None, high: str | None, min_size: SizeSpec | None, max_size: SizeSpec | None
) -> tuple[int | None, int | None]:
    """(narrowest, widest) that `min_precision` and `max_precision` allow, or bounds of size that name a precision."""
    found: list[int | None] = []
    for text, spec, name in ((low, min_size, "min"), (high, max_size, "max")):
        width, named = _precision(text, f"{name}_precision"), None if spec is None else spec.width
        if width is not None and named not in (None, width):
            raise invalid(f"{name}_size names another precision than {name}_precision.", f"{name}_precision")
        found.append(named if width is None else width)
    return found[0], found[1]


def _within(widths: tuple[int, ...], low: int | None, high: int | None) -> tuple[int, ...]:
    """Those of `widths` within the bounds; 400 if there are none."""
    found = tuple(w for w in widths if (low is None or w >= low) and (high is None or w <= high))
    if not found:
        is_low = low is not None and (high is None or low > high or low > widths[-1])
        param, verb = "min_precision" if is_low else "max_precision", "is" if len(widths) == 1 else "are"
        raise invalid(f"{param}: {describe_widths(widths)} {verb} served here, none within these bounds.", param)
    return found


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
