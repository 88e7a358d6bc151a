"""`Production`: one task's production, an actor. The loop that keeps groups running, written once for all strategies.

to_issue -> sample_many -> Flight.start -> (outcomes) -> record -> to_issue ...      the actor's own task
whole -> hand_out                                                                    whoever wants a batch
"""

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager

from agent_loop import AgentLoop
from agent_loop.errors import first_error
from buffer import Account, ReplayBuffer, RolloutGroup, Status, TakePolicy
from buffer.staleness import Level
from producer.adaptive import AdaptiveLimit
from producer.bars import Bars
from producer.bound import is_ready
from producer.errors import ProducerError, StalledError
from producer.flight import Flight
from producer.gate import Gate
from producer.issue import Load, bounded_issue, exact, groups_that_fit, tail_batch
from producer.metrics import Books, batch_metrics, handing_out
from producer.permits import Permitted
from producer.plan import Batch, Plan, ProducedBatch
from producer.prompts import PromptSampler, Tail
from producer.running import Outcome
from producer.watchdog import Stall

_log = logging.getLogger(__name__)


class Production:
    """Keeps groups of one task running, from `open` to `close`, and tells when a batch is whole.

    Args:
        buffer: where everything is kept.
        plan: of the strategy.
        agent_loop: runs the groups.
        sampler: draws them.
        task_name: whose groups.
        batch_size: groups in a batch.
        ahead: whether what runs when a batch is whole goes on running, for later ones.
        books: told of all that happens.
        permits: for rollouts in flight, shared with others; None asks nobody.
        gate: held while no group may start; None makes one that nobody holds.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        plan: Plan,
        agent_loop: AgentLoop,
        sampler: PromptSampler,
        task_name: str,
        batch_size: int,
        *,
        ahead: bool,
        books: Books,
        permits: Permitted | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._books, self._permits, self._refused = books, permits, False
        self._bars: Bars | None = None
        self._buffer, self._plan, self._agent_loop, self._sampler, self._task_name = buffer, plan, agent_loop, sampler, task_name
        self._ahead = ahead
        self.max_in_flight = plan.max_in_flight
        self.batch = Batch(batch_size)
        self._changed, self._news, self._opened = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.gate = Gate() if gate is None else gate
        self._none_claimed = asyncio.Event()
        self._none_claimed.set()
        self._flight = self._new_flight()
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._ended, self._idle = True, False
        self._expired_at: int | None = None
        self._handed_out_at: int | None = None
        self._coming: Sequence[int] | None = None
        self._warned_at: float | None = None
        self._held_back, self._in_flight = False, 0

    # -- the actor ----------------------------------------------------------------------------------------------

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Start, in a task of `tasks`; it never fails there: whoever wants a batch is told the error."""
        if not self._books.opened:
            self._books.open(await self._buffer.account(self._task_name))
        self._failure, self._flight = None, self._new_flight()
        self._opened.clear()
        self.gate.on_change = self._changed.set
        self._task = tasks.create_task(self._live())
        self._ended = False
        self._task.add_done_callback(self._over)
        await self._opened.wait()

    def _over(self, _: asyncio.Task[None]) -> None:
        # By callback: a task that is cancelled before its first step runs no line of its own.
        self._ended = True
        self._opened.set()
        self._news.set()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Run while the block does; what ended it is raised, when everything is stored."""
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    await self.open(tasks)
                    yield
                finally:
                    await self.close()
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        self.check()

    def expects(self, coming: Sequence[int]) -> None:
        """Batches of these sizes are to come, the next first, one at each version; 0 where the task is passed over."""
        self._coming = coming

    def passes(self) -> None:
        """The batch of this version is about to be taken, with groups of the task or without: what starts now is for later ones.

        Before it is taken, not after: or groups would start in the room of those that are taken, and have a batch too few.
        """
        self.batch.wanted, self._handed_out_at = False, self.version
        self._coming = None if self._coming is None else self._coming[1:]

    async def close(self) -> None:
        """Stop: what runs is interrupted and stored. An error on the way is told by `check`."""
        if self._task is not None:
            if not self._flight.failed:  # else it ends by itself, with the error
                self._task.cancel()
            try:
                await asyncio.wait([self._task])
            except asyncio.CancelledError:
                self._task.cancel()  # the second time it waits no longer for those that are slow to return
                raise

    async def stop(self) -> None:
        """Interrupt what runs and wait until it is stored; what is waited for goes on afterwards."""
        await self._flight.stop()

    async def drained(self) -> None:
        """Wait until nothing runs; call it while its gate is held."""
        await self._flight.drained()

    def check(self) -> None:
        """Raise what ended it."""
        if self._failure is not None:
            raise self._failure from self._failure.__cause__

    @property
    def ended(self) -> bool:
        """Whether it runs no more, or does not run yet."""
        return self._ended

    def runs(self, agent_loop: AgentLoop, sampler: PromptSampler) -> bool:
        """Whether it does, with these."""
        return not self._ended and agent_loop is self._agent_loop and sampler is self._sampler

    def _new_flight(self) -> Flight:
        return Flight(self._buffer, self._agent_loop, self._task_name, self._plan.rules, self._changed.set, self._rollouts)

    def _rollouts(self, n: int) -> None:
        """So many are in flight now."""
        ledger, engine, now = self._books.ledger, self._agent_loop.engine, _now()
        ledger.rollouts(n, now)
        if self._bars is not None:
            self._bars.in_flight(n)
        if engine is not None and (load := engine.load()) is not None:
            ledger.load(load.running, load.waiting, load.preemptions, now)
        if self._permits is not None:
            self._permits.uses(n)
        # Only where one ended: an adaptive limit would rise with each start, before the engine shows what it did.
        fewer, self._in_flight = n < self._in_flight, n
        if fewer and self._held_back and (isinstance(self.max_in_flight, AdaptiveLimit) or self._room()):
            self._changed.set()

    async def _live(self) -> None:
        if self._permits is not None:
            self._permits.join(self._changed.set)
        try:
            async with self._flight:
                self._opened.set()
                while True:
                    await self._advance()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - the actor's last words go to whoever waits for it
            # A second Ctrl-C too: raised here again, out of its task group, it would end the loop before the others are done.
            self._failure = first_error(error) if isinstance(error, BaseExceptionGroup) else error
        finally:
            self._record(self._flight.ended())
            self._rollouts(0)  # of those that an error ended nothing was told
            self._books.ledger.stopped()
            if self._permits is not None:
                self._permits.leave()

    async def _advance(self) -> None:
        """Count what ended, start what is wanted, and wait for the next thing that happens."""
        self._changed.clear()
        self._record(self._flight.ended())
        self.batch.check_budget(self._plan.budget, self._task_name)
        if self.gate.is_open:
            async with self.gate.starting():
                started = await self._issue()
            self._idle = not started and not len(self._flight) and not self._refused
            if self._idle:
                self._news.set()
        await self._next_change()

    async def _next_change(self) -> None:
        """Wait until a group or a member ends, or somebody wants something; where that takes too long, say so."""
        if self._changed.is_set():
            return
        watchdog, flight = self._plan.watchdog, self._flight
        watchdog = None if self.gate.is_frozen else watchdog
        due = None if watchdog is None else watchdog.due(flight.oldest_running(), flight.took, self._last_sign)
        try:
            async with asyncio.timeout_at(due):
                await self._changed.wait()
        except TimeoutError:
            now = asyncio.get_running_loop().time()
            assert watchdog is not None
            if (stall := watchdog.look(flight.running(), flight.took, self._last_sign, now)) is not None:
                self._warned_at = now
                self._stalled(stall)

    @property
    def _last_sign(self) -> float | None:
        """When the last group ended, what was frozen went on, or a stall was told of."""
        signs = [at for at in (self._flight.last_end, self.gate.thawed_at, self._warned_at) if at is not None]
        return max(signs, default=None)

    def _stalled(self, stall: Stall) -> None:
        if self._plan.on_stall == "raise":
            raise StalledError(f"production of task {self._task_name!r} has stalled: {stall}")
        _log.warning("production of task %r has stalled: %s", self._task_name, stall)

    def _record(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.batch.record(outcome)
            self._books.ledger.ended(outcome.group_id, outcome.status, outcome.tokens, outcome.reason, _now())
        if outcomes:
            self._news.set()

    # -- starting groups ----------------------------------------------------------------------------------------

    async def _issue(self) -> int:
        """Start as many groups as are wanted now."""
        await self._prepare()
        load = Load(self.batch.size, await self._count(Status.COMPLETED), len(self._flight), ahead=self._ahead)
        wanted = await self._wanted(load)
        permitted = wanted if self._permits is None else self._permits.ask(max(0, wanted))
        self._refused = permitted < wanted
        if permitted > 0:
            return await self._start(permitted)
        if not len(self._flight) and not self._refused and self.batch.wanted and load.completed < load.batch_size:
            raise ProducerError(
                f"nothing runs and nothing was started for {load}: {self._plan.name} said {wanted}, and a batch that "
                "is not whole needs 1 or more then"
            )
        return 0

    async def _start(self, n: int) -> int:
        exclude = self.batch.resting | self._flight.ending
        self._none_claimed.clear()
        try:
            groups = await self._sampler.sample_many(self._task_name, n, buffer=self._buffer, exclude=exclude, tail=self.batch.tail)
            # While these were drawn one that ran may have ended early, been stored, and been offered: its outcome is there by now.
            self._record(self._flight.ended())
            before = self._flight.members
            for group in groups:
                self.batch.resting.discard(group.group_id)
                self._books.ledger.started(group.group_id, _now())
                self._flight.start(group, self.version)
            if self._held_back and self._flight.members - before < len(groups) * self._sampler.group_size:
                self._changed.set()  # groups of which some members are whole left room for another one
        finally:
            self._none_claimed.set()
            if self._permits is not None:
                self._permits.has_started(self._flight.members)
        return len(groups)

    async def _prepare(self) -> None:
        """Once a version: what is too stale expires, before anything is claimed. Once a batch: is it a tail batch?"""
        if self._plan.max_staleness is not None and self._expired_at != (version := self.version):
            exceeding = self._exceeding(version)
            await self._flight.interrupt(self._flight.not_asked(exceeding))
            await self._expire(version)
            # What was stopped is stored later: as long as any runs, it is looked for again before anything is claimed.
            self._expired_at = None if exceeding else version
        trigger, step = self._plan.tail
        if self.batch.tail is None and trigger >= 0 and Status.EXPIRED in self._sampler.offers:
            self.batch.tail = Tail(tail_batch(trigger, await self._buffer.tail_candidates(self._task_name, step)), step)

    def _exceeding(self, version: int) -> list[int]:
        """Groups in flight that exceed the bound, where such are stopped."""
        bound = self._plan.max_staleness
        return [] if bound is None or self._plan.on_stale != "expire" else self._flight.older_than(version - bound)

    async def _wanted(self, load: Load) -> int:
        tail = self.batch.tail is not None and self.batch.tail.now
        wanted = exact(load) if tail else self._plan.to_issue(load)
        if self._plan.waits:
            wanted = await self._within_bound(load, wanted)
        if wanted <= 0:
            return wanted
        room = self._room()
        self._held_back = wanted > room
        return min(wanted, room)

    def _room(self) -> int:
        """Groups that may start beside the rollouts in flight; one in any case where none are."""
        limit = self.max_in_flight
        if isinstance(limit, AdaptiveLimit):
            engine = self._agent_loop.engine
            # Where the limit held back, it was reached until a rollout ended just now.
            reached = max(self._flight.members, limit.limit) if self._held_back else self._flight.members
            limit = self.max_in_flight = limit.after(None if engine is None else engine.load(), reached)
            limit = limit.limit
        if limit is None:
            return sys.maxsize
        return max(int(not len(self._flight)), groups_that_fit(limit, self._flight.members, self._sampler.group_size))

    async def _within_bound(self, load: Load, wanted: int) -> int:
        """As many as can be handed out in time; those left behind that are due in any case, or the batch would wait in vain."""
        assert self._plan.max_staleness is not None
        offered = () if self._holds_back else self._sampler.offers
        left = [await self._count(status) for status in offered if status is not Status.PENDING]
        bound = bounded_issue(
            load,
            float(self._plan.max_staleness),
            self._plan.max_staleness,
            left_behind=sum(left),
            updates_before=int(not self.batch.wanted and self._handed_out_at == self.version),
            coming=self._coming,
        )
        behind = self._left_behind(await self._buffer.oldest_versions(self._task_name)) if sum(left) else Counter()
        in_any_case = sum(n for oldest, n in behind.items() if oldest <= self.version - self._plan.max_staleness)
        # In place of those that rest others run, or the batch would never be whole.
        others = exact(load) if self.batch.resting and self.batch.wanted else 0
        return max(min(wanted, bound - len(self.batch.resting)), in_any_case, others)

    @property
    def _holds_back(self) -> bool:
        """Whether what was left behind waits for a tail batch, and this is none."""
        return self.batch.tail is not None and not self.batch.tail.now

    def _left_behind(self, oldest: Mapping[Status, Mapping[int, int]]) -> Counter[int]:
        """How many groups that wait to be continued have which oldest version; none where some of them rest until the next batch."""
        if self.batch.resting or self._holds_back or Status.INTERRUPTED not in self._sampler.offers:
            return Counter()
        return _as_of(oldest[Status.INTERRUPTED], self.version)

    # -- handing out --------------------------------------------------------------------------------------------

    async def whole(self, *, no_bar: bool | None = None) -> int:
        """Wait until there is a batch to hand out; gives the policy's version that it was found whole at."""
        self.batch.wanted, self._idle = True, False
        self._changed.set()
        try:
            with Bars(self._task_name, self.batch.size, no_bar) as self._bars:
                while (version := await self._handable(self._bars)) is None:
                    await self._news.wait()
        except BaseException:
            self.batch.wanted = False
            raise
        finally:
            self._bars = None
        return version

    async def _handable(self, bars: Bars) -> int | None:
        """The version now, if a batch can be handed out; what is too stale has expired by then."""
        self._news.clear()
        if self._ended:
            self.check()
            raise ProducerError(f"the production of task {self._task_name!r} was closed while somebody waited for a batch")
        version, completed = self.version, await self._count(Status.COMPLETED)
        bars.completed(completed)
        bars.in_flight(self._flight.members)
        if completed < self.batch.size:
            return None
        if self._plan.max_staleness is None:
            return version
        await self._none_claimed.wait()
        # One that ends behind the expiry, and before the batch is taken, would be in it. Where the gate is held none of them is
        # stopped: whoever holds it may be the one who waits for this batch.
        if self.gate.is_open and self._exceeding(version):
            self._changed.set()
            return None
        oldest = await self._buffer.oldest_versions(self._task_name)
        if any(at < version - self._plan.max_staleness for counted in oldest.values() for at in counted):
            await self._expire(version)
            oldest = await self._buffer.oldest_versions(self._task_name)
            if await self._count(Status.COMPLETED) < self.batch.size:
                self._changed.set()
                return None
        return version if not self._plan.waits or self._in_time(version, oldest) else None

    def _in_time(self, version: int, oldest: Mapping[Status, Mapping[int, int]]) -> bool:
        """Whether those that are not in this batch can be in later ones, before they are too stale."""
        assert self._plan.max_staleness is not None
        completed, unfinished = _as_of(oldest[Status.COMPLETED], version), self._left_behind(oldest) + self._flight.oldest
        if completed.total() < self.batch.size or version != self.version or not self._none_claimed.is_set():
            self._news.set()  # look again; what is being claimed is neither left behind nor in flight
            return False
        return self._idle or is_ready(
            self.batch.size, completed, unfinished, version, self._plan.max_staleness, None if self._coming is None else self._coming[1:]
        )

    async def next_batch(self, step: int, began: float, *, no_bar: bool | None = None) -> ProducedBatch:
        """The next batch, as soon as it is whole; `began` is when somebody wanted it, on the loop's clock."""
        while True:
            version = await self.whole(no_bar=no_bar)
            if (batch := await self.hand_out(step, version, began)) is not None:
                return batch

    async def hand_out(self, step: int, version: int, began: float) -> ProducedBatch | None:
        """Take the batch that was found whole at `version`; None where it is not any more.

        Then the weights were updated since, or another producer of the task was faster, or completed one that is too stale.
        """
        before = await self.before_take()
        if self.version != version:
            return None
        self.passes()
        # Nothing is awaited after it: what is taken when the caller is cancelled would be consumed, and reach nobody.
        taken = await self._buffer.take(
            self._task_name,
            self.batch.size,
            step=step,
            version=version,
            policy=self.policy,
            oldest_version=self.oldest_handable,
            whole=True,
        )
        return self.handed_out(taken, before, step, version, began) if taken else None

    async def before_take(self) -> tuple[dict[Status, int], Account]:
        """What `handed_out` is to know of the task as it was before its groups were taken: counts and account."""
        return await self._buffer.counts(self._task_name), await self._buffer.account(self._task_name)

    def handed_out(
        self, taken: Sequence[RolloutGroup], before: tuple[dict[Status, int], Account], step: int, version: int, began: float
    ) -> ProducedBatch:
        """The batch of the groups that were taken; the next one begins. For whoever takes them himself: between `before_take` and this."""
        counts, account = dict(before[0]), before[1]
        self.batch = Batch(self.batch.size)
        self._handed_out_at = version
        self._changed.set()
        groups = sorted(taken, key=lambda group: group.group_id)
        if self._plan.on_stale == "mask" and self._plan.max_staleness is not None:
            groups = [group.masked(version, self._plan.max_staleness) for group in groups]
        counts[Status.COMPLETED] -= len(groups)
        counts[Status.CONSUMED] += len(groups)
        metrics = batch_metrics(groups, counts, self._books.ledger.handed_out(began, _now()), version)
        return ProducedBatch(groups, step, metrics | self._books.of_run(handing_out(account, taken)))

    # -- what it looks at ---------------------------------------------------------------------------------------

    @property
    def policy(self) -> TakePolicy:
        """Which completed groups are taken first."""
        return self._plan.policy

    @property
    def oldest_handable(self) -> int | None:
        """No group older than this version is handed out; None where there is no bound, or stale tokens are masked instead."""
        bound = self._plan.max_staleness
        return None if bound is None or self._plan.on_stale == "mask" else self.version - bound

    @property
    def version(self) -> int:
        """Of the policy now."""
        return 0 if self._agent_loop.engine is None else self._agent_loop.engine.version

    async def _count(self, status: Status) -> int:
        return await self._buffer.count(self._task_name, status)

    async def _expire(self, version: int) -> None:
        assert self._plan.max_staleness is not None
        level = Level.TOKEN if self._plan.on_stale == "mask" else Level.SEQUENCE
        # Interrupted groups too: a response that is continued is as stale as its oldest token.
        await self._buffer.expire(self._task_name, version=version, max_staleness=self._plan.max_staleness, level=level)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _as_of(counted: Mapping[int, int], version: int) -> Counter[int]:
    """How many groups have which oldest version; one without a trainable token is as fresh as can be."""
    return sum((Counter({min(oldest, version): n}) for oldest, n in counted.items()), Counter())
