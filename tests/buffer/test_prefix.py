"""Shows that a running group comes back as it was when it was checkpointed last, from deltas, whatever was done to it between."""

import json
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buffer import Position, RolloutGroup, RolloutState, Status
from buffer.amounts import Amount
from buffer.codec import GROUP_COLUMNS, MEMBER_COLUMNS, EncodedGroup, EncodedPrefix, decode_group, encode_group, encode_prefix, snapshot
from buffer.errors import CorruptPayloadError
from buffer.rollout import TOKEN_ARRAYS
from buffer.staleness import Timeline
from tests.buffer.groups import a_group, plain

SIZE = 3
CHAT = {"messages": [{"role": "user", "content": "2+2?"}]}


class Stored:
    """A running group beside what a store holds of it: rows, and the last payload with the prefixes behind it."""

    def __init__(self, group: RolloutGroup, *, payload: bool) -> None:
        self.group = group
        self.first: EncodedGroup = encode_group(group)
        self.payload = (self.first.extras, self.first.arrays) if payload else None
        self.rows = [dict(row) for row in self.first.rollouts]
        self.prefixes: list[EncodedPrefix] = []
        self.lengths = [rollout.response_ids.size if payload else 0 for rollout in group.rollouts]
        self.expected = plain(group)["rollouts"]
        for rollout in group.rollouts:
            rollout.status = Status.RUNNING

    def checkpoint(self, members: Collection[int], again: int = 0) -> None:
        """Add a prefix of these members from where the last one ended, or with that many tokens of it `again`."""
        prefix = encode_prefix(snapshot(self.group), {member: max(0, self.lengths[member] - again) for member in members})
        assert (prefix.group_id, prefix.task_name) == (self.group.group_id, self.group.task_name)
        assert [row["member"] for row in prefix.rollouts] == sorted(members)
        self.prefixes.append(prefix)
        for row in prefix.rollouts:
            self.rows[row["member"]] = row
        for member in members:
            self.lengths[member] = self.group.rollouts[member].response_ids.size
            self.expected[member] = plain(self.group)["rollouts"][member]

    def decoded(self, **changes: Any) -> RolloutGroup:
        group_row = {"group_id": self.group.group_id, "task_name": self.group.task_name, "status": "running", "consumed_step": None}
        prefixes = [(prefix.extras, prefix.arrays) for prefix in self.prefixes]
        arguments = {"payload": self.payload, "prefixes": prefixes} | changes
        group_row |= self.first.group
        rows = [tuple(row[name] for name in MEMBER_COLUMNS) for row in self.rows]
        return decode_group(tuple(group_row[name] for name in GROUP_COLUMNS), rows, self.first.prompt, **arguments)


def a_chat(size: int = SIZE) -> RolloutGroup:
    return RolloutGroup.from_row(1, CHAT, group_size=size, task_name="math", position=Position(0, 0))


def sample(rollout: RolloutState, n: int, version: int = 0) -> None:
    rollout.append(range(n), logprobs=[-0.5] * n, version=version)


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, int, int]:
    what = draw(st.sampled_from(["sample", "sample", "observe", "reset", "prompt", "finish", "judge", "speak", "rewind"]))
    return what, draw(st.integers(0, SIZE - 1)), draw(st.integers(0, 5))


CHECKPOINTS = st.tuples(st.frozensets(st.integers(0, SIZE - 1), min_size=1), st.integers(0, 2))


def change(rollout: RolloutState, what: str, n: int) -> None:
    """What a loop may do to a member it runs."""
    match what:
        case "sample":
            sample(rollout, n, version=n)
        case "observe":
            rollout.append(range(n), trainable=False)
        case "reset":
            rollout.reset()
            rollout.status = Status.RUNNING
        case "prompt" if not rollout.response_ids.size:
            rollout.prompt_ids = np.arange(n, dtype=np.int32)
        case "finish":
            rollout.status, rollout.finish_reason, rollout.text = Status.COMPLETED, "stop", "four" * n
        case "judge":
            rollout.score, rollout.reward, rollout.error = float(n), -1.0, "late"
            rollout.reward_parts, rollout.metrics["m"] = {"a": 0.5}, float(n)
        case "speak":
            rollout.messages = [*(rollout.messages or []), {"role": "tool", "content": str(n)}]
        case "rewind":
            rollout.timeline = rollout.timeline.rewound(n)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), st.integers(0, 3), st.lists(changes() | CHECKPOINTS, max_size=20))
