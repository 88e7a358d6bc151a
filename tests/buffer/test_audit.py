"""Shows that an audit finds what is wrong in a damaged database, and says with which groups."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from buffer import ReplayBuffer, Status
from tests.buffer.groups import a_group, draw, edit, put_all, url

pytestmark = pytest.mark.usefixtures("backend")

DAMAGE = {
    "UPDATE counts SET n = n + 1 WHERE status = 'completed'": [
        "task 'math': 4 counted as completed, 3 rows are",
    ],
    "UPDATE counts SET status = 'bogus' WHERE status = 'pending'": [
        "task 'math': 1 counted as bogus, 0 rows are",
        "task 'math': 0 counted as pending, 1 rows are",
    ],
    "UPDATE tasks SET drawn = 9": [
        "task 'math': 9 prompts drawn, 6 groups present, 0 given up",
    ],
    "DELETE FROM rollouts WHERE group_id = 2": [
        "1 groups without rollouts (groups 2)",
        "1 groups with another number of rollouts than they say (groups 2)",
    ],
    "DELETE FROM prompts WHERE group_id IN (2, 3)": [
        "2 groups without prompts (groups 2, 3)",
    ],
    "DELETE FROM payloads WHERE group_id = 3": [
        "1 groups with tokens and without a payload (groups 3)",
    ],
    "INSERT INTO payloads SELECT 77, extras, arrays FROM payloads WHERE group_id = 1": [
        "1 rows of payloads without a group (groups 77)",
    ],
    "UPDATE rollouts SET tokens = 99 WHERE group_id = 1": [
        "1 groups with other tokens than their rollouts (groups 1)",
    ],
    "UPDATE groups SET consumed_step = NULL WHERE status = 'consumed'": [
        "1 groups whose status and step of consumption disagree (groups 1)",
    ],
    "UPDATE groups SET status = 'bogus' WHERE group_id = 3": [
        "1 groups of an unknown status (groups 3)",
        "task 'math': 0 counted as bogus, 1 rows are",
        "task 'math': 3 counted as completed, 2 rows are",
    ],
    "UPDATE groups SET owner = NULL WHERE status = 'running'": [
        "1 groups that run and belong to nobody (groups 6)",
    ],
    "UPDATE groups SET pruned_at = 1.0 WHERE group_id = 4": [
        "1 groups with a payload that was given up (groups 4)",
    ],
    "INSERT INTO prefixes SELECT group_id, 1, extras, arrays FROM payloads WHERE group_id = 2": [
        "1 groups with prefixes that neither run nor may run on (groups 2)",
    ],
    "INSERT INTO transitions (group_id, at, target, owner) VALUES (99, 0.0, 'failed', 'me')": [
        "1 rows of transitions without a group (groups 99)",
    ],
}


@pytest.fixture
async def run(backend: str, tmp_path: Path) -> AsyncIterator[None]:
    """Groups 1 to 4 completed (1 consumed), 5 pending, 6 running, in a buffer that is open."""
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(n) for n in range(1, 5)])
        await buffer.take("math", 1, step=1)
        drawn = await draw(buffer, 0, 1)
        await buffer.start(drawn[1:])
        assert (await buffer.audit(payloads=True)).ok
        yield


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(("damage", "problems"), DAMAGE.items(), ids=list(DAMAGE))
async def test_it_finds_what_is_wrong_and_where(tmp_path: Path, damage: str, problems: list[str]) -> None:
    assert edit(tmp_path, damage) >= 1
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as buffer:
        report = await buffer.audit()
    assert not report.ok
    assert set(problems) <= set(report.problems), report.problems


@pytest.mark.sqlite
@pytest.mark.usefixtures("run")
async def test_bytes_where_a_name_belongs_are_found_too(tmp_path: Path) -> None:
    assert edit(tmp_path, "UPDATE groups SET task_name = x'80' WHERE group_id = 3") == 1
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as buffer:
        assert "task b'\\x80': 0 prompts drawn, 1 groups present, 0 given up" in (await buffer.audit()).problems
        assert (await buffer.report()).steps
        with pytest.raises(ValueError, match=r"task_name is b'\\x80'; it must be text"):
            await buffer.export(tmp_path / "run.jsonl")
    assert not [name for name in os.listdir(tmp_path) if "jsonl" in name]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("UPDATE groups SET max_version = 7 WHERE group_id = 2", "group 2: max_version is 7, its payload says 0"),
        (
            "UPDATE payloads SET arrays = substr(arrays, 1, 1) WHERE group_id = 3",
            "group 3: a payload has 1 bytes, its lengths say otherwise",
        ),
        ("UPDATE payloads SET extras = 'nonsense' WHERE group_id = 4", "group 4 does not decode"),
    ],
)
async def test_with_payloads_it_reads_every_one(tmp_path: Path, damage: str, problem: str) -> None:
    assert edit(tmp_path, damage) == 1
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as buffer:
        assert (await buffer.audit()).ok, "the payloads are not read"
        report = await buffer.audit(payloads=True)
    assert [p for p in report.problems if p.startswith(problem)] == list(report.problems) != []


async def test_only_the_first_of_many_groups_are_named(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(n, Status.INTERRUPTED) for n in range(1, 10)])
    edit(tmp_path, "DELETE FROM payloads")
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as buffer:
        assert (await buffer.audit()).problems == ["9 groups with tokens and without a payload (groups 1, 2, 3, 4, 5, ...)"]


async def test_a_rewind_leaves_final_groups_as_they_are_and_that_is_sound(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(1, version=1), a_group(2, "filtered", version=5), a_group(3, version=9)])
        await buffer.take("math", 1, step=1, version=1)
        await buffer.take("math", 1, step=2, version=2)
        for step in (1, 0):
            await buffer.resume(step)
            assert (await buffer.audit(payloads=True)).problems == []


@pytest.mark.parametrize("group_id", [0, -5])
async def test_groups_of_any_number_are_read(tmp_path: Path, group_id: int) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await buffer.put(a_group(group_id))
    edit(tmp_path, "UPDATE payloads SET extras = '[]'")
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as buffer:
        assert len((await buffer.audit(payloads=True)).problems) == 1
