"""Drawing prompts: `PromptSampler` from a dataset, `ReplayPromptSampler` first from what the buffer still holds."""

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from agent_loop.chat import Tokenizer, encode_chat
from agent_loop.sampling import whole
from buffer import DrawnRow, Position, ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.codec import encode_group, encode_prompt
from buffer.errors import CursorConflictError
from buffer.rows import prompt_fields
from producer.dataset import Cursor, SourceRow, row_source
from producer.errors import DatasetError
from producer.lookahead import Lookahead
from producer.predict import PromptOrder, predicted_length

T = TypeVar("T")


class Tail(NamedTuple):
    """How a batch stands to what was left behind, where there are tail batches.

    Attributes:
        now: whether it is one: of what was interrupted, that which was stopped most often comes first. If not, expired groups, and
            those interrupted often enough, are left for one.
        candidate_step: interruptions that are often enough.
    """

    now: bool
    candidate_step: int


LEFT_BEHIND = (Status.EXPIRED, Status.INTERRUPTED, Status.PENDING)
"""What a buffer may hold for a task beside fresh prompts, in the order in which it is offered."""


class _CheckedRow(NamedTuple):
    """A row and why it cannot be run (None if it can)."""

    source: SourceRow
    error: str | None


class PromptSampler:
    """Draws prompts from a dataset, each as a group of `group_size` rollouts.

    The iterator over the dataset is made at the first `sample()`, never here: only then is the position known from
    which it goes on, and a dataloader's workers start there. At the end of the dataset the next epoch begins, with
    a new shuffle.

    Args:
        dataset: a list, a map-style dataset (`__len__`, `__getitem__`) of rows, or a torchdata
            `StatefulDataLoader`. A row is a mapping with `prompt` (text or chat messages), `messages` or `prompt_ids`.
        group_size: rollouts a prompt.
        shuffle: a new order each epoch, from `seed`; a dataloader keeps its own order.
        seed: of the shuffle.
        max_prompt_tokens: longer prompts are bad rows; needs `tokenizer` unless rows have `prompt_ids`. An image counts as the
            one token that stands for it in the prompt.
        tokenizer: counts a prompt's tokens for that bound.
        on_bad_row: "raise" stops with an error naming the row; "fail" records it as a failed group (where there is a
            buffer) and goes on.

    Raises:
        DatasetError: a dataset that cannot be resumed; at `sample()` an empty one, or a bad row.
    """

    def __init__(
        self,
        dataset: Any,
        group_size: int = 8,
        shuffle: bool = True,
        seed: int = 0,
        *,
        max_prompt_tokens: int | None = None,
        tokenizer: Tokenizer | None = None,
        on_bad_row: Literal["raise", "fail"] = "raise",
    ) -> None:
        if whole("group_size", group_size) < 1:
            raise ValueError(f"group_size={group_size} makes no group; it must be 1 or more")
        if max_prompt_tokens is not None and whole("max_prompt_tokens", max_prompt_tokens) < 1:
            raise ValueError(f"max_prompt_tokens={max_prompt_tokens} lets no prompt through; it must be 1 or more")
        if on_bad_row not in ("raise", "fail"):
            raise ValueError(f"on_bad_row={on_bad_row!r} is unknown; choose 'raise' or 'fail'")
        self.group_size = group_size
        self._source = row_source(dataset, shuffle=shuffle, seed=seed)
        self._max_prompt_tokens, self._tokenizer, self._on_bad_row = max_prompt_tokens, tokenizer, on_bad_row
        self._lock = asyncio.Lock()
        self._stream: tuple[ReplayBuffer | None, str] | None = None
        self._moves = 0
        self._waiting: deque[_CheckedRow] = deque()
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="millrace-dataset")
        self._local_ids = itertools.count()

    @property
    def offers(self) -> Sequence[Status]:
        """Which of the groups that the buffer holds are offered before fresh prompts."""
        return ()

    async def sample(self, task_name: str = "default", *, buffer: ReplayBuffer | None = None) -> RolloutGroup:
        """The next group to run.

        With a buffer the draw is durable and the group is running, claimed by this process; without one it is
        pending, and known to nobody else.
        """
        (group,) = await self.sample_many(task_name, 1, buffer=buffer)
        return group

    async def sample_many(
        self, task_name: str, n: int, *, buffer: ReplayBuffer | None = None, exclude: Collection[int] = (), tail: Tail | None = None
    ) -> list[RolloutGroup]:
        """The next `n` groups; see `sample`.

        All of them or none: when it raises or is cancelled, what it had claimed already is given back.

        Args:
            task_name: whose prompts.
            n: how many groups.
            buffer: where the draw is recorded.
            exclude: groups not to be offered again.
            tail: see `Tail`; None where there are no tail batches.
        """
        async with self._lock:
            return await self._fill([], task_name, n, buffer)

    async def _fill(self, groups: list[RolloutGroup], task_name: str, n: int, buffer: ReplayBuffer | None) -> list[RolloutGroup]:
        """Add fresh prompts to `groups` until there are `n`."""
        try:
            while len(groups) < n:
                groups += await self._draw(task_name, n - len(groups), buffer)
        except BaseException:
            if buffer is not None:
                # Nobody will ever hear of these: running for good, if they were not released.
                await buffer.release([group.group_id for group in groups])
            raise
        return groups

    async def _draw(self, task_name: str, n: int, buffer: ReplayBuffer | None) -> list[RolloutGroup]:
        """At least one group and at most `n`; with a buffer they run."""
        if buffer is None:
            return await self._good(task_name, n, None, partial(self._local_groups, task_name))
        return await self._good(task_name, n, buffer, partial(self._recorded, buffer, buffer.draw_and_start, task_name))

    async def _draw_pending(self, task_name: str, n: int, buffer: ReplayBuffer) -> list[int]:
        """Record at least one good row and at most `n` as pending groups; their ids."""
        return await self._good(task_name, n, buffer, partial(self._record_pending, task_name, buffer))

    async def _good(
        self, task_name: str, n: int, buffer: ReplayBuffer | None, record: Callable[[Sequence[_CheckedRow]], Awaitable[list[T]]]
    ) -> list[T]:
        """What `record` makes of the next rows: of at least one that is good, and at most `n`."""
        first: Position | None = None
        bad = 0
        while True:
            rows = await self._read(task_name, n, buffer)
            try:
                made = await record(rows)
            except CursorConflictError:
                if buffer is None or not buffer.shared:
                    raise
                continue  # Another process drew these prompts meanwhile: the dataset is opened again where that left it.
            if made:
                return made
            last = rows[-1].source
            first, bad = first or rows[0].source.position, bad + len(rows)
            if bad > _MOST_BAD_ROWS or last.position >= (first.epoch + 1, first.offset):
                raise DatasetError(f"{bad} rows in a row are bad, the last, {last.name}, because: {rows[-1].error}; look at the columns")

    async def _read(self, task_name: str, n: int, buffer: ReplayBuffer | None) -> list[_CheckedRow]:
        """Up to `n` rows that are not recorded yet; a bad one, where that is an error, is never passed over."""
        if self._stream != (buffer, task_name):
            await self._open(task_name, buffer)
        while len(self._waiting) < n:
            await self._on_reading_thread(self._read_one)
        # By index: a read whose caller was cancelled may add a row right now, which an iterator would not stand.
        rows = [self._waiting[index] for index in range(n)]
        if self._on_bad_row == "raise" and rows and rows[0].error is not None:
            raise DatasetError(f"{rows[0].source.name} is bad: {rows[0].error}; mend it, or pass on_bad_row='fail' to record it and go on")
        return list(itertools.takewhile(lambda row: self._on_bad_row == "fail" or row.error is None, rows))

    async def _open(self, task_name: str, buffer: ReplayBuffer | None) -> None:
        cursor: Cursor | None = None
        if buffer is not None:
            stored = await buffer.cursor(task_name)
            self._moves, cursor = stored.moves, stored.state
        await self._on_reading_thread(self._source.open, cursor)
        # After it: a read that an earlier, cancelled call left behind on the thread has ended by now.
        self._waiting.clear()
        self._stream = (buffer, task_name)

    async def _on_reading_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        # A dataset may read from disk, a dataloader waits for its workers. One thread: calls keep their order.
        return await asyncio.get_running_loop().run_in_executor(self._reading, function, *arguments)

    def _read_one(self) -> None:
        row = self._source.read()
        # Kept here, on the thread: were the caller cancelled, a returned row would be lost.
        self._waiting.append(_CheckedRow(row, self._why_bad(row.row)))

    async def _record_pending(self, task_name: str, buffer: ReplayBuffer, rows: Sequence[_CheckedRow]) -> list[int]:
        ids = await self._recorded(buffer, buffer.draw, task_name, rows)
        return [group_id for group_id, row in zip(ids, rows, strict=True) if row.error is None]

    async def _recorded(
        self, buffer: ReplayBuffer, draw: Callable[..., Awaitable[list[T]]], task_name: str, rows: Sequence[_CheckedRow]
    ) -> list[T]:
        drawn = [DrawnRow(_recordable(row), row.source.position, row.error) for row in rows]
        # If this is cut short it is not known where the dataset stands: then the database is asked again.
        self._stream = None
        made = await draw(task_name, drawn, group_size=self.group_size, moves=self._moves, cursor=rows[-1].source.cursor)
        self._stream, self._moves = (buffer, task_name), self._moves + 1
        self._forget(len(rows))
        return made

    def _forget(self, n: int) -> None:
        for _ in range(n):
            self._waiting.popleft()

    async def _local_groups(self, task_name: str, rows: Sequence[_CheckedRow]) -> list[RolloutGroup]:
        groups = [self._local_group(task_name, row.source) for row in rows if row.error is None]
        self._forget(len(rows))
        return groups

    def _local_group(self, task_name: str, source: SourceRow) -> RolloutGroup:
        return RolloutGroup.from_row(
            next(self._local_ids), source.row, group_size=self.group_size, task_name=task_name, position=source.position
        )

    def _why_bad(self, row: Any) -> str | None:
        try:
            _check_storable(row)
            return self._why_too_long(prompt_fields(row), row.get("tools"))
        except _BAD_ROW as error:
            return str(error)

    def _why_too_long(self, fields: dict[str, Any], tools: Any) -> str | None:
        if self._max_prompt_tokens is None:
            return None
        length = self._prompt_tokens(fields, tools)
        return (
            None if length <= self._max_prompt_tokens else f"the prompt has {length} tokens, max_prompt_tokens is {self._max_prompt_tokens}"
        )

    def _prompt_tokens(self, fields: dict[str, Any], tools: Any) -> int:
        if fields["prompt_ids"] is not None:
            return len(fields["prompt_ids"])
        if self._tokenizer is None:
            raise ValueError("its length is unknown: max_prompt_tokens needs tokenizer= for rows without prompt_ids")
        if fields["messages"] is not None:
            return int(encode_chat(fields["messages"], self._tokenizer, tools=tools).size)
        return len(self._tokenizer.encode(fields["prompt"]))


