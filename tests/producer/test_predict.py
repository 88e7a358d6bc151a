"""Prompts come by the lengths of earlier epochs, none waits for ever, and none is lost or done twice, also across a restart."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer import Position, ReplayBuffer, RolloutGroup, RolloutState, Status
from producer import LongestPredictedFirst, ReplayPromptSampler, SimilarPredictedTogether, SortedWindows
from producer.lookahead import Lookahead
from producer.predict import PromptOrder, Waiting, known_lengths, predicted_length, remaining

lengths = st.lists(st.none() | st.floats(0, 1e4), max_size=30)
orders = (
    st.builds(LongestPredictedFirst, st.integers(1, 5), st.none() | st.integers(0, 9))
    | st.builds(SimilarPredictedTogether, st.integers(1, 5))
    | st.builds(SortedWindows, st.integers(1, 20))
)


def waiting(*predicted: float | None) -> list[Waiting]:
    return [Waiting(group_id, length, 0, group_id) for group_id, length in enumerate(predicted)]


# -- pure -------------------------------------------------------------------------------------------------------


def test_the_longest_come_first_and_ties_as_they_were_drawn() -> None:
    assert LongestPredictedFirst().choose(waiting(5, 9, 5, 20), 3) == [3, 1, 0]


def test_the_unknown_count_as_the_mean_and_nothing_known_keeps_the_order() -> None:
    assert LongestPredictedFirst().choose(waiting(10, None, 30, None), 4) == [2, 1, 3, 0]
    assert LongestPredictedFirst().choose(waiting(None, None, None), 2) == [0, 1]
    assert SimilarPredictedTogether().choose(waiting(None, None, None), 2) == [0, 1]
    assert known_lengths([None, 1.0, 3.0]) == [2.0, 1.0, 3.0]


def test_like_lengths_come_together_with_the_oldest_among_them() -> None:
    assert SimilarPredictedTogether().choose(waiting(10, 99, 12, 50, 11), 3) == [2, 4, 0]


def test_who_was_overtaken_too_often_is_next() -> None:
    late = [Waiting(0, 1.0, overtaken=4), Waiting(1, 50.0), Waiting(2, 2.0, overtaken=3), Waiting(3, 99.0)]
    assert LongestPredictedFirst(most_overtaken=4).choose(late, 3) == [0, 3, 1]
    assert LongestPredictedFirst(most_overtaken=3).choose(late, 3) == [0, 2, 3]


@given(orders, lengths, st.integers(0, 40))
def test_a_choice_is_as_many_as_are_wanted_each_once(order: PromptOrder, predicted: list[float | None], n: int) -> None:
    chosen = order.choose(waiting(*predicted), n)
    assert len(set(chosen)) == len(chosen) == min(n, len(predicted))
    assert set(chosen) <= set(range(len(predicted)))


def test_a_prediction_is_the_geometric_mean_of_earlier_epochs() -> None:
    assert predicted_length([]) is None
    assert predicted_length([10.0, 1000.0]) == pytest.approx(100.0)
    assert predicted_length([0.0]) == 1.0


def test_what_remains_is_counted_over_the_unfinished_members() -> None:
    members = [RolloutState(1, index) for index in range(3)]
    members[0].append(range(10), logprobs=[0.0] * 10)
    members[0].finish_reason = "stop"
    members[1].append(range(4), logprobs=[0.0] * 4)
    members[2].append(range(30), logprobs=[0.0] * 30)
    assert remaining(20.0, RolloutGroup(1, members)) == 16.0


@given(orders, st.lists(st.integers(1, 6), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_no_prompt_is_overtaken_much_more_than_allowed(order: PromptOrder, wanted: list[int], chance: random.Random) -> None:
    lookahead, drawn, started = Lookahead(order), 0, list[int]()
    held: dict[int, Position | None] = {}
    for n in wanted:
        if missing := lookahead.missing(n):
            held |= {drawn + at: Position(0, drawn + at) for at in range(missing)}
            drawn += missing
            lookahead.update(held)
            lookahead.predict({group_id: chance.lognormvariate(3, 2) for group_id in lookahead.unpredicted() if chance.random() < 0.8})
        chosen = lookahead.choose(n)
        assert len(chosen) == n
        lookahead.gone(chosen)
        for group_id in chosen:
            del held[group_id]
        started += chosen
    allowed = most_overtaken(order, max(wanted))
    for at, group_id in enumerate(started):
        assert sum(other > group_id for other in started[:at]) <= allowed
    for group_id in held:
        assert sum(other > group_id for other in started) <= allowed


def most_overtaken(order: PromptOrder, most_wanted: int) -> float:
    """By how many later ones a prompt may be overtaken; of like lengths together only the oldest is sure of its place."""
    if isinstance(order, SortedWindows):
        return order.prompts - 1
    if isinstance(order, LongestPredictedFirst):
        return (order.window * most_wanted if order.most_overtaken is None else order.most_overtaken) + 2 * most_wanted
    return float("inf")


def test_windows_are_sorted_every_other_one_the_other_way_round() -> None:
    assert SortedWindows(3).choose(waiting(5, 9, 7, 4, 8, 6, 1), 7) == [1, 2, 0, 3, 5, 4, 6]
    assert SortedWindows(3).choose(waiting(5, 9, 7, 4, 8, 6, 1), 4) == [1, 2, 0, 3]


@given(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_windows_does_not_depend_on_how_many_are_wanted_at_a_time(
    prompts: int, wanted: list[int], chance: random.Random
) -> None:
    predicted = [chance.random() for _ in range(sum(wanted) + prompts)]
    order, left, started = SortedWindows(prompts), waiting(*predicted), list[int]()
    for n in wanted:
        whole_windows = order.least(len(started), n, n)
        assert whole_windows >= n
        assert (len(started) + whole_windows) % prompts == 0
        started += (chosen := order.choose(left[:whole_windows], n))
        left = [each for each in left if each.group_id not in chosen]
    assert started == order.choose(waiting(*predicted), sum(wanted))


class AnyOrder:
    """Chooses as chance has it, and checks how often each that waits was overtaken."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.started = chance, list[int]()

    def least(self, started: int, n: int, most_wanted: int) -> int:
        return 2 * most_wanted

    def ahead(self, started: int, n: int, most_wanted: int) -> int:
        return 3 * most_wanted

    def choose(self, waiting: Sequence[Waiting], n: int) -> list[int]:
        for group in waiting:
            assert group.overtaken == sum(other > group.group_id for other in self.started)
        chosen = self.chance.sample([group.group_id for group in waiting], n)
        self.started += chosen
        return chosen


