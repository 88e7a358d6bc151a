"""`Alarm`: one timer of an event loop, or a count of its turns, for a model that says when something is to happen next."""

import asyncio
import math
from collections.abc import Callable

LATE = 0.002
"""Seconds by which the alarm may come late and be made up for: more is time that the model never had. Else a program that was held
up would find everything done at once."""


class Alarm:
    """Calls `ring` when it is time.

    Args:
        ring: called no earlier than the time that was set; it sets the next.
        turns: time is the number of turns of the event loop in which an alarm was set.
    """

    def __init__(self, ring: Callable[[], None], *, turns: bool) -> None:
        self._ring, self._by_turns = ring, turns
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.Handle | None = None
        self._turns, self._slipped, self._reached = 0, 0.0, 0.0
        self._due = self._at = math.inf

    def open(self) -> None:
        """Keep the time of the running event loop from now on."""
        self._loop = asyncio.get_running_loop()
        # The model's time goes on from where it was, whatever this loop's clock shows.
        self._slipped = self._loop.time() - self._reached

    def close(self) -> None:
        """Ring no more."""
        self.set(math.inf)

    def now(self) -> float:
        """The time: seconds, or turns."""
        if self._by_turns or self._loop is None:
            return self._turns
        now = self._loop.time() - self._slipped
        if now > self._due + LATE:
            self._slipped += now - (self._due + LATE)
            now = self._due + LATE
        self._reached = max(self._reached, now)  # a loop may call a timer a clock's tick early
        return self._reached

    def set(self, when: float) -> None:
        """Ring at `when`, and not where it was set before; infinite: not at all."""
        self._due = when
        if when == math.inf or (when < self._at and not self._by_turns):
            if self._handle is not None:
                self._handle.cancel()
            self._handle, self._at = None, math.inf
        if when == math.inf or self._handle is not None or self._loop is None:
            return  # one that comes too early sets another
        if self._by_turns:
            self._handle = self._loop.call_soon(self._rings)
        else:
            self._handle, self._at = self._loop.call_at(when + self._slipped, self._rings), when

    def _rings(self) -> None:
        self._turns += 1
        if not self._by_turns:
            self._reached = max(self._reached, self._at)
        self._handle, self._at = None, math.inf
        self._ring()