_MOST_BAD_ROWS = 1000
"""So many bad rows without a good one between them are a wrong dataset, not bad luck."""

_BAD_ROW = (ValueError, TypeError, OverflowError, RecursionError)


def _check_storable(row: Any) -> None:
    """Raise one of `_BAD_ROW` if the row makes no group that can be written, before anything is drawn with it."""
    group = RolloutGroup.from_row(0, row, group_size=1, task_name="check", position=Position(0, 0))
    if (given := row.get("prompt_ids")) is not None:
        ids = np.asarray(given)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"prompt_ids is an array of {ids.dtype} of shape {ids.shape}; it must be one list of whole numbers")
        if ids.min() < 0:
            raise ValueError(f"prompt_ids hold {ids.min()}; token ids are 0 or more")
    _ = encode_group(group).prompt


def _recordable(checked: _CheckedRow) -> Any:
    """The row; a bad one that is not JSON is recorded as what Python shows of it."""
    row = checked.source.row
    if checked.error is not None:
        try:
            encode_prompt([RolloutState(0, 0, row=row)])
        except _BAD_ROW:
            return {"value": ascii(row)[:1000]}
    return row


_EPOCHS_LOOKED_AT = 3
"""A prediction is the mean over so many: responses vary, and a prompt that failed in the last epoch may have finished before."""