@given(st.lists(st.integers(1, 5), max_size=30), st.randoms(use_true_random=False))
def test_those_that_went_ahead_are_counted(wanted: list[int], chance: random.Random) -> None:
    order, held, drawn = AnyOrder(chance), dict[int, Position | None](), 0
    lookahead = Lookahead(order)
    for n in wanted:
        if missing := lookahead.missing(n):
            new = range(drawn, drawn + missing)
            held |= {group_id: Position(0, group_id) for group_id in new}
            drawn += len(new)
            lookahead.update(held)
        chosen = lookahead.choose(n)
        lookahead.gone(chosen)
        held = {group_id: at for group_id, at in held.items() if group_id not in chosen}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_with_like_lengths_together_the_oldest_never_waits(wanted: list[int], chance: random.Random) -> None:
    group = [Waiting(group_id, chance.random()) for group_id in range(200)]
    for n in wanted:
        chosen = SimilarPredictedTogether().choose(group, n)
        assert group[0].group_id in chosen
        group = [each for each in group if each.group_id not in chosen]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LongestPredictedFirst(window=0), "window=0"),
        (lambda: SimilarPredictedTogether(window=0), "window=0"),
        (lambda: SortedWindows(0), "prompts=0"),
        (lambda: LongestPredictedFirst(most_overtaken=-1), "most_overtaken=-1"),
    ],
)
def test_bad_windows_are_refused(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


# -- from the database ------------------------------------------------------------------------------------------


def rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt_ids": [1], "number": number} for number in range(n)]


def numbers(groups: list[RolloutGroup]) -> list[int]:
    return [group.rollouts[0].row["number"] for group in groups]


async def finish(buffer: ReplayBuffer, groups: list[RolloutGroup]) -> None:
    """Responses of as many tokens as ten times the number of the prompt, and one."""
    for group in groups:
        for state in group.rollouts:
            tokens = 10 * state.row["number"] + 1
            state.append([7] * tokens, logprobs=[0.0] * tokens)
            state.finish_reason, state.status, state.reward, state.score = "stop", Status.COMPLETED, 1.0, 1.0
        await buffer.put(group)


def a_sampler(buffer: ReplayBuffer, order: PromptOrder | None, n: int = 12) -> ReplayPromptSampler:
    return ReplayPromptSampler(rows(n), buffer, group_size=2, order=order)


async def test_in_the_second_epoch_the_longest_of_the_first_come_first(buffer: ReplayBuffer) -> None:
    sampler = a_sampler(buffer, LongestPredictedFirst(window=3))
    first = await a_sampler(buffer, None).sample_many("default", 12)
    await finish(buffer, first)
    second = await sampler.sample_many("default", 4)
    assert numbers(second) == [11, 10, 9, 8], "twelve were drawn ahead, the four longest are started"
    assert (await buffer.counts("default"))[Status.PENDING] == 8
    assert {group.position.epoch for group in second if group.position} == {1}


async def test_like_lengths_make_a_batch(buffer: ReplayBuffer) -> None:
    await finish(buffer, await a_sampler(buffer, None).sample_many("default", 12))
    sampler = a_sampler(buffer, SimilarPredictedTogether(window=3))
    batches = [sorted(numbers(await sampler.sample_many("default", 4))) for _ in range(2)]
    assert all(batch[-1] - batch[0] <= 6 for batch in batches), batches


async def test_a_window_is_started_longest_first_one_at_a_time(buffer: ReplayBuffer) -> None:
    await finish(buffer, await a_sampler(buffer, None).sample_many("default", 12))
    sampler = a_sampler(buffer, SortedWindows(6))
    started = [numbers([await sampler.sample("default")])[0] for _ in range(12)]
    assert started[:6] == sorted(started[:6], reverse=True)
    assert started[6:] == sorted(started[6:])
    assert sorted(started) == list(range(12))
    assert (await buffer.counts("default"))[Status.PENDING] == 0, "the next window is drawn when it is wanted"


async def test_what_was_drawn_ahead_is_there_after_a_restart(url: str) -> None:
    async with ReplayBuffer.open(url) as buffer:
        await finish(buffer, await a_sampler(buffer, None).sample_many("default", 12))
        order = LongestPredictedFirst(window=3)
        started = await a_sampler(buffer, order).sample_many("default", 4)
    async with ReplayBuffer.open(url) as buffer:
        assert (await buffer.counts("default"))[Status.PENDING] == 8
        sampler = a_sampler(buffer, order)
        moves = (await buffer.cursor("default")).moves
        again = await sampler.sample_many("default", 4)
        assert (await buffer.cursor("default")).moves == moves, "nothing was drawn"
        assert numbers(again) == numbers(started), "they were given back when the buffer was closed"
        ahead = set(await buffer.positions("default", Status.PENDING))
        rest = [group.group_id for _ in range(12) for group in await sampler.sample_many("default", 4)]
        assert ahead <= set(rest), "none is overtaken for ever"
        everything = {group.position for group in await buffer.query(limit=100)}
        assert len(everything) == sum((await buffer.counts("default")).values()), "each place of the stream once"
        assert (await buffer.audit()).ok


async def test_every_prompt_of_an_epoch_comes_once_whatever_is_wanted_at_a_time(buffer: ReplayBuffer) -> None:
    chance, sampler, seen = random.Random(3), a_sampler(buffer, LongestPredictedFirst(window=2)), list[Position]()
    while len(seen) < 60:
        groups = await sampler.sample_many("default", chance.randint(1, 5))
        await finish(buffer, groups)
        seen += [group.position for group in groups if group.position is not None]
    assert len(set(seen)) == len(seen)
    assert {Position(0, offset) for offset in range(12)} <= set(seen)


async def test_continued_groups_come_by_what_they_have_still_to_decode(buffer: ReplayBuffer) -> None:
    await finish(buffer, await a_sampler(buffer, None).sample_many("default", 12))
    sampler = a_sampler(buffer, LongestPredictedFirst(window=3))
    groups = await sampler.sample_many("default", 3)
    assert numbers(groups) == [11, 10, 9]
    for kept, group in zip((100, 0, 20), groups, strict=True):
        for state in group.rollouts:
            state.append([7] * kept, logprobs=[0.0] * kept)
            state.status = Status.INTERRUPTED
        await buffer.put(group)
    assert numbers(await sampler.sample_many("default", 4)) == [10, 9, 11, 8]


async def test_what_another_took_meanwhile_is_passed_over(buffer: ReplayBuffer) -> None:
    sampler = a_sampler(buffer, LongestPredictedFirst(window=3))
    first = await sampler.sample_many("default", 2)
    pending = list(await buffer.positions("default", Status.PENDING))
    taken = await buffer.claim("default", 3, statuses=[Status.PENDING], among=pending[:3])
    others = await sampler.sample_many("default", 5)
    ids = [group.group_id for group in [*first, *taken, *others]]
    assert len(set(ids)) == len(ids) == 10


async def test_an_order_needs_pending_groups(buffer: ReplayBuffer) -> None:
    with pytest.raises(ValueError, match="chooses among pending groups"):
        ReplayPromptSampler(rows(2), buffer, replay=(Status.INTERRUPTED,), order=LongestPredictedFirst())
    with pytest.raises(TypeError, match="order='longest' is none"):
        ReplayPromptSampler(rows(2), buffer, order="longest")  # type: ignore[arg-type]


async def test_cancelling_a_choice_anywhere_loses_nothing_and_draws_nothing_twice(buffer: ReplayBuffer) -> None:
    chance, sampler, held = random.Random(5), a_sampler(buffer, LongestPredictedFirst(window=3)), list[RolloutGroup]()
    for _ in range(60):
        task = asyncio.create_task(sampler.sample_many("default", chance.randint(1, 4)))
        for _ in range(int(2 ** chance.uniform(0, 9)) - 1):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            held += await task
        if held and chance.random() < 0.5:
            await finish(buffer, [held.pop()])
    await buffer.cursor("default")  # a write: done after those whose callers were cancelled
    counts, everything = await buffer.counts("default"), await buffer.query(limit=10_000)
    assert counts[Status.RUNNING] == len({group.group_id for group in held}) == len(held)
    positions = sorted(group.position for group in everything if group.position is not None)
    assert positions == [Position(n // 12, n % 12) for n in range(len(everything))], "each place of the stream exactly once"
    for epoch in range(len(everything) // 12):
        drawn = [group for group in everything if group.position is not None and group.position.epoch == epoch]
        assert sorted(numbers(drawn)) == list(range(12))
