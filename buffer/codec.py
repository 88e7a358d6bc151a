"""Groups to and from what the tables hold: JSON for words, raw little-endian arrays for tokens, never pickle.

Layout of `payloads.arrays`: for each member prompt_ids (int32, unless shared with member 0), response_ids (int32),
logprobs (float32) and the versions' runs (int32 value, int32 length); after all members, each one's loss_mask
(uint8). The lengths stand in `payloads.extras`. Masks come last so that every 4-byte array is aligned.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from buffer.errors import CorruptPayloadError
from buffer.rollout import Position, RolloutGroup, RolloutState, drawn_fields
from buffer.staleness import NO_VERSION, Timeline
from buffer.status import Status, member_status

if sys.byteorder != "little":
    raise ImportError("Millrace stores arrays little-endian and does not run on a big-endian machine")

_SHARED = -1
_REMEDY = "the database was damaged or edited: restore it from a copy, or delete this group's row"
_PROMPT_FIELDS = ("row", "prompt", "messages", "media", "sampling")


class EncodedGroup(NamedTuple):
    """A group as rows of the tables, detached from the objects it came from."""

    group_id: int
    task_name: str
    status: Status
    group: dict[str, Any]
    rollouts: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    extras: str
    arrays: bytes

    @property
    def prompt(self) -> str:
        """The prompts as JSON. They are written once: only who adds the group pays for it, not every result."""
        return _prompts_to_json(self.prompts, self.group_id)


def encode_group(group: RolloutGroup) -> EncodedGroup:
    """Everything the store writes of `group`.

    Raises `ValueError` where an extra is not JSON-able, a score or reward is not finite, or the arrays of a rollout
    do not belong together; `EncodedGroup.prompt` does where a row is not JSON-able.
    """
    runs = [_runs(rollout.versions) for rollout in group.rollouts]
    spans = [_trainable_span(rollout, own) for rollout, own in zip(group.rollouts, runs, strict=True)]
    extras, arrays = _encode_arrays(group.rollouts, runs)
    hot = {
        "epoch": None if group.position is None else group.position.epoch,
        "position": None if group.position is None else group.position.offset,
        "min_version": min((span[0] for span in spans if span), default=None),
        "max_version": max((span[1] for span in spans if span), default=None),
        "members": len(group.rollouts),
        "oldest_version": min((span[0] for span in spans if span), default=NO_VERSION),
        "freshest_version": min((span[1] for span in spans if span), default=NO_VERSION),
        "tokens": sum(rollout.response_ids.size for rollout in group.rollouts),
        "payload_bytes": len(arrays) + len(extras),
        "filter_reason": None if group.filter_reason is None else _storable_text(group.filter_reason),
    }
    members = [_hot_member(rollout, span) for rollout, span in zip(group.rollouts, spans, strict=True)]
    return EncodedGroup(group.group_id, group.task_name, group.status, hot, members, _prompts_of(group), extras, arrays)


def encode_prompt(rollouts: Sequence[RolloutState]) -> str:
    """The prompts of the members as JSON: one object where all share it, as after a draw, else one a member."""
    return _prompts_to_json([_prompt_of(rollout) for rollout in rollouts], rollouts[0].group_id)


def _prompts_to_json(prompts: list[dict[str, Any]], group_id: int) -> str:
    shared = all(_same(own, prompts[0]) for own in prompts[1:])
    return to_json(prompts[:1] if shared else prompts, f"row of group {group_id}")


def _same(own: Any, other: Any) -> bool:
    try:
        return bool(own == other)
    except ValueError:  # an array among the columns has no one truth value
        return to_json(own, "row") == to_json(other, "row")


def decode_group(
    group_row: Mapping[str, Any],
    member_rows: Sequence[Mapping[str, Any]],
    prompt: str,
    payload: tuple[str, bytes] | None,
    prefixes: Sequence[tuple[str, bytes]] = (),
    timeline: Timeline = Timeline(),  # noqa: B008 - a frozen value
) -> RolloutGroup:
    """The group that these rows describe; raises `CorruptPayloadError` where they contradict each other."""
    try:
        return _decode_group(group_row, member_rows, prompt, payload)
    except CorruptPayloadError as error:
        raise CorruptPayloadError(f"group {group_row['group_id']}: {error}; {_REMEDY}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CorruptPayloadError(f"group {group_row['group_id']} does not decode ({error}); {_REMEDY}") from error


def _decode_group(
    group_row: Mapping[str, Any], member_rows: Sequence[Mapping[str, Any]], prompt: str, payload: tuple[str, bytes] | None
) -> RolloutGroup:
    status = Status(group_row["status"])
    prompts = json.loads(prompt)
    stored = _decode_arrays(*payload, len(member_rows)) if payload else [{} for _ in member_rows]
    rollouts = [
        RolloutState(
            group_id=group_row["group_id"],
            index=member["member"],
            task_name=group_row["task_name"],
            status=member_status(status, Status(member["status"])),
            **{name: member[name] for name in ("attempts", "interruptions", "error", "finish_reason", "score", "reward")},
            **{**(prompts[index] if len(prompts) > 1 else prompts[0]), **stored[index]},
        )
        for index, member in enumerate(member_rows)
    ]
    position = None if group_row["epoch"] is None else Position(group_row["epoch"], group_row["position"])
    return RolloutGroup(
        group_id=group_row["group_id"],
        rollouts=rollouts,
        task_name=group_row["task_name"],
        position=position,
        consumed_step=group_row["consumed_step"],
        filter_reason=group_row["filter_reason"],
    )


def to_json(value: Any, what: str) -> str:
    """Compact JSON; numpy and torch values become plain ones; anything else is refused naming `what`."""
    try:
        text = _dumps(value, ensure_ascii=False)
        if not _is_utf8(text):
            text = _dumps(value, ensure_ascii=True)  # half a surrogate pair, escaped
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be stored: {error}; keep columns to text, finite numbers, lists and mappings") from None
    return text


def _dumps(value: Any, *, ensure_ascii: bool) -> str:
    # NaN and infinity are no JSON: SQLite's functions would refuse the whole text, and every query that reads it with it.
    return json.dumps(value, default=_plain, separators=(",", ":"), ensure_ascii=ensure_ascii, allow_nan=False)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _storable_text(text: str) -> str:
    return text if _is_utf8(text) else text.encode(errors="backslashreplace").decode()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value of type {type(value).__name__} is not JSON")


def _prompts_of(group: RolloutGroup) -> list[dict[str, Any]]:
    return [_prompt_of(rollout) for rollout in group.rollouts]


def _prompt_of(rollout: RolloutState) -> dict[str, Any]:
    # Containers of its own: the writer's thread encodes them while the caller may go on with the rollout.
    fields = {name: value for name in _PROMPT_FIELDS if (value := getattr(rollout, name))}
    return {
        name: dict(value) if isinstance(value, Mapping) else value if isinstance(value, str) else list(value)
        for name, value in fields.items()
    }


def _changed(rollout: RolloutState) -> dict[str, Any]:
    """The conversation and media where they are not the row's: a loop has added turns, or the group was made by hand."""
    drawn = drawn_fields(rollout.row)
    now = {"messages": rollout.messages, "media": rollout.media}
    return {name: value for name, value in now.items() if not _same(value, drawn.get(name))}


