"""Groups to and from what the tables hold: JSON for words, bytes for tokens and text (`buffer.payload`), never pickle.

Storing has two halves. `snapshot` is quick, for the event loop: it keeps what may still change. `encode` makes the rows of it,
wherever there is time.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from buffer.amounts import NOTHING as NO_AMOUNT
from buffer.amounts import Amount
from buffer.errors import CorruptPayloadError
from buffer.numbers import plain_number
from buffer.payload import NOTHING, Response, Runs, Span, pack, unpack
from buffer.rollout import Position, RolloutGroup, RolloutState, Turn, is_whole
from buffer.rows import drawn_fields
from buffer.staleness import FIRST_TIMELINE, NO_VERSION, Timeline
from buffer.status import Status, group_status, member_status

_REMEDY = "the database was damaged or edited: restore it from a copy, or delete this group's row"
_STATUSES = {status.value: status for status in Status}
_PROMPT_FIELDS = ("row", "prompt", "messages", "media", "sampling")
_prompt_of = attrgetter(*_PROMPT_FIELDS)


class GroupSnapshot(NamedTuple):
    """A group as it was at one moment, detached from the objects it came from."""

    group_id: int
    task_name: str
    rollouts: Sequence[RolloutState]
    position: Position | None
    filter_reason: str | None

    @property
    def status(self) -> Status:
        """Derived from the members; see `buffer.status.group_status`."""
        return group_status([rollout.status for rollout in self.rollouts])

    @property
    def lost_any(self) -> bool:
        """Whether a member was reset or met an error; of most groups none was, and the three below are nothing."""
        return any(rollout.dropped is not NO_AMOUNT or rollout.error is not None for rollout in self.rollouts)

    @property
    def dropped(self) -> Amount:
        """What its members were reset from, but for those that are left out."""
        return Amount.total(rollout.dropped for rollout in self.rollouts if not rollout.left_out)

    @property
    def left_out(self) -> Amount:
        """What members that are left out were reset from."""
        return Amount.total(rollout.dropped for rollout in self.rollouts if rollout.left_out)

    @property
    def left_out_whole(self) -> Amount:
        """Whole responses of members that are left out, which count as drawn; their tokens are the group's."""
        lengths = [rollout.response_ids.size for rollout in self.rollouts if rollout.left_out and rollout.finished]
        return Amount(0, len(lengths), sum(lengths))


def snapshot(group: RolloutGroup) -> GroupSnapshot:
    """`group` as it is now: what happens to it afterwards does not reach the snapshot. What lies within rows is shared."""
    if not group.rollouts:  # taken out since it was made
        raise ValueError(f"group {group.group_id} has no rollouts; a group holds at least one")
    rollouts = [rollout.detached() for rollout in group.rollouts]
    row, copy = None, dict[str, Any]()
    for rollout in rollouts:
        if rollout.row is not row:
            row, copy = rollout.row, dict(rollout.row)
        rollout.row = copy  # members have theirs in common, as before
    return GroupSnapshot(group.group_id, group.task_name, rollouts, group.position, group.filter_reason)


class EncodedGroup(NamedTuple):
    """A group as rows of the tables. `timeline` is the number of the one that its effective versions were computed for."""

    group_id: int
    task_name: str
    status: Status
    group: dict[str, Any]
    rollouts: list[dict[str, Any]]
    extras: str
    arrays: bytes
    timeline: int
    snapshot: GroupSnapshot

    @property
    def prompt(self) -> str:
        """The prompts as JSON. They are written once: only who adds the group pays for it, not every result."""
        return encode_prompt(self.snapshot.rollouts)


def encode_group(group: RolloutGroup) -> EncodedGroup:
    """Everything the store writes of `group` as it is now; raises what `encode` does."""
    return encode(snapshot(group))


