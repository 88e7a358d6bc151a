"""What a rollout is: one response to one prompt (`RolloutState`), and the group scheduled together (`RolloutGroup`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from buffer.amounts import NOTHING, Amount
from buffer.numbers import plain_number, refuse_text
from buffer.repeated import repeated, repeats
from buffer.rows import drawn_fields, prompt_fields
from buffer.staleness import FIRST_TIMELINE, Level, Timeline, fresh_mask, oldest_version, staleness, too_stale
from buffer.status import GROUP_WIDE, Status, group_status, parse_status

TOKEN_ARRAYS = ("response_ids", "logprobs", "loss_mask", "versions", "timelines")
"""The fields of a rollout that hold one value a token."""

FINISHED = frozenset({"stop", "length"})
"""Finish reasons after which a response needs no more tokens."""


_WHOLE = frozenset({Status.COMPLETED, *GROUP_WIDE})
"""A response in one of these is whole, also where its agent loop gave no finish reason."""


class Position(NamedTuple):
    """Where in its task's stream of prompts a group was drawn; unique within a task."""

    epoch: int
    offset: int


class Turn(NamedTuple):
    """A span `[start, end)` of the response's tokens and who produced it: "assistant" or "environment"."""

    role: str
    start: int
    end: int


def _empty(dtype: type[np.generic]) -> NDArray[Any]:
    array = np.empty(0, dtype)
    array.flags.writeable = False
    return array


_EMPTY: dict[type[np.generic], NDArray[Any]] = {dtype: _empty(dtype) for dtype in (np.int32, np.float32, np.uint8)}
"""Arrays are replaced, never written to: all that are empty are one."""


def _array(values: ArrayLike | None, dtype: type[np.generic]) -> NDArray[Any]:
    """A private read-only copy: arrays are replaced, never written to, so that a snapshot may share them."""
    given = np.asarray([] if values is None else values)
    if not given.size:
        return _EMPTY[dtype]
    array = _flat(given, dtype)
    array = array if array.base is None else array.copy()
    array.flags.writeable = False
    return array


