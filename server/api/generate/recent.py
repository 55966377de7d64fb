"""What was used last, up to a total weight."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Forgets what was not asked for longest, as soon as all together weigh more than `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.weight = 0
        self._items: OrderedDict[bytes, tuple[T, int]] = OrderedDict()

    def get(self, key: bytes) -> T | None:
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: bytes, value: T, weight: int = 1) -> None:
        """What weighs too much by itself is not kept, and drives out nothing."""
        if weight > self._most:
            return
        if key in self._items:
            self.weight -= self._items.pop(key)[1]
        self._items[key] = value, weight
        self.weight += weight
        while self.weight > self._most:
            self.weight -= self._items.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._items)
