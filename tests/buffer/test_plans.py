"""Shows that the hot statements read through an index, in its order, whatever the size of the buffer."""

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sqlalchemy import Connection

from buffer import Fifo, FreshestFirst, Position, ReplayBuffer, StalestFirst, Status, queries
from buffer.accounts import account
from buffer.backends import backend_of
from buffer.staleness import Level
from tests.buffer.groups import a_group, draw, put_all, url


def completed(conn: Connection) -> list[Any]:
    return queries.first_completed(conn, "math", 8, Fifo(), None)


HOT: dict[str, tuple[Callable[[Connection], Any], str]] = {
    "take, first in first out": (lambda c: queries.first_completed(c, "math", 8, Fifo(), None), "groups_fifo"),
    "take, stalest first": (lambda c: queries.first_completed(c, "math", 8, StalestFirst(), None), "groups_stalest"),
    "take, stalest first, none too stale": (lambda c: queries.first_completed(c, "math", 8, StalestFirst(), 3), "groups_stalest"),
    "take, freshest first": (lambda c: queries.first_completed(c, "math", 8, FreshestFirst(), None), "groups_freshest"),
    "claim": (lambda c: queries.claimable(c, "math", Status.INTERRUPTED, 8), "groups_fifo"),
    "claim, most interrupted": (lambda c: queries.claimable(c, "math", Status.INTERRUPTED, 8, "most_interrupted"), "groups_fifo"),
    "tail candidates": (lambda c: queries.tail_candidates(c, "math", 2), "groups_fifo"),
    "oldest versions": (lambda c: queries.oldest_versions(c, "math"), "INDEX groups_"),
    "claim, by name": (lambda c: queries.claimable_among(c, "math", Status.PENDING, [1, 2, 3]), "INTEGER PRIMARY KEY"),
    "positions": (lambda c: queries.positions(c, "math", Status.PENDING, 8), "groups_fifo"),
    "lengths": (lambda c: queries.response_lengths(c, "math", [Position(0, 1), Position(1, 2)]), "sqlite_autoindex_groups_1"),
    "count": (lambda c: queries.count(c, "math", Status.COMPLETED), "sqlite_autoindex_counts_1"),
    "what is there": (lambda c: queries.known(c, [1, 2, 3]), "INTEGER PRIMARY KEY"),
    "load": (lambda c: queries.load_groups(c, [1, 2, 3]), "INTEGER PRIMARY KEY"),
    "start": (lambda c: queries.move(queries.Transaction(c, "me"), queries.rows_of(c, [1, 2, 3]), Status.RUNNING), "INTEGER PRIMARY KEY"),
    "consume": (lambda c: queries.consume(queries.Transaction(c, "me"), completed(c), 9, None), "INTEGER PRIMARY KEY"),
    "commit": (lambda c: queries.consumed_up_to(c, 2), "groups_consumed"),
    "rewind": (lambda c: queries.consumed_after(c, 2), "groups_consumed"),
    "last step": (lambda c: queries.last_step(c), "groups_consumed"),
    "last step of a task": (lambda c: queries.last_step(c, "a"), "groups_consumed"),
    "expire": (lambda c: queries.stale(c, "math", 5, Level.SEQUENCE, (-1, 0), 8), "groups_oldest"),
    "expire tokens": (lambda c: queries.stale(c, "math", 5, Level.TOKEN, (-1, 0), 8), "groups_oldest"),
    "release": (lambda c: queries.running_without_owner(queries.Transaction(c, "me")), "groups_running"),
    "what a step trained on": (lambda c: queries.find(c, queries.Filters(step=3), 8, 0), "groups_consumed"),
    "overview, what waits": (lambda c: queries.waiting_versions(c), "groups_oldest"),
    "overview, who runs what": (lambda c: queries.running_by_owner(c), "INDEX groups_"),
    "account, coverage": (lambda c: queries.drawn_after(c, "math", 5), "INTEGER PRIMARY KEY"),
    "account": (lambda c: account(c, "math", 1), "groups_"),
    "overview, payloads": (lambda c: queries.committed_payloads(c), "groups_prunable"),
    "open": (lambda c: queries.consumed_without_owner(queries.Transaction(c, "me")), "groups_consumed"),
}
MAY_SORT = {
    "account",
    "account, coverage",
    "claim, most interrupted",
    "oldest versions",
    "commit",
    "rewind",
    "release",
    "what a step trained on",
    "overview, who runs what",
}
"""They sort what waits, what was consumed since the last commit, or at one step, or what runs."""

SMALL = {"SCAN timelines", "SCAN producers", "SCAN counts", "SCAN given_up", "SCAN json_each VIRTUAL TABLE INDEX 1:"}
"""A row a rewind, a row a process, a few a task, and the ids that were asked for."""


@pytest.fixture(scope="module", params=["as it comes", "analyzed"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of a few hundred groups in all the statuses that hot statements look for."""
    folder = tmp_path_factory.mktemp("plans")

    async def fill() -> None:
        async with ReplayBuffer.open(url(folder)) as buffer:
            await draw(buffer, *range(200))
            await put_all(buffer, [a_group(1000 + n, ("completed", "interrupted", "failed")[n % 3], version=n % 7) for n in range(150)])
            for step in range(1, 5):
                await buffer.take("math", 5, step=step)
            await buffer.commit(2)
            await buffer.expire("math", version=3, max_staleness=2)

    asyncio.run(fill())
    if request.param == "analyzed":
        connection = sqlite3.connect(folder / "run.db")
        connection.execute("ANALYZE")
        connection.close()
    return folder / "run.db"


@pytest.mark.parametrize("name", HOT)
def test_hot_statements_read_through_an_index(path: Path, name: str) -> None:
    statement, index = HOT[name]
    plan = _plan(path, statement)
    assert any(index in line for line in plan), plan
    assert not any(line.startswith("SCAN") and "USING" not in line and line not in SMALL for line in plan), plan
    if name not in MAY_SORT:
        assert not any("TEMP B-TREE" in line for line in plan), plan


class Explained(sqlite3.Cursor):
    """Notes what SQLite says of every statement before it is executed."""

    def execute(self, sql: str, parameters: Any = (), /) -> "Explained":
        if sql.startswith(("SELECT", "UPDATE")):
            plan = self.connection.cursor(sqlite3.Cursor).execute(f"EXPLAIN QUERY PLAN {sql}", parameters)
            self.connection.plans.extend(row[3] for row in plan)
        return super().execute(sql, parameters)


class Explaining(sqlite3.Connection):
    """A connection that does, whoever executes the statement."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: list[str] = []

    def cursor(self, factory: type[sqlite3.Cursor] = Explained) -> Any:
        return super().cursor(factory)


def _plan(path: Path, statement: Callable[[Connection], Any]) -> list[str]:
    """What SQLite says of every statement that the function executes."""
    engine = backend_of(f"sqlite:///{path}").connect(read_only=False)
    with patch.object(sqlite3, "connect", partial(sqlite3.connect, factory=Explaining)), engine.connect() as conn:
        driver: Any = conn.connection.driver_connection
        with conn.begin() as transaction:
            statement(conn)
            transaction.rollback()
        lines: list[str] = driver.plans
    engine.dispose()
    assert lines
    return lines
