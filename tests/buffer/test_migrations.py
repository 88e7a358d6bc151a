"""Shows that a database of an earlier schema is brought forward with its data, all or nothing, and equals a fresh one."""

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect

from buffer import ReplayBuffer, Status, migrations
from buffer.amounts import Amount
from buffer.backends import backend_of
from buffer.errors import DatabaseError, SchemaVersionError
from tests import postgres
from tests.buffer.groups import a_group, finished, ids, put_all

S = Status
DATA = Path(__file__).parent / "data"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A database as the first release made it: groups in every status, tokens of two versions, one group that was running."""
    with sqlite3.connect(tmp_path / "run.db") as connection:
        connection.executescript((DATA / "schema-1.sql").read_text())
    connection.close()
    return tmp_path / "run.db"


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def structure(path: Path) -> dict[str, Any]:
    """Tables with their columns and keys, in no order, and indexes as they were made."""
    with sqlite3.connect(path) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found: dict[str, Any] = {}
        for name in tables:
            found[name] = (
                sorted(row[1:] for row in connection.execute(f"PRAGMA table_info({name})")),
                sorted(row[2:] for row in connection.execute(f"PRAGMA foreign_key_list({name})")),
            )
        found["indexes"] = sorted(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index'"), key=str)
    connection.close()
    return found


@pytest.fixture
def of_2(tmp_path: Path) -> Path:
    """A database of schema 2: groups of two tasks, batches committed and not, and tokens that were stored as they ran."""
    with sqlite3.connect(tmp_path / "of_2.db") as connection:
        connection.executescript((DATA / "schema-2.sql").read_text())
    connection.close()
    return tmp_path / "of_2.db"


@pytest.mark.parametrize("which", ["old", "of_2"])
async def test_migrated_equals_fresh(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    old: Path = request.getfixturevalue(which)
    for path in (old, tmp_path / "fresh.db"):
        async with ReplayBuffer.open(f"sqlite:///{path}"):
            pass
    assert structure(old) == structure(tmp_path / "fresh.db")


async def test_what_was_sampled_is_summed_up_by_schema_3(of_2: Path) -> None:
    async with ReplayBuffer.open(f"sqlite:///{of_2}") as buffer:
        assert (await buffer.audit(payloads=True)).problems == []
        math, code = await buffer.account("math"), await buffer.account("code")
        assert (math.trained, math.waiting) == (Amount(18, 6, 18), Amount(14, 1, 5))
        assert {reason: n for reason, n in code.wasted.items() if n} == {"failed": 6, "filtered": 8}
        (group,) = await buffer.claim("math", 1, statuses=[S.INTERRUPTED])
        await buffer.put(finished(group))
        assert (await buffer.audit()).problems == []


async def test_a_postgresql_database_of_schema_2_is_brought_forward(tmp_path: Path, server: postgres.Server) -> None:
    address = postgres.schema_url(server.address, tmp_path, "run.db")
    async with ReplayBuffer.open(address) as buffer:
        await put_all(buffer, [a_group(n, ("completed", "filtered")[n % 2]) for n in range(1, 5)])
        before, fresh = await buffer.account("math"), _columns(address)
    for statement in (
        "DROP TABLE given_up",
        "DROP TABLE shares",
        "DROP TABLE states",
        *(f"ALTER TABLE groups DROP COLUMN {name}" for name in ("finished", "finished_tokens")),
        *(f"ALTER TABLE counts DROP COLUMN {name}" for name in ("tokens", "finished", "finished_tokens")),
        "UPDATE millrace_meta SET value = '2' WHERE key = 'schema_version'",
    ):
        postgres.edit(address, statement)
    async with ReplayBuffer.open(address) as buffer:
        assert (await buffer.account("math"), _columns(address)) == (before, fresh)
        assert (await buffer.audit(payloads=True)).problems == []
    postgres.drop_schemas(server.address)


def _columns(address: str) -> set[Any]:
    backend = backend_of(address)
    engine = backend.connect(read_only=True)
    with engine.connect() as conn:
        inspector = inspect(conn)
        found = {
            (table, column["name"], str(column["type"]), column["nullable"], column["default"])
            for table in inspector.get_table_names()
            for column in inspector.get_columns(table)
        } | {(table, tuple(inspector.get_pk_constraint(table)["constrained_columns"])) for table in inspector.get_table_names()}
    engine.dispose()
    return found


async def test_the_data_is_there_and_the_run_goes_on(old: Path) -> None:
    async with ReplayBuffer.open(f"sqlite:///{old}") as buffer:
        assert (await buffer.audit(payloads=True)).problems == []
        stored = await buffer.query()
        assert [(g.group_id, g.status) for g in stored] == [
            (1, S.ARCHIVED), (2, S.CONSUMED), (3, S.EXPIRED), (4, S.COMPLETED), (5, S.EXPIRED), (6, S.INTERRUPTED),
            (7, S.PENDING), (8, S.PENDING), (20, S.FAILED), (21, S.FILTERED), (22, S.COMPLETED),
        ]  # fmt: skip
        first, second = stored[3].rollouts
        assert (first.text, first.metrics, first.reward_parts) == ('Größe 𝛼 "quoted"', {"a": 1.5}, {"p": 0.25})
        assert (second.versions.tolist(), second.loss_mask.tolist()) == ([3, 3, 3, 5, 5, 5], [1, 1, 1, 1, 1, 0])
        assert stored[9].filter_reason == "all equal"
        report = await buffer.resume(step=1)
        assert (report.version, report.rewound, report.released) == (2, 1, 1)
        assert ids(await buffer.take("math", 2, step=2)) == [2, 4]
        assert (await buffer.cursor("math")).state == {"offset": 8}
        (group,) = await buffer.claim("math", 1, statuses=[S.INTERRUPTED])
        await buffer.put(finished(group))
        assert await buffer.expire("code", version=9, max_staleness=1, level="token") == 1
        assert [(t.source, t.target, t.reason) for t in await buffer.history(20)] == [(None, S.FAILED, "as it stood in schema 1")]
        assert (await buffer.prune(keep_steps=0)).payload_bytes > 100
        assert (await buffer.audit(payloads=True)).problems == []


async def test_a_reader_refuses_it_and_says_how_it_is_brought_forward(old: Path) -> None:
    before = _bytes(old)
    with pytest.raises(SchemaVersionError, match="has schema version 1, this Millrace knows 5; open it for writing once"):
        async with ReplayBuffer.open(f"sqlite:///{old}", read_only=True):
            pass
    assert _bytes(old) == before


async def test_a_migration_that_fails_half_way_changes_nothing(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(old, tmp_path / "copy.db")
    monkeypatch.setattr(migrations.to_2, "_DATA", (*migrations.to_2._DATA, "UPDATE no_such_table SET x = 1"))
    with pytest.raises(DatabaseError, match="no_such_table"):
        async with ReplayBuffer.open(f"sqlite:///{old}"):
            pass
    with sqlite3.connect(old) as one, sqlite3.connect(tmp_path / "copy.db") as other:
        assert list(one.iterdump()) == list(other.iterdump())
    monkeypatch.undo()
    async with ReplayBuffer.open(f"sqlite:///{old}") as buffer:
        assert (await buffer.audit()).ok
