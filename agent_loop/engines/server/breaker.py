"""When a replica that failed, or that has no room, is asked again: pure decisions about given moments."""

from dataclasses import dataclass

LONGEST_WISH = 300.0
"""Seconds: the most that a server's Retry-After is heeded; what it says is untrusted."""


def delay(times: int, base: float, most: float) -> float:
    """Seconds before the next attempt after `times` in vain: `base`, doubled each time, up to `most`."""
    return min(most, base * 2.0 ** min(times, 60))


@dataclass(slots=True)
class Breaker:
    """Keeps requests from a replica that fails. It opens after `threshold` failures in a row, or at once when it is tripped; then the
    replica is probed at `due`, and one probe that succeeds closes it.

    The first probe is due at once: most often one connection broke, not the replica. After each opening without a request that
    succeeded since, the next probe is due later.

    Attributes:
        threshold: failed requests in a row that open it.
        base: seconds to the second probe, doubled with each.
        most: seconds between probes, at most.
        due: the moment of the next probe; None while it is closed.
    """

    threshold: int = 3
    base: float = 0.5
    most: float = 15.0
    due: float | None = None
    _failures: int = 0
    _trips: int = 0

    def failed(self, now: float) -> None:
        """A request failed though the replica answered."""
        self._failures += 1
        if self.due is None and self._failures >= self.threshold:
            self.trip(now)

    def trip(self, now: float) -> None:
        """Open it, or keep it open after a probe in vain."""
        self.due = now + (delay(self._trips - 1, self.base, self.most) if self._trips else 0.0)
        self._trips += 1

    def close(self) -> None:
        """A probe succeeded."""
        self.due, self._failures = None, 0

    def succeeded(self) -> None:
        """A request succeeded."""
        self._failures = self._trips = 0


@dataclass(slots=True)
class Backoff:
    """Leaves a replica alone that has no room.

    Attributes:
        until: the moment before which it is not asked.
    """

    base: float = 0.25
    most: float = 30.0
    until: float = 0.0
    _times: int = 0

    def refused(self, now: float, retry_after: float | None, luck: float) -> None:
        """It answered 429 or 503; `luck` from 0 to 1 spreads those who ask again, unless the server named a time."""
        wait = delay(self._times, self.base, self.most) * (0.5 + luck / 2) if retry_after is None else min(retry_after, LONGEST_WISH)
        # Many are refused at once; only the first of them counts.
        if now >= self.until:
            self._times += 1
        self.until = max(self.until, now + wait)

    def accepted(self) -> None:
        """It took a request."""
        self._times = 0
