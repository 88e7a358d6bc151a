"""Shows what `ReplayBuffer.expire` changes, that it changes nothing else, and that it lets others write."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.errors import ReplayBufferError
from buffer.operations import Expired, expiring
from tests.buffer.groups import a_group, fill, ids, plain, put_all, url

pytestmark = pytest.mark.usefixtures("backend")

TASK = "math"


def of_versions(group_id: int, *members: list[int], status: Status = Status.COMPLETED) -> RolloutGroup:
    """A judged group whose members' tokens have these versions, with everything set that a rollout can hold."""
    rollouts = []
    for index, versions in enumerate(members):
        state = RolloutState(
            group_id,
            index,
            TASK,
            row={"answer": 1},
            prompt="p",
            prompt_ids=np.array([1, 2]),
            media=["image"],
            sampling={"temperature": 1.0},
        )
        state.append(range(len(versions)), logprobs=[-0.1 * (n + 1) for n in range(len(versions))], version=versions)
        state.status, state.finish_reason, state.text, state.score, state.reward = status, "stop", "text", 0.3, 0.1 + 0.2
        state.reward_parts, state.metrics = {"a": 0.3}, {"turns": 1.0}
        rollouts.append(state)
    return RolloutGroup(group_id, rollouts, TASK)


def member(group: RolloutGroup, index: int) -> dict[str, Any]:
    fields: dict[str, Any] = plain(group)["rollouts"][index]
    return fields


async def test_only_stale_members_are_reset(buffer: ReplayBuffer) -> None:  # case 10
    group = of_versions(1, [0, 0], [4, 4])
    await buffer.put(group)
    assert await buffer.expire(TASK, version=5, max_staleness=3) == 1
    stored = await buffer.get(1)
    assert (stored.status, stored.statuses) == (Status.EXPIRED, [Status.EXPIRED, Status.COMPLETED])
    assert member(stored, 1) == member(group, 1), "the fresh one keeps every byte"
    bare = RolloutState(
        1, 0, TASK, Status.EXPIRED, row={"answer": 1}, prompt="p", prompt_ids=[1, 2], media=["image"], sampling={"temperature": 1.0}
    )
    assert member(stored, 0) == member(RolloutGroup(1, [bare, stored.rollouts[1]], TASK), 0), "of the stale one the prompt is left"
    assert (stored.min_version, ids(await buffer.query(min_version=4))) == (4, [1])
    assert await buffer.expire(TASK, version=5, max_staleness=3) == 0, "once is enough"


@pytest.mark.parametrize(("max_staleness", "expected"), [(4, []), (3, [1]), (2, [1, 2]), (0, [1, 2, 3])])
async def test_the_bound_itself_is_allowed(buffer: ReplayBuffer, max_staleness: int, expected: list[int]) -> None:
    await put_all(buffer, [of_versions(n, [n, 9]) for n in (1, 2, 3)])
    assert await buffer.expire(TASK, version=5, max_staleness=max_staleness) == len(expected)
    assert ids(await buffer.query(status=Status.EXPIRED)) == expected


async def test_a_stale_member_that_is_unfinished_is_reset_and_a_fresh_one_goes_on(buffer: ReplayBuffer) -> None:
    group = of_versions(1, [0], [4], [4], status=Status.INTERRUPTED)
    for state in group.rollouts[:2]:
        state.finish_reason, state.score, state.reward, state.interruptions = None, None, None, 2
    group.rollouts[2].status = Status.COMPLETED
    await buffer.put(group)
    assert await buffer.expire(TASK, version=5, max_staleness=3) == 1
    stored = await buffer.get(1)
    assert stored.statuses == [Status.EXPIRED, Status.INTERRUPTED, Status.COMPLETED]
    assert [state.response_ids.size for state in stored.rollouts] == [0, 1, 1]
    assert [member(stored, n) for n in (1, 2)] == [member(group, n) for n in (1, 2)]
    (running,) = await buffer.claim(TASK, 1, statuses=[Status.EXPIRED])
    assert running.statuses == [Status.RUNNING, Status.RUNNING, Status.COMPLETED]
    assert [state.interruptions for state in running.rollouts] == [2, 2, 0]


@pytest.mark.parametrize("status", ["pending", "expired", "filtered", "failed"])
async def test_groups_that_do_not_wait_are_left_alone(buffer: ReplayBuffer, status: str) -> None:
    await put_all(buffer, [a_group(1, status), a_group(2), a_group(3, task_name="code"), a_group(4, Status.INTERRUPTED)])
    await buffer.take(TASK, 1, step=1)
    await buffer.claim(TASK, 1, statuses=[Status.INTERRUPTED])
    before = [plain(group) for group in await buffer.query()]
    assert await buffer.expire(TASK, version=9, max_staleness=0) == 0
    assert [plain(group) for group in await buffer.query()] == before


