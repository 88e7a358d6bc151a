"""Order of the suite: what is fast runs first, what starts engines of real models and the demo last. And one server for all."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import postgres

LAST = ("tests/engines/test_transformers", "tests/engines/test_vllm", "tests/test_docs", "tests/test_demo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable: within each part the order stays."""
    items.sort(key=lambda item: next((place for place, name in enumerate(LAST, 1) if item.nodeid.startswith(name)), 0))


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    """One server for all tests. Not in pytest's folder, which is for this user only: as root, the server is another's."""
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        started = postgres.Server(Path(folder) / "data")
        yield started
        started.stop()
