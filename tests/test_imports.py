"""Importing the packages loads nothing heavy: whoever wants a buffer does not wait for a model library."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "transformers", "trl", "httpx", "aiohttp", "torchdata", "datasets")


@pytest.mark.parametrize("package", ["buffer", "agent_loop", "producer", "producer.experience"])
def test_a_package_loads_no_heavy_module(package: str) -> None:
    check = f"import sys, {package}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_workers_of_a_dataloader_find_numpys_random_imported() -> None:
    # They import it first thing. One that is forked while another thread imports it would wait for that thread for ever.
    check = "import sys, producer; print('numpy.random' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True"]
