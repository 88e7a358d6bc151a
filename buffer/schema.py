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
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

SCHEMA_VERSION = 1

_Id = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData()


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
    Column("drawn", Integer, nullable=False),  # prompts ever drawn: what the statuses of the task must add up to
    Column("moves", Integer, nullable=False),  # how often the cursor moved: a sampler that lost count is refused
    Column("cursor", Text),  # JSON: where the dataset goes on
)

steps = Table(
    "steps",
    metadata,
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer),  # of the policy when the step's batch was handed out
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
    Column("consumed_step", Integer),
    Column("take", _Id),  # which `take` consumed it: so that one that was cancelled undoes itself and no other
    Column("min_version", Integer),
    Column("max_version", Integer),
    Column("members", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("filter_reason", Text),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    UniqueConstraint("task_name", "epoch", "position", name="one_group_per_prompt"),
    # Hand-out reads one of these from its start: the rewound first, in their old order, then by policy.
    Index("groups_fifo", "task_name", "status", "consumed_seq", "ready_seq"),
    Index("groups_stalest", "task_name", "consumed_seq", "min_version", "ready_seq", **_where("status = 'completed'")),
    Index("groups_freshest", "task_name", "consumed_seq", text("min_version DESC"), "ready_seq", **_where("status = 'completed'")),
    # The stalest that may expire, first. Queries state the condition in exactly these words.
    Index("groups_versions", "task_name", "min_version", **_where("status IN ('completed', 'interrupted')")),
    Index("groups_consumed", "status", "consumed_step", "task_name", **_where("consumed_step IS NOT NULL")),
)

NEVER_CONSUMED = 2**62
"""`consumed_seq` of a group that was never handed out: sorts it behind the rewound ones."""

rollouts = Table(
    "rollouts",
    metadata,
    Column("group_id", _Id, ForeignKey("groups.group_id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("member", Integer, primary_key=True, autoincrement=False),
    Column("status", String, nullable=False),  # its own last outcome; `buffer.status.member_status` adds the group's
    Column("attempts", Integer, nullable=False),
    Column("interruptions", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("min_version", Integer),
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
    Column("extras", Text, nullable=False),  # JSON: lengths of the arrays, text, turns, parts of the reward
    Column("arrays", LargeBinary, nullable=False),  # see buffer/codec.py
)

counts = Table(
    "counts",
    metadata,
    Column("task_name", String, primary_key=True),
    Column("status", String, primary_key=True),
    Column("n", Integer, nullable=False),
)
