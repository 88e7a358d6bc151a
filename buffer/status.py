"""Statuses of rollouts and groups, and the one table of legal transitions between them."""

from collections.abc import Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import assert_never

from buffer.errors import IllegalTransitionError


class Status(StrEnum):
    """Where a group (and each of its rollouts) stands; the meaning of each is in docs/reference/statuses.md."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    INTERRUPTED = "interrupted"
    EXPIRED = "expired"
    FILTERED = "filtered"
    FAILED = "failed"
    CONSUMED = "consumed"
    ARCHIVED = "archived"
    DISCARDED = "discarded"


_S = Status

TRANSITIONS: MappingProxyType[Status, frozenset[Status]] = MappingProxyType(
    {
        _S.PENDING: frozenset({_S.RUNNING}),
        _S.RUNNING: frozenset({_S.COMPLETED, _S.INTERRUPTED, _S.FILTERED, _S.FAILED}),
        _S.COMPLETED: frozenset({_S.CONSUMED, _S.EXPIRED}),
        _S.INTERRUPTED: frozenset({_S.RUNNING, _S.EXPIRED}),
        _S.EXPIRED: frozenset({_S.RUNNING, _S.DISCARDED}),
        _S.FILTERED: frozenset(),
        _S.FAILED: frozenset({_S.RUNNING}),
        _S.CONSUMED: frozenset({_S.COMPLETED, _S.ARCHIVED}),
        _S.ARCHIVED: frozenset(),
        _S.DISCARDED: frozenset(),
    }
)
"""Status -> the statuses it may go to."""

GROUP_WIDE = frozenset({_S.FILTERED, _S.CONSUMED, _S.ARCHIVED, _S.DISCARDED})
"""Statuses that a group has as a whole: its members have it all or none."""

CLAIMABLE = frozenset(status for status, goes_to in TRANSITIONS.items() if _S.RUNNING in goes_to)
"""Statuses from which a group may be claimed by a producer."""


def parse_status(value: object) -> Status:
    """`value` as a `Status`; an unknown one is refused with the list of those that exist."""
    try:
        return Status(value)  # type: ignore[arg-type]  # StrEnum's own error is what we translate
    except ValueError:
        known = ", ".join(Status)
        raise ValueError(f"unknown status {value!r}; it must be one of: {known}") from None


def check_transition(source: Status, target: Status, what: str) -> None:
    """Raise `IllegalTransitionError` unless the table allows `source` -> `target`; `what` names the group."""
    if target not in TRANSITIONS[source]:
        allowed = ", ".join(sorted(TRANSITIONS[source])) or "nothing: it is final"
        raise IllegalTransitionError(f"{what} is {source} and cannot become {target}; from {source} it may become: {allowed}")


def group_status(members: Sequence[Status]) -> Status:
    """The status of a group whose members have these; no two answers fit one input, and there is no default.

    One running member makes the group running; then one failed, one expired, one interrupted decides, in this
    order. A group of which some members are pending and some completed was stopped half-way: interrupted.
    """
    present = set(members)
    if not present:
        raise ValueError("a group without rollouts has no status; give it at least one rollout")
    for status in (_S.RUNNING, _S.FAILED, _S.EXPIRED, _S.INTERRUPTED):
        if status in present:
            _refuse_group_wide_beside_others(present)
            return status
    if present == {_S.PENDING, _S.COMPLETED}:
        return _S.INTERRUPTED
    if len(present) == 1:
        return present.pop()
    _refuse_group_wide_beside_others(present)
    raise AssertionError(f"unreachable: {present}")


def _refuse_group_wide_beside_others(present: set[Status]) -> None:
    if present & GROUP_WIDE:
        raise ValueError(
            f"statuses {sorted(present)} cannot stand in one group: {sorted(present & GROUP_WIDE)} hold for all members or none"
        )


def member_status(group: Status, own: Status) -> Status:
    """The status of a member whose own last outcome was `own`, in a group that is now `group`.

    The store moves a group by updating its one row; this gives its members' statuses back, so that
    `group_status` of the result is `group` again.
    """
    match group:
        case Status.FILTERED | Status.CONSUMED | Status.ARCHIVED | Status.DISCARDED | Status.PENDING | Status.COMPLETED:
            return group
        case Status.RUNNING:
            return own if own is Status.COMPLETED else Status.RUNNING
        case Status.INTERRUPTED:
            return own if own is Status.COMPLETED else Status.INTERRUPTED
        case Status.EXPIRED:
            return own if own in (Status.COMPLETED, Status.INTERRUPTED) else Status.EXPIRED
        case Status.FAILED:
            return own
        case _:
            assert_never(group)
