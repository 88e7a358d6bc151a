"""Shows that rewards are shaped by the published rules, step by step, and that filters look at the score before any of it."""

import math

import numpy as np
import pytest

from buffer.rollout import RolloutGroup, RolloutState
from buffer.status import Status
from producer import zero_variance
from producer.experience import Overlong, StopProperly
from producer.experience.shaping import shape_rewards

LENGTHS = [70, 80, 85, 100, 120]
NO_CUT = [False] * 5


def test_o23_overlong() -> None:
    assert shape_rewards([0.0] * 5, LENGTHS, NO_CUT, [Overlong(100, 20)]).tolist() == [0, 0, -0.25, -1, -1]
    assert shape_rewards([0.0] * 5, LENGTHS, NO_CUT, [Overlong(100, 20, capped=False)]).tolist() == [0, 0, -0.25, -1, -2]
    assert shape_rewards([1.0] * 5, LENGTHS, NO_CUT, [Overlong(100, 20, factor=0.5)]).tolist() == [1, 1, 0.875, 0.5, 0.5]


@pytest.mark.parametrize(("coef", "expected"), [(0.5, [0.5, 0.5, -0.5]), (-0.5, [-0.5, 0.5, -0.5]), (0.0, [0, 0.5, 0])])
def test_o24_stop_properly(coef: float, expected: list[float]) -> None:
    found = shape_rewards([1, 0.5, -1], [5, 5, 5], [True, False, True], [StopProperly(coef)])
    np.testing.assert_array_equal(found, expected)


def test_steps_follow_each_other_and_a_missing_reward_stays_missing() -> None:
    def doubled(rewards: np.ndarray, lengths: np.ndarray, truncated: np.ndarray) -> np.ndarray:
        return rewards * 2

    found = shape_rewards([1.0, math.nan, 1], [85, 85, 70], [True, True, False], [Overlong(100, 20), StopProperly(0.0), doubled])
    np.testing.assert_array_equal(found, [0.0, math.nan, 2.0])
    replaced = shape_rewards([math.nan], [1], [True], [StopProperly(-1), lambda rewards, lengths, truncated: [0.0]])
    np.testing.assert_array_equal(replaced, [math.nan])


def test_a_step_may_give_no_number_for_a_rollout_but_not_another_number_of_them() -> None:
    found = shape_rewards([1.0, 2.0], [1, 1], [False] * 2, [lambda rewards, lengths, truncated: [math.inf, 3.0]])
    np.testing.assert_array_equal(found, [math.nan, 3.0])
    with pytest.raises(ValueError, match="gave rewards of shape"):
        shape_rewards([1.0, 2.0], [1, 1], [False] * 2, [lambda rewards, lengths, truncated: [1.0]])


def test_o34_filters_see_the_score_and_not_what_shaping_made_of_it() -> None:
    scores = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [0.5] * 4, [0, 0, 0, 0]]
    shaped = [*scores[:4], shape_rewards(scores[4], [70, 80, 85, 100], [False] * 4, [Overlong(100, 20)]).tolist()]
    assert shaped[4] == [0, 0, -0.25, -1]
    groups = [
        RolloutGroup(
            number,
            [
                RolloutState(number, index, status=Status.COMPLETED, score=score, reward=reward)
                for index, (score, reward) in enumerate(zip(of_group, rewards, strict=True))
            ],
        )
        for number, (of_group, rewards) in enumerate(zip(scores, shaped, strict=True))
    ]
    assert [group.group_id for group in groups if zero_variance(group) is None] == [2]


def test_bad_arguments_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="limit=10, buffer=20"):
        Overlong(10, 20)
    with pytest.raises(ValueError, match="factor=-1"):
        Overlong(10, 2, factor=-1)
    with pytest.raises(ValueError, match=r"coef=1.5 must be 0 to 1"):
        StopProperly(1.5)
