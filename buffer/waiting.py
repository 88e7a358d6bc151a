"""Waiting until a task has so many groups of a status: by notification, never by looking again and again."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from buffer.backends import Backend, Listener
from buffer.errors import BufferClosedError, ReplayBufferError
from buffer.status import Status

Key = tuple[str, Status]


_LOOK_EVERY = 0.1
"""Seconds between two looks at a file's traces: nobody tells of what another process writes to it."""


class Watch:
    """Says when something was committed since `clear`."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._seen = backend, backend.traces()
        self.told = asyncio.Event()

    def clear(self) -> None:
        """What was committed up to now is known."""
        self.told.clear()
        self._seen = self._backend.traces()

    async def changed(self) -> None:
        """Wait for the next commit, unless there was one."""
        while self._backend.traces() == self._seen:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY if self._backend.alone else None):
                    await self.told.wait()
                    return


class Waiters:
    """Who waits for which count to grow. Lives on the event loop; commits of others are told by the backend's listener."""

    def __init__(self, backend: Backend, *, read_only: bool) -> None:
        self._backend, self._read_only = backend, read_only
        self._waiting: dict[Key, set[asyncio.Event]] = {}
        self._watches: set[Watch] = set()
        self._listener: Listener | None = None
        self._closed = False

    async def until(self, key: Key, n: int, count: Callable[[], Awaitable[int]]) -> int:
        """The count, once it is at least `n`."""
        # Before the first look: what changes from then on wakes us.
        with self._registered(key) as changed:
            self._listen()
            while True:
                changed.clear()
                if (found := await count()) >= n:
                    return found
                await changed.wait()
                if self._closed:
                    raise BufferClosedError("the buffer was closed while somebody waited for its groups; open it again")

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        """Watch every commit while the block runs, of this process and of others."""
        watch = Watch(self._backend)
        if not self._backend.alone:
            self._listen()
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    def committed(self, deltas: Mapping[Key, int]) -> None:
        """This process committed a transaction with these changes of the counts."""
        self._wake_watches()
        for key, n in deltas.items():
            if n > 0:
                self._wake(key)

    def close(self) -> Callable[[], None] | None:
        """Wake all who wait; gives what ends the listener, where there is one: it may wait for its thread."""
        self._closed = True
        self._wake_all()
        listener, self._listener = self._listener, None
        return None if listener is None else listener.close

    def _listen(self) -> None:
        if self._backend.alone and self._read_only:
            raise ReplayBufferError(
                "a SQLite buffer opened with read_only=True is not told what the writing process stores; "
                "wait in that process, or use PostgreSQL"
            )
        if self._backend.alone or self._listener is not None:
            return
        loop = asyncio.get_running_loop()

        def on_change(changed: list[tuple[str, str]] | None) -> None:
            loop.call_soon_threadsafe(self._told, changed)

        self._listener = self._backend.listen(on_change)

    def _told(self, changed: list[tuple[str, str]] | None) -> None:
        self._wake_watches()
        if changed is None:
            self._wake_all()
            return
        for task_name, status in changed:
            self._wake((task_name, Status(status)))

    def _wake(self, key: Key) -> None:
        for event in self._waiting.get(key, ()):
            event.set()

    def _wake_watches(self) -> None:
        for watch in self._watches:
            watch.told.set()

    def _wake_all(self) -> None:
        self._wake_watches()
        for key in self._waiting:
            self._wake(key)

    @contextmanager
    def _registered(self, key: Key) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._waiting.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[key].discard(event)
            if not self._waiting[key]:
                del self._waiting[key]
