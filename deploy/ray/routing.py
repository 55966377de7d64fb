"""Which replica answers: one that has this prompt's beginning in its KV cache and runs this size, unless it is busy.

What a request is about stands in headers, which a middleware of the proxy fills (deploy/ray/headers.py). Start the
cluster with RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.routing:middlewares.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.middleware import Middleware

from deploy.ray.headers import RoutingHeaders

__all__ = ["PrefixAndSizeRouter", "middlewares"]


def middlewares() -> list[Middleware]:
    return [Middleware(RoutingHeaders)]


class PrefixAndSizeRouter(FIFOMixin, RequestRouter):
    """Least loaded, with affinity: a replica that served this prefix, else one that runs this size, if not busier than
    the least loaded by more than `max_imbalance` requests. The last `max_prefixes` prefixes are remembered.
    """

    def initialize_state(self, max_imbalance: int = 4, max_prefixes: int = 10_000) -> None:
        self.max_imbalance, self.max_prefixes = max_imbalance, max_prefixes
        self.owners: OrderedDict[str, Any] = OrderedDict()  # prefix -> replica id

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates, best first; Serve tries the first rank that accepts."""
        if not candidate_replicas:
            return []
        load = {replica.replica_id: self._load(replica) for replica in candidate_replicas}
        by_load = sorted(candidate_replicas, key=lambda replica: load[replica.replica_id])
        prefix, size = _keys_of(pending_request)
        limit = load[by_load[0].replica_id] + self.max_imbalance
        owner = self.owners.get(prefix) if prefix else None

        def rank(replica: RunningReplica) -> int:
            if load[replica.replica_id] > limit:
                return 2
            if replica.replica_id == owner:
                return 0
            # A size that runs already costs only its rows; a new one costs its weights once more per step.
            return 1 if size and size in (replica.routing_stats or {}).get("sizes", ()) else 2

        ordered = sorted(by_load, key=rank)  # stable: least loaded first within a rank
        return [[replica] for replica in ordered]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        prefix, _ = _keys_of(pending_request)
        if prefix:
            self.owners[prefix] = replica_id
            self.owners.move_to_end(prefix)
            while len(self.owners) > self.max_prefixes:
                self.owners.popitem(last=False)

    def _load(self, replica: RunningReplica) -> int:
        """Requests in flight, as last heard; an unknown replica is taken as idle, so that new ones get work."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _keys_of(pending_request: PendingRequest | None) -> tuple[str, str]:
    """(prefix, size in layers) as the middleware, or the client, wrote them; empty strings where absent."""
    if pending_request is None:
        return "", ""
    metadata = pending_request.metadata
    return metadata.session_id or "", (metadata.multiplexed_model_id or "").removesuffix("L")
