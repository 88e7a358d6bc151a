"""Shows what each method of the buffer promises: what is stored, in which order it is handed out, and what is refused."""

import asyncio
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from buffer import DrawnRow, Fifo, FreshestFirst, Position, ReplayBuffer, RolloutGroup, RolloutState, StalestFirst, Status, TakePolicy
from buffer.errors import (
    BufferClosedError,
    CursorConflictError,
    DuplicateGroupError,
    IllegalTransitionError,
    ReplayBufferError,
    ResumeRequiredError,
    StepError,
    UnknownGroupError,
)
from tests.buffer.groups import a_group, draw, finished, ids, plain, put_all, rows, turns, url

pytestmark = pytest.mark.usefixtures("backend")

# -- storing ---------------------------------------------------------------------------------------------------------


async def test_what_was_put_is_there_for_another_buffer(buffer: ReplayBuffer, tmp_path: Path) -> None:
    group = a_group(7, position=Position(0, 3))
    await buffer.put(group)
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as other:
        assert plain(await other.get(7)) == plain(group)


async def test_the_buffer_keeps_a_copy(buffer: ReplayBuffer) -> None:
    group = a_group(1)
    before = plain(group)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(buffer.put(group))
        await asyncio.sleep(0)
        group.rollouts[0].reset()
        group.rollouts[1].append([9], logprobs=[-1.0])
        group.rollouts[0].row["prompt"] = "changed"  # type: ignore[index]
    first, second = await buffer.get(1), await buffer.get(1)
    assert plain(first) == before
    first.rollouts[0].reset()
    assert plain(second) == before, "every group handed out is a fresh one"


async def test_an_empty_group_is_refused_before_it_reaches_the_database(buffer: ReplayBuffer) -> None:  # case 8
    with pytest.raises(ValueError, match="has no rollouts; a group holds at least one"):
        RolloutGroup(1, [])
    group = a_group(1)
    group.rollouts.clear()
    for store in (buffer.put(group), buffer.put_restored([group])):
        with pytest.raises(ValueError, match="group 1 has no rollouts; a group holds at least one"):
            await store
    assert await buffer.task_names() == []


async def test_a_group_runs_from_drawn_to_archived(buffer: ReplayBuffer) -> None:
    (group_id,) = await draw(buffer, 0)
    assert (await buffer.get(group_id)).status is Status.PENDING
    (group,) = await buffer.start([group_id])
    assert group.status is Status.RUNNING
    assert (group.position, group.rollouts[1].prompt) == (Position(0, 0), "p0")
    await buffer.put(finished(group, version=4))
    (taken,) = await buffer.take("math", 5, step=1, version=4)
    assert (taken.status, taken.consumed_step, taken.min_version) == (Status.CONSUMED, 1, 4)
    assert await buffer.commit(1) == 1
    assert (await buffer.get(group_id)).status is Status.ARCHIVED
    assert await buffer.last_step() == 1


async def test_an_interrupted_group_goes_on_with_its_tokens(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1, Status.INTERRUPTED, version=1, tokens=1))
    (group,) = await buffer.claim("math", 1, statuses=[Status.INTERRUPTED])
    for rollout in group.rollouts:
        rollout.append([8, 9], logprobs=[-1.0, -2.0], version=3)
        rollout.status = Status.COMPLETED
    await buffer.put(group)
    stored = await buffer.get(1)
    assert [rollout.versions.tolist() for rollout in stored.rollouts] == [[1, 3, 3]] * 2  # case 12
    assert stored.min_version == 1


async def test_members_that_completed_stay_so_while_the_others_run_again(buffer: ReplayBuffer) -> None:
    group = a_group(1, Status.INTERRUPTED)
    group.rollouts[0].status = Status.COMPLETED
    await buffer.put(group)
    (running,) = await buffer.claim("math", 1, statuses=[Status.INTERRUPTED])
    assert running.statuses == [Status.COMPLETED, Status.RUNNING]
    await buffer.release([1])
    released = await buffer.get(1)
    assert released.statuses == [Status.COMPLETED, Status.INTERRUPTED]
    assert [rollout.interruptions for rollout in released.rollouts] == [0, 1]


@pytest.mark.parametrize("status", [Status.RUNNING, Status.CONSUMED, Status.ARCHIVED, Status.DISCARDED])
async def test_a_new_group_is_not_stored_as_what_only_the_buffer_makes_of_it(buffer: ReplayBuffer, status: Status) -> None:
    with pytest.raises(IllegalTransitionError, match=f"group 1 of task 'math' is new and cannot be stored as {status}; a new group may be"):
        await buffer.put(a_group(1, status))
    assert set((await buffer.counts("math")).values()) == {0}


@pytest.mark.parametrize("target", [Status.RUNNING, Status.CONSUMED, Status.ARCHIVED])
async def test_put_does_not_start_take_or_commit(buffer: ReplayBuffer, target: Status) -> None:
    await put_all(buffer, [a_group(1), a_group(2, Status.INTERRUPTED)])
    with pytest.raises(IllegalTransitionError, match=rf"group [12] of task 'math' cannot be stored as {target}: that is done by \w+\(\)"):
        await buffer.put(a_group(2 if target is Status.RUNNING else 1, target))
    assert ids(await buffer.query(status="completed")) == [1]


