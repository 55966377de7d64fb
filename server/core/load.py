"""Running totals of a scheduler's load, kept up as requests come, advance and go, so that a decision reads instead of
counting. Indexed by size (layers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from server.core.config import EngineConfig
from server.core.request import LiveRequest

if TYPE_CHECKING:
    from model_store.assembly import Elasticity, LayerPath


class Load:
    """What runs now: rows, context and uncomputed tokens by size; rows and tightest TPOT limit by tenant."""

    def __init__(self, num_teacher_layers: int) -> None:
        n = num_teacher_layers + 1
        self.rows = [0] * n  # requests
        self.context = [0] * n  # tokens that hold KV
        self.pending = [0] * n  # tokens not computed yet; 1 for each decoding request
        self.num_rows = 0
        # The same times layers, over all sizes
        self.layer_rows = self.layer_context = self.layer_pending = 0
        self.floors: dict[int, int] = {}  # least width that rows allow -> rows
        self.tenant_rows: dict[str, list[int]] = {}  # tenant -> rows by size
        self.held: dict[str, int] = {}  # tenant -> rows
        self._limits: dict[str, dict[float, int]] = {}  # tenant -> TPOT limit -> how many running requests have it
        self._tightest: dict[str, float] = {}  # tenant -> the smallest of them

    def enter(self, request: LiveRequest) -> None:
        """A request starts to run: `path` and `num_computed_tokens` are set."""
        size = request.path.size
        self.rows[size] += 1
        self.num_rows += 1
        self.floors[request.min_width] = self.floors.get(request.min_width, 0) + 1
        self._count(size, request.num_computed_tokens, request.num_tokens - request.num_computed_tokens, 1)
        rows = self.tenant_rows.get(request.tenant)
        if rows is None:
            rows = self.tenant_rows[request.tenant] = [0] * len(self.rows)
        rows[size] += 1
        self.held[request.tenant] = self.held.get(request.tenant, 0) + 1
        limit = request.budget.tpot
        if limit is not None:
            limits = self._limits.setdefault(request.tenant, {})
            limits[limit] = limits.get(limit, 0) + 1
            self._tightest[request.tenant] = min(limit, self._tightest.get(request.tenant, limit))

    def leave(self, request: LiveRequest) -> None:
        """It stops running; called before its blocks are freed."""
        size = request.path.size
        self.rows[size] -= 1
        self.num_rows -= 1
        self.floors[request.min_width] -= 1
        if not self.floors[request.min_width]:
            del self.floors[request.min_width]
        self._count(size, -request.num_computed_tokens, request.num_computed_tokens - request.num_tokens, -1)
        rows = self.tenant_rows[request.tenant]
        rows[size] -= 1
        self.held[request.tenant] -= 1
        if not self.held[request.tenant]:
            del self.tenant_rows[request.tenant], self.held[request.tenant]
        limit = request.budget.tpot
        if limit is not None:
            limits = self._limits[request.tenant]
            limits[limit] -= 1
            if not limits[limit]:
                del limits[limit]
                if not limits:
                    del self._limits[request.tenant], self._tightest[request.tenant]
                elif limit == self._tightest[request.tenant]:
                    self._tightest[request.tenant] = min(limits)

    def advance(self, request: LiveRequest, count: int, num_new: int) -> None:
        """`count` more of its tokens hold KV, and it gets `num_new`, which are now to be computed."""
        size = request.path.size
        self.context[size] += count
        self.layer_context += size * count
        if count != num_new:  # equal in most calls: while it decodes
            self.pending[size] += num_new - count
            self.layer_pending += size * (num_new - count)

    def _count(self, size: int, context: int, pending: int, rows: int = 0) -> None:
        self.context[size] += context
        self.pending[size] += pending
        self.layer_rows += size * rows
        self.layer_context += size * context
        self.layer_pending += size * pending

    def demanded_width(self) -> int:
        """The widest that some running row insists on; 0 without rows."""
        return max(self.floors, default=0)

    def tightest_tpot(self, skip: set[str] | frozenset[str] = frozenset()) -> float | None:
        """The smallest TPOT limit among running requests of tenants not in `skip`, in seconds."""
        if skip:
            return min((low for tenant, low in self._tightest.items() if tenant not in skip), default=None)
        return min(self._tightest.values(), default=None)

    def check(self, running: list[LiveRequest]) -> None:
        """Assert that the totals are what counting would give."""
        fresh = Load(len(self.rows) - 1)
        for request in running:
            fresh.enter(request)
        totals = ("num_rows", "layer_rows", "layer_context", "layer_pending")
        for name in ("rows", "context", "pending", *totals, "floors", "tenant_rows", "held", "_limits", "_tightest"):
            assert getattr(self, name) == getattr(fresh, name), f"load totals disagree on {name}"


class Queued(Protocol):
    """The requests that wait, as a decision may see them."""

    @property
    def num_tokens(self) -> int:
        """Tokens waiting to be computed, of all tenants."""

    def __len__(self) -> int: ...

    def waiting_of(self, tenant: str) -> tuple[int, int]:
        """Requests and tokens that a tenant has waiting."""

    def tenants(self) -> list[str]:
        """Tenants with something waiting."""


class Pages(Protocol):
    """The KV pool, as a decision may see it."""

    @property
    def num_pages(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def num_free_pages(self) -> int:
        """Pages that an allocation can have, those of idle cached blocks included."""

    def num_kept_layers(self, request: LiveRequest, path: LayerPath) -> int:
        """Layers of `path` that need not be computed again if the request moved there."""


class LoadView(Protocol):
    """All that a size policy may read of the engine, to be read only; the scheduler is one."""

    @property
    def load(self) -> Load: ...

    @property
    def config(self) -> EngineConfig: ...

    @property
    def elasticity(self) -> Elasticity: ...

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that the executor can read, ascending."""

    @property
    def running(self) -> Sequence[LiveRequest]: ...

    @property
    def waiting(self) -> Queued: ...

    @property
    def kv_cache(self) -> Pages: ...
