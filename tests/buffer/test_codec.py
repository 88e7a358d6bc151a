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
from buffer.codec import GROUP_COLUMNS, MEMBER_COLUMNS, EncodedGroup, decode_group, encode, encode_group, encode_prefix, snapshot
from buffer.errors import CorruptPayloadError
from buffer.rollout import TOKEN_ARRAYS
from buffer.staleness import NO_VERSION, Timeline
from buffer.status import GROUP_WIDE, group_status, member_status
from tests.buffer.groups import a_group, plain

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
INT32 = st.integers(0, 2**31 - 1)
TEXT = st.text(max_size=20)  # all of unicode but half surrogate pairs
COLUMN_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
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
    timelines = np.array(draw(st.just([0] * n) | st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.int32)
    return {"response_ids": ids, "logprobs": logprobs, "loss_mask": mask, "versions": versions, "timelines": timelines}


@st.composite
def judgements(draw: st.DrawFn) -> dict[str, Any]:
    numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
    parts = st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3)
    return {
        "attempts": draw(st.integers(0, 9)),
        "interruptions": draw(st.integers(0, 9)),
        "error": draw(st.none() | COLUMN_TEXT),
        "finish_reason": draw(st.sampled_from([None, "stop", "length", "abort"])),
        "text": draw(st.none() | st.text(max_size=60)),
        "turns": draw(st.lists(st.builds(Turn, TEXT, st.integers(0, 9), st.integers(0, 9)), max_size=3)),
        "score": draw(numbers),
        "reward": draw(numbers),
        "reward_parts": draw(parts),
        "metrics": draw(parts),
    }


TASK_NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=5)


@st.composite
def groups(draw: st.DrawFn) -> RolloutGroup:
    """Any group the store can hold, its members' prompts shared or of their own."""
    size, group_id, task_name = draw(st.integers(1, 4)), draw(st.integers(0, 2**62 - 1)), draw(TASK_NAMES)
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
    return RolloutGroup(group_id, rollouts, task_name, position, filter_reason=draw(st.none() | COLUMN_TEXT))