async def test_named_groups_are_taken_in_the_order_in_which_they_are_named(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(number) for number in (1, 2, 3, 4)])
    assert ids(await buffer.take("math", 2, step=1, among=[3, 9, 1, 4])) == [3, 1]
    assert ids(await buffer.take("math", 3, step=1, among=[1, 4, 3], whole=True)) == []
    assert ids(await buffer.take("math", 3, step=2, among=[1, 4, 3])) == [4]
    assert ids(await buffer.take("other", 3, step=2, among=[2])) == []
    with pytest.raises(ValueError, match="oldest_version=1 chooses groups by age"):
        await buffer.take("math", 1, step=2, among=[2], oldest_version=1)
    assert ids(await buffer.take("math", 3, step=2)) == [2]


async def test_a_whole_batch_is_taken_or_nothing(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(1), a_group(2)])
    assert await buffer.take("math", 3, step=1, whole=True) == []
    assert await buffer.count("math", Status.COMPLETED) == 2
    assert ids(await buffer.take("math", 2, step=1, whole=True)) == [1, 2]


async def test_a_consumed_group_cannot_be_put_back_behind_the_trainer(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1))
    await buffer.take("math", 1, step=1)
    for status in (Status.COMPLETED, Status.ARCHIVED):
        with pytest.raises(IllegalTransitionError, match=r"group 1 of task 'math' is consumed: resume\(\) gives it back"):
            await buffer.put(a_group(1, status))
    assert (await buffer.get(1)).consumed_step == 1


async def test_an_illegal_transition_names_the_group_and_the_remedy_and_stores_nothing(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1))
    before = plain(await buffer.get(1))
    with pytest.raises(
        IllegalTransitionError, match=r"group 1 of task 'math' is completed and cannot become completed; .* consumed, expired"
    ):
        await buffer.put(a_group(1, tokens=9))
    assert plain(await buffer.get(1)) == before


@pytest.mark.parametrize("other", [{"task_name": "code"}, {"size": 1}, {"size": 3}])
async def test_another_group_under_a_known_id_is_refused(buffer: ReplayBuffer, other: dict[str, int]) -> None:
    await draw(buffer, 0)
    (group,) = await buffer.start([1])
    with pytest.raises(IllegalTransitionError, match="is stored as one of task 'math' with 2; give another group an id of its own"):
        await buffer.put(a_group(1, **other))  # type: ignore[arg-type]
    assert (await buffer.get(1)).status is Status.RUNNING
    await buffer.put(finished(group))


async def test_a_position_is_stored_once(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1, position=Position(0, 0)))
    with pytest.raises(DuplicateGroupError, match=r"group 2 of task 'math' at \(epoch 0, 0\) cannot be added"):
        await buffer.put(a_group(2, position=Position(0, 0)))
    with pytest.raises(DuplicateGroupError, match=r"at \(epoch 0, 0\)"):
        await draw(buffer, 0)
    assert (await buffer.cursor("math")).moves == 0, "the cursor moves with its groups or not at all"
    await buffer.put(a_group(3, position=Position(0, 0), task_name="code"))
    await put_all(buffer, [a_group(4), a_group(5)])
    assert ids(await buffer.query()) == [1, 3, 4, 5]


async def test_one_bad_request_among_many_fails_alone(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1))
    bad = [a_group(1), a_group(50, position=Position(0, 10)), a_group(51, Status.RUNNING)]
    good = [a_group(n, position=Position(0, n)) for n in range(2, 42)]
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(_outcome(buffer.put(group))) for group in [*good[:15], *bad, *good[15:]]]
    outcomes = [type(task.result()) for task in asked]
    assert outcomes[15:18] == [IllegalTransitionError, DuplicateGroupError, IllegalTransitionError]
    assert set(outcomes[:15] + outcomes[18:]) == {type(None)}
    assert await buffer.count("math", "completed") == 41


async def _outcome(put: object) -> object:
    try:
        await put  # type: ignore[misc]
    except ReplayBufferError as error:
        return error
    return None


async def test_the_same_group_put_twice_at_once_is_stored_once(buffer: ReplayBuffer) -> None:
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(_outcome(buffer.put(a_group(1)))) for _ in range(8)]
    outcomes = [task.result() for task in asked]
    assert outcomes[0] is None
    assert all(isinstance(outcome, IllegalTransitionError) for outcome in outcomes[1:])


async def test_a_group_put_by_hand_does_not_meet_one_that_is_drawn(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(10))
    assert await draw(buffer, 0, 1) == [11, 12]


# -- counting and asking -----------------------------------------------------------------------------------------------


