"""`Deadlines` says what a look at all keys would say, and keeps no more than it has keys."""

import math

from hypothesis import given
from hypothesis import strategies as st

from producer.deadlines import Deadlines

TIMES = st.sampled_from([-math.inf, 0.0, 1.0, 2.5, 2.5000001, 7.0, math.inf])
STEPS = st.lists(st.tuples(st.sampled_from(["set", "drop", "due"]), st.integers(0, 4), TIMES), max_size=60)


@given(STEPS)
def test_it_agrees_with_a_look_at_all_keys(steps: list[tuple[str, int, float]]) -> None:
    deadlines, model = Deadlines[int](), dict[int, float]()
    for what, key, at in steps:
        if what == "set":
            deadlines.set(key, at)
            model[key] = at
        elif what == "drop":
            deadlines.drop(key)
            model.pop(key, None)
        else:
            now = min(at, 1e9)
            due = deadlines.due(now)
            assert [model[one] for one in due] == sorted(model[one] for one in due)
            assert sorted(due) == sorted(one for one, when in model.items() if when <= now)
            model = {one: when for one, when in model.items() if when > now}
        assert len(deadlines) == len(model)
        assert deadlines.next_at() == min(model.values(), default=math.inf)


def test_what_is_set_anew_again_and_again_is_not_kept() -> None:
    deadlines = Deadlines[int]()
    for round_number in range(10_000):
        for key in range(3):
            deadlines.set(key, 1e6 + round_number)
    assert len(deadlines._heap) <= 2 * 3 + 65
    assert sorted(deadlines.due(2e6)) == [0, 1, 2]
