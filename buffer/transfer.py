"""Exporting a buffer's groups to a file and importing them, slice by slice, off the event loop."""

import os
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from buffer import queries
from buffer.codec import GroupSnapshot, encode, snapshot
from buffer.errors import DuplicateGroupError
from buffer.export import GroupWriter, read_groups
from buffer.export_rows import rows_of, same_rows
from buffer.operations.consuming import committed_step
from buffer.operations.transfer import Restore, refuse_steps, restore
from buffer.rollout import RolloutGroup
from buffer.status import Status, group_status, member_status
from buffer.store import uninterrupted

Read = Callable[..., Coroutine[Any, Any, Any]]
"""`ReplayBuffer._read`: a function of a connection, and its arguments, on a thread and in a transaction of its own."""

Write = Callable[..., Coroutine[Any, Any, Any]]
"""`ReplayBuffer._write`: an operation and its argument."""

_SLICE_GROUPS, _SLICE_BYTES = 64, 2**24
"""Most groups, and about the most bytes of tokens, in memory at once and in one transaction."""


async def export(read: Read, path: str | os.PathLike[str], task_name: str | None, statuses: Collection[Status], overwrite: bool) -> int:
    """Write what is stored to a file, each slice as it stands when its turn comes; gives how many groups."""
    opened: list[GroupWriter] = []
    try:
        await _whole(read(_open_writer, opened, path, overwrite))
        for ids in _slices(await read(queries.stored_order, task_name, statuses)):
            await _whole(read(_write_slice, opened[0], ids))
        await _whole(read(_finish, opened[0]))
    finally:
        for writer in opened:
            writer.abandon()
    return opened[0].groups


async def _whole(work: Coroutine[Any, Any, Any]) -> Any:
    """What comes of it, waited for even when cancelled: meanwhile the file is the thread's, and nobody may close it."""
    answers: list[Any] = []

    async def kept() -> None:
        answers.append(await work)

    await uninterrupted(kept())
    return answers[0]


def _open_writer(conn: Connection, opened: list[GroupWriter], path: str | os.PathLike[str], overwrite: bool) -> None:
    opened.append(GroupWriter(path, overwrite=overwrite))


def _finish(conn: Connection, writer: GroupWriter) -> None:
    writer.finish()


def _slices(order: NDArray[np.int64]) -> Iterator[list[int]]:
    """Ids in slices; rows of `order` are an id and a size."""
    ids: list[int] = []
    size = 0
    for row in order:
        ids.append(int(row[0]))
        size += int(row[1])
        if len(ids) == _SLICE_GROUPS or size >= _SLICE_BYTES:
            yield ids
            ids, size = [], 0
    if ids:
        yield ids


def _write_slice(conn: Connection, writer: GroupWriter, ids: Sequence[int]) -> None:
    # Some may have been pruned since the order was read.
    writer.write(queries.load_groups(conn, queries.unpruned(conn, ids)))


async def import_file(read: Read, write: Write, path: str | os.PathLike[str]) -> tuple[int, bool]:
    """Add a file's groups; gives how many, and whether any is consumed and not committed.

    The file is read twice: nothing is stored before all of it was found good.
    """
    check, added = _Check(), 0
    await _through(path, lambda file: read(check.slice, file))
    await read(check.refuse_steps)

    async def store(file: "_File") -> bool:
        nonlocal added
        if (request := await read(_encoded, file)) is None:
            return False
        added += await write(restore, request)
        return True

    await _through(path, store)
    return added, check.consumed is not None


async def _through(path: str | os.PathLike[str], use: Callable[["_File"], Coroutine[Any, Any, bool]]) -> None:
    """Use the file slice after slice, until it says that there is none."""
    file = _File(path)
    try:
        while await _whole(use(file)):
            pass
    finally:
        file.close()


def _encoded(conn: Connection, file: "_File") -> Restore | None:
    groups = file.next()
    steps = [group.consumed_step for group in groups]
    return to_restore(conn, [snapshot(group) for group in groups], steps, skip_known=True) if groups else None


