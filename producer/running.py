"""`GroupRunner`: one group from its claim to what is stored of it, whatever becomes of it."""

from collections.abc import Container
from dataclasses import dataclass

from agent_loop import AgentLoop
from buffer import ReplayBuffer, RolloutGroup, Status
from buffer.errors import BufferClosedError, DatabaseError, IllegalTransitionError, LeaseLostError
from producer.checkpoints import Checkpointer
from producer.filters import GroupFilter, checked_reason
from producer.interrupt import settle_unfinished
from producer.members import RedundantMembers
from producer.surplus import SurplusStop


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a group that was started.

    Attributes:
        group_id: of the group.
        status: in which it was stored.
        tokens: sampled by this run of it.
        reason: why it is not completed.
        asked: whether it was told to stop.
    """

    group_id: int
    status: Status
    tokens: int
    reason: str | None
    asked: bool = False


class GroupRunner:
    """Runs groups by their agent loop, asks the filter, and stores what came of them.

    Args:
        buffer: where to.
        agent_loop: runs them.
        group_filter: says why a completed one is of no use.
        redundant: members that are started and not needed.
        keep_tokens: of what is unfinished.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        agent_loop: AgentLoop,
        group_filter: GroupFilter | None,
        *,
        redundant: RedundantMembers | None,
        keep_tokens: bool,
    ) -> None:
        self._buffer, self._agent_loop, self._group_filter, self._keep_tokens = buffer, agent_loop, group_filter, keep_tokens
        self.unstored: set[int] = set()
        """Groups that were claimed for this runner, and for which nothing was asked to be stored yet."""
        self.ending: set[int] = set()
        """Groups for which it was asked; whoever is told of their outcome takes them out."""
        self._lost: dict[int, str] = {}
        self._redundant = redundant
        self._surplus: dict[int, SurplusStop] = {}

    def begins(self, group_id: int) -> None:
        """The group was claimed for this runner, perhaps after it had been lost."""
        self.unstored.add(group_id)
        self._lost.pop(group_id, None)

    def lost(self, group_id: int, reason: str) -> None:
        """The group is another producer's by now: nothing is to be stored of it."""
        self._lost[group_id] = reason

    def member_ended(self, group_id: int, member: int) -> None:
        """A member of a group that runs is whole and judged, or failed for good."""
        if (surplus := self._surplus.get(group_id)) is not None:
            surplus.ended(member)

    async def run(self, group: RolloutGroup, checkpoints: Checkpointer, asked: Container[int]) -> Outcome:
        """Run a claimed group to its outcome. `asked` holds the groups that are to stop: one of these is not begun."""
        group_id, tokens_before = group.group_id, _tokens(group)
        try:
            try:
                if group_id not in asked:  # else it was told to stop before its first step
                    group = _same_group(group, await self._generate(group))
            finally:
                checkpoints.forget(group_id)
            self._decide(group)
        except BaseException:
            # Recorded first, raised again after: even a second cancellation cannot undo a write that was asked for.
            if group.status is Status.COMPLETED and self._group_filter is not None:
                for state in group.rollouts:  # not completed before it went through the filter: judged again next time
                    state.status = Status.RUNNING
            settle_unfinished(group, keep_tokens=self._keep_tokens)
            await self._store(group_id, group)
            raise
        sampled = _tokens(group) - tokens_before
        if group.status in (Status.RUNNING, Status.INTERRUPTED):
            settle_unfinished(group, keep_tokens=self._keep_tokens)
        stored = await self._store(group_id, group)
        if stored is None:
            return Outcome(group_id, Status.INTERRUPTED, sampled, f"it was lost: {self._lost.pop(group_id)}", group_id in asked)
        return Outcome(group_id, stored.status, sampled, _reason(stored), group_id in asked)

    async def _generate(self, group: RolloutGroup) -> RolloutGroup:
        if self._redundant is None:
            return await self._agent_loop.generate_group(group)
        surplus = self._surplus[group.group_id] = SurplusStop(self._agent_loop, group, self._redundant)
        try:
            return await surplus.generate_group()
        finally:
            del self._surplus[group.group_id]

    def _decide(self, group: RolloutGroup) -> None:
        if group.status is not Status.COMPLETED or self._group_filter is None:
            return
        reason = checked_reason(self._group_filter, group)
        if reason is not None:
            group.mark(Status.FILTERED, reason=reason)

    async def _store(self, group_id: int, group: RolloutGroup) -> RolloutGroup | None:
        """What was stored; None where the group is another producer's by now."""
        self.ending.add(group_id)
        self.unstored.discard(group_id)  # a put that is cancelled is done all the same
        if group_id in self._lost:
            return None
        try:
            return await self._stored(group_id, group)
        except IllegalTransitionError as error:  # even as a failed one: whoever has it now released it, or ran it to its end
            self._lost[group_id] = str(error)
            self.unstored.discard(group_id)
            return None

    async def _stored(self, group_id: int, group: RolloutGroup) -> RolloutGroup:
        """Store the group, or in its place a failed one where an agent loop left it in a state that cannot be stored."""
        try:
            await self._buffer.put(group)
            return group
        except (DatabaseError, BufferClosedError, LeaseLostError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever the group's content makes encoding raise is a failed rollout
            self.unstored.add(group_id)
            failed = await self._failed(group_id, f"it cannot be stored: {type(error).__name__}: {error}")
        self.unstored.discard(group_id)
        await self._buffer.put(failed)
        return failed

    async def _failed(self, group_id: int, reason: str) -> RolloutGroup:
        """The group as the buffer has it, its unfinished members failed."""
        group = await self._buffer.get(group_id)
        for state in group.rollouts:
            if state.status is not Status.COMPLETED:
                state.status, state.error = Status.FAILED, reason.encode(errors="backslashreplace").decode()
        return group


def _same_group(given: RolloutGroup, returned: object) -> RolloutGroup:
    if not isinstance(returned, RolloutGroup):
        raise TypeError(f"generate_group returned {returned!r:.80} for group {given.group_id}; it must return the group")
    return returned


def _tokens(group: RolloutGroup) -> int:
    return sum(int(state.loss_mask.sum()) for state in group.rollouts)


def _reason(group: RolloutGroup) -> str | None:
    if group.status is Status.FILTERED:
        return group.filter_reason
    if group.status is Status.INTERRUPTED:
        return "its agent loop or its engine ended it early, unasked"
    return next((state.error for state in group.rollouts if state.error), None)
