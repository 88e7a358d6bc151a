"""Order of the suite: what is fast runs first, what starts engines of real models and the demo last. And one server for all.

Tests that ask for `backend` run on each database, with `tests.buffer.groups.url` giving addresses there.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

pytest.register_assert_rewrite(
    "agent_loop.testing",
    "agent_loop.testing_adapters",
    "agent_loop.testing_base",
    "agent_loop.testing_capabilities",
    "agent_loop.testing_weights",
)  # before they are imported: a suite's failed assertion then shows its values

from tests import postgres  # noqa: E402  # what it imports would come too early above

settings.register_profile("millrace", deadline=None)  # a machine that is busy fails no test
settings.load_profile("millrace")

LAST = ("tests/engines/test_transformers", "tests/engines/test_vllm", "tests/integrations", "tests/test_docs", "tests/test_demo")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stable: within each part the order stays. What is marked as being about SQLite's file does not run on the server."""
    other = [item for item in items if item.get_closest_marker("sqlite") and "postgresql" in item.name]
    items[:] = [item for item in items if item not in set(other)]
    config.hook.pytest_deselected(items=other)
    items.sort(key=lambda item: next((place for place, name in enumerate(LAST, 1) if item.nodeid.startswith(name)), 0))


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    """One server for all tests. Not in pytest's folder, which is for this user only: as root, the server is another's."""
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        started = postgres.Server(Path(folder) / "data")
        yield started
        started.stop()


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