def _hot_member(rollout: RolloutState, span: tuple[int, int] | None) -> dict[str, Any]:
    return {
        "group_id": rollout.group_id,
        "member": rollout.index,
        "status": rollout.status.value,
        "attempts": rollout.attempts,
        "interruptions": rollout.interruptions,
        "tokens": rollout.response_ids.size,
        "min_version": span[0] if span else None,
        "finish_reason": rollout.finish_reason,
        "score": _finite(rollout.score, "score", rollout),
        "reward": _finite(rollout.reward, "reward", rollout),
        "error": None if rollout.error is None else _storable_text(rollout.error),
    }


def _finite(value: float | None, name: str, rollout: RolloutState) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        # SQL has no NaN: it would come back as "not judged".
        raise ValueError(f"rollout {rollout.rollout_id}: {name} is {number}; it must be finite, or None with an error that says why")
    return number


def _encode_arrays(rollouts: Sequence[RolloutState], runs: Sequence[NDArray[np.int32]]) -> tuple[str, bytes]:
    extras: list[dict[str, Any]] = []
    words, masks = [], []
    first = None if rollouts[0].prompt_ids is None else rollouts[0].prompt_ids.tobytes()
    for rollout, own_runs in zip(rollouts, runs, strict=True):
        prompt = None if rollout.prompt_ids is None else rollout.prompt_ids.tobytes()
        shared = rollout.index > 0 and prompt is not None and prompt == first
        n = rollout.response_ids.size
        parts = [rollout.response_ids.tobytes(), rollout.logprobs.tobytes(), own_runs.tobytes()]
        mask = rollout.loss_mask.tobytes()
        if [len(part) for part in parts] != [4 * n, 4 * n, own_runs.nbytes] or len(mask) != n or rollout.versions.size != n:
            raise ValueError(
                f"rollout {rollout.rollout_id}: its arrays are not int32, float32, uint8 and int32 of one length; "
                "tokens enter by append() and leave by reset() only"
            )
        words += parts if prompt is None or shared else [prompt, *parts]
        masks.append(mask)
        extras.append(
            {
                "n": n,
                "prompt_n": None if prompt is None else _SHARED if shared else len(prompt) // 4,
                "runs": len(own_runs),
                "text": rollout.text,
                "turns": rollout.turns,
                "reward_parts": rollout.reward_parts,
                "metrics": rollout.metrics,
                **_changed(rollout),
            }
        )
    return to_json(extras, f"text, messages or metrics of group {rollouts[0].group_id}"), b"".join(words + masks)


