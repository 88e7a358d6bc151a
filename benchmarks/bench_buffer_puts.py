"""What a durable put costs: beside raw SQLite writing the same bytes, and beside a first version with an ORM.

    python -m benchmarks.bench_buffer_puts [--groups 800] [--rounds 7]

Groups of 8 x 1024 tokens. The raw baseline is `executemany` of the groups' text and bytes, encoded beforehand, into one table,
with the buffer's settings of the file, committing as often; the second run of it against the first is the noise. The last
checkpoint of the write-ahead log, at closing, is counted on all sides.

The ORM's first version has one session a put and one model each for groups and rollouts, token lists as JSON. It is measured
with SQLite's own settings, which it would have, and with the buffer's. Its lists are made beforehand.
"""

import argparse
import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sqlalchemy import JSON, ForeignKey, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from benchmarks.workload import TOKENS, Database, in_rounds, make_group, percentile, print_table, ratios, scratch, spread
from buffer import ReplayBuffer, RolloutGroup
from buffer.backends import sqlite
from buffer.codec import encode_group

PRODUCERS = 32


class Puts(NamedTuple):
    """How long all took, each one (empty for the raw baseline), and how large the write-ahead log became, in bytes."""

    seconds: float
    each: list[float]
    log: int


# -- the baseline -----------------------------------------------------------------------------------------------

Blob = tuple[int, str, bytes]


def as_blobs(groups: list[RolloutGroup]) -> list[Blob]:
    """The text and the bytes that the buffer writes of each."""
    return [(e.group_id, e.prompt + e.extras, e.arrays) for e in map(encode_group, groups)]


async def raw_puts(files: Database, blobs: list[Blob], per_commit: int) -> Puts:
    """`sqlite3.executemany`, `per_commit` rows a transaction."""
    path = files.new()
    connection = sqlite3.connect(path, isolation_level=None)
    for setting in (f"page_size = {sqlite._PAGE_SIZE}", *sqlite.file_settings("NORMAL")):
        connection.execute(f"PRAGMA {setting}")
    connection.execute("CREATE TABLE groups (id INTEGER PRIMARY KEY, words TEXT, arrays BLOB)")
    began = time.perf_counter()
    for start in range(0, len(blobs), per_commit):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO groups VALUES (?, ?, ?)", blobs[start : start + per_commit])
        connection.execute("COMMIT")
    log = log_size(path)
    connection.close()
    done = Puts(time.perf_counter() - began, [], log)
    files.drop(path)
    return done


def log_size(path: Path) -> int:
    """Bytes of the write-ahead log, which is as large as it ever was since it was cut last."""
    log = f"{path}-wal"
    return os.stat(log).st_size if os.path.exists(log) else 0


# -- the buffer -------------------------------------------------------------------------------------------------


async def buffer_puts(files: Database, groups: list[RolloutGroup], producers: int) -> Puts:
    """Put by so many producers, each awaiting one put at a time."""
    path, waiting, each, logs = files.new(), iter(groups), list[float](), [0]
    async with ReplayBuffer.open(f"sqlite:///{path}") as buffer:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(producers):
                tasks.create_task(produce(buffer, path, waiting, each, logs))
        await buffer.close()
        done = Puts(time.perf_counter() - began, each, max(logs))
    files.drop(path)
    return done


async def produce(buffer: ReplayBuffer, path: Path, waiting: Iterator[RolloutGroup], each: list[float], logs: list[int]) -> None:
    """Put what waits, one by one; notes how long each took, and sometimes how large the log is."""
    for group in waiting:
        began = time.perf_counter()
        await buffer.put(group)
        each.append(time.perf_counter() - began)
        if len(each) % PRODUCERS == 0:
            logs.append(log_size(path))


# -- a first version with an ORM --------------------------------------------------------------------------------


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {dict[str, Any]: JSON, list[int]: JSON, list[float]: JSON}


class Group(Base):
    __tablename__ = "groups"
    id: Mapped[int] = mapped_column(primary_key=True)
    task_name: Mapped[str] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(index=True)
    row: Mapped[dict[str, Any]]
    rollouts: Mapped[list["Rollout"]] = relationship(back_populates="group")


class Rollout(Base):
    __tablename__ = "rollouts"
    group_id: Mapped[int] = mapped_column(ForeignKey("groups.id"), primary_key=True)
    member: Mapped[int] = mapped_column(primary_key=True)
    prompt_ids: Mapped[list[int]]
    response_ids: Mapped[list[int]]
    logprobs: Mapped[list[float]]
    loss_mask: Mapped[list[int]]
    versions: Mapped[list[int]]
    text: Mapped[str]
    score: Mapped[float]
    reward: Mapped[float]
    group: Mapped[Group] = relationship(back_populates="rollouts")


