"""`ProduceStrategy`: what a strategy is told and decides; the loop that it directs is `producer.production`."""

import asyncio
from abc import ABC, abstractmethod
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

from agent_loop import AgentLoop
from agent_loop.arguments import flag, function, one_of
from agent_loop.sampling import number, whole
from buffer import Fifo, ReplayBuffer, StalestFirst, Status, TakePolicy
from buffer.arguments import check_policy
from buffer.errors import BufferClosedError
from producer.adaptive import AdaptiveLimit
from producer.checkpoints import Interval
from producer.checks import check_parts
from producer.errors import ProducerError
from producer.filters import GroupFilter
from producer.flight import Rules
from producer.issue import Load, check_tail_options
from producer.members import RedundantMembers
from producer.metrics import Books
from producer.plan import OnStale, OnStall, Plan, ProducedBatch
from producer.production import Production
from producer.prompts import PromptSampler
from producer.watchdog import Watchdog

InFlight = Literal["interrupt", "keep"]


class ProduceStrategy(ABC):
    """Fills batches: draws prompts, runs agent loops, stores what comes of them, takes what is completed.

    Args:
        buffer: where everything is kept.
        group_filter: says why a completed group is of no use (None keeps it); what it rejects is stored with the
            reason and replaced.
        redundant: members of each group that are started and not needed: the first to complete are trained on (see `RedundantMembers`).
        enable_partial_rollout: keep the tokens of interrupted responses, to be continued; without, they begin anew.
        in_flight: what becomes of groups that run when a batch is whole. "interrupt" stops and stores them. "keep" lets them run,
            and goes on starting groups for later batches; the strategy is then an async context manager, which owns what runs.
        max_staleness: groups whose oldest trainable token is more weight updates behind the policy than this are never
            handed out. None sets no bound.
        on_stale: how that is kept. "wait": so many groups are started that all can be handed out in time, the stalest first, and a
            batch waits for what would be too late in the next. "expire": nothing is waited for; what is too stale expires, and its
            stale members run again before fresh prompts. "mask": tokens that are too stale are not trained on, and a member
            expires when it has no other. With "wait", what got too stale all the same expires too (after a rewind, say).
        max_in_flight: the most rollouts in flight, or an `AdaptiveLimit` that follows the engine's load; None sets no bound.
        tail_batch_trigger_size: tail batches run the groups that were left behind first, and issue nothing beside them: -1 never,
            0 when any was, N when N were.
        tail_batch_candidate_step: interruptions after which a group counts as left behind; an expired one does at once.
        max_failed: groups of one batch that may fail; one more stops production. Default: the batch size.
        max_filtered: groups of one batch that may be filtered, likewise. Default: 8 times the batch size.
        max_interrupted: groups of one batch that may end early by themselves, likewise. Default: 16 times the batch size.
        watchdog: says when no group has ended for too long; None never does.
        on_stall: what is done then: "warn" logs which rollouts run and where they stand, "raise" stops production with it.
        interrupt_timeout: seconds that interrupted rollouts have to return before they are cancelled.
        checkpoint_tokens: what running rollouts have decoded is stored as they run, so that a crash of the process costs no
            rollout much more than so many tokens; finished members of running groups are stored with it. None: not by tokens.
        checkpoint_seconds: likewise, of decoding. With None for both, running groups are stored when they end.
        policy: which completed groups are taken first; by default the oldest, with a bound that is waited for the stalest.
        progress: show bars of each batch and of the rollouts in flight; None shows them on a terminal only.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        *,
        group_filter: GroupFilter | None = None,
        redundant: RedundantMembers | None = None,
        enable_partial_rollout: bool = True,
        in_flight: InFlight = "interrupt",
        max_staleness: int | None = None,
        on_stale: OnStale = "wait",
        max_in_flight: int | AdaptiveLimit | None = None,
        tail_batch_trigger_size: int = -1,
        tail_batch_candidate_step: int = 1,
        max_failed: int | None = None,
        max_filtered: int | None = None,
        max_interrupted: int | None = None,
        watchdog: Watchdog | None = Watchdog(),  # noqa: B008 - a frozen value
        on_stall: OnStall = "warn",
        interrupt_timeout: float = 10.0,
        checkpoint_tokens: int | None = 512,
        checkpoint_seconds: float | None = 10.0,
        policy: TakePolicy | None = None,
        progress: bool | None = None,
    ) -> None:
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(f"buffer={buffer!r:.80} is no ReplayBuffer; pass an open one")
        counts = {"max_failed": max_failed, "max_filtered": max_filtered, "max_interrupted": max_interrupted}
        for name, bound in {"max_staleness": max_staleness, **counts}.items():
            if bound is not None and whole(name, bound) < 0:
                raise ValueError(f"{name}={bound} is negative; it must be 0 or more")
        if number("interrupt_timeout", interrupt_timeout) < 0:
            raise ValueError(f"interrupt_timeout={interrupt_timeout} is negative; it must be 0 or more")
        if group_filter is not None:
            function("group_filter", group_filter, "zero_variance, pass_rate(...), one of your own, or None")
        flag("enable_partial_rollout", enable_partial_rollout)
        if progress is not None:
            flag("progress", progress)
        check_policy(policy)
        if not isinstance(max_in_flight, AdaptiveLimit | None) and whole("max_in_flight", max_in_flight) < 1:
            raise ValueError(f"max_in_flight={max_in_flight} lets no rollout run; it must be 1 or more")
        if not isinstance(redundant, RedundantMembers | None):
            raise TypeError(f"redundant={redundant!r:.80} is none; pass RedundantMembers(extra=..., bias='accept')")
        if not isinstance(watchdog, Watchdog | None):
            raise TypeError(f"watchdog={watchdog!r:.80} is none; pass Watchdog(factor=..., least_seconds=...) or None")
        one_of("on_stall", on_stall, ("warn", "raise"))
        one_of("in_flight", in_flight, ("interrupt", "keep"))
        one_of("on_stale", on_stale, ("wait", "expire", "mask"))
        waits = max_staleness is not None and on_stale == "wait"
        if waits and policy is not None and not isinstance(policy, StalestFirst):
            raise ValueError(f"policy={policy!r} could leave the stalest until they are too stale; on_stale='wait' needs StalestFirst()")
        self.buffer, self.in_flight, self.enable_partial_rollout = buffer, in_flight, enable_partial_rollout
        self.redundant = redundant
        self.max_staleness, self.on_stale, self.max_in_flight = max_staleness, on_stale, max_in_flight
        self.plan = Plan(
            name=f"{type(self).__name__}.to_issue",
            to_issue=self.to_issue,
            rules=Rules(
                group_filter, redundant, enable_partial_rollout, interrupt_timeout, Interval(checkpoint_tokens, checkpoint_seconds)
            ),
            budget={Status.FAILED: max_failed, Status.FILTERED: max_filtered, Status.INTERRUPTED: max_interrupted},
            max_staleness=max_staleness,
            on_stale=on_stale,
            tail=check_tail_options(tail_batch_trigger_size, tail_batch_candidate_step),
            max_in_flight=max_in_flight,
            watchdog=watchdog,
            on_stall=on_stall,
            policy=policy or (StalestFirst() if waits else Fifo()),
        )
        self.no_bar = None if progress is None else not progress
        self._producing: set[str] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._kept: dict[str, Production] = {}
        self._books: dict[str, Books] = {}

    def books(self, task_name: str) -> Books:
        """What is known of the task's production so far, for metrics."""
        return self._books.setdefault(task_name, Books())

    @abstractmethod
    def to_issue(self, load: Load) -> int:
        """How many more groups to start now."""

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise ProducerError("this strategy is entered already; leave its `async with` first, or make another strategy")
        self._tasks = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop what runs: it is interrupted and stored."""
        tasks, self._tasks = self._tasks, None
        assert tasks is not None
        kept, self._kept = list(self._kept.values()), {}
        try:
            for production in kept:
                await production.close()
        except BaseException as stopped:
            await tasks.__aexit__(type(stopped), stopped, stopped.__traceback__)
            raise
        await tasks.__aexit__(None, None, None)

    async def produce_batch(
        self, agent_loop: AgentLoop, sampler: PromptSampler, batch_size: int, task_name: str, *, step: int | None = None
    ) -> ProducedBatch:
        """Exactly `batch_size` completed groups, those that wait in the buffer included, consumed at `step`.

        Nothing that was started is in flight when it returns (except with `in_flight="keep"`) or raises: everything is completed,
        interrupted, filtered or failed, and stored. Cancelling it interrupts what runs and stores the tokens so far.

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
        self.check_produce(agent_loop, sampler, batch_size)
        if self.in_flight == "keep" and self._tasks is None:
            raise ProducerError("in_flight='keep' needs an owner of what runs: use the strategy as `async with strategy:`")
        if task_name in self._producing:
            raise ProducerError(f"a batch of task {task_name!r} is being produced already; await it first")
        self._producing.add(task_name)
        try:
            return await self._produce(agent_loop, sampler, batch_size, task_name, step)
        except BaseException:
            await self._all_stored(task_name)
            raise
        finally:
            self._producing.discard(task_name)

    def check_produce(self, agent_loop: AgentLoop, sampler: PromptSampler, batch_size: int) -> None:
        """Raise what producing such batches would raise at once."""
        if whole("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} is no batch; it must be 1 or more")
        check_parts(agent_loop, sampler)
        agent_loop.check_initialised()
        if self.redundant is not None:
            self.redundant.needed(sampler.group_size)
            if agent_loop.group_reward is not None:
                raise ValueError("redundant members cannot be dropped from groups that a group_reward judges as a whole; use a reward")
        if isinstance(self.max_in_flight, int) and self.max_in_flight < sampler.group_size:
            raise ValueError(
                f"max_in_flight={self.max_in_flight} lets no group of {sampler.group_size} rollouts run; raise it, or lower group_size"
            )

    async def _all_stored(self, task_name: str) -> None:
        """Wait until what was asked for before is stored, also by tasks that were cancelled while they waited for it."""
        with suppress(BufferClosedError):  # closing waits for it as well; and the error that brought us here is the one to raise
            await self.buffer.cursor(task_name)  # the writer answers in order

    async def _produce(
        self, agent_loop: AgentLoop, sampler: PromptSampler, batch_size: int, task_name: str, step: int | None
    ) -> ProducedBatch:
        began = asyncio.get_running_loop().time()
        step = await self.buffer.next_step(task_name) if step is None else step
        await self.buffer.check_take(task_name, step)  # refused now, not after all the sampling
        fill = self._fill_and_keep if self.in_flight == "keep" else self._fill_and_stop
        return await fill(agent_loop, sampler, batch_size, task_name, step, began)

    async def _fill_and_stop(
        self, agent_loop: AgentLoop, sampler: PromptSampler, batch_size: int, task_name: str, step: int, began: float
    ) -> ProducedBatch:
        """Run groups until a batch is whole, then stop the rest."""
        production = Production(
            self.buffer, self.plan, agent_loop, sampler, task_name, batch_size, ahead=False, books=self.books(task_name)
        )
        while True:
            async with production.running():
                version = await production.whole(no_bar=self.no_bar)
            if (batch := await production.hand_out(step, version, began)) is not None:
                return batch

    async def _fill_and_keep(
        self, agent_loop: AgentLoop, sampler: PromptSampler, batch_size: int, task_name: str, step: int, began: float
    ) -> ProducedBatch:
        """Wait until a batch is whole; the rest runs on."""
        production = await self._kept_production(agent_loop, sampler, batch_size, task_name)
        try:
            return await production.next_batch(step, began, no_bar=self.no_bar)
        except BaseException:
            del self._kept[task_name]
            await production.close()
            raise

    async def _kept_production(self, agent_loop: AgentLoop, sampler: PromptSampler, batch_size: int, task_name: str) -> Production:
        production = self._kept.get(task_name)
        if production is not None and not production.runs(agent_loop, sampler):
            del self._kept[task_name]
            await production.close()
            production.check()
            production = None
        if production is None:
            assert self._tasks is not None
            production = Production(
                self.buffer, self.plan, agent_loop, sampler, task_name, batch_size, ahead=True, books=self.books(task_name)
            )
            self._kept[task_name] = production
            await production.open(self._tasks)
        production.batch.size = batch_size
        return production
