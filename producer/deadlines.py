"""`Deadlines`: which of many keys is due next, without looking at all of them."""

import heapq
import itertools
import math
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_SLACK = 64
"""Entries that stand for nothing any more, beyond as many as there are keys, before they are cleared away."""


class Deadlines(Generic[K]):
    """A time for each key, on any clock; `inf` is never. Setting, dropping and finding the next cost O(log n) of its keys."""

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        # A key that was set anew or dropped leaves its old entry here, which is passed over when its time comes.
        self._heap: list[tuple[float, int, K]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._at)

    def set(self, key: K, at: float) -> None:
        """`key` is due at `at`, and at no other time."""
        if self._at.get(key) == at:
            return
        self._at[key] = at
        if at < math.inf:
            heapq.heappush(self._heap, (at, next(self._numbers), key))
            if len(self._heap) > 2 * len(self._at) + _SLACK:
                self._heap = [(at, next(self._numbers), key) for key, at in self._at.items() if at < math.inf]
                heapq.heapify(self._heap)

    def drop(self, key: K) -> None:
        """`key` is never due; again is nothing."""
        self._at.pop(key, None)

    def next_at(self) -> float:
        """When the next key is due; inf where none will be."""
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def due(self, now: float) -> list[K]:
        """The keys whose time has come, earliest first, each once: they are dropped."""
        keys = []
        while self.next_at() <= now:
            key = heapq.heappop(self._heap)[2]
            del self._at[key]
            keys.append(key)
        return keys
