"""Drafts: for each speculating request a second sequence that runs ahead of it, on less of the weights. No torch.

A draft is a `LiveRequest` that no queue knows. On a smaller path it has block tables and pages of its own, which are
worth less than anybody's: when the scheduler runs out, drafts go before a request is preempted, and a request whose
draft is gone simply goes on without. On the request's own path it reads fewer bits and the request's own KV: what it
writes there at positions yet to come is written again by the step that verifies it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from model_store.assembly import LayerPath
from server.core.request import LiveRequest
from server.core.width import precision_name
from server.engine.kv_cache import KVCacheManager


class Drafts(Protocol):
    """The drafts of running requests."""

    name: str  # what metrics call what guesses: layers, precision, or both

    def serves(self, request: LiveRequest) -> bool:
        """Whether drafts of this request would be cheaper than it is."""

    def size_of(self, request: LiveRequest) -> int:
        """Layers that a draft of this request runs."""

    def width_of(self, request: LiveRequest) -> int:
        """Bits that it reads."""

    def draft_of(self, request: LiveRequest) -> LiveRequest | None:
        """The request's draft, brought level with it: what it computed beyond the request's tokens is taken back.

        Made on first use; None if there is no room for one.
        """

    def allocate(self, draft: LiveRequest, num_tokens: int) -> bool:
        """Make room for the draft's KV up to `num_tokens`, where the request has its own; False if there is none."""

    def drop(self, request_id: str) -> None:
        """Idempotent."""

    def release(self) -> bool:
        """Give back the pages of the largest draft; False if there is none."""

    def check_integrity(self, running: list[LiveRequest]) -> list[LiveRequest]:
        """Assert that every draft belongs to a running request. Those that own KV."""


def _make(request: LiveRequest, path: LayerPath, width: int) -> LiveRequest:
    """A draft without KV that knows the request's tokens."""
    sampling = replace(request.sampling, logprobs=None, prompt_logprobs=None)
    asked = replace(request.asked, sampling=sampling, sizes=(path.size,), size_schedule=(), grammar=None)
    draft = LiveRequest(asked)
    draft.path, draft.width = path, width
    draft.output_token_ids = list(request.output_token_ids)
    return draft


def _catch_up(draft: LiveRequest, request: LiveRequest) -> None:
    """All but its last guesses are the request's own tokens; of those only the newest can differ."""
    known = min(len(draft.output_token_ids), len(request.output_token_ids) - 1)
    draft.output_token_ids[known:] = request.output_token_ids[known:]


class DraftPool:
    """Drafts of one smaller size. `slots` are rows of the block tables that belong to drafts alone."""

    def __init__(self, kv_cache: KVCacheManager, path: LayerPath, slots: range, width: int | None = None) -> None:
        """`width`: bits that they read at most; None: as many as their requests."""
        self.kv_cache = kv_cache
        self.path = path
        self.width = width
        self.name = str(path.size) if width is None else f"{path.size}-{precision_name(width)}"
        self.drafts: dict[str, LiveRequest] = {}
        self._slots = slots
        self._free_slots = list(slots)[::-1]

    def serves(self, request: LiveRequest) -> bool:
        return request.path.size > self.path.size

    def size_of(self, request: LiveRequest) -> int:
        return self.path.size

    def width_of(self, request: LiveRequest) -> int:
        return request.width if self.width is None else min(self.width, request.width)

    def draft_of(self, request: LiveRequest) -> LiveRequest | None:
        draft = self.drafts.get(request.request_id)
        if draft is None:
            if not self._free_slots:
                return None
            draft = self.drafts[request.request_id] = _make(request, self.path, self.width_of(request))
            draft.slot = self._free_slots.pop()
            self.kv_cache.adopt(draft, self.kv_cache.find_prefix(draft, self.path, counts=False))
        draft.num_computed_tokens = min(draft.num_computed_tokens, request.num_tokens - 1)
        _catch_up(draft, request)
        # Only now are these tokens certain: a cached block must never be written again.
        draft.kv_width = min(draft.kv_width, draft.width)
        self.kv_cache.cache_full_blocks(draft)
        draft.width = self.width_of(request)
        return draft

    def allocate(self, draft: LiveRequest, num_tokens: int) -> bool:
        return self.kv_cache.allocate(draft, num_tokens)

    def drop(self, request_id: str) -> None:
        draft = self.drafts.pop(request_id, None)
        if draft is not None:
            self.kv_cache.free(draft)
            self._free_slots.append(draft.slot)

    def release(self) -> bool:
        if not self.drafts:
            return False
        self.drop(max(self.drafts.values(), key=lambda draft: len(draft.blocks)).request_id)
        return True

    def check_integrity(self, running: list[LiveRequest]) -> list[LiveRequest]:
        names = {request.request_id for request in running}
        assert names.issuperset(self.drafts), "a draft has outlived its request"
        slots = sorted(self._free_slots + [draft.slot for draft in self.drafts.values()])
        assert slots == list(self._slots), "a draft's slot leaked or has two owners"
        return list(self.drafts.values())


class OwnDrafts:
    """Drafts at fewer bits on the requests' own paths and KV."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.name = precision_name(width)
        self.drafts: dict[str, LiveRequest] = {}

    def serves(self, request: LiveRequest) -> bool:
        return request.width > self.width

    def size_of(self, request: LiveRequest) -> int:
        return request.path.size

    def width_of(self, request: LiveRequest) -> int:
        return self.width

    def draft_of(self, request: LiveRequest) -> LiveRequest:
        draft = self.drafts.get(request.request_id)
        if draft is None or draft.path is not request.path:
            draft = self.drafts[request.request_id] = _make(request, request.path, self.width)
        draft.slot = request.slot
        draft.num_computed_tokens = request.num_computed_tokens
        _catch_up(draft, request)
        return draft

    def allocate(self, draft: LiveRequest, num_tokens: int) -> bool:
        return True  # it is the request's

    def drop(self, request_id: str) -> None:
        self.drafts.pop(request_id, None)

    def release(self) -> bool:
        return False

    def check_integrity(self, running: list[LiveRequest]) -> list[LiveRequest]:
        names = {request.request_id for request in running}
        assert names.issuperset(self.drafts), "a draft has outlived its request"
        return []
