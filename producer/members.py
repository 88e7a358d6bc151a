"""Which members of a group still have to run, and which run no more? Pure decisions over one group."""

from collections.abc import Sequence
from dataclasses import dataclass

from agent_loop.sampling import whole
from buffer import RolloutGroup, RolloutState, Status

SURPLUS = "surplus: enough siblings had completed before it"
"""The error of a redundant member that was not needed: `ReplayBuffer.query(error="surplus")` finds it."""


def is_surplus(state: RolloutState) -> bool:
    """Whether it was left out of its group because it was not needed, and not because it failed."""
    return state.left_out and state.error is not None and state.error.startswith(SURPLUS)


def missing_members(group: RolloutGroup) -> list[int]:
    """The members that run when the group is run: those that are not completed. What is finished is never generated again."""
    return [state.index for state in group.rollouts if state.status is not Status.COMPLETED]


@dataclass(frozen=True, slots=True)
class RedundantMembers:
    """More members are started than are trained on: the group is whole when all but `extra` of them have completed.

    A slow member then holds nobody up. But those that complete first are the shorter ones, so training on them shortens
    responses; say `bias="accept"` to have it all the same.

    Args:
        extra: members of each group that are not needed; the sampler draws groups of so many more.
        bias: "accept", and nothing else.

    Raises:
        ValueError: `extra` is below 1, or the bias was not accepted.
    """

    extra: int
    bias: str | None = None

    def __post_init__(self) -> None:
        if whole("extra", self.extra) < 1:
            raise ValueError(f"extra={self.extra} adds no member; it must be 1 or more, or leave it out")
        if self.bias != "accept":
            raise ValueError(
                f"bias={self.bias!r}: of {self.extra} redundant members the slowest are dropped, and the slowest are the longest, so "
                "trained responses become shorter than those the policy gives; pass bias='accept' if that is what you want, or leave "
                "redundant members out: over-issuing whole groups drops nothing"
            )

    def needed(self, members: int) -> int:
        """How many members of a group of this size are trained on."""
        if whole("members", members) <= self.extra:
            raise ValueError(f"a group of {members} with extra={self.extra} would train on none; give the sampler a larger group_size")
        return members - self.extra

    def surplus(self, completed: Sequence[int], members: int) -> list[int]:
        """The members to stop and drop, where these completed, in this order; none while the group is not whole."""
        needed = self.needed(members)
        kept = set(completed[:needed])
        return [index for index in range(members) if index not in kept] if len(kept) == needed else []

    def can_complete(self, group: RolloutGroup) -> bool:
        """Whether enough members are left that have not failed for good."""
        failed = sum(state.status is Status.FAILED or state.left_out for state in group.rollouts)
        return len(group.rollouts) - failed >= self.needed(len(group.rollouts))

    def leave_out(self, group: RolloutGroup, completed: Sequence[int]) -> int:
        """Make a whole group storable, without its surplus; gives the tokens that are dropped with it.

        Surplus members become left out (`RolloutState.left_out`): the group is completed with them, and audited and counted as
        any other; they hold no tokens, so that staleness is that of what is trained, and say why. None is run again.
        """
        dropped = 0
        for index in self.surplus(completed, len(group.rollouts)):
            state = group.rollouts[index]
            dropped += int(state.loss_mask.sum())
            failed = state.status is Status.FAILED or state.left_out
            state.reset()
            state.status = Status.COMPLETED
            if not failed:  # attempts of it may have, but that is not why it is left out
                state.error = SURPLUS if state.error is None else f"{SURPLUS}; before that: {state.error}"
        return dropped
