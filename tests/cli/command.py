"""The command `millrace` as users run it, and a run to look into."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from typer.testing import CliRunner

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import Position, ReplayBuffer, RolloutGroup, Status
from producer import AsyncProduceStrategy, ReplayPromptSampler
from producer.cli.keeping import app

T = TypeVar("T")

ROOT = Path(__file__).parent.parent.parent
MILLRACE = [sys.executable, "-m", "producer.cli"]
HOSTILE_ID = 1000
HOSTILE_TASK = "ta[red]sk\x1b[2J"
HOSTILE = "[red]red[/red] [link=http://x]y[/link] \x1b[2J\x1b]0;title\x07 \u202egnp.exe\u202c \x9b31m \x7f \r \x00 \u200b \ud800 end"


def environment(columns: int = 80) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm"}


def millrace(*arguments: object, columns: int = 80, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = [*MILLRACE, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment(columns), cwd=cwd)


def shown(*arguments: object, columns: int = 80) -> str:
    done = millrace(*arguments, columns=columns)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def hostile_group() -> RolloutGroup:
    row = {"prompt": f"[bold]{HOSTILE}\nrollout 0: completed", "answer": HOSTILE}
    group = RolloutGroup.from_row(HOSTILE_ID, row, group_size=2, task_name=HOSTILE_TASK, position=Position(0, 0))
    good, bad = group.rollouts
    good.append([1, 2, 3], logprobs=[-0.5, -0.25, -0.125], version=3)
    good.append([4], version=4, trainable=False)
    good.text = HOSTILE + "\n" * 3000 + "x" * 100_000 + "\nrollout 7: archived"
    good.status, good.finish_reason, good.score, good.reward = Status.COMPLETED, "[red]stop\x1b[2J", 0.5, 0.25
    good.reward_parts = {"[red]part\x1b[2J": 1.0}
    bad.status, bad.error = Status.FAILED, f"boom {HOSTILE}\nTraceback"
    return group


@dataclass(frozen=True)
class Done:
    """What a command that ran in this process said."""

    returncode: int
    stdout: str
    stderr: str


def in_process(*arguments: object, columns: int = 80, typed: str = "") -> Done:
    """The same without a process of its own, which takes a second; `typed` is what its user types. A bug raises here."""
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(columns)}, input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def said(*arguments: object, columns: int = 80) -> str:
    """What it prints, where all is well."""
    done = in_process(*arguments, columns=columns)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def asked(db: Path, question: Callable[[ReplayBuffer], Coroutine[Any, Any, T]]) -> T:
    """What the buffer itself answers."""

    async def ask() -> T:
        async with ReplayBuffer.open(f"sqlite:///{db}", read_only=True) as buffer:
            return await question(buffer)

    return asyncio.run(ask())


def refused(done: subprocess.CompletedProcess[str] | Done, reason: str) -> None:
    """It gave no answer, and said in one line why."""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.isprintable()
    assert line.startswith("millrace: ")
    assert reason in line
    assert "secret" not in line


async def make_run(path: Path) -> None:
    """A run of two steps, the first committed, and a group whose every text is hostile."""
    rows = [{"prompt_ids": [1 + number, 5], "number": number} for number in range(40)]
    async with ReplayBuffer.open(f"sqlite:///{path}") as buffer, SimulatedEngine(seed=1, slots=8) as engine:
        loop = SingleTurnAgentLoop(engine, reward=lambda state: float(state.response_ids.size % 2), sampling=SamplingParams(max_tokens=16))
        sampler = ReplayPromptSampler(rows, buffer, group_size=4)
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=0.5, progress=False)
        for step in (1, 2):
            await strategy.produce_batch(loop, sampler, 4, "demo", step=step)
        await buffer.commit(step=1)
        await buffer.put(hostile_group())
