"""An open buffer for the buffer's tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from buffer import ReplayBuffer
from tests.buffer.groups import url


@pytest.fixture
async def buffer(tmp_path: Path) -> AsyncIterator[ReplayBuffer]:
    """An open buffer, audited at the end."""
    async with ReplayBuffer.open(url(tmp_path)) as opened:
        yield opened
        report = await opened.audit()
        assert report.ok, report.problems