def stored(encoded: EncodedGroup) -> dict[str, Any]:
    """What the tables give back: arguments of `decode_group`."""
    row = {"group_id": encoded.group_id, "task_name": encoded.task_name, "status": encoded.status.value, "consumed_step": None}
    row |= encoded.group
    return {
        "group_row": tuple(row[name] for name in GROUP_COLUMNS),
        "member_rows": [tuple(member[name] for name in MEMBER_COLUMNS) for member in encoded.rollouts],
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
    assert encoded.group["payload_bytes"] == len(encoded.arrays) + len(encoded.extras)
    assert encoded.group["tokens"] == sum(member["tokens"] for member in encoded.rollouts)
    assert encoded.status is group_status(group.statuses)


@UNHURRIED
@given(groups(), st.lists(st.integers(0, 2**31), max_size=4))
def test_what_expires_by_is_counted_on_the_timeline_of_now(group: RolloutGroup, forks: list[int]) -> None:
    timeline = Timeline(tuple(forks))
    encoded = encode(snapshot(group), timeline)
    for rollout in group.rollouts:
        rollout.timeline = timeline
    members = [rollout.effective_versions[rollout.loss_mask == 1].tolist() for rollout in group.rollouts]
    assert encoded.group["oldest_version"] == min((min(own) for own in members if own), default=NO_VERSION)
    assert encoded.group["freshest_version"] == min((max(own) for own in members if own), default=NO_VERSION)
    assert encoded.group["min_version"] == group.min_version, "a rewind leaves the plain versions as they are"
    assert encoded.timeline == len(forks)
    assert encode(encoded.snapshot).arrays == encoded.arrays, "a snapshot can be encoded again"


def test_without_a_timeline_staleness_is_counted_on_the_newest_that_a_member_knows() -> None:
    group = a_group(1, version=9)
    group.rollouts[1].timeline = Timeline((5,))
    encoded = encode_group(group)
    assert (encoded.timeline, encoded.group["oldest_version"], encoded.group["min_version"]) == (1, 1, 9)
    assert encode(encoded.snapshot, Timeline((5, 3))).group["oldest_version"] == -3


@UNHURRIED
@given(groups())
def test_a_group_is_handed_out_on_the_timeline_of_now(group: RolloutGroup) -> None:
    timeline = Timeline((3,))
    decoded = decode_group(**stored(encode_group(group)), timeline=timeline)
    assert {rollout.timeline for rollout in decoded.rollouts} == {timeline}
    decoded.rollouts[0].append([1], logprobs=[-1.0], version=3)
    assert decoded.rollouts[0].timelines[-1] == 1


def test_timelines_are_stored_only_of_runs_that_were_rewound() -> None:
    group = a_group(1)
    assert "timelines" not in encode_group(group).extras
    group.rollouts[0].timeline = Timeline((0,))
    group.rollouts[0].append([1, 2], logprobs=[-1.0, -1.0], version=0)
    extras = json.loads(encode_group(group).extras)
    assert [extra.get("timelines") for extra in extras] == [[[0, 3], [1, 2]], None]


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


def test_what_a_column_of_text_cannot_hold_is_kept_or_escaped() -> None:
    group, odd = a_group(1), "half \ud83d of a pair, and \0"
    group.rollouts[0].text = group.rollouts[0].prompt = odd
    group.rollouts[0].error = group.filter_reason = odd
    decoded = decode_group(**stored(encode_group(group)))
    assert (decoded.rollouts[0].text, decoded.rollouts[0].prompt) == (odd, odd)
    assert decoded.rollouts[0].error == decoded.filter_reason == "half \\ud83d of a pair, and \\x00"


@pytest.mark.parametrize("text", ["\ud83d\ude00", "two \ude00\ud83d", "ü\ud83d€", "\0", ""])
def test_text_comes_back_as_it_was_half_pairs_or_not(text: str) -> None:
    group = a_group(1)
    group.rollouts[1].text = text
    decoded = decode_group(**stored(encode_group(group)))
    assert [rollout.text for rollout in decoded.rollouts] == ["three", text]
    assert "three" not in encode_group(group).extras, "text is not escaped as JSON"


def test_text_that_is_none_is_refused() -> None:
    group = a_group(1)
    group.rollouts[1].text = 5  # type: ignore[assignment]
    with pytest.raises(ValueError, match="rollout math-1-1: text is 5; it must be text, or None"):
        encode_group(group)


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("response_ids", np.array([5, -1, 5], np.int32), "a token id is -1"),
        ("loss_mask", np.array([1, 2, 1], np.uint8), "a mask holds 2"),
        ("logprobs", np.array([-1, np.nan, -1], np.float32), "a log-probability of a trainable token is not finite"),
        ("versions", np.array([0, -1, 0], np.int32), "a version is negative"),
        ("timelines", np.array([0, -1, 0], np.int32), "a version is negative"),
    ],
)
@pytest.mark.parametrize("prompt_ids", [None, np.arange(3, dtype=np.int32)], ids=["text", "ids"])
def test_what_would_not_decode_is_not_stored(name: str, value: Any, message: str, prompt_ids: Any) -> None:
    group = a_group(1)
    group.rollouts[0].prompt_ids = prompt_ids
    setattr(group.rollouts[1], name, value)
    with pytest.raises(ValueError, match=rf"group 1 cannot be stored: {message}.*; tokens enter by append\(\)"):
        encode_group(group)
    with pytest.raises(ValueError, match=f"group 1 cannot be stored: {message}"):
        encode_prefix(snapshot(group), {1: 0})
    setattr(group.rollouts[1], name, np.ones_like(value))
    encode_group(group)


@pytest.mark.parametrize(("name", "value"), [("index", 0), ("group_id", 7)])
def test_a_member_that_was_given_another_place_is_refused(name: str, value: int) -> None:
    group = a_group(1)
    setattr(group.rollouts[1], name, value)
    for encode_it in (encode_group, lambda group: encode_prefix(snapshot(group), {0: 0})):
        with pytest.raises(ValueError, match=r"rollout math-\d-\d does not belong at index 1 of group 1; .* are for reading"):
            encode_it(group)


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


IDS, LOGPROBS, RUNS, MASKS, TEXTS = 0, 24, 48, 64, 70
"""Where these begin in the payload of `a_group(1)`: 2 members of 3 tokens each."""


def change_bytes(at: int, new: bytes) -> Callable[[dict[str, Any]], None]:
    return change_payload(lambda extras, arrays: (extras, arrays[:at] + new + arrays[at + len(new) :]))


def change_runs(*runs: int) -> Callable[[dict[str, Any]], None]:
    """Writes over the first member's one run of versions."""
    return change_bytes(RUNS, np.array(runs, np.int32).tobytes())