def test_a_running_group_comes_back_as_it_was_at_its_last_checkpoint(
    stored_before: bool, n: int, moves: list[tuple[str, int, int] | tuple[frozenset[int], int]]
) -> None:
    group = a_chat()
    if stored_before:
        for rollout in group.rollouts:
            rollout.prompt_ids = np.arange(rollout.index, dtype=np.int32)
            sample(rollout, n)
            rollout.status = Status.INTERRUPTED
    store = Stored(group, payload=stored_before)
    for move in moves:
        if len(move) == 2:
            store.checkpoint(*move)
            continue
        what, member, number = move
        change(group.rollouts[member], what, number)
        if what == "reset":
            store.lengths[member] = 0
    timeline = Timeline((7,))
    decoded = plain(store.decoded(timeline=timeline))["rollouts"]
    for own, expected in zip(decoded, store.expected, strict=True):
        completed = expected["status"] is Status.COMPLETED
        assert own == expected | {
            "status": Status.COMPLETED if completed else Status.RUNNING,
            "text": expected["text"] if completed else None,
            "timeline": timeline,
            "dropped": Amount(),
        }


def test_only_what_is_new_is_written() -> None:
    group = a_chat()
    for rollout in group.rollouts:
        rollout.prompt_ids = np.arange(100, dtype=np.int32)
        sample(rollout, 50)
    store = Stored(group, payload=False)
    store.checkpoint({0, 1, 2})
    assert len(store.prefixes[0].arrays) == 4 * 100 + 3 * (9 * 50 + 8), "the prompt once, and 9 bytes a token"
    sample(group.rollouts[1], 2, version=1)
    store.checkpoint({1})
    assert len(store.prefixes[1].arrays) == 9 * 2 + 8
    assert [row["tokens"] for row in store.prefixes[1].rollouts] == [52]
    assert [row["min_version"] for row in store.prefixes[1].rollouts] == [0], "hot rows are of the whole response"
    again = store.decoded().rollouts[1]
    assert again.response_ids.tolist() == [*range(50), 0, 1]
    assert again.prompt_ids is not None
    assert again.prompt_ids.size == 100
    assert not any(getattr(again, name).flags.writeable for name in TOKEN_ARRAYS)


def test_tokens_that_a_prefix_holds_again_replace_what_was_there() -> None:
    group = a_chat()
    sample(group.rollouts[0], 6)
    store = Stored(group, payload=True)
    group.rollouts[0].reset()
    group.rollouts[0].append([0, 1, 2, 9], logprobs=[-0.5] * 4, version=3)
    store.checkpoint({0}, again=3)
    assert store.decoded().rollouts[0].response_ids.tolist() == [0, 1, 2, 9]
    assert store.decoded().rollouts[0].versions.tolist() == [0, 0, 0, 3]


def test_the_prefix_of_no_member_changes_nothing() -> None:
    store = Stored(a_chat(), payload=True)
    store.checkpoint([])
    assert plain(store.decoded())["rollouts"][0]["response_ids"] == plain(store.group)["rollouts"][0]["response_ids"]


@pytest.mark.parametrize(("member", "start"), [(0, 4), (0, -1)])
def test_a_start_that_is_no_token_of_the_member_is_refused(member: int, start: int) -> None:
    with pytest.raises(ValueError, match=f"rollout math-1-{member}: token {start} is none of its 3; start at 0 after a reset"):
        encode_prefix(snapshot(a_group(1)), {member: start})


@pytest.mark.parametrize("member", [-1, 2])
def test_a_member_that_is_not_there_is_refused(member: int) -> None:
    with pytest.raises(ValueError, match=f"group 1 has 2 members, none at index {member}"):
        encode_prefix(snapshot(a_group(1)), {member: 0})


@pytest.mark.parametrize(
    "forged",
    [{"start": 4}, {"start": -1}, {"start": 1.0}, {"start": None}, {"member": 3}, {"member": -1}, {"member": "0"}, {"n": 3}, {"turns": 3}],
)
def test_a_forged_prefix_is_refused(forged: dict[str, Any]) -> None:
    group = a_chat()
    sample(group.rollouts[0], 3)
    store = Stored(group, payload=False)
    store.checkpoint({0})
    sample(group.rollouts[0], 1)
    store.checkpoint({0})
    first, last = [(prefix.extras, prefix.arrays) for prefix in store.prefixes]
    extras = json.loads(last[0])
    extras[0] |= forged
    with pytest.raises(CorruptPayloadError, match="group 1"):
        store.decoded(prefixes=[first, (json.dumps(extras), last[1])])


def test_a_damaged_prefix_is_refused_as_a_payload_is() -> None:
    group = a_chat()
    sample(group.rollouts[0], 3)
    store = Stored(group, payload=False)
    store.checkpoint({0})
    (prefix,) = store.prefixes
    negative = np.int32(-1).tobytes() + prefix.arrays[4:]
    for arrays in (prefix.arrays[:-1], prefix.arrays + b"\0", negative):
        with pytest.raises(CorruptPayloadError, match="group 1"):
            store.decoded(prefixes=[(prefix.extras, arrays)])
