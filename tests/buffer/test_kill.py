"""Shows that a process killed at any moment loses nothing that was acknowledged: draws, results, batches and commits.

A child works on a real file and reports each thing after the buffer acknowledged it; the reports are a ledger outside
the database. It is killed at a random moment, the next child opens the file, and the ledger is held against it.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, Status
from tests.buffer.groups import draw, finished, ids, url

ROOT = Path(__file__).parents[2]
KILLS, CHUNK, BATCH = 40, 3, 2


def main() -> None:
    """The child: works until it is killed."""
    asyncio.run(_work(Path(sys.argv[1]), committed=int(sys.argv[2])))


async def _work(folder: Path, committed: int) -> None:
    async with ReplayBuffer.open(url(folder)) as buffer:
        report = await buffer.resume(step=committed)
        _say("resumed", rewound=report.rewound)
        step = committed
        while True:
            await _produce(buffer)
            step += 1
            taken = await buffer.take("math", BATCH, step=step, version=step)
            _say("taken", step=step, groups=ids(taken))
            if step % 3 == 0:
                _say("committing", step=step)
                await buffer.commit(step)
                _say("committed", step=step)


async def _produce(buffer: ReplayBuffer) -> None:
    left = await buffer.claim("math", CHUNK, statuses=[Status.INTERRUPTED, Status.PENDING])
    cursor = await buffer.cursor("math")
    at = 0 if cursor.state is None else cursor.state["offset"]
    drawn = await draw(buffer, *range(at, at + CHUNK - len(left))) if len(left) < CHUNK else []
    if drawn:
        _say("drawn", groups=drawn, offset=at)
    running = left + await buffer.start(drawn)
    async with asyncio.TaskGroup() as tasks:
        for group in running:
            tasks.create_task(_store(buffer, group))


async def _store(buffer: ReplayBuffer, group: Any) -> None:
    await buffer.put(finished(group))
    _say("stored", group=group.group_id)


def _say(what: str, **more: Any) -> None:
    # Straight to the pipe: what was said before the kill is read after it.
    os.write(1, (json.dumps({"what": what, **more}) + "\n").encode())


@dataclass
class Ledger:
    """What children said was durable."""

    drawn: dict[int, int] = field(default_factory=dict)  # offset -> group
    stored: set[int] = field(default_factory=set)
    taken: dict[int, list[int]] = field(default_factory=dict)  # step -> groups, since the last resume
    committed: int = 0
    committing: int = 0
    said: Counter[str] = field(default_factory=Counter)

    def read(self, lines: list[str]) -> None:
        for line in lines:
            self._enter(json.loads(line))

    def _enter(self, report: dict[str, Any]) -> None:
        self.said[report["what"]] += 1
        match report["what"]:
            case "drawn":
                self.drawn |= {report["offset"] + n: group for n, group in enumerate(report["groups"])}
            case "stored":
                self.stored.add(report["group"])
            case "taken":
                self.taken[report["step"]] = report["groups"]
            case "committing":
                self.committing = report["step"]
            case "committed":
                self.committed = report["step"]


async def _hold_against(folder: Path, ledger: Ledger, previous: dict[int, list[int]]) -> None:
    """Open what the kill left and see that everything acknowledged is there; leaves it resumed at the last commit."""
    async with ReplayBuffer.open(url(folder)) as buffer:
        assert (await buffer.audit()).ok
        stored = {group.group_id: group for group in await buffer.query(limit=100_000)}
        _check_draws(ledger, {group.position.offset: group_id for group_id, group in stored.items() if group.position})
        done = (Status.COMPLETED, Status.CONSUMED, Status.ARCHIVED)
        assert all(stored[group_id].status in done for group_id in ledger.stored)
        final = {group_id for step, groups in ledger.taken.items() if step <= ledger.committed for group_id in groups}
        assert all(stored[group_id].status is Status.ARCHIVED for group_id in final)
        # A commit may have happened although its acknowledgement was never heard, as a trainer's checkpoint may.
        archived = max((g.consumed_step or 0 for g in stored.values() if g.status is Status.ARCHIVED), default=0)
        assert archived <= max(ledger.committed, ledger.committing)
        ledger.committed = max(ledger.committed, archived)
        await buffer.resume(step=ledger.committed)
        given_back = [group_id for step in sorted(ledger.taken) if step > ledger.committed for group_id in ledger.taken[step]]
        if given_back:
            # Taken for a look and given back by the next resume, the child's.
            again = await buffer.take("math", len(given_back), step=ledger.committed + 1)
            assert ids(again) == given_back
        previous |= {step: groups for step, groups in ledger.taken.items() if step <= ledger.committed}
        ledger.taken = {step: groups for step, groups in ledger.taken.items() if step <= ledger.committed}


def _check_draws(ledger: Ledger, at: dict[int, int]) -> None:
    assert sorted(at) == list(range(len(at))), "no prompt is skipped, none is drawn twice"
    assert ledger.drawn.items() <= at.items(), "what was drawn is the group that it was"
    assert [at[offset] for offset in range(len(at))] == sorted(at.values()), "draws go on in the order of the dataset"


@pytest.mark.timeout(300)
def test_killed_at_any_moment_nothing_acknowledged_is_lost(tmp_path: Path) -> None:  # case 13
    ledger, final = Ledger(), dict[int, list[int]]()
    moments = random.Random(0)
    for _ in range(KILLS):
        ledger.read(_killed_after(moments.randint(0, 60), moments.random() * 0.002, tmp_path, ledger.committed))
        asyncio.run(_hold_against(tmp_path, ledger, final))
    assert all(ledger.said[what] > 3 for what in ("drawn", "stored", "taken", "committed")), ledger.said
    trained = [group_id for step in sorted(final) for group_id in final[step]]
    assert len(trained) == len(set(trained)), "no group is trained on twice"


def _killed_after(lines: int, delay: float, folder: Path, committed: int) -> list[str]:
    """What a child said that was killed a moment after it had said so many lines."""
    program = "from tests.buffer.test_kill import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(folder), str(committed)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(1 + lines)]
        # Not for synchronisation: a kill at the very moment of a line would always hit the same statement.
        timer = threading.Timer(delay, child.send_signal, [signal.SIGKILL])
        timer.start()
        said += child.stdout.readlines()
        timer.join()
    assert child.returncode == -signal.SIGKILL, said[-3:]
    return [line for line in said if line.endswith("\n")]
