"""An open buffer for the buffer's tests. Tests that ask for `backend` run on each database, with `url` giving addresses there."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from buffer import ReplayBuffer
from tests import postgres
from tests.buffer.groups import url


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked as being about SQLite's file does not run on the server."""
    other = [item for item in items if item.get_closest_marker("sqlite") and "postgresql" in item.name]
    items[:] = [item for item in items if item not in set(other)]
    config.hook.pytest_deselected(items=other)


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The database that this test and its child processes use."""
    if request.param == "sqlite":
        yield request.param
        return
    server: postgres.Server = request.getfixturevalue("server")
    monkeypatch.setenv(postgres.ADDRESS, server.address)
    yield request.param
    postgres.drop_schemas(server.address)


@pytest.fixture
async def buffer(tmp_path: Path) -> AsyncIterator[ReplayBuffer]:
    """An open buffer, audited at the end."""
    async with ReplayBuffer.open(url(tmp_path)) as opened:
        yield opened
        report = await opened.audit()
        assert report.ok, report.problems
