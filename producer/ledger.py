"""`Ledger`: what happens to a task's groups between one batch and the next, as its producer tells it. Pure: times are given.

started, rollouts, load, ended ... -> handed_out -> `BatchRecord`
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from buffer import Status

_MOST_REASONS, _LONGEST_NAME = 16, 48
OTHER = "other"
"""Stands for reasons beyond the first few of a batch: a logger that gets ever new names becomes slow."""


@dataclass(frozen=True, slots=True)
class EngineUse:
    """What the engine said of itself, in the mean over the time: requests decoded and requests that waited; and preemptions."""

    running: float
    waiting: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What happened between two batches. Times are in seconds.

    Attributes:
        period: since the batch before was handed out; of the first, since it was asked for, or something ran before.
        waited: from asking for this batch to its handing out.
        between: from the handing out of the batch before to asking for this one: training, mostly. None for the first.
        started: groups that were started.
        ended: groups that ended, by how.
        reasons: of those that were filtered or failed, by a name made of the reason.
        tokens: that the groups sampled that ended.
        group_seconds: from start to end, of groups that came to an end by themselves.
        in_flight: rollouts in flight, in the mean over the period.
        most_in_flight: the most at once.
        busy: the part of the period in which any was in flight.
        engine: what it said; None where it said nothing.
    """

    period: float
    waited: float
    between: float | None
    started: int
    ended: Mapping[Status, int]
    reasons: Mapping[tuple[Status, str], int]
    tokens: int
    group_seconds: Sequence[float]
    in_flight: float
    most_in_flight: int
    busy: float
    engine: EngineUse | None


@dataclass(slots=True)
class _Level:
    """A number that changes now and then, and its mean over time."""

    value: float = 0
    since: float | None = None
    area: float = 0.0
    above: float = 0.0
    most: float = 0

    def set(self, value: float, at: float) -> None:
        self._up_to(at)
        self.value, self.most = value, max(self.most, value)

    def found(self, value: float, at: float) -> None:
        """It is looked at now and then: since the last time it was what it was then or is now, whichever is more."""
        self.value = max(self.value, value)
        self.set(value, at)

    def _up_to(self, at: float) -> None:
        if self.since is not None and at > self.since:
            self.area += self.value * (at - self.since)
            self.above += (at - self.since) if self.value > 0 else 0.0
        self.since = at

    def begin_anew(self, at: float) -> None:
        self._up_to(at)
        self.area, self.above, self.most = 0.0, 0.0, self.value


@dataclass(slots=True)
class _Counted:
    """What is counted anew with each batch."""

    started: int = 0
    tokens: int = 0
    ended: Counter[Status] = field(default_factory=Counter)
    reasons: Counter[tuple[Status, str]] = field(default_factory=Counter)
    group_seconds: list[float] = field(default_factory=list)


class Ledger:
    """Is told what happens to one task's groups, in the order of time, and closes its books when a batch is handed out."""

    def __init__(self) -> None:
        self._counted = _Counted()
        self._since: dict[int, float] = {}
        self._in_flight, self._running, self._waiting = _Level(), _Level(), _Level()
        self._preemptions: tuple[int, int] | None = None  # at the batch before, and now
        self._first: float | None = None
        self._last: float | None = None

    def started(self, group_id: int, at: float) -> None:
        """A group was started."""
        self._since[group_id] = at
        self._counted.started += 1

    def rollouts(self, n: int, at: float) -> None:
        """So many rollouts are in flight from now on."""
        self._first = at if self._first is None else self._first
        self._in_flight.set(n, at)

    def load(self, running: int, waiting: int, preemptions: int, at: float) -> None:
        """What the engine says of itself; `preemptions` since it was opened.

        It is asked when rollouts begin or end. Those that begin are not in it yet, and those that end are not any more: of what
        it says at two such moments, the larger holds between them.
        """
        self._running.found(running, at)
        self._waiting.found(waiting, at)
        before = preemptions if self._preemptions is None else self._preemptions[0]
        self._preemptions = (min(before, preemptions), preemptions)  # another engine begins at 0

    def ended(self, group_id: int, status: Status, tokens: int, reason: str | None, at: float) -> None:
        """A group ended, in this status and for this reason, after it sampled so many tokens."""
        counted, since = self._counted, self._since.pop(group_id, None)
        counted.ended[status] += 1
        counted.tokens += tokens
        if since is not None and status is not Status.INTERRUPTED:
            counted.group_seconds.append(at - since)
        if status in (Status.FILTERED, Status.FAILED):
            counted.reasons[status, self._name_of(status, reason)] += 1

    def stopped(self) -> None:
        """Nothing runs any more: of groups that were started and did not end, an error on the way, no end will be told."""
        self._since.clear()

    def _name_of(self, status: Status, reason: str | None) -> str:
        name = metric_name(reason or "")
        known = self._counted.reasons
        return name if (status, name) in known or len(known) < _MOST_REASONS else OTHER

    def handed_out(self, asked: float, at: float) -> BatchRecord:
        """The record of the batch that is handed out, and was asked for at `asked`; the next one begins."""
        began = self._last if self._last is not None else min(asked, asked if self._first is None else self._first)
        period = max(0.0, at - began)
        self._in_flight.set(self._in_flight.value, at)
        counted, self._counted = self._counted, _Counted()
        record = BatchRecord(
            period=period,
            waited=at - asked,
            between=None if self._last is None else max(0.0, asked - self._last),
            started=counted.started,
            ended=counted.ended,
            reasons=counted.reasons,
            tokens=counted.tokens,
            group_seconds=counted.group_seconds,
            in_flight=self._in_flight.area / period if period else 0.0,
            most_in_flight=int(self._in_flight.most),
            busy=min(self._in_flight.above, period),
            engine=self._engine_use(period, at),
        )
        self._in_flight.begin_anew(at)
        self._last = at
        return record

    def _engine_use(self, period: float, at: float) -> EngineUse | None:
        if self._preemptions is None or not period:
            return None
        before, now = self._preemptions
        levels = (self._running, self._waiting)
        for level in levels:
            level.set(level.value, at)
        use = EngineUse(self._running.area / period, self._waiting.area / period, now - before)
        for level in levels:
            level.begin_anew(at)
        self._preemptions = (now, now)
        return use


def metric_name(reason: str) -> str:
    """A short name of a reason, of small letters, digits and "_" only: its words up to the first colon, every number as "n".

    So the reasons of groups that failed alike have one name, whatever numbers stand in them.
    """
    words = re.sub(r"\d+(\.\d+)?", "n", reason.partition(":")[0].lower())
    return re.sub(r"[^a-z]+", "_", words).strip("_")[:_LONGEST_NAME].rstrip("_") or OTHER
