"""Shows that a group comes back from its stored form as it went in, and that a forged payload is refused, cheaply."""

import json
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buffer import Position, RolloutGroup, RolloutState, Status, Turn
from buffer.codec import EncodedGroup, decode_group, encode_group
from buffer.errors import CorruptPayloadError
from buffer.status import GROUP_WIDE, group_status, member_status
from tests.buffer.groups import a_group, plain

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
INT32 = st.integers(0, 2**31 - 1)
TEXT = st.text(max_size=20)  # all of unicode but half surrogate pairs
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": JSON}), min_size=1, max_size=3)
PROMPTS = st.fixed_dictionaries(
    {
        "row": st.dictionaries(TEXT, JSON, max_size=3),
        "prompt": st.none() | st.text(min_size=1, max_size=9),
        "messages": st.none() | MESSAGES,
        "media": st.none() | st.lists(JSON, min_size=1, max_size=2),
        "sampling": st.dictionaries(TEXT, JSON, max_size=2),
    }
)


@st.composite
def responses(draw: st.DrawFn) -> dict[str, Any]:
    """Tokens of one rollout: none, a few, or many runs of versions; NaN where a token is not trained on."""
    versions = np.repeat(draw(st.lists(INT32, max_size=12)), draw(st.integers(1, 4))).astype(np.int32)
    n = versions.size
    mask = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), np.uint8)
    logprobs = np.array(draw(st.lists(FLOATS, min_size=n, max_size=n)), np.float32)
    logprobs[mask == 0] = draw(st.sampled_from([0.0, math.nan, -math.inf]))
    ids = draw(st.lists(INT32, min_size=n, max_size=n))
    return {"response_ids": ids, "logprobs": logprobs, "loss_mask": mask, "versions": versions}


@st.composite
def judgements(draw: st.DrawFn) -> dict[str, Any]:
    numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
    parts = st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3)
    return {
        "attempts": draw(st.integers(0, 9)),
        "interruptions": draw(st.integers(0, 9)),
        "error": draw(st.none() | TEXT),
        "finish_reason": draw(st.sampled_from([None, "stop", "length", "abort"])),
        "text": draw(st.none() | st.text(max_size=60)),
        "turns": draw(st.lists(st.builds(Turn, TEXT, st.integers(0, 9), st.integers(0, 9)), max_size=3)),
        "score": draw(numbers),
        "reward": draw(numbers),
        "reward_parts": draw(parts),
        "metrics": draw(parts),
    }


@st.composite
def groups(draw: st.DrawFn) -> RolloutGroup:
    """Any group the store can hold, its members' prompts shared or of their own."""
    size, group_id, task_name = draw(st.integers(1, 4)), draw(st.integers(0, 2**62)), draw(st.text(min_size=1, max_size=5))
    shared, shared_ids = draw(PROMPTS), draw(st.none() | st.lists(INT32, max_size=5))
    whole = draw(st.none() | st.sampled_from(sorted(GROUP_WIDE)))
    rollouts = []
    for index in range(size):
        prompt = shared if draw(st.booleans()) else draw(PROMPTS)
        prompt_ids = shared_ids if draw(st.booleans()) else draw(st.none() | st.lists(INT32, max_size=5))
        status = whole or draw(st.sampled_from(sorted(set(Status) - GROUP_WIDE - {Status.RUNNING})))
        rollouts.append(
            RolloutState(group_id, index, task_name, status, prompt_ids=prompt_ids, **prompt, **draw(responses()), **draw(judgements()))
        )
    position = draw(st.none() | st.builds(Position, st.integers(0, 2**40), st.integers(0, 2**40)))
    return RolloutGroup(group_id, rollouts, task_name, position, filter_reason=draw(st.none() | TEXT))


def stored(encoded: EncodedGroup) -> dict[str, Any]:
    """What the tables give back: arguments of `decode_group`."""
    row = {"group_id": encoded.group_id, "task_name": encoded.task_name, "status": encoded.status.value, "consumed_step": None}
    return {
        "group_row": row | encoded.group,
        "member_rows": [dict(member) for member in encoded.rollouts],
        "prompt": encoded.prompt,
        "payload": (encoded.extras, encoded.arrays),
    }


def normal(group: RolloutGroup) -> dict[str, Any]:
    """As it comes back: members have the statuses that their group's gives them, empty things are the fields' defaults."""
    expected = plain(group)
    for member in expected["rollouts"]:
        member["status"] = member_status(group.status, member["status"])
    return expected


@UNHURRIED
@given(groups())
def test_a_group_comes_back_equal_in_every_field(group: RolloutGroup) -> None:
    decoded = decode_group(**stored(encode_group(group)))
    assert plain(decoded) == normal(group)
    assert decoded.status is group.status


