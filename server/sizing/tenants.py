"""Tenants: what an API key stands for when the server decides who gets how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from server.engine.request import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Sizes in layers; `weight` is the share under contention; a lower `rank` is served strictly first."""

    name: str = ""
    weight: float = 1.0
    rank: int = 0
    min_size: int | None = None
    max_size: int | None = None
    budget: Budget = field(default_factory=Budget)  # for requests that bring no limit of their own


class Tenants:
    """Every known tenant over one default; unknown names get the default's settings under their own name."""

    def __init__(self, tenants: Sequence[Tenant] = (), default: Tenant | None = None) -> None:
        self.default = default or Tenant()
        self._by_name = {tenant.name: tenant for tenant in tenants}

    def __getitem__(self, name: str) -> Tenant:
        return self._by_name.get(name, self.default)

    def weight(self, name: str) -> float:
        return self[name].weight

    def rank(self, name: str) -> int:
        return self[name].rank


def merge_budget(own: Budget, *defaults: Budget) -> Budget:
    """Limits that `own` leaves open are filled from `defaults`, the first that has one. `strict` is the request's."""
    for default in defaults:
        own = replace(
            own,
            ttft=default.ttft if own.ttft is None else own.ttft,
            tpot=default.tpot if own.tpot is None else own.tpot,
            e2e=default.e2e if own.e2e is None else own.e2e,
            memory=default.memory if own.memory is None else own.memory,
        )
    return own


_MS = {"slo_ttft_ms": "ttft", "slo_tpot_ms": "tpot", "slo_e2e_ms": "e2e"}


def tenant_from_config(entry: Mapping[str, Any], resolve_size: Callable[[Any], int]) -> Tenant:
    """One YAML entry `{tenant, weight, rank, min_size, max_size, slo_ttft_ms, slo_tpot_ms, slo_e2e_ms, slo_policy,
    memory_budget_mb}`; `key` is ignored here. `resolve_size` turns "24L", "75%"... into layers.

    Raises ValueError naming the field.
    """
    known = {"key", "tenant", "weight", "rank", "min_size", "max_size", "slo_policy", "memory_budget_mb", *_MS}
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"tenant {entry.get('tenant')!r}: there is no setting {unknown[0]!r}")

    def number(name: str) -> float | None:
        value = entry.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"tenant {entry.get('tenant')!r}: {name} must be a number above 0, not {value!r}")
        return float(value)

    limits = {target: number(name) for name, target in _MS.items()}
    memory = number("memory_budget_mb")
    strict = entry.get("slo_policy", "best_effort")
    if strict not in ("best_effort", "strict"):
        raise ValueError(f"tenant {entry.get('tenant')!r}: slo_policy is best_effort or strict, not {strict!r}")
    sizes = {}
    for name in ("min_size", "max_size"):
        sizes[name] = None if entry.get(name) is None else resolve_size(entry[name])
    if None not in sizes.values() and sizes["min_size"] > sizes["max_size"]:
        raise ValueError(f"tenant {entry.get('tenant')!r}: min_size is above max_size")
    rank = entry.get("rank", 0)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"tenant {entry.get('tenant')!r}: rank must be a whole number, not {rank!r}")
    return Tenant(
        name=str(entry.get("tenant", "")),
        weight=number("weight") or 1.0,
        rank=rank,
        budget=Budget(
            **{name: value / 1000.0 if value is not None else None for name, value in limits.items()},
            memory=None if memory is None else int(memory * (1 << 20)),
            strict=strict == "strict",
        ),
        **sizes,
    )
