"""Shows what staleness is, and that the functions over arrays agree with a slow reading of the definition: a tree of weights."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer import RolloutGroup, RolloutState
from buffer.codec import encode_group
from buffer.staleness import NO_VERSION, Level, Timeline, fresh_mask, oldest_version, staleness, too_stale
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


class Weights:
    """Weights as a node of the tree that updates and rewinds make: each update adds a child."""

    def __init__(self, parent: "Weights | None" = None) -> None:
        self.parent = parent

    def path(self) -> list["Weights"]:
        """From these weights to the first."""
        return [self] + (self.parent.path() if self.parent else [])

    def distance(self, other: "Weights") -> int:
        """Updates undone from these to the ones in common, and made from there to `other`."""
        mine, its = self.path(), other.path()
        common = next(node for node in mine if node in its)
        return mine.index(common) + its.index(common)


@dataclass
class Run:
    """A run's weights by the names they had: (timeline, version)."""

    timeline: Timeline = field(default_factory=Timeline)
    version: int = 0
    now: Weights = field(default_factory=Weights)
    named: dict[tuple[int, int], Weights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name()

    def name(self) -> None:
        name = (self.timeline.number, self.version)
        assert self.named.setdefault(name, self.now) is self.now, "two weights share a (timeline, version)"

    def update(self) -> None:
        self.now, self.version = Weights(self.now), self.version + 1
        self.name()

    def rewind(self, updates: int) -> None:
        for _ in range(min(updates, self.version)):
            assert self.now.parent is not None
            self.now, self.version = self.now.parent, self.version - 1
        self.timeline = self.timeline.rewound(self.version)
        self.name()


@settings(deadline=None)
@given(st.lists(st.integers(-4, 3), max_size=12))
def test_staleness_is_the_distance_in_the_tree_of_weights(moves: list[int]) -> None:
    """Moves of 0 and more are that many updates, negative ones rewinds by one less."""
    run = Run()
    for move in moves:
        if move < 0:
            run.rewind(-move - 1)
        for _ in range(move):
            run.update()
    names = sorted(run.named)
    timelines, versions = np.array(names, np.int32).T
    effective = run.timeline.effective(versions, timelines)
    assert effective.dtype == np.int64
    assert [run.version - v for v in effective.tolist()] == [run.named[name].distance(run.now) for name in names]
    exists = [run.named[name] in run.now.path() for name in names]
    assert (~run.timeline.undone(versions, timelines)).tolist() == exists


def test_a_rollout_counts_its_staleness_on_the_timeline_it_was_handed_out_on() -> None:
    state = RolloutState(1, 0, "math")
    state.append([7, 8], logprobs=[-0.5, -0.5], version=[4, 8])
    state.timeline = Timeline().rewound(5)
    state.append([9, 9], logprobs=[-0.5, -0.5], version=[6, 8])
    assert state.timelines.tolist() == [0, 0, 1, 1]
    assert state.effective_versions.tolist() == [4, 2, 6, 8]
    assert (state.min_version, state.staleness(8), state.undone) == (4, 6, True)
    assert [state.too_stale(8, bound) for bound in (5, 6)] == [True, False]
    assert not state.too_stale(8, 0, Level.TOKEN)
    assert state.masked(8, 4).loss_mask.tolist() == [1, 0, 1, 1]
    group = RolloutGroup(1, [state, RolloutState(1, 1, "math")], "math")
    assert (group.staleness(8), group.min_version) == (6, 4)
    state.reset()
    assert (state.timelines.size, state.undone, state.staleness(8)) == (0, False, None)


def test_tokens_without_timelines_are_of_the_states_own() -> None:
    tokens = {"response_ids": [1], "logprobs": [-1.0], "loss_mask": [1], "versions": [9]}
    assert RolloutState(1, 0, **tokens).timelines.tolist() == [0]
    later = RolloutState(1, 0, timeline=Timeline((5,)), **tokens)
    assert (later.timelines.tolist(), later.undone) == ([1], False)
    undone = RolloutState(1, 0, timeline=Timeline((5,)), timelines=[0], **tokens)
    assert (undone.timelines.tolist(), undone.undone, undone.staleness(5)) == ([0], True, 4)


def test_tokens_of_a_timeline_that_is_not_known_yet_keep_their_versions() -> None:
    versions = np.array([9], np.int32)
    for timeline in (Timeline(), Timeline((5,))):
        assert timeline.effective(versions, np.array([2], np.int32)).tolist() == [9]
        assert timeline.undone(versions, np.array([2], np.int32)).tolist() == [False]


@pytest.mark.parametrize("fork", [-1, 1.5, None, NO_VERSION])
def test_a_fork_is_a_version(fork: Any) -> None:
    with pytest.raises(ValueError, match=r"a rewind went back to version .*; it must be a whole number"):
        Timeline().rewound(fork)
