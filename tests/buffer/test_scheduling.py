"""What a producer asks of the buffer to decide what runs next: who was left behind, and who was stopped most often."""

import pytest

from buffer import Position, ReplayBuffer, RolloutGroup, StalestFirst, Status
from buffer.staleness import NO_VERSION
from tests.buffer.groups import a_group, draw, ids, put_all

pytestmark = pytest.mark.usefixtures("backend")


def stopped(group_id: int, *interruptions: int, status: Status = Status.INTERRUPTED, task_name: str = "math") -> RolloutGroup:
    """A group whose members were stopped so often."""
    group = a_group(group_id, status, task_name=task_name, size=len(interruptions))
    for rollout, times in zip(group.rollouts, interruptions, strict=True):
        rollout.interruptions = times
    return group


async def test_left_behind_are_the_expired_and_those_stopped_often_enough(buffer: ReplayBuffer) -> None:
    await draw(buffer, 0, 1)  # pending groups 1 and 2 were not left behind
    often = [stopped(11, 1, 0), stopped(12, 0, 3), stopped(13, 2, 2)]
    others = [stopped(14, 5, status=Status.COMPLETED), stopped(15, 5, task_name="code"), stopped(16, 0, status=Status.EXPIRED)]
    await put_all(buffer, [*often, *others])
    assert [await buffer.tail_candidates("math", at_least) for at_least in (0, 1, 2, 3, 4)] == [4, 4, 3, 2, 1]
    assert await buffer.tail_candidates("code", 5) == 1
    assert await buffer.tail_candidates("none", 1) == 0
    await buffer.claim("math", 1, statuses=[Status.EXPIRED])
    assert await buffer.tail_candidates("math", 3) == 1, "what runs is not left behind"


async def test_claimed_first_are_those_stopped_most_often_ties_by_age(buffer: ReplayBuffer) -> None:
    await put_all(
        buffer, [stopped(11, 0, 1), stopped(12, 2, 2), stopped(13, 3, 0), stopped(14, 2, 1), stopped(15, 0, status=Status.EXPIRED)]
    )
    statuses = [Status.EXPIRED, Status.INTERRUPTED]
    first = await buffer.claim("math", 3, statuses=statuses, order="most_interrupted", exclude={13})
    assert ids(first) == [15, 12, 14]
    assert ids(await buffer.claim("math", 3, statuses=statuses)) == [11, 13]


async def test_each_time_a_group_is_given_back_counts(buffer: ReplayBuffer) -> None:
    first, second = await draw(buffer, 0, 1)
    for _ in range(2):
        await buffer.start([second])
        await buffer.release([second])
    await buffer.start([first])
    await buffer.release([first])
    assert await buffer.tail_candidates("math", 2) == 1
    assert ids(await buffer.claim("math", 2, statuses=[Status.INTERRUPTED], order="most_interrupted")) == [second, first]


async def test_what_waits_is_counted_by_its_oldest_version(buffer: ReplayBuffer) -> None:
    for group_id, version in enumerate((3, 1, 3, 2), 11):
        await buffer.put(a_group(group_id, version=version))
    await put_all(buffer, [a_group(21, Status.INTERRUPTED, version=2), a_group(22, Status.INTERRUPTED, tokens=0)])
    await put_all(buffer, [a_group(31, task_name="code"), a_group(32, Status.EXPIRED), a_group(33, Status.FILTERED)])
    waiting = {Status.COMPLETED: {1: 1, 2: 1, 3: 2}, Status.INTERRUPTED: {2: 1, NO_VERSION: 1}}
    assert await buffer.oldest_versions("math") == waiting
    assert await buffer.oldest_versions("none") == {Status.COMPLETED: {}, Status.INTERRUPTED: {}}
    await buffer.take("math", 2, step=1, policy=StalestFirst())
    assert (await buffer.oldest_versions("math"))[Status.COMPLETED] == {3: 2}


async def test_named_groups_are_claimed_in_the_order_given_where_they_still_wait(buffer: ReplayBuffer) -> None:
    first, second, third, fourth = await draw(buffer, 0, 1, 2, 3)
    await buffer.start([second])
    assert ids(await buffer.claim("math", 2, statuses=[Status.PENDING], among=[fourth, second, 999, first, third])) == [fourth, first]
    assert await buffer.claim("math", 2, statuses=[Status.PENDING], among=[]) == []
    assert await buffer.positions("math", Status.PENDING) == {third: Position(0, 2)}


async def test_lengths_of_responses_are_means_over_what_finished(buffer: ReplayBuffer) -> None:
    for group_id, status, tokens, position in [
        (11, Status.COMPLETED, 4, Position(0, 3)),
        (12, Status.FILTERED, 9, Position(0, 4)),
        (13, Status.INTERRUPTED, 7, Position(0, 5)),
        (14, Status.COMPLETED, 5, Position(1, 3)),
    ]:
        await buffer.put(a_group(group_id, status, tokens=tokens, position=position))
    uneven = a_group(15, tokens=2, position=Position(0, 6))
    uneven.rollouts[1].append([1], logprobs=[0.0])
    await buffer.put(uneven)
    asked = [Position(0, offset) for offset in range(3000)] + [Position(1, 3), Position(1, 4)]
    lengths = {Position(0, 3): 4.0, Position(0, 4): 9.0, Position(0, 6): 2.5, Position(1, 3): 5.0}
    assert await buffer.response_lengths("math", asked) == lengths
    await buffer.take("math", 3, step=1)
    await buffer.commit(1)
    await buffer.prune(keep_steps=0)
    assert await buffer.response_lengths("math", asked) == lengths, "also when the tokens are given up"
    assert await buffer.response_lengths("math", []) == await buffer.response_lengths("code", asked) == {}


async def test_an_order_or_a_number_that_is_none_is_refused(buffer: ReplayBuffer) -> None:
    with pytest.raises(ValueError, match="order='newest' is unknown; choose among"):
        await buffer.claim("math", 1, statuses=[Status.PENDING], order="newest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_interruptions=-1 must be a whole number"):
        await buffer.tail_candidates("math", -1)


async def test_lengths_are_told_by_prompt_over_epochs(buffer: ReplayBuffer) -> None:
    for group_id, (prompt, size, status) in enumerate(
        [("1", 3, "completed"), ("2", 5, "completed"), ("1", 4, "filtered"), ("3", 2, "interrupted")]
    ):
        group = a_group(group_id, status, size=2, tokens=size, position=Position(group_id // 2, group_id % 2))
        for state in group.rollouts:
            state.row = {"prompt": prompt}
            state.prompt = prompt
            if status == "interrupted":
                state.finish_reason = None
        await buffer.put(group)
    found = await buffer.lengths_by_prompt("math")
    assert list(found.values()) == [[3, 3, 4, 4], [5, 5]]
    assert await buffer.lengths_by_prompt("code") == {}