def encode(snapshot: GroupSnapshot, timeline: Timeline | None = None) -> EncodedGroup:
    """Everything the store writes of a group, staleness counted on `timeline`, by default on the newest that a member knows.

    Raises `ValueError` where an extra is not JSON-able, a score or reward is not finite, or the arrays of a rollout
    do not belong together; `EncodedGroup.prompt` does where a row is not JSON-able.
    """
    rollouts = snapshot.rollouts
    now = _now(snapshot) if timeline is None else timeline
    responses = _responses(snapshot)
    runs = Runs.of(responses)
    spans = runs.spans(now)
    lengths, arrays = pack(responses, runs, f"group {snapshot.group_id}")
    extras = _extras_to_json(snapshot, rollouts, lengths)
    hot = {
        "epoch": None if snapshot.position is None else snapshot.position.epoch,
        "position": None if snapshot.position is None else snapshot.position.offset,
        **_versions_of([span for span in spans if span]),
        "members": len(rollouts),
        **_amounts_of(rollouts),
        "payload_bytes": len(arrays) + len(extras),
        "filter_reason": None if snapshot.filter_reason is None else storable_text(snapshot.filter_reason),
    }
    members = [_hot_member(rollout, span) for rollout, span in zip(rollouts, spans, strict=True)]
    return EncodedGroup(snapshot.group_id, snapshot.task_name, snapshot.status, hot, members, extras, arrays, now.number, snapshot)


def _responses(snapshot: GroupSnapshot) -> list[Response]:
    """Of each member; refused where an agent loop has given one another's place."""
    for place, rollout in enumerate(snapshot.rollouts):
        if rollout.index != place or rollout.group_id != snapshot.group_id:
            raise ValueError(
                f"rollout {rollout.rollout_id} does not belong at index {place} of group {snapshot.group_id}; "
                "its group_id and its index are for reading"
            )
    return [Response.of(rollout) for rollout in snapshot.rollouts]


def _now(snapshot: GroupSnapshot) -> Timeline:
    """The newest timeline that a member knows."""
    return max((rollout.timeline for rollout in snapshot.rollouts), key=lambda timeline: timeline.number)


def _amounts_of(rollouts: Sequence[RolloutState]) -> dict[str, int]:
    """How much was sampled of a group."""
    whole = [rollout.response_ids.size for rollout in rollouts if is_whole(rollout)]
    tokens = sum([rollout.response_ids.size for rollout in rollouts])
    return {"tokens": tokens, "finished": len(whole), "finished_tokens": sum(whole)}


def _versions_of(spans: Sequence[Span]) -> dict[str, int | None]:
    """A group's versions, over its members with trainable tokens."""
    return {
        "min_version": min((span.oldest for span in spans), default=None),
        "max_version": max((span.newest for span in spans), default=None),
        "oldest_version": min((span.oldest_effective for span in spans), default=NO_VERSION),
        "freshest_version": min((span.newest_effective for span in spans), default=NO_VERSION),
    }


class EncodedPrefix(NamedTuple):
    """What some members of a running group decoded since they were stored last: hot rows, and a payload to apply to the one before."""

    group_id: int
    task_name: str
    group: dict[str, Any]
    rollouts: list[dict[str, Any]]
    extras: str
    arrays: bytes


def encode_prefix(snapshot: GroupSnapshot, starts: Mapping[int, int], timeline: Timeline | None = None) -> EncodedPrefix:
    """What the store adds to a running group, of the members that `starts` names, from these tokens on.

    `group` holds the versions and the number of tokens of all its members, staleness counted as by `encode`.

    What is small is stored whole; text only of completed members, as it is decoded anew until then. Start at 0 after a reset.

    Raises `ValueError` for a member that is not there, a start beyond its tokens, and what `encode` raises it for.
    """
    chosen = [_member(snapshot, index, start) for index, start in sorted(starts.items())]
    whole = _responses(snapshot)
    spans = Runs.of(whole).spans(_now(snapshot) if timeline is None else timeline)
    deltas = [
        whole[rollout.index].since(starts[rollout.index])._replace(text=rollout.text if rollout.status is Status.COMPLETED else None)
        for rollout in chosen
    ]
    lengths, arrays = pack(deltas, Runs.of(deltas), f"group {snapshot.group_id}") if deltas else ([], b"")
    places = [{"member": rollout.index, "start": starts[rollout.index], **own} for rollout, own in zip(chosen, lengths, strict=True)]
    hot = _versions_of([span for span in spans if span]) | _amounts_of(snapshot.rollouts)
    members = [_hot_member(rollout, spans[rollout.index]) for rollout in chosen]
    return EncodedPrefix(snapshot.group_id, snapshot.task_name, hot, members, _extras_to_json(snapshot, chosen, places), arrays)


