"""`Producer`: production in the background, while the trainer trains."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self, get_args

from agent_loop import AgentLoop
from agent_loop.engines.base import Engine, PauseMode, WeightSource
from agent_loop.sampling import whole
from buffer import ReplayBuffer, Status
from producer.checks import check_parts
from producer.errors import ProducerError
from producer.gate import Gate, Updater, paused
from producer.plan import ProducedBatch
from producer.production import Production
from producer.prompts import PromptSampler
from producer.strategy import ProduceStrategy


class Producer:
    """Produces one task in the background; an async context manager that owns what runs.

    ```python
    async with Producer(strategy, agent_loop, sampler, "math") as producer:
        async for batch in producer.batches(64):
            await asyncio.to_thread(trainer.train, make_experience(batch.groups))
            async with producer.update_weights(mode="keep"):
                await engine.update_weights(trainer.save_weights(), version=engine.version + 1)
    ```

    It begins with the first batch that is asked for, and runs ahead as far as its strategy lets it: with
    `AsyncProduceStrategy` until `ceil((1 + staleness_threshold) * batch_size)` groups are completed or in flight, and never
    further than `max_staleness` allows. An error reaches whoever waits for a batch, at once and as it was raised; where nobody
    waits, whoever does next.

    Args:
        strategy: decides; its `in_flight` has no say here, since nothing is stopped when a batch is whole.
        agent_loop: runs the groups.
        sampler: draws them.
        task_name: whose prompts.
    """

    def __init__(self, strategy: ProduceStrategy, agent_loop: AgentLoop, sampler: PromptSampler, task_name: str) -> None:
        if not isinstance(strategy, ProduceStrategy):
            raise TypeError(f"strategy={strategy!r:.80} is no ProduceStrategy; pass AsyncProduceStrategy(buffer, ...)")
        check_parts(agent_loop, sampler)
        if not task_name or not isinstance(task_name, str):
            raise ValueError(f"task_name={task_name!r} names no task; give the name of one, as text")
        self._strategy, self._agent_loop, self._sampler, self._task_name = strategy, agent_loop, sampler, task_name
        self._tasks: asyncio.TaskGroup | None = None
        self._production: Production | None = None
        self._gate, self._updating, self._updater = Gate(), asyncio.Lock(), Updater()
        self._waited_for = False

    @property
    def buffer(self) -> ReplayBuffer:
        """Where its groups are stored."""
        return self._strategy.buffer

    @property
    def task_name(self) -> str:
        """Whose prompts it runs."""
        return self._task_name

    @property
    def _engine(self) -> Engine | None:
        return self._agent_loop.engine

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise ProducerError("this producer is entered already; one `async with` at a time")
        self._tasks = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        tasks, self._tasks = self._tasks, None
        assert tasks is not None
        production = self._production
        try:
            await self.close()
        except BaseException as stopped:
            await tasks.__aexit__(type(stopped), stopped, stopped.__traceback__)
            raise
        await tasks.__aexit__(None, None, None)
        if kind is None and production is not None:
            production.check()  # nobody asked for a batch since, and would never hear of it

    async def close(self) -> None:
        """Stop: what runs is interrupted and stored. The next batch that is asked for begins anew."""
        production, self._production = self._production, None
        if production is not None:
            await production.close()

    async def start(self, batch_size: int) -> None:
        """Begin to produce batches of this size; again is nothing."""
        self._strategy.check_produce(self._agent_loop, self._sampler, batch_size)
        if self._tasks is None:
            raise ProducerError("this producer is not entered; use it as `async with Producer(...) as producer`")
        if self._production is not None and self._production.ended:
            failed, self._production = self._production, None
            failed.check()
        if self._production is None:
            self._production = Production(
                *(self.buffer, self._strategy.plan, self._agent_loop, self._sampler, self._task_name, batch_size),
                ahead=True,
                books=self._strategy.books(self._task_name),
                gate=self._gate,
            )
            await self._production.open(self._tasks)
        self._production.batch.size = batch_size

    async def batches(self, batch_size: int, *, first_step: int | None = None) -> AsyncGenerator[ProducedBatch]:
        """Batches of `batch_size` completed groups without end, each as soon as it is whole; it is consumed when it is given out.

        Args:
            batch_size: groups.
            first_step: of the trainer, at which the first is consumed, the next at the next; by default one more than the task's last.

        Raises:
            FailureBudgetError, EngineDeadError, DatasetError, ResumeRequiredError: see `ProduceStrategy.produce_batch`.
        """
        step = first_step
        while True:
            batch = await self.next_batch(batch_size, step=step)
            step = batch.step + 1
            yield batch

    async def next_batch(self, batch_size: int, *, step: int | None = None) -> ProducedBatch:
        """The next batch; see `batches`. Cancelled, it leaves production running."""
        if self._waited_for:
            raise ProducerError(f"a batch of task {self._task_name!r} is waited for already; await it first")
        self._waited_for, began = True, asyncio.get_running_loop().time()
        try:
            whole("batch_size", batch_size)
            step = await self.buffer.next_step(self._task_name) if step is None else step
            await self.buffer.check_take(self._task_name, step)
            if self._updater.is_here and await self.buffer.count(self._task_name, Status.COMPLETED) < batch_size:
                self._updater.check_elsewhere("a batch that is not whole")
            await self.start(batch_size)
            return await self._running().next_batch(step, began, no_bar=self._strategy.no_bar)
        finally:
            self._waited_for = False
            if self._production is not None and self._production.ended:
                self._production = None  # whoever waited was told why

    def _running(self) -> Production:
        if self._production is None:
            raise ProducerError("nothing is produced yet; ask for a batch, or call start(batch_size)")
        return self._production

    @asynccontextmanager
    async def update_weights(
        self, source: WeightSource | None = None, version: int | None = None, *, mode: PauseMode = "keep"
    ) -> AsyncGenerator[None]:
        """Hold production and pause the engine while the block updates the weights; go on after it, also where it raises.

        No group starts meanwhile, and draws under way are waited for. An update waits for the one before it.

        Args:
            source: loaded before the block, with `version`; None leaves the update to the block.
            version: of `source`; by default one more than the engine's.
            mode: what becomes of responses in flight: "keep" freezes them, and they go on with the new weights; "abort" stops
                and stores them, to be continued by groups that start after it; "wait" lets the groups in flight end.
        """
        if mode not in get_args(PauseMode):
            raise ValueError(f"mode={mode!r:.40} is unknown; choose among {get_args(PauseMode)}")
        if (engine := self._engine) is None:
            raise ProducerError("this agent loop has no engine whose weights could be updated")
        self._updater.check_elsewhere("another update")
        async with self._updating, self._held(mode), paused(engine, mode):
            with self._gate.frozen(), self._updater.here():
                if source is not None:
                    await engine.update_weights(source, engine.version + 1 if version is None else version)
                yield

    @asynccontextmanager
    async def _held(self, mode: PauseMode) -> AsyncGenerator[None]:
        """No group starts in this block. With "abort" those that run were stopped, with "wait" they have ended."""
        async with self._gate.held():
            if self._production is not None and mode == "abort":
                await self._production.stop()
            elif self._production is not None and mode == "wait":
                await self._production.drained()
            yield

    @asynccontextmanager
    async def paused(self) -> AsyncGenerator[None]:
        """No group starts in this block; those that run go on. For an evaluation on the same engine, say."""
        async with self._held("keep"):
            yield

    async def drain(self) -> None:
        """Let the groups in flight end, and stop: nothing runs after it. The next batch that is asked for begins anew."""
        self._updater.check_elsewhere("draining")
        async with self._held("wait"):
            await self.close()
