"""A real buffer, a real engine and the smallest agent loop, for the tests of producing."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from buffer import ReplayBuffer


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'run.db'}"


@pytest.fixture
async def buffer(url: str) -> AsyncIterator[ReplayBuffer]:
    async with ReplayBuffer.open(url) as opened:
        yield opened
        report = await opened.audit()
        assert report.ok, report.problems
