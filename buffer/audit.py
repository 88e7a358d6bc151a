"""The conservation law, checked: prompts drawn = the sum over all statuses, each drawn prompt in exactly one group."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from buffer import queries
from buffer.amounts import NOTHING
from buffer.codec import encode_group
from buffer.errors import CorruptPayloadError
from buffer.status import Status


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `ReplayBuffer.audit` found; `problems` is empty when the conservation law holds.

    Attributes:
        drawn: prompts ever drawn, by task.
        counts: groups by task and status.
        problems: what is wrong and with which groups, a sentence each.
        pruned: groups whose rows were given up, by task: with the counts they add up to what was drawn.
    """

    drawn: Mapping[str, int]
    counts: Mapping[str, Mapping[Status, int]]
    problems: Sequence[str] = field(default_factory=list)
    pruned: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything adds up."""
        return not self.problems


def audit(conn: Connection) -> AuditReport:
    """Everything but the payloads, in one state of the database."""
    drawn = queries.drawn_by_task(conn)
    counts = {task_name: queries.counts(conn, task_name) for task_name in queries.task_names(conn)}
    return AuditReport(
        drawn={task: of.drawn for task, of in drawn.items()},
        counts=counts,
        problems=list(_problems(conn, drawn)),
        pruned={task: of.pruned for task, of in drawn.items()},
    )


def _problems(conn: Connection, drawn: Mapping[str, Any]) -> Iterator[str]:
    rows, stored = queries.counted_rows(conn), queries.stored_counts(conn)
    for task, status in sorted({*rows, *stored}, key=str):
        counted, there = stored.get((task, status), 0), rows.get((task, status), 0)
        if counted != there:
            yield f"task {task!r}: {counted} counted as {status}, {there} rows are"
    sums, kept = queries.counted_amounts(conn), queries.stored_amounts(conn)
    for task, status in sorted({*sums, *kept}, key=str):
        kept_of, in_rows = (found.get((task, status), NOTHING) for found in (kept, sums))
        if kept_of != in_rows:
            yield f"task {task!r}: of {status} groups {kept_of} are counted, {in_rows} are in rows"
    for task in sorted({*drawn, *(task for task, _ in rows)}, key=str):
        present = sum(n for (name, _), n in rows.items() if name == task)
        n_drawn, n_pruned = drawn.get(task, (0, 0))
        if present + n_pruned != n_drawn:
            yield f"task {task!r}: {n_drawn} prompts drawn, {present} groups present, {n_pruned} given up"
    for fault in queries.faults(conn):
        yield f"{fault.n} {fault.what} (groups {', '.join(map(str, fault.examples))}{', ...' if fault.n > len(fault.examples) else ''})"


def audit_payloads(conn: Connection, after: int, limit: int) -> tuple[list[str], int | None]:
    """Problems of the payloads of the next `limit` groups behind the id `after`, and behind which id to go on; None at the end."""
    ids = queries.ids_after(conn, after, limit)
    problems = [problem for group_id in ids for problem in _payload_problems(conn, group_id)]
    return problems, ids[-1] if len(ids) == limit else None


def _payload_problems(conn: Connection, group_id: int) -> Iterator[str]:
    try:
        (group,) = queries.load_groups(conn, [group_id])
        said, found = queries.hot_columns(conn, group_id), encode_group(group).group
    except CorruptPayloadError as error:
        yield str(error)
        return
    except (TypeError, ValueError, AttributeError) as error:
        # SQLite lets whoever edits a file put anything into a column.
        yield f"group {group_id}: what is stored of it is no group ({error})"
        return
    # Of groups that are final a rewind leaves the staleness as it was.
    staleness = ("oldest_version", "freshest_version") if group.status in queries.STALENESS_KEPT else ()
    for name in ("tokens", "finished", "finished_tokens", "min_version", "max_version", *staleness):
        if said.pruned_at is None and not said.checkpointed and getattr(said, name) != found[name]:
            yield f"group {group_id}: {name} is {getattr(said, name)}, its payload says {found[name]}"
