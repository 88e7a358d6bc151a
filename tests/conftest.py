"""Order of the suite: what is fast runs first, what starts engines of real models and the demo last."""

import pytest

LAST = ("tests/engines/test_transformers", "tests/engines/test_vllm", "tests/test_docs", "tests/test_demo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable: within each part the order stays."""
    items.sort(key=lambda item: next((place for place, name in enumerate(LAST, 1) if item.nodeid.startswith(name)), 0))
