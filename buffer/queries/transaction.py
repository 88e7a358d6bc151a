"""`Transaction`: what a writing statement is given, and what the writer stores at the end of it."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, insert

from buffer import schema as t
from buffer.queries.dialects import Many, Upsert
from buffer.status import Status

Deltas = Counter[tuple[str, Status]]
"""By how much the groups of a task and status become more."""

_ADD_COUNTS = Upsert(t.counts, ["task_name", "status"], lambda new: {"n": t.counts.c.n + new.n})
_INSERT_TRANSITIONS = Many(insert(t.transitions))


@dataclass(slots=True)
class Transaction:
    """A transaction under way: its connection, who writes, and what it changes.

    Counts and transitions are collected here and stored once, at the end: they are exact at every commit.
    """

    conn: Connection
    owner: str
    now: float = field(default_factory=time.time)
    deltas: Deltas = field(default_factory=Counter)
    transitions: list[dict[str, Any]] = field(default_factory=list)

    def changed(
        self,
        group_id: int,
        task_name: str,
        source: Status | None,
        target: Status,
        *,
        reason: str | None = None,
        step: int | None = None,
        version: int | None = None,
    ) -> None:
        """Note that a group goes from `source` (None: it is new) to `target`."""
        if source is not None:
            self.deltas[task_name, source] -= 1
        self.deltas[task_name, target] += 1
        self.transitions.append(
            {
                "group_id": group_id,
                "at": self.now,
                "source": None if source is None else source.value,
                "target": target.value,
                "owner": self.owner,
                "step": step,
                "version": version,
                "reason": reason,
            }
        )

    def finish(self) -> None:
        """Store what was collected. Counts last and sorted: their rows are everybody's, and are locked in one order."""
        if self.transitions:
            _INSERT_TRANSITIONS.execute(self.conn, self.transitions)
        rows = [{"task_name": task, "status": status.value, "n": n} for (task, status), n in sorted(self.deltas.items()) if n]
        if rows:
            _ADD_COUNTS.execute_many(self.conn, rows)
