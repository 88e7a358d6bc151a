"""Shows that a run killed with SIGKILL at any moment, hundreds of times, goes on as if it had not been.

`kill_run.py` is the run, `kill_ledger.py` knows what must hold. Each test plays rounds: a run is begun in a fresh database,
killed at random moments, looked at and started again, until it reaches its end.

On PostgreSQL the server may still do, or undo, what a killed process had asked for last. A third of the times the next
process opens the database in the midst of that. In half of the rounds the processes act as if each ran on a machine
of its own, so that only the end of a lease tells that one is dead.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from buffer import ReplayBuffer
from tests import postgres
from tests.buffer.groups import url
from tests.producer.kill_ledger import Ledger, Row
from tests.producer.kill_plan import POLICIES, Plan, Task, Way, as_arguments
from tests.zygote import Moment, Zygote

SEED = int(os.environ.get("KILLS_SEED", "0"))
"""Other runs, other moments. A failure names its own; moments are the same then as far as the machine's timing is."""

AHEAD: tuple[Way, ...] = ("keep", "background", "manager")
"""Ways in which groups run beyond their batch."""

ACTS = [
    *("resuming", "resumed", "drawing", "drawn", "claiming", "claimed", "storing", "stored"),
    *("taking", "taken", "updating", "updated", "saving", "saved", "committing", "committed"),
]
ROUNDS = {"sqlite": 6, "postgresql": 4}
ROUNDS_AHEAD = {"sqlite": 2, "postgresql": 1}
"""At least: so many plans differ by their number."""

EXPIRY = ["expiring", "expired"]
CHECKPOINTS = ["checkpointing", "checkpointed"]


KILLS = {
    "sync": {"sqlite": 120, "postgresql": 30},
    "async": {"sqlite": 160, "postgresql": 40},
    "workers": {"sqlite": 24},
    **{way: {"sqlite": 24, "postgresql": 6} for way in AHEAD},
}
LEAST = {"sqlite": 5, "postgresql": 1}
"""Of each act, in the rounds of a kind."""

LEASE = 0.4


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote("tests.producer.kill_run:run", "buffer.backends.postgres") as started:
        yield started


@pytest.fixture
def zygote_with_torch() -> Iterator[Zygote]:
    with Zygote("tests.producer.kill_run:run", "buffer.backends.postgres", "torchdata.stateful_dataloader") as started:
        yield started


@pytest.mark.timeout(300)
def test_sync_batches_equal_those_of_a_run_without_kills(tmp_path: Path, zygote: Zygote, backend: str) -> None:  # case 13
    said = play(zygote, tmp_path, "sync", backend)
    assert all(said[act] >= LEAST[backend] for act in ACTS), said


@pytest.mark.timeout(300)
def test_over_issuing_loses_nothing_and_does_nothing_twice(tmp_path: Path, zygote: Zygote, backend: str) -> None:  # case 13
    said = play(zygote, tmp_path, "async", backend)
    assert all(said[act] >= LEAST[backend] for act in ACTS + EXPIRY + CHECKPOINTS), said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", AHEAD)
def test_producing_ahead_loses_nothing_and_does_nothing_twice(tmp_path: Path, zygote: Zygote, backend: str, way: Way) -> None:
    said = play(zygote, tmp_path, way, backend)  # cases 13, 14, 32
    seldom = [] if backend == "postgresql" else [*EXPIRY, *CHECKPOINTS, "rewound behind half an update"]
    assert all(said[act] > 0 for act in ACTS + seldom), said


@pytest.mark.sqlite
@pytest.mark.timeout(300)
def test_rows_of_dataloaders_with_workers_come_in_their_order(tmp_path: Path, zygote_with_torch: Zygote, backend: str) -> None:
    play(zygote_with_torch, tmp_path, "workers", backend)


