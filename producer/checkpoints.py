"""`Checkpointer`: keeps what running groups have decoded in the buffer, an interval at a time, beside the loop and never in its way.

    watch -> decoded, ended ... -> due -> checkpoint -> decoded ... -> forget (the group's own put follows)

What is due is a pure decision, `Unsaved.due_at`; one task waits for the next group that is, and writes all that are. Which is the
next, `Deadlines` knows: thousands of groups may run, and none is looked at before its time.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from agent_loop import AgentLoop
from agent_loop.sampling import number, whole
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.errors import BufferClosedError, DatabaseError, LeaseLostError
from producer.deadlines import Deadlines

_log = logging.getLogger(__name__)

_SIBLINGS_WAIT = 1.0
"""Seconds that a member's outcome waits for those of its siblings, to be stored with them in one write."""


@dataclass(frozen=True, slots=True)
class Interval:
    """How much of a running rollout may be lost with the process: tokens, seconds of decoding; None sets no bound."""

    tokens: int | None
    seconds: float | None

    def __post_init__(self) -> None:
        if self.tokens is not None and whole("checkpoint_tokens", self.tokens) < 1:
            raise ValueError(f"checkpoint_tokens={self.tokens} must be 1 or more; None sets no bound")
        if self.seconds is not None and number("checkpoint_seconds", self.seconds) <= 0:
            raise ValueError(f"checkpoint_seconds={self.seconds} must be above 0; None sets no bound")

    @property
    def is_set(self) -> bool:
        """Whether anything is to be checkpointed."""
        return self.tokens is not None or self.seconds is not None

    @property
    def piece_tokens(self) -> float:
        """Tokens that an engine may hold back: small beside the interval."""
        return math.inf if self.tokens is None else max(1, self.tokens // 8)

    def reached(self, tokens: int) -> bool:
        """Whether so many unsaved tokens are to be written: half of what may be lost, since the write takes its time."""
        return self.tokens is not None and 2 * tokens >= self.tokens


@dataclass(slots=True)
class Unsaved:
    """What of a running group is not in the buffer.

    Attributes:
        since: when it was last checkpointed, or began.
        tokens: decoded since, of the member with the most.
        ended: when the first member ended whose outcome is not stored; None where none did.
    """

    since: float
    tokens: int = 0
    ended: float | None = None

    def due_at(self, interval: Interval) -> float:
        """When it is to be checkpointed, by the clock of `since`; -inf is at once, inf not as it stands."""
        if interval.reached(self.tokens):
            return -math.inf
        by_member = math.inf if self.ended is None else self.ended + _SIBLINGS_WAIT
        by_time = math.inf if interval.seconds is None else self.since + interval.seconds / 2
        return min(by_member, by_time)


class _Watched:
    """One running group: told by its agent loop how it gets on; says by `notify` that it is due at another time."""

    def __init__(
        self, group: RolloutGroup, interval: Interval, notify: Callable[["_Watched"], None], on_ended: Callable[[int], None]
    ) -> None:
        self.group, self._interval, self._notify, self._on_ended = group, interval, notify, on_ended
        self._loop = asyncio.get_running_loop()
        self._by_member = [0] * len(group.rollouts)
        self._saved = _extent(group)
        self.unsaved = Unsaved(self._loop.time())
        self.piece_tokens = int(min(interval.piece_tokens, 1 << 30))

    def decoded(self, member: int, tokens: int) -> None:
        """See `Watcher`."""
        self._by_member[member] += tokens
        if self._by_member[member] > self.unsaved.tokens:
            before, self.unsaved.tokens = self.unsaved.tokens, self._by_member[member]
            if self._interval.reached(self.unsaved.tokens) and not self._interval.reached(before):
                self._notify(self)

    def ended(self, member: int) -> None:
        """See `Watcher`."""
        if self.unsaved.ended is None:
            self.unsaved.ended = self._loop.time()
            self._notify(self)
        self._on_ended(member)

    def due_at(self) -> float:
        """See `Unsaved`."""
        return self.unsaved.due_at(self._interval)

    def begin(self, snapshot: RolloutGroup) -> bool:
        """Count anew from `snapshot` on; whether it holds anything that the last one did not."""
        self._by_member = [0] * len(self._by_member)
        self.unsaved = Unsaved(self._loop.time())
        before, self._saved = self._saved, _extent(snapshot)
        self._notify(self)
        return self._saved != before


def _extent(group: RolloutGroup) -> list[tuple[int, bool, int, int]]:
    """What a checkpoint is worth being written for."""
    return [(state.response_ids.size, state.finished, state.attempts, len(state.reward_parts)) for state in group.rollouts]


class Checkpointer:
    """Checkpoints the groups it is told of, from `watch` to `forget`; an async context manager that owns its one task.

    An error of the database leaves the block as that of a task group does. A checkpoint is never awaited by whoever runs
    the groups, and leaving the block waits for none: what was asked for is written all the same.

    Args:
        buffer: where to.
        agent_loop: runs the groups.
        interval: how much may be lost.
        keep_tokens: store unfinished responses; without, only members that are whole, and the others as not begun.
        lost: called with the id and the reason of a group that is another producer's by now; it is stopped.
    """

    def __init__(
        self, buffer: ReplayBuffer, agent_loop: AgentLoop, interval: Interval, *, keep_tokens: bool, lost: Callable[[int, str], None]
    ) -> None:
        self._buffer, self._agent_loop, self._keep_tokens, self._lost = buffer, agent_loop, keep_tokens, lost
        # Without their tokens the progress of unfinished members is nothing to write.
        self._interval = interval if keep_tokens else Interval(None, None)
        self._is_set = interval.is_set
        self._watched: dict[int, _Watched] = {}
        self._deadlines = Deadlines[int]()
        self._waits_until = math.inf
        self._earlier = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        if self._is_set:
            self._task = self._tasks.create_task(self._run())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for group_id in list(self._watched):
            self.forget(group_id)
        if self._task is not None:
            self._task.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    def watch(self, group: RolloutGroup, on_ended: Callable[[int], None] = lambda _: None) -> None:
        """Checkpoint this group from now on, and call `on_ended` when a member of it ended; before `generate_group`."""
        watched = self._watched[group.group_id] = _Watched(group, self._interval, self._rescheduled, on_ended)
        self._agent_loop.watch(group, watched)
        self._rescheduled(watched)

    def forget(self, group_id: int) -> None:
        """No checkpoint of this group is asked for any more; before its `put`. Again is nothing."""
        if (watched := self._watched.pop(group_id, None)) is not None:
            self._agent_loop.unwatch(watched.group)
            self._deadlines.drop(group_id)

    def _rescheduled(self, watched: _Watched) -> None:
        group_id, at = watched.group.group_id, watched.due_at()
        if self._watched.get(group_id) is watched:
            self._deadlines.set(group_id, at)
            if at < self._waits_until:
                self._earlier.set()

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            if due := [self._watched[group_id] for group_id in self._deadlines.due(clock())]:
                # Those that become due meanwhile are written together, in the next round.
                await self._write(due)
            else:
                await self._until_next()

    async def _until_next(self) -> None:
        self._earlier.clear()
        self._waits_until = self._deadlines.next_at()
        try:
            async with asyncio.timeout_at(None if self._waits_until == math.inf else self._waits_until):
                await self._earlier.wait()
        except TimeoutError:
            return
        finally:
            self._waits_until = -math.inf

    async def _write(self, due: list[_Watched]) -> None:
        async with asyncio.TaskGroup() as writes:
            for watched in due:
                writes.create_task(self._checkpoint(watched))
                # One group a turn of the event loop: copying and encoding all of them at once would hold up the others on it.
                await asyncio.sleep(0)

    async def _checkpoint(self, watched: _Watched) -> None:
        group_id = watched.group.group_id
        if self._watched.get(group_id) is not watched:
            return  # it ended in the meantime, and what its own task stores is more
        try:
            # No await between these: the checkpoint is asked for before a put of what comes later can be.
            snapshot = self._snapshot(watched.group)
            if watched.begin(snapshot) and snapshot.status is Status.RUNNING:
                await self._buffer.checkpoint(snapshot)
        except LeaseLostError as error:
            if self._watched.get(group_id) is watched:
                await self._give_up(group_id, str(error))
        except (DatabaseError, BufferClosedError):
            raise
        except Exception as error:  # noqa: BLE001 - what the group's content makes encoding raise is its put's to report
            watched.begin(watched.group)
            _log.warning("group %d could not be checkpointed, it goes on without: %s: %s", group_id, type(error).__name__, error)

    async def _give_up(self, group_id: int, reason: str) -> None:
        self.forget(group_id)
        self._lost(group_id, reason)
        await self._agent_loop.interrupt([group_id])

    def _snapshot(self, group: RolloutGroup) -> RolloutGroup:
        snapshot = self._agent_loop.snapshot(group)
        return snapshot if self._keep_tokens else replace(snapshot, rollouts=[_whole_or_fresh(state) for state in snapshot.rollouts])


def _whole_or_fresh(state: RolloutState) -> RolloutState:
    if not state.finished:
        state.reset()
    return state