_MOST_WAITING = 100_000
"""Drawn prompts that are looked at to choose among; more were left by other runs with larger windows, and wait their turn."""


class ReplayPromptSampler(PromptSampler):
    """Offers first what the buffer holds for the task, then fresh prompts.

    Args:
        dataset: as of `PromptSampler`, like the other arguments.
        buffer: whose expired, interrupted and pending groups (in this order) are offered before fresh prompts.
        replay: which of these are offered.
        order: in which drawn prompts are started: `SortedWindows(...)` or another of `producer.predict`. Prompts are
            then drawn ahead, as pending groups, to choose among. Lengths are those of earlier epochs of a list or map-style
            dataset; of a dataloader's rows none are known. None: as they are drawn.
    """

    def __init__(
        self,
        dataset: Any,
        buffer: ReplayBuffer,
        group_size: int = 8,
        *,
        replay: Sequence[Status] = LEFT_BEHIND,
        order: PromptOrder | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(f"buffer={buffer!r:.80} is no ReplayBuffer; pass an open one")
        super().__init__(dataset, group_size, **options)
        if unknown := [status for status in replay if status not in LEFT_BEHIND]:
            raise ValueError(f"replay={unknown[0]!r} cannot be offered again; choose among {[str(s) for s in LEFT_BEHIND]}")
        if order is not None and not isinstance(order, PromptOrder):
            raise TypeError(
                f"order={order!r:.80} is none; give SortedWindows(), SimilarPredictedTogether(), LongestPredictedFirst() or None"
            )
        if order is not None and Status.PENDING not in replay:
            raise ValueError(
                f"order={order!r} chooses among pending groups, and replay={[str(s) for s in replay]} leaves them out; add them"
            )
        self.buffer, self._replay, self._order = buffer, tuple(replay), order
        self._lookaheads: dict[str, Lookahead] = {}

    @property
    def offers(self) -> Sequence[Status]:
        return self._replay

    async def sample_many(
        self, task_name: str, n: int, *, buffer: ReplayBuffer | None = None, exclude: Collection[int] = (), tail: Tail | None = None
    ) -> list[RolloutGroup]:
        if buffer is not None and buffer is not self.buffer:
            raise ValueError("the strategy and its ReplayPromptSampler have different buffers; give both the same one")
        statuses = [status for status in self._replay if self._order is None or status is not Status.PENDING]
        async with self._lock:
            left = await self._claim(task_name, n, statuses, exclude, tail)
            if (lookahead := self._lookaheads.get(task_name)) is not None and not (tail and tail.now):
                left = lookahead.longest_remaining_first(left)
            return await self._fill(left, task_name, n, self.buffer)

    async def _claim(
        self, task_name: str, n: int, statuses: Sequence[Status], exclude: Collection[int], tail: Tail | None
    ) -> list[RolloutGroup]:
        # Where the counts are in memory: claiming is a transaction, and mostly nothing is left behind.
        if not self.buffer.shared and not sum([await self.buffer.count(task_name, status) for status in statuses]):
            return []
        if tail is None:
            return await self.buffer.claim(task_name, n, statuses=statuses, exclude=exclude)
        if tail.now:
            return await self.buffer.claim(task_name, n, statuses=statuses, exclude=exclude, order="most_interrupted")
        now = [status for status in statuses if status is not Status.EXPIRED]
        return await self.buffer.claim(task_name, n, statuses=now, exclude=exclude, interrupted_below=tail.candidate_step)

    async def _draw(self, task_name: str, n: int, buffer: ReplayBuffer | None) -> list[RolloutGroup]:
        if self._order is None or buffer is None:
            return await super()._draw(task_name, n, buffer)
        lookahead = self._lookaheads.setdefault(task_name, Lookahead(self._order))
        while True:
            if lookahead.missing(n):
                await self._look_ahead(task_name, n, buffer, lookahead)
            chosen = lookahead.choose(n)
            started = await buffer.claim(task_name, n, statuses=[Status.PENDING], among=chosen)
            lookahead.gone(chosen)
            if started:
                return started
            # Else they are another process's by now.

    async def _look_ahead(self, task_name: str, n: int, buffer: ReplayBuffer, lookahead: Lookahead) -> None:
        """Draw prompts until enough wait to be chosen among, and look up what is known of their lengths."""
        lookahead.update(await buffer.positions(task_name, Status.PENDING, limit=_MOST_WAITING))
        while (missing := lookahead.missing(n)) > 0:
            await self._draw_pending(task_name, missing, buffer)
            lookahead.update(await buffer.positions(task_name, Status.PENDING, limit=_MOST_WAITING))
        lookahead.predict(await self._predicted(task_name, lookahead.unpredicted(), buffer))

    async def _predicted(self, task_name: str, positions: Mapping[int, Position], buffer: ReplayBuffer) -> dict[int, float]:
        """By group, how long the responses to its prompt were in earlier epochs; only of those of which it is known."""
        if self._stream is None:
            await self._open(task_name, buffer)
        before = await self._on_reading_thread(self._earlier, positions)
        lengths = await buffer.response_lengths(task_name, {place for places in before.values() for place in places})
        found = {group_id: predicted_length([lengths[at] for at in places if at in lengths]) for group_id, places in before.items()}
        return {group_id: length for group_id, length in found.items() if length is not None}

    def _earlier(self, positions: Mapping[int, Position]) -> dict[int, list[Position]]:
        return {group_id: self._source.earlier(position, _EPOCHS_LOOKED_AT) for group_id, position in positions.items()}