def _member(snapshot: GroupSnapshot, index: int, start: int) -> RolloutState:
    if not 0 <= index < len(snapshot.rollouts):
        raise ValueError(f"group {snapshot.group_id} has {len(snapshot.rollouts)} members, none at index {index}")
    rollout = snapshot.rollouts[index]
    if not 0 <= start <= rollout.response_ids.size:
        raise ValueError(
            f"rollout {rollout.rollout_id}: token {start} is none of its {rollout.response_ids.size}; start at 0 after a reset"
        )
    return rollout


def _extras_to_json(snapshot: GroupSnapshot, rollouts: Sequence[RolloutState], lengths: Sequence[dict[str, Any]]) -> str:
    """The lengths and what else is stored of each member, as JSON; adds the latter to `lengths`."""
    drawn = _Drawn()
    for own, rollout in zip(lengths, rollouts, strict=True):
        _add_extra(own, rollout, drawn.of(rollout.row))
    return to_json(lengths, f"messages or metrics of group {snapshot.group_id}")


def _add_extra(extra: dict[str, Any], rollout: RolloutState, was: Mapping[str, Any]) -> None:
    """What is stored of a member as JSON, empty things left out."""
    if rollout.turns:
        extra["turns"] = rollout.turns
    if rollout.reward_parts:
        extra["reward_parts"] = rollout.reward_parts
    if rollout.metrics:
        extra["metrics"] = rollout.metrics
    # The conversation and media where they are not the row's: a loop has added turns, or the group was made by hand.
    for name, own in (("messages", rollout.messages), ("media", rollout.media)):
        if own is not (drawn := was.get(name)) and not _same(own, drawn):
            extra[name] = own


class _Drawn:
    """What rows give, each looked at once: the members of a group have one in common."""

    def __init__(self) -> None:
        self._row: Any = None
        self._fields: dict[str, Any] = {}

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if row is not self._row:
            self._row, self._fields = row, drawn_fields(row)
        return self._fields


def encode_prompt(rollouts: Sequence[RolloutState]) -> str:
    """The prompts of the members as JSON: one object where all share it, as after a draw, else one a member."""
    drawn = [_prompt_of(rollout) for rollout in rollouts]
    shared = all(_same(own, drawn[0]) for own in drawn)
    prompts = [{name: value for name, value in zip(_PROMPT_FIELDS, own, strict=True) if value} for own in (drawn[:1] if shared else drawn)]
    return to_json(prompts, f"row of group {rollouts[0].group_id}")


def _same(own: Any, other: Any) -> bool:
    if own is other:
        return True
    try:
        return bool(own == other)
    except ValueError:  # an array among the columns has no one truth value
        return to_json(own, "row") == to_json(other, "row")


def _hot_member(rollout: RolloutState, span: Span | None) -> dict[str, Any]:
    return {
        "group_id": rollout.group_id,
        "member": rollout.index,
        "status": rollout.status.value,
        "attempts": plain_number("attempts", rollout.attempts),
        "interruptions": plain_number("interruptions", rollout.interruptions),
        "tokens": rollout.response_ids.size,
        "min_version": span.oldest if span else None,
        "finish_reason": None if rollout.finish_reason is None else storable_text(rollout.finish_reason),
        "score": finite(rollout.score, "score", rollout),
        "reward": finite(rollout.reward, "reward", rollout),
        "error": None if rollout.error is None else storable_text(rollout.error),
    }


