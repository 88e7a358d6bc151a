"""Running given groups until every one is completed: a trainer that asked for these prompts takes no others."""

import asyncio
from collections import Counter, deque
from collections.abc import Sequence

from agent_loop import AgentLoop
from agent_loop.errors import first_error
from buffer import ReplayBuffer, Status
from producer.errors import FailureBudgetError
from producer.flight import Flight, Rules
from producer.issue import groups_that_fit
from producer.running import Outcome

_MOST_INTERRUPTIONS = 16
"""So often a group may end early by itself before that is an error: an engine that ends every request would go on for ever."""


async def complete(
    buffer: ReplayBuffer,
    agent_loop: AgentLoop,
    task_name: str,
    group_ids: Sequence[int],
    *,
    rules: Rules,
    group_size: int,
    max_in_flight: int | None,
) -> None:
    """Run groups that wait until all are completed; what ends it early leaves them stored as they stand.

    Raises:
        FailureBudgetError: one failed, or ended early again and again.
        EngineDeadError: the engine is gone.
    """
    try:
        await _Completing(buffer, agent_loop, task_name, group_ids, group_size, max_in_flight).run(rules)
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__


class _Completing:
    def __init__(
        self,
        buffer: ReplayBuffer,
        agent_loop: AgentLoop,
        task_name: str,
        group_ids: Sequence[int],
        group_size: int,
        max_in_flight: int | None,
    ) -> None:
        self._buffer, self._agent_loop, self._task_name = buffer, agent_loop, task_name
        self._size, self._limit = group_size, max_in_flight
        self._waiting, self._early = deque(group_ids), Counter[int]()
        self._changed = asyncio.Event()

    async def run(self, rules: Rules) -> None:
        async with Flight(self._buffer, self._agent_loop, self._task_name, rules, self._changed.set, _told_nobody) as flight:
            while self._waiting or len(flight):
                self._changed.clear()
                for outcome in flight.ended():
                    self._settle(outcome)
                await self._start(flight)
                if len(flight):
                    await self._changed.wait()

    async def _start(self, flight: Flight) -> None:
        ready = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._room(flight)))]
        engine = self._agent_loop.engine
        for group in await self._buffer.start(ready):
            flight.start(group, 0 if engine is None else engine.version)

    def _room(self, flight: Flight) -> int:
        """Groups that may start now; one in any case where none runs."""
        if self._limit is None:
            return len(self._waiting)
        return max(int(not len(flight)), groups_that_fit(self._limit, flight.members, self._size))

    def _settle(self, outcome: Outcome) -> None:
        if outcome.status is Status.COMPLETED:
            return
        self._early[outcome.group_id] += 1
        if outcome.status is not Status.INTERRUPTED or self._early[outcome.group_id] > _MOST_INTERRUPTIONS:
            raise FailureBudgetError(
                f"group {outcome.group_id} of task {self._task_name!r} is {outcome.status}, and the trainer needs a completion of "
                f"every prompt it gave; the reason: {outcome.reason}; mend that and start again: what is completed is in the buffer"
            )
        self._waiting.append(outcome.group_id)


def _told_nobody(rollouts: int) -> None:
    """Nobody counts the rollouts in flight."""
