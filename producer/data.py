"""`BufferDataset`: batches of a run for torch's `DataLoader`, and for trainers that are built on it.

The training thread asks; a buffer's event loop, on another thread, takes. What was handed out is told apart from what was only taken
ahead by the step: batch after batch, each at the next step.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import IterableDataset, get_worker_info

from agent_loop.arguments import at_least, flag, function, mapping, text
from agent_loop.loop_thread import call
from agent_loop.sampling import whole
from buffer import ReplayBuffer, ResumeReport, RolloutGroup, Status
from buffer.errors import ReplayBufferError
from producer.background import Producer
from producer.data_thread import in_background
from producer.errors import ProducerError
from producer.experience.arrays import Experience
from producer.experience.experience_maker import ExperienceMaker
from producer.experience.losses import Reduction, check_reduction
from producer.experience.maker import make_experience

__all__ = ["BufferDataset", "Make", "in_background"]

Result = TypeVar("Result")
Make = Callable[[Sequence[RolloutGroup]], Any]
"""From the groups of a batch to what is handed out."""

_HANDED_OUT: WeakKeyDictionary[ReplayBuffer, dict[str, int]] = WeakKeyDictionary()
"""By task, the step of the batch that was handed out last of a buffer, whichever dataset did it."""

_NO_WORKERS = (
    "a BufferDataset works in the process that has the buffer open, and its batches are made ahead there: "
    "give DataLoader(dataset, batch_size=None) num_workers=0, and the dataset prefetch=..."
)


@dataclass(frozen=True)
class _Taken:
    """A batch as it was taken: its step, its groups, and what production measured."""

    step: int
    groups: list[RolloutGroup]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class _Made:
    """A batch that is ready to be handed out."""

    step: int
    item: Any
    metrics: Mapping[str, float]


class BufferDataset(IterableDataset[Any]):  # type: ignore[misc]  # torch is not followed
    """Batches for training, one after the other, each consumed at its step; an iterable-style dataset.

    ```python
    dataset = BufferDataset(producer, batch_size=64, make=maker, reduction="token-mean")
    loader = DataLoader(dataset, batch_size=None)            # a batch is made already
    await asyncio.to_thread(train, loader, dataset)          # the event loop goes on producing
    ```

    It is used on another thread than that of the buffer's event loop, which must run meanwhile. Each item is a mapping of tensors as
    `Experience.to_torch` gives it, with `step`, (N,) int64, beside: the step to `commit` when the trainer's checkpoint holds it.

    To go on after a crash, load the state that lies in the checkpoint before the first batch is asked for: it rewinds the run to that step.
    What was handed out after it, or only taken ahead, comes again, the same batches at the same steps; nothing comes twice otherwise.
    Have one for each task. What another one took of it, in this process or in another, is noticed at the next batch and refused.
    """

    def __init__(
        self,
        source: Producer | ReplayBuffer,
        batch_size: int,
        *,
        task_name: str | None = None,
        make: ExperienceMaker | Make = make_experience,
        prefetch: int = 0,
        last_step: int | None = None,
        wait: bool = True,
        tensors: bool = True,
        reduction: Reduction | None = None,
        max_length: int | None = None,
    ) -> None:
        """Say where batches come from.

        Args:
            source: an entered `Producer`, or an open buffer that somebody else fills.
            batch_size: groups of a batch.
            task_name: whose groups; of a `Producer` it is known.
            make: what makes a batch of groups: an `ExperienceMaker`, whose state is then saved with the run at each step, or a function.
            prefetch: batches to take and make ahead while the trainer has one. They were sampled by weights that are older by as many
                steps when their turn comes, beyond the strategy's `max_staleness`. Leave it 0 where the maker's `attach` asks the model
                that is trained, which would be read while it is updated.
            last_step: the iteration ends after this step, and nothing is taken beyond it; None goes on without end.
            wait: for groups to be completed, where the source is a buffer. False ends the iteration where fewer than a batch are.
            tensors: whether an `Experience` becomes tensors; else it is handed out as it is.
            reduction: adds `shift_weights` to the tensors: weights by which a loss a token adds up to this reduction.
            max_length: of the reductions that need it.

        Raises:
            ValueError: a number out of bounds, or no task.
            BufferClosedError: the buffer is not open.
        """
        super().__init__()
        self._task_name = _task_of(source, task_name)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("prefetch", prefetch, 0),
            ("last_step", 0 if last_step is None else last_step, 0),
        ):
            at_least(name, value, least)
        flag("wait", wait)
        flag("tensors", tensors)
        if reduction is not None or max_length is not None:
            check_reduction("token-mean" if reduction is None else reduction, max_length)
        if not isinstance(make, ExperienceMaker):
            function("make", make, "an ExperienceMaker, or a function of groups")
        self._producer = source if isinstance(source, Producer) else None
        self._buffer = source.buffer if isinstance(source, Producer) else source
        self._maker = make if isinstance(make, ExperienceMaker) else None
        self._make: Make = make.make_experience if isinstance(make, ExperienceMaker) else make
        self._batch_size, self._prefetch, self._last_step, self._wait = batch_size, prefetch, last_step, wait
        self._tensors, self._reduction, self._max_length = tensors, reduction, max_length
        self._loop = self._buffer.loop
        self._using = threading.RLock()
        self._turn = asyncio.Lock()
        self._step: int | None = None
        self._ahead: deque[Future[_Made | None]] = deque()
        self._broken = False
        self._taken: _Taken | None = None
        self._ready: dict[int, _Made] = {}
        self.metrics: Mapping[str, float] = {}
        self.report: ResumeReport | None = None

    # For the training thread

    def __iter__(self) -> Iterator[Any]:
        """Batches from where the last iterator left off: a new one repeats nothing."""
        if get_worker_info() is not None:
            raise ProducerError(_NO_WORKERS)
        return _Batches(self)

    def __getstate__(self) -> Any:
        """It is not sent to workers."""
        raise TypeError(_NO_WORKERS)

    @property
    def step(self) -> int | None:
        """The step of the batch handed out last; where nothing was, that of the checkpoint. None before either."""
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the step handed out last.

        A loader that looks ahead, as Accelerate's does, has asked for a batch that is not trained on yet. There, keep
        `{"step": int(batch["step"][0])}` of the batch that is.
        """
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Rewind the run to the step of a checkpoint, also while batches are on their way; `report` is what that found.

        Raises:
            StepError: a later step is committed.
            ValueError: it is no state of this dataset, or lies beyond the run.
        """
        mapping("state", state, "step to a number, as state_dict gave it")
        if set(state) != {"step"}:
            raise ValueError(f"{dict(state)!r:.100} is not the state of a BufferDataset; it has a step")
        if state["step"] is None:  # of a dataset that had not begun
            return
        step = at_least("step", state["step"], 0)
        with self._using:
            self._call_off()
            self.report = self.run(self._resume(step))
            self._hand_out(step)

    def commit(self, step: int, *, version: int | None = None) -> int:
        """The trainer's checkpoint of `step` is on disk: everything up to it is final. Gives the number of groups.

        Raises:
            ValueError: the batch of `step` was not handed out yet.
        """
        with self._using:
            handed = self._step or 0
            if whole("step", step) > handed:
                raise ValueError(f"step={step} was not handed out yet, the last was {handed}; commit what a checkpoint holds")
            return self.run(self._buffer.commit(step, version=version))

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the buffer's event loop and wait for it, as for `engine.update_weights(...)`."""
        try:
            self._refuse_own_loop()
        except ProducerError:
            work.close()
            raise
        return call(self._loop, work)

    def close(self) -> None:
        """Call off what is waited for, on any thread, and take no further batch ahead.

        What was taken ahead already is the first to be handed out, if more are asked for.
        """
        for future in tuple(self._ahead):
            future.cancel()  # without the lock, which a thread that waits for a batch holds
        with self._using:
            self._call_off()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _next(self) -> Any:
        self._refuse_own_loop()
        with self._using:
            if self._step is None:
                self._hand_out(self.run(self._begin()))
            self._ask(1)
            if not self._ahead:
                raise StopIteration
            # It stays the next one if this thread is interrupted while it waits.
            made = self._result(self._ahead[0])
            if made is None:
                self._call_off()
                raise StopIteration
            self._ahead.popleft()
            del self._ready[made.step]
            self._hand_out(made.step)
            self.metrics = made.metrics
            self._ask(self._prefetch)
            return made.item

    def _hand_out(self, step: int) -> None:
        self._step = _HANDED_OUT.setdefault(self._buffer, {})[self._task_name] = step

    def _result(self, future: "Future[_Made | None]") -> _Made | None:
        try:
            return future.result()
        except CancelledError:
            self._call_off()
            raise ProducerError(
                "the batch that was waited for was called off: by close(), or because the event loop of the buffer ended"
            ) from None
        except BaseException:
            if future.done():
                self._call_off()  # those behind it have given up; the next call asks anew
            raise

    def _ask(self, n: int) -> None:
        """See to it that `n` batches are on their way, in the order of their steps."""
        assert self._step is not None
        while len(self._ahead) < n and (self._last_step is None or self._step + len(self._ahead) < self._last_step):
            step = self._step + 1 + len(self._ahead)
            self._ahead.append(asyncio.run_coroutine_threadsafe(self._batch(step), self._loop))

    def _call_off(self) -> None:
        """Call off what is on its way, and wait until it is; what is made by then stays ready."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        if self._loop.is_running():
            self.run(self._quiet())

    def _refuse_own_loop(self) -> None:
        if not self._loop.is_running():
            raise ProducerError(
                "the event loop of the buffer does not run, and nothing is taken without it; keep it running on another thread"
            )
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if running is self._loop:
            raise ProducerError(
                "this would block the event loop that produces the batches; use another thread: await asyncio.to_thread(train, dataset)"
            )

    # On the buffer's event loop

    async def _begin(self) -> int:
        """The step behind which to begin, where no state was loaded."""
        before = await self._buffer.next_step(self._task_name) - 1
        await self._buffer.check_take(self._task_name, before + 1)
        if (handed := _HANDED_OUT.get(self._buffer, {}).get(self._task_name, before)) < before:
            raise ProducerError(
                f"step {before} of task {self._task_name!r} was taken, and an earlier BufferDataset handed out step {handed} last: load "
                "the state of the batch that was trained on last, load_state_dict({'step': ...}), and what comes after it is handed out"
            )
        if self._maker is not None:
            await self._maker.resume(self._buffer, step=before)
        return before

    async def _resume(self, step: int) -> ResumeReport:
        reached = max(await self._buffer.last_step(), await self._buffer.next_step(self._task_name) - 1)
        if step > reached:
            raise ValueError(
                f"step={step} lies beyond this run, whose last step is {reached}: the state is of another run; load one of this run, or "
                "{'step': 0} to begin"
            )
        if self._producer is not None:
            await self._producer.close()
        report = await self._buffer.resume(step)
        self._taken = None
        self._ready.clear()
        if self._maker is not None:
            await self._maker.resume(self._buffer, step=step)
        return report

    async def _quiet(self) -> None:
        """Behind all that was asked for, and all that was given back: else the next take would meet it as another's."""
        async with self._turn:
            with suppress(ReplayBufferError):  # the next take meets it too, and says so
                # The writer answers in order: a take that was called off is undone by then.
                await self._buffer.cursor(self._task_name)
            self._broken = False

    async def _batch(self, step: int) -> _Made | None:
        """The batch of `step`, when those before it are made; None where there is no whole one."""
        async with self._turn:
            if step in self._ready:
                return self._ready[step]
            if self._broken:
                raise asyncio.CancelledError
            self._broken = True
            if self._taken is None and (taken := await self._take(step)) is not None:
                self._taken = taken  # nothing was awaited since: a batch that is taken is made, however often it is called off
            if self._taken is None:
                return None
            await self._check_alone(self._taken)
            made = self._ready[step] = await self._made(self._taken)
            self._taken, self._broken = None, False
            return made

    async def _check_free(self, step: int) -> None:
        """Of two that take in turns, the one that comes too late hears of it before it takes."""
        if await self._buffer.last_step(self._task_name) >= step:
            raise self._not_alone(step)

    async def _check_alone(self, taken: _Taken) -> None:
        """Of two that took at the same moment, one hears of it at least."""
        own = len(taken.groups)
        if await self._buffer.query(task_name=self._task_name, status=Status.CONSUMED, step=taken.step, limit=1, offset=own):
            raise self._not_alone(taken.step)

    def _not_alone(self, step: int) -> ProducerError:
        return ProducerError(
            f"somebody else took groups of task {self._task_name!r} at step {step} or later: have one BufferDataset for each task, in one "
            "process, and split its batches over the ranks; load the state of the last checkpoint, and nothing is lost"
        )

    async def _take(self, step: int) -> _Taken | None:
        await self._check_free(step)
        if self._producer is not None:
            batch = await self._producer.next_batch(self._batch_size, step=step)
            return _Taken(step, list(batch.groups), batch.metrics)
        await self._buffer.check_take(self._task_name, step)
        while not (taken := await self._buffer.take(self._task_name, self._batch_size, step=step, whole=True)):
            if not self._wait:
                return None
            await self._buffer.wait_for(self._task_name, Status.COMPLETED, self._batch_size)
        return _Taken(step, sorted(taken, key=lambda group: group.group_id), {})

    async def _made(self, taken: _Taken) -> _Made:
        maker = self._maker
        if maker is None:
            return await asyncio.to_thread(lambda: self._item(taken, self._make(taken.groups)))
        # On a thread that is not waited for if this is called off: so the state goes on here, once the batch is made and it is durable.
        experience, state = await asyncio.to_thread(maker.made, taken.groups)
        made = await asyncio.to_thread(self._item, taken, experience)
        await maker.save(self._buffer, step=taken.step, state=state)
        maker.take_on(state)
        return made

    def _item(self, taken: _Taken, made: Any) -> _Made:
        if not isinstance(made, Experience):
            return _Made(taken.step, made, taken.metrics)
        metrics = {**taken.metrics, **made.metrics}
        if not self._tensors:
            return _Made(taken.step, made, metrics)
        tensors = made.to_torch(reduction=self._reduction, max_length=self._max_length)
        steps = torch.full((len(made.input_ids),), taken.step, dtype=torch.int64)
        return _Made(taken.step, tensors | {"step": steps}, metrics)


def _task_of(source: Producer | ReplayBuffer, task_name: str | None) -> str:
    if not isinstance(source, Producer | ReplayBuffer):
        raise TypeError(f"source={source!r:.80} is neither a Producer nor a ReplayBuffer; pass an entered producer or an open buffer")
    known = source.task_name if isinstance(source, Producer) else task_name
    if known is None or task_name not in (None, known):
        raise ValueError(f"task_name={task_name!r}: name the task of a buffer's groups; a producer of task {known!r} has its own")
    return text("task_name", known, "the name of a task")


class _Batches(Iterator[Any]):
    """One iteration; what it has not handed out yet is the dataset's, and the next iteration's."""

    def __init__(self, dataset: BufferDataset) -> None:
        self._dataset = dataset

    def __next__(self) -> Any:
        return self._dataset._next()
