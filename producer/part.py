"""`Part`: one task of many, as a `TaskManager` runs it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent_loop import AgentLoop
from buffer import ReplayBuffer, RolloutGroup
from producer.errors import ProducerError
from producer.permits import Permits
from producer.plan import ProducedBatch
from producer.production import Production
from producer.prompts import PromptSampler
from producer.strategy import ProduceStrategy


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """A task of a `TaskManager`.

    Attributes:
        name: of the task, in the buffer too.
        agent_loop: runs its groups.
        sampler: draws them; no other task's.
        strategy: decides; tasks may share one.
        weight: of its share of each batch, in relation to the others; 0 has none.
    """

    name: str
    agent_loop: AgentLoop
    sampler: PromptSampler
    strategy: ProduceStrategy
    weight: float = 1.0


class Part:
    """One task as a `TaskManager` runs it: its production, from batch to batch where the strategy keeps what runs.

    Attributes:
        task: what it was given.
        version: of the policy when its part of the batch was found whole.
    """

    def __init__(self, buffer: ReplayBuffer, task: TrainingTask, permits: Permits | None) -> None:
        self.task, self.version = task, 0
        self._buffer = buffer
        self._permits = None if permits is None else permits.account(task.weight, task.sampler.group_size)
        self._production: Production | None = None
        self._coming: Sequence[int] = ()

    @property
    def production(self) -> Production:
        assert self._production is not None
        return self._production

    @property
    def live(self) -> Production | None:
        return self._production if self._production is not None and not self._production.ended else None

    @property
    def is_as_found(self) -> bool:
        """Whether the policy is that at which the part was whole."""
        return self.production.version == self.version

    def weigh(self, weight: float) -> None:
        if self._permits is not None:
            self._permits.weight = weight

    def check(self, size: int, *, owned: bool) -> None:
        task = self.task
        task.strategy.check_produce(task.agent_loop, task.sampler, size)
        if task.strategy.in_flight == "keep" and not owned:
            raise ProducerError(
                f"the strategy of task {task.name!r} keeps what runs, which needs an owner: use `async with TaskManager(...) as manager`"
            )

    def expects(self, coming: Sequence[int] | None = None) -> None:
        """Parts of these sizes are to come, that of this batch first; None: those that it was told last."""
        self._coming = self._coming if coming is None else coming
        if self._production is not None:
            self._production.expects(self._coming)

    def passes(self) -> None:
        """This batch is about to be taken."""
        if self._production is not None:
            self._production.passes()

    async def fill(self, size: int, owner: asyncio.TaskGroup | None) -> None:
        """Wait until the part is whole; what else runs is stopped, or kept."""
        try:
            if self.task.strategy.in_flight == "keep":
                assert owner is not None
                await self._fill_and_keep(size, owner)
            else:
                await self._fill_and_stop(size)
        except Exception as error:
            error.add_note(f"This happened in task {self.task.name!r}.")
            raise
        finally:
            if self.task.strategy.in_flight == "keep" and self.live is None:
                self._production = None

    async def _fill_and_stop(self, size: int) -> None:
        production = self._production = self._new(size, ahead=False) if self._production is None else self._production
        production.batch.size = size
        found = False
        try:
            while not found:
                async with production.running():
                    self.version = await production.whole(no_bar=self.task.strategy.no_bar)
                found = self.is_as_found
        finally:
            if not found:
                self._production = None

    async def _fill_and_keep(self, size: int, owner: asyncio.TaskGroup) -> None:
        if self._production is not None and self._production.ended:
            failed, self._production = self._production, None
            failed.check()
        if self._production is None:
            self._production = self._new(size, ahead=True)
            await self._production.open(owner)
        self._production.batch.size = size
        self.version = await self._production.whole(no_bar=self.task.strategy.no_bar)

    def _new(self, size: int, *, ahead: bool) -> Production:
        task, plan = self.task, self.task.strategy.plan
        books = task.strategy.books(task.name)
        production = Production(
            self._buffer, plan, task.agent_loop, task.sampler, task.name, size, ahead=ahead, books=books, permits=self._permits
        )
        production.expects(self._coming)
        return production

    async def before_take(self) -> Any:
        return await self.production.before_take()

    def handed_out(self, taken: Sequence[RolloutGroup], before: Any, step: int, began: float) -> ProducedBatch:
        production = self.production
        if self.task.strategy.in_flight != "keep":
            self._production = None
        return production.handed_out(taken, before, step, self.version, began)

    async def close(self) -> None:
        production, self._production = self._production, None
        if production is not None:
            await production.close()
