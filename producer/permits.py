"""`Permits`: who may start rollouts, where several share a bound on those in flight? Decisions without tasks and storage.

Everybody has a share of the bound by weight, of one group at least. Beyond it he may use what others leave: but permits that
come free go first to those who wait below their shares, the one that waits longest before all. A group that runs is never
stopped for another.
"""

import itertools
import math
from collections.abc import Callable, Iterable

from agent_loop.sampling import whole


class Permits:
    """A bound on rollouts in flight, divided among accounts.

    Args:
        limit: the most rollouts in flight, over all accounts.
    """

    def __init__(self, limit: int) -> None:
        if whole("max_in_flight", limit) < 1:
            raise ValueError(f"max_in_flight={limit} lets no rollout run; it must be 1 or more")
        self._limit = limit
        self._accounts: list[Permitted] = []
        self._turns = itertools.count()

    def account(self, weight: float, group_size: int) -> "Permitted":
        """For one who starts groups of so many rollouts; `Permitted.weight` may be changed at any time."""
        if group_size > self._limit:
            raise ValueError(
                f"max_in_flight={self._limit} lets no group of {group_size} rollouts run; raise it, or lower the sampler's group_size"
            )
        return Permitted(self, weight, group_size)

    @property
    def in_use(self) -> int:
        """Rollouts in flight, or about to be."""
        return sum(account.in_use for account in self._accounts)

    def join(self, account: "Permitted") -> None:
        """It may ask from now on."""
        self._accounts.append(account)

    def leave(self, account: "Permitted") -> None:
        """It asks no more, and nothing of it runs."""
        self._accounts.remove(account)
        self.wake_next()

    def room(self, account: "Permitted") -> int:
        """Groups that the account may start now."""
        free = self._limit - self.in_use
        others = [other for other in self._waiting() if other is not account]
        before = [other for other in others if account.turn is None or other.turn < account.turn]  # type: ignore[operator]
        beside_all = free - self._claimed(others)
        in_turn = min(free - self._claimed(before), self._share(account) - account.in_use)
        return int(max(0, beside_all, in_turn) // account.group_size)

    def next_turn(self) -> int:
        """The last place in the line of those who wait."""
        return next(self._turns)

    def wake_next(self) -> None:
        """Wake the first of those who wait that may start something now; when it has, it wakes the next."""
        for account in self._waiting():
            if self.room(account):
                account.wake()
                return

    def _waiting(self) -> list["Permitted"]:
        waiting = [account for account in self._accounts if account.turn is not None]
        return sorted(waiting, key=lambda account: account.turn or 0)

    def _claimed(self, accounts: Iterable["Permitted"]) -> int:
        """Permits that are kept for these, since they wait below their shares: for whole groups, and no more than they want."""
        return sum(
            min(account.wanted, max(0, self._share(account) - account.in_use) // account.group_size) * account.group_size
            for account in accounts
        )

    def _share(self, account: "Permitted") -> int:
        total = math.fsum(other.weight for other in self._accounts)
        return max(account.group_size, int(self._limit * account.weight / total)) if account.weight > 0 else 0


class Permitted:
    """One of those who share `Permits`; made by `Permits.account`.

    Attributes:
        weight: of its share.
        group_size: rollouts of a group that it starts.
        wanted: groups that it was refused when it asked last.
        turn: its place in the line; None where it does not wait.
    """

    def __init__(self, permits: Permits, weight: float, group_size: int) -> None:
        self._permits, self.weight, self.group_size = permits, weight, group_size
        self.wake: Callable[[], None] = _nobody
        self.wanted = 0
        self.turn: int | None = None
        self._running = self._starting = 0

    @property
    def in_use(self) -> int:
        """Its rollouts in flight, and those it was permitted to start and has not yet."""
        return self._running + self._starting

    def join(self, wake: Callable[[], None]) -> None:
        """Ask from now on; `wake` is called when it is worth asking again after a refusal."""
        self.wake, self.wanted, self.turn, self._running, self._starting = wake, 0, None, 0, 0
        self._permits.join(self)

    def leave(self) -> None:
        """Nothing of it runs any more."""
        self._permits.leave(self)

    def ask(self, groups: int) -> int:
        """How many of the groups that it wants to start now it may; tell with `has_started` when it has."""
        permitted = min(groups, self._permits.room(self))
        if permitted == groups:
            self.turn = None
        elif self.turn is None or permitted:
            self.turn = self._permits.next_turn()
        self.wanted = groups - permitted
        self._starting = permitted * self.group_size
        self._permits.wake_next()
        return permitted

    def has_started(self, running: int) -> None:
        """What it was permitted to start it has started, or will not; so many rollouts run."""
        self._starting = 0
        self.uses(running)

    def uses(self, running: int) -> None:
        """So many of its rollouts run now."""
        freed, self._running = running < self._running, running
        if freed or not self._starting:
            self._permits.wake_next()


def _nobody() -> None:
    """Nobody waits."""
