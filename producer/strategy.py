"""`ProduceStrategy`: the loop that fills a batch, written once; what differs between strategies is a pure decision."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tqdm import tqdm

from agent_loop import AgentLoop
from agent_loop.agent_loop import first_error
from agent_loop.sampling import number, whole
from buffer import Fifo, ReplayBuffer, RolloutGroup, Status, TakePolicy
from buffer.errors import BufferClosedError, DatabaseError, IllegalTransitionError, LeaseLostError
from producer.checkpoints import Checkpointer, Interval
from producer.errors import FailureBudgetError, ProducerError
from producer.filters import GroupFilter, checked_reason
from producer.interrupt import settle_unfinished
from producer.issue import Load
from producer.metrics import Metrics, batch_metrics
from producer.prompts import PromptSampler
from producer.task_pool import TaskPool

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProducedBatch:
    """A batch for training: its groups in the order they were drawn, the step they are consumed at, and metrics."""

    groups: Sequence[RolloutGroup]
    step: int
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class _Outcome:
    group_id: int
    status: Status
    tokens: int
    reason: str | None


@dataclass(slots=True)
class _Progress:
    """Where the batch that is being produced stands."""

    task_name: str
    batch_size: int
    completed: int = 0
    stopping: bool = False
    started: set[int] = field(default_factory=set)
    unstored: set[int] = field(default_factory=set)
    ended: Counter[Status] = field(default_factory=Counter)
    lost: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    last_reason: dict[Status, str | None] = field(default_factory=dict)

    def record(self, outcome: _Outcome) -> None:
        self.ended[outcome.status] += 1
        self.completed += outcome.status is Status.COMPLETED
        self.tokens += outcome.tokens
        self.last_reason[outcome.status] = outcome.reason


class ProduceStrategy(ABC):
    """Fills batches: draws prompts, runs agent loops, stores what comes of them, takes what is completed.

    Args:
        buffer: where everything is kept.
        group_filter: says why a completed group is of no use (None keeps it); what it rejects is stored with the
            reason and replaced.
        enable_partial_rollout: keep the tokens of interrupted responses, to be continued; without, they begin anew.
        max_staleness: groups whose oldest trainable token is more weight updates behind the policy than this are never
            handed out: their stale members expire, and run again before fresh prompts. None sets no bound.
        max_failed: groups of one batch that may fail; one more stops production. Default: the batch size.
        max_filtered: groups of one batch that may be filtered, likewise. Default: 8 times the batch size.
        max_interrupted: groups of one batch that may end early by themselves, likewise. Default: 16 times the batch size.
        interrupt_timeout: seconds that interrupted rollouts have to return before they are cancelled.
        checkpoint_tokens: what running rollouts have decoded is stored as they run, so that a crash of the process costs no
            rollout much more than so many tokens; finished members of running groups are stored with it. None: not by tokens.
        checkpoint_seconds: likewise, of decoding. With None for both, running groups are stored when they end.
        policy: which completed groups are taken first.
        progress: show a bar of each batch; None shows it on a terminal only.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        *,
        group_filter: GroupFilter | None = None,
        enable_partial_rollout: bool = True,
        max_staleness: int | None = None,
        max_failed: int | None = None,
        max_filtered: int | None = None,
        max_interrupted: int | None = None,
        interrupt_timeout: float = 10.0,
        checkpoint_tokens: int | None = 512,
        checkpoint_seconds: float | None = 10.0,
        policy: TakePolicy | None = None,
        progress: bool | None = None,
    ) -> None:
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(f"buffer={buffer!r:.80} is no ReplayBuffer; pass an open one")
        budget = {"max_failed": max_failed, "max_filtered": max_filtered, "max_interrupted": max_interrupted}
        for name, bound in {"max_staleness": max_staleness, **budget, "interrupt_timeout": interrupt_timeout}.items():
            if bound is not None and number(name, bound) < 0:
                raise ValueError(f"{name}={bound} is negative; it must be 0 or more")
        self.buffer, self.group_filter, self.enable_partial_rollout = buffer, group_filter, enable_partial_rollout
        self.max_staleness = max_staleness
        self._max_failed, self._max_filtered, self._max_interrupted = max_failed, max_filtered, max_interrupted
        self._interrupt_timeout, self._policy = interrupt_timeout, policy or Fifo()
        self._interval = Interval(checkpoint_tokens, checkpoint_seconds)
        self._no_bar = None if progress is None else not progress
        self._producing: set[str] = set()

    @abstractmethod
    def to_issue(self, load: Load) -> int:
        """How many more groups to start now."""

    async def produce_batch(
        self, agent_loop: AgentLoop, sampler: PromptSampler, batch_size: int, task_name: str, *, step: int | None = None
    ) -> ProducedBatch:
        """Exactly `batch_size` completed groups, those that wait in the buffer included, consumed at `step`.

        Nothing that was started is in flight when it returns or raises: everything is completed, interrupted,
        filtered or failed, and stored. Cancelling it interrupts what runs and stores the tokens so far.

        Args:
            agent_loop: runs the groups.
            sampler: draws them.
            batch_size: groups.
            task_name: whose prompts; one sampler a task.
            step: of the trainer; by default one more than the task's last.

        Raises:
            FailureBudgetError: too many groups failed, were filtered or interrupted; what is completed stays in the buffer.
            EngineDeadError: the engine is gone.
            DatasetError: a bad row, an empty dataset (see `PromptSampler`).
            ResumeRequiredError: see `ReplayBuffer.take`.
        """
        if whole("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} is no batch; it must be 1 or more")
        agent_loop.check_initialised()
        if task_name in self._producing:
            raise ProducerError(f"a batch of task {task_name!r} is being produced already; await it first")
        self._producing.add(task_name)
        try:
            return await self._produce(agent_loop, sampler, _Progress(task_name, batch_size), step)
        except BaseException:
            await self._all_stored(task_name)
            raise
        finally:
            self._producing.discard(task_name)

    async def _all_stored(self, task_name: str) -> None:
        """Wait until what was asked for before is stored, also by tasks that were cancelled while they waited for it."""
        with suppress(BufferClosedError):  # closing waits for it as well; and the error that brought us here is the one to raise
            await self.buffer.cursor(task_name)  # the writer answers in order

    async def _produce(self, agent_loop: AgentLoop, sampler: PromptSampler, progress: _Progress, step: int | None) -> ProducedBatch:
        task_name, batch_size, began = progress.task_name, progress.batch_size, time.perf_counter()
        step = await self.buffer.next_step(task_name) if step is None else step
        await self.buffer.check_take(task_name, step)  # refused now, not after all the sampling
        while (version := await self._completed(agent_loop, progress)) is None:
            await self._fill(agent_loop, sampler, progress)
        counts = await self.buffer.counts(task_name)
        # Nothing is awaited after it: what is taken when the caller is cancelled would be consumed, and reach nobody.
        taken = await self.buffer.take(task_name, batch_size, step=step, version=version, policy=self._policy)
        groups = sorted(taken, key=lambda group: group.group_id)
        counts[Status.COMPLETED] -= len(groups)
        counts[Status.CONSUMED] += len(groups)
        metrics = batch_metrics(
            groups,
            progress.ended,
            counts,
            started=len(progress.started),
            tokens=progress.tokens,
            seconds=time.perf_counter() - began,
            version=version,
        )
        return ProducedBatch(groups, step, metrics)

    async def _completed(self, agent_loop: AgentLoop, progress: _Progress) -> int | None:
        """Count what waits in the buffer, after expiring what is too stale; the policy's version if that is the whole batch."""
        version = 0 if agent_loop.engine is None else agent_loop.engine.version
        if self.max_staleness is not None:
            # Those in `interrupted` too: a response that is continued is as stale as its oldest token.
            await self.buffer.expire(progress.task_name, version=version, max_staleness=self.max_staleness)
        progress.completed = await self.buffer.count(progress.task_name, Status.COMPLETED)
        return version if progress.completed >= progress.batch_size else None

    async def _fill(self, agent_loop: AgentLoop, sampler: PromptSampler, progress: _Progress) -> None:
        """Start groups and store what comes of them until the batch is whole; then stop the rest."""
        bar = tqdm(total=progress.batch_size, desc=progress.task_name, unit="group", leave=False, disable=self._no_bar)
        bar.update(progress.completed)
        progress.stopping = False
        try:
            async with TaskPool[_Outcome]() as pool, self._checkpointer(agent_loop, progress) as checkpoints:
                try:
                    while progress.completed < progress.batch_size:
                        await self._issue(agent_loop, sampler, pool, checkpoints, progress)
                        progress.record(await pool.next())
                        bar.update(min(progress.completed, progress.batch_size) - bar.n)
                        self._check_budget(progress)
                finally:
                    # Whatever ends the batch, a cancellation too: what runs is stopped, and stored by its own task.
                    await self._stop(agent_loop, pool, progress)
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        finally:
            bar.close()
            # A task that was cancelled before its first step ran no line of its own: its group is still claimed.
            with suppress(BufferClosedError):  # then opening it again will release them
                await self.buffer.release(sorted(progress.unstored))

    def _checkpointer(self, agent_loop: AgentLoop, progress: _Progress) -> Checkpointer:
        keep = self.enable_partial_rollout
        return Checkpointer(self.buffer, agent_loop, self._interval, keep_tokens=keep, lost=progress.lost.__setitem__)

    async def _issue(
        self, agent_loop: AgentLoop, sampler: PromptSampler, pool: TaskPool[_Outcome], checkpoints: Checkpointer, progress: _Progress
    ) -> None:
        load = Load(progress.batch_size, progress.completed, len(pool))
        if (wanted := self.to_issue(load)) > 0:
            # What was interrupted in this batch waits for the next one, or it could come round for ever.
            for group in await sampler.sample_many(progress.task_name, wanted, buffer=self.buffer, exclude=progress.started):
                progress.started.add(group.group_id)
                progress.unstored.add(group.group_id)
                checkpoints.watch(group)
                pool.start(group.group_id, self._run_group(agent_loop, group, checkpoints, progress))
        if len(pool) == 0:
            raise ProducerError(
                f"nothing runs and nothing was started for {load}: {type(self).__name__}.to_issue said {wanted}, and a batch that "
                "is not whole needs 1 or more then"
            )

    async def _run_group(self, agent_loop: AgentLoop, group: RolloutGroup, checkpoints: Checkpointer, progress: _Progress) -> _Outcome:
        group_id, tokens_before = group.group_id, _tokens(group)
        try:
            try:
                if not progress.stopping:  # else it was started in the turn of the loop in which the batch was stopped
                    group = _same_group(group, await agent_loop.generate_group(group))
            finally:
                checkpoints.forget(group_id)
            self._decide(group)
        except BaseException:
            # Recorded first, raised again after: even a second cancellation cannot undo a write that was asked for.
            if group.status is Status.COMPLETED and self.group_filter is not None:
                for state in group.rollouts:  # not completed before it went through the filter: judged again next time
                    state.status = Status.RUNNING
            settle_unfinished(group, keep_tokens=self.enable_partial_rollout)
            await self._store(group_id, group, progress)
            raise
        sampled = _tokens(group) - tokens_before
        if group.status in (Status.RUNNING, Status.INTERRUPTED):
            settle_unfinished(group, keep_tokens=self.enable_partial_rollout)
        stored = await self._store(group_id, group, progress)
        if stored is None:
            return _Outcome(group_id, Status.INTERRUPTED, sampled, f"it was lost: {progress.lost[group_id]}")
        return _Outcome(group_id, stored.status, sampled, _reason(stored))

    async def _store(self, group_id: int, group: RolloutGroup, progress: _Progress) -> RolloutGroup | None:
        """What was stored; None where the group is another producer's by now, and `progress.lost` says why."""
        progress.unstored.discard(group_id)  # a put that is cancelled is done all the same
        if group_id in progress.lost:
            return None
        try:
            return await self._stored(group_id, group, progress)
        except IllegalTransitionError as error:  # even as a failed one: whoever has it now released it, or ran it to its end
            progress.lost[group_id] = str(error)
            progress.unstored.discard(group_id)
            return None

    async def _stored(self, group_id: int, group: RolloutGroup, progress: _Progress) -> RolloutGroup:
        """Store the group, or in its place a failed one where an agent loop left it in a state that cannot be stored."""
        try:
            await self.buffer.put(group)
            return group
        except (DatabaseError, BufferClosedError, LeaseLostError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever the group's content makes encoding raise is a failed rollout
            progress.unstored.add(group_id)
            failed = await self._failed(group_id, f"it cannot be stored: {type(error).__name__}: {error}")
        progress.unstored.discard(group_id)
        await self.buffer.put(failed)
        return failed

    async def _failed(self, group_id: int, reason: str) -> RolloutGroup:
        """The group as the buffer has it, its unfinished members failed."""
        group = await self.buffer.get(group_id)
        for state in group.rollouts:
            if state.status is not Status.COMPLETED:
                state.status, state.error = Status.FAILED, reason.encode(errors="backslashreplace").decode()
        return group

    def _decide(self, group: RolloutGroup) -> None:
        if group.status is not Status.COMPLETED or self.group_filter is None:
            return
        reason = checked_reason(self.group_filter, group)
        if reason is not None:
            group.mark(Status.FILTERED, reason=reason)

    def _check_budget(self, progress: _Progress) -> None:
        bounds = {
            Status.FAILED: ("max_failed", self._max_failed, progress.batch_size),
            Status.FILTERED: ("max_filtered", self._max_filtered, 8 * progress.batch_size),
            # An engine that ends every request early would else use up the dataset, for ever.
            Status.INTERRUPTED: ("max_interrupted", self._max_interrupted, 16 * progress.batch_size),
        }
        for status, (name, given, default) in bounds.items():
            bound = default if given is None else given
            if progress.ended[status] > bound:
                raise FailureBudgetError(
                    f"{progress.ended[status]} groups of this batch of task {progress.task_name!r} were {status} ({name}={bound}), "
                    f"the last because: {progress.last_reason[status]}; completed ones ({progress.completed}) are in the buffer"
                )

    async def _stop(self, agent_loop: AgentLoop, pool: TaskPool[_Outcome], progress: _Progress) -> None:
        """Interrupt what runs; cancel what does not return in time. The tasks store their groups themselves."""
        progress.stopping = True
        if pool.running:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interrupt_timeout):
                    await agent_loop.interrupt(pool.running)
            if not await pool.drained(self._interrupt_timeout):
                pool.cancel()
                if not await pool.drained(self._interrupt_timeout):
                    _log.warning(
                        "groups %s of task %r were cancelled %g s ago and still run: their agent loop holds CancelledError back; "
                        "let it through, the batch waits for them",
                        pool.running,
                        progress.task_name,
                        self._interrupt_timeout,
                    )
        for outcome in pool.taken():
            progress.record(outcome)
        progress.ended[Status.INTERRUPTED] += len(progress.started) - progress.ended.total()  # those that were cancelled


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