async def test_counts_by_task_and_status(buffer: ReplayBuffer) -> None:  # case 7
    await put_all(buffer, [a_group(1), a_group(2), a_group(3, Status.FAILED), a_group(4, task_name="b")])
    asked = [("math", "completed"), ("math", "failed"), ("b", "completed"), ("b", "failed")]
    assert [await buffer.count(*of) for of in asked] == [2, 1, 1, 0]
    for task_name, n in {"math": 1, "b": 1, "c": 0}.items():
        await buffer.take(task_name, n, step=1)
    assert [await buffer.count(*of) for of in asked] == [1, 1, 0, 0]
    assert await buffer.counts("math") == dict.fromkeys(Status, 0) | {Status.COMPLETED: 1, Status.FAILED: 1, Status.CONSUMED: 1}
    assert await buffer.count("nobody's", Status.PENDING) == 0
    assert await buffer.task_names() == ["b", "math"]


async def test_query_filters_and_pages(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, "completed" if n % 2 else "failed", task_name="ab"[n % 3 == 0]) for n in range(1, 11)])
    assert ids(await buffer.query()) == list(range(1, 11))
    assert ids(await buffer.query(limit=3, offset=4)) == [5, 6, 7]
    assert ids(await buffer.query(status="failed")) == [2, 4, 6, 8, 10]
    assert ids(await buffer.query(task_name="b")) == [3, 6, 9]
    assert ids(await buffer.query(task_name="b", status=Status.COMPLETED)) == [3, 9]
    assert ids(await buffer.query(status=["failed", Status.COMPLETED], limit=2)) == [1, 2]
    assert await buffer.query(limit=0) == await buffer.query(offset=99) == []


async def test_more_groups_than_one_statement_names(buffer: ReplayBuffer) -> None:
    drawn = await draw(buffer, *range(1200), group_size=1)
    assert ids(await buffer.start(drawn[::-1])) == drawn[::-1]
    await buffer.release(drawn)
    assert await buffer.count("math", "interrupted") == 1200


async def test_an_unknown_group_is_an_error_that_says_so(buffer: ReplayBuffer) -> None:
    for ask in (buffer.get(99), buffer.start([99]), buffer.release([99])):
        with pytest.raises(UnknownGroupError, match="no group 99 is in the database"):
            await ask


async def test_numbers_of_numpy_are_numbers(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1))
    assert (await buffer.get(np.int64(1))).group_id == 1  # type: ignore[arg-type]
    taken = await buffer.take("math", np.int64(1), step=np.int64(1), version=np.int32(3))  # type: ignore[arg-type]
    assert ids(taken) == [1]
    assert (await buffer.resume(np.int64(0))).rewound == 1  # type: ignore[arg-type]
    group = a_group(2, position=Position(np.int64(0), np.int32(7)))  # type: ignore[arg-type]
    group.rollouts[0].attempts = group.rollouts[0].interruptions = np.int64(3)  # type: ignore[assignment]
    await buffer.put(group)
    stored = await buffer.get(2)
    assert (stored.position, stored.rollouts[0].attempts, stored.rollouts[0].interruptions) == ((0, 7), 3, 3)
    drawn = DrawnRow({"prompt": "p"}, Position(np.int64(1), np.int64(1)))  # type: ignore[arg-type]
    ids_drawn = await buffer.draw("code", [drawn], group_size=np.int64(2), moves=np.int64(0), cursor={"at": np.int64(1)})  # type: ignore[arg-type]
    assert (await buffer.get(ids_drawn[0])).position == (1, 1)


async def test_bad_arguments_are_refused_with_the_value_and_the_bound(buffer: ReplayBuffer) -> None:
    refused = [
        (buffer.count("math", "done"), "unknown status 'done'; it must be one of: pending"),
        (buffer.query(status="done"), "unknown status 'done'"),
        (buffer.count("", "completed"), "task_name='' names no task"),
        (buffer.count("\ud800", "completed"), r"task_name='\\ud800' is no text that a database holds"),
        (buffer.draw("a\0", rows(0), group_size=1, moves=0, cursor={}), "holds a null character"),
        (buffer.get("x"), "group_id='x' must be a whole number"),  # type: ignore[arg-type]
        (buffer.history(2**70), r"group_id=.* must lie between -2\*\*62 and 2\*\*62"),
        (buffer.draw("math", rows(0), group_size="2", moves=0, cursor={}), "group_size='2' must be a whole number"),  # type: ignore[arg-type]
        (buffer.counts(None), "task_name=None names no task"),  # type: ignore[arg-type]
        (buffer.take("", 1, step=1), "task_name='' names no task"),
        (buffer.take("math", -1, step=1), "n=-1 must be a whole number, 0 or more"),
        (buffer.take("math", 1, step=0), "step=0 must be a whole number, 1 or more; steps count from 1"),
        (buffer.take("math", 1, step=1.5), "step=1.5 must be a whole number"),  # type: ignore[arg-type]
        (buffer.claim("math", -1, statuses=["pending"]), "n=-1 must be a whole number"),  # type: ignore[list-item]
        (buffer.claim("math", 1, statuses=[Status.COMPLETED]), "groups that are completed cannot be run; those that can are"),
        (buffer.take("math", 1, step=2**62), "must be less than 2\\*\\*62"),
        (buffer.take("math", 2**70, step=1), "must be less than 2\\*\\*62"),
        (buffer.commit(2**70), "must be less than 2\\*\\*62"),
        (buffer.commit(-1), "step=-1 must be a whole number"),
        (buffer.resume(None), "step=None must be a whole number, 0 or more; 0 where there is no checkpoint"),  # type: ignore[arg-type]
        (buffer.query(limit=-1), "limit=-1 must be a whole number"),
        (buffer.query(offset=-1), "offset=-1 must be a whole number"),
        (buffer.draw("math", rows(0), group_size=0, moves=0, cursor={}), "group_size=0 must be a whole number, 1 or more"),
        (buffer.draw("math", rows(0), group_size=1, moves=0, cursor={"at": object()}), "the dataset cursor cannot be stored"),
    ]
    for ask, message in refused:
        with pytest.raises(ValueError, match=message):
            await ask
    assert await buffer.query() == []


