"""Keeping a run: giving up what is not needed any more, and copies of it."""

import os
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from buffer import arguments as args
from buffer import forking, operations, transfer
from buffer.access import Access
from buffer.backends import backend_of
from buffer.codec import snapshot
from buffer.forking import ForkReport
from buffer.operations import Prune, PrunedSlice
from buffer.rollout import RolloutGroup
from buffer.status import Status, parse_status
from buffer.store import Reader, uninterrupted


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What `ReplayBuffer.prune` gave up: payloads and their bytes, and rows of groups whose payloads were gone."""

    payloads: int
    payload_bytes: int
    rows: int


class Keeping(Access):
    """How a `ReplayBuffer` is pruned and copied."""

    async def prune(
        self, *, keep_steps: int | None = None, keep_last: int | None = None, max_bytes: int | None = None, rows: bool = False
    ) -> PruneReport:
        """Give up payloads of committed groups beyond any of the bounds: their tokens are gone, their rows stay.

        It is done in small slices, each durable by itself; other writes go on in between. The file does not become smaller:
        its free pages are used again. A group whose payload is gone is still found, counted and told the history of.

        Args:
            keep_steps: the payloads of so many steps up to the committed one are kept.
            keep_last: those of so many groups are kept, the last consumed.
            max_bytes: the oldest go until those left take no more.
            rows: also give up the rows of groups without a payload, but for those of each task's last step; `audit` knows how many were.
        """
        bounds = {"keep_steps": keep_steps, "keep_last": keep_last, "max_bytes": max_bytes}
        given = {name: args.whole_or_none(name, bound) for name, bound in bounds.items()}
        if not rows and all(bound is None for bound in given.values()):
            raise ValueError(f"prune() was told nothing to give up; give one of {', '.join(given)}, or rows=True")
        self._check_writable()
        done = await self._prune(Prune(await self._read(operations.prune_bounds, *given.values())))
        return replace(done, rows=(await self._prune(Prune(None))).rows) if rows else done

    async def _prune(self, request: Prune) -> PruneReport:
        total = PruneReport(0, 0, 0)
        while True:
            # One slice a request, the next only when it is done: whoever else waits for the writer has its turn between.
            done: PrunedSlice = await self._write(operations.prune, request)
            if not done.payloads and not done.rows:
                return total
            total = PruneReport(total.payloads + done.payloads, total.payload_bytes + done.payload_bytes, total.rows + done.rows)

    async def export(
        self,
        path: str | os.PathLike[str],
        *,
        task_name: str | None = None,
        status: Status | str | Collection[Status | str] = (),
        overwrite: bool = False,
    ) -> int:
        """Write groups to a file for other programs, or for `import_file`; gives how many.

        While the run goes on: each slice of groups is as it stands when its turn comes, and groups that come into being
        meanwhile are left out. So are those whose tokens were pruned. The file appears when it is whole.

        Args:
            path: ends in .parquet (needs the extra `parquet`), .jsonl or .jsonl.gz; see `buffer.export`.
            task_name: whose groups; by default of all tasks.
            status: one, or any of several; by default any.
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: the file is there.
            ValueError: an unknown ending.
        """
        if task_name is not None:
            args.require_task(task_name)
        statuses = [parse_status(s) for s in ([status] if isinstance(status, str) else status)]
        return await transfer.export(self._read, path, task_name, statuses, overwrite)

    async def import_file(self, path: str | os.PathLike[str]) -> int:
        """Add the groups of a file that `export` wrote, with their ids, statuses and steps; gives how many were added.

        Groups that are here already, as they stand in the file, are passed over: an import that was broken off is begun
        again. What ran when it was exported is interrupted. A file holds no dataset's position: to draw on where a run
        stood, use `fork`. Where batches of the file are consumed and not committed, `take` needs a `resume` first.

        The file is read twice, and nothing is stored before all of it was found good. Then it is stored slice by slice.

        Raises:
            FileFormatError: the file is foreign, damaged or cut off.
            DuplicateGroupError: a group of this id or position is here, and is another.
            StepError: steps of the file do not go with what is committed or consumed here.
        """
        self._check_writable()
        added, consumed = await transfer.import_file(self._read, self._write, path)
        self._needs_resume |= consumed
        return added

    async def put_restored(self, groups: Sequence[RolloutGroup]) -> None:
        """Add groups as they stood in another buffer, consumed and archived ones included, in one transaction.

        Those that were consumed keep their steps, and their order is that of `groups`.

        Raises:
            DuplicateGroupError: a group of this id or position is here.
            IllegalTransitionError: a group is running, or its status and step of consumption disagree.
            StepError: their steps do not go with what is committed or consumed here.
        """
        if groups:
            self._check_writable()
            steps = [group.consumed_step for group in groups]
            request = await self._read(transfer.to_restore, [snapshot(group) for group in groups], steps)
            await self._write(operations.restore, request)
            self._needs_resume |= any(group.status is Status.CONSUMED for group in groups)

    async def fork(self, url: str, *, step: int) -> ForkReport:
        """Copy this run into a new database, as it stands for a trainer at the checkpoint of `step`.

        What was consumed after `step` is completed in the copy, in its order, also where it is committed here; drawn prompts and
        the dataset's position are kept, so that nothing is drawn twice. What runs here is interrupted there. A trainer of the
        fork calls `resume(step=step)`, as after any restart.

        This run may go on: it is read in one transaction, as it was at its beginning. A fork that is broken off leaves a
        database that cannot be opened and says so, or, at its very beginning, an empty file.

        Args:
            url: of the copy; its database must be new or empty.
            step: of the checkpoint; 0 for the state before training.

        Raises:
            StepError: tokens of groups consumed after `step` were pruned; it names the oldest possible step.
            DatabaseError: the other database is not empty, or cannot be written.
        """
        step = args.whole_number("step", step, at_least=0, hint="0 for the state before training")
        target, stop = backend_of(url), threading.Event()
        self._check_open()
        # A thread of its own: it may take minutes, and the others' reads go on.
        reader = Reader(self._backend, 1)
        try:
            return await reader.read(forking.fork, target, step, stop)
        finally:
            stop.set()
            await uninterrupted(reader.close())
