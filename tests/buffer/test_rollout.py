"""Shows what a rollout and a group refuse, how tokens enter and leave, and what a dataset row gives."""

from typing import Any

import numpy as np
import pytest

from buffer import Position, RolloutGroup, RolloutState, Status, Turn
from buffer.rows import prompt_fields

ARRAYS = ("response_ids", "logprobs", "loss_mask", "versions", "timelines")


def a_rollout(**fields: Any) -> RolloutState:
    return RolloutState(group_id=5, index=0, task_name="math", **fields)


def tokens(n: int, **other: Any) -> dict[str, Any]:
    return {"response_ids": range(n), "logprobs": [-1.0] * n, "loss_mask": [1] * n, "versions": [0] * n, "timelines": [0] * n} | other


@pytest.mark.parametrize("short", ARRAYS)
def test_arrays_of_unequal_lengths_are_refused(short: str) -> None:
    with pytest.raises(ValueError, match="rollout math-5-0: lengths differ"):
        a_rollout(**tokens(3, **{short: tokens(2)[short]}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_trainable_token_needs_a_finite_logprob_and_others_do_not(bad: float) -> None:
    with pytest.raises(ValueError, match=r"log-probability of trainable token 1 is .*; it must be finite"):
        a_rollout(**tokens(2, logprobs=[-1.0, bad]))
    kept = a_rollout(**tokens(2, logprobs=[-1.0, bad], loss_mask=[1, 0]))
    assert kept.logprobs.size == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": "done"}, "unknown status 'done'"),
        (tokens(1, loss_mask=[2]), "loss_mask holds 2"),
        (tokens(1, response_ids=[1.5]), "whole numbers within the range of int32"),
        (tokens(1, response_ids=[2**40]), "whole numbers within the range of int32"),
        (tokens(1, versions=np.array([2**40])), "whole numbers within the range of int32"),
        (tokens(1, timelines=[-1]), "timelines hold -1"),
        (tokens(1, loss_mask=[-1]), "whole numbers within the range of uint8"),
    ],
)
def test_bad_values_are_refused_with_the_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_rollout(**fields)


def test_a_rollout_needs_a_task_and_a_place() -> None:
    with pytest.raises(ValueError, match="task_name is empty"):
        RolloutState(1, 0, "")
    with pytest.raises(ValueError, match="index -1"):
        RolloutState(1, -1)


def test_tokens_of_two_versions_keep_theirs() -> None:  # case 12
    rollout = a_rollout()
    rollout.append([7], logprobs=[-0.1], version=1)
    rollout.append([8, 9], logprobs=[-0.2, -0.3], version=3)
    assert rollout.versions.tolist() == [1, 3, 3]
    assert rollout.response_ids.tolist() == [7, 8, 9]
    assert rollout.min_version == 1
    assert rollout.turns == [Turn("assistant", 0, 3)], "an interrupted turn that goes on is one turn"


def test_environment_tokens_have_mask_0_and_a_turn_of_their_own() -> None:
    rollout = a_rollout()
    rollout.append([1, 2], logprobs=[-1, -1], version=4)
    rollout.append([3], trainable=False, version=2)
    rollout.append([4], logprobs=[-1], version=[5])
    assert rollout.loss_mask.tolist() == [1, 1, 0, 1]
    assert rollout.logprobs.tolist() == [-1, -1, 0, -1]
    assert rollout.turns == [Turn("assistant", 0, 2), Turn("environment", 2, 3), Turn("assistant", 3, 4)]
    assert rollout.min_version == 4, "what is not trained on has no staleness"