def change_row(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts.update(group_row=_changed(parts["group_row"], GROUP_COLUMNS.index(name), value))


def change_member(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Changes the first member's row."""

    def forge(parts: dict[str, Any]) -> None:
        parts["member_rows"][0] = _changed(parts["member_rows"][0], MEMBER_COLUMNS.index(name), value)

    return forge


def _changed(row: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*row[:at], value, *row[at + 1 :])


def set_prompt(prompt: str) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts.update(prompt=prompt)


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
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
    "mask of twos": change_bytes(TEXTS - 1, b"\2"),
    "negative token": change_bytes(IDS + 12, np.int32(-1).tobytes()),
    "negative version": change_runs(-1, 3),
    "run beyond its member": change_bytes(RUNS, np.array([0, 4, 0, 2], np.int32).tobytes()),
    "text that is not UTF-8": change_bytes(TEXTS, b"\xff"),
    "text longer than its bytes": change_extras(text_n=6),
    "negative text": change_extras(text_n=-1),
    "text of no length": change_extras(text_n="5"),
    "text that is shared out otherwise": change_extras(text_n=True),
    "timelines of no shape": change_extras(timelines=3),
    "timelines of none": change_extras(timelines=[]),
    "timelines that are too long": change_extras(timelines=[[1, 4]]),
    "timelines that are far too long": change_extras(timelines=[[1, 2**40]]),
    "negative timeline": change_extras(timelines=[[-1, 3]]),
    "timeline beyond all numbers": change_extras(timelines=[[2**31, 3]]),
    "fractional timeline": change_extras(timelines=[[1.0, 3]]),
    "bytes that are text": change_payload(lambda extras, arrays: (extras, "x" * len(arrays))),  # type: ignore[return-value, arg-type]
    "infinite logprob": change_bytes(LOGPROBS + 4, np.float32(np.inf).tobytes()),
    "prompt that is not JSON": set_prompt("{"),
    "prompt nested without end": set_prompt("[" * 100_000),
    "no prompt": set_prompt("[]"),
    "prompt of another kind": set_prompt("[7]"),
    "prompt with other columns": set_prompt('[{"evil": 1}]'),
    "prompt that says more than a prompt": set_prompt('[{"group_id": 7}]'),
    "unknown status": change_row("status", "stolen"),
    "unknown status of a member": change_member("status", "stolen"),
    "member in another place": change_member("member", 1),
    "no members": lambda parts: parts["member_rows"].clear(),
    "task without a name": change_row("task_name", ""),
    "step that is text": change_row("consumed_step", "third"),
    "place that is text": lambda parts: (change_row("epoch", 0)(parts), change_row("position", "first")(parts)),
    "prompt length in words": change_extras(prompt_n="2"),
    "prompt length with a fraction": change_extras(prompt_n=-1.0),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
def test_a_forged_payload_is_refused_without_a_large_allocation(forge: Callable[[dict[str, Any]], object]) -> None:
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


@UNHURRIED
@given(groups())
def test_a_snapshot_is_the_group_as_it_was(group: RolloutGroup) -> None:
    before, taken = plain(group), snapshot(group)
    for rollout in group.rollouts:
        rollout.append([7], logprobs=[-1.0])
        for values in (rollout.reward_parts, rollout.metrics, rollout.row):
            values["later"] = 1.0  # type: ignore[index]
        for message in rollout.messages or []:
            message["role"] = "later"
        for added in (rollout.messages, rollout.media, rollout.turns):
            if added:
                added.append(added[0])
        rollout.status, rollout.text, rollout.score = Status.RUNNING, "later", 0.5
    kept = RolloutGroup(taken.group_id, list(taken.rollouts), taken.task_name, taken.position, filter_reason=taken.filter_reason)
    assert plain(kept) == before


def test_a_snapshot_shares_what_never_changes() -> None:
    group = a_group(1)
    for was, taken in zip(group.rollouts, snapshot(group).rollouts, strict=True):
        assert all(getattr(was, name) is getattr(taken, name) for name in TOKEN_ARRAYS)


def test_every_array_that_is_decoded_is_read_only() -> None:
    for payload in (stored(encode_group(a_group(1))), stored(encode_group(a_group(1))) | {"payload": None}):
        for rollout in decode_group(**payload).rollouts:
            assert not any(getattr(rollout, name).flags.writeable for name in TOKEN_ARRAYS)


def test_a_response_longer_than_most_comes_back() -> None:
    group = a_group(1, size=1, tokens=2**16 + 3, version=4)
    assert plain(decode_group(**stored(encode_group(group)))) == plain(group)


FIRST_SCHEMA = (
    '[{"n":3,"prompt_n":2,"runs":2,"text":"f\u00fcnf","turns":[["assistant",0,3]],"reward_parts":{"a":0.5},"metrics":{}},'
    '{"n":2,"prompt_n":-1,"runs":1,"text":null,"turns":[],"reward_parts":{},"metrics":{"m":1.0}},'
    '{"n":0,"prompt_n":null,"runs":0,"text":"","turns":[],"reward_parts":{},"metrics":{},"messages":[{"role":"user"}]}]',
    bytes.fromhex(
        "6500000066000000"  # prompt_ids 101, 102
        "010000000200000003000000" "000000bf000080bf0000c0bf" "07000000010000000800000002000000"
        "0400000005000000" "000000c0000020c0" "0900000002000000"
        "010001" "0101"
    ),
)  # fmt: skip
"""A payload as version 1 of the schema has it."""


def test_a_payload_of_the_first_schema_decodes() -> None:
    rollouts = [RolloutState(1, index, "math", Status.COMPLETED, prompt="p") for index in range(3)]
    parts = stored(encode_group(RolloutGroup(1, rollouts, "math"))) | {"payload": FIRST_SCHEMA}
    one, two, three = decode_group(**parts).rollouts
    assert [one.prompt_ids.tolist(), two.prompt_ids.tolist(), three.prompt_ids] == [[101, 102], [101, 102], None]  # type: ignore[union-attr]
    assert [state.response_ids.tolist() for state in (one, two, three)] == [[1, 2, 3], [4, 5], []]
    assert [state.logprobs.tolist() for state in (one, two, three)] == [[-0.5, -1.0, -1.5], [-2.0, -2.5], []]
    assert [state.versions.tolist() for state in (one, two, three)] == [[7, 8, 8], [9, 9], []]
    assert [state.loss_mask.tolist() for state in (one, two, three)] == [[1, 0, 1], [1, 1], []]
    assert [state.timelines.tolist() for state in (one, two, three)] == [[0, 0, 0], [0, 0], []]
    assert [state.text for state in (one, two, three)] == ["fünf", None, ""]
    assert (one.turns, one.reward_parts, two.metrics, three.messages) == (
        [Turn("assistant", 0, 3)],
        {"a": 0.5},
        {"m": 1.0},
        [{"role": "user"}],
    )


@pytest.mark.parametrize("at", [8, 20, 32, 48, len(FIRST_SCHEMA[1]) - 1])
def test_a_damaged_payload_of_the_first_schema_is_refused(at: int) -> None:
    rollouts = [RolloutState(1, index, "math", Status.COMPLETED, prompt="p") for index in range(3)]
    arrays = FIRST_SCHEMA[1][:at] + b"\xff\xff\xff\xff" + FIRST_SCHEMA[1][at + 4 :]
    parts = stored(encode_group(RolloutGroup(1, rollouts, "math"))) | {"payload": (FIRST_SCHEMA[0], arrays[: len(FIRST_SCHEMA[1])])}
    with pytest.raises(CorruptPayloadError):
        decode_group(**parts)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("error", ValueError("x"), r"a reason or an error is ValueError\('x'\); it must be text"),
        ("finish_reason", 5, "is 5; it must be text"),
        ("attempts", 1.5, r"attempts=1\.5 must be a whole number"),
        ("score", "high", "score is high; it must be finite"),
    ],
)
def test_what_no_column_holds_is_refused(field: str, value: object, message: str) -> None:
    rollout = RolloutState(1, 0)
    setattr(rollout, field, value)
    with pytest.raises(ValueError, match=message):
        encode_group(RolloutGroup(1, [rollout]))


