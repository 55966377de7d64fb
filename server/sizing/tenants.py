"""Tenants: what an API key stands for when the server decides who gets how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from server.core.request import Budget
from server.core.width import EXACT
from server.sizing.spec import SizeSpec, parse_precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Sizes in layers; `weight` is the share under contention; a lower `rank` is served strictly first."""

    name: str = ""
    weight: float = 1.0
    rank: int = 0
    min_size: int | None = None
    max_size: int | None = None
    min_width: int = 0
    max_width: int = EXACT
    workload: str | None = None  # of requests that name none
    budget: Budget = field(default_factory=Budget)  # for requests that bring no limit of their own
    strict: bool | None = None  # None: the server's own slo_policy
    priority: int | None = None  # of requests that name none; None: the server's own

    def bound(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Those of `sizes` that this tenant may be served."""
        low, high = self.min_size or 0, self.max_size or max(sizes, default=0)
        return tuple(size for size in sizes if low <= size <= high)


class Tenants:
    """Every known tenant over one default; unknown names get the default's settings under their own name."""

    def __init__(self, tenants: Sequence[Tenant] = (), default: Tenant | None = None) -> None:
        self.default = default or Tenant()
        self._by_name = {tenant.name: tenant for tenant in tenants}

    def take(self, other: Tenants) -> None:
        """Be `other` from now on, for all who hold this object."""
        self.default, self._by_name = other.default, other._by_name

    def __getitem__(self, name: str) -> Tenant:
        return self._by_name.get(name, self.default)

    def weight(self, name: str) -> float:
        return self._by_name.get(name, self.default).weight

    def rank(self, name: str) -> int:
        return self[name].rank


_TIMES = ("ttft", "tpot", "e2e")
_LIMITS = (*_TIMES, "memory")


def merge_budget(own: Budget, *defaults: Budget) -> Budget:
    """Limits that `own` leaves open come from `defaults`, the first that has one. `strict` stays the request's."""
    inherited: dict[str, Any] = {}
    for default in defaults:
        for name in _LIMITS:
            value = getattr(default, name)
            if value is not None and getattr(own, name) is None and name not in inherited:
                inherited[name] = value
    return replace(own, **inherited, inherited=own.inherited | set(inherited)) if inherited else own


_SETTINGS = (
    *("tenant", "weight", "rank", "min_size", "max_size", "min_precision", "max_precision", "workload"),
    *("slo_policy", "memory_budget_mb", "priority"),
    *(f"slo_{name}_ms" for name in _TIMES),
)


def tenant_from_config(entry: Mapping[str, Any], resolve_size: Callable[[Any], int]) -> Tenant:
    """One YAML entry of `_SETTINGS`. `resolve_size` turns "24L", "75%"... into layers. ValueError names the setting."""
    who = f"tenant {entry.get('tenant')!r}"
    if unknown := sorted(set(entry) - set(_SETTINGS)):
        raise ValueError(f"{who}: there is no setting {unknown[0]!r}; there are {', '.join(_SETTINGS)}")

    def number(name: str) -> float | None:
        value = entry.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{who}: {name} must be a number above 0, not {value!r}")
        return float(value)

    def whole(name: str) -> int | None:
        value = entry.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{who}: {name} must be a whole number, not {value!r}")
        return value

    policy = entry.get("slo_policy")
    if policy not in (None, "best_effort", "strict"):
        raise ValueError(f"{who}: slo_policy is best_effort or strict, not {policy!r}")
    smallest, largest = (
        None if entry.get(name) is None else resolve_size(entry[name]) for name in ("min_size", "max_size")
    )
    if smallest is not None and largest is not None and smallest > largest:
        raise ValueError(f"{who}: min_size is above max_size")
    narrowest, widest = (_width(entry, name) for name in ("min", "max"))
    if narrowest is not None and widest is not None and narrowest > widest:
        raise ValueError(f"{who}: min_precision is above max_precision")
    workload = entry.get("workload")
    if workload is not None and not isinstance(workload, str):
        raise ValueError(f"{who}: workload must be text, not {workload!r}")
    ttft, tpot, e2e = (None if (ms := number(f"slo_{name}_ms")) is None else ms / 1000.0 for name in _TIMES)
    memory = number("memory_budget_mb")
    return Tenant(
        name=str(entry.get("tenant", "")),
        weight=number("weight") or 1.0,
        rank=whole("rank") or 0,
        priority=whole("priority"),
        strict=None if policy is None else policy == "strict",
        budget=Budget(ttft=ttft, tpot=tpot, e2e=e2e, memory=None if memory is None else int(memory * (1 << 20))),
        min_size=smallest,
        max_size=largest,
        min_width=narrowest or 0,
        max_width=widest or EXACT,
        workload=workload,
    )


def _width(entry: Mapping[str, Any], name: str) -> int | None:
    """What `min_precision` says, or `min_size: 24L-q6`; ValueError."""
    text, size = entry.get(f"{name}_precision"), entry.get(f"{name}_size")
    named = None if size is None else SizeSpec.parse(size).width
    width = None if text is None else parse_precision(text)
    if width is not None and named not in (None, width):
        raise ValueError(f"tenant {entry.get('tenant')!r}: {name}_size names another precision than {name}_precision")
    return named if width is None else width