# -- taking ------------------------------------------------------------------------------------------------------------


async def test_take_of_nothing_does_nothing(buffer: ReplayBuffer) -> None:  # case 8
    await buffer.put(a_group(1))
    assert await buffer.take("math", 0, step=1) == []
    assert await buffer.take("code", 5, step=1) == []
    assert await buffer.last_step() == 0


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, [1, 2, 3, 4]),
        (Fifo(), [1, 2, 3, 4]),
        (StalestFirst(), [2, 4, 3, 1]),  # stalenesses 1, 5, 3, 5 give 5, 5, 3, 1, ties by age
        (FreshestFirst(), [1, 3, 2, 4]),
    ],
)
async def test_order_of_taking(buffer: ReplayBuffer, policy: TakePolicy | None, expected: list[int]) -> None:  # case 9
    await put_all(buffer, [a_group(n, version=6 - stale) for n, stale in ((1, 1), (2, 5), (3, 3), (4, 5))])
    assert ids(await buffer.take("math", 10, step=1, policy=policy)) == expected


async def test_first_completed_is_first_out_whenever_it_was_drawn(buffer: ReplayBuffer) -> None:
    drawn = await draw(buffer, 0, 1, 2)
    groups = await buffer.start(drawn)
    await put_all(buffer, [finished(groups[n]) for n in (2, 0, 1)])
    assert ids(await buffer.take("math", 2, step=1)) == [drawn[2], drawn[0]]
    assert ids(await buffer.take("math", 2, step=1)) == [drawn[1]]


async def test_a_group_is_taken_once_however_many_take(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n) for n in range(1, 31)])
    async with asyncio.TaskGroup() as tasks:
        takes = [tasks.create_task(buffer.take("math", 4, step=1)) for _ in range(10)]
    assert [group_id for task in takes for group_id in ids(task.result())] == list(range(1, 31))


async def test_each_task_has_a_last_step_of_its_own(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(1, task_name="math"), a_group(2, task_name="code"), a_group(3, task_name="code")])
    await buffer.take("math", 1, step=7)
    await buffer.take("code", 1, step=2)
    assert [await buffer.last_step(task) for task in ("math", "code", "none", None)] == [7, 2, 0, 7]
    await buffer.commit(7)
    assert [await buffer.last_step(task) for task in ("math", "code")] == [7, 2]
    assert [await buffer.next_step(task) for task in ("math", "code", "none")] == [8, 8, 8], "what is committed is over for every task"


async def test_rewinding_gives_back_what_was_consumed_after_the_checkpoint(buffer: ReplayBuffer) -> None:  # case 14
    await put_all(buffer, [a_group(n, version=5 + n % 3) for n in range(1, 16)])
    taken = {step: ids(await buffer.take("math", 2, step=step, version=step - 1, policy=StalestFirst())) for step in range(1, 6)}
    assert await buffer.commit(3) == 6
    report = await buffer.resume(step=3)
    assert (report.step, report.version, report.rewound) == (3, 3, 4)
    assert report.counts["math"][Status.COMPLETED] == 9
    assert await buffer.last_step() == 3
    assert (await buffer.get(taken[4][0])).consumed_step is None
    await buffer.put(a_group(99, version=0))
    again = [ids(await buffer.take("math", 2, step=step, policy=policy)) for step, policy in ((4, FreshestFirst()), (5, StalestFirst()))]
    assert again == [taken[4], taken[5]], "the rewound come first, in their old order, whatever the policy"
    assert ids(await buffer.take("math", 1, step=6, policy=FreshestFirst())) == [99], "the others lie further behind, on undone weights"


async def test_a_rewound_batch_mixes_with_fresh_groups_only_at_its_end(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, version=9) for n in (3, 2, 1)])
    first = ids(await buffer.take("math", 3, step=1, policy=FreshestFirst()))
    await put_all(buffer, [a_group(n, version=n) for n in (4, 5)])
    await buffer.resume(step=0)
    assert ids(await buffer.take("math", 5, step=1, policy=StalestFirst())) == [*first, 5, 4], (
        "of undone weights the newest are the stalest"
    )


