"""The tables. Hot metadata lies in narrow rows; prompts and token arrays lie apart, loaded only when handed out."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from buffer.staleness import NO_VERSION

SCHEMA_VERSION = 5

_Id = BigInteger().with_variant(Integer, "sqlite")

NEVER_CONSUMED = 2**62
"""`consumed_seq` of a group that was never handed out: sorts it behind the rewound ones."""

metadata = MetaData()

NUMBERS = {name: Sequence(f"millrace_{name}", metadata=metadata, data_type=BigInteger) for name in ("group", "ready", "consumed", "take")}
"""PostgreSQL's own sequences: a row of `sequences`, which serves on SQLite, would make every writer wait for every other."""


MAY_EXPIRE = "status IN ('completed', 'interrupted')"
PRUNABLE = "status = 'archived' AND pruned_at IS NULL"


def _where(condition: str) -> dict[str, Any]:
    """A partial index: rows that no hand-out looks at cost it nothing. Queries must state the condition, literally."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


meta = Table(
    "millrace_meta",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)

sequences = Table(
    "sequences",
    metadata,
    Column("name", String, primary_key=True),  # "group", "ready", "consumed", "take"
    Column("last", _Id, nullable=False),
)

tasks = Table(
    "tasks",
    metadata,
    Column("task_name", String, primary_key=True),
    Column("drawn", _Id, nullable=False),  # prompts ever drawn: what the statuses of the task must add up to, with `pruned`
    Column("pruned", _Id, nullable=False, server_default="0"),  # groups whose rows were given up
    Column("moves", _Id, nullable=False),  # how often the cursor moved: a sampler that lost count is refused
    Column("cursor", Text),  # JSON: where the dataset goes on
)

steps = Table(
    "steps",
    metadata,
    Column("step", _Id, primary_key=True, autoincrement=False),
    Column("version", _Id),  # of the policy when the step's batch was handed out
)

timelines = Table(
    "timelines",
    metadata,
    Column("timeline", Integer, primary_key=True, autoincrement=False),  # that a rewind ended, from 0
    Column("fork", _Id, nullable=False),  # the version that it went back to: newer ones exist on the ended timeline only
    Column("step", _Id, nullable=False),
    Column("at", Float, nullable=False),
)

producers = Table(
    "producers",
    metadata,
    Column("owner", String, primary_key=True),
    Column("host", String, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),  # when its leases run out, unless it renews them; by the database's clock
    Column("transactions", _Id, nullable=False),  # of this producer: tells after a lost connection whether the last one counts
)

groups = Table(
    "groups",
    metadata,
    Column("group_id", _Id, primary_key=True, autoincrement=False),
    Column("task_name", String, nullable=False),
    Column("epoch", Integer),
    Column("position", Integer),
    Column("status", String, nullable=False),
    Column("ready_seq", _Id, nullable=False),  # order of completion: first in, first out
    Column("consumed_seq", _Id, nullable=False),  # order of first consumption, kept for good; NEVER_CONSUMED before
    Column("consumed_step", _Id),
    Column("take", _Id),  # which `take` consumed it: so that one that was cancelled undoes itself and no other
    Column("owner", String),  # the producer that runs it, or the process that took it
    Column("crashes", Integer, nullable=False, server_default="0"),  # producers that died running it, since it last made progress
    Column("min_version", _Id),
    Column("max_version", _Id),
    # What staleness is counted from (`buffer.staleness`), NO_VERSION without a trainable token: the oldest of all members,
    # and the oldest among the members' newest.
    Column("oldest_version", _Id, nullable=False, server_default=str(NO_VERSION)),
    Column("freshest_version", _Id, nullable=False, server_default=str(NO_VERSION)),
    Column("members", Integer, nullable=False),
    Column("tokens", _Id, nullable=False),
    Column("finished", Integer, nullable=False, server_default="0"),  # members whose response is whole
    Column("finished_tokens", _Id, nullable=False, server_default="0"),  # theirs
    Column("payload_bytes", _Id, nullable=False, server_default="0"),
    Column("pruned_at", Float),  # when its payload was given up
    Column("filter_reason", Text),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    UniqueConstraint("task_name", "epoch", "position", name="one_group_per_prompt"),
    # Hand-out reads one of these from its start: the rewound first, in their old order, then by policy.
    Index("groups_fifo", "task_name", "status", "consumed_seq", "ready_seq"),
    Index("groups_stalest", "task_name", "consumed_seq", "oldest_version", "ready_seq", **_where("status = 'completed'")),
    Index("groups_freshest", "task_name", "consumed_seq", text("oldest_version DESC"), "ready_seq", **_where("status = 'completed'")),
    # The stalest that may expire, first. Queries state the condition in exactly these words.
    Index("groups_oldest", "task_name", "oldest_version", "group_id", "freshest_version", **_where(MAY_EXPIRE)),
    Index("groups_consumed", "status", "consumed_step", "task_name", **_where("consumed_step IS NOT NULL")),
    Index("groups_running", "group_id", **_where("status = 'running'")),
    Index("groups_prunable", "consumed_step", "consumed_seq", "payload_bytes", **_where(PRUNABLE)),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("group_id", _Id, ForeignKey("groups.group_id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("member", Integer, primary_key=True, autoincrement=False),
    Column("status", String, nullable=False),  # its own last outcome; `buffer.status.member_status` adds the group's
    Column("attempts", Integer, nullable=False),
    Column("interruptions", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("min_version", _Id),
    Column("finish_reason", String),
    Column("score", Float),
    Column("reward", Float),
    Column("error", Text),
    sqlite_with_rowid=False,
)

prompts = Table(
    "prompts",
    metadata,
    Column("group_id", _Id, ForeignKey("groups.group_id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("data", Text, nullable=False),  # JSON: written once, when the prompt is drawn
)

payloads = Table(
    "payloads",
    metadata,
    Column("group_id", _Id, ForeignKey("groups.group_id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("extras", Text, nullable=False),  # JSON: lengths of the arrays, turns, parts of the reward
    Column("arrays", LargeBinary, nullable=False),  # see buffer/payload.py
)

prefixes = Table(
    "prefixes",  # what running groups decoded since their payload was written: deltas, replaced by the payload at the end
    metadata,
    Column("group_id", _Id, ForeignKey("groups.group_id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("extras", Text, nullable=False),
    Column("arrays", LargeBinary, nullable=False),
)

transitions = Table(
    "transitions",
    metadata,
    Column("transition_id", _Id, primary_key=True),
    Column("group_id", _Id, ForeignKey("groups.group_id", ondelete="CASCADE"), nullable=False),
    Column("at", Float, nullable=False),
    Column("source", String),  # None where the group came into being
    Column("target", String, nullable=False),
    Column("owner", String, nullable=False),  # of the writing process
    Column("step", _Id),  # of consumption, where there is one
    Column("version", _Id),  # the newest among its trainable tokens
    Column("reason", Text),
    Index("transitions_of_group", "group_id"),
)

counts = Table(
    "counts",
    metadata,
    Column("task_name", String, primary_key=True),
    Column("status", String, primary_key=True),
    Column("n", _Id, nullable=False),
    # Sums over these groups, but for running ones: those are stored as they decode, too often to write it down here as well.
    Column("tokens", _Id, nullable=False, server_default="0"),
    Column("finished", _Id, nullable=False, server_default="0"),
    Column("finished_tokens", _Id, nullable=False, server_default="0"),
)

given_up = Table(
    "given_up",  # what no group holds any more, by why
    metadata,
    Column("task_name", String, primary_key=True),
    Column("reason", String, primary_key=True),  # see `buffer.accounts`
    Column("tokens", _Id, nullable=False),
    Column("finished", _Id, nullable=False),
    Column("finished_tokens", _Id, nullable=False),
)

shares = Table(
    "shares",  # how batches of several tasks were shared out among them
    metadata,
    Column("step", _Id, primary_key=True, autoincrement=False),
    Column("task_name", String, primary_key=True),
    Column("weight", Float, nullable=False),
    Column("groups", _Id, nullable=False),
    Column("carried", Float, nullable=False),  # groups that it is owed after this step
)

states = Table(
    "states",  # what parts of a run keep with it: running moments of rewards, say
    metadata,
    Column("name", String, primary_key=True),
    Column("step", _Id, primary_key=True, autoincrement=False),  # of the batch after which it was so
    Column("state", Text, nullable=False),  # JSON
)
