"""Pages, blocks and the prefix cache. No torch: this file decides who owns which page, executors own the memory.

    page   `page_size` tokens of ONE layer (K and V)
    block  the same `page_size` tokens on EVERY layer of one path: `path.num_layers` pages
    table  block_tables[layer, slot, i] = page of layer `layer` for tokens [i * page_size, (i + 1) * page_size)

A small size therefore takes proportionally few pages. Blocks are immutable once full and can then be shared through
the prefix cache, whose keys include the path: KV at a layer depends on every layer below it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from model_store.assembly import LayerPath
from server.engine.request import Request


@dataclass(slots=True, eq=False)
class Block:
    """One run of `page_size` tokens on all layers of one path. `hash` is set once full and cached."""

    pages: np.ndarray  # int32 [path.num_layers], in the path's running order
    ref_count: int = 1
    hash: bytes | None = None


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
    ) -> None:
        """`num_layers` counts the global layer ids of the pair (teacher + student)."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        max_blocks = -(-max_model_len // page_size)
        self.block_tables = np.zeros((num_layers, max_num_seqs, max_blocks), dtype=np.int32)
        self._free_pages = np.arange(num_pages, dtype=np.int32)  # a stack; [:num_stacked] is free
        self._num_stacked = num_pages
        self._cached: dict[bytes, Block] = {}
        self._evictable: OrderedDict[bytes, Block] = OrderedDict()  # cached and unreferenced, oldest first
        self._num_evictable_pages = 0
        self._layer_index: dict[int, np.ndarray] = {}  # path size -> its global layer ids as an index array
        self.prefix_queries = 0  # tokens asked for / found, as vLLM counts them
        self.prefix_hits = 0

    # --- capacity

    @property
    def num_free_pages(self) -> int:
        """Pages that an allocation can have: never used ones and those of unreferenced cached blocks."""
        return self._num_stacked + self._num_evictable_pages

    @property
    def usage(self) -> float:
        return 1.0 - self.num_free_pages / self.num_pages

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def num_pages_for(self, num_tokens: int, path: LayerPath) -> int:
        return self.num_blocks_for(num_tokens) * path.num_layers

    # --- prefix cache

    def find_prefix(self, request: Request, path: LayerPath, counts: bool = True) -> list[Block]:
        """Cached blocks that hold the longest prefix of the request on this path; `counts`: as a query and hits.

        At least the last token is left to compute, because its logits are wanted. A request that asks for prompt
        logprobs needs every position's logits and so takes nothing from the cache.
        """
        if not self.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
            return []
        found: list[Block] = []
        parent = self._root(request, path)
        for index in range((request.num_tokens - 1) // self.page_size):
            parent = self._chain(parent, request, index)
            block = self._cached.get(parent)
            if block is None:
                break
            found.append(block)
        if counts:
            self.prefix_queries += request.num_tokens
            self.prefix_hits += len(found) * self.page_size
        return found

    def cache_full_blocks(self, request: Request) -> None:
        """Enter the request's newly full, computed blocks under their hashes."""
        if not self.enable_prefix_caching:
            return
        num_full = request.num_computed_tokens // self.page_size
        if num_full == 0 or request.blocks[num_full - 1].hash is not None:
            return
        first = num_full - 1
        while first > 0 and request.blocks[first - 1].hash is None:
            first -= 1
        parent = request.blocks[first - 1].hash if first else self._root(request, request.path)
        for index in range(first, num_full):
            parent = self._chain(parent, request, index)
            block = request.blocks[index]
            block.hash = parent
            # Tables are append-only, so a twin computed at the same time keeps its own pages and is simply not entered.
            self._cached.setdefault(parent, block)

    def _root(self, request: Request, path: LayerPath) -> bytes:
        return b"%d|" % path.size + request.cache_salt.encode()

    def _chain(self, parent: bytes, request: Request, index: int) -> bytes:
        start = index * self.page_size
        tokens = np.asarray(request.token_ids(start, start + self.page_size), dtype=np.int32).tobytes()
        return hashlib.blake2b(parent + tokens, digest_size=16).digest()

    # --- allocation

    def adopt(self, request: Request, blocks: list[Block]) -> None:
        """Give a newly admitted request its cached prefix; sets `num_computed_tokens`. `path` and `slot` are set."""
        for block in blocks:
            if block.ref_count == 0:
                del self._evictable[block.hash]
                self._num_evictable_pages -= len(block.pages)
            block.ref_count += 1
        request.blocks = list(blocks)
        request.num_computed_tokens = len(blocks) * self.page_size
        self._write_tables(request, 0)

    def can_allocate(self, num_pages: int) -> bool:
        return num_pages <= self.num_free_pages

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Grow the request's blocks to cover `num_tokens` positions; False (and nothing changed) if pages lack."""
        num_have = len(request.blocks)
        num_new = self.num_blocks_for(num_tokens) - num_have
        if num_new <= 0:
            return True
        width = request.path.num_layers
        if not self.can_allocate(num_new * width):
            return False
        while self._num_stacked < num_new * width:
            self._evict_oldest()
        for _ in range(num_new):
            self._num_stacked -= width
            pages = self._free_pages[self._num_stacked : self._num_stacked + width].copy()
            request.blocks.append(Block(pages))
        self._write_tables(request, num_have)
        return True

    def free(self, request: Request) -> None:
        """Return the request's blocks; full cached ones stay findable until evicted."""
        # Tail first: the head of a prefix is the part most likely to be wanted again.
        for block in reversed(request.blocks):
            self._release(block)
        request.blocks = []
        request.num_computed_tokens = 0

    def discard(self, request: Request) -> np.ndarray:
        """Make a request's blocks unfindable because its KV is not to be trusted. Returns the pages only it has."""
        pages = [np.zeros(0, np.int32)]
        for block in request.blocks:
            if block.ref_count == 1:
                if block.hash is not None and self._cached.get(block.hash) is block:
                    del self._cached[block.hash]
                block.hash = None
                pages.append(block.pages)
        return np.concatenate(pages)

    def reset_prefix_cache(self) -> None:
        while self._evictable:
            self._evict_oldest()

    def _release(self, block: Block) -> None:
        block.ref_count -= 1
        assert block.ref_count >= 0
        if block.ref_count:
            return
        if block.hash is not None and self._cached.get(block.hash) is block:
            self._evictable[block.hash] = block
            self._num_evictable_pages += len(block.pages)
        else:
            self._push(block.pages)

    def _evict_oldest(self) -> None:
        digest, block = self._evictable.popitem(last=False)
        del self._cached[digest]
        self._num_evictable_pages -= len(block.pages)
        self._push(block.pages)

    def _push(self, pages: np.ndarray) -> None:
        self._free_pages[self._num_stacked : self._num_stacked + len(pages)] = pages
        self._num_stacked += len(pages)

    def _write_tables(self, request: Request, first: int) -> None:
        if len(request.blocks) == first:
            return
        layers = self._layer_index.get(request.path.size)
        if layers is None:
            layers = self._layer_index[request.path.size] = np.asarray(request.path.layers, dtype=np.intp)
        pages = np.stack([block.pages for block in request.blocks[first:]], axis=1)  # [layers, new blocks]
        self.block_tables[layers, request.slot, first : len(request.blocks)] = pages

    # --- invariants

    def check_integrity(self, live: list[Request]) -> None:
        """Assert that every page is free, cached or owned by exactly the blocks that `live` requests hold."""
        held: dict[int, tuple[Block, int]] = {}
        for request in live:
            for block in request.blocks:
                held[id(block)] = (block, held.get(id(block), (block, 0))[1] + 1)
        owned = [self._free_pages[: self._num_stacked]]
        for block, count in held.values():
            assert block.ref_count == count, f"block is held {count} times but counts {block.ref_count}"
            owned.append(block.pages)
        for digest, block in self._evictable.items():
            assert block.ref_count == 0 and self._cached[digest] is block and id(block) not in held
            owned.append(block.pages)
        for block in self._cached.values():
            assert block.ref_count == 0 or id(block) in held, "a cached block is referenced by no live request"
        pages = np.concatenate(owned)
        assert len(pages) == self.num_pages, f"{self.num_pages - len(pages)} pages leaked"
        assert len(np.unique(pages)) == self.num_pages, "a page has two owners"
        assert self._num_evictable_pages == sum(len(block.pages) for block in self._evictable.values())