def to_restore(conn: Connection, groups: Sequence[GroupSnapshot], steps: Sequence[int | None], *, skip_known: bool = False) -> Restore:
    """The request to add these groups, encoded here and not in the writer's time."""
    timeline = queries.timeline(conn)
    return Restore([encode(group, timeline) for group in groups], steps, skip_known)


class _File:
    """A file's groups in slices."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._groups = read_groups(path)

    def next(self) -> list[RolloutGroup]:
        """The next slice; empty at the end."""
        groups: list[RolloutGroup] = []
        size = 0
        while len(groups) < _SLICE_GROUPS and size < _SLICE_BYTES and (group := next(self._groups, None)) is not None:
            groups.append(_settled(group))
            size += sum(13 * rollout.response_ids.size for rollout in group.rollouts)
        return groups

    def close(self) -> None:
        """Close the file."""
        self._groups.close()


def _settled(group: RolloutGroup) -> RolloutGroup:
    """The group as it is stored here: what ran elsewhere is interrupted, since nobody runs it here."""
    own = [Status.INTERRUPTED if status is Status.RUNNING else status for status in group.statuses]
    whole = group_status(own)
    for rollout, status in zip(group.rollouts, own, strict=True):
        rollout.status = member_status(whole, status)
    return group


@dataclass(slots=True)
class _Check:
    """What the first reading of a file finds out."""

    seen: set[int] = field(default_factory=set)
    archived: int | None = None
    consumed: int | None = None

    def slice(self, conn: Connection, file: _File) -> bool:
        """Compare the next slice with what is stored; raises where a group cannot be added and is not there as it is."""
        groups = file.next()
        stored = {group.group_id: group for group in load_known(conn, [group.group_id for group in groups])}
        for group in groups:
            if group.group_id in self.seen:
                raise DuplicateGroupError(f"group {group.group_id} stands in the file twice; nothing was imported")
            self.seen.add(group.group_id)
            if group.group_id in stored and not same_rows(rows_of(group), rows_of(_settled(stored[group.group_id]))):
                raise DuplicateGroupError(
                    f"group {group.group_id} is in the database already, and is another than in the file; "
                    "nothing was imported: take another database"
                )
        new = [group for group in groups if group.group_id not in stored]
        _refuse_positions(conn, new)
        _refuse_unstorable(conn, new)
        self._note_steps(new)
        return bool(groups)

    def _note_steps(self, groups: Sequence[RolloutGroup]) -> None:
        for group in groups:
            step = group.consumed_step
            if (step is None) == (group.status in (Status.CONSUMED, Status.ARCHIVED)):
                raise ValueError(f"group {group.group_id} of the file is {group.status} and consumed_step={step}; nothing was imported")
            if step is not None and group.status is Status.ARCHIVED:
                self.archived = max(step, self.archived or 0)
            if step is not None and group.status is Status.CONSUMED:
                self.consumed = step if self.consumed is None else min(step, self.consumed)

    def refuse_steps(self, conn: Connection) -> None:
        """Raise `StepError` where the file's steps do not go with the buffer's."""
        refuse_steps(queries.first_consumed(conn), committed_step(conn), self.archived, self.consumed)


def load_known(conn: Connection, group_ids: Sequence[int]) -> list[RolloutGroup]:
    """Those of the groups that are there."""
    return queries.load_groups(conn, list(queries.known(conn, group_ids)))


def _refuse_unstorable(conn: Connection, groups: Sequence[RolloutGroup]) -> None:
    """Encode them for nothing: what cannot be is found before anything is stored."""
    request = to_restore(conn, [snapshot(group) for group in groups], [group.consumed_step for group in groups])
    for encoded in request.encoded:
        encoded.prompt  # noqa: B018 - its making is what may fail


def _refuse_positions(conn: Connection, groups: Sequence[RolloutGroup]) -> None:
    for task_name in {group.task_name for group in groups}:
        places = [group.position for group in groups if group.task_name == task_name and group.position is not None]
        if places and (taken := queries.at_positions(conn, task_name, places)):
            (epoch, offset), group_id = min(taken.items())
            raise DuplicateGroupError(
                f"the prompt of task {task_name!r} at (epoch {epoch}, {offset}) is group {group_id} of the database already, and "
                "another in the file; nothing was imported: take another database"
            )
