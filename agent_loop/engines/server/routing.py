"""Which replica a request goes to: the least loaded one, or that of its session while this costs little. Pure."""

from collections import OrderedDict
from collections.abc import Sequence


def choose(loads: Sequence[int], limit: int, preferred: int | None, slack: int, turn: int) -> int | None:
    """The place of the replica to ask; None: all are full.

    Args:
        loads: requests in flight of each replica that may be asked.
        limit: the most of one replica.
        preferred: the place of the replica that served the session before.
        slack: how many requests more than the least loaded one it may have, and still be taken.
        turn: a number that counts up, to take equally loaded ones in turn.
    """
    least = min(loads, default=limit)
    if least >= limit:
        return None
    if preferred is not None and loads[preferred] < limit and loads[preferred] <= least + slack:
        return preferred
    equal = [place for place, load in enumerate(loads) if load == least]
    return equal[turn % len(equal)]


class Affinity:
    """Which replica served a session last, for the `most` sessions heard of last: its prefix cache holds the session's beginning."""

    def __init__(self, most: int = 100_000) -> None:
        self._most = most
        self._places: OrderedDict[str, str] = OrderedDict()

    def of(self, session_id: str | None) -> str | None:
        """The replica of a session, if there is one."""
        return None if session_id is None else self._places.get(session_id)

    def served(self, session_id: str | None, replica: str) -> None:
        """A request of the session goes there."""
        if session_id is None:
            return
        self._places[session_id] = replica
        self._places.move_to_end(session_id)
        if len(self._places) > self._most:
            self._places.popitem(last=False)
