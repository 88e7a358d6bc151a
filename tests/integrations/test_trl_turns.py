"""Shows that a conversation encoded anew for each call makes the rows that TRL's asynchronous trainer makes of it, whatever drifts;
and that a rollout with tokens of the environment becomes the columns of O35."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop.turns import Call, reconciled
from buffer.rollout import RolloutGroup, RolloutState
from buffer.status import Status
from producer.errors import ProducerError

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@settings(max_examples=60)
@given(first=tokens, steps=st.lists(st.tuples(tokens, st.integers(0, 4), tokens), min_size=1, max_size=5), most=st.integers(0, 5))
def test_rows_are_those_that_trl_makes(first: list[int], steps: list[tuple[list[int], int, list[int]]], most: int) -> None:
    worker = pytest.importorskip("trl.experimental.async_grpo.async_rollout_worker")
    calls, held = [], list(first)
    for sampled, cut, following in steps:
        calls.append(Call(list(held), sampled, [-0.5 - token for token in sampled]))
        held += sampled
        held = held[: len(held) - min(cut, len(held) - 1)] + following
    records = [worker.TurnRecord(list(one.prompt_ids), list(one.token_ids), list(one.logprobs)) for one in calls]
    theirs, _ = worker._chain_to_sequences(records, "r", most)
    assert [(row.ids.tolist(), row.mask.tolist(), row.logprobs.tolist()) for row in reconciled(calls, max_drift=most)] == [
        (row.input_ids, row.completion_mask, row.old_log_probs) for row in theirs
    ]


def test_o35_a_completion_with_tokens_of_the_environment() -> None:
    pytest.importorskip("trl")
    from producer.integrations.trl.columns import columns

    state = RolloutState(1, 0, status=Status.COMPLETED, prompt_ids=np.array([1, 2, 3]), score=1.0, reward=1.0)
    state.append([10, 11], logprobs=[-0.1, -0.2], version=1)
    state.append([20, 21], trainable=False)
    state.append([30], logprobs=[-0.3], version=1)
    made = columns([RolloutGroup(1, [state])], most_tokens=5)
    assert (made["prompt_ids"], made["completion_ids"], made["env_mask"]) == ([[1, 2, 3]], [[10, 11, 20, 21, 30]], [[1, 1, 0, 0, 1]])
    np.testing.assert_allclose(made["logprobs"], [[-0.1, -0.2, 0, 0, -0.3]], rtol=1e-6)
    with pytest.raises(ProducerError, match="has 5 tokens, over max_completion_length=4"):
        columns([RolloutGroup(1, [state])], most_tokens=4)
