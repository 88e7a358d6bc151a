"""Every statement, one function each. Nothing outside `buffer/` composes SQL.

Functions that write take the `Transaction` under way, those that only read its connection.
"""

from buffer.queries.audit import counted_rows, drawn_by_task, orphans, stored_counts
from buffer.queries.consumption import (
    anything_sampled,
    begin_timeline,
    consume,
    consumed_after,
    consumed_up_to,
    drop_steps_after,
    first_completed,
    last_step,
    requalify,
    stale,
    step_version,
    timeline,
    unconsume,
    waiting_newer_than,
)
from buffer.queries.dialects import reserve, reserve_beyond
from buffer.queries.groups import add_prefixes, claimable, insert_groups, known, move, rows_of, store_expired, store_results
from buffer.queries.leases import (
    consumed_without_owner,
    count_crash,
    count_interruption,
    fail_unfinished,
    forget_producers,
    register_producer,
    running_without_owner,
)
from buffer.queries.reading import Filters, find, load_groups
from buffer.queries.transaction import Deltas, Transaction
from buffer.queries.values import (
    add_drawn,
    count,
    counts,
    cursor,
    meta_value,
    move_cursor,
    set_meta_value,
    task_names,
)

__all__ = [
    "Deltas",
    "Filters",
    "Transaction",
    "add_drawn",
    "add_prefixes",
    "anything_sampled",
    "begin_timeline",
    "claimable",
    "consume",
    "consumed_after",
    "consumed_up_to",
    "consumed_without_owner",
    "count",
    "count_crash",
    "count_interruption",
    "counted_rows",
    "counts",
    "cursor",
    "drawn_by_task",
    "drop_steps_after",
    "fail_unfinished",
    "find",
    "first_completed",
    "forget_producers",
    "insert_groups",
    "known",
    "last_step",
    "load_groups",
    "meta_value",
    "move",
    "move_cursor",
    "orphans",
    "register_producer",
    "requalify",
    "reserve",
    "reserve_beyond",
    "rows_of",
    "running_without_owner",
    "set_meta_value",
    "stale",
    "step_version",
    "store_expired",
    "store_results",
    "stored_counts",
    "task_names",
    "timeline",
    "unconsume",
    "waiting_newer_than",
]
