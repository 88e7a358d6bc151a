"""Groups for the buffer's tests: made by hand, compared field by field."""

import asyncio
import copy
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from buffer import DrawnRow, Position, ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.staleness import FIRST_TIMELINE, Timeline
from buffer.status import GROUP_WIDE
from tests import postgres


def url(folder: Path, name: str = "run.db") -> str:
    """A database of this name: a file in the folder, or on the server of the test what stands for it. The same each time."""
    address = os.environ.get(postgres.ADDRESS)
    return f"sqlite:///{folder / name}" if address is None else postgres.schema_url(address, folder, name)


def edit(folder: Path, statement: str) -> int:
    """Change rows of the database in this folder as no buffer does, whatever the foreign keys say; gives how many."""
    if postgres.ADDRESS in os.environ:
        return postgres.edit(url(folder), statement)
    with closing(sqlite3.connect(folder / "run.db")) as connection, connection:
        return connection.execute(statement).rowcount


def a_group(
    group_id: int,
    status: Status | str = Status.COMPLETED,
    *,
    task_name: str = "math",
    size: int = 2,
    tokens: int = 3,
    version: int = 0,
    position: Position | None = None,
    timeline: Timeline = FIRST_TIMELINE,
) -> RolloutGroup:
    """A group as a strategy would put it: prompt `group_id`, every member with `tokens` tokens of `version` on `timeline`."""
    status, prompt = Status(status), f"p{group_id}"
    rollouts = [RolloutState(group_id, index, task_name, timeline=timeline, row={"prompt": prompt}, prompt=prompt) for index in range(size)]
    for rollout in rollouts:
        fill(rollout, tokens, version)
        rollout.status = Status.COMPLETED if status in GROUP_WIDE else status
    group = RolloutGroup(group_id, rollouts, task_name, position)
    if status in GROUP_WIDE:
        group.mark(status)
    return group


def fill(rollout: RolloutState, tokens: int = 3, version: int = 0) -> None:
    rollout.append(range(tokens), logprobs=[-0.5] * tokens, version=version)
    rollout.finish_reason, rollout.text, rollout.score, rollout.reward = "stop", "three", 1.0, 1.0


def finished(group: RolloutGroup, version: int = 0) -> RolloutGroup:
    """A claimed group, run to its end."""
    for rollout in group.rollouts:
        if rollout.status is not Status.COMPLETED:
            fill(rollout, version=version)
            rollout.status = Status.COMPLETED
    return group


def rows(*offsets: int) -> list[DrawnRow]:
    return [DrawnRow({"prompt": f"p{offset}"}, Position(0, offset)) for offset in offsets]


async def draw(buffer: ReplayBuffer, *offsets: int, task_name: str = "math", group_size: int = 2) -> list[int]:
    """Draw these prompts as the task's one sampler would."""
    moves = (await buffer.cursor(task_name)).moves
    return await buffer.draw(task_name, rows(*offsets), group_size=group_size, moves=moves, cursor={"offset": offsets[-1] + 1})


async def put_all(buffer: ReplayBuffer, groups: Sequence[RolloutGroup]) -> None:
    for group in groups:
        await buffer.put(group)


def ids(groups: Sequence[RolloutGroup]) -> list[int]:
    return [group.group_id for group in groups]


async def turns(n: int) -> None:
    """Let the event loop go round."""
    for _ in range(n):
        await asyncio.sleep(0)


def plain(group: RolloutGroup) -> dict[str, Any]:
    """Every field of a group and of its members, comparable with ==, NaN equal to NaN and types told apart."""
    own = {f.name: getattr(group, f.name) for f in fields(group) if f.name != "rollouts"}
    return own | {"rollouts": [{f.name: _plain(getattr(r, f.name)) for f in fields(r)} for r in group.rollouts]}


def _plain(value: Any) -> Any:
    return (value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else copy.deepcopy(value)
