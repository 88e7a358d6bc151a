"""Shows what staleness is, and that the functions over arrays agree with a slow reading of the definition."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer import RolloutGroup, RolloutState
from buffer.codec import encode_group
from buffer.staleness import Level, fresh_mask, oldest_version, staleness, too_stale
from tests.buffer.groups import a_group, plain

TOKENS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), max_size=6)
"""(version, mask) of each token."""


def arrays(tokens: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([v for v, _ in tokens], np.int32), np.array([m for _, m in tokens], np.uint8)


def a_rollout(tokens: list[tuple[int, int]], index: int = 0) -> RolloutState:
    state = RolloutState(1, index, "math")
    for version, trainable in tokens:
        state.append([7], logprobs=[-0.5], version=version, trainable=bool(trainable))
    return state


@settings(deadline=None)
@given(TOKENS, st.integers(0, 6), st.integers(0, 4))
def test_the_functions_agree_with_the_definition(tokens: list[tuple[int, int]], version: int, max_staleness: int) -> None:
    versions, mask = arrays(tokens)
    ages = [version - v for v, m in tokens if m]
    assert staleness(oldest_version(versions, mask), version) == max(ages, default=None)
    fresh = fresh_mask(versions, mask, version, max_staleness)
    assert fresh.tolist() == [int(bool(m) and version - v <= max_staleness) for v, m in tokens]
    assert (fresh.dtype, fresh.size) == (np.uint8, len(tokens))
    assert too_stale(versions, mask, version, max_staleness, Level.SEQUENCE) == any(age > max_staleness for age in ages)
    assert too_stale(versions, mask, version, max_staleness, Level.TOKEN) == (bool(ages) and all(age > max_staleness for age in ages))


@settings(deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=3), st.integers(0, 6))
def test_a_group_is_as_stale_as_its_stalest_member(members: list[list[tuple[int, int]]], version: int) -> None:
    group = RolloutGroup(1, [a_rollout(tokens, index) for index, tokens in enumerate(members)], "math")
    own = [s for r in group.rollouts if (s := staleness(r.min_version, version)) is not None]
    assert group.staleness(version) == max(own, default=None)
    assert encode_group(group).group["min_version"] == group.min_version, "what is stored, and found by, is the same"


def test_what_is_not_trained_on_has_no_staleness() -> None:
    versions, mask = arrays([(0, 0), (4, 0)])
    assert staleness(oldest_version(versions, mask), 5) is None
    assert not any(too_stale(versions, mask, 99, 0, level) for level in Level)
    assert RolloutGroup(1, [RolloutState(1, 0)]).staleness(5) is None


def test_tokens_of_a_later_version_are_not_stale() -> None:
    versions, mask = arrays([(7, 1)])
    assert staleness(oldest_version(versions, mask), 5) == -2
    assert fresh_mask(versions, mask, 5, 0).tolist() == [1]


@pytest.mark.parametrize(("mask", "handed_out", "expires"), [([1, 1], [0, 1], False), ([1, 0], [0, 0], True)])  # case 11
def test_masking_by_token(mask: list[int], handed_out: list[int], expires: bool) -> None:
    versions, loss_mask = np.array([0, 4], np.int32), np.array(mask, np.uint8)
    assert fresh_mask(versions, loss_mask, 5, 1).tolist() == handed_out
    assert loss_mask.tolist() == mask
    assert too_stale(versions, loss_mask, 5, 1, Level.TOKEN) is expires


def test_a_masked_group_is_a_copy() -> None:
    group = a_group(1)
    group.rollouts[1].append([8], logprobs=[-1.0], version=4)
    before = plain(group)
    masked = group.masked(version=5, max_staleness=1)
    assert [rollout.loss_mask.tolist() for rollout in masked.rollouts] == [[0, 0, 0], [0, 0, 0, 1]]
    assert without_masks(plain(masked)) == without_masks(before)
    masked.rollouts[0].metrics["x"] = masked.rollouts[0].reward_parts["x"] = 1.0
    masked.rollouts[0].reset()
    assert plain(group) == before


def without_masks(group: dict[str, Any]) -> dict[str, Any]:
    return group | {"rollouts": [{name: value for name, value in r.items() if name != "loss_mask"} for r in group["rollouts"]]}
