"""What the database holds of the groups that this process runs: the base of the deltas that checkpoints write."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from buffer.codec import GroupSnapshot
from buffer.rollout import RolloutGroup, RolloutState


class _Stored(NamedTuple):
    """A member as it was when it was stored last: its tokens, and what else may change."""

    response_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    others: tuple[Any, ...]

    @classmethod
    def of(cls, rollout: RolloutState) -> "_Stored":
        others = (rollout.status, rollout.attempts, rollout.interruptions, rollout.error, rollout.finish_reason, rollout.score)
        return cls(rollout.response_ids, rollout.logprobs, rollout.versions, others)

    def start_of(self, rollout: RolloutState) -> int:
        """From which token on `rollout` is new: behind those stored, or 0 where it was begun anew."""
        n = self.response_ids.size
        # Versions too: those of an engine elsewhere are provisional until the request ends.
        now, before = (rollout.response_ids, rollout.logprobs, rollout.versions), (self.response_ids, self.logprobs, self.versions)
        return n if all(np.array_equal(new[:n], old) for new, old in zip(now, before, strict=True)) else 0


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
            self._stored[group.group_id] = [_Stored.of(rollout) for rollout in group.rollouts]

    def asked(self, snapshot: GroupSnapshot) -> "_Asked":
        """The group is to be stored as it is now; see `stored`."""
        asked = self._stored[snapshot.group_id] = _Asked(snapshot)
        return asked

    def stored(self, asked: "_Asked") -> None:
        """What was asked for is stored: unless anything else was since, this is what there is."""
        group_id = asked.snapshot.group_id
        if self._stored.get(group_id) is asked:
            self._stored[group_id] = [_Stored.of(rollout) for rollout in asked.snapshot.rollouts]

    def forget(self, group_id: int) -> None:
        """The group does not run any more, or it is not known what is stored of it."""
        self._stored.pop(group_id, None)

    def starts(self, snapshot: GroupSnapshot) -> Mapping[int, int]:
        """Of each member that changed since it was stored, from which token on."""
        known = self._stored.get(snapshot.group_id)
        if not isinstance(known, list) or len(known) != len(snapshot.rollouts):
            return {rollout.index: 0 for rollout in snapshot.rollouts}
        found = {}
        for rollout, stored in zip(snapshot.rollouts, known, strict=True):
            start, now = stored.start_of(rollout), _Stored.of(rollout)
            if start < rollout.response_ids.size or start < stored.response_ids.size or now.others != stored.others:
                found[rollout.index] = start
        return found
