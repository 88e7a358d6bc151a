"""Shows that a conversation encoded anew for each call makes the rows that TRL's asynchronous trainer makes of it, whatever drifts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop.turns import Call, reconciled

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