async def test_rewinding_again_gives_the_same_order_again(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, version=9 - n) for n in range(1, 7)])
    taken = {step: ids(await buffer.take("math", 2, step=step, policy=StalestFirst())) for step in (1, 2, 3)}
    for retaken in (1, 2, 0, 3):  # each time the run gets less or more far before it is rewound again
        await buffer.resume(step=0)
        for step in range(1, retaken + 1):
            assert ids(await buffer.take("math", 2, step=step)) == taken[step]
    await buffer.resume(step=1)
    await buffer.put(a_group(7))
    assert ids(await buffer.take("math", 9, step=2)) == [*taken[2], *taken[3], 7]


async def test_the_version_at_a_checkpoint_is_what_its_next_batch_saw(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n) for n in range(1, 5)])
    await buffer.take("math", 1, step=1, version=0)
    await buffer.take("math", 1, step=2, version=5)
    assert (await buffer.resume(step=2)).version == 6, "one update was made of the last step"
    assert (await buffer.resume(step=1)).version == 5
    assert (await buffer.resume(step=1)).version == 5, "resuming again says the same"
    assert await buffer.last_step() == 1
    assert (await buffer.resume(step=0)).version == 0
    assert (await buffer.resume(step=9)).version == 9


async def test_what_is_of_another_type_is_refused_by_name(buffer: ReplayBuffer) -> None:
    with pytest.raises(TypeError, match="put\\(\\) stores a RolloutGroup, not NoneType"):
        await buffer.put(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"policy='fifo' is none; give Fifo\(\), StalestFirst\(\) or FreshestFirst\(\)"):
        await buffer.take("math", 1, step=1, policy="fifo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds a null character"):
        ReplayBuffer.open("sqlite:///a\0b")


async def test_the_version_at_a_checkpoint_is_what_commit_was_told(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n) for n in range(1, 4)])
    await buffer.take("math", 1, step=1, version=0)
    await buffer.commit(1, version=7)
    await buffer.take("math", 1, step=2, version=8)
    assert (await buffer.resume(step=1)).version == 7
    await buffer.take("math", 1, step=2, version=7)
    await buffer.commit(1)
    await buffer.commit(0, version=3)
    assert (await buffer.resume(step=1)).version == 7, "what was told stays, and an older step does not replace it"
    await buffer.commit(2)
    assert (await buffer.resume(step=2)).version == 8, "not told of this step: one update is counted"


async def test_what_is_committed_is_final(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(1), a_group(2)])
    await buffer.take("math", 1, step=4)
    assert await buffer.commit(4) == 1
    assert await buffer.commit(4) == await buffer.commit(2) == 0
    with pytest.raises(StepError, match="step=3 lies before the committed step 4, whose batches are final"):
        await buffer.resume(step=3)
    for step in (3, 4):
        with pytest.raises(StepError, match=f"step={step} lies at or before the committed step 4; take at step 5 or later"):
            await buffer.take("math", 1, step=step)
    assert (await buffer.resume(step=4)).rewound == 0
    assert ids(await buffer.take("math", 2, step=5)) == [2]


async def test_resuming_with_nothing_consumed(buffer: ReplayBuffer) -> None:
    report = await buffer.resume(step=0)
    assert (report.version, report.rewound, report.released, report.counts) == (0, 0, 0, {})


async def test_taking_after_a_restart_needs_a_resume(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(n) for n in range(1, 4)])
        await buffer.take("math", 2, step=1)
        await buffer.take("math", 1, step=2)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        with pytest.raises(ResumeRequiredError, match=r"consumed but never committed; call resume\(step=...\)"):
            await buffer.take("math", 1, step=2)
        assert (await buffer.resume(step=1)).rewound == 1
        assert ids(await buffer.take("math", 3, step=2)) == [3]
        await buffer.commit(2)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert await buffer.take("math", 1, step=3) == [], "everything is committed: nothing to resume"


async def test_a_restart_releases_what_ran(tmp_path: Path, backend: str) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await buffer.start((await draw(buffer, 0, 1))[:1])
        await buffer.put(a_group(9, Status.INTERRUPTED, task_name="code"))
        await buffer.claim("code", 1, statuses=[Status.INTERRUPTED])
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        report = await buffer.resume(step=0)
        assert report.released == (2 if backend == "sqlite" else 0), "on a server they were free when the first was closed"
        assert [report.counts[task][Status.INTERRUPTED] for task in ("math", "code")] == [1, 1]
        kept = await buffer.get(9)
        assert [(r.interruptions, r.response_ids.size) for r in kept.rollouts] == [(1, 3), (1, 3)]
        assert (await buffer.audit()).ok


# -- producing -----------------------------------------------------------------------------------------------------------


