"""What a finished run shows: a table of the buffer, the reward of the first and last batches, and a page with its charts."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from buffer import Status

FEW = 5


def report(counts: Mapping[Status, int], rewards: Sequence[float], folder: Path) -> None:
    """Print the table and the rewards, make the page, and say what to look at next."""
    console = Console()
    table = Table("status", "groups", title="the replay buffer")
    for status, n in counts.items():
        if n:
            table.add_row(status, str(n))
    table.add_row("all drawn", str(sum(counts.values())), style="bold")
    console.print(table)
    few = min(FEW, len(rewards))
    console.print(f"mean reward of the first {few} batches: {np.mean(rewards[:few]):.3f}, of the last {few}: {np.mean(rewards[-few:]):.3f}")
    make_page(folder)
    console.print(f"the run in charts: open {folder / 'report.html'}", soft_wrap=True)
    console.print(f"the same again, also while it runs: .venv/bin/millrace report {folder / 'run.db'}", soft_wrap=True)
    console.print(f"every prompt: .venv/bin/millrace query {folder / 'run.db'}", soft_wrap=True)
    console.print(f"what one became: .venv/bin/millrace show {folder / 'run.db'} 1", soft_wrap=True)
    console.print(f"how it works: examples/train_arithmetic.py, then docs/tutorial.md; for a new run: rm -r {folder}", soft_wrap=True)


def make_page(folder: Path) -> None:
    """`millrace report`: reward, length, staleness, waste and time over the steps, in one file."""
    command = [sys.executable, "-m", "producer.cli", "report", str(folder / "run.db"), "--out", str(folder / "report.html")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