@UNHURRIED
@given(groups())
def test_what_is_indexed_agrees_with_what_is_stored(group: RolloutGroup) -> None:
    encoded = encode_group(group)
    assert encoded.group["min_version"] == group.min_version
    assert [member["min_version"] for member in encoded.rollouts] == [rollout.min_version for rollout in group.rollouts]
    assert encoded.group["tokens"] == sum(member["tokens"] for member in encoded.rollouts)
    assert encoded.status is group_status(group.statuses)


def test_a_prompt_that_all_members_share_is_stored_once() -> None:
    row = {"prompt": "the longest prompt" * 50, "tokens": np.arange(3), "media": ["image"]}
    group = RolloutGroup.from_row(1, row | {"prompt_ids": np.arange(1000)}, group_size=8, task_name="math", position=Position(0, 0))
    encoded = encode_group(group)
    assert len(json.loads(encoded.prompt)) == 1
    assert len(encoded.arrays) == 4000


def test_equal_rows_with_arrays_are_shared_and_others_are_not() -> None:
    same = [RolloutState(1, index, row={"x": np.arange(3)}) for index in range(2)]
    other = [RolloutState(1, index, row={"x": np.arange(3 + index)}) for index in range(2)]
    assert len(json.loads(encode_group(RolloutGroup(1, same)).prompt)) == 1
    assert len(json.loads(encode_group(RolloutGroup(1, other)).prompt)) == 2


def test_half_a_surrogate_pair_in_any_text_is_kept_or_escaped() -> None:
    group = a_group(1)
    group.rollouts[0].text = group.rollouts[0].prompt = "half \ud83d"
    group.rollouts[0].error = group.filter_reason = "half \ud83d"
    decoded = decode_group(**stored(encode_group(group)))
    assert (decoded.rollouts[0].text, decoded.rollouts[0].prompt) == ("half \ud83d", "half \ud83d")
    assert decoded.rollouts[0].error == decoded.filter_reason == "half \\ud83d"


def circular() -> dict[str, Any]:
    row: dict[str, Any] = {}
    row["self"] = row
    return row


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", circular(), {(1, 2): 3}, math.nan, -math.inf, np.array([math.nan])])
def test_a_row_that_is_not_json_is_refused_with_what_may_be(value: Any) -> None:
    with pytest.raises(ValueError, match=r"row of group 1 cannot be stored: .*; keep columns to text, finite numbers, lists and mappings"):
        _ = encode_group(RolloutGroup(1, [RolloutState(1, 0, row={"x": value})])).prompt


@pytest.mark.parametrize("name", ["score", "reward"])
def test_a_score_that_is_not_finite_is_refused(name: str) -> None:
    group = a_group(1)
    setattr(group.rollouts[1], name, math.nan)
    with pytest.raises(ValueError, match=f"rollout math-1-1: {name} is nan; it must be finite"):
        encode_group(group)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_ids", np.zeros(3, np.int64)),
        ("response_ids", np.zeros(2, np.int32)),
        ("versions", np.zeros(2, np.int32)),
        ("loss_mask", np.zeros(3, np.float32)),
        ("logprobs", np.zeros(3)),
    ],
)
def test_arrays_that_were_put_in_by_hand_and_do_not_fit_are_refused(name: str, value: Any) -> None:
    group = a_group(1)
    setattr(group.rollouts[1], name, value)
    with pytest.raises(ValueError, match=r"rollout math-1-1: its arrays .* tokens enter by append\(\)"):
        encode_group(group)


