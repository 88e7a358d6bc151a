"""Large buffers made quickly: a few groups are put, the others are copies of their rows, made within SQLite."""

import asyncio
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.workload import make_group
from buffer import Position, ReplayBuffer, RolloutGroup
from buffer.schema import NEVER_CONSUMED

TABLES = ("groups", "rollouts", "prompts", "payloads", "transitions")


class Kind(NamedTuple):
    """So many groups like `group`, which is one of them; `columns` are what differs: SQL by column, in which `i` is the id."""

    group: RolloutGroup
    n: int
    columns: dict[str, str]


async def make_large(path: Path, kinds: Iterable[Kind]) -> None:
    """A database of all of them, ids from 1 in this order, none committed; `audit` finds nothing wrong."""
    first = 1
    for kind in kinds:
        template = Kind(_with_id(kind.group, first), kind.n, kind.columns)
        async with ReplayBuffer.open(f"sqlite:///{path}") as buffer:
            await buffer.put(template.group)
        # Not on the loop's thread, as it takes its time.
        await asyncio.to_thread(_fill, path, template)
        first += kind.n


def _with_id(group: RolloutGroup, group_id: int) -> RolloutGroup:
    rollouts = [rollout.detached() for rollout in group.rollouts]
    for rollout in rollouts:
        rollout.group_id = group_id
    return RolloutGroup(group_id, rollouts, group.task_name, Position(0, group_id))


def _fill(path: Path, kind: Kind) -> None:
    conn = sqlite3.connect(path, isolation_level=None)
    for setting in ("synchronous = OFF", "cache_size = -262144"):
        conn.execute(f"PRAGMA {setting}")
    conn.execute("BEGIN IMMEDIATE")
    for table in TABLES:
        _copy(conn, table, kind)
    for name, value in kind.columns.items():
        conn.execute(f"UPDATE groups SET {name} = (SELECT {value} FROM (SELECT group_id AS i)) WHERE group_id = ?", [kind.group.group_id])
    _count_anew(conn)
    conn.execute("COMMIT")
    conn.close()


def _copy(conn: sqlite3.Connection, table: str, kind: Kind) -> None:
    own = {"group_id": "i", "transition_id": "NULL", "position": "i", "ready_seq": "i"}
    own |= kind.columns if table == "groups" else {}
    columns = [name for _, name, *_ in conn.execute(f"PRAGMA table_info({table})")]
    values = ", ".join(own.get(name, f"one.{name}") for name in columns)
    first, last = kind.group.group_id, kind.group.group_id + kind.n - 1
    conn.execute(
        f"WITH RECURSIVE ids(i) AS (SELECT {first + 1} WHERE {kind.n} > 1 UNION ALL SELECT i + 1 FROM ids WHERE i < {last}) "
        f"INSERT INTO {table} SELECT {values} FROM ids CROSS JOIN {table} AS one WHERE one.group_id = {first}"
    )


def _count_anew(conn: sqlite3.Connection) -> None:
    conn.execute("DELETE FROM counts")
    held = ", ".join(f"iif(status = 'running', 0, sum({name}))" for name in ("tokens", "finished", "finished_tokens"))
    conn.execute(
        "INSERT INTO counts (task_name, status, n, tokens, finished, finished_tokens) "
        f"SELECT task_name, status, count(*), {held} FROM groups GROUP BY 1, 2"
    )
    conn.execute("UPDATE tasks SET drawn = (SELECT count(*) FROM groups WHERE groups.task_name = tasks.task_name)")
    for name, column in {"group": "group_id", "ready": "ready_seq", "consumed": "consumed_seq"}.items():
        conn.execute(
            f"UPDATE sequences SET last = (SELECT max({column}) FROM groups WHERE {column} < ?) WHERE name = ?", [NEVER_CONSUMED, name]
        )


def no_tokens(task_name: str) -> RolloutGroup:
    """A completed group without tokens, which has no payload."""
    group = make_group(1, task_name=task_name, tokens=0, words=0)
    for rollout in group.rollouts:
        rollout.text = rollout.prompt_ids = None
    return group


def of_64_kib(task_name: str) -> RolloutGroup:
    """A completed group with a payload of 64 KiB: 8 members of 746 tokens with 1 KiB of text."""
    return make_group(1, task_name=task_name, tokens=746, words=49)
