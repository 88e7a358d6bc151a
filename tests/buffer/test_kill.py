"""Shows that a process killed at any moment loses nothing that was acknowledged: draws, results, batches and commits.

A child works on a real database and reports each thing after the buffer acknowledged it; the reports are a ledger outside
the database. It is killed at a random moment, the next child opens the database, and the ledger is held against it. A server may
still be doing, or undoing, what the killed child had asked for last.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, Status
from tests.buffer.groups import draw, finished, ids, url
from tests.zygote import Moment, Say, Zygote

CHUNK, BATCH = 3, 2
KILLS = {"sqlite": 100, "postgresql": 40}
ACTS = ["resumed", "drawn", "stored", "taken", "committing", "committed"]


async def work(say: Say, url: str, committed: int) -> None:
    """The child: works until it is killed."""
    async with ReplayBuffer.open(url, max_crashes=None) as buffer:
        report = await buffer.resume(step=committed)
        say("resumed", rewound=report.rewound)
        step = committed
        while True:
            await _produce(buffer, say)
            step += 1
            taken = await buffer.take("math", BATCH, step=step, version=step)
            say("taken", step=step, groups=ids(taken))
            if step % 3 == 0:
                say("committing", step=step)
                await buffer.commit(step)
                say("committed", step=step)


async def _produce(buffer: ReplayBuffer, say: Say) -> None:
    left = await buffer.claim("math", CHUNK, statuses=[Status.INTERRUPTED, Status.PENDING])
    cursor = await buffer.cursor("math")
    at = 0 if cursor.state is None else cursor.state["offset"]
    drawn = await draw(buffer, *range(at, at + CHUNK - len(left))) if len(left) < CHUNK else []
    if drawn:
        say("drawn", groups=drawn, offset=at)
    running = left + await buffer.start(drawn)
    async with asyncio.TaskGroup() as tasks:
        for group in running:
            tasks.create_task(_store(buffer, group, say))


async def _store(buffer: ReplayBuffer, group: Any, say: Say) -> None:
    await buffer.put(finished(group))
    say("stored", group=group.group_id)


@dataclass
class Ledger:
    """What children said was durable."""

    drawn: dict[int, int] = field(default_factory=dict)  # offset -> group
    stored: set[int] = field(default_factory=set)
    taken: dict[int, list[int]] = field(default_factory=dict)  # step -> groups, since the last resume
    committed: int = 0
    committing: int = 0
    said: Counter[str] = field(default_factory=Counter)

    def read(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._enter(line)

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


async def _hold_against(url: str, ledger: Ledger, previous: dict[int, list[int]]) -> None:
    """Open what the kill left and see that everything acknowledged is there; leaves it resumed at the last commit."""
    async with ReplayBuffer.open(url, max_crashes=None) as buffer:
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
def test_killed_at_any_moment_nothing_acknowledged_is_lost(tmp_path: Path, backend: str) -> None:  # case 13
    ledger, final, where = Ledger(), dict[int, list[int]](), url(tmp_path)
    moments = random.Random(0)
    at_start = 0.02 if backend == "sqlite" else 0.15
    with Zygote("tests.buffer.test_kill:work", "buffer.backends.postgres") as zygote:
        for _ in range(KILLS[backend]):
            child = zygote.start(url=where, committed=ledger.committed)
            assert child.killed(Moment.any(moments, at_start=at_start, lines=40, whats=ACTS))
            ledger.read(child.lines)
            asyncio.run(_hold_against(where, ledger, final))
    assert all(ledger.said[what] > KILLS[backend] // 10 for what in ACTS), ledger.said
    trained = [group_id for step in sorted(final) for group_id in final[step]]
    assert len(trained) == len(set(trained)), "no group is trained on twice"
