"""`Flight`: the groups of one task that run now, their tasks, and the checkpointer beside them."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

from agent_loop import AgentLoop
from agent_loop.errors import EngineClosedError, EngineDeadError
from buffer import ReplayBuffer, RolloutGroup, Status
from buffer.errors import BufferClosedError
from producer.checkpoints import Checkpointer, Interval
from producer.filters import GroupFilter
from producer.members import RedundantMembers
from producer.running import GroupRunner, Outcome
from producer.task_pool import TaskPool
from producer.watchdog import RunningRollout

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """How groups are run; values of the strategy.

    Attributes:
        group_filter: says why a completed group is of no use.
        redundant: members that are started and not needed.
        keep_tokens: of what is interrupted.
        interrupt_timeout: seconds that interrupted rollouts have to return before they are cancelled.
        interval: of checkpoints.
    """

    group_filter: GroupFilter | None
    redundant: RedundantMembers | None
    keep_tokens: bool
    interrupt_timeout: float
    interval: Interval


@dataclass(slots=True)
class Flying:
    """One group in flight.

    Attributes:
        oldest: the oldest version that its tokens may have: that at its start, or of tokens kept from before.
        members: those that have not ended.
        group: as it was claimed; its rollouts change while they run.
        since: when it was started.
    """

    oldest: int
    members: int
    group: RolloutGroup
    since: float


class Flight:
    """Runs groups, each in a task of its own, from `start` to their outcome; an async context manager that owns the tasks.

    An error in one cancels the others and leaves the block, when all is stored. Leaving it stops what runs.

    Args:
        buffer: where everything is kept.
        agent_loop: runs the groups.
        task_name: theirs.
        rules: see `Rules`.
        on_change: called when a group ended.
        on_members: called with the number of rollouts in flight when it changes.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        agent_loop: AgentLoop,
        task_name: str,
        rules: Rules,
        on_change: Callable[[], None],
        on_members: Callable[[int], None],
    ) -> None:
        self._buffer, self._agent_loop, self._task_name = buffer, agent_loop, task_name
        self._timeout, self._on_members = rules.interrupt_timeout, on_members
        self._runner = GroupRunner(buffer, agent_loop, rules.group_filter, redundant=rules.redundant, keep_tokens=rules.keep_tokens)
        self._pool = TaskPool[Outcome](on_change)
        self._checkpoints = Checkpointer(buffer, agent_loop, rules.interval, keep_tokens=rules.keep_tokens, lost=self._runner.lost)
        self._flying: dict[int, Flying] = {}
        self._asked: set[int] = set()
        self._members = 0
        self._clock = asyncio.get_running_loop().time
        self.took: deque[float] = deque(maxlen=64)
        """Seconds that recent groups ran."""
        self.last_end: float | None = None
        self._some_cancelled = False
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._pool)
        await self._stack.enter_async_context(self._checkpoints)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            async with self._stack:
                await self.stop()
        finally:
            await self._release()
            with suppress(BufferClosedError):
                # The writer answers in order: what tasks that were cancelled asked for, and no longer waited for, is stored then.
                await self._buffer.cursor(self._task_name)

    def __len__(self) -> int:
        """Groups that were started and whose outcome was not told yet."""
        return len(self._flying)

    @property
    def failed(self) -> bool:
        """Whether one of them raised: the others are being stored, and then the error leaves the block."""
        return self._pool.failed

    @property
    def members(self) -> int:
        """Rollouts that were started and have not ended."""
        return self._members

    @property
    def ending(self) -> set[int]:
        """Groups whose outcome is being stored, or is stored and was not told yet: the buffer may offer them already."""
        return self._runner.ending

    @property
    def oldest(self) -> Counter[int]:
        """How many groups in flight may have tokens of which oldest version."""
        return Counter(flying.oldest for flying in self._flying.values())

    def oldest_running(self) -> list[RunningRollout]:
        """One that runs for the longest time; none where nothing runs. Its tokens are not looked up."""
        return [RunningRollout(str(group_id), flying.since, 0) for group_id, flying in islice(self._flying.items(), 1)]

    def running(self) -> list[RunningRollout]:
        """The rollouts that run, with what they have."""
        return [
            RunningRollout(state.rollout_id, flying.since, int(state.response_ids.size), judged=state.finished)
            for flying in self._flying.values()
            for state in self._agent_loop.snapshot(flying.group).rollouts
            if state.status is Status.RUNNING
        ]

    def older_than(self, version: int) -> list[int]:
        """Groups in flight that may have tokens of a version before `version`."""
        return [group_id for group_id, flying in self._flying.items() if flying.oldest < version]

    def not_asked(self, group_ids: Collection[int]) -> list[int]:
        """Those that were not told to stop yet."""
        return [group_id for group_id in group_ids if group_id not in self._asked]

    def start(self, group: RolloutGroup, version: int) -> None:
        """Run a claimed group, with the policy now at `version`."""
        group_id, oldest = group.group_id, group.min_version
        members = sum(state.status is not Status.COMPLETED for state in group.rollouts)
        self._flying[group_id] = Flying(version if oldest is None else min(version, oldest), members, group, self._clock())
        self._change_members(members)
        self._runner.begins(group_id)
        self._asked.discard(group_id)
        self._checkpoints.watch(group, lambda member: self._member_ended(group_id, member))
        self._pool.start(group_id, self._runner.run(group, self._checkpoints, self._asked))

    def _member_ended(self, group_id: int, member: int) -> None:
        self._runner.member_ended(group_id, member)
        if (flying := self._flying.get(group_id)) is not None and flying.members > 0:
            flying.members -= 1
            self._change_members(-1)

    def _change_members(self, by: int) -> None:
        if by:
            self._members += by
            self._on_members(self._members)

    def ended(self) -> list[Outcome]:
        """The outcomes that came since it was asked last."""
        outcomes = self._pool.taken()
        for outcome in outcomes:
            self._forget(outcome.group_id)
            self.last_end = self._clock()
        if self._some_cancelled:
            # Of these no task told anything; it stored what there was.
            for group_id in self._flying.keys() - set(self._pool.running):
                self._forget(group_id)
                outcomes.append(Outcome(group_id, Status.INTERRUPTED, 0, "it was cancelled", asked=True))
            self._some_cancelled = bool(self._pool.running)
        return outcomes

    def _forget(self, group_id: int) -> None:
        flying = self._flying.pop(group_id)
        self._change_members(-flying.members)
        self.took.append(self._clock() - flying.since)
        self._asked.discard(group_id)
        self._runner.ending.discard(group_id)

    async def interrupt(self, group_ids: Collection[int]) -> None:
        """Tell groups to stop where they are; their outcomes come. An engine that is gone has told them already."""
        if not group_ids:
            return
        self._asked.update(self._flying.keys() & group_ids)
        with suppress(TimeoutError, EngineDeadError, EngineClosedError):
            async with asyncio.timeout(self._timeout):
                await self._agent_loop.interrupt(group_ids)

    async def stop(self) -> None:
        """Interrupt what runs; cancel what does not return in time. When it returns, everything is stored."""
        if self._pool.running:
            await self.interrupt(self._pool.running)
            if not await self._pool.drained(self._timeout):
                await self._cancel()
        await self._release()

    async def drained(self) -> None:
        """Wait until nothing runs; outcomes stay to be told."""
        await self._pool.drained(None)

    async def _cancel(self) -> None:
        self._some_cancelled = True
        self._pool.cancel()
        if not await self._pool.drained(self._timeout):
            _log.warning(
                "groups %s of task %r were cancelled %g s ago and still run: their agent loop holds CancelledError back; "
                "let it through, the batch waits for them",
                self._pool.running,
                self._task_name,
                self._timeout,
            )
            await self._pool.drained(None)

    async def _release(self) -> None:
        # A task that was cancelled before its first step ran no line of its own: its group is still claimed.
        if unstored := sorted(self._runner.unstored - set(self._pool.running)):
            with suppress(BufferClosedError):  # then opening it again will release them
                await self._buffer.release(unstored)
            self._runner.unstored.difference_update(unstored)
