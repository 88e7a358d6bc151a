"""Shows that statuses move as the design's table says, and that a group's status and its members' determine each other."""

from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer import Status
from buffer.errors import IllegalTransitionError
from buffer.status import CLAIMABLE, GROUP_WIDE, TRANSITIONS, check_transition, group_status, member_status, parse_status

DESIGN = {
    "pending": {"running"},
    "running": {"completed", "interrupted", "filtered", "failed"},
    "completed": {"consumed", "expired"},
    "interrupted": {"running", "expired"},
    "expired": {"running", "discarded"},
    "filtered": set(),
    "failed": {"running"},
    "consumed": {"completed", "archived"},
    "archived": set(),
    "discarded": set(),
}
MEMBER_ONLY = sorted(set(Status) - GROUP_WIDE)


def test_the_table_is_the_designs() -> None:
    assert {source.value: {target.value for target in targets} for source, targets in TRANSITIONS.items()} == DESIGN


@pytest.mark.parametrize("source", Status)
@pytest.mark.parametrize("target", Status)
def test_every_transition_is_allowed_by_the_table_or_refused_with_what_is(source: Status, target: Status) -> None:
    if target in DESIGN[source]:
        check_transition(source, target, "group 7")
        return
    with pytest.raises(
        IllegalTransitionError, match=f"group 7 is {source} and cannot become {target}; from {source} it may become: "
    ) as caught:
        check_transition(source, target, "group 7")
    assert all(allowed in str(caught.value) for allowed in DESIGN[source])


def test_groups_are_claimed_from_what_may_run() -> None:
    assert {"pending", "interrupted", "expired", "failed"} == CLAIMABLE


def test_an_unknown_status_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown status 'done'; it must be one of: pending, running, completed"):
        parse_status("done")
    assert parse_status("failed") is Status.FAILED


@settings(deadline=None)
@given(st.lists(st.sampled_from(MEMBER_ONLY), min_size=1, max_size=8))
def test_members_that_can_stand_together_have_one_status_whatever_their_order(members: list[Status]) -> None:
    status = group_status(members)
    assert status == group_status(members[::-1]) == group_status(sorted(members)) == group_status(members * 2)
    assert status in members or status is Status.INTERRUPTED


@pytest.mark.parametrize("status", Status)
def test_equal_members_give_their_own_status(status: Status) -> None:
    assert group_status([status] * 3) is status


@pytest.mark.parametrize("whole", sorted(GROUP_WIDE))
@pytest.mark.parametrize("other", Status)
def test_a_status_of_the_whole_group_stands_beside_no_other(whole: Status, other: Status) -> None:
    if whole is not other:
        with pytest.raises(ValueError, match=f"cannot stand in one group: .*{whole}.* hold for all members or none"):
            group_status([whole, other, other])


def test_a_group_without_members_has_no_status() -> None:
    with pytest.raises(ValueError, match="at least one rollout"):
        group_status([])


def consistent(group: Status, own: tuple[Status, ...]) -> bool:
    """Whether these last outcomes of members can lie under this status of their group in the tables."""
    match group:
        case Status.RUNNING:
            return any(status is not Status.COMPLETED for status in own)
        case Status.INTERRUPTED:
            return any(status is not Status.COMPLETED for status in own)
        case Status.EXPIRED:
            return any(status not in (Status.COMPLETED, Status.INTERRUPTED) for status in own)
        case Status.FAILED:
            return group_status(own) is Status.FAILED
        case _:
            return True


OWN = [Status.PENDING, Status.COMPLETED, Status.INTERRUPTED, Status.EXPIRED, Status.FAILED]


@pytest.mark.parametrize("group", Status)
def test_the_members_statuses_give_the_groups_again(group: Status) -> None:
    tried = [own for size in (1, 2, 3, 4) for own in combinations_with_replacement(OWN, size) if consistent(group, own)]
    assert tried
    for own in tried:
        assert group_status([member_status(group, status) for status in own]) is group
