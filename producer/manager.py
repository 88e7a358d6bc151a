"""`TaskManager`: batches of many tasks, shared out by weight, and evaluation beside their training."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Any, Self, get_args

from agent_loop import AgentLoop
from agent_loop.arguments import function, mapping
from agent_loop.engines.base import PauseMode, WeightSource
from agent_loop.errors import first_error
from agent_loop.sampling import number, whole
from buffer import ReplayBuffer, Share, Status
from buffer.errors import ResumeRequiredError, StepError
from producer.checks import check_loop, check_parts
from producer.errors import ProducerError
from producer.evaluation import Evaluation, EvaluationResult
from producer.gate import Updater, paused
from producer.kept_weights import KeptWeights
from producer.merging import merged_metrics
from producer.metrics import Metrics
from producer.part import Part, TrainingTask
from producer.permits import Permits
from producer.pinning import Pins
from producer.plan import ProducedBatch
from producer.shares import allotments, checked_weights
from producer.strategy import ProduceStrategy

_log = logging.getLogger(__name__)

Weights = Callable[[int, Mapping[str, float]], Mapping[str, float]]
"""The weights of a batch, from its step and the metrics of the batch before; a task that is left out keeps its weight."""


_MOST_AHEAD = 64
"""Batches after the next whose sizes are worked out, for what may be started ahead of them."""


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
        if weights is not None:
            function("weights", weights, "one of the step and of metrics, which gives weights by task, or None")
        self._buffer, self._tasks = buffer, {task.name: task for task in tasks}
        self._weights = KeptWeights(buffer, {task.name: task.weight for task in tasks})
        checked_weights({"evaluation": evaluation_weight})
        self._reweigh, self._evaluation_weight = weights, evaluation_weight
        self._permits = None if max_in_flight is None else Permits(max_in_flight)
        self._parts = {task.name: Part(buffer, task, self._permits) for task in tasks}
        self._group: asyncio.TaskGroup | None = None
        self._horizon = min(_MOST_AHEAD, max(task.strategy.max_staleness or 0 for task in tasks))
        self._pins, self._updater, self._evaluating = Pins(), Updater(), set[str]()
        self._busy = False
        self._metrics: Metrics = {}
        self._told_of_removed = False

    # -- what runs ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise ProducerError("this manager is entered already; one `async with` at a time")
        await self._weights.as_after(max(0, await self._next_step() - 1))
        self._weigh()
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
        """Of the tasks, from the next batch on; what an earlier process changed is found when this is entered, or asked for a batch."""
        return dict(self._weights.now)

    async def set_weight(self, name: str, weight: float) -> None:
        """Give a task another weight, from the next batch on.

        It belongs to the last batch that was consumed: a run that is resumed from that step or a later one goes on with it, as long as
        the program gives the task the weight that it gave it then. Set after that step was committed, it belongs to the next batch.

        Raises:
            ValueError: there is no such task, it is no weight, or the last above 0 would go.
        """
        self._weights.ask(name, weight)
        self._weigh()
        if (last := await self._next_step() - 1) > 0:
            with suppress(StepError, ResumeRequiredError):  # of a step that is final, or will be undone: kept with the next batch
                await self._weights.as_after(last)
                await self._weights.keep(last)
            self._weigh()

    def _weigh(self) -> None:
        for name, part in self._parts.items():
            part.weigh(self._weights.now[name])

    async def _next_step(self) -> int:
        return max([await self._buffer.next_step(name) for name in self._tasks])

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

    # -- versions of the policy ---------------------------------------------------------------------------------

    async def evaluate(
        self,
        task_name: str,
        rows: Iterable[Mapping[str, Any]],
        agent_loop: AgentLoop,
        *,
        group_size: int = 1,
        threshold: float = 0.5,
        step: int | None = None,
    ) -> EvaluationResult:
        """Run all `rows` at one version of the weights, beside training: await it in a task of your own.

        Every token of it is of the version in the result. `update_weights` of this manager waits until it is finished; where the
        weights are updated in another way meanwhile, what was sampled before that runs again. Its groups are stored under
        `task_name`, consumed at `step`, and are in no batch. One that was broken off, by a crash too, is gone on with by the
        next call: what the weights of now have sampled is kept.

        Args:
            task_name: the evaluation's own.
            rows: the prompts, as a dataset has them; the same each time an evaluation that was broken off is gone on with.
            agent_loop: runs its groups; with sampling parameters of its own, say.
            group_size: rollouts a prompt.
            threshold: the score from which on a rollout passes, for `pass_at`.
            step: at which it is consumed; by default one more than the last step of any task. A rewind to before it gives it back:
                evaluating again at the same weights then samples nothing.

        Raises:
            ValueError: no prompts, other prompts than those of the evaluation that is open, or a name that is a training task's.
            DatasetError: a bad row.
            ProducerError: every prompt failed, or the weights were updated all the time.
            EngineDeadError, ResumeRequiredError: see `ProduceStrategy.produce_batch`.
        """
        self._updater.check_elsewhere("an evaluation")
        rows = list(rows)
        self._check_evaluation(task_name, rows, group_size)
        check_loop(agent_loop)
        agent_loop.check_initialised()
        permits = None if self._permits is None else self._permits.account(self._evaluation_weight, group_size)
        async with self._one_evaluation(task_name), self._pins.held():
            step = max(await self._buffer.last_step() + 1, await self._buffer.next_step(task_name)) if step is None else step
            await self._buffer.check_take(task_name, step)
            evaluation = Evaluation(self._buffer, agent_loop, task_name, rows, group_size, permits)
            return await evaluation.run(step, number("threshold", threshold))

    def _check_evaluation(self, task_name: str, rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        if not task_name or not isinstance(task_name, str) or task_name in self._tasks:
            raise ValueError(f"task_name={task_name!r} is no name for an evaluation; give one, which is no training task's")
        if not rows:
            raise ValueError("rows is empty; an evaluation needs prompts")
        if whole("group_size", group_size) < 1:
            raise ValueError(f"group_size={group_size} makes no group; it must be 1 or more")

    @asynccontextmanager
    async def _one_evaluation(self, task_name: str) -> AsyncGenerator[None]:
        if task_name in self._evaluating:
            raise ProducerError(f"the evaluation {task_name!r} runs already; await it first")
        self._evaluating.add(task_name)
        try:
            yield
        finally:
            self._evaluating.discard(task_name)

    @asynccontextmanager
    async def update_weights(
        self, source: WeightSource | None = None, version: int | None = None, *, mode: PauseMode = "keep"
    ) -> AsyncGenerator[None]:
        """Hold production and pause the tasks' engines while the block updates the weights; evaluations under way end before it.

        Args:
            source: loaded into each engine before the block, with `version`; None leaves the update to the block.
            version: of `source`; by default one more than the engine's.
            mode: what becomes of responses in flight, see `Producer.update_weights`.
        """
        if mode not in get_args(PauseMode):
            raise ValueError(f"mode={mode!r:.40} is unknown; choose among {get_args(PauseMode)}")
        engines = list(dict.fromkeys(task.agent_loop.engine for task in self._tasks.values() if task.agent_loop.engine is not None))
        if not engines:
            raise ProducerError("no task has an engine whose weights could be updated")
        self._updater.check_elsewhere("another update")
        async with self._pins.updating(), AsyncExitStack() as stack:
            stack.enter_context(self._updater.here())
            await self._hold(stack, mode)
            for engine in engines:
                await stack.enter_async_context(paused(engine, mode))
            for part in self._parts.values():
                if part.live is not None:
                    stack.enter_context(part.live.gate.frozen())
            if source is not None:
                if isinstance(source, Iterator) and len(engines) > 1:  # or the first would leave nothing of it for the others
                    source = list(source)
                for engine in engines:
                    await engine.update_weights(source, engine.version + 1 if version is None else version)
            yield

    async def _hold(self, stack: AsyncExitStack, mode: PauseMode) -> None:
        """No group starts until the stack is left. With "abort" those that run were stopped, with "wait" they have ended."""
        live = [part.live for part in self._parts.values() if part.live is not None]
        for production in live:
            await stack.enter_async_context(production.gate.held())
        async with asyncio.TaskGroup() as tasks:
            for production in live if mode != "keep" else ():
                tasks.create_task(production.stop() if mode == "abort" else production.drained())

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
        self._updater.check_elsewhere("a batch")
        with self._one_at_a_time():
            began = _now()
            step = await self._next_step() if step is None else step
            await self._buffer.check_take(next(iter(self._tasks)), step)
            await self._tell_of_removed()
            asked = self._weights.asked()
            shares = await self._shares(batch_size, step)
            batch = await self._produced(shares, step, began)
            self._weights.settle(asked)
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
        carried = {share.task_name: share.carried for share in await self._buffer.shares(before=step)}
        await self._weights.as_after(step - 1)
        if self._reweigh is not None:
            changed = mapping("weights(step, metrics)", self._reweigh(step, dict(self._metrics)), "tasks to weights")
            self._weights.change(changed)
        self._weigh()
        weights = self._weights.now
        await self._weights.keep(step)
        coming = list(itertools.islice(allotments(batch_size, weights, carried), 1 + self._horizon))
        for name, part in self._parts.items():
            part.expects([allotment.groups[name] for allotment in coming])
        now = coming[0]
        return [Share(name, weights[name], n, now.carried.get(name, 0.0)) for name, n in now.groups.items()]

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
            oldest = {name: at for name, part in parts.items() if (at := part.production.oldest_handable) is not None}
            version = max(part.version for part in parts.values())
            for part in self._parts.values():
                part.passes()
            # Nothing is awaited after it: what is taken when the caller is cancelled would be consumed, and reach nobody.
            if taken := await self._buffer.take_together(shares, step=step, version=version, policies=policies, oldest_versions=oldest):
                done = {name: part.handed_out(taken[name], before[name], step, began) for name, part in parts.items()}
                return _merged(done, shares, counts, _now() - began, {part.version for part in parts.values()})
            for part in self._parts.values():  # Another process has taken some of them.
                part.expects()

    async def _fill(self, parts: Mapping[Part, int]) -> None:
        """Wait until all parts are whole, at the version of now."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for part, size in parts.items():
                    tasks.create_task(self._fill_one(part, size))
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__

    async def _fill_one(self, part: Part, size: int) -> None:
        await self._pins.settled()
        await part.fill(size, self._group)


_WAITING = (Status.PENDING, Status.RUNNING, Status.COMPLETED, Status.INTERRUPTED, Status.EXPIRED)


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
        check_parts(task.agent_loop, task.sampler)
        if not isinstance(task.strategy, ProduceStrategy):
            raise TypeError(
                f"strategy={task.strategy!r:.80} of task {task.name!r} is no ProduceStrategy; pass AsyncProduceStrategy(buffer, ...)"
            )
        if task.strategy.buffer is not buffer:
            raise ValueError(f"the strategy of task {task.name!r} has another buffer than the manager; give all of them the same one")
    for what, seen in (("name", [task.name for task in tasks]), ("sampler", [id(task.sampler) for task in tasks])):
        if len(set(seen)) < len(seen):
            raise ValueError(f"two tasks have the same {what}; each needs its own")