def change_extras(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def forge(parts: dict[str, Any]) -> None:
        extras = json.loads(parts["payload"][0])
        extras[0] |= changes
        parts["payload"] = (json.dumps(extras), parts["payload"][1])

    return forge


def change_payload(change: Callable[[str, bytes], tuple[str, bytes]]) -> Callable[[dict[str, Any]], None]:
    def forge(parts: dict[str, Any]) -> None:
        parts["payload"] = change(*parts["payload"])

    return forge


def change_runs(*runs: int) -> Callable[[dict[str, Any]], None]:
    """Writes over the first member's one run of versions, which stands behind its 3 tokens and 3 logprobs."""

    def change(extras: str, arrays: bytes) -> tuple[str, bytes]:
        return extras, arrays[:24] + np.array(runs, np.int32).tobytes() + arrays[32:]

    return change_payload(change)


def change_row(name: str, value: Any, table: str = "group_row") -> Callable[[dict[str, Any]], None]:
    def forge(parts: dict[str, Any]) -> None:
        (parts[table] if table == "group_row" else parts[table][0])[name] = value

    return forge


def set_prompt(prompt: str) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts.update(prompt=prompt)


FORGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "negative length": change_extras(n=-1),
    "negative prompt": change_extras(prompt_n=-7),
    "shared with nobody": change_extras(prompt_n=-1),
    "negative runs": change_extras(runs=-1),
    "huge length": change_extras(n=2**31),
    "astronomical length": change_extras(n=10**30),
    "fractional length": change_extras(n=3.0),
    "length in words": change_extras(n="3"),
    "no length": change_extras(n=None),
    "unknown turns": change_extras(turns=[["assistant"]]),
    "turns of no kind": change_extras(turns=3),
    "huge run": change_runs(0, 2**31 - 1),
    "negative run": change_runs(0, -3),
    "short run": change_runs(0, 2),
    "extras of another shape": change_payload(lambda extras, arrays: ('{"n": 1}', arrays)),
    "extras that are a number": change_payload(lambda extras, arrays: ("7", arrays)),
    "extras that are not JSON": change_payload(lambda extras, arrays: (extras[:-5], arrays)),
    "extras nested without end": change_payload(lambda extras, arrays: ("[" * 100_000, arrays)),
    "one member too few": change_payload(lambda extras, arrays: (json.dumps(json.loads(extras)[:1]), arrays)),
    "truncated bytes": change_payload(lambda extras, arrays: (extras, arrays[:-1])),
    "no bytes": change_payload(lambda extras, arrays: (extras, b"")),
    "bytes too many": change_payload(lambda extras, arrays: (extras, arrays + b"\0")),
    "mask of twos": change_payload(lambda extras, arrays: (extras, arrays[:-1] + b"\2")),
    "bytes that are text": change_payload(lambda extras, arrays: (extras, "x" * len(arrays))),  # type: ignore[return-value, arg-type]
    "infinite logprob": change_payload(lambda extras, arrays: (extras, arrays[:12] + np.float32(np.inf).tobytes() + arrays[16:])),
    "prompt that is not JSON": set_prompt("{"),
    "prompt nested without end": set_prompt("[" * 100_000),
    "no prompt": set_prompt("[]"),
    "prompt of another kind": set_prompt("[7]"),
    "prompt with other columns": set_prompt('[{"evil": 1}]'),
    "prompt that says more than a prompt": set_prompt('[{"group_id": 7}]'),
    "unknown status": change_row("status", "stolen"),
    "unknown status of a member": change_row("status", "stolen", "member_rows"),
    "member in another place": change_row("member", 1, "member_rows"),
    "no members": lambda parts: parts["member_rows"].clear(),
    "task without a name": change_row("task_name", ""),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
def test_a_forged_payload_is_refused_without_a_large_allocation(forge: Callable[[dict[str, Any]], None]) -> None:
    parts = stored(encode_group(a_group(1)))
    forge(parts)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptPayloadError, match=r"group 1.*restore it from a copy"):
            decode_group(**parts)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@UNHURRIED
@given(st.binary(max_size=120), st.data())
def test_random_damage_is_refused_or_gives_a_valid_group(noise: bytes, data: st.DataObject) -> None:
    parts = stored(encode_group(a_group(1)))
    extras, arrays = parts["payload"]
    at = data.draw(st.integers(0, len(arrays)))
    parts["payload"] = (extras, arrays[:at] + noise + arrays[at + data.draw(st.integers(0, len(noise))) :])
    try:
        group = decode_group(**parts)
    except CorruptPayloadError:
        return
    assert plain(decode_group(**stored(encode_group(group)))) == plain(group)


def chat_group(size: int = 2) -> RolloutGroup:
    row = {"messages": [{"role": "user", "content": "2+2?"}], "media": ["image"]}
    return RolloutGroup.from_row(1, row, group_size=size, task_name="math", position=Position(0, 0))


def test_what_a_loop_adds_to_the_conversation_is_stored_with_the_response() -> None:
    drawn, later = chat_group(), chat_group()
    later.rollouts[0].messages.append({"role": "assistant", "content": "4?"})  # type: ignore[union-attr]
    later.rollouts[1].media = None
    encoded = encode_group(later)
    decoded = decode_group(**stored(encoded) | {"prompt": encode_group(drawn).prompt})  # the prompt stays what was drawn
    assert plain(decoded) == plain(later)
    assert "messages" not in encode_group(drawn).extras, "what the row gives is not stored again"


def test_a_row_is_encoded_only_by_who_writes_it() -> None:
    group = chat_group()
    group.rollouts[0].row = {"messages": group.rollouts[0].messages, "image": object()}
    encoded = encode_group(group)
    with pytest.raises(ValueError, match="row of group 1 cannot be stored"):
        _ = encoded.prompt


def test_what_is_added_after_encoding_is_not_stored() -> None:
    group = a_group(1, size=1)
    group.rollouts[0].messages = [{"role": "user", "content": "2+2?"}]
    encoded = encode_group(group)
    group.rollouts[0].messages.append({"role": "assistant", "content": "4"})
    assert (
        decode_group(**stored(encoded)).rollouts[0].messages == json.loads(encoded.prompt)[0]["messages"] == group.rollouts[0].messages[:1]
    )
