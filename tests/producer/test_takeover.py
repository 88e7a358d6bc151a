"""Shows that of two producers that share a task on PostgreSQL either may be killed at any moment: the other runs what it left.

The ledger of what they said lies outside the database: no prompt is skipped or drawn twice, what was acknowledged stays as it
is and is never run again, and each group's result is stored once.
"""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, Status
from buffer.errors import CursorConflictError, LeaseLostError
from tests import postgres
from tests.buffer.groups import finished, ids, rows, url
from tests.producer.kill_run import on_a_machine_of_its_own
from tests.zygote import Child, Moment, Say, Zygote

PROMPTS, CHUNK, KILLS = 480, 4, 30
WAITING = [Status.INTERRUPTED, Status.PENDING]
ACTS = ["opened", "drawn", "claimed", "checkpointed", "stored"]


async def produce(say: Say, url: str, lease: float, far: bool) -> None:
    """The child: draws, runs and stores, until every prompt of the dataset has its result. `far`: as on another machine."""
    if far:
        on_a_machine_of_its_own()
    async with ReplayBuffer.open(url, lease=lease, max_crashes=None) as buffer:
        say("opened")
        while await buffer.count("math", Status.COMPLETED) < PROMPTS:
            groups = await buffer.claim("math", CHUNK, statuses=WAITING)
            if not groups and not await _draw(buffer, say):
                # The other one runs what is left: either it stores that, or it is killed and the groups become free.
                with suppress(TimeoutError):
                    await buffer.wait_for("math", Status.COMPLETED, PROMPTS, timeout=lease / 2)
            say("claimed", groups=ids(groups))
            for group in groups:
                await _run(buffer, group, say)


async def _draw(buffer: ReplayBuffer, say: Say) -> bool:
    """Whether there were prompts left; the other producer may be drawing the same."""
    cursor = await buffer.cursor("math")
    at = 0 if cursor.state is None else cursor.state["offset"]
    if at == PROMPTS:
        return False
    with suppress(CursorConflictError):
        drawn = await buffer.draw("math", rows(*range(at, at + CHUNK)), group_size=2, moves=cursor.moves, cursor={"offset": at + CHUNK})
        say("drawn", offset=at, groups=drawn)
    return True


async def _run(buffer: ReplayBuffer, group: Any, say: Say) -> None:
    """In two parts, with a checkpoint between them."""
    try:
        if not group.rollouts[0].response_ids.size:
            group.rollouts[0].append([7], logprobs=[-1.0])
            await buffer.checkpoint(group)
            say("checkpointed", group=group.group_id)
        await buffer.put(finished(group))
        say("stored", group=group.group_id, tokens=group.rollouts[0].response_ids.size)
    except LeaseLostError:
        say("lost", group=group.group_id)


@dataclass
class Ledger:
    """What the producers said."""

    drawn: dict[int, int] = field(default_factory=dict)  # offset -> group
    stored: dict[int, int] = field(default_factory=dict)  # group -> tokens
    said: Counter[str] = field(default_factory=Counter)

    def read(self, lines: list[dict[str, Any]]) -> None:
        """Of one process. What one says is told late, so that it cannot be ordered with what the other says."""
        for line in lines:
            self.said[line["what"]] += 1
            match line["what"]:
                case "error":
                    raise AssertionError(line["trace"])
                case "drawn":
                    places = {line["offset"] + n: group for n, group in enumerate(line["groups"])}
                    assert not places.keys() & self.drawn.keys(), "no prompt is drawn twice"
                    self.drawn |= places
                case "stored":
                    assert line["group"] not in self.stored, "each result is stored once"
                    self.stored[line["group"]] = line["tokens"]

    async def hold_against(self, address: str) -> None:
        """What the database holds while the other one goes on."""
        async with ReplayBuffer.open(address, read_only=True) as buffer:
            report, groups = await buffer.audit(), {group.group_id: group for group in await buffer.query(limit=PROMPTS)}
        assert report.ok, report.problems
        at = {group.position.offset: group_id for group_id, group in groups.items() if group.position}
        assert sorted(at) == list(range(len(at))), "no prompt is skipped, none is drawn twice"
        assert self.drawn.items() <= at.items(), "what was drawn is the group that it was"
        for group_id, tokens in self.stored.items():
            assert groups[group_id].status is Status.COMPLETED
            assert groups[group_id].rollouts[0].response_ids.size == tokens


@pytest.fixture
def address(tmp_path: Path, server: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(postgres.ADDRESS, server.address)
    yield url(tmp_path)
    postgres.drop_schemas(server.address)


@pytest.fixture(scope="module")
def zygotes() -> Iterator[list[Zygote]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Zygote("tests.producer.test_takeover:produce", "buffer.backends.postgres")) for _ in range(2)]


@pytest.mark.parametrize(("far", "lease"), [(False, 60.0), (True, 0.5)], ids=["one machine", "two machines"])
async def test_either_of_two_producers_may_die_at_any_moment(far: bool, lease: float, address: str, zygotes: list[Zygote]) -> None:
    ledger, chance = Ledger(), random.Random(int(far))
    async with ReplayBuffer.open(address):
        pass  # its tables are made: the other one looks at them
    arguments = {"url": address, "lease": lease, "far": far}
    producing = [zygote.start(**arguments) for zygote in zygotes]
    killed = 0
    while killed < KILLS // 2:
        chosen = chance.randrange(2)
        if not _killed(producing[chosen], chance):
            break
        killed += 1
        ledger.read(producing[chosen].lines)
        await ledger.hold_against(address)
        producing[chosen] = zygotes[chosen].start(**arguments)
    for child in producing:
        ledger.read(child.ended())
    await ledger.hold_against(address)
    async with ReplayBuffer.open(address) as buffer:
        assert await buffer.count("math", Status.COMPLETED) == PROMPTS
        ran = [await buffer.history(group.group_id) for group in await buffer.query(limit=PROMPTS)]
    for history in ran:
        targets = [change.target for change in history]
        assert targets.index(Status.COMPLETED) == len(targets) - 1, "each result is stored once, and what was stored is not run again"
    taken_over = sum(len({change.owner for change in history if change.target is Status.RUNNING}) > 1 for history in ran)
    assert killed >= KILLS // 4, "they worked long enough to be killed so often"
    assert taken_over >= 2, "groups that one left were run by another"
    assert all(ledger.said[act] for act in ACTS), ledger.said


def _killed(child: Child, chance: random.Random) -> bool:
    return child.killed(Moment.any(chance, at_start=0.1, lines=20, whats=ACTS))
