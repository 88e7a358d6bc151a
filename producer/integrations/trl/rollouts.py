"""`GRPORollouts`: the `rollout_func` of TRL's `GRPOTrainer`, over an agent loop and a durable buffer.

TRL asks for completions of prompts that it chose, on its own thread; what runs and what is stored lives on an event loop beside it.

on_train_begin -> resume, weights    call -> find or draw -> complete -> take at the step    on_step_end -> weights    on_save -> commit
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, get_args

from transformers import TrainerCallback

from agent_loop import AgentLoop
from agent_loop.engines.base import Engine, WeightSource
from agent_loop.errors import first_error
from agent_loop.loop_thread import LoopThread, call
from buffer import DrawnRow, Position, ReplayBuffer, RolloutGroup, Status
from producer.checkpoints import Interval
from producer.errors import ProducerError
from producer.flight import Rules
from producer.integrations.trl.checks import Correction, check_trainer
from producer.integrations.trl.columns import columns
from producer.integrations.trl.completing import complete
from producer.integrations.trl.prompts import Rows, grouped, prompt_key
from producer.integrations.trl.weights import model_weights

_REUSED = (Status.COMPLETED, Status.INTERRUPTED, Status.EXPIRED, Status.PENDING, Status.FAILED)
"""Groups that a call takes up before it draws new ones, in this order."""

_PAGE = 256


def stored_reward(rollout_reward: Sequence[float | None], **columns: Any) -> list[float | None]:
    """A reward function for TRL that gives the rewards which the agent loop gave, as they are stored."""
    return list(rollout_reward)


class GRPORollouts:
    """Completions for `GRPOTrainer` from an agent loop, each group stored and consumed at the trainer's step.

    ```python
    buffer = ReplayBuffer.open("sqlite:///run.db")
    agent_loop = SingleTurnAgentLoop(TransformersEngine(folder), tokenizer, sampling=SamplingParams(max_tokens=64))
    with GRPORollouts(buffer, agent_loop) as rollouts:
        options = {"rollout_func": rollouts, "callbacks": [rollouts.callback]}
        trainer = CorrectedGRPOTrainer(folder, reward_funcs, args, train_dataset, processing_class=tokenizer, **options)
        trainer.train(resume_from_checkpoint=...)
    ```

    Weights go to the engine after each optimisation step. A batch is committed when the trainer's checkpoint is saved. A trainer
    that starts again from a checkpoint is given the groups that are stored for the prompts it asks for; what they lack is sampled.
    For evaluations nothing is stored.

    Args:
        buffer: not open yet, like the agent loop's engine: both are opened on the loop of this object, by its `with`.
        agent_loop: runs the groups. If it has a reward, pass `stored_reward` to the trainer.
        task_name: under which they are stored.
        rows: the dataset, where rewards of the agent loop need other columns than the prompt.
        correction: "required" refuses a trainer that does not correct for the policy that sampled; "off" does not look.
        max_staleness: stored groups with tokens sampled more updates ago are sampled anew; None takes any.
        max_in_flight: rollouts at once; None sets no bound.
        weights: of the model, as the engine takes them; by default its state dict, with adapters of PEFT merged in.
        checkpoint_tokens: as of `ProduceStrategy`.
        checkpoint_seconds: likewise.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        agent_loop: AgentLoop,
        *,
        task_name: str = "grpo",
        rows: Iterable[Mapping[str, Any]] | None = None,
        correction: Correction = "required",
        max_staleness: int | None = None,
        max_in_flight: int | None = None,
        weights: Callable[[Any], WeightSource] = model_weights,
        checkpoint_tokens: int | None = 512,
        checkpoint_seconds: float | None = 10.0,
    ) -> None:
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(f"buffer={buffer!r:.80} is no ReplayBuffer; pass ReplayBuffer.open(url), not entered")
        if agent_loop.engine is None:
            raise ValueError("the agent loop has no engine whose weights could be kept in step; give it one")
        if correction not in get_args(Correction):
            raise ValueError(f"correction={correction!r:.40} is unknown; choose among {get_args(Correction)}")
        for name, value, least in (("max_staleness", max_staleness, 0), ("max_in_flight", max_in_flight, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be {least} or more; None sets no bound")
        self._buffer, self._agent_loop, self._engine = buffer, agent_loop, agent_loop.engine
        self._task_name, self._rows, self._correction = task_name, Rows(rows), correction
        self._max_staleness, self._max_in_flight, self._weights = max_staleness, max_in_flight, weights
        self._rules = Rules(None, None, True, 10.0, Interval(checkpoint_tokens, checkpoint_seconds))
        self._held: dict[tuple[str, int], deque[RolloutGroup]] | None = None
        self._thread: LoopThread | None = None
        self._stack = AsyncExitStack()
        self._begun = False
        self._checked: Any = None
        self.callback = _Callback(self)
        """Pass it to the trainer in `callbacks`."""

    # -- opening and closing ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise ProducerError("these rollouts are entered already; one `with` at a time")
        self._thread = LoopThread()
        try:
            call(self._thread.loop, self._open())
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    async def _open(self) -> None:
        await self._stack.enter_async_context(self._buffer)
        await self._stack.enter_async_context(self._engine)

    def _close(self) -> None:
        thread, self._thread, self._begun, self._checked = self._thread, None, False, None
        if thread is not None:
            try:
                call(thread.loop, self._stack.aclose())
            finally:
                thread.stop()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._thread is None:
            raise ProducerError("these rollouts are not entered; use them as `with GRPORollouts(...) as rollouts`")
        return self._thread.loop

    # -- what the trainer tells ---------------------------------------------------------------------------------

    def begin(self, step: int, model: Any, *, skips_data: bool = True) -> None:
        """Training begins, or goes on from the checkpoint of `step`: rewind to it, and give the engine the model's weights.

        Args:
            step: optimisation steps done.
            model: that is trained.
            skips_data: whether the trainer passes over the prompts of those steps.
        """
        if step > 0 and not skips_data:
            raise ValueError(f"a run that goes on from step {step} would train on its first prompts again; set ignore_data_skip=False")
        call(self._loop, self._begin(step, self._weights(model)))
        self._begun = True

    async def _begin(self, step: int, weights: WeightSource) -> None:
        report = await self._buffer.resume(step=step)
        # A trainer that starts again in one process has an engine that is further on: versions only grow.
        await self._engine.update_weights(weights, max(report.version, self._engine.version))
        self._held = None

    def update(self, model: Any) -> None:
        """A step is done: the engine is given the new weights."""
        call(self._loop, self._engine.update_weights(self._weights(model), self._engine.version + 1))

    def commit(self, step: int) -> None:
        """The checkpoint of `step` is on disk: what was consumed up to it is final."""
        call(self._loop, self._buffer.commit(step, version=self._engine.version))

    # -- what the trainer asks ----------------------------------------------------------------------------------

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """One completion for each prompt, in order, with what `columns` says.

        Args:
            prompts: each as many times in a row as it has generations.
            trainer: that asks.

        Raises:
            ValueError: the trainer or its prompts do not fit; nothing is drawn then.
            FailureBudgetError: a group failed; the others are stored.
            EngineDeadError: the engine is gone.
        """
        loop = self._loop
        if self._checked is not trainer:
            check_trainer(trainer, self._agent_loop.sampling, self._correction)
            self._checked = trainer
        evaluates = not trainer.model.training
        size = trainer.num_generations_eval if evaluates else trainer.num_generations
        rows = [self._rows.of(prompt) for prompt in grouped(prompts, size)]
        if evaluates:
            groups = call(loop, self._evaluated(rows, size))
        else:
            if not self._begun:
                raise ProducerError("the trainer never told that it began; pass callbacks=[rollouts.callback] to it")
            groups = call(loop, self._produced(rows, size, trainer.state.global_step + 1))
        return columns(groups, trainer.max_completion_length)

    async def _produced(self, rows: Sequence[Mapping[str, Any]], size: int, step: int) -> list[RolloutGroup]:
        """The groups of these rows, completed, and consumed at `step`."""
        await self._buffer.check_take(self._task_name, step)
        try:
            await self._expire()
            ids, unfinished = await self._found_or_drawn(rows, size)
            options = {"rules": self._rules, "group_size": size, "max_in_flight": self._max_in_flight}
            await complete(self._buffer, self._agent_loop, self._task_name, unfinished, **options)  # type: ignore[arg-type]
        except BaseException:
            self._held = None  # what was found is found again
            raise
        taken = await self._buffer.take(self._task_name, len(ids), step=step, version=self._engine.version, among=ids, whole=True)
        if not taken:
            raise ProducerError(
                f"groups {ids} of task {self._task_name!r} were completed, and taken by another; give each trainer its task_name"
            )
        by_id = {group.group_id: group for group in taken}
        return [by_id[group_id] for group_id in ids]

    async def _expire(self) -> None:
        if self._max_staleness is not None and self._held is None:
            await self._buffer.expire(self._task_name, version=self._engine.version, max_staleness=self._max_staleness)

    async def _found_or_drawn(self, rows: Sequence[Mapping[str, Any]], size: int) -> tuple[list[int], list[int]]:
        """A group for each row: its id, in order; and the ids of those that are not completed."""
        if self._held is None:
            self._held = await self._waiting()
        found = [self._pop((prompt_key(row["prompt"]), size)) for row in rows]
        drawn = iter(await self._drawn([row for row, group in zip(rows, found, strict=True) if group is None], size))
        ids = [next(drawn) if group is None else group.group_id for group in found]
        whole = {group.group_id for group in found if group is not None and group.status is Status.COMPLETED}
        return ids, [group_id for group_id in ids if group_id not in whole]

    def _pop(self, key: tuple[str, int]) -> RolloutGroup | None:
        assert self._held is not None
        held = self._held.get(key)
        return held.popleft() if held else None

    async def _waiting(self) -> dict[tuple[str, int], deque[RolloutGroup]]:
        """Groups that an earlier run left, by prompt and size; completed ones first, then the oldest."""
        counts, found = await self._buffer.counts(self._task_name), dict[tuple[str, int], deque[RolloutGroup]]()
        for status in _REUSED:
            for offset in range(0, counts[status], _PAGE):
                for group in await self._buffer.query(task_name=self._task_name, status=status, limit=_PAGE, offset=offset):
                    key = prompt_key(group.rollouts[0].row.get("prompt")), len(group.rollouts)
                    found.setdefault(key, deque()).append(group)
        return found

    async def _drawn(self, rows: Sequence[Mapping[str, Any]], size: int) -> list[int]:
        """New groups for these rows."""
        if not rows:
            return []
        cursor = await self._buffer.cursor(self._task_name)
        drawn = 0 if cursor.state is None else cursor.state.get("trl_prompts")
        if drawn is None:
            raise ProducerError(f"task {self._task_name!r} was begun by a sampler of prompts; give the trainer's another task_name")
        entries = [DrawnRow(row, Position(0, drawn + at)) for at, row in enumerate(rows)]
        behind = {"trl_prompts": drawn + len(rows)}
        return await self._buffer.draw(self._task_name, entries, group_size=size, moves=cursor.moves, cursor=behind)

    async def _evaluated(self, rows: Sequence[Mapping[str, Any]], size: int) -> list[RolloutGroup]:
        """Groups of these rows that nobody stores."""
        task = f"{self._task_name}/evaluation"
        groups = [RolloutGroup.from_row(at, row, group_size=size, task_name=task, position=Position(0, at)) for at, row in enumerate(rows)]
        room = asyncio.Semaphore(len(groups) if self._max_in_flight is None else max(1, self._max_in_flight // size))
        try:
            async with asyncio.TaskGroup() as running:
                for group in groups:
                    running.create_task(self._evaluate(group, room))
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        return groups

    async def _evaluate(self, group: RolloutGroup, room: asyncio.Semaphore) -> None:
        async with room:
            await self._agent_loop.generate_group(group)
        if group.status is not Status.COMPLETED:
            reason = next((state.error for state in group.rollouts if state.error), "it was ended early")
            raise ProducerError(f"a prompt of the evaluation is {group.status}: {reason}")

    @property
    def engine(self) -> Engine:
        """Of the agent loop."""
        return self._engine


class _Callback(TrainerCallback):  # type: ignore[misc]
    """Tells the rollouts what the trainer does."""

    def __init__(self, rollouts: GRPORollouts) -> None:
        self._rollouts = rollouts

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        self._rollouts.begin(state.global_step, model, skips_data=not args.ignore_data_skip)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        self._rollouts.update(model)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._rollouts.commit(state.global_step)
