"""A run's database to look into."""

from pathlib import Path

import pytest
import pytest_asyncio

from tests.cli.command import make_run


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, the first committed, and a group whose every text is hostile. Nobody writes to it."""
    path = tmp_path_factory.mktemp("run") / "run.db"
    await make_run(path)
    return path
