"""What the database holds of the groups that this process runs: the base of the deltas that checkpoints write."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.codec import GroupSnapshot
from buffer.rollout import TOKEN_ARRAYS, RolloutGroup, RolloutState
from buffer.status import Status

_Stored = tuple[Any, ...]
"""A member as it was when it was stored last: the arrays of its tokens, its prompt, and what else may change.

One plain tuple of plain values, None for what is empty: there is one of each rollout in flight, and the garbage collector, which
otherwise goes through all of them again and again, passes over such tuples.
"""

_N_ARRAYS = len(TOKEN_ARRAYS)


def _stored(rollout: RolloutState) -> _Stored:
    return (
        # All of a token: versions too, since those of an engine elsewhere are provisional.
        *_arrays(rollout),
        *(rollout.prompt_ids, rollout.status.value, rollout.attempts, rollout.interruptions, rollout.error),
        *(rollout.finish_reason, rollout.score, rollout.reward),
        # Until then it is decoded anew, and not stored.
        rollout.text if rollout.status is Status.COMPLETED else None,
        tuple(tuple(turn) for turn in rollout.turns) if rollout.turns else None,
        dict(rollout.reward_parts) if rollout.reward_parts else None,
        dict(rollout.metrics) if rollout.metrics else None,
        None if rollout.messages is None else [dict(message) for message in rollout.messages],
        None if rollout.media is None else list(rollout.media),
    )


_arrays = operator.attrgetter(*TOKEN_ARRAYS)


def _start_of(stored: _Stored, rollout: RolloutState) -> int | None:
    """From which token on `rollout` is new: behind those stored, or 0 where it was begun anew. None: nothing is new."""
    now, n, prompt_ids = _stored(rollout), stored[0].size, stored[_N_ARRAYS]
    if rollout.prompt_ids is not prompt_ids and not np.array_equal(rollout.prompt_ids, prompt_ids):  # type: ignore[arg-type]
        return 0
    if not all(_begins_with(now[at], stored[at], n) for at in range(_N_ARRAYS)):
        return 0
    return n if rollout.response_ids.size > n or not _equal(now[_N_ARRAYS + 1 :], stored[_N_ARRAYS + 1 :]) else None


def _begins_with(array: NDArray[Any], stored: NDArray[Any], n: int) -> bool:
    """Whether the first `n` values are those that were stored, bit by bit: log-probabilities may be NaN."""
    if array is stored:  # arrays are replaced, never written to
        return True
    return array.size >= n and array.dtype == stored.dtype and array[:n].tobytes() == stored.tobytes()


def _equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    try:
        return one == other
    except ValueError:  # an array in a message has no one truth value
        return False


class _Asked:
    """A checkpoint that is on its way."""

    def __init__(self, snapshot: GroupSnapshot) -> None:
        self.snapshot = snapshot


class Progress:
    """Keeps, by group, what was stored of each member.

    While a checkpoint is on its way, and after one of which nobody heard, that is not known: the next is then written whole.
    """

    def __init__(self) -> None:
        self._stored: dict[int, list[_Stored] | _Asked] = {}

    def handed_out(self, groups: Iterable[RolloutGroup]) -> None:
        """These run from now on, and are stored as they are."""
        for group in groups:
            self._stored[group.group_id] = [_stored(rollout) for rollout in group.rollouts]

    def asked(self, snapshot: GroupSnapshot) -> "_Asked":
        """The group is to be stored as it is now; see `stored`."""
        asked = self._stored[snapshot.group_id] = _Asked(snapshot)
        return asked

    def stored(self, asked: "_Asked") -> None:
        """What was asked for is stored: unless anything else was since, this is what there is."""
        group_id = asked.snapshot.group_id
        if self._stored.get(group_id) is asked:
            self._stored[group_id] = [_stored(rollout) for rollout in asked.snapshot.rollouts]

    def forget(self, group_id: int) -> None:
        """The group does not run any more, or it is not known what is stored of it."""
        self._stored.pop(group_id, None)

    def starts(self, snapshot: GroupSnapshot) -> Mapping[int, int]:
        """Of each member that changed since it was stored, from which token on."""
        known = self._stored.get(snapshot.group_id)
        if not isinstance(known, list) or len(known) != len(snapshot.rollouts):
            return {rollout.index: 0 for rollout in snapshot.rollouts}
        starts = {rollout.index: _start_of(stored, rollout) for rollout, stored in zip(snapshot.rollouts, known, strict=True)}
        return {index: start for index, start in starts.items() if start is not None}