def test_appending_nothing_changes_nothing() -> None:
    rollout = a_rollout()
    rollout.append([])
    rollout.append(np.array([], np.int64), logprobs=[], version=3)
    assert rollout.turns == []
    assert rollout.min_version is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "trainable tokens need logprobs"),
        ({"logprobs": [-1.0]}, "2 token ids came with 1 values of logprobs"),
        ({"logprobs": [-1.0, -1.0], "version": [1, 2, 3]}, "2 token ids came with 3 values of version"),
        ({"logprobs": [-1.0, np.nan]}, "trainable token 1"),
    ],
)
def test_a_refused_append_adds_nothing(arguments: dict[str, Any], message: str) -> None:
    rollout = a_rollout(**tokens(1))
    with pytest.raises(ValueError, match=message):
        rollout.append([1, 2], **arguments)
    assert [getattr(rollout, name).size for name in ARRAYS] == [1] * len(ARRAYS)
    assert rollout.turns == []


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_read_only_copies(name: str) -> None:
    given = np.array(tokens(2)[name], dtype=getattr(a_rollout(), name).dtype)
    rollout = a_rollout(**tokens(2, **{name: given}))
    before = getattr(rollout, name)
    expected = before.tolist()
    given[0] = 1 - given[0]
    rollout.append([9], logprobs=[-2.0], version=6)
    assert before.tolist() == expected, "a snapshot taken before an append keeps what it saw"
    for array in (before, getattr(rollout, name)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_reset_forgets_the_response_and_keeps_the_prompt() -> None:
    rollout = a_rollout(row={"prompt": "p", "answer": 3, "media": ["image"]}, prompt="p", prompt_ids=[1, 2], media=["image"], attempts=2)
    rollout.append([1], logprobs=[-1.0], version=1)
    rollout.finish_reason, rollout.text, rollout.score, rollout.reward = "stop", "x", 1.0, 2.0
    rollout.reward_parts, rollout.metrics = {"a": 1.0}, {"b": 2.0}
    rollout.reset()
    fresh = a_rollout(row={"prompt": "p", "answer": 3, "media": ["image"]}, prompt="p", prompt_ids=[1, 2], media=["image"], attempts=2)
    for name in (*ARRAYS, "prompt_ids"):
        assert getattr(rollout, name).tolist() == getattr(fresh, name).tolist()
    for name in ("finish_reason", "text", "score", "reward", "reward_parts", "metrics", "turns", "row", "prompt", "media", "attempts"):
        assert getattr(rollout, name) == getattr(fresh, name)


def test_a_group_refuses_members_that_are_not_its_own() -> None:
    with pytest.raises(ValueError, match="group 5 has no rollouts"):
        RolloutGroup(5, [])
    for member in (RolloutState(6, 0), RolloutState(5, 1), RolloutState(5, 0, "other")):
        with pytest.raises(ValueError, match=f"rollout {member.rollout_id} does not belong at index 0 of group 5"):
            RolloutGroup(5, [member])
    with pytest.raises(ValueError, match="cannot stand in one group"):
        RolloutGroup(5, [RolloutState(5, 0, status="filtered"), RolloutState(5, 1)])


def test_a_group_is_marked_as_a_whole_or_not_at_all() -> None:
    group = RolloutGroup(5, [RolloutState(5, 0), RolloutState(5, 1)])
    with pytest.raises(ValueError, match="completed is not a status of a whole group"):
        group.mark(Status.COMPLETED)
    group.mark(Status.FILTERED)
    assert (group.status, group.filter_reason) == (Status.FILTERED, "no reason given")


def test_the_staleness_of_a_group_is_that_of_its_oldest_trainable_token() -> None:
    group = RolloutGroup(5, [RolloutState(5, index) for index in range(3)])
    group.rollouts[0].append([1, 2], logprobs=[-1, -1], version=[7, 4])
    group.rollouts[1].append([1], trainable=False, version=1)
    assert group.min_version == 4


def test_siblings_do_not_share_their_messages() -> None:
    row = {"messages": [{"role": "user", "content": "hello"}], "media": ["a"]}
    group = RolloutGroup.from_row(5, row, group_size=2, task_name="math", position=Position(0, 0))
    assert group.rollouts[0].messages is not None
    assert group.rollouts[0].media is not None
    group.rollouts[0].messages.append({"role": "user", "content": "more"})
    group.rollouts[0].messages[0]["content"] = "changed"
    group.rollouts[0].media.append("b")
    assert group.rollouts[1].messages == [{"role": "user", "content": "hello"}]
    assert group.rollouts[1].media == ["a"]
    assert row == {"messages": [{"role": "user", "content": "hello"}], "media": ["a"]}


CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "hello"}, {"prompt": "hello"}),
        ({"prompt": CHAT}, {"messages": CHAT}),
        ({"messages": CHAT}, {"messages": CHAT}),
        ({"prompt_ids": [1, 2]}, {"prompt_ids": [1, 2]}),
        ({"prompt": "hello", "prompt_ids": [1]}, {"prompt": "hello", "prompt_ids": [1]}),
        ({"prompt": "hello", "media": ["m"], "sampling": {"n": 1}, "x": 1}, {"prompt": "hello", "media": ["m"], "sampling": {"n": 1}}),
        ({"prompt": None, "messages": CHAT}, {"messages": CHAT}),
    ],
)
def test_a_row_gives_the_fields_of_its_prompt(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: value for name, value in prompt_fields(row).items() if value is not None} == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("hello", "must be a mapping with a prompt, not str: 'hello'"),
        ({"question": "?"}, r"the row has no prompt: its columns are \['question'\]"),
        ({}, "the row has no prompt"),
        ({"prompt": ""}, "the row's prompt is empty: prompt"),
        ({"prompt_ids": []}, "the row's prompt is empty: prompt_ids"),
        ({"prompt": ["hello"]}, "must be text or a list of chat messages with a role each"),
        ({"prompt": [{"content": "no role"}]}, "must be text or a list of chat messages with a role each"),
        ({"prompt": 7}, "must be text or a list of chat messages"),
        ({"messages": "hello"}, "must be text or a list of chat messages"),
        ({"messages": [{"content": "no role"}]}, "must be text or a list of chat messages"),
    ],
)
def test_a_row_without_a_usable_prompt_is_refused_with_the_reason(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_fields(row)


def test_reset_gives_the_conversation_of_the_row_back() -> None:
    row = {"messages": [{"role": "user", "content": "2+2?"}], "media": ["image"]}
    (rollout,) = RolloutGroup.from_row(1, row, group_size=1, task_name="math", position=Position(0, 0)).rollouts
    rollout.messages.append({"role": "tool", "content": "4"})  # type: ignore[union-attr]
    rollout.media = ["image", "another"]
    rollout.reset()
    assert (rollout.messages, rollout.media) == (row["messages"], row["media"])


@pytest.mark.parametrize(("ids", "version", "named"), [([-5], 0, "token_ids hold -5"), ([5], -3, "versions hold -3")])
@pytest.mark.parametrize("trainable", [True, False])
def test_negative_tokens_and_versions_are_refused(ids: list[int], version: int, named: str, trainable: bool) -> None:
    rollout = a_rollout()
    with pytest.raises(ValueError, match=named):
        rollout.append(ids, logprobs=[-1.0], version=version, trainable=trainable)
    assert rollout.response_ids.size == 0
    with pytest.raises(ValueError, match=named):
        a_rollout(response_ids=ids, logprobs=[-1.0], loss_mask=[int(trainable)], versions=[version])


@pytest.mark.parametrize("group_id", [None, "1", 1.5])
def test_an_id_is_a_whole_number(group_id: object) -> None:
    with pytest.raises(ValueError, match=f"group_id={group_id!r} must be a whole number"):
        RolloutState(group_id, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"group_id={group_id!r} must be a whole number"):
        RolloutGroup(group_id, [RolloutState(1, 0)])  # type: ignore[arg-type]
    assert type(RolloutGroup(np.int64(1), [RolloutState(np.int64(1), 0)]).group_id) is int  # type: ignore[arg-type]


@pytest.mark.parametrize("group_id", [2**62, 2**63 - 1, 2**70, -(2**62)])
def test_an_id_fits_into_a_column_and_leaves_room_for_others(group_id: int) -> None:
    with pytest.raises(ValueError, match=rf"group_id={group_id} must lie between -2\*\*62 and 2\*\*62"):
        RolloutState(group_id, 0)


@pytest.mark.parametrize("task_name", ["a\0b", "\ud800"])
def test_a_task_has_a_name_that_databases_hold(task_name: str) -> None:
    with pytest.raises(ValueError, match="give another name"):
        RolloutState(1, 0, task_name)