async def test_claims_go_through_the_statuses_in_order_and_each_by_age(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, "interrupted" if n % 2 else "expired") for n in range(1, 7)])
    wanted = [Status.EXPIRED, Status.INTERRUPTED, Status.EXPIRED, Status.PENDING]
    assert ids(await buffer.claim("math", 4, statuses=wanted, exclude={2, 3})) == [4, 6, 1, 5]
    assert ids(await buffer.claim("math", 9, statuses=wanted)) == [2, 3]
    assert await buffer.claim("math", 9, statuses=wanted) == await buffer.claim("math", 0, statuses=wanted) == []


async def test_a_group_is_claimed_once_however_many_claim(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, Status.INTERRUPTED) for n in range(1, 31)])
    async with asyncio.TaskGroup() as tasks:
        claims = [tasks.create_task(buffer.claim("math", 4, statuses=[Status.INTERRUPTED])) for _ in range(10)]
    assert [group_id for task in claims for group_id in ids(task.result())] == list(range(1, 31))


async def test_a_draw_moves_the_cursor_and_its_groups_together(buffer: ReplayBuffer) -> None:
    assert (await buffer.cursor("math")).state is None
    assert await buffer.draw("math", rows(0, 1), group_size=2, moves=0, cursor={"offset": 2}) == [1, 2]
    with pytest.raises(CursorConflictError, match="the dataset cursor of task 'math' was moved by another sampler; use one sampler"):
        await buffer.draw("math", rows(7, 8), group_size=2, moves=0, cursor={"offset": 9})
    cursor = await buffer.cursor("math")
    assert (cursor.moves, cursor.state) == (1, {"offset": 2})
    assert await buffer.draw("math", [], group_size=2, moves=1, cursor={"offset": 3}) == []
    assert (await buffer.cursor("math")).moves == 2
    assert (await buffer.audit()).drawn == {"math": 2}


async def test_of_many_samplers_at_once_one_draws(buffer: ReplayBuffer) -> None:
    async with asyncio.TaskGroup() as tasks:
        draws = [tasks.create_task(_outcome(buffer.draw("math", rows(n), group_size=1, moves=0, cursor={"offset": n}))) for n in range(8)]
    assert [type(task.result()) for task in draws] == [type(None)] + [CursorConflictError] * 7
    assert len(await buffer.query()) == 1


async def test_a_row_that_cannot_be_run_is_recorded_as_failed(buffer: ReplayBuffer) -> None:
    bad = [DrawnRow({"question": "?"}, Position(0, 1), "the row has no prompt"), DrawnRow(7, Position(0, 2), "no mapping")]
    await buffer.draw("math", [*rows(0), *bad], group_size=2, moves=0, cursor={})
    assert [group.status for group in await buffer.query()] == [Status.PENDING, Status.FAILED, Status.FAILED]
    assert [r.error for r in (await buffer.get(2)).rollouts] == ["the row has no prompt"] * 2
    assert (await buffer.get(3)).rollouts[0].row == {"value": "7"}


async def test_what_is_drawn_and_started_is_as_what_is_drawn_and_then_started(buffer: ReplayBuffer) -> None:
    (apart,) = await buffer.start(await buffer.draw("math", rows(0), group_size=2, moves=0, cursor={}))
    bad = DrawnRow({"question": "?"}, Position(0, 1), "the row has no prompt")
    other = DrawnRow({"prompt_ids": [7, 8], "answer": "ä"}, Position(0, 3))
    together, encoded = await buffer.draw_and_start("math", [bad, *rows(2), other], group_size=2, moves=1, cursor={"offset": 4})
    assert (apart.group_id, together.group_id) == (1, 3)
    assert together.statuses == apart.statuses == [Status.RUNNING] * 2
    assert [plain(group) for group in (apart, together, encoded)] == [plain(await buffer.get(group_id)) for group_id in (1, 3, 4)]
    assert (together.position, together.rollouts[0].row) == (Position(0, 2), rows(2)[0].row)
    steps = [[(step.source, step.target) for step in await buffer.history(group.group_id)] for group in (apart, together)]
    assert steps == [[(None, Status.PENDING), (Status.PENDING, Status.RUNNING)]] * 2
    assert {status: n for status, n in (await buffer.counts("math")).items() if n} == {Status.RUNNING: 3, Status.FAILED: 1}
    assert (await buffer.get(2)).status is Status.FAILED
    with pytest.raises(CursorConflictError):
        await buffer.draw_and_start("math", rows(4), group_size=2, moves=1, cursor={})
    await buffer.release([1, 3, 4])


async def test_a_cancelled_draw_that_starts_gives_its_groups_back_with_the_cursor_behind_them(buffer: ReplayBuffer) -> None:
    moment, given = 0, None
    while given is None:
        moves = (await buffer.cursor("math")).moves
        given = await _cut_short(buffer.draw_and_start("math", rows(moment), group_size=2, moves=moves, cursor={"offset": moment}), moment)
        await buffer.commit(0)  # through the mailbox, behind the giving back
        cursor = await buffer.cursor("math")
        assert await buffer.count("math", "running") == (0 if given is None else 1)
        assert (await buffer.audit()).drawn.get("math", 0) == cursor.moves
        tried, moment = moment, 2 * moment + 1
    assert cursor.state == {"offset": tried}


