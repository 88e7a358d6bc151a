"""`ReplaySource`: the batches of a run once more, from its database, without engines."""

from collections.abc import AsyncGenerator

from agent_loop.sampling import whole
from buffer import RecordedStep, ReplayBuffer, Status
from producer.errors import ProducerError
from producer.metrics import batch_statistics
from producer.plan import ProducedBatch


class ReplaySource:
    """Hands out what was consumed, step by step, as `produce_batch` handed it out: the same groups, bit by bit.

    Nothing is changed, so the buffer may be opened with `read_only=True`, also while the run goes on.

    Args:
        buffer: an open one.
        task_name: whose batches.
    """

    def __init__(self, buffer: ReplayBuffer, task_name: str) -> None:
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(f"buffer={buffer!r:.80} is no ReplayBuffer; pass an open one")
        if not task_name or not isinstance(task_name, str):
            raise ValueError(f"task_name={task_name!r} names no task; give the name of one, as text")
        self._buffer, self._task_name = buffer, task_name

    async def batches(self, first: int = 1, last: int | None = None) -> AsyncGenerator[ProducedBatch]:
        """The batches of the steps from `first` to `last` (the last that is there), in order; one is in memory at a time.

        A step at which nothing of the task was consumed is passed over. The metrics are those of the groups (`batch/...`),
        counted again.

        Raises:
            ProducerError: tokens of these steps were pruned; before the first batch, if it was so then.
        """
        if whole("first", first) < 1 or (last is not None and whole("last", last) < first):
            raise ValueError(f"first={first}, last={last} are no steps to replay; steps count from 1, and last lies at first or behind")
        recorded = [step for step in await self._buffer.recorded_steps(self._task_name) if last is None or step.step <= last]
        pruned_to = max([await self._buffer.pruned_to(), *(step.step for step in recorded if step.pruned)])
        if first <= pruned_to:
            raise ProducerError(f"tokens of step {pruned_to} were pruned; replay with first={pruned_to + 1}, or from a copy that has them")
        for step in recorded:
            if step.step >= first:
                yield await self._batch(step)

    async def _batch(self, recorded: RecordedStep) -> ProducedBatch:
        found = await self._buffer.query(task_name=self._task_name, step=recorded.step, limit=recorded.groups)
        groups = sorted(found, key=lambda group: group.group_id)
        for group in groups:
            group.mark(Status.CONSUMED)  # as it was handed out; by now it may be archived
        return ProducedBatch(groups, recorded.step, batch_statistics(groups, recorded.version))
