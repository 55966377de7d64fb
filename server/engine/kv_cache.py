"""Pages, blocks and the prefix cache. No torch: this file decides who owns which page, executors own the memory.

    page   `page_size` tokens of ONE layer (K and V)
    block  the same `page_size` tokens on EVERY layer of one path: `path.num_layers` pages
    table  block_tables[layer, slot, i] = page of layer `layer` for tokens [i * page_size, (i + 1) * page_size)

A small size therefore takes proportionally few pages. Blocks are immutable once full and can then be shared through
the prefix cache, whose keys include the path: KV at a layer depends on every layer below it. For the same reason a page
belongs to several blocks where paths begin alike: `move` gives a request that changes size the pages below the first
station that differs.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict

import numpy as np

from model_store.assembly import LayerPath
from server.core.block import Block
from server.core.request import LiveRequest
from server.core.width import EXACT
from server.engine.kept_states import KeptStates


class KVCacheManager:
    """Gives pages to requests, finds cached prefixes, evicts least recently used cached blocks."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_layers: int,
        max_num_seqs: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        num_state_pages: int = 0,
        widest: int = EXACT,
    ) -> None:
        """`num_layers` counts the global layer ids of the pair (teacher + student); `widest` of the server's widths."""
        self.widest = widest
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        max_blocks = -(-max_model_len // page_size)
        self.block_tables = np.zeros((num_layers, max_num_seqs, max_blocks), dtype=np.int32)
        self._free_pages = np.arange(num_pages, dtype=np.int32)  # a stack; [:num_stacked] is free
        self._num_stacked = num_pages
        self._num_owners = np.zeros(num_pages, np.int32)  # blocks that a page belongs to, held by requests or cached
        self._num_users = np.zeros(num_pages, np.int32)  # of these, blocks that requests hold
        self._num_used = 0  # pages with users
        self._cached: dict[bytes, Block] = {}
        self._evictable: OrderedDict[bytes, Block] = OrderedDict()  # cached and unreferenced, oldest first
        self.states = KeptStates(num_state_pages)
        self._layer_index: dict[int, np.ndarray] = {}  # path size -> its global layer ids as an index array
        self._student = 0  # counts the pair's students: what was computed with an earlier one is never found
        self.prefix_queries = 0  # tokens asked for / found, as vLLM counts them
        self.prefix_hits = 0

    # --- capacity

    @property
    def num_free_pages(self) -> int:
        """Pages that an allocation can have: never used ones and those of unreferenced cached blocks alone."""
        return self.num_pages - self._num_used

    @property
    def usage(self) -> float:
        return 1.0 - self.num_free_pages / self.num_pages

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def num_pages_for(self, num_tokens: int, path: LayerPath) -> int:
        return self.num_blocks_for(num_tokens) * path.num_layers

    # --- prefix cache

    def find_prefix(self, request: LiveRequest, path: LayerPath, counts: bool = True) -> list[Block]:
        """Cached blocks that hold the longest prefix of the request on this path; `counts`: as a query and hits.

        At least the last token is left to compute, because its logits are wanted. What was computed at a narrower
        width than the request reads now is not good enough for it. A request that asks for prompt logprobs or pooled
        states needs every position and so takes nothing from the cache.
        """
        if not self.enable_prefix_caching or request.sampling.wants_prompt:
            return []
        found: list[Block] = []
        parent = self._root(request, path)
        for index in range((request.num_tokens - 1) // self.page_size):
            parent = self._chain(parent, request, index)
            block = self._cached.get(parent)
            if block is None or block.width < request.width:
                break
            found.append(block)
        if counts:
            self.prefix_queries += request.num_tokens
            self.prefix_hits += len(found) * self.page_size
        return found

    def cache_full_blocks(self, request: LiveRequest) -> None:
        """Enter the request's newly full, computed blocks under their hashes."""
        if not self.enable_prefix_caching:
            return
        num_full = request.num_computed_tokens // self.page_size
        if num_full == 0 or request.blocks[num_full - 1].hash is not None:
            return
        first = num_full - 1
        while first > 0 and request.blocks[first - 1].hash is None:
            first -= 1
        parent = (request.blocks[first - 1].hash if first else None) or self._root(request, request.path)
        for index in range(first, num_full):
            parent = self._chain(parent, request, index)
            block = request.blocks[index]
            block.hash, block.width = parent, request.kv_width
            # Tables are append-only, so a twin computed at the same time keeps its own pages and is simply not entered,
            # unless it was computed at a wider width.
            twin = self._cached.setdefault(parent, block)
            if twin.width < block.width:
                if twin.ref_count == 0:
                    del self._evictable[parent]
                    self._disown([twin])
                self._cached[parent] = block

    def _root(self, request: LiveRequest, path: LayerPath) -> bytes:
        """What decides KV beside the tokens. An answer that is to be the same again takes nothing from wider widths."""
        pinned = request.max_width if request.max_width < self.widest and request.is_repeatable else 0
        student = 0 if path.is_teacher else self._student
        return b"%d|%d|%d|" % (path.size, student, pinned) + request.cache_salt.encode()

    def _chain(self, parent: bytes, request: LiveRequest, index: int) -> bytes:
        start = index * self.page_size
        tokens = np.asarray(request.token_ids(start, start + self.page_size), dtype=np.int32).tobytes()
        return hashlib.blake2b(parent + tokens, digest_size=16).digest()

    # --- allocation

    def adopt(self, request: LiveRequest, blocks: list[Block]) -> None:
        """Give a newly admitted request its cached prefix; sets `num_computed_tokens`. `path` and `slot` are set."""
        self._hold(blocks)
        request.blocks = list(blocks)
        request.num_computed_tokens = len(blocks) * self.page_size
        request.kv_width = min((block.width for block in blocks), default=EXACT)
        self._write_tables(request, 0)

    def can_allocate(self, num_pages: int) -> bool:
        return num_pages <= self.num_free_pages

    def allocate(self, request: LiveRequest, num_tokens: int) -> bool:
        """Grow the request's blocks to cover `num_tokens` positions; False (and nothing changed) if pages lack."""
        num_have = len(request.blocks)
        num_new = self.num_blocks_for(num_tokens) - num_have
        if num_new <= 0:
            return True
        width = request.path.num_layers
        if not self.can_allocate(num_new * width):
            return False
        pages = self._pop(num_new * width)
        for first in range(0, num_new * width, width):
            block = Block(pages[first : first + width])
            if request.keep_station:
                self.states.give(block, request.keep_station)
            request.blocks.append(block)
        self._write_tables(request, num_have)
        return True

    def move(self, request: LiveRequest, path: LayerPath) -> None:
        """Give a running request the blocks of another path; `num_computed_tokens` says what is not to be computed.

        Blocks that the cache has for the new path come first. Of the request's own full blocks after those, the ones
        with a state kept keep their pages below it (the old ones stay cached with the same pages) and `resumes` is set.
        Not the last, partly filled one: no page is written from two rows of a step.
        """
        old = request.blocks
        station = request.path.first_difference(path)
        prefix = self.find_prefix(request, path)
        self._hold(prefix)  # before anything is freed
        blocks = []
        for block in old[len(prefix) : request.num_computed_tokens // self.page_size]:
            new = Block(np.zeros(0, np.int32), resumes=0 < block.state_station <= station)
            if new.resumes:
                self.states.share(block, new)
                new.pages = block.pages[: path.starts[block.state_station]]
                self._num_owners[new.pages] += 1
                self._num_users[new.pages] += 1
            blocks.append(new)
        self._drop(old[::-1])
        widths = [path.num_layers - len(block.pages) for block in blocks]
        if not any(block.resumes for block in blocks) or not self.can_allocate(sum(widths)):
            self._retire(blocks)
            blocks, widths = [], []
        pages, start = self._pop(sum(widths)), 0
        for block, width in zip(blocks, widths, strict=True):
            block.pages = np.concatenate((block.pages, pages[start : start + width]))
            start += width
        request.path, request.blocks = path, prefix + blocks
        request.num_computed_tokens = len(prefix) * self.page_size
        request.resume_stop = len(request.blocks) * self.page_size if blocks else 0
        widths = [block.width for block in prefix]
        request.kv_width = min([*widths, request.kv_width] if blocks else widths, default=EXACT)
        self._write_tables(request, 0)

    def finish_resuming(self, request: LiveRequest) -> None:
        """The request has caught up. Its states go, unless another change is expected."""
        request.resume_stop = 0
        for block in request.blocks:
            if block.resumes and not request.keep_station:
                self.states.take(block)
            block.resumes = False

    def depth(self, request: LiveRequest) -> int:
        """Layers that the next token to compute runs."""
        path = request.path
        if request.num_computed_tokens < request.resume_stop:
            block = request.blocks[request.num_computed_tokens // self.page_size]
            if block.resumes:
                return path.num_layers - path.starts[block.state_station]
        return path.num_layers

    def num_kept_layers(self, request: LiveRequest, path: LayerPath) -> int:
        """Layers of `path` that the request's tokens would not be computed on if it went there now."""
        station = request.blocks[len(request.blocks) // 2].state_station if request.blocks else 0
        return path.starts[station] if 0 < station <= request.path.first_difference(path) else 0

    def free(self, request: LiveRequest) -> None:
        """Return the request's blocks; full cached ones stay findable until evicted."""
        # Tail first: the head of a prefix is the part most likely to be wanted again.
        self._drop(request.blocks[::-1])
        request.blocks = []
        request.num_computed_tokens = request.resume_stop = 0

    def discard(self, request: LiveRequest) -> np.ndarray:
        """Make a request's blocks unfindable because its KV is not to be trusted. Returns the pages only it has."""
        pages = [np.zeros(0, np.int32)]
        for block in request.blocks:
            if block.ref_count == 1:
                if block.hash is not None and self._cached.get(block.hash) is block:
                    del self._cached[block.hash]
                block.hash = None
                pages.append(block.pages[self._num_owners[block.pages] == 1])
        return np.concatenate(pages)

    def reset_prefix_cache(self) -> None:
        while self._evictable:
            self._evict_oldest()

    def change_student(self, num_layers: int, held: list[LiveRequest]) -> None:
        """The teacher has another student, `num_layers` global layer ids in all. `held` are the requests with blocks:
        they run the teacher alone. States go: stations are others now."""
        tables = np.zeros((num_layers, *self.block_tables.shape[1:]), np.int32)
        both = min(len(tables), len(self.block_tables))
        tables[:both] = self.block_tables[:both]  # the teacher's layers have the ids that they had
        self.block_tables = tables
        self._layer_index.clear()
        self._student += 1
        for block in [*self._cached.values(), *(block for request in held for block in request.blocks)]:
            self.states.take(block)

    # Blocks of one list never share pages: they hold different tokens.

    def _hold(self, blocks: list[Block]) -> None:
        woken = [block for block in blocks if block.ref_count == 0]
        for block in blocks:
            block.ref_count += 1
        for block in woken:
            assert block.hash is not None, "a block that nobody holds is found by its hash"
            del self._evictable[block.hash]
            self.states.wake(block)
        if woken:
            pages = _pages(woken)
            self._num_users[pages] += 1
            self._num_used += int((self._num_users[pages] == 1).sum())

    def _drop(self, blocks: list[Block]) -> None:
        for block in blocks:
            block.ref_count -= 1
            assert block.ref_count >= 0
        self._retire([block for block in blocks if block.ref_count == 0])

    def _retire(self, blocks: list[Block]) -> None:
        """No request holds these any more."""
        if not blocks:
            return
        pages = _pages(blocks)
        self._num_users[pages] -= 1
        self._num_used -= int((self._num_users[pages] == 0).sum())
        gone = []
        for block in blocks:
            if block.hash is not None and self._cached.get(block.hash) is block:
                self._evictable[block.hash] = block
                self.states.rest(block)
            else:
                gone.append(block)
        self._disown(gone)

    def _evict_oldest(self) -> None:
        digest, block = self._evictable.popitem(last=False)
        del self._cached[digest]
        self._disown([block])

    def _disown(self, blocks: list[Block]) -> None:
        if not blocks:
            return
        pages = _pages(blocks)
        self._num_owners[pages] -= 1
        pages = pages[self._num_owners[pages] == 0]
        self._free_pages[self._num_stacked : self._num_stacked + len(pages)] = pages
        self._num_stacked += len(pages)
        for block in blocks:
            self.states.take(block)

    def _pop(self, count: int) -> np.ndarray:
        """Pages for new blocks; `can_allocate` said yes."""
        while self._num_stacked < count:
            self._evict_oldest()
        self._num_stacked -= count
        pages = self._free_pages[self._num_stacked : self._num_stacked + count].copy()
        self._num_owners[pages] = self._num_users[pages] = 1
        self._num_used += count
        return pages

    def _write_tables(self, request: LiveRequest, first: int) -> None:
        if len(request.blocks) == first:
            return
        layers = self._layer_index.get(request.path.size)
        if layers is None:
            layers = self._layer_index[request.path.size] = np.asarray(request.path.layers, dtype=np.intp)
        pages = np.stack([block.pages for block in request.blocks[first:]], axis=1)  # [layers, new blocks]
        self.block_tables[layers, request.slot, first : len(request.blocks)] = pages

    # --- invariants

    def check_integrity(self, live: list[LiveRequest]) -> None:
        """Assert that every page is free, or owned by exactly the blocks that are cached or held by `live` requests."""
        held = Counter(block for request in live for block in request.blocks)
        for block, count in held.items():
            assert block.ref_count == count, f"block is held {count} times but counts {block.ref_count}"
        for digest, block in self._evictable.items():
            assert block.ref_count == 0 and self._cached[digest] is block and block not in held
        for block in self._cached.values():
            assert block.ref_count == 0 or block in held, "a cached block is referenced by no live request"
        blocks = [*held, *self._evictable.values()]
        users = np.bincount(_pages(list(held)), minlength=self.num_pages)
        owners = np.bincount(_pages(blocks), minlength=self.num_pages)
        free = self._free_pages[: self._num_stacked]
        assert (owners[free] == 0).all(), "a free page has an owner"
        num_lost = self.num_pages - len(np.unique(free)) - int((owners > 0).sum())
        assert not num_lost, f"{num_lost} pages leaked"
        assert (self._num_owners == owners).all() and (self._num_users == users).all(), "a page is counted wrongly"
        assert self._num_used == (users > 0).sum()
        self.states.check_integrity(blocks)


def _pages(blocks: list[Block]) -> np.ndarray:
    return np.concatenate([block.pages for block in blocks]) if blocks else np.zeros(0, np.int32)
