"""Shows that a conversation encoded anew for each call is trained on as the model saw it: O42."""

import numpy as np
import pytest

from agent_loop.turns import Call, Row, reconciled
from buffer.rollout import RolloutState


def plain(row: Row) -> tuple[list[int], list[int], list[float]]:
    return row.ids.tolist(), row.mask.tolist(), row.logprobs.tolist()


def test_o42_a_small_change_of_the_last_answer_is_context() -> None:
    (row,) = reconciled([Call([1, 2, 3], [10, 11], [-0.1, -0.2]), Call([1, 2, 3, 10, 12], [30, 31], [-0.3, -0.4])])
    assert plain(row) == ([1, 2, 3, 10, 12, 30, 31], [0, 0, 0, 1, 0, 1, 1], [0, 0, 0, -0.1, 0, -0.3, -0.4])
    assert row.prompt == 3


def test_o42_a_large_change_or_one_before_the_last_answer_begins_a_new_row() -> None:
    first = Call([1, 2, 3], [10, 11, 12, 13], [-0.1] * 4)
    large = reconciled([first, Call([1, 2, 3, 20], [30], [-0.3])], max_drift=4)
    assert [plain(row)[0] for row in large] == [[1, 2, 3, 10, 11, 12, 13], [1, 2, 3, 20, 30]]
    assert len(reconciled([first, Call([1, 2, 3, 20], [30], [-0.3])], max_drift=5)) == 1
    before = reconciled([first, Call([1, 9, 3, 10, 11, 12, 13], [30], [-0.3])])
    assert [plain(row)[1] for row in before] == [[0, 0, 0, 1, 1, 1, 1], [0] * 7 + [1]]
    assert len(reconciled([first, Call([1, 2, 3], [30], [-0.3])], max_drift=0)) == 2


def test_a_prompt_that_goes_on_keeps_every_sampled_token() -> None:
    calls = [Call([1], [10, 11], [-0.1, -0.2], versions=[3, 4]), Call([1, 10, 11, 20], [12], [-0.3], versions=5)]
    (row,) = reconciled(calls)
    state = RolloutState(1, 0)
    row.append_to(state)
    assert state.prompt_ids is not None
    assert state.prompt_ids.tolist() == [1]
    assert state.response_ids.tolist() == [10, 11, 20, 12]
    assert state.loss_mask.tolist() == [1, 1, 0, 1]
    assert state.versions.tolist() == [3, 4, 0, 5]
    np.testing.assert_allclose(state.logprobs, [-0.1, -0.2, 0, -0.3], rtol=1e-6)
    assert [turn.role for turn in state.turns] == ["assistant", "environment", "assistant"]
    with pytest.raises(ValueError, match="has a response already"):
        row.append_to(state)


def test_bad_arguments_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="call 1 sampled 2 tokens and brings 1 logprobs"):
        reconciled([Call([1], [2], [-0.1]), Call([1, 2], [3, 4], [-0.1])])
    with pytest.raises(ValueError, match="brings 3 versions"):
        reconciled([Call([1], [2], [-0.1], versions=[1, 2, 3])])
    with pytest.raises(ValueError, match="max_drift=-1"):
        reconciled([], max_drift=-1)
    assert reconciled([]) == []