async def test_expired_groups_keep_their_place_in_the_queue(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, version=version) for n, version in ((1, 3), (2, 0), (3, 2))])
    assert await buffer.expire(TASK, version=9, max_staleness=1) == 3
    assert ids(await buffer.claim(TASK, 3, statuses=[Status.EXPIRED])) == [1, 2, 3]


async def test_a_rewound_group_too_stale_by_then_expires_by_the_same_rule(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(1, version=0), a_group(2, version=4)])
    await buffer.take(TASK, 2, step=1, version=4)
    await buffer.resume(step=0)
    assert await buffer.expire(TASK, version=4, max_staleness=2) == 1
    assert ids(await buffer.take(TASK, 2, step=1)) == [2]


async def test_expired_and_run_again_a_group_is_handed_out(buffer: ReplayBuffer) -> None:
    await buffer.put(of_versions(1, [0], [4]))
    await buffer.expire(TASK, version=5, max_staleness=3)
    (group,) = await buffer.claim(TASK, 1, statuses=[Status.EXPIRED])
    fill(group.rollouts[0], version=5)
    group.rollouts[0].status = Status.COMPLETED
    await buffer.put(group)
    (taken,) = await buffer.take(TASK, 1, step=1)
    assert taken.staleness(5) == 1


# -- by token --------------------------------------------------------------------------------------------------------


async def test_by_token_a_member_expires_when_nothing_fresh_is_left(buffer: ReplayBuffer) -> None:  # case 11
    mixed, gone, unmasked = of_versions(1, [0, 4]), of_versions(2, [0, 4], [5]), of_versions(3, [0, 4])
    gone.rollouts[0].loss_mask = np.array([1, 0], np.uint8)
    unmasked.rollouts[0].loss_mask = np.array([0, 0], np.uint8)
    await put_all(buffer, [mixed, gone, unmasked])
    assert await buffer.expire(TASK, version=5, max_staleness=1, level="token") == 1
    assert plain(await buffer.get(1)) == plain(mixed)
    assert (await buffer.get(1)).masked(version=5, max_staleness=1).rollouts[0].loss_mask.tolist() == [0, 1]
    assert (await buffer.get(2)).statuses == [Status.EXPIRED, Status.COMPLETED]
    assert (await buffer.get(3)).status is Status.COMPLETED
    assert await buffer.expire(TASK, version=5, max_staleness=1, level="token") == 0
    assert await buffer.expire(TASK, version=5, max_staleness=1, level="sequence") == 1


# -- in slices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups_a_slice", "tokens_a_slice"), [(64, 2**18), (4, 2**18), (64, 13), (1, 1)])
@pytest.mark.parametrize("level", ["sequence", "token"])
async def test_however_it_is_sliced_the_same_expires(
    buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch, groups_a_slice: int, tokens_a_slice: int, level: str
) -> None:
    monkeypatch.setattr(expiring, "_SLICE_GROUPS", groups_a_slice)
    monkeypatch.setattr(expiring, "_SLICE_TOKENS", tokens_a_slice)
    await put_all(buffer, [of_versions(n, [n % 3, 3 if n % 4 else 0]) for n in range(1, 25)])
    expected = [n for n in range(1, 25) if (n % 3 < 2 or n % 4 == 0 if level == "sequence" else n % 3 < 2 and n % 4 == 0)]
    assert await buffer.expire(TASK, version=3, max_staleness=1, level=level) == len(expected)
    assert ids(await buffer.query(status=Status.EXPIRED)) == expected


