"""Copying a run into a new database, as it stood for a trainer at an earlier checkpoint."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, insert, inspect, select

from buffer import operations, queries, schema
from buffer.backends import Backend
from buffer.errors import DatabaseError, StepError
from buffer.operations import Rewind, Rewound
from buffer.queries import Transaction
from buffer.status import Status

_COPIED = (
    schema.tasks,
    schema.steps,
    schema.timelines,
    schema.groups,
    schema.rollouts,
    schema.prompts,
    schema.payloads,
    schema.prefixes,
    schema.transitions,
    schema.counts,
    schema.given_up,
    schema.shares,
    schema.states,
)
"""Not the producers, which do not run here, nor the sequences, which are set behind the numbers that were given."""

_SLICES = {schema.payloads: 64, schema.prefixes: 64, schema.prompts: 64}
"""Rows in memory at once and in one transaction; where a row may be large, few."""

_SLICE = 512


@dataclass(frozen=True, slots=True)
class ForkReport:
    """What `ReplayBuffer.fork` made.

    Attributes:
        groups: copied.
        step: of the checkpoint that a trainer of the fork goes on from.
        version: of the policy at that checkpoint.
        rewound: groups consumed after that step, which the fork will hand out again.
        released: groups that ran when the copy was made, interrupted in the fork.
    """

    groups: int
    step: int
    version: int
    rewound: int
    released: int


class _StoppedError(Exception):
    """Nobody waits for the fork any more."""


def check_step(conn: Connection, step: int) -> None:
    """Raise `StepError` if groups consumed after `step` have no tokens any more."""
    oldest = max(queries.rows_pruned_to(conn), queries.last_pruned_step(conn))
    if step < oldest:
        raise StepError(
            f"step={step}: the tokens of groups consumed up to step {oldest} were pruned, and a fork at that step would hand them out "
            f"again; the oldest possible step is {oldest}"
        )


def fork(source: Connection, target: Backend, step: int, stop: threading.Event) -> ForkReport:
    """Copy everything that the transaction of `source` sees into the database `target`, then rewind that to `step`.

    The copy is marked as unfinished until the end. `stop` ends it early.
    """
    check_step(source, step)
    with target.translated(), _new_database(target) as conn:
        groups = 0
        for table in _COPIED:
            for rows in _slices(source, table):
                if stop.is_set():
                    raise _StoppedError
                with conn.begin():
                    conn.execute(insert(table), rows)
                groups += len(rows) if table is schema.groups else 0
        with conn.begin():
            _copy_values(source, conn, step)
            done, released = _rewind(conn, step)
            queries.forget_meta_value(conn, "unfinished")
    return ForkReport(groups, step, done.version, done.rewound, released)


@contextmanager
def _new_database(target: Backend) -> Iterator[Connection]:
    """A connection to a database that did not exist or is empty, with our tables, marked as unfinished."""
    target.lock()
    engine = target.connect(read_only=False)
    try:
        with engine.connect() as conn:
            with conn.begin():
                if tables := inspect(conn).get_table_names():
                    raise DatabaseError(f"{target.name} is not empty (it has {sorted(tables)[0]}); fork into a new database")
                target.create(conn)
                queries.set_meta_value(conn, "unfinished", "fork")
            yield conn
    finally:
        engine.dispose()
        target.unlock()


def _slices(source: Connection, table: Table) -> Iterator[list[dict[str, Any]]]:
    # Numbers that the database gives by itself are given anew, in the same order.
    columns = [column for column in table.columns if column is not schema.transitions.c.transition_id]
    found = source.execute(select(*columns).order_by(*table.primary_key), execution_options={"yield_per": _SLICES.get(table, _SLICE)})
    for rows in found.mappings().partitions():
        yield [dict(row) for row in rows]


def _copy_values(source: Connection, conn: Connection, step: int) -> None:
    for name in schema.NUMBERS:
        if last := queries.last_number(source, name):
            queries.reserve_beyond(conn, name, last)
    committed = queries.meta_value(source, "committed_step")
    if committed is not None:
        queries.set_meta_value(conn, "committed_step", str(min(int(committed), step)))
    if (pruned := queries.meta_value(source, "rows_pruned_to")) is not None:
        queries.set_meta_value(conn, "rows_pruned_to", pruned)
    version = queries.meta_value(source, "committed_version")
    if version is not None and int(version.partition(" at step ")[2]) <= step:
        queries.set_meta_value(conn, "committed_version", version)


def _rewind(conn: Connection, step: int) -> tuple[Rewound, int]:
    """Make of the copy what a trainer at the checkpoint of `step` finds; gives also how many groups ran."""
    tx = Transaction(conn, f"fork/{os.getpid()}")
    running = queries.running_without_owner(tx)
    queries.move(tx, running, Status.INTERRUPTED, reason="it ran elsewhere when the run was forked")
    queries.count_interruption(conn, [row.group_id for row in running])
    queries.reopen_after(tx, step)
    (done,) = operations.resume(tx, [Rewind(step)])
    tx.finish()
    return done, len(running)