async def test_a_row_without_a_prompt_draws_nothing(buffer: ReplayBuffer) -> None:
    with pytest.raises(ValueError, match="the row has no prompt"):
        await buffer.draw("math", [*rows(0), DrawnRow({"q": 1}, Position(0, 1))], group_size=1, moves=0, cursor={})
    assert (await buffer.cursor("math")).moves == 0
    assert await buffer.query() == []


async def test_starting_what_runs_already_is_refused_and_starts_none(buffer: ReplayBuffer) -> None:
    first, second = await draw(buffer, 0, 1)
    await buffer.start([first])
    with pytest.raises(IllegalTransitionError, match=f"group {first} of task 'math' is running and cannot become running"):
        await buffer.start([second, first])
    assert (await buffer.get(second)).status is Status.PENDING
    assert await buffer.start([]) == []
    await buffer.release([])


async def test_releasing_what_does_not_run_is_refused(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1))
    with pytest.raises(IllegalTransitionError, match="group 1 of task 'math' is completed and cannot become interrupted"):
        await buffer.release([1])


# -- cancellation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", range(12))
async def test_a_cancelled_put_is_stored_all_the_same(buffer: ReplayBuffer, moment: int) -> None:
    task = asyncio.get_running_loop().create_task(buffer.put(a_group(1)))
    await turns(1 + moment)
    task.cancel()
    await asyncio.wait([task])
    await buffer.put(a_group(2))  # behind it in the mailbox
    assert ids(await buffer.query()) == [1, 2]


async def test_a_cancelled_take_gives_the_groups_back_in_their_order(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n) for n in range(1, 5)])
    given = None
    for moment in range(100_000):
        given = await _cut_short(buffer.take("math", 3, step=1), moment)
        if given is not None:
            break
        await buffer.commit(0)  # through the mailbox, behind the giving back
        assert await buffer.count("math", "completed") == 4
    assert given == [1, 2, 3]
    assert moment > 2, "the take was cut short at several of its turns"


async def _cut_short(hand_out: object, moment: int) -> list[int] | None:
    """What it handed out, or None where it was cancelled after `moment` turns of the loop, which it had not survived."""
    task = asyncio.get_running_loop().create_task(hand_out)  # type: ignore[arg-type]
    while moment > 0 and not task.done():
        moment -= 1
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    return None if task.cancelled() else ids(task.result())


async def test_a_cancelled_claim_or_start_gives_the_groups_back(buffer: ReplayBuffer) -> None:
    drawn = await draw(buffer, 0, 1, 2)
    for ask in (lambda: buffer.start(drawn), lambda: buffer.claim("math", 3, statuses=[Status.PENDING, Status.INTERRUPTED])):
        moment, given = 0, None
        while given is None:
            given = await _cut_short(ask(), moment)
            moment += 1
            await buffer.commit(0)  # through the mailbox, behind the giving back
            assert await buffer.count("math", "running") == (0 if given is None else 3)
        assert sorted(given) == drawn
        await buffer.release(drawn)


@pytest.mark.sqlite  # on a server minutes: the loop that never idles takes the interpreter from the writer at every answer
async def test_many_takers_cancelled_at_all_moments_lose_nothing_and_double_nothing(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, size=1) for n in range(1, 201)])
    generator, given = np.random.default_rng(0), []
    while await buffer.count("math", "completed"):
        async with asyncio.TaskGroup() as tasks:
            moments = generator.integers(0, 300, size=8)
            asked = [tasks.create_task(_cut_short(buffer.take("math", 3, step=1), int(moment))) for moment in moments]
            asked.append(tasks.create_task(_cut_short(buffer.take("math", 1, step=1), 10**9)))
        given += [group_id for task in asked for group_id in task.result() or []]
        await buffer.commit(0)
    assert sorted(given) == list(range(1, 201))


async def test_a_take_given_back_does_not_touch_what_another_took_after_a_rewind(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1))
    loop = asyncio.get_running_loop()
    # In one turn of the loop all four are in the mailbox, in this order; the first is cancelled after the others were asked.
    first = loop.create_task(buffer.take("math", 1, step=1))
    await turns(1)
    resumed, second = loop.create_task(buffer.resume(step=0)), loop.create_task(buffer.take("math", 1, step=1))
    await turns(1)
    first.cancel()
    await asyncio.wait([first, resumed, second])
    await buffer.commit(0)
    assert first.cancelled()
    assert ids(second.result()) == [1]
    assert (await buffer.get(1)).status is Status.CONSUMED


# -- closing -------------------------------------------------------------------------------------------------------------


