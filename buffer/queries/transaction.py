"""`Transaction`: what a writing statement is given, and what the writer stores at the end of it."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Table

from buffer import schema as t
from buffer.amounts import NOTHING, Amount
from buffer.queries.dialects import Change, Insert, Upsert
from buffer.queries.standing import Standing
from buffer.status import Status

STALE, UNDONE, INTERRUPTED, RESTARTED, LEFT_OUT, PRUNED = "stale", "undone", "interrupted", "restarted", "left_out", "pruned"
"""Why no group has any more what was sampled; see `buffer.accounts`."""

Deltas = Counter[tuple[str, Status]]
"""By how much the groups of a task and status become more."""

_AMOUNTS = ("tokens", "finished", "finished_tokens")


def _added(table: Table, *names: str) -> Change:
    return lambda new: {name: table.c[name] + new[name] for name in names}


_ADD_COUNTS = Upsert(t.counts, ["task_name", "status"], _added(t.counts, "n", *_AMOUNTS))
_ADD_GIVEN_UP = Upsert(t.given_up, ["task_name", "reason"], _added(t.given_up, *_AMOUNTS))
_INSERT_TRANSITIONS = Insert(t.transitions, [column.name for column in t.transitions.c if column.name != "transition_id"])


@dataclass(slots=True)
class Transaction:
    """A transaction under way: its connection, who writes, and what it changes.

    Counts and transitions are collected here and stored once, at the end: they are exact at every commit.
    """

    conn: Connection
    owner: str
    now: float = field(default_factory=time.time)
    deltas: Deltas = field(default_factory=Counter)
    held: dict[tuple[str, Status], Amount] = field(default_factory=dict)
    given_up: dict[tuple[str, str], Amount] = field(default_factory=dict)
    transitions: list[dict[str, Any]] = field(default_factory=list)

    def changed(
        self,
        group_id: int,
        task_name: str,
        source: Status | None,
        target: Status,
        amounts: tuple[Amount, Amount],
        *,
        reason: str | None = None,
        step: int | None = None,
        version: int | None = None,
    ) -> None:
        """Note that a group goes from `source` (None: it is new) to `target`, with these `amounts` before and after."""
        self.moved(task_name, source, target, amounts)
        if source is not None:
            self.deltas[task_name, source] -= 1
        self.deltas[task_name, target] += 1
        self._note(group_id, None if source is None else source.value, target.value, step, version, reason)

    def went(self, rows: Sequence[Standing], target: Status, *, reason: str | None = None, step: int | None = None) -> None:
        """Note that groups, as they stand, go to `target`, with all that was sampled of them."""
        for task_name, source in {(row.task_name, row.status) for row in rows}:
            own = [row for row in rows if (row.task_name, row.status) == (task_name, source)]
            amount = Amount(sum([row.tokens for row in own]), sum([row.finished for row in own]), sum([row.finished_tokens for row in own]))
            self.moved(task_name, Status(source), target, (amount, amount))
            self.deltas[task_name, Status(source)] -= len(own)
            self.deltas[task_name, target] += len(own)
        for row in rows:
            self._note(row.group_id, row.status, target.value, step, row.max_version, reason)

    def _note(self, group_id: int, source: str | None, target: str, step: int | None, version: int | None, reason: str | None) -> None:
        self.transitions.append(
            {
                "group_id": group_id,
                "at": self.now,
                "source": source,
                "target": target,
                "owner": self.owner,
                "step": step,
                "version": version,
                "reason": reason,
            }
        )

    def moved(self, task_name: str, source: Status | None, target: Status, amounts: tuple[Amount, Amount]) -> None:
        """Note of what was sampled how much `source` had of it before, and `target` has after."""
        before, after = amounts
        if source is not None:
            self._hold(task_name, source, NOTHING - before)
        self._hold(task_name, target, after)

    def _hold(self, task_name: str, status: Status, amount: Amount) -> None:
        if amount and status is not Status.RUNNING:  # see the table
            self.held[task_name, status] = self.held.get((task_name, status), NOTHING) + amount

    def pruned(self, task_name: str, n: int, amount: Amount) -> None:
        """Note that the rows of archived groups are deleted."""
        self.deltas[task_name, Status.ARCHIVED] -= n
        self._hold(task_name, Status.ARCHIVED, NOTHING - amount)
        self.gave_up(task_name, PRUNED, amount)

    def gave_up(self, task_name: str, why: str, amount: Amount) -> None:
        """Note that no group has this any more."""
        if amount:
            self.given_up[task_name, why] = self.given_up.get((task_name, why), NOTHING) + amount

    def finish(self) -> None:
        """Store what was collected. Counts last and sorted: their rows are everybody's, and are locked in one order."""
        if self.transitions:
            _INSERT_TRANSITIONS.execute(self.conn, self.transitions)
        counted = sorted({key for key, n in self.deltas.items() if n} | {key for key, amount in self.held.items() if amount})
        if counted:
            rows = [{"task_name": key[0], "status": key[1].value, "n": self.deltas[key], **_columns(self.held.get(key))} for key in counted]
            _ADD_COUNTS.execute_many(self.conn, rows)
        if self.given_up:
            rows = [{"task_name": task, "reason": why, **_columns(amount)} for (task, why), amount in sorted(self.given_up.items())]
            _ADD_GIVEN_UP.execute_many(self.conn, rows)


def _columns(amount: Amount | None) -> dict[str, int]:
    return {name: getattr(amount or NOTHING, name) for name in _AMOUNTS}