def _runs(versions: NDArray[np.int32]) -> NDArray[np.int32]:
    """Run-length encoding: (value, length) rows, int32, shape (runs, 2)."""
    if versions.size == 0:
        return np.empty((0, 2), np.int32)
    changes = np.flatnonzero(versions[1:] != versions[:-1]) + 1
    if not changes.size:
        return np.array([[versions[0], versions.size]], np.int32)
    starts = np.concatenate([[0], changes])
    lengths = np.diff(starts, append=versions.size)
    return np.stack([versions[starts], lengths], axis=1).astype(np.int32)


def _trainable_span(rollout: RolloutState, runs: NDArray[np.int32]) -> tuple[int, int] | None:
    """The oldest and the newest version among the trainable tokens; None where there is none."""
    if len(runs) == 1:
        version = int(runs[0, 0])
        return (version, version) if rollout.loss_mask.any() else None
    trainable = rollout.versions[rollout.loss_mask == 1]
    return (int(trainable.min()), int(trainable.max())) if trainable.size else None


class _ArrayReader:
    """Reads arrays one after the other out of a buffer, without copying."""

    def __init__(self, buffer: bytes, offset: int) -> None:
        self._buffer, self._offset = buffer, offset

    def read(self, dtype: type[np.generic], count: int) -> NDArray[Any]:
        array = np.frombuffer(self._buffer, dtype=dtype, count=count, offset=self._offset)
        self._offset += array.nbytes
        return array


def _decode_arrays(extras_json: str, arrays: bytes, members: int) -> list[dict[str, Any]]:
    extras = json.loads(extras_json)
    if len(extras) != members:
        raise CorruptPayloadError(f"a payload of {len(extras)} members stands beside {members} rollouts")
    if any(e["n"] < 0 or e["runs"] < 0 or (e["prompt_n"] is not None and e["prompt_n"] < _SHARED) for e in extras):
        raise CorruptPayloadError("a length is negative")
    words_total = sum(4 * (max(e["prompt_n"] or 0, 0) + 2 * e["n"] + 2 * e["runs"]) for e in extras)
    if words_total + sum(e["n"] for e in extras) != len(arrays):
        raise CorruptPayloadError(f"a payload has {len(arrays)} bytes, its lengths say otherwise")
    words, masks = _ArrayReader(arrays, 0), _ArrayReader(arrays, words_total)
    decoded: list[dict[str, Any]] = []
    for extra in extras:
        decoded.append(_decode_member(extra, words, masks, decoded))
    return decoded


def _decode_member(extra: dict[str, Any], words: _ArrayReader, masks: _ArrayReader, before: list[dict[str, Any]]) -> dict[str, Any]:
    if extra["prompt_n"] == _SHARED:
        prompt_ids = before[0]["prompt_ids"]
    else:
        prompt_ids = None if extra["prompt_n"] is None else words.read(np.int32, extra["prompt_n"])
    response_ids = words.read(np.int32, extra["n"])
    logprobs = words.read(np.float32, extra["n"])
    runs = words.read(np.int32, 2 * extra["runs"]).reshape(-1, 2)
    if (runs[:, 1] < 1).any() or runs[:, 1].sum(dtype=np.int64) != extra["n"]:
        # Before np.repeat: a forged length must not become an allocation.
        raise CorruptPayloadError(f"runs of versions {runs.tolist()[:4]} do not cover {extra['n']} tokens")
    return {
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
        "logprobs": logprobs,
        "versions": np.repeat(runs[:, 0], runs[:, 1]),
        "loss_mask": masks.read(np.uint8, extra["n"]),
        "text": extra["text"],
        "turns": extra["turns"],
        "reward_parts": extra["reward_parts"],
        "metrics": extra["metrics"],
        **{name: extra[name] for name in ("messages", "media") if name in extra},  # they win over those of the prompt
    }