async def test_what_was_asked_for_before_closing_is_done(tmp_path: Path, backend: str) -> None:
    buffer, loop = ReplayBuffer.open(url(tmp_path)), asyncio.get_running_loop()
    async with buffer:
        await put_all(buffer, [a_group(n) for n in range(1, 4)])
        puts = [loop.create_task(buffer.put(a_group(n))) for n in range(10, 20)]
        take, lost = loop.create_task(buffer.take("math", 1, step=1)), loop.create_task(buffer.take("math", 2, step=1))
        await turns(1)
        lost.cancel()
    assert [put.result() for put in puts] == [None] * 10
    assert ids(take.result()) == [1]
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert await buffer.count("math", "completed") == 12, "the cancelled take gave back its groups before the buffer closed"
        assert (await buffer.audit()).ok
    if backend == "sqlite":
        assert set(os.listdir(tmp_path)) == {"run.db", "run.db.lock"}, "nothing is left beside the file"


@pytest.mark.parametrize("moment", [1, 2, 5, 50])
async def test_a_cancelled_close_still_closes(tmp_path: Path, moment: int) -> None:
    buffer, loop = ReplayBuffer.open(url(tmp_path)), asyncio.get_running_loop()
    await buffer.__aenter__()
    puts = [loop.create_task(buffer.put(a_group(n))) for n in range(1, 20)]
    await turns(1)
    closing = loop.create_task(buffer.close())
    await turns(moment)
    closing.cancel()
    closing.cancel()
    await asyncio.wait([closing])
    assert all(put.done() for put in puts)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("millrace")]
    await buffer.close()
    async with ReplayBuffer.open(url(tmp_path)) as again:
        assert await again.count("math", "completed") == 19


@pytest.mark.parametrize("moment", [0, 1, 2, 3, 8, 30])
async def test_a_cancelled_opening_lets_go_of_the_file(tmp_path: Path, moment: int) -> None:
    opening = asyncio.get_running_loop().create_task(ReplayBuffer.open(url(tmp_path)).__aenter__())
    await turns(moment)
    opening.cancel()
    await asyncio.wait([opening])
    if not opening.cancelled():
        await opening.result().close()
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await buffer.put(a_group(1))


async def test_a_buffer_that_is_not_open_says_so(tmp_path: Path) -> None:
    buffer = ReplayBuffer.open(url(tmp_path))
    asks = (
        lambda: buffer.put(a_group(1)),
        lambda: buffer.take("math", 1, step=1),
        lambda: buffer.count("math", "completed"),
        lambda: buffer.cursor("math"),
        lambda: buffer.start([1]),
        lambda: buffer.audit(),
        lambda: buffer.commit(1),
    )
    for ask in asks:
        with pytest.raises(BufferClosedError, match=r"the buffer is not open; use `async with ReplayBuffer\.open"):
            await ask()
    async with buffer:
        await buffer.put(a_group(1))
        with pytest.raises(ReplayBufferError, match="this buffer is open already"):
            await buffer.__aenter__()
        assert await buffer.count("math", "completed") == 1, "a second entry does not disturb the first"
    await buffer.close()
    for ask in asks:
        with pytest.raises(BufferClosedError, match="the buffer is not open"):
            await ask()
    async with buffer:
        assert await buffer.count("math", "completed") == 1, "it may be opened again"


async def test_another_event_loop_is_refused(buffer: ReplayBuffer) -> None:
    for ask in (lambda: buffer.put(a_group(1)), lambda: buffer.count("math", "completed"), lambda: buffer.take("math", 1, step=1)):
        with pytest.raises(ReplayBufferError, match="opened on another event loop"):
            await asyncio.to_thread(asyncio.run, ask())
    assert await buffer.query() == []


async def test_a_read_only_buffer_writes_nothing(buffer: ReplayBuffer, tmp_path: Path) -> None:
    await buffer.put(a_group(1))
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as reader:
        for ask in (reader.put(a_group(2)), reader.take("math", 1, step=1), reader.commit(1), reader.resume(1), reader.release([1])):
            with pytest.raises(ReplayBufferError, match="opened with read_only=True; open it without to write"):
                await ask
        assert (await reader.cursor("math")).moves == 0
        await buffer.put(a_group(2))
        assert await reader.count("math", "completed") == 2, "it sees what the writer stored since"


def test_a_group_without_trainable_tokens_is_stored_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with ReplayBuffer.open(url(tmp_path)) as buffer:
            for group_id in (1, 2):
                rollout = RolloutState(group_id, 0, "math", Status.COMPLETED)
                if group_id == 2:
                    rollout.append([1], trainable=False)
                await buffer.put(RolloutGroup(group_id, [rollout], "math"))
            await buffer.put(a_group(3))
            assert len(await buffer.take("math", 3, step=1, policy=StalestFirst())) == 3

    asyncio.run(main())  # a loop of its own: the first of the process or the second, a buffer does not mind


async def test_a_failed_group_made_by_hand_keeps_what_is_known_of_it(buffer: ReplayBuffer) -> None:
    group = RolloutGroup(5, [RolloutState(5, 0, "math", Status.FAILED, error="no answer", row={"prompt": "p"})], "math")
    group.rollouts[0].metrics, group.rollouts[0].messages = {"tries": 3.0}, [{"role": "tool", "content": "timeout"}]
    await buffer.put(group)
    assert plain(await buffer.get(5)) == plain(group)
    assert (await buffer.history(5))[0].reason == "no answer"
