"""A bound on rollouts in flight is shared by weight: never exceeded, nothing idle while somebody could use it, nobody starves."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.permits import Permits, Permitted


class User:
    """Starts groups whenever it may, as many as it wants; `run` holds its groups by the rollouts of each that run."""

    def __init__(self, permits: Permits, weight: float, size: int, wants: int = 10**6) -> None:
        self.account: Permitted = permits.account(weight, size)
        self.run: list[int] = []
        self.wants, self.woken, self.started = wants, False, 0
        self.account.join(self._wake)

    def _wake(self) -> None:
        self.woken = True

    def act(self) -> None:
        """Ask, as after each change."""
        self.woken = False
        n = self.account.ask(self.wants)
        self.run += [self.account.group_size] * n
        self.wants -= n
        self.started += n
        self.account.has_started(sum(self.run))

    def end(self, which: int) -> None:
        """A member of one of its groups ends."""
        which %= len(self.run)
        self.run[which] -= 1
        if not self.run[which]:
            del self.run[which]
        self.account.uses(sum(self.run))


def settle(users: list[User]) -> None:
    while woken := [user for user in users if user.woken]:
        woken[0].act()


def in_flight(users: list[User]) -> list[int]:
    return [sum(user.run) for user in users]


def play(users: list[User], ends: list[int]) -> None:
    """Members end one after the other, here and there; whose ended asks again, and whoever is woken."""
    for pick in ends:
        running = [user for user in users if user.run]
        user = running[pick % len(running)]
        user.end(pick)
        user.act()
        settle(users)


def test_each_gets_its_share_where_all_want_more() -> None:
    permits = Permits(12)
    users = [User(permits, weight, 2) for weight in (1, 2)]
    users[0].act()
    assert in_flight(users) == [12, 0]  # nobody else wanted any
    users[1].act()
    play(users, list(range(200)))
    assert sum(in_flight(users)) == 12
    assert in_flight(users)[0] == pytest.approx(4, abs=1)  # to the group


def test_what_one_leaves_others_use_and_give_back_as_it_comes_free() -> None:
    permits = Permits(8)
    one, other = User(permits, 1, 2, wants=1), User(permits, 1, 2)
    for user in (one, other):
        user.act()
    assert in_flight([one, other]) == [2, 6]
    one.wants = 3
    one.act()
    assert in_flight([one, other]) == [2, 6]
    other.end(0)
    other.end(0)
    other.act()
    settle([one, other])
    assert in_flight([one, other]) == [4, 4]


def test_where_there_is_room_for_one_group_only_all_have_their_turn() -> None:
    users = [User(permits, weight, 4) for permits in [Permits(5)] for weight in (1, 1, 10)]
    for user in users:
        user.act()
    play(users, list(range(300)))
    started = sorted(user.started for user in users)
    assert sum(started) > 60
    assert started[2] - started[0] <= 2


def test_one_that_leaves_gives_its_permits_to_who_waits() -> None:
    permits = Permits(4)
    users = [User(permits, 1, 4), User(permits, 1, 4)]
    for user in users:
        user.act()
    assert in_flight(users) == [4, 0]
    users[0].account.leave()
    assert users[1].woken
    settle(users)
    assert in_flight(users)[1] == 4


def test_without_weight_it_uses_only_what_nobody_waits_for() -> None:
    permits = Permits(4)
    none, some = User(permits, 0, 2), User(permits, 1, 2, wants=0)
    none.act()
    assert in_flight([none, some]) == [4, 0]
    some.wants = 10**6
    some.act()
    play([none, some], [0] * 20)
    assert in_flight([none, some]) == [0, 4]


parts = st.lists(st.tuples(st.sampled_from([0.5, 1, 2, 7]), st.integers(1, 4), st.integers(0, 30)), min_size=1, max_size=4)


@settings(max_examples=100)
@given(st.integers(4, 20), parts, st.data())
def test_never_more_than_the_bound_no_permit_idle_that_a_waiting_one_could_use_and_all_is_done(
    limit: int, given_parts: list[tuple[float, int, int]], data: Any
) -> None:
    permits = Permits(limit)
    users = [User(permits, weight, size, wants) for weight, size, wants in given_parts]
    total = [user.wants for user in users]
    for user in users:
        user.act()
    settle(users)
    while any(user.run for user in users):
        assert sum(in_flight(users)) == permits.in_use <= limit
        waiting = [user for user in users if user.wants]
        free = limit - permits.in_use
        # A permit is kept back only for a whole group of one that waits below its share: for less than a group of each.
        assert not waiting or free < sum(user.account.group_size for user in waiting)
        play(users, [data.draw(st.integers(0, 99))])
    assert [user.started for user in users] == total


def test_shares_come_out_by_weight() -> None:
    permits = Permits(24)
    users = [User(permits, weight, size) for weight, size in ((1, 1), (2, 1), (3, 1))]
    for user in users:
        user.act()
    held = Counter[int]()
    for turn in range(600):
        play(users, [turn * 7919])
        held.update(dict(enumerate(in_flight(users))) if turn > 100 else {})
    shares = [held[index] / held.total() for index in range(3)]
    assert shares == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.03)


def test_a_group_that_is_larger_than_the_bound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_in_flight=3 .* 4 rollouts"):
        Permits(3).account(1, 4)
    with pytest.raises(ValueError, match="max_in_flight=0"):
        Permits(0)
