"""`ReplayBuffer`: the durable home of every group of rollouts, and the only door to it."""

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, get_args

from buffer import arguments as args
from buffer import operations, queries
from buffer.access import Load
from buffer.amounts import NOTHING
from buffer.asking import Asking
from buffer.codec import snapshot, to_json
from buffer.errors import IllegalTransitionError, ReplayBufferError
from buffer.keeping import Keeping
from buffer.operations import (
    Checkpoint,
    Claim,
    Commit,
    Draw,
    DrawnRow,
    Expire,
    Expired,
    Operation,
    ResumeReport,
    Rewind,
    Rewound,
    Take,
)
from buffer.policies import Fifo, TakePolicy
from buffer.rollout import RolloutGroup
from buffer.sharing import Sharing
from buffer.staleness import Level
from buffer.states import States
from buffer.status import CLAIMABLE, Status, parse_status


@dataclass(frozen=True, slots=True)
class DatasetCursor:
    """Where a task's dataset goes on: `state` is what the last draw left (None before the first)."""

    moves: int
    state: Mapping[str, Any] | None


class ReplayBuffer(Asking, Keeping, Sharing, States):
    """Groups of rollouts in a database, each with a status; everything it says is stored is durable.

    ```python
    async with ReplayBuffer.open("sqlite:///run.db") as buffer:
        await buffer.put(group)
    ```

    All methods are coroutines of the event loop on which the buffer was opened; none blocks it.
    """

    @classmethod
    def open(
        cls,
        url: str,
        *,
        read_only: bool = False,
        synchronous: str = "NORMAL",
        lease: float = 60.0,
        max_crashes: int | None = 20,
        reconnect_timeout: float = 60.0,
    ) -> Self:
        """A buffer over the database at `url`, to be entered with `async with`; the file is made if it is missing.

        Args:
            url: `sqlite:///run.db`, relative to the working directory, or `sqlite:////abs/olute.db`. Or
                `postgresql://user:password@host/database`, which any number of processes may write to (the extra `postgres`).
            read_only: look only; works while another process writes.
            synchronous: "NORMAL" survives the death of the process at any moment; "FULL" also the loss of power,
                for an fsync per transaction. On PostgreSQL the server's own setting holds.
            lease: seconds after which what this process runs is given to others, unless it renews: it does so by itself, also
                while the event loop is blocked.
            max_crashes: a group that so many producers in a row died running, without progress, is failed and no longer
                scheduled; None never fails one.
            reconnect_timeout: seconds for which a lost connection to a server is made anew. Whatever was asked for meanwhile
                waits, and is done exactly once. After it the buffer is closed: what was under way may be stored or not.

        Raises, on entering:
            BufferLockedError: another process writes to this file.
            DatabaseError: the database cannot be opened, or is no buffer of this version (see `buffer.errors`).
        """
        return cls(
            url, read_only=read_only, synchronous=synchronous, lease=lease, max_crashes=max_crashes, reconnect_timeout=reconnect_timeout
        )

    async def put(self, group: RolloutGroup) -> None:
        """Store what came of a group; durable on return. A group the database never saw is added.

        The buffer keeps a copy: what happens to `group` afterwards does not reach it.

        Raises:
            IllegalTransitionError: the stored group cannot become what this one is (it is final, say).
            DuplicateGroupError: another group has this group's position.
            ValueError: a row or an extra that is not JSON.
        """
        if not isinstance(group, RolloutGroup):
            raise TypeError(f"put() stores a RolloutGroup, not {type(group).__name__}")
        self._progress.forget(group.group_id)
        now = snapshot(group)
        for rollout in group.rollouts:
            rollout.dropped = NOTHING  # accounted for with this snapshot
        try:
            await self._write(operations.put, operations.Put(now))
        except Exception:
            for rollout, stored in zip(group.rollouts, now.rollouts, strict=False):  # not stored after all
                rollout.dropped += stored.dropped
            raise

    async def checkpoint(self, group: RolloutGroup) -> None:
        """Store what a running group's members hold now; durable on return. The group goes on running.

        Only what is new since it was handed out or checkpointed last is written. If this process dies, the group is offered
        again with it: tokens are not sampled again, finished members are neither sampled nor scored again.

        Raises:
            LeaseLostError: the group is not this process's any more, or does not run.
            IllegalTransitionError: none of its members runs: it is to be `put`.
            ValueError: as of `put`.
        """
        if not isinstance(group, RolloutGroup):
            raise TypeError(f"checkpoint() stores a RolloutGroup, not {type(group).__name__}")
        now = snapshot(group)
        if now.status is not Status.RUNNING:
            raise IllegalTransitionError(f"group {group.group_id} is {now.status} and cannot be checkpointed; put() stores what came of it")
        if not (starts := self._progress.starts(now)):
            return
        asked = self._progress.asked(now)
        try:
            await self._write(operations.checkpoint, Checkpoint(now, starts))
        except (ReplayBufferError, ValueError):
            self._progress.forget(group.group_id)
            raise
        self._progress.stored(asked)

    async def take(
        self,
        task_name: str,
        n: int,
        *,
        step: int,
        version: int | None = None,
        policy: TakePolicy | None = None,
        oldest_version: int | None = None,
        whole: bool = False,
        among: Sequence[int] | None = None,
    ) -> list[RolloutGroup]:
        """Up to `n` completed groups for training, from now on consumed at `step`.

        Args:
            task_name: whose groups.
            n: the most to take; 0 does nothing.
            step: of the trainer; it must lie behind the last committed one.
            version: of the policy now, kept for `resume`.
            policy: which first; `Fifo()` by default. Groups given back by a rewind always come first, in their old order.
            oldest_version: no group whose staleness is counted from a version before this one (see `buffer.staleness`); it is looked at in
                the transaction that takes them, so that a bound holds whoever completes groups meanwhile.
            whole: `n` groups, or none where there are fewer.
            among: only these groups, in this order; those that are not completed are passed over, and `policy` has no say.

        Raises:
            ResumeRequiredError: an earlier process consumed batches without committing them; call `resume` first.
            StepError: `step` is committed.
            CorruptPayloadError: what is stored of one of them does not decode. None is consumed: see "If a group does not
                decode" in docs/how-to/resume-a-run.md.
        """
        args.require_task(task_name)
        n, step = args.whole_number("n", n, at_least=0), args.step_number(step)
        args.check_policy(policy)
        self._check_open()
        self._check_resumed()
        if n == 0:
            return []
        version, oldest_version = args.whole_or_none("version", version), args.bound_or_none("oldest_version", oldest_version)
        if among is not None and oldest_version is not None:
            raise ValueError(f"{oldest_version=} chooses groups by age, and among names them; give one of both")
        named = None if among is None else args.plain_ids(among)
        request = Take(task_name, n, step, version, policy or Fifo(), oldest_version, whole, named)
        return await self._hand_out(operations.take, request, operations.give_back)

    async def check_take(self, task_name: str, step: int) -> None:
        """Raise what a `take` at `step` would raise; for whoever has long work to do before it."""
        args.require_task(task_name)
        step = args.step_number(step)
        self._check_open()
        self._check_resumed()
        await self._read(operations.check_step, step)

    async def commit(self, step: int, *, version: int | None = None) -> int:
        """Make everything consumed up to `step` final: the trainer's checkpoint is on disk. Gives the number of groups.

        `version` is the policy's at that checkpoint, kept for `resume`. Without it `resume` says what the next batch saw, or
        counts one update a step.
        """
        request = Commit(args.whole_number("step", step, at_least=0), args.whole_or_none("version", version))
        committed: int = await self._write(operations.commit, request)
        return committed

    async def resume(self, step: int, *, future: Literal["keep", "expire"] = "keep") -> ResumeReport:
        """Rewind to the trainer's checkpoint of `step`: what was consumed after it will be handed out again.

        Weights newer than that checkpoint do not exist any more; a new timeline of versions begins (`report.timeline`).

        Args:
            step: of the checkpoint that training goes on from; 0 for none.
            future: of rollouts that such newer weights sampled. "keep" counts their staleness as the distance: the updates
                that were undone and those made since. "expire" resets these members, whatever their staleness.

        Raises:
            StepError: a later step is committed.
        """
        step = args.whole_number("step", step, at_least=0, hint="0 where there is no checkpoint yet")
        done: Rewound = await self._write(operations.resume, Rewind(step, args.future_is_expired(future)))
        self._needs_resume = False
        counts = await self._all_counts()
        return ResumeReport(step, done.version, done.rewound, self._released, done.timeline, done.expired, counts)

    async def expire(self, task_name: str, *, version: int, max_staleness: int, level: Level | str = Level.SEQUENCE) -> int:
        """Expire completed and interrupted groups with a member too stale to train on; gives how many groups expired.

        Only the stale members are reset, as `RolloutState.reset` does: fresh ones keep every byte, and those of them that
        are completed are neither generated nor scored again when the group runs next. Running it again does nothing.

        Call it between batches: one that is being produced counts on the completed groups that it found. It is done in
        slices, each durable by itself; other writes go on in between. Cancelled, it leaves some slices undone.

        Args:
            task_name: whose groups.
            version: of the policy now; staleness is counted from it (see `buffer.staleness`).
            max_staleness: the largest that is allowed.
            level: "sequence" expires a member with one stale trainable token; the cost is proportional to what expires.
                "token" only one that has no fresh trainable token left; hand out `group.masked(...)` to the trainer then.
                It reads every waiting group with a stale token.
        """
        args.require_task(task_name)
        version = args.whole_number("version", version, at_least=0)
        max_staleness = args.whole_number("max_staleness", max_staleness, at_least=0, hint="0 allows the policy of now only")
        return await self._expire(Expire(task_name, version, max_staleness, args.parse_level(level)))

    async def _expire(self, request: Expire) -> int:
        expired = 0
        while True:
            # One slice a request, the next only when it is done: whoever else waits for the writer has its turn between.
            done: Expired = await self._write(operations.expire, request)
            expired += done.n
            if done.after is None:
                return expired
            request = replace(request, after=done.after)

    async def wait_for(self, task_name: str, status: Status | str, n: int = 1, *, timeout: float | None = None) -> int:
        """Wait until at least `n` groups of the task have this status; gives how many there are.

        Nothing is polled: this process's own commits wake it, and on PostgreSQL those of others (LISTEN/NOTIFY).

        Args:
            task_name: whose groups.
            status: in which they are to be.
            n: how many.
            timeout: seconds to wait; None waits without end.

        Raises:
            TimeoutError: there were too few all the time.
            BufferClosedError: the buffer was closed meanwhile.
            ReplayBufferError: a SQLite buffer opened read-only, which is not told what the writing process stores.
        """
        args.require_task(task_name)
        key, n = (task_name, parse_status(status)), args.whole_number("n", n, at_least=0)
        timeout = None if timeout is None else args.seconds("timeout", timeout)
        self._check_open()
        async with asyncio.timeout(timeout):
            return await self._waiters.until(key, n, partial(self.count, *key))

    async def cursor(self, task_name: str) -> DatasetCursor:
        """Where the task's dataset goes on."""
        args.require_task(task_name)
        # Through the writer, where there is one: a draw whose caller was cancelled may still be on its way.
        answer = self._read(queries.cursor, task_name) if self._read_only else self._write(operations.cursor, task_name)
        moves, state = await answer
        return DatasetCursor(moves, None if state is None else json.loads(state))

    async def draw(self, task_name: str, rows: Sequence[DrawnRow], *, group_size: int, moves: int, cursor: Mapping[str, Any]) -> list[int]:
        """Record prompts taken from the dataset as pending groups, in the transaction that moves the cursor.

        Args:
            rows: the prompts; one with an `error` is recorded as failed.
            group_size: rollouts a prompt.
            moves: of the cursor that the draw started from.
            cursor: where the dataset goes on after it (JSON-able).

        Returns:
            The new groups' ids, in order.

        Raises:
            CursorConflictError: another sampler has moved the cursor.
        """
        return list(await self._write(operations.draw, _draw(task_name, rows, group_size, moves, cursor, start=False)))

    async def draw_and_start(
        self, task_name: str, rows: Sequence[DrawnRow], *, group_size: int, moves: int, cursor: Mapping[str, Any]
    ) -> list[RolloutGroup]:
        """As `draw`, but the groups run at once, in the same transaction, and are handed out; those of rows with an error are not.

        Cancelled, it may have drawn the groups all the same: then they are released.
        """
        request = _draw(task_name, rows, group_size, moves, cursor, start=True)
        return await self._run(operations.draw, request, _as_drawn)

    async def claim(
        self,
        task_name: str,
        n: int,
        *,
        statuses: Sequence[Status],
        exclude: Collection[int] = (),
        order: Literal["oldest", "most_interrupted"] = "oldest",
        among: Sequence[int] | None = None,
        interrupted_below: int | None = None,
    ) -> list[RolloutGroup]:
        """Up to `n` waiting groups to run, from now on running: first those in `statuses[0]`, then the next.

        Args:
            task_name: whose groups.
            n: the most.
            statuses: in which they wait.
            exclude: groups that are not wanted now.
            order: of those in one status: the "oldest" first, or the "most_interrupted" (by its member stopped most often;
                the cost is then that of all that wait).
            among: only these groups, in this order; those that wait no more are passed over. None: whichever wait.
            interrupted_below: of those that wait, none of which a member was interrupted so often; None sets no bound.
        """
        args.require_task(task_name)
        n = args.whole_number("n", n, at_least=0)
        wanted = [parse_status(status) for status in statuses]
        if refused := [status for status in wanted if status not in CLAIMABLE]:
            raise ValueError(f"groups that are {refused[0]} cannot be run; those that can are {sorted(CLAIMABLE)}")
        args.one_of("order", order, get_args(queries.ClaimOrder))
        below = args.whole_or_none("interrupted_below", interrupted_below)
        named = None if among is None else args.plain_ids(among)
        request = Claim(task_name, wanted, n, frozenset(exclude), order, named, below)
        return await self._run(operations.claim, request, self._sound) if n > 0 else []

    async def start(self, group_ids: Sequence[int]) -> list[RolloutGroup]:
        """Move given groups to running and hand them out."""
        ids = args.plain_ids(group_ids)
        return await self._run(operations.start, ids) if ids else []

    async def _run(self, operation: Operation, argument: Any, load: Load | None = None) -> list[RolloutGroup]:
        groups = await self._hand_out(operation, argument, operations.release_claimed, load)
        self._progress.handed_out(groups)
        return groups

    async def release(self, group_ids: Sequence[int]) -> None:
        """Running groups that will not be run after all become interrupted, with what was stored of them."""
        if ids := args.plain_ids(group_ids):
            for group_id in ids:
                self._progress.forget(group_id)
            await self._write(operations.release, ids)

    async def _all_counts(self) -> dict[str, dict[Status, int]]:
        return await self._read(_counts_by_task)


async def _as_drawn(groups: Mapping[int, RolloutGroup]) -> list[RolloutGroup]:
    return list(groups.values())


def _draw(task_name: str, rows: Sequence[DrawnRow], group_size: int, moves: int, cursor: Mapping[str, Any], *, start: bool) -> Draw:
    args.require_task(task_name)
    size, moved = args.whole_number("group_size", group_size, at_least=1), args.whole_number("moves", moves, at_least=0)
    return Draw(task_name, list(rows), size, moved, to_json(cursor, "the dataset cursor"), start)


def _counts_by_task(conn: Any) -> dict[str, dict[Status, int]]:
    return {task_name: queries.counts(conn, task_name) for task_name in queries.task_names(conn)}