def _flat(given: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """The values in one row; perhaps those of `given` themselves, as a view."""
    flat = given.reshape(-1)
    if flat.dtype == dtype:
        return flat
    array = flat.astype(dtype)
    if dtype is not np.float32 and not np.array_equal(array, flat):
        raise ValueError(f"{flat[:4].tolist()}... are not whole numbers within the range of {np.dtype(dtype)}")
    return array


@dataclass(slots=True, eq=False)
class RolloutState:
    """One response to one prompt, however many turns.

    It is owned by one agent loop at a time. `response_ids` (int32), `logprobs` (float32, natural log, of the
    sampled tokens), `loss_mask` (uint8, 1 where trainable) and `versions` (int32, the policy that produced the
    token) and `timelines` (int32, the number of the timeline of that version) always have one length. `append` is the only
    way tokens enter and `reset` the only way they leave.

    `timeline` is the run's when the state was handed out: `append` stamps its number on tokens, and staleness is counted on
    it (see `buffer.staleness`). It is not stored. Tokens given without `timelines` are of this timeline.

    `media` are the images that the model is shown, in order: those of the row's messages, or beside them. A loop may add to `messages`
    and `media`: they are stored with the response, and `reset` makes them the row's again.
    `row`, `prompt` and `sampling` are for reading: they are stored once, when the prompt is drawn.

    `dropped` is what `reset` made it forget since it was stored last: storing it adds that to the task's account.
    """

    group_id: int
    index: int
    task_name: str = "default"
    status: Status = Status.PENDING
    attempts: int = 0
    interruptions: int = 0
    error: str | None = None
    timeline: Timeline = FIRST_TIMELINE

    row: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_ids: NDArray[np.int32] | None = None
    media: list[Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    response_ids: NDArray[np.int32] = field(default_factory=lambda: _EMPTY[np.int32])
    logprobs: NDArray[np.float32] = field(default_factory=lambda: _EMPTY[np.float32])
    loss_mask: NDArray[np.uint8] = field(default_factory=lambda: _EMPTY[np.uint8])
    versions: NDArray[np.int32] = field(default_factory=lambda: _EMPTY[np.int32])
    timelines: NDArray[np.int32] = field(default_factory=lambda: _EMPTY[np.int32])
    finish_reason: str | None = None
    text: str | None = None
    turns: list[Turn] = field(default_factory=list)

    score: float | None = None
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    dropped: Amount = NOTHING

    def __post_init__(self) -> None:
        self.status = parse_status(self.status)
        self.group_id = plain_number("group_id", self.group_id)
        self.index = plain_number("index", self.index)
        if not self.task_name:
            raise ValueError("task_name is empty; give every rollout the name of its task")
        refuse_text("task_name", self.task_name)
        if self.index < 0:
            raise ValueError(f"index {self.index} of a rollout in its group must be 0 or more")
        if self.prompt_ids is not None:
            self.prompt_ids = _array(self.prompt_ids, np.int32)
        self.response_ids = _array(self.response_ids, np.int32)
        self.logprobs = _array(self.logprobs, np.float32)
        self.loss_mask = _array(self.loss_mask, np.uint8)
        self.versions = _array(self.versions, np.int32)
        timelines = _array(self.timelines, np.int32)
        self.timelines = timelines if timelines.size else self._of_now(self.response_ids.size)
        self.turns = [Turn(*turn) for turn in self.turns]
        # Lists of its own: siblings come from one row, and what one of them appends is not the others'.
        self.messages = None if self.messages is None else [dict(message) for message in self.messages]
        self.media = None if self.media is None else list(self.media)
        self._check_lengths()
        if self.response_ids.size:
            self._check_tokens()

    def _check_tokens(self) -> None:
        _check_not_negative(self.rollout_id, token_ids=self.response_ids, versions=self.versions, timelines=self.timelines)
        if (self.loss_mask > 1).any():
            raise ValueError(f"rollout {self.rollout_id}: loss_mask holds {self.loss_mask.max()}; it is 1 where trainable, else 0")
        _check_logprobs(self.logprobs, self.loss_mask, self.rollout_id)

    @property
    def rollout_id(self) -> str:
        """Unique over tasks, epochs and restarts of a run."""
        return f"{self.task_name}-{self.group_id}-{self.index}"

    @property
    def finished(self) -> bool:
        """Whether the response is whole ("stop" or "length"), scored or not."""
        return self.finish_reason in FINISHED

    @property
    def left_out(self) -> bool:
        """Whether it failed on every attempt in a group that was kept without it; `error` says why.

        Such a member has no score of its own, is not run again, and is not trained on.
        """
        return self.error is not None and (self.status is Status.COMPLETED or self.status in GROUP_WIDE)

    @property
    def amount(self) -> Amount:
        """What was sampled of it: its tokens, and whether they are a whole response, of a member that is not left out."""
        n, whole = self.response_ids.size, is_whole(self)
        return Amount(n, int(whole), n if whole else 0)

    @property
    def min_version(self) -> int | None:
        """The oldest version among the trainable tokens; None where there is none."""
        return oldest_version(self.versions, self.loss_mask)

    @property
    def effective_versions(self) -> NDArray[np.int64]:
        """One a token: the version from which its staleness is counted on `timeline`; `versions` unless a rewind undid some."""
        return self.timeline.effective(self.versions, self.timelines)

    @property
    def undone(self) -> bool:
        """Whether a trainable token was produced by weights that a rewind undid."""
        return bool((self.timeline.undone(self.versions, self.timelines) & (self.loss_mask == 1)).any())

    def staleness(self, version: int) -> int | None:
        """`version` minus the oldest effective version among the trainable tokens; None where there is none."""
        return staleness(oldest_version(self.effective_versions, self.loss_mask), version)

    def too_stale(self, version: int, max_staleness: int, level: Level = Level.SEQUENCE) -> bool:
        """Whether the staleness at `version` exceeds the bound; see `buffer.staleness.Level` for what `level` looks at."""
        return too_stale(self.effective_versions, self.loss_mask, version, max_staleness, level)

    def masked(self, version: int, max_staleness: int) -> "RolloutState":
        """A copy in which tokens that are too stale at `version` are not trained on; see `buffer.staleness`."""
        mask = fresh_mask(self.effective_versions, self.loss_mask, version, max_staleness)
        return replace(self, loss_mask=mask, reward_parts=dict(self.reward_parts), metrics=dict(self.metrics))

    def detached(self) -> "RolloutState":
        """A copy that later changes of this one do not reach; the arrays, which never change, and what is for reading are shared.

        It is quick: nothing is checked again.
        """
        copy: RolloutState = object.__new__(RolloutState)
        copy.group_id, copy.index, copy.task_name = self.group_id, self.index, self.task_name
        copy.status, copy.attempts, copy.interruptions = self.status, self.attempts, self.interruptions
        copy.error, copy.timeline = self.error, self.timeline
        copy.row, copy.prompt, copy.sampling, copy.prompt_ids = self.row, self.prompt, self.sampling, self.prompt_ids
        copy.messages = None if self.messages is None else [dict(message) for message in self.messages]
        copy.media = None if self.media is None else list(self.media)
        copy.response_ids, copy.logprobs, copy.loss_mask = self.response_ids, self.logprobs, self.loss_mask
        copy.versions, copy.timelines = self.versions, self.timelines
        copy.finish_reason, copy.text, copy.turns = self.finish_reason, self.text, list(self.turns)
        copy.score, copy.reward = self.score, self.reward
        copy.reward_parts, copy.metrics, copy.dropped = dict(self.reward_parts), dict(self.metrics), self.dropped
        return copy

    def _sibling(self, index: int) -> "RolloutState":
        copy = self.detached()
        copy.index = index
        return copy

    def append(
        self,
        token_ids: Sequence[int] | NDArray[Any],
        *,
        logprobs: ArrayLike | None = None,
        version: int | ArrayLike = 0,
        trainable: bool = True,
    ) -> None:
        """Add tokens to the response.

        Args:
            token_ids: the new tokens, in order.
            logprobs: of the sampled tokens, one a token; required and finite where trainable, else 0 by default.
            version: of the policy that produced them; one number, or one a token.
            trainable: False for tokens of tools and of the environment; they get mask 0.

        Raises:
            ValueError: unequal lengths, a negative id or version, or a trainable token without a finite log-probability.
                Nothing is added.
        """
        ids = _flat(np.asarray(token_ids), np.int32)
        if ids.size == 0:
            return
        if logprobs is None and trainable:
            raise ValueError(f"rollout {self.rollout_id}: trainable tokens need logprobs; pass them, or trainable=False")
        new_logprobs = np.zeros(ids.size, np.float32) if logprobs is None else np.asarray(logprobs, dtype=np.float32).reshape(-1)
        new_versions = _flat(np.asarray(version), np.int32)
        if np.ndim(version) == 0 or (new_versions.shape == ids.shape and bool((new_versions == new_versions[0]).all())):
            new_versions = repeated(int(new_versions[0]), ids.size)
        for name, values in (("logprobs", new_logprobs), ("version", new_versions)):
            if values.shape != ids.shape:
                raise ValueError(
                    f"rollout {self.rollout_id}: {ids.size} token ids came with {values.size} values of {name}; give one a token"
                )
        _check_not_negative(self.rollout_id, token_ids=ids, versions=new_versions)
        if trainable:
            _check_logprobs(new_logprobs, None, self.rollout_id)
        start = self.response_ids.size
        self.response_ids = _joined(self.response_ids, ids)
        self.logprobs = _joined(self.logprobs, new_logprobs)
        self.loss_mask = _joined(self.loss_mask, repeated(1 if trainable else 0, ids.size, self.loss_mask.dtype))
        self.versions = _joined(self.versions, new_versions)
        self.timelines = _joined(self.timelines, self._of_now(ids.size))
        self._extend_turns("assistant" if trainable else "environment", start)

    def reset(self) -> None:
        """Forget the response and everything judged from it. The row stays, messages and media are as it gave them."""
        self.dropped += self.amount
        for name, drawn in drawn_fields(self.row).items():
            setattr(self, name, drawn)
        self.response_ids = _EMPTY[np.int32]
        self.logprobs = _EMPTY[np.float32]
        self.loss_mask = _EMPTY[np.uint8]
        self.versions = _EMPTY[np.int32]
        self.timelines = _EMPTY[np.int32]
        self.finish_reason = self.text = self.score = self.reward = None
        self.turns, self.reward_parts, self.metrics = [], {}, {}

    def _of_now(self, n: int) -> NDArray[np.int32]:
        return repeated(self.timeline.number, n)

    def _extend_turns(self, role: str, start: int) -> None:
        end = int(self.response_ids.size)
        if self.turns and self.turns[-1].role == role:
            # An interrupted turn that goes on is one turn.
            self.turns[-1] = self.turns[-1]._replace(end=end)
        else:
            self.turns.append(Turn(role, start, end))

    def _check_lengths(self) -> None:
        lengths = {name: getattr(self, name).size for name in TOKEN_ARRAYS}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"rollout {self.rollout_id}: lengths differ ({lengths}); ids, logprobs, mask and versions need one length")


def is_whole(rollout: RolloutState) -> bool:
    """Whether its response counts as whole: finished, or complete without a finish reason, and not left out."""
    return (rollout.finish_reason in FINISHED or rollout.status in _WHOLE) and not rollout.left_out


def _joined(old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
    value = new.item(0)
    if isinstance(value, int) and repeats(new, value) and (not old.size or repeats(old, value)):
        return repeated(value, old.size + new.size, new.dtype)
    joined: NDArray[Any] = np.concatenate((old, new)) if old.size else new.copy()
    joined.setflags(write=False)
    return joined


def _check_not_negative(rollout_id: str, **arrays: NDArray[np.int32]) -> None:
    for name, values in arrays.items():
        if values.size and np.minimum.reduce(values) < 0:  # `min` takes twice as long for few values
            raise ValueError(f"rollout {rollout_id}: {name} hold {values.min()}; they are 0 or more")


def _check_logprobs(logprobs: NDArray[np.float32], loss_mask: NDArray[np.uint8] | None, rollout_id: str) -> None:
    """Those of trainable tokens are finite; without a mask all are trainable."""
    finite = np.isfinite(logprobs)
    if loss_mask is not None:
        finite |= loss_mask != 1
    if not np.logical_and.reduce(finite):
        at = int(np.argmin(finite))
        raise ValueError(f"rollout {rollout_id}: log-probability of trainable token {at} is {logprobs[at]}; it must be finite")


@dataclass(slots=True, eq=False)
class RolloutGroup:
    """The rollouts of one prompt: what is scheduled, stored and trained on together.

    `status` is derived from the members. `position` is the (epoch, offset) of the prompt in its task's stream.
    """

    group_id: int
    rollouts: list[RolloutState]
    task_name: str = "default"
    position: Position | None = None
    consumed_step: int | None = None
    filter_reason: str | None = None

    def __post_init__(self) -> None:
        self.group_id = plain_number("group_id", self.group_id)
        if not self.rollouts:
            raise ValueError(f"group {self.group_id} has no rollouts; a group holds at least one")
        if self.position is not None:
            epoch, offset = self.position
            self.position = Position(plain_number("epoch", epoch), plain_number("offset", offset))
        if self.consumed_step is not None:
            self.consumed_step = plain_number("consumed_step", self.consumed_step)
        for index, rollout in enumerate(self.rollouts):
            if (rollout.group_id, rollout.task_name, rollout.index) != (self.group_id, self.task_name, index):
                raise ValueError(
                    f"rollout {rollout.rollout_id} does not belong at index {index} of group {self.group_id} of task "
                    f"{self.task_name!r}; give it the group's id and task, and its place as index"
                )
        group_status(self.statuses)

    @property
    def statuses(self) -> list[Status]:
        """The members' statuses, in order."""
        return [rollout.status for rollout in self.rollouts]

    @property
    def status(self) -> Status:
        """Derived from the members; see `buffer.status.group_status`."""
        return group_status(self.statuses)

    @property
    def min_version(self) -> int | None:
        """The oldest version among the trainable tokens of all members; None where there is none."""
        known = [version for rollout in self.rollouts if (version := rollout.min_version) is not None]
        return min(known) if known else None

    def staleness(self, version: int) -> int | None:
        """The largest of the members': how far the oldest trainable token lies behind `version`; None where there is none."""
        known = [own for rollout in self.rollouts if (own := rollout.staleness(version)) is not None]
        return max(known, default=None)

    def masked(self, version: int, max_staleness: int) -> "RolloutGroup":
        """A copy for training at `version`: tokens staler than `max_staleness` get mask 0. This group stays as it is.

        It is not for storing: a `put` of it would keep the reduced masks.
        """
        return replace(self, rollouts=[rollout.masked(version, max_staleness) for rollout in self.rollouts])

    def mark(self, status: Status, *, reason: str | None = None) -> None:
        """Give every member the group-wide `status`; `reason` says why a group was filtered."""
        if status not in GROUP_WIDE:
            raise ValueError(f"{status} is not a status of a whole group; those are {sorted(GROUP_WIDE)}")
        for rollout in self.rollouts:
            rollout.status = status
        if status is Status.FILTERED:
            self.filter_reason = reason or "no reason given"

    @classmethod
    def from_row(cls, group_id: int, row: Mapping[str, Any], *, group_size: int, task_name: str, position: Position) -> "RolloutGroup":
        """A pending group of `group_size` rollouts for the dataset row; see `buffer.rows.prompt_fields` for what a row holds."""
        first = RolloutState(group_id=group_id, index=0, task_name=task_name, row=row, **prompt_fields(row))
        rollouts = [first, *(first._sibling(index) for index in range(1, group_size))][:group_size]
        return cls(group_id=group_id, rollouts=rollouts, task_name=task_name, position=position)
