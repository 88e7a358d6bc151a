"""Shows that a task's account adds up (generated = trained + waiting + wasted, by reason) over everything that a run does, and that
the biases are 0 where what is trained on is what was drawn."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer import Position, ReplayBuffer, RolloutGroup, Status
from buffer.accounts import WASTE, length_bias
from buffer.amounts import Amount
from tests.buffer.groups import a_group, draw, fill, finished, put_all, url

pytestmark = pytest.mark.usefixtures("backend")

S = Status


async def claimed(buffer: ReplayBuffer, n: int, *statuses: Status) -> list[RolloutGroup]:
    return await buffer.claim("math", n, statuses=statuses or [S.PENDING])


def wasted(**reasons: int) -> dict[str, int]:
    return dict.fromkeys(WASTE, 0) | reasons


def stopped(group: RolloutGroup, tokens: int, *, keep: bool = True) -> RolloutGroup:
    """As a strategy stores it that interrupts its first member after so many tokens; the others had none yet."""
    group.rollouts[0].append(range(tokens), logprobs=[-0.5] * tokens)
    for rollout in group.rollouts:
        rollout.status = S.INTERRUPTED
        if not keep:
            rollout.reset()
    return group


async def test_a_task_that_sampled_nothing_has_an_empty_account(buffer: ReplayBuffer) -> None:
    await draw(buffer, 0, 1)
    account = await buffer.account("math")
    assert (account.generated, account.wasted, account.length_bias, account.coverage_bias) == (0, wasted(), None, None)


async def test_every_token_is_trained_waiting_or_wasted(buffer: ReplayBuffer) -> None:
    await draw(buffer, *range(8))
    done, kept, dropped, failed, rejected, running, *_ = await claimed(buffer, 8)
    await buffer.put(finished(done))  # 2 members of 3 tokens
    await buffer.put(stopped(kept, 5))
    await buffer.put(stopped(dropped, 7, keep=False))
    fill(failed.rollouts[0], 4)
    failed.rollouts[0].status = failed.rollouts[1].status = S.FAILED
    await buffer.put(failed)
    finished(rejected).mark(S.FILTERED, reason="too easy")
    await buffer.put(rejected)
    running.rollouts[0].append(range(2), logprobs=[-0.5] * 2)
    await buffer.checkpoint(running)
    account = await buffer.account("math")
    assert account.wasted == wasted(interrupted=7, failed=4, filtered=6)
    assert (account.trained, account.waiting) == (Amount(), Amount(6 + 5 + 2, 2, 6))
    await buffer.take("math", 1, step=1)
    account = await buffer.account("math")
    assert (account.trained, account.waiting, account.generated) == (Amount(6, 2, 6), Amount(7), 30)


async def test_what_expires_is_wasted_and_still_counts_as_drawn(buffer: ReplayBuffer) -> None:
    await put_all(
        buffer, [a_group(1, tokens=10, version=0), a_group(2, tokens=2, version=5), a_group(3, S.INTERRUPTED, tokens=1, version=0)]
    )
    assert await buffer.expire("math", version=5, max_staleness=2) == 2
    account = await buffer.account("math")
    assert (account.wasted, account.waiting) == (wasted(stale=22), Amount(4, 2, 4))
    assert account.finished.mean_length == (10 + 10 + 2 + 2 + 1 + 1) / 6, "long ones that were dropped were drawn all the same"
    await buffer.take("math", 1, step=1, version=5)
    assert (await buffer.account("math")).length_bias == pytest.approx(2 / (26 / 6) - 1)


async def test_members_that_expire_later_in_an_expired_group_are_wasted_too(buffer: ReplayBuffer) -> None:
    group = a_group(1, tokens=4, version=0)
    fresh = group.rollouts[1]
    fresh.reset()
    fresh.dropped = Amount()
    fill(fresh, 6, version=3)
    await buffer.put(group)
    await buffer.expire("math", version=3, max_staleness=2)
    assert (await buffer.account("math")).wasted == wasted(stale=4)
    await put_all(buffer, [a_group(2, version=3)])
    await buffer.take("math", 1, step=1, version=2)
    await buffer.resume(step=0, future="expire")  # to version 2: what version 3 sampled is undone, in the expired group too
    account = await buffer.account("math")
    assert (account.wasted, account.waiting, account.generated) == (wasted(stale=4, undone=6 + 6), Amount(), 16)


async def test_a_rewind_gives_back_and_commit_and_prune_change_nothing(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, tokens=n) for n in range(1, 7)])
    for step in (1, 2, 3):
        await buffer.take("math", 2, step=step)
    before = await buffer.account("math")
    await buffer.commit(2)
    await buffer.prune(keep_steps=0, rows=True)
    assert await buffer.account("math") == before
    assert before.trained == Amount(42, 12, 42)
    await buffer.resume(step=2)
    account = await buffer.account("math")
    assert (account.trained, account.waiting, account.generated) == (Amount(20, 8, 20), Amount(22, 4, 22), 42)


async def test_an_account_survives_a_restart_and_goes_with_a_fork(tmp_path: Path, backend: str) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await draw(buffer, 0, 1, 2)
        first, second, _ = await claimed(buffer, 3)
        await buffer.put(stopped(first, 7, keep=False))
        await buffer.put(finished(second))
        await buffer.take("math", 1, step=1)
        before = await buffer.account("math")
        await buffer.fork(url(tmp_path, "fork.db"), step=1)
    for name in ("run.db", "fork.db"):
        async with ReplayBuffer.open(url(tmp_path, name)) as again:
            await again.resume(step=1)
            assert await again.account("math") == before
            assert (await again.audit()).problems == []


async def test_a_response_that_a_loop_begins_anew_is_told_apart(buffer: ReplayBuffer) -> None:
    await draw(buffer, 0)
    (group,) = await claimed(buffer, 1)
    group.rollouts[0].append(range(9), logprobs=[-0.5] * 9)
    group.rollouts[0].reset()
    await buffer.put(finished(group))
    assert (await buffer.account("math")).wasted == wasted(restarted=9)
    assert group.rollouts[0].dropped == Amount(), "what was told is not told again"


async def test_a_failed_group_that_runs_again_waits_again(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1, S.FAILED, tokens=5))
    assert (await buffer.account("math")).wasted == wasted(failed=10)
    (group,) = await claimed(buffer, 1, S.FAILED)
    account = await buffer.account("math")
    assert (account.wasted, account.waiting.tokens) == (wasted(), 10)
    for rollout in group.rollouts:
        rollout.status = S.COMPLETED
    await buffer.put(group)
    assert (await buffer.account("math")).waiting.tokens == 10


async def test_coverage_tells_of_prompts_that_others_overtook(buffer: ReplayBuffer) -> None:
    await draw(buffer, *range(12))
    groups = await claimed(buffer, 12)
    for group in groups[1:]:  # the first is slow: it runs on
        await buffer.put(finished(group))
    for step in range(1, 6):
        await buffer.take("math", 2, step=step)
    # Two steps before the last, the newest prompt that was trained on is the 7th: six of seven were.
    account = await buffer.account("math", window=2)
    assert (account.overdue, account.cohort, account.untrained, account.coverage_bias) == (1, 7, 1, 1 / 7)
    assert (await buffer.account("math", window=5)).coverage_bias is None, "there was no batch so long ago"
    await buffer.put(finished(groups[0]))
    await buffer.take("math", 2, step=6)
    account = await buffer.account("math", window=3)
    assert (account.overdue, account.cohort, account.coverage_bias) == (0, 7, 0.0)


async def test_coverage_counts_failures_and_leaves_filtered_prompts_out(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, position=Position(0, n)) for n in (1, 4)])
    await put_all(buffer, [a_group(2, S.FAILED), a_group(3, S.FILTERED)])
    for step in (1, 2):
        await buffer.take("math", 1, step=step)
    account = await buffer.account("math", window=0)
    assert (account.overdue, account.cohort, account.untrained) == (0, 3, 1)


async def test_members_that_are_left_out_are_wasted_and_count_as_drawn(buffer: ReplayBuffer) -> None:
    group = a_group(1, tokens=2)
    long = group.rollouts[1]
    long.append(range(6), logprobs=[-0.5] * 6)
    long.error, long.score, long.reward = "TimeoutError: the judge took 30 s", None, None
    await buffer.put(group)
    assert (await buffer.account("math")).waiting == Amount(10, 1, 2)
    await buffer.take("math", 1, step=1)
    account = await buffer.account("math")
    assert (account.trained, account.wasted, account.finished) == (Amount(2, 1, 2), wasted(left_out=8), Amount(10, 2, 10))
    assert account.length_bias == pytest.approx(2 / 5 - 1)


async def test_a_response_that_is_left_out_counts_as_drawn_once_however_often_its_group_is_stored(buffer: ReplayBuffer) -> None:
    await draw(buffer, 0)
    (group,) = await claimed(buffer, 1)
    failed, other = group.rollouts
    fill(failed, 8, version=5)
    failed.status, failed.error, failed.score, failed.reward = S.COMPLETED, "TimeoutError: the judge took 30 s", None, None
    other.append(range(2), logprobs=[-0.5] * 2)
    other.status = S.INTERRUPTED
    await buffer.put(group)
    (again,) = await claimed(buffer, 1, S.INTERRUPTED)
    await buffer.put(finished(again))
    drawn_once = Amount(8 + 5, 2, 8 + 5)
    assert (await buffer.account("math")).finished == drawn_once
    assert await buffer.expire("math", version=5, max_staleness=2) == 1
    assert (await buffer.account("math")).finished == Amount(8 + 5, 1, 5), "until its group is whole again"
    (once_more,) = await claimed(buffer, 1, S.EXPIRED)
    assert [state.left_out for state in once_more.rollouts] == [True, False]
    await buffer.put(finished(once_more, version=5))
    account = await buffer.account("math")
    assert account.finished == drawn_once + Amount(3, 1, 3), "what is sampled anew is another response"
    assert account.wasted == wasted(stale=5)


async def test_tasks_have_accounts_of_their_own(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(1), a_group(2, task_name="code", tokens=9), a_group(3, S.FILTERED, task_name="code")])
    math, code = await buffer.account("math"), await buffer.account("code")
    assert (math.generated, math.wasted) == (6, wasted())
    assert (code.generated, code.wasted) == (24, wasted(filtered=6))
    assert (await buffer.account("none")).generated == 0


AMOUNTS = st.builds(lambda lengths: Amount(sum(lengths), len(lengths), sum(lengths)), st.lists(st.integers(0, 10**6), max_size=20))


@given(AMOUNTS)
def test_the_same_responses_have_no_bias(amount: Amount) -> None:
    assert length_bias(amount, amount) in (None, 0.0)


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=20))
def test_leaving_out_the_longest_is_a_bias_below_0(lengths: list[int]) -> None:
    everything = Amount(sum(lengths), len(lengths), sum(lengths))
    short = sorted(lengths)[:-1]
    bias = length_bias(Amount(sum(short), len(short), sum(short)), everything)
    assert bias is not None
    assert bias <= 1e-12
    if len(set(lengths)) > 1:
        assert bias < 0
