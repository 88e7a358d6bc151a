"""`Evaluation`: a set of prompts run at one version of the weights, stored in the buffer under a task name of its own.

_drawn (or found open) -> _pin -> Flight.start -> (outcomes) -> ... until all ended at one version -> take

Its prompts are drawn in one transaction, and are consumed when it is finished. So an evaluation is open or finished, also
after a crash; one that is open is gone on with, and what of it was sampled by the weights of now is not sampled again.
"""

import asyncio
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from agent_loop import AgentLoop
from agent_loop.errors import first_error
from buffer import DrawnRow, Position, ReplayBuffer, RolloutGroup, Status
from buffer.codec import to_json
from producer.checkpoints import Interval
from producer.errors import DatasetError, FailureBudgetError, ProducerError
from producer.flight import Flight, Rules
from producer.metrics import Metrics
from producer.permits import Permitted

_RULES = Rules(None, redundant=None, keep_tokens=True, interrupt_timeout=10.0, interval=Interval(512, 10.0))
_OPEN = (Status.PENDING, Status.RUNNING, Status.INTERRUPTED, Status.EXPIRED, Status.COMPLETED)
_TO_RUN = (Status.EXPIRED, Status.INTERRUPTED, Status.PENDING)
_MOST_UPDATES = 10
_MOST_INTERRUPTED = 16
"""Times the prompts: groups that may end early by themselves."""
_REMEMBERED = 50
"""Evaluations of a task of whose prompts it is known which they were."""
_MOST = 1_000_000


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        task_name: its own.
        version: of the weights that sampled every token of it.
        step: at which it is consumed.
        groups: one a prompt, in the order of the prompts; without those that failed.
        failed: prompts whose groups failed.
        threshold: the score from which on a rollout passes.
    """

    task_name: str
    version: int
    step: int
    groups: Sequence[RolloutGroup]
    failed: int
    threshold: float

    @cached_property
    def score_mean(self) -> float:
        """Of all rollouts that have a score; NaN where none has."""
        scores = [state.score for group in self.groups for state in group.rollouts if state.score is not None]
        return float(np.mean(scores)) if scores else math.nan

    @cached_property
    def pass_at(self) -> Mapping[int, float]:
        """By k (1, 2, 4, ... up to the group's size), the chance that one of k rollouts of a prompt passes, over all prompts.

        Estimated without bias from all rollouts of each prompt; one without a score does not pass.
        """
        size = min(len(group.rollouts) for group in self.groups)
        ks = [2**power for power in range(size.bit_length()) if 2**power <= size]
        return {k: float(np.mean([self._pass_at(group, k) for group in self.groups])) for k in ks}

    def _pass_at(self, group: RolloutGroup, k: int) -> float:
        n = len(group.rollouts)
        passed = sum(state.score is not None and state.score >= self.threshold for state in group.rollouts)
        return 1.0 - math.comb(n - passed, k) / math.comb(n, k)

    @property
    def metrics(self) -> Metrics:
        """One flat mapping, ready for any logger."""
        return {
            f"eval/{self.task_name}/version": self.version,
            f"eval/{self.task_name}/prompts": len(self.groups),
            f"eval/{self.task_name}/failed": self.failed,
            f"eval/{self.task_name}/score_mean": self.score_mean,
            **{f"eval/{self.task_name}/pass@{k}": value for k, value in self.pass_at.items()},
        }


class Evaluation:
    """Runs one evaluation to its end.

    Args:
        buffer: where it is kept.
        agent_loop: runs its groups.
        task_name: its own.
        rows: the prompts, as a dataset has them.
        group_size: rollouts a prompt.
        permits: for rollouts in flight, shared with others; None asks nobody.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        agent_loop: AgentLoop,
        task_name: str,
        rows: Sequence[Mapping[str, Any]],
        group_size: int,
        permits: Permitted | None,
    ) -> None:
        self._buffer, self._agent_loop, self._task_name, self._permits = buffer, agent_loop, task_name, permits
        self._rows, self._group_size = rows, group_size
        self._changed = asyncio.Event()
        self._number = 0
        self._to_run: list[int] = []
        self._pinned: int | None = None
        self._updates = self._interrupted = 0
        self._last_reason: str | None = None

    async def run(self, step: int, threshold: float) -> EvaluationResult:
        """Run what of it is not finished; consumed at `step` when it is whole."""
        await self._find_or_draw()
        try:
            version = await self._run()
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        found = {status: len(await self._mine(status)) for status in (Status.COMPLETED, Status.FAILED)}
        if (elsewhere := len(self._rows) - sum(found.values())) > 0:
            raise ProducerError(f"{elsewhere} groups of the evaluation {self._task_name!r} run in another process; one at a time")
        if not found[Status.COMPLETED]:
            raise ProducerError(f"every prompt of the evaluation {self._task_name!r} failed, the last because: {self._last_reason}")
        # What a rewind gave back comes first, in its old order: so these are of the oldest evaluation that is open.
        taken = await self._buffer.take(self._task_name, found[Status.COMPLETED], step=step)
        groups = sorted(taken, key=lambda group: group.position or Position(0, 0))
        return EvaluationResult(self._task_name, version, step, groups, found[Status.FAILED], threshold)

    # -- its prompts --------------------------------------------------------------------------------------------

    async def _find_or_draw(self) -> None:
        """The oldest evaluation that is open, which must be of these prompts, or a new one."""
        cursor = await self._buffer.cursor(self._task_name)
        if cursor.state is not None and "evaluations" not in cursor.state:
            raise ValueError(f"task_name={self._task_name!r} is a task that was trained on; an evaluation needs a name of its own")
        known: dict[str, str] = dict((cursor.state or {}).get("evaluations", {}))
        digest = self._digest()
        opened = [await self._buffer.positions(self._task_name, status, limit=_MOST) for status in _OPEN]
        numbers = {place.epoch for places in opened for place in places.values() if place is not None}
        if numbers:
            self._number = min(numbers)
            if known.get(str(self._number), digest) != digest:
                raise ValueError(
                    f"an evaluation {self._task_name!r} of other prompts, or of another group_size, is not finished; finish it with "
                    "those, or use another task_name"
                )
            return
        self._number = max(map(int, known), default=-1) + 1
        kept = dict(sorted({**known, str(self._number): digest}.items(), key=lambda item: int(item[0]))[-_REMEMBERED:])
        rows = [DrawnRow(row, Position(self._number, offset)) for offset, row in enumerate(self._rows)]
        await self._buffer.draw(self._task_name, rows, group_size=self._group_size, moves=cursor.moves, cursor={"evaluations": kept})

    def _digest(self) -> str:
        for number, row in enumerate(self._rows):
            try:
                RolloutGroup.from_row(0, row, group_size=1, task_name=self._task_name, position=Position(0, number))
            except (ValueError, TypeError) as error:
                raise DatasetError(f"row {number} of the evaluation {self._task_name!r} is bad: {error}; mend it") from error
        text = to_json({"rows": [dict(row) for row in self._rows], "group_size": self._group_size}, "the evaluation's rows")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    async def _mine(self, status: Status) -> list[int]:
        """Its groups of this status, the oldest first."""
        places = await self._buffer.positions(self._task_name, status, limit=_MOST)
        return [group_id for group_id, place in places.items() if place is not None and place.epoch == self._number]

    # -- running them -------------------------------------------------------------------------------------------

    @property
    def _version(self) -> int:
        return 0 if self._agent_loop.engine is None else self._agent_loop.engine.version

    async def _run(self) -> int:
        """Run until all groups ended with tokens of one version, that of now; gives it."""
        permits = self._permits
        if permits is not None:
            permits.join(self._changed.set)
        try:
            async with Flight(self._buffer, self._agent_loop, self._task_name, _RULES, self._changed.set, self._rollouts) as flight:
                while True:
                    self._changed.clear()
                    stopped = self._stopped(flight)
                    if stopped or self._pinned != self._version:
                        await self._pin(flight)
                    await self._start(flight)
                    if not len(flight) and not self._to_run and not await self._expire() and self._pinned == self._version:
                        return self._version
                    if len(flight) or self._to_run:
                        await self._changed.wait()
                    else:
                        self._pinned = None  # some that ended had tokens of before an update
        finally:
            if permits is not None:
                permits.leave()

    def _rollouts(self, n: int) -> None:
        if self._permits is not None:
            self._permits.uses(n)

    def _stopped(self, flight: Flight) -> bool:
        """Whether groups ended early since it was asked last."""
        stopped = False
        for outcome in flight.ended():
            self._last_reason = outcome.reason
            stopped |= outcome.status is Status.INTERRUPTED
            self._interrupted += outcome.status is Status.INTERRUPTED and not outcome.asked
        if self._interrupted > _MOST_INTERRUPTED * len(self._rows):
            raise FailureBudgetError(
                f"groups of the evaluation {self._task_name!r} ended early {self._interrupted} times, the last because: {self._last_reason}"
            )
        return stopped

    async def _pin(self, flight: Flight) -> None:
        """Only tokens of the version of now count; what has others runs again."""
        version = self._version
        if version != self._pinned:
            self._updates += self._pinned is not None
            if self._updates > _MOST_UPDATES:
                raise ProducerError(
                    f"the weights were updated {self._updates} times while the evaluation {self._task_name!r} ran, which began anew each "
                    "time; update them with `async with manager.update_weights(...)`, which waits for it"
                )
            self._pinned = version
        await flight.interrupt(flight.older_than(version))
        await self._expire()
        waiting = [group_id for status in _TO_RUN for group_id in await self._mine(status)]
        # Of those that are stored and whose outcome was not told yet it will be told, and then this comes again.
        self._to_run = [group_id for group_id in waiting if group_id not in flight.ending]

    async def _expire(self) -> int:
        return await self._buffer.expire(self._task_name, version=self._version, max_staleness=0)

    async def _start(self, flight: Flight) -> None:
        wanted = len(self._to_run)
        n = wanted if self._permits is None else self._permits.ask(wanted)
        try:
            now, self._to_run = self._to_run[:n], self._to_run[n:]
            for group in await self._buffer.claim(self._task_name, n, statuses=_TO_RUN, among=now) if n else ():
                flight.start(group, self._version)
        finally:
            if self._permits is not None:
                self._permits.has_started(flight.members)