PIECES = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=3), st.booleans()), max_size=4)
"""Of a response: the versions of each one's tokens, and whether they are trainable."""


@UNHURRIED
@given(st.lists(PIECES, min_size=1, max_size=3), st.integers(0, 1))
def test_what_was_appended_is_stored_as_what_was_given_whole(members: list[list[tuple[list[int], bool]]], rewinds: int) -> None:
    """`append` shares arrays of one value, which are not looked through; what is stored is the same."""
    appended, whole, timeline = [], [], Timeline((1,) * rewinds)
    for index, pieces in enumerate(members):
        rollout = RolloutState(1, index, "math", Status.COMPLETED, timeline=timeline)
        for versions, trainable in pieces:
            version = versions[0] if len(set(versions)) == 1 else versions
            rollout.append([7] * len(versions), logprobs=[-0.5] * len(versions), version=version, trainable=trainable)
        n = sum(len(versions) for versions, _ in pieces)
        arrays: dict[str, Any] = {
            "response_ids": [7] * n,
            "logprobs": [-0.5] * n,
            "loss_mask": [int(trainable) for versions, trainable in pieces for _ in versions],
            "versions": [version for versions, _ in pieces for version in versions],
        }
        assert {name: getattr(rollout, name).tolist() for name in TOKEN_ARRAYS} == {**arrays, "timelines": [rewinds] * n}
        appended.append(rollout)
        whole.append(RolloutState(1, index, "math", Status.COMPLETED, timeline=timeline, turns=rollout.turns, **arrays))
    mine, theirs = (encode_group(RolloutGroup(1, rollouts, "math")) for rollouts in (appended, whole))
    assert mine._replace(snapshot=theirs.snapshot) == theirs


def test_parts_of_arrays_are_stored() -> None:
    group = a_group(1, tokens=6)
    for rollout in group.rollouts:
        for name in TOKEN_ARRAYS:
            setattr(rollout, name, getattr(rollout, name)[::2])
    again = decode_group(**stored(encode_group(group)))
    assert [rollout.response_ids.tolist() for rollout in again.rollouts] == [[0, 2, 4]] * 2