async def test_a_slice_is_bounded_in_groups_and_in_tokens(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    await put_all(buffer, [a_group(n, size=1, tokens=4) for n in range(1, 11)])
    slices: list[int] = []
    store_expired = expiring.q.store_expired

    def noting(conn: Any, encoded: Any, *others: Any) -> None:
        slices.append(len(encoded))
        store_expired(conn, encoded, *others)

    monkeypatch.setattr(expiring.q, "store_expired", noting)
    monkeypatch.setattr(expiring, "_SLICE_TOKENS", 9)
    monkeypatch.setattr(expiring, "_SLICE_GROUPS", 8)
    assert await buffer.expire(TASK, version=9, max_staleness=1) == 10
    assert slices == [3, 3, 3, 1], "a slice ends with the group that reaches the bound"
    monkeypatch.setattr(expiring, "_SLICE_TOKENS", 1000)
    await put_all(buffer, [a_group(n, size=1, tokens=4) for n in range(11, 21)])
    assert await buffer.expire(TASK, version=9, max_staleness=1) == 10
    assert slices[4:] == [8, 2]


async def test_others_write_between_slices(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiring, "_SLICE_GROUPS", 1)
    await put_all(buffer, [a_group(n) for n in range(1, 41)])
    order: list[str] = []
    begun, loop, expire_slice = asyncio.Event(), asyncio.get_running_loop(), expiring._expire_slice

    def noting(*arguments: Any) -> Expired:
        order.append("slice")
        loop.call_soon_threadsafe(begun.set)
        return expire_slice(*arguments)

    monkeypatch.setattr(expiring, "_expire_slice", noting)

    async def write() -> None:
        await begun.wait()
        await buffer.put(a_group(99, version=9))
        order.append("put")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        expired = tasks.create_task(buffer.expire(TASK, version=9, max_staleness=1))
    assert expired.result() == 40
    assert order.index("put") < len(order) - 1, "it did not wait for the last slice"


async def test_cancelled_between_slices_what_is_done_is_done_and_the_next_call_does_the_rest(
    buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiring, "_SLICE_GROUPS", 1)
    await put_all(buffer, [a_group(n) for n in range(1, 41)])
    before = {n: plain(await buffer.get(n)) for n in range(1, 41)}
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.005):
            await buffer.expire(TASK, version=9, max_staleness=1)
    await buffer.cursor(TASK)  # the writer answers in order: what was under way is done
    done = await buffer.count(TASK, Status.EXPIRED)
    assert all(plain(group) == before[group.group_id] for group in await buffer.query(status=Status.COMPLETED))
    assert await buffer.expire(TASK, version=9, max_staleness=1) == 40 - done


# -- what it is given ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_staleness": -1}, "max_staleness=-1 must be a whole number, 0 or more; 0 allows the policy of now only"),
        ({"max_staleness": 0.5}, "max_staleness=0.5 must be a whole number"),
        ({"version": -1}, "version=-1 must be a whole number, 0 or more"),
        ({"level": "group"}, r"level='group' is unknown; choose among \['sequence', 'token'\]"),
        ({"task_name": ""}, "task_name='' names no task"),
    ],
)
async def test_bad_arguments_are_refused(buffer: ReplayBuffer, arguments: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"task_name": TASK, "version": 5, "max_staleness": 1} | arguments
    with pytest.raises(ValueError, match=message):
        await buffer.expire(**asked)


async def test_a_buffer_that_only_reads_expires_nothing(buffer: ReplayBuffer, tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as reader:
        with pytest.raises(ReplayBufferError, match="read_only=True"):
            await reader.expire(TASK, version=5, max_staleness=1)


@pytest.mark.sqlite
async def test_an_older_file_gets_the_index(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await buffer.put(a_group(1))
    with sqlite3.connect(tmp_path / "run.db") as connection:
        created = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'groups_oldest'").fetchone()
        connection.execute("DROP INDEX groups_oldest")
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert await buffer.expire(TASK, version=5, max_staleness=1) == 1
    with sqlite3.connect(tmp_path / "run.db") as connection:
        assert connection.execute("SELECT sql FROM sqlite_master WHERE name = 'groups_oldest'").fetchone() == created


# -- any groups ------------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), max_size=3)
MEMBERS = st.lists(TOKENS, min_size=1, max_size=3)
WAITING = st.sampled_from([Status.COMPLETED, Status.INTERRUPTED])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WAITING, MEMBERS), max_size=6), st.integers(0, 5), st.integers(0, 3), st.sampled_from(["sequence", "token"]))
def test_what_expires_is_what_the_definition_says(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[Status, list[Any]]], version: int, max_staleness: int, level: str
) -> None:
    groups = []
    for group_id, (status, members) in enumerate(drawn, start=1):
        group = of_versions(group_id, *([v for v, _ in tokens] for tokens in members), status=status)
        for state, tokens in zip(group.rollouts, members, strict=True):
            state.loss_mask = np.array([mask for _, mask in tokens], np.uint8)
        groups.append(group)

    def stale(tokens: list[tuple[int, int]]) -> bool:
        ages = [version - v > max_staleness for v, mask in tokens if mask]
        return any(ages) if level == "sequence" else bool(ages) and all(ages)

    async def check() -> None:
        async with ReplayBuffer.open(url(tmp_path_factory.mktemp("any"))) as buffer:
            await put_all(buffer, groups)
            expected = [any(stale(tokens) for tokens in members) for _, members in drawn]
            assert await buffer.expire(TASK, version=version, max_staleness=max_staleness, level=level) == sum(expected)
            assert (await buffer.audit()).ok
            for group, (_, members), expires in zip(groups, drawn, expected, strict=True):
                stored = await buffer.get(group.group_id)
                assert (stored.status is Status.EXPIRED) == expires
                for index, tokens in enumerate(members):
                    if stale(tokens):
                        assert (stored.rollouts[index].status, stored.rollouts[index].response_ids.size) == (Status.EXPIRED, 0)
                    else:
                        assert member(stored, index) == member(group, index)

    asyncio.run(check())