def as_columns(group: RolloutGroup) -> list[dict[str, Any]]:
    """The members' columns, arrays as lists: a first version would have lists from the start."""
    arrays = ("prompt_ids", "response_ids", "logprobs", "loss_mask", "versions")
    return [
        {"member": r.index, "text": r.text, "score": r.score, "reward": r.reward} | {name: getattr(r, name).tolist() for name in arrays}
        for r in group.rollouts
    ]


async def orm_puts(files: Database, groups: list[tuple[RolloutGroup, list[dict[str, Any]]]], *, own_settings: bool) -> Puts:
    """One session a put, by one producer."""
    path, each = files.new(), list[float]()
    engine = create_engine(f"sqlite:///{path}")
    if not own_settings:
        event.listen(engine, "connect", lambda connection, _: [connection.execute(f"PRAGMA {s}") for s in sqlite.file_settings("NORMAL")])
    Base.metadata.create_all(engine)
    began = time.perf_counter()
    for group, members in groups:
        put_began = time.perf_counter()
        with Session(engine) as session:
            rollouts = [Rollout(**columns) for columns in members]
            row = dict(group.rollouts[0].row)
            session.add(Group(id=group.group_id, task_name=group.task_name, status=group.status.value, row=row, rollouts=rollouts))
            session.commit()
        each.append(time.perf_counter() - put_began)
    log = log_size(path)
    engine.dispose()
    done = Puts(time.perf_counter() - began, each, log)
    files.drop(path)
    return done


# -- measuring --------------------------------------------------------------------------------------------------

MANY = ("raw SQLite, 32 a commit", "raw SQLite, 32 a commit, again", "buffer, 32 producers")
ONE = ("raw SQLite, 1 a commit", "raw SQLite, 1 a commit, again", "buffer, 1 producer")
ORM = ("ORM, a session a put", "ORM, a session a put, the buffer's settings")


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=800, help="a contender and round; a quarter of them where one producer puts")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    groups = [make_group(n) for n in range(1, options.groups + 1)]
    few = groups[: max(1, len(groups) // 4)]
    blobs, lists = as_blobs(groups), [(group, as_columns(group)) for group in few]
    size = sum(len(text) + len(data) for _, text, data in blobs) / len(blobs)
    in_json = sum(len(json.dumps(members)) for _, members in lists) / len(lists)
    with scratch() as name:
        files = Database(Path(name))
        many = await in_rounds(
            {
                MANY[0]: lambda: raw_puts(files, blobs, PRODUCERS),
                MANY[1]: lambda: raw_puts(files, blobs, PRODUCERS),
                MANY[2]: lambda: buffer_puts(files, groups, PRODUCERS),
            },
            options.rounds,
        )
        one = await in_rounds(
            {
                ONE[0]: lambda: raw_puts(files, blobs[: len(few)], 1),
                ONE[1]: lambda: raw_puts(files, blobs[: len(few)], 1),
                ONE[2]: lambda: buffer_puts(files, few, 1),
                ORM[0]: lambda: orm_puts(files, lists, own_settings=True),
                ORM[1]: lambda: orm_puts(files, lists, own_settings=False),
            },
            options.rounds,
        )
    print(f"{len(groups)} groups of 8 x {TOKENS} tokens ({len(few)} with one producer), {size / 1024:.0f} KiB each; ", end="")
    print(f"the ORM's lists are {in_json / 1024:.0f} KiB of JSON.")
    print_puts(many, len(groups), {"raw SQLite": many[MANY[0]]})
    print_puts(one, len(few), {"raw SQLite": one[ONE[0]], "the ORM": one[ORM[0]]})


def print_puts(rounds: dict[str, list[Puts]], n: int, baselines: dict[str, list[Puts]]) -> None:
    """Each way against the baselines, round by round, medians with the least and the most."""
    head = ["durable puts", "groups/s", *(f"of {name}" for name in baselines), "a put, p50 ms", "p99 ms", "write-ahead log, MiB"]
    print_table(head, [[name, *_cells(own, n, baselines)] for name, own in rounds.items()])


def _cells(own: list[Puts], n: int, baselines: dict[str, list[Puts]]) -> list[str]:
    rates = [n / puts.seconds for puts in own]
    against = [spread(ratios(rates, [n / puts.seconds for puts in theirs])) for theirs in baselines.values()]
    each = [[spread([percentile(puts.each, p) for puts in own], ".1f", 1e3) if own[0].each else "" for p in (50, 99)]]
    return [spread(rates, ".0f"), *against, *each[0], f"{max(puts.log for puts in own) / 2**20:.0f}"]


if __name__ == "__main__":
    asyncio.run(main())