def finite(value: float | None, name: str, rollout: RolloutState) -> float | None:
    """`value` as a float that a column holds; `ValueError` where it is no finite number."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        # SQL has no NaN: it would come back as "not judged".
        raise ValueError(f"rollout {rollout.rollout_id}: {name} is {value!s:.100}; it must be finite, or None with an error that says why")
    return number


# -- from rows --------------------------------------------------------------------------------------------------

GROUP_COLUMNS = ("group_id", "task_name", "status", "epoch", "position", "consumed_step", "filter_reason")
"""What `decode_group` needs of a group's row, in this order."""

MEMBER_COLUMNS = ("group_id", "member", "status", "attempts", "interruptions", "error", "finish_reason", "score", "reward")
"""What it needs of each member's, in this order."""

_Shared = tuple[Any, Any, Any, Any, Any]
"""The values of `_PROMPT_FIELDS`."""


def decode_group(
    group_row: Sequence[Any],
    member_rows: Sequence[Sequence[Any]],
    prompt: str,
    payload: tuple[str, bytes] | None,
    prefixes: Iterable[tuple[str, bytes]] = (),
    timeline: Timeline = FIRST_TIMELINE,
) -> RolloutGroup:
    """The group that these rows describe, handed out on `timeline`: the payload, and what was decoded since, in order.

    Rows are of `GROUP_COLUMNS` and `MEMBER_COLUMNS`: plain tuples, as a batch has hundreds of them.

    Raises `CorruptPayloadError` where they contradict each other.
    """
    try:
        return _decode_group(group_row, member_rows, prompt, payload, prefixes, timeline)
    except CorruptPayloadError as error:
        raise CorruptPayloadError(f"group {group_row[0]}: {error}; {_REMEDY}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CorruptPayloadError(f"group {group_row[0]} does not decode ({error}); {_REMEDY}") from error


def _decode_group(
    group_row: Sequence[Any],
    member_rows: Sequence[Sequence[Any]],
    prompt: str,
    payload: tuple[str, bytes] | None,
    prefixes: Iterable[tuple[str, bytes]],
    timeline: Timeline,
) -> RolloutGroup:
    group_id, task_name, status_value, epoch, offset, consumed_step, filter_reason = group_row
    if not task_name:
        raise CorruptPayloadError("its task has no name")
    if not member_rows or [row[1] for row in member_rows] != list(range(len(member_rows))):
        raise CorruptPayloadError(f"its rollouts are members {[row[1] for row in member_rows]}")
    stored = _decode_payload(payload, len(member_rows))
    for prefix in prefixes:
        _apply_prefix(stored, *prefix)
    group: RolloutGroup = object.__new__(RolloutGroup)
    group.group_id, group.task_name, group.filter_reason = group_id, task_name, filter_reason
    group.consumed_step = None if consumed_step is None else plain_number("consumed_step", consumed_step)
    group.position = None if epoch is None else Position(plain_number("epoch", epoch), plain_number("offset", offset))
    status = _STATUSES[status_value]
    group.rollouts = _decode_members(group, status, member_rows, _decode_prompts(prompt, len(member_rows)), stored, timeline)
    if status in _MIXED:
        group_status(group.statuses)  # raises where they cannot stand in one group
    return group


def _decode_prompts(prompt: str, members: int) -> list[_Shared]:
    """What was drawn, one a member."""
    prompts = []
    for own in json.loads(prompt):
        if unknown := own.keys() - _PROMPT_FIELDS:
            raise CorruptPayloadError(f"a prompt has fields {sorted(unknown)[:4]}, which prompts have not")
        prompts.append((own.get("row", {}), own.get("prompt"), own.get("messages"), own.get("media"), own.get("sampling", {})))
    return prompts if len(prompts) > 1 else [prompts[0]] * members


_Stored = tuple[Response, Mapping[str, Any]]
"""Of one member: what the bytes of its payload hold, and its extras."""


def _decode_payload(payload: tuple[str, bytes] | None, members: int) -> list[_Stored]:
    if payload is None:
        return [(NOTHING, {})] * members
    extras = json.loads(payload[0])
    if len(extras) != members:
        raise CorruptPayloadError(f"a payload of {len(extras)} members stands beside {members} rollouts")
    return list(zip(unpack(extras, payload[1]), extras, strict=True))


def _apply_prefix(stored: list[_Stored], extras_json: str, arrays: bytes) -> None:
    """Go on with what was decoded after `stored`: tokens are added, everything else is replaced."""
    extras = json.loads(extras_json)
    for delta, extra in zip(unpack(extras, arrays), extras, strict=True):
        member, start = extra["member"], extra["start"]
        if type(member) is not int or type(start) is not int or not 0 <= member < len(stored):
            raise CorruptPayloadError(f"a prefix goes on at token {start!r} of member {member!r} of {len(stored)}")
        stored[member] = stored[member][0].continued(start, delta), extra


_MIXED = frozenset({Status.RUNNING, Status.INTERRUPTED, Status.EXPIRED, Status.FAILED})
"""Statuses of groups whose members may have others."""

_MEMBER_STATUS = {group: {own.value: member_status(group, own) for own in Status} for group in Status}
"""By the group's status and the member's own, as it is stored."""


def _decode_members(
    group: RolloutGroup,
    status: Status,
    rows: Sequence[Sequence[Any]],
    prompts: Sequence[_Shared],
    stored: Sequence[_Stored],
    timeline: Timeline,
) -> list[RolloutState]:
    """The members without `RolloutState`'s own checks, which `unpack` has done for all of them at once."""
    group_id, task_name, status_of, new = group.group_id, group.task_name, _MEMBER_STATUS[status], object.__new__
    rollouts: list[RolloutState] = []
    for own, prompt, (response, extra) in zip(rows, prompts, stored, strict=True):
        state: RolloutState = new(RolloutState)
        state.group_id, state.task_name, state.timeline = group_id, task_name, timeline
        _, state.index, own_status, state.attempts, state.interruptions, state.error, state.finish_reason, state.score, state.reward = own
        state.status = status_of[own_status]
        state.row, state.prompt, messages, media, state.sampling = prompt
        state.response_ids, state.logprobs, state.loss_mask, state.versions, state.timelines, state.prompt_ids, state.text = response
        # The conversation that a loop changed wins over the row's. Lists of its own: members have their prompt in common.
        messages, media = extra.get("messages", messages), extra.get("media", media)
        state.messages = None if messages is None else [dict(message) for message in messages]
        state.media = None if media is None else list(media)
        turns = extra.get("turns")
        state.turns = [Turn(*turn) for turn in turns] if turns else []
        state.reward_parts, state.metrics = extra.get("reward_parts", {}), extra.get("metrics", {})
        state.dropped = NO_AMOUNT
        rollouts.append(state)
    return rollouts


# -- JSON ------------------------------------------------------------------------------------------------------


def to_json(value: Any, what: str) -> str:
    """Compact JSON; numpy and torch values become plain ones; anything else is refused naming `what`."""
    try:
        text = _AS_IT_IS.encode(value)
        if not is_utf8(text):
            text = _ESCAPED.encode(value)  # half a surrogate pair, escaped
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be stored: {error}; keep columns to text, finite numbers, lists and mappings") from None
    return text


def is_utf8(text: str) -> bool:
    """Whether it has no half of a surrogate pair, so that it can be written as UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def storable_text(text: str) -> str:
    """`text` with what a column of text cannot hold, half a surrogate pair and the character 0, escaped."""
    if not isinstance(text, str):
        raise ValueError(f"a reason or an error is {text!r:.100}; it must be text, or None")
    return (text if is_utf8(text) else text.encode(errors="backslashreplace").decode()).replace("\0", "\\x00")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value of type {type(value).__name__} is not JSON")


# NaN and infinity are no JSON: SQLite's functions would refuse the whole text, and every query that reads it with it.
_AS_IT_IS, _ESCAPED = (
    json.JSONEncoder(default=_plain, separators=(",", ":"), ensure_ascii=escaped, allow_nan=False) for escaped in (False, True)
)
