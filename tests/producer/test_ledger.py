"""Shows that the ledger's figures are those of a schedule worked out by hand, and that they add up over any schedule."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer import Status
from producer.ledger import OTHER, Ledger, metric_name

S = Status


def test_a_schedule_by_hand() -> None:
    ledger = Ledger()
    ledger.started(1, at=10.0)
    ledger.rollouts(4, at=10.0)
    ledger.started(2, at=12.0)
    ledger.rollouts(8, at=12.0)
    ledger.ended(1, S.COMPLETED, 100, None, at=15.0)
    ledger.rollouts(4, at=15.0)
    ledger.ended(2, S.FAILED, 20, "TimeoutError: no answer within 30 s", at=16.0)
    ledger.rollouts(0, at=16.0)
    record = ledger.handed_out(asked=10.0, at=18.0)
    assert (record.period, record.waited, record.between) == (8.0, 8.0, None)
    assert (record.started, record.ended, record.tokens) == (2, {S.COMPLETED: 1, S.FAILED: 1}, 120)
    assert record.reasons == {(S.FAILED, "timeouterror"): 1}
    assert sorted(record.group_seconds) == [4.0, 5.0]
    # 4 for 2 s, 8 for 3 s, 4 for 1 s, none for 2 s.
    assert (record.in_flight, record.most_in_flight, record.busy) == ((8 + 24 + 4) / 8, 8, 6.0)
    assert record.engine is None


def test_what_an_error_ended_is_forgotten() -> None:
    ledger = Ledger()
    ledger.started(1, at=0.0)
    ledger.stopped()
    ledger.ended(1, S.COMPLETED, 5, None, at=9.0)
    assert ledger.handed_out(asked=0.0, at=9.0).group_seconds == [], "of a start that was given up nothing is left to count from"


def test_the_next_record_begins_where_the_last_one_ended() -> None:
    ledger = Ledger()
    ledger.started(1, at=0.0)
    ledger.rollouts(2, at=0.0)
    ledger.handed_out(asked=0.0, at=1.0)
    record = ledger.handed_out(asked=4.0, at=5.0)
    assert (record.period, record.waited, record.between) == (4.0, 1.0, 3.0)
    assert (record.started, record.ended, record.in_flight, record.most_in_flight, record.busy) == (0, {}, 2.0, 2, 4.0)
    ledger.ended(1, S.COMPLETED, 5, None, at=7.0)
    record = ledger.handed_out(asked=7.0, at=7.0)
    assert (record.group_seconds, record.waited) == ([7.0], 0.0), "a group that ran over batches took all that time"


def test_what_the_engine_says_is_meant_over_time() -> None:
    ledger = Ledger()
    ledger.load(running=0, waiting=0, preemptions=7, at=0.0)  # rollouts begin
    ledger.load(running=8, waiting=2, preemptions=9, at=3.0)  # one ends
    ledger.load(running=4, waiting=0, preemptions=9, at=4.0)  # another, when few are left
    use = ledger.handed_out(asked=0.0, at=5.0).engine
    assert use is not None
    assert (use.running, use.waiting, use.preemptions) == ((8 * 3 + 8 + 4) / 5, (2 * 3 + 2) / 5, 2)
    use = ledger.handed_out(asked=5.0, at=6.0).engine
    assert use is not None
    assert (use.running, use.waiting, use.preemptions) == (4.0, 0.0, 0)


def test_interrupted_groups_have_no_time_and_a_group_may_start_again() -> None:
    ledger = Ledger()
    for at in (0.0, 10.0):
        ledger.started(1, at=at)
        ledger.ended(1, S.INTERRUPTED if at == 0.0 else S.FILTERED, 3, "all equal", at=at + 2.0)
    record = ledger.handed_out(asked=0.0, at=12.0)
    assert (record.group_seconds, record.started, record.reasons) == ([2.0], 2, {(S.FILTERED, "all_equal"): 1})


def test_what_ran_before_the_first_batch_was_asked_for_is_in_its_period() -> None:
    ledger = Ledger()
    ledger.rollouts(4, at=1.0)
    record = ledger.handed_out(asked=3.0, at=5.0)
    assert (record.period, record.waited, record.between, record.in_flight) == (4.0, 2.0, None, 4.0)


def test_no_time_is_no_division() -> None:
    record = Ledger().handed_out(asked=5.0, at=5.0)
    assert (record.period, record.in_flight, record.busy, record.engine) == (0.0, 0.0, 0.0, None)


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("zero variance", "zero_variance"),
        ("pass rate 0.125 is above 0.1", "pass_rate_n_is_above_n"),
        ("TimeoutError: 30 s passed", "timeouterror"),
        ("", OTHER),
        ("  ::", OTHER),
        ("größer/als {x}", "gr_er_als_x"),
        ("x" * 100, "x" * 48),
    ],
)
def test_a_reason_becomes_a_short_name(reason: str, name: str) -> None:
    assert metric_name(reason) == name


@given(st.text())
def test_any_reason_has_a_name_that_every_logger_takes(reason: str) -> None:
    assert re.fullmatch(r"[a-z][a-z_]{0,47}", metric_name(reason))


@given(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=1))
def test_reasons_beyond_the_first_are_counted_together(reasons: list[str]) -> None:
    ledger = Ledger()
    for group_id, reason in enumerate(reasons):
        ledger.ended(group_id, S.FILTERED, 0, reason, at=0.0)
    found = ledger.handed_out(asked=0.0, at=1.0).reasons
    assert sum(found.values()) == len(reasons)
    assert len(found) <= 17
    assert (len(set(reasons)) > 16) == ((S.FILTERED, OTHER) in found)


STEPS = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 50), st.booleans()), min_size=1, max_size=30)


@given(STEPS)
def test_rollouts_times_seconds_add_up_however_the_time_is_cut_into_batches(steps: list[tuple[float, int, bool]]) -> None:
    ledger, now, expected, level, found = Ledger(), 0.0, 0.0, 0, 0.0
    ledger.rollouts(0, at=0.0)
    for wait, n, batch in steps:
        expected += level * wait
        now += wait
        level = n
        ledger.rollouts(n, at=now)
        if batch:
            record = ledger.handed_out(asked=0.0, at=now)
            found += record.in_flight * record.period
            assert 0 <= record.busy <= record.period
    record = ledger.handed_out(asked=0.0, at=now + 1)
    assert found + record.in_flight * record.period == pytest.approx(expected + level)
