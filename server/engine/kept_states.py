"""Which block has a hidden state kept for it. No torch: executors own the memory.

A *state page* holds what `page_size` tokens look like before one station, [page_size, hidden]. A request that goes on
at another size is computed again only from there up, if both sizes run the same layers below. States are a
convenience: whoever finds no page does without, and those of cached blocks that nobody holds are the first to go.
"""

from __future__ import annotations

from collections import OrderedDict

from server.core.block import Block


class KeptStates:
    """Gives state pages to blocks; several blocks may refer to one."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))[::-1]
        self._num_owners = [0] * num_pages
        self._idle: OrderedDict[Block, None] = OrderedDict()  # unreferenced cached blocks that have one, oldest first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def give(self, block: Block, station: int) -> None:
        """A page for the state before `station` of a new block, if there is one."""
        if not self._free and self._idle:
            self.take(next(iter(self._idle)))
        if self._free:
            block.state, block.state_station = self._free.pop(), station
            self._num_owners[block.state] = 1

    def share(self, owner: Block, block: Block) -> None:
        """`block` holds the same tokens as `owner`, computed alike up to the same station."""
        block.state, block.state_station = owner.state, owner.state_station
        self._num_owners[owner.state] += 1

    def take(self, block: Block) -> None:
        """The block goes, or needs its state no more. Idempotent."""
        if block.state < 0:
            return
        self._idle.pop(block, None)
        self._num_owners[block.state] -= 1
        if not self._num_owners[block.state]:
            self._free.append(block.state)
        block.state, block.state_station = -1, 0

    def rest(self, block: Block) -> None:
        """No request holds the block any more, but it may be found again."""
        if block.state >= 0:
            self._idle[block] = None

    def wake(self, block: Block) -> None:
        """A request holds the block again."""
        self._idle.pop(block, None)

    def check_integrity(self, blocks: list[Block]) -> None:
        """Assert that every page is free or counted by exactly those of `blocks` (all there are) that refer to it."""
        counts = [0] * self.num_pages
        for block in blocks:
            if block.state >= 0:
                assert block.state_station > 0, "a state is kept before some station"
                counts[block.state] += 1
        assert counts == self._num_owners, "a state page is counted wrongly"
        assert sorted(self._free) == [page for page, count in enumerate(counts) if not count], "a state page leaked"
        assert all(block.state >= 0 and block.ref_count == 0 for block in self._idle)
