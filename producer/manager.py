"""`TaskManager`: batches of many tasks, shared out by weight, and evaluation beside their training."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from agent_loop import AgentLoop
from agent_loop.agent_loop import first_error
from agent_loop.sampling import whole
from buffer import ReplayBuffer, RolloutGroup, Share, Status
from producer.errors import ProducerError
from producer.merging import merged_metrics
from producer.metrics import Metrics
from producer.permits import Permits
from producer.production import ProducedBatch, Production
from producer.prompts import PromptSampler
from producer.shares import allot, checked_weights
from producer.strategy import ProduceStrategy

_log = logging.getLogger(__name__)

Weights = Callable[[int, Mapping[str, float]], Mapping[str, float]]
"""The weights of a batch, from its step and the metrics of the batch before; a task that is left out keeps its weight."""


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


class TaskManager:
    """Produces batches of many tasks into one buffer; an async context manager that owns what runs.

    ```python
    async with TaskManager(buffer, [TrainingTask("math", loop, sampler, strategy, weight=2), ...]) as manager:
        async for batch in manager.batches(64):
            ...
    ```

    Each batch is shared out by weight, and what is left over is carried to the next, so that no task starves (`producer.shares`).
    The parts are produced at the same time, each by its own strategy, and are consumed together: a batch is handed out whole or
    not at all. How batches were shared out is kept with the steps they were consumed at, so a rewound run goes on with it.

    Args:
        buffer: where everything is kept; that of every strategy.
        tasks: at least one.
        max_in_flight: the most rollouts in flight, over all tasks; divided by weight, and what a task does not use others may
            (`producer.permits`). Bounds of the strategies hold beside it. None sets none.
        weights: called before each batch with its step and the metrics of the batch before; gives weights from then on.
        evaluation_weight: of the share of permits that an evaluation has while it runs, in relation to the tasks' weights.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        tasks: Sequence[TrainingTask],
        *,
        max_in_flight: int | None = None,
        weights: Weights | None = None,
        evaluation_weight: float = 1.0,
    ) -> None:
        _check_tasks(buffer, tasks)
        self._buffer, self._tasks = buffer, {task.name: task for task in tasks}
        self._weights: dict[str, float] = dict(checked_weights({task.name: task.weight for task in tasks}))
        checked_weights({"evaluation": evaluation_weight})
        self._reweigh, self._evaluation_weight = weights, evaluation_weight
        self._permits = None if max_in_flight is None else Permits(max_in_flight)
        self._parts = {task.name: _Part(buffer, task, self._permits) for task in tasks}
        self._group: asyncio.TaskGroup | None = None
        self._busy = False
        self._metrics: Metrics = {}
        self._told_of_removed = False

    # -- what runs ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise ProducerError("this manager is entered already; one `async with` at a time")
        self._group = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop what runs: it is interrupted and stored."""
        group, self._group = self._group, None
        assert group is not None
        try:
            for part in self._parts.values():
                await part.close()
        except BaseException as stopped:
            await group.__aexit__(type(stopped), stopped, stopped.__traceback__)
            raise
        await group.__aexit__(None, None, None)

    # -- weights of tasks ---------------------------------------------------------------------------------------

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the tasks, from the next batch on."""
        return dict(self._weights)

    def set_weight(self, name: str, weight: float) -> None:
        """Give a task another weight, from the next batch on; `ValueError` if it is none, or the last above 0 would go."""
        self._set_weights({name: weight})

    def _set_weights(self, changed: Mapping[str, float]) -> None:
        if unknown := [name for name in changed if name not in self._tasks]:
            raise ValueError(f"there is no task {unknown[0]!r}; the tasks are {sorted(self._tasks)}")
        self._weights = dict(checked_weights({**self._weights, **changed}))
        for name, part in self._parts.items():
            part.weigh(self._weights[name])

    async def removed(self) -> dict[str, dict[Status, int]]:
        """Tasks that had shares of earlier batches and are not this manager's: their groups by status. They stay in the buffer."""
        names = [name for name in await self._buffer.shared_tasks() if name not in self._tasks]
        return {name: await self._buffer.counts(name) for name in names}

    async def _tell_of_removed(self) -> None:
        if self._told_of_removed:
            return
        self._told_of_removed = True
        for name, counts in (await self.removed()).items():
            waiting = {str(status): n for status, n in counts.items() if n and status in _WAITING}
            if waiting:
                _log.warning("task %r is not produced any more; these groups of it stay in the buffer: %s", name, waiting)

    # -- batches ------------------------------------------------------------------------------------------------

    async def batches(self, batch_size: int, *, first_step: int | None = None) -> AsyncGenerator[ProducedBatch]:
        """Batches of `batch_size` groups without end, see `produce_batch`; strategies that keep what runs work on between them.

        Args:
            batch_size: groups, of all tasks.
            first_step: of the trainer, at which the first is consumed, the next at the next; by default one more than the last.
        """
        step = first_step
        while True:
            batch = await self.produce_batch(batch_size, step)
            step = batch.step + 1
            yield batch

    async def produce_batch(self, batch_size: int, step: int | None = None) -> ProducedBatch:
        """Exactly `batch_size` completed groups of all tasks by weight, consumed at `step` together.

        If it raises or is cancelled, nothing was consumed: what is completed waits in the buffer for the next batch.

        Args:
            batch_size: groups, of all tasks.
            step: of the trainer; by default one more than the last of any of the tasks.

        Raises:
            FailureBudgetError, EngineDeadError, DatasetError, ResumeRequiredError: see `ProduceStrategy.produce_batch`; a note on
                the error names the task.
        """
        if whole("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} is no batch; it must be 1 or more")
        with self._one_at_a_time():
            began = _now()
            step = max([await self._buffer.next_step(name) for name in self._tasks]) if step is None else step
            await self._buffer.check_take(next(iter(self._tasks)), step)
            await self._tell_of_removed()
            shares = await self._shares(batch_size, step)
            batch = await self._produced(shares, step, began)
            self._metrics = batch.metrics
            return batch

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if self._busy:
            raise ProducerError("a batch is being produced already; await it first")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    async def _shares(self, batch_size: int, step: int) -> list[Share]:
        """How this batch is shared out. Steps that were rewound, or failed, do not count: only what was consumed before it."""
        if self._reweigh is not None:
            self._set_weights(self._reweigh(step, dict(self._metrics)))
        carried = {share.task_name: share.carried for share in await self._buffer.shares(before=step)}
        allotment = allot(batch_size, self._weights, carried)
        return [Share(name, self._weights[name], n, allotment.carried.get(name, 0.0)) for name, n in allotment.groups.items()]

    async def _produced(self, shares: Sequence[Share], step: int, began: float) -> ProducedBatch:
        parts = {share.task_name: self._parts[share.task_name] for share in shares if share.groups}
        sizes = {share.task_name: share.groups for share in shares}
        for name, part in parts.items():
            part.check(sizes[name], owned=self._group is not None)
        while True:
            await self._fill({part: sizes[name] for name, part in parts.items()})
            before = {name: await part.before_take() for name, part in parts.items()}
            counts = {name: await self._buffer.counts(name) for name in self._tasks}
            if not all(part.is_as_found for part in parts.values()):
                continue  # The weights were updated while some waited for the others.
            policies = {name: part.production.policy for name, part in parts.items()}
            version = max(part.version for part in parts.values())
            # Nothing is awaited after it: what is taken when the caller is cancelled would be consumed, and reach nobody.
            if taken := await self._buffer.take_together(shares, step=step, version=version, policies=policies):
                done = {name: part.handed_out(taken[name], before[name], step, began) for name, part in parts.items()}
                return _merged(done, shares, counts, _now() - began, {part.version for part in parts.values()})
            # Else another process has taken some of them.

    async def _fill(self, parts: Mapping["_Part", int]) -> None:
        """Wait until all parts are whole, at the version of now."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for part, size in parts.items():
                    tasks.create_task(part.fill(size, self._group))
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__


_WAITING = (Status.PENDING, Status.RUNNING, Status.COMPLETED, Status.INTERRUPTED, Status.EXPIRED)


class _Part:
    """One task as the manager runs it: its production, from batch to batch where the strategy keeps what runs.

    Attributes:
        task: what it was given.
        version: of the policy when its part of the batch was found whole.
    """

    def __init__(self, buffer: ReplayBuffer, task: TrainingTask, permits: Permits | None) -> None:
        self.task, self.version = task, 0
        self._buffer = buffer
        self._permits = None if permits is None else permits.account(task.weight, task.sampler.group_size)
        self._production: Production | None = None

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
        task = self.task
        return Production(
            self._buffer,
            task.strategy.plan,
            task.agent_loop,
            task.sampler,
            task.name,
            size,
            ahead=ahead,
            books=task.strategy.books(task.name),
            permits=self._permits,
        )

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


def _merged(
    parts: Mapping[str, ProducedBatch],
    shares: Sequence[Share],
    counts: Mapping[str, Mapping[Status, int]],
    seconds: float,
    versions: set[int],
) -> ProducedBatch:
    groups = sorted((group for part in parts.values() for group in part.groups), key=lambda group: group.group_id)
    after = {name: _after(counts[name], len(parts[name].groups) if name in parts else 0) for name in counts}
    version = next(iter(versions)) if len(versions) == 1 else None
    metrics = merged_metrics({name: part.metrics for name, part in parts.items()}, groups, shares, after, seconds, version)
    return ProducedBatch(groups, next(iter(parts.values())).step, metrics)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _after(counts: Mapping[Status, int], taken: int) -> dict[Status, int]:
    return {**counts, Status.COMPLETED: counts[Status.COMPLETED] - taken, Status.CONSUMED: counts[Status.CONSUMED] + taken}


def _check_tasks(buffer: ReplayBuffer, tasks: Sequence[TrainingTask]) -> None:
    if not tasks:
        raise ValueError("tasks is empty; give at least one TrainingTask")
    for task in tasks:
        if not isinstance(task, TrainingTask):
            raise TypeError(f"task {task!r:.80} is no TrainingTask; pass TrainingTask(name, agent_loop, sampler, strategy, weight)")
        if not task.name or not isinstance(task.name, str):
            raise ValueError(f"name={task.name!r} names no task; give the name of one, as text")
        if task.strategy.buffer is not buffer:
            raise ValueError(f"the strategy of task {task.name!r} has another buffer than the manager; give all of them the same one")
    for what, seen in (("name", [task.name for task in tasks]), ("sampler", [id(task.sampler) for task in tasks])):
        if len(set(seen)) < len(seen):
            raise ValueError(f"two tasks have the same {what}; each needs its own")
