"""Drafts: for each speculating request a second sequence on a smaller path, with block tables and pages of its own.

No torch. A draft is a `LiveRequest` that no queue knows. Its pages are worth less than anybody's: when the
scheduler runs out, drafts go before a request is preempted, and a request whose draft is gone simply goes on without.
"""

from __future__ import annotations

from dataclasses import replace

from model_store.assembly import LayerPath
from server.core.request import LiveRequest
from server.engine.kv_cache import KVCacheManager


class DraftPool:
    """The drafts of running requests. `slots` are rows of the block tables that belong to drafts alone."""

    def __init__(self, kv_cache: KVCacheManager, path: LayerPath, slots: range) -> None:
        self.kv_cache = kv_cache
        self.path = path
        self.drafts: dict[str, LiveRequest] = {}
        self._slots = slots
        self._free_slots = list(slots)[::-1]

    def draft_of(self, request: LiveRequest) -> LiveRequest | None:
        """The request's draft, brought level with it: what it computed beyond the request's tokens is taken back.

        Made on first use, with what the prefix cache has for it; None if there is no slot left.
        """
        draft = self.drafts.get(request.request_id)
        if draft is None:
            if not self._free_slots:
                return None
            draft = self._make(request)
        num_agreed = min(draft.num_computed_tokens, request.num_tokens - 1)
        draft.num_computed_tokens = num_agreed
        # All but its last guesses are the request's own tokens; of those only the newest can differ.
        known = min(len(draft.output_token_ids), len(request.output_token_ids) - 1)
        draft.output_token_ids[known:] = request.output_token_ids[known:]
        # Only now are these tokens certain: a cached block must never be written again.
        draft.kv_width = min(draft.kv_width, draft.width)
        self.kv_cache.cache_full_blocks(draft)
        draft.width = request.width
        return draft

    def _make(self, request: LiveRequest) -> LiveRequest:
        sampling = replace(request.sampling, logprobs=None, prompt_logprobs=None)
        asked = replace(request.asked, sampling=sampling, sizes=(self.path.size,), size_schedule=(), grammar=None)
        draft = LiveRequest(asked)
        draft.path, draft.slot, draft.width = self.path, self._free_slots.pop(), request.width
        draft.output_token_ids = list(request.output_token_ids)
        self.kv_cache.adopt(draft, self.kv_cache.find_prefix(draft, self.path, counts=False))
        self.drafts[request.request_id] = draft
        return draft

    def drop(self, request_id: str) -> None:
        """Idempotent."""
        draft = self.drafts.pop(request_id, None)
        if draft is not None:
            self.kv_cache.free(draft)
            self._free_slots.append(draft.slot)

    def release(self) -> bool:
        """Give back the pages of the largest draft; False if there is none."""
        if not self.drafts:
            return False
        self.drop(max(self.drafts.values(), key=lambda draft: len(draft.blocks)).request_id)
        return True

    def check_integrity(self, running: list[LiveRequest]) -> None:
        """Assert that every draft belongs to a running request and every slot to one draft."""
        names = {request.request_id for request in running}
        assert names.issuperset(self.drafts), "a draft has outlived its request"
        slots = sorted(self._free_slots + [draft.slot for draft in self.drafts.values()])
        assert slots == list(self._slots), "a draft's slot leaked or has two owners"
