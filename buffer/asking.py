"""What can be asked of a buffer; nothing here changes it."""

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from buffer import arguments as args
from buffer import audit, operations, queries
from buffer.access import Access
from buffer.accounts import WINDOW, Account, account
from buffer.audit import AuditReport
from buffer.numbers import TOO_LARGE
from buffer.overview import Overview, overview
from buffer.queries import Filters, RecordedStep
from buffer.report import Report, RunReport, report
from buffer.rollout import Position, RolloutGroup
from buffer.status import Status, parse_status

_AUDIT_SLICE = 64

_RATES_OVER = 300.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of a group's status, as `ReplayBuffer.history` tells it.

    Attributes:
        at: seconds since 1970.
        source: the status before; None where the group came into being.
        target: the status after.
        owner: the process that wrote it: host, process id and a random part.
        step: of the trainer, where the group was handed out.
        version: the newest among its trainable tokens then; None without one.
        reason: an error, a filter's reason, staleness, a rewind; None where the statuses say it all.
    """

    at: float
    source: Status | None
    target: Status
    owner: str
    step: int | None
    version: int | None
    reason: str | None


class Asking(Access):
    """The questions that a `ReplayBuffer` answers."""

    async def count(self, task_name: str, status: Status | str) -> int:
        """Groups of the task with this status; costs the same whatever the size of the buffer."""
        args.require_task(task_name)
        parsed = parse_status(status)
        if self._counts is None:
            return await self._read(queries.count, task_name, parsed)
        self._check_open()
        await asyncio.sleep(0)  # who asks again and again lets others run
        return self._counts[task_name, parsed]

    async def counts(self, task_name: str) -> dict[Status, int]:
        """Groups of the task by status, every status present."""
        args.require_task(task_name)
        if self._counts is None:
            return await self._read(queries.counts, task_name)
        self._check_open()
        await asyncio.sleep(0)
        return {status: self._counts[task_name, status] for status in Status}

    async def tail_candidates(self, task_name: str, min_interruptions: int = 1) -> int:
        """Groups of the task that were left behind: expired ones, and interrupted ones with a member stopped so often.

        It costs what waits interrupted, whatever the size of the buffer.
        """
        args.require_task(task_name)
        return await self._read(queries.tail_candidates, task_name, args.whole_number("min_interruptions", min_interruptions, at_least=0))

    async def oldest_versions(self, task_name: str) -> dict[Status, dict[int, int]]:
        """Of the task's completed and its interrupted groups: how many have which oldest version, from which staleness is counted.

        A group without a trainable token has `buffer.staleness.NO_VERSION`. It costs what waits, whatever the size of the buffer.
        """
        args.require_task(task_name)
        return await self._read(queries.oldest_versions, task_name)

    async def positions(self, task_name: str, status: Status | str, *, limit: int = 1000) -> dict[int, Position | None]:
        """The task's groups of this status, the oldest first, each with the place of its prompt in the stream."""
        args.require_task(task_name)
        limit = args.whole_number("limit", limit, at_least=0)
        return await self._read(queries.positions, task_name, parse_status(status), limit)

    async def response_lengths(self, task_name: str, positions: Collection[Position]) -> dict[Position, float]:
        """How many tokens the responses to the prompts at these positions have, on average; of groups that finished only.

        It costs what is asked for, whatever the size of the buffer. Positions of which nothing is known are left out.
        """
        args.require_task(task_name)
        return await self._read(queries.response_lengths, task_name, [Position(*position) for position in positions])

    async def lengths_by_prompt(self, task_name: str) -> dict[str, list[int]]:
        """How many tokens the whole responses to each prompt have, in all epochs; what `millrace simulate` begins with.

        Keys stand for the content of prompts and tell nothing else; they come in the order of the first draw. It reads the rows of
        all groups of the task, and no tokens.
        """
        args.require_task(task_name)
        return await self._read(queries.lengths_by_prompt, task_name)

    async def task_names(self) -> list[str]:
        """The tasks of this run."""
        return await self._read(queries.task_names)

    async def last_step(self, task_name: str | None = None) -> int:
        """The last step at which anything of the task (by default of any task) was consumed; 0 before the first."""
        return await self._read(queries.last_step, args.task_or_none(task_name))

    async def next_step(self, task_name: str) -> int:
        """The step of the task's next batch where the trainer names none: behind its last one, and behind what is committed."""
        args.require_task(task_name)
        return await self._read(operations.next_step, task_name)

    async def get(self, group_id: int) -> RolloutGroup:
        """One group, payload included; `UnknownGroupError` if there is none."""
        (group,) = await self._read(queries.load_groups, args.plain_ids([group_id]))
        return group

    async def query(
        self,
        *,
        task_name: str | None = None,
        status: Status | str | Collection[Status | str] = (),
        step: int | None = None,
        min_version: int | None = None,
        max_version: int | None = None,
        min_reward: float | None = None,
        max_reward: float | None = None,
        error: str | None = None,
        min_attempts: int | None = None,
        min_age: float | None = None,
        max_age: float | None = None,
        order: Literal["oldest", "newest", "changed", "stalest", "best", "worst"] = "oldest",
        limit: int = 100,
        offset: int = 0,
    ) -> list[RolloutGroup]:
        """Groups of which all holds that is asked, payloads included.

        Args:
            task_name: whose groups.
            status: one, or any of several.
            step: at which they were consumed (and not given back since).
            min_version: no trainable token is older. Groups without trainable tokens have no versions: neither bound finds them.
            max_version: no trainable token is newer.
            min_reward: the mean reward of the members that have one is at least this. Groups without rewards are not found.
            max_reward: that mean is at most this.
            error: some member's error holds this text; capital letters of ASCII count as small ones, "" finds any error.
            min_attempts: some member failed at least so often.
            min_age: they were drawn at least so many seconds ago.
            max_age: at most so many.
            order: "oldest" or "newest" by when they were drawn, last "changed" first, "stalest" first, "best" or "worst" mean
                reward first (those without one last).
            limit: the most groups.
            offset: how many of those found are passed over.
        """
        limit, offset = args.whole_number("limit", limit, at_least=0), args.whole_number("offset", offset, at_least=0)
        filters = Filters(
            args.task_or_none(task_name),
            [parse_status(s) for s in ([status] if isinstance(status, str) else status)],
            args.whole_or_none("step", step, at_least=1),
            *args.checked_range("version", args.whole_or_none("min_version", min_version), args.whole_or_none("max_version", max_version)),
            *args.checked_range("reward", args.number_or_none("min_reward", min_reward), args.number_or_none("max_reward", max_reward)),
            args.text_or_none("error", error),
            args.whole_or_none("min_attempts", min_attempts),
            *args.drawn_between(min_age, max_age),
            args.one_of("order", order, queries.ORDERS),
        )
        return await self._read(_find_and_load, filters, limit, offset)

    async def history(self, group_id: int) -> list[Transition]:
        """Every change of the group's status, the first first; `UnknownGroupError` if there is no such group."""
        (group_id,) = args.plain_ids([group_id])
        rows = await self._read(queries.history, group_id)
        return [
            Transition(
                row.at, None if row.source is None else Status(row.source), Status(row.target), row.owner, row.step, row.version, row.reason
            )
            for row in rows
        ]

    async def account(self, task_name: str, *, window: int = WINDOW) -> Account:
        """What the task sampled over the whole run, what was wasted, and the biases of what is trained on.

        Its cost grows with what runs and with what was drawn in the last `window` steps, and not with the buffer.
        """
        args.require_task(task_name)
        window = args.whole_number("window", window, at_least=0)
        return await self._read(account, task_name, window)

    async def overview(self, *, window: float = _RATES_OVER) -> Overview:
        """How the run stands: counts, steps, versions, staleness, rates, leases and sizes, in one state of the database.

        It reads indexes: its cost grows with the groups that wait and with those committed whose tokens are there, and not with
        the others.

        Args:
            window: seconds up to now that rates are counted over; less where the run is younger, or its newest 10,000 changes
                of a status do not reach back so far.
        """
        return await self._read(overview, args.seconds("window", window))

    async def changes(self, every: float) -> AsyncGenerator[None]:
        """Yields at once, again whenever something was committed since it yielded last, and in any case every so many seconds.

        PostgreSQL tells of what other processes commit. Of a SQLite file that another process writes to, the time of the last
        change is looked at ten times a second. Close it when you are done (`contextlib.aclosing`).
        """
        seconds = args.seconds("every", every)
        self._check_open()
        with self._waiters.watching() as watch:
            while True:
                watch.clear()
                yield
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await watch.changed()

    async def report(
        self, task_names: Collection[str] = (), *, min_step: int | None = None, max_step: int | None = None, points: int = 200
    ) -> RunReport:
        """How the run went over its steps: rewards, lengths, staleness, waste and time, in one state of the database.

        It reads the rows of all groups, not their tokens: some seconds for millions of rollouts. What it gives is as long as `points`.

        Args:
            task_names: whose groups; all, where none is named.
            min_step: the first step to look at; None for the first that there is.
            max_step: the last one; None for the last that there is, with what happened since.
            points: the most parts that the steps are divided into; where they are more, some are put together.
        """
        names = [task_names] if isinstance(task_names, str) else list(task_names)
        for name in names:
            args.require_task(name)
        low, high = (args.whole_or_none(name, step, at_least=1) for name, step in (("min_step", min_step), ("max_step", max_step)))
        low, high = args.checked_range("step", low, high)
        return await self._read(report, Report(names, low, high, args.whole_number("points", points, at_least=1)), _RATES_OVER)

    async def audit(self, *, payloads: bool = False) -> AuditReport:
        """Check the conservation law: drawn prompts = groups over all statuses, counters = rows, no orphans.

        With `payloads` every payload is decoded too, and compared with the columns that are read in its place; that takes
        its time, and is done in slices, of which each sees its own state of the database.
        """
        report = await self._read(audit.audit)
        after: int | None = -TOO_LARGE if payloads else None
        problems = list(report.problems)
        while after is not None:
            found, after = await self._read(audit.audit_payloads, after, _AUDIT_SLICE)
            problems += found
        return replace(report, problems=problems)

    async def recorded_steps(self, task_name: str) -> list[RecordedStep]:
        """The steps at which groups of the task were consumed and not given back, ascending."""
        args.require_task(task_name)
        return await self._read(queries.recorded_steps, task_name)

    async def pruned_to(self) -> int:
        """The last step of which `prune` gave up a group with its row; 0 where there is none. Batches up to it are not whole."""
        return await self._read(queries.rows_pruned_to)


def _find_and_load(conn: Any, filters: Filters, limit: int, offset: int) -> list[RolloutGroup]:
    return queries.load_groups(conn, queries.find(conn, filters, limit, offset))