def play(zygote: Zygote, folder: Path, kind: str, backend: str) -> Counter[str]:
    """Rounds until enough processes were killed; how often each act was told."""
    said, done, number = Counter[str](), 0, 0
    rounds = (ROUNDS_AHEAD if kind in AHEAD else ROUNDS)[backend]
    while done < KILLS[kind][backend] or number < rounds:
        chance = random.Random(f"{SEED}-{kind}-{number}")
        plan = a_plan(chance, kind, number)
        if backend == "postgresql":
            plan = replace(plan, steps=min(plan.steps, 5), lease=[None, LEASE][number // 2 % 2])
        ledger = begin(zygote, folder / str(number), plan)
        try:
            done += play_round(zygote, ledger, chance)
        except BaseException as error:
            error.add_note(f"KILLS_SEED={SEED}, round {number} of kind {kind!r}, behind {done} kills of other rounds; {ledger.plan}")
            raise
        said += ledger.said
        number += 1
    return said


def a_plan(chance: random.Random, kind: str, number: int) -> Plan:
    """Two tasks over small datasets, several epochs of each, one of them shuffled."""
    shuffled = Task("shuffled", chance.randint(4, 7), chance.randint(1, 3), shuffle=True)
    ordered = Task("ordered", chance.randint(3, 11), chance.randint(1, 3))
    plan = Plan("", "", (shuffled, ordered), chance.randrange(1000), steps=10, every=chance.choice([1, 2, 3]))
    if kind == "sync":
        return replace(plan, checkpoint_tokens=[None, 6][number % 2])
    if kind == "workers":
        workers, rows_a_read = [(2, None), (2, 3), (0, 2)][number % 3]
        shuffled = replace(shuffled, workers=workers, rows_a_read=rows_a_read)
        return replace(plan, tasks=(shuffled, replace(ordered, workers=1, rows_a_read=2)), steps=4, over_issue=[None, 0.5][number % 2])
    plan = replace(
        plan,
        over_issue=chance.choice([0.5, 1.0, 2.0]),
        keep_tokens=chance.random() < 0.7,
        checkpoint_tokens=[None, 6][number % 2],
        max_staleness=[None, None, 1][number % 3],
        policy=chance.choice(list(POLICIES)),
        future=["keep", "keep", "keep", "expire"][number % 4],
    )
    return plan if kind == "async" else a_plan_ahead(chance, plan, kind, number)


def a_plan_ahead(chance: random.Random, plan: Plan, kind: str, number: int) -> Plan:
    """Everything that strategies and samplers can be told, at random; what is checked by number comes in every few rounds."""
    redundant = chance.choice([0, 0, 1])
    return replace(
        plan,
        way=next(way for way in AHEAD if way == kind),
        steps=5,
        every=[2, 1, 3][number % 3],
        max_staleness=[1, None, 2, 0][number % 4],
        on_stale=chance.choice(["wait", "expire", "mask"]),
        tail=chance.choice([(-1, 1), (0, 1), (2, 2)]),
        redundant=redundant,
        judged_together=not redundant and chance.random() < 0.3,
        max_in_flight=chance.choice([None, 6]),
        order=chance.choice([None, "longest", "windows"]),
        mode=chance.choice(["keep", "abort", "wait"]),
        tokens_per_second=chance.choice([None, 4000.0]),
        update_seconds=0.003,
    )


def begin(zygote: Zygote, folder: Path, plan: Plan) -> Ledger:
    """The ledger of a run in a fresh database; another, without kills, told what comes in which order."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    plan, undisturbed = replace(plan, folder=str(folder), url=url(folder)), replace(plan, folder=str(whole), url=url(whole))
    draws = 0 if plan.over_issue is None else 3 * plan.steps * max(task.batch_size for task in plan.tasks) + 40 * (plan.order is not None)
    order: dict[str, list[Row]] = {task.name: [] for task in plan.tasks}
    for line in zygote.start(**as_arguments(undisturbed), draws=draws).ended():
        if line["what"] == "drawn":
            order[line["task"]] += [(epoch, offset, answer) for epoch, offset, answer in line["rows"]]
    return Ledger(plan, order)


def play_round(zygote: Zygote, ledger: Ledger, chance: random.Random) -> int:
    """Start the run, kill it, look, and again until it ends by itself; the number of kills."""
    acts = ACTS + EXPIRY * (ledger.plan.max_staleness is not None) + CHECKPOINTS * (ledger.plan.checkpoint_tokens is not None)
    kills, at_start = 0, 0.03 if is_file(ledger.plan) else 0.15
    while was_killed(zygote, ledger, a_moment(chance, ledger.plan, kills, at_start, acts), chance.random() < 1 / 3):
        kills += 1
    compare(ledger)
    return kills


def a_moment(chance: random.Random, plan: Plan, kills: int, at_start: float, acts: list[str]) -> Moment:
    """When to kill next. Where groups run ahead, each fourth time while weights are updated."""
    if plan.way in AHEAD and kills % 4 == 3:
        return Moment(chance.randint(1, 3), chance.random() * plan.update_seconds, "updating")
    return Moment.any(chance, at_start=at_start, lines=60 if plan.way not in AHEAD else 120, whats=acts)


def is_file(plan: Plan) -> bool:
    return plan.url.startswith("sqlite")


def was_killed(zygote: Zygote, ledger: Ledger, moment: Moment, at_once: bool) -> bool:
    """Start the run once and hold the ledger against what the kill left; False if it ended by itself before.

    `at_once`: another process opens the database right behind the kill.
    """
    child = zygote.start(**as_arguments(ledger.plan))
    try:
        killed = child.killed(moment)
        ledger.read(child.lines)
        if killed and not is_file(ledger.plan):
            let_the_server_end(ledger.plan, at_once)
        asyncio.run(ledger.look() if killed else ledger.close())
        if killed and at_once and not is_file(ledger.plan):
            assert ledger.running == 0, "whoever opens the database releases what the dead ran, what they were about to run too"
    except BaseException as error:
        error.add_note(f"{moment}; the last lines were:\n" + "\n".join(map(str, child.lines[-30:])))
        raise
    return killed


def let_the_server_end(plan: Plan, at_once: bool) -> None:
    """Return when what the killed process had asked for is done or undone, and its leases ended."""
    if at_once and plan.lease is None:
        asyncio.run(open_and_close(plan.url))
    postgres.wait_until_idle(plan.url)
    if plan.lease is not None and postgres.execute(plan.url, "SELECT to_regclass('producers')") != [(None,)]:
        postgres.wait_until_leases_end(plan.url)
        if at_once:
            asyncio.run(open_and_close(plan.url))


async def open_and_close(url: str) -> None:
    async with ReplayBuffer.open(url, max_crashes=None):
        pass


def compare(ledger: Ledger) -> None:
    """Without over-issuing the run drew and trained on what a run without kills does.

    Token by token, too, if no response was continued: a continuation has random numbers of its own.
    """
    if ledger.plan.over_issue is not None:
        return
    assert {name: len(groups) for name, groups in ledger.drawn.items()} == {name: len(rows) for name, rows in ledger.order.items()}
    trained = ledger.trained()
    whole = Ledger(replace(ledger.plan, folder=str(Path(ledger.plan.folder) / "whole")), {}).trained()
    assert group_ids(trained) == group_ids(whole)
    if ledger.plan.checkpoint_tokens is None:
        assert trained == whole


def group_ids(trained: dict[str, dict[str, list[list[int]]]]) -> list[tuple[str, str, list[int]]]:
    """Of each step's batch of each task."""
    return [(step, task, [group for group, *_ in batch]) for step, batches in trained.items() for task, batch in batches.items()]
