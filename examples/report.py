"""What a finished run shows: a table of the buffer, the reward of the first and last batches, and the reward curve."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from buffer import Status

FEW = 5


def report(counts: Mapping[Status, int], rewards: Sequence[float], folder: Path) -> None:
    """Print the table and the rewards, save the plot, and say what to look at next."""
    console = Console()
    table = Table("status", "groups", title="the replay buffer")
    for status, n in counts.items():
        if n:
            table.add_row(status, str(n))
    table.add_row("all drawn", str(sum(counts.values())), style="bold")
    console.print(table)
    few = min(FEW, len(rewards))
    console.print(f"mean reward of the first {few} batches: {np.mean(rewards[:few]):.3f}, of the last {few}: {np.mean(rewards[-few:]):.3f}")
    plot(rewards, folder / "reward.png")
    console.print(f"reward curve: {folder / 'reward.png'}", soft_wrap=True)
    console.print(f"every prompt: .venv/bin/millrace query {folder / 'run.db'}", soft_wrap=True)
    console.print(f"what one became: .venv/bin/millrace show {folder / 'run.db'} 1", soft_wrap=True)
    console.print(f"how it works: examples/train_arithmetic.py, then docs/tutorial.md; for a new run: rm -r {folder}", soft_wrap=True)


def plot(rewards: Sequence[float], path: Path) -> None:
    """The mean reward of each step, and its mean over the last ten."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = np.arange(1, len(rewards) + 1)
    smooth = [float(np.mean(rewards[max(0, end - 10) : end])) for end in steps]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(steps, rewards, color="lightsteelblue", label="batch")
    axes.plot(steps, smooth, color="navy", label="mean of 10")
    axes.set(xlabel="step", ylabel="mean reward (exact match)", ylim=(0, 1), title="GRPO on sums of two digits")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
