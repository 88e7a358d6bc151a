"""Preparing what waits to be written, while the writer's thread waits for a commit."""

import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_MOST_AHEAD = 32 * 2**20
"""Bytes; what lies beyond is prepared by the writer, when its turn comes."""


class Preparable(ABC):
    """An argument of an operation that takes work before it can be written, and that needs no connection."""

    __slots__ = ("__weakref__", "size", "taken")

    size: int
    """About how many bytes it will be."""

    taken: bool
    """Whether the operation has begun: what was prepared is used by now, or never will be."""

    @abstractmethod
    def prepare(self) -> bool:
        """Do that work; any error is met again by the operation itself. False: there is nothing to do any more."""


class Ahead:
    """A thread that prepares what waits, in order, while a commit is under way and at no other time.

    A commit needs no interpreter: the writer's thread lets it go, and would otherwise leave it idle. At other times the two
    would only take it from each other.

    Lives from `start` to `close`. Nothing depends on it: what it has not prepared, the operation prepares.
    """

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Preparable | None] = queue.SimpleQueue()
        self._may = threading.Event()
        self._thread = threading.Thread(target=self._run, name="millrace-ahead", daemon=True)

    def start(self) -> None:
        """Start the thread, unless the program is ending."""
        with suppress(RuntimeError):
            self._thread.start()

    def add(self, argument: Preparable) -> None:
        """Something that waits to be written from now on."""
        self._waiting.put(argument)

    @contextmanager
    def working(self) -> Iterator[None]:
        """While this lasts, the thread works."""
        self._may.set()
        try:
            yield
        finally:
            self._may.clear()

    def close(self) -> None:
        """End the thread, after the one under way."""
        self._waiting.put(None)
        self._may.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        prepared: weakref.WeakSet[Preparable] = weakref.WeakSet()
        while (argument := self._waiting.get()) is not None:
            self._may.wait()
            if sum(earlier.size for earlier in prepared if not earlier.taken) < _MOST_AHEAD and argument.prepare():
                prepared.add(argument)
            del argument  # nothing that is written is kept while this waits
