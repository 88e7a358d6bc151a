"""Over random schedules, in virtual time: nothing is lost or doubled, none too stale, none starves, no slot idles while work waits."""

import asyncio
import math
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.base import Completion
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_costs import CostModel
from agent_loop.engines.simulated_policy import lognormal_lengths
from agent_loop.errors import EngineError
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.inline import InlineReplayBuffer
from producer import AsyncProduceStrategy, ProducedBatch, Producer, RedundantMembers, ReplayPromptSampler
from producer.simulate.virtual_time import VirtualTimeLoop

TASK = "math"


@dataclass(frozen=True, slots=True)
class Schedule:
    """One random run: who produces, under which bounds, and what comes in between."""

    seed: int
    producer: Literal["interrupt", "keep", "background"]
    sizes: list[int]
    group_size: int
    threshold: float
    bound: int | None
    on_stale: Literal["wait", "expire", "mask"]
    slots: int
    limit: int | None
    failing: float = 0.0
    filtered: float = 0.0
    early: float = 0.0
    tail: tuple[int, int] = (-1, 1)
    redundant: bool = False
    updates: list[int] = field(default_factory=lambda: [1])
    mode: Literal["abort", "wait", "keep"] = "keep"
    training: float = 7.3

    @property
    def in_flight_limit(self) -> int | None:
        return None if self.limit is None else max(self.limit, self.group_size)

    @property
    def is_regular(self) -> bool:
        """Batches of one size, an update of the weights after each, and nothing that goes wrong: then nothing has to expire."""
        return len(set(self.sizes)) == 1 and set(self.updates) == {1} and not self.early and self.tail[0] < 0


def schedules(**fixed: Any) -> st.SearchStrategy[Schedule]:
    some: dict[str, Any] = {
        "seed": st.integers(0, 2**32),
        "producer": st.sampled_from(["interrupt", "keep", "background"]),
        "sizes": st.integers(1, 4).map(lambda n: [n]) | st.lists(st.integers(1, 5), min_size=2, max_size=4),
        "group_size": st.integers(2, 3),
        "threshold": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        "bound": st.none() | st.integers(0, 3),
        "on_stale": st.sampled_from(["wait", "wait", "expire", "mask"]),
        "slots": st.sampled_from([1, 4, 64]),
        "limit": st.sampled_from([None, 2, 7, 12]),
        "failing": st.sampled_from([0.0, 0.1]),
        "filtered": st.sampled_from([0.0, 0.3]),
        "early": st.sampled_from([0.0, 0.1]),
        "tail": st.sampled_from([(-1, 1), (0, 1), (2, 2)]),
        "redundant": st.booleans(),
        "updates": st.just([1]) | st.lists(st.integers(0, 2), min_size=1, max_size=3),
        "mode": st.sampled_from(["abort", "wait", "keep"]),
        "training": st.sampled_from([0.0, 7.3, 200.0]),
    }
    return st.builds(Schedule, **{**some, **fixed})


EXPIRED_BESIDE_SURPLUS = Schedule(
    seed=3698640027, producer="keep", sizes=[3], group_size=2, threshold=0.5, bound=3, on_stale="wait", slots=64, limit=2, failing=0.1,
    redundant=True, updates=[2], training=200.0,
)  # fmt: skip
"""The member that was left out of a group did count as enough of it when its sibling expired: the group came back empty."""

PARTLY_WHOLE = Schedule(
    seed=0, producer="keep", sizes=[1, 4, 1], group_size=2, threshold=1.0, bound=0, on_stale="mask", slots=1, limit=7, mode="abort",
    training=200.0,
)  # fmt: skip
"""Groups of which a member was whole took less room than was reserved for them, and nobody looked again."""


class Disturbed(SimulatedEngine):
    """Ends some requests by itself, without a token."""

    def __init__(self, chance: random.Random, early: float, **options: Any) -> None:
        super().__init__(**options)
        self._chance, self._early = chance, early

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        if self._chance.random() < self._early:
            return Completion.of([], [], self.version, "abort")
        return await super().generate(*arguments, **named)


class QuietLoop(VirtualTimeLoop):
    """Calls `on_quiet` whenever nothing is ready to run, before time goes on."""

    on_quiet: Callable[[], None] | None = None

    def __init__(self) -> None:
        super().__init__()
        select = self._clock.select

        def look_first(timeout: float | None = None) -> Any:
            if self.on_quiet is not None and (timeout is None or timeout > 0):
                self.on_quiet()
            return select(timeout)

        self._clock.select = look_first  # type: ignore[method-assign]


class Run:
    """Runs a schedule: `next_batch`, `train` ... in a block of `opened`."""

    def __init__(self, schedule: Schedule, path: str) -> None:
        self.schedule, self.path = schedule, path
        self.chance = random.Random(schedule.seed)
        self.step = 0
        self.wanted = self.held = False
        self.handed_out_at = -1
        self.size = schedule.sizes[0]
        self.delivered: list[RolloutGroup] = []

    def _fail(self, request_id: str, attempt: int) -> Exception | None:
        return EngineError("503") if self.chance.random() < self.schedule.failing else None

    def _reason(self, group: RolloutGroup) -> str | None:
        return "by chance" if self.chance.random() < self.schedule.filtered else None

    async def _score(self, state: RolloutState) -> float:
        return self.chance.random()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        schedule, costs = self.schedule, CostModel(slots=self.schedule.slots, tokens_per_second=1.0)
        lengths = lognormal_lengths(8, 1.0, longest=60, seed=schedule.seed)
        engine = Disturbed(self.chance, schedule.early, lengths=lengths, fail=self._fail, costs=costs)
        async with InlineReplayBuffer.open(f"sqlite:///{self.path}") as self.buffer, engine as self.engine:
            rows = [{"prompt_ids": [10 + index % 40]} for index in range(5000)]
            self.sampler = ReplayPromptSampler(rows, self.buffer, schedule.group_size, shuffle=False)
            self.loop = SingleTurnAgentLoop(engine, reward=self._score, sampling=SamplingParams(max_tokens=64, seed=1), back_off=0.3)
            self.strategy = self._strategy(self.buffer)
            self.producer = Producer(self.strategy, self.loop, self.sampler, TASK)
            async with self.strategy, self.producer:
                yield
            assert (await self.buffer.counts(TASK))[Status.RUNNING] == 0
            await self.check()

    def _strategy(self, buffer: ReplayBuffer) -> AsyncProduceStrategy:
        schedule = self.schedule
        return AsyncProduceStrategy(
            buffer,
            staleness_threshold=schedule.threshold,
            group_filter=self._reason if schedule.filtered else None,
            redundant=RedundantMembers(1, bias="accept") if schedule.redundant else None,
            in_flight="interrupt" if schedule.producer == "background" else schedule.producer,
            max_staleness=schedule.bound,
            on_stale=schedule.on_stale,
            max_in_flight=schedule.in_flight_limit,
            tail_batch_trigger_size=schedule.tail[0],
            tail_batch_candidate_step=schedule.tail[1],
            max_failed=10_000,
            max_filtered=10_000,
            max_interrupted=10_000,
            watchdog=None,
        )

    async def next_batch(self) -> ProducedBatch:
        self.size = self.schedule.sizes[self.step % len(self.schedule.sizes)]
        self.step, self.wanted = self.step + 1, True
        if self.schedule.producer == "background":
            batch = await self.producer.next_batch(self.size)
        else:
            batch = await self.strategy.produce_batch(self.loop, self.sampler, self.size, TASK)
        self.wanted, self.handed_out_at = False, self.engine.version
        self.delivered += batch.groups
        assert (len(batch.groups), batch.step) == (self.size, self.step)
        if self.schedule.bound is not None:
            assert max(group.staleness(self.engine.version) or 0 for group in batch.groups) <= self.schedule.bound, "the bound is hard"
        return batch

    async def train(self) -> None:
        await asyncio.sleep(self.schedule.training)
        for _ in range(self.schedule.updates[self.step % len(self.schedule.updates)]):
            if self.schedule.producer == "background":
                self.held = True
                async with self.producer.update_weights({"seed": self.step}, mode=self.schedule.mode):
                    await asyncio.sleep(0.7)
                self.held = False
            else:
                await self.engine.update_weights({"seed": self.step}, self.engine.version + 1)

    async def check(self) -> None:
        """Conservation, and no duplicate."""
        audit, counts = await self.buffer.audit(), await self.buffer.counts(TASK)
        assert audit.ok, audit.problems
        assert counts[Status.CONSUMED] == len(self.delivered) == len({group.group_id for group in self.delivered})
        positions = sorted(group.position for group in await self.buffer.query(limit=10_000) if group.position)
        assert positions == [(0, offset) for offset in range(len(positions))]
        assert len(positions) >= sum(counts.values()), "what runs meanwhile may have drawn more since they were counted"

    async def expired(self) -> int:
        groups = await self.buffer.query(limit=10_000)
        changes = [change.target for group in groups for change in await self.buffer.history(group.group_id)]
        return Counter(changes)[Status.EXPIRED]


def in_virtual_time(main: Any, loop_factory: Callable[[], asyncio.AbstractEventLoop] = QuietLoop) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main)


def random_schedules(count: int) -> settings:
    """Without shrinking: a run takes long, and the schedule that is printed can be run as it is."""
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    return settings(max_examples=count, phases=phases, suppress_health_check=[HealthCheck.function_scoped_fixture])


@random_schedules(25)
@given(schedule=schedules())
def test_every_batch_comes_whole_fresh_enough_and_nothing_is_lost_or_doubled(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule
) -> None:
    """Whatever comes together; a deadlock would be a `VirtualTimeError`."""

    async def main() -> None:
        run = Run(schedule, str(tmp_path_factory.mktemp("run") / "run.db"))
        async with run.opened():
            for _ in range(8):
                await run.next_batch()
                await run.check()
                await run.train()

    in_virtual_time(main())


@random_schedules(15)
@given(
    schedule=schedules(
        sizes=st.integers(1, 4).map(lambda n: [n]), bound=st.integers(0, 3), on_stale=st.just("wait"), tail=st.just((-1, 1)),
        early=st.just(0.0), updates=st.just([1]),
    )
)  # fmt: skip
def test_with_one_update_a_batch_nothing_is_ever_thrown_away(tmp_path_factory: pytest.TempPathFactory, schedule: Schedule) -> None:
    assert schedule.is_regular

    async def main() -> None:
        run = Run(schedule, str(tmp_path_factory.mktemp("run") / "run.db"))
        async with run.opened():
            for _ in range(8):
                await run.next_batch()
                await run.train()
            assert await run.expired() == 0

    in_virtual_time(main())


# -- no starvation ---------------------------------------------------------------------------------------------------


@random_schedules(15)
@given(schedule=schedules(early=st.just(0.0), tail=st.sampled_from([(-1, 1), (0, 1), (0, 2)])))
@example(EXPIRED_BESIDE_SURPLUS)
def test_every_prompt_that_was_drawn_is_handed_out_in_the_end(tmp_path_factory: pytest.TempPathFactory, schedule: Schedule) -> None:
    """Unless it failed or was filtered. Fresh prompts never run out, so what is left behind would be so for ever."""
    assume(schedule.bound is None or schedule.on_stale == "wait")  # else a long response may be too stale each time it is whole

    async def main() -> None:
        run = Run(schedule, str(tmp_path_factory.mktemp("run") / "run.db"))
        async with run.opened():
            for _ in range(5):
                await run.next_batch()
                await run.train()
            drawn = [group.group_id for group in await run.buffer.query(limit=10_000)]
            for _ in range(5 + 4 * len(drawn) // sum(schedule.sizes) * len(schedule.sizes)):
                await run.next_batch()
                await run.train()
            left = [group for group_id in drawn if (group := await run.buffer.get(group_id)).status not in _DONE]
            assert not left

    in_virtual_time(main())


_DONE = (Status.CONSUMED, Status.FAILED, Status.FILTERED)


# -- no idle slot ----------------------------------------------------------------------------------------------------


@random_schedules(25)
@given(schedule=schedules(early=st.just(0.0), failing=st.just(0.0), tail=st.just((-1, 1)), redundant=st.just(False)))
@example(PARTLY_WHOLE)
def test_whenever_time_goes_on_as_much_is_in_flight_as_the_limits_allow(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule
) -> None:
    """Nothing is started by a timer: when nothing is left to do at a moment, no start that the limits allow is left out."""
    looks = Counter[str]()

    async def main() -> None:
        path = str(tmp_path_factory.mktemp("run") / "run.db")
        run = Run(schedule, path)
        async with run.opened():
            database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, QuietLoop)

            def look() -> None:
                looks["at all"] += 1
                groups = Counter(dict(database.execute("SELECT status, count(*) FROM groups GROUP BY status").fetchall()))
                assert could_start(run, groups) <= 0, (groups, run.engine.running + run.engine.waiting)

            loop.on_quiet = look
            try:
                for _ in range(6):
                    await run.next_batch()
                    await run.train()
            finally:
                loop.on_quiet = None
                database.close()

    in_virtual_time(main())
    assert looks["at all"] > 6


def could_start(run: Run, groups: Counter[str]) -> int:
    """Groups that the limits of the documentation allow to start now."""
    schedule, size = run.schedule, run.size
    completed, in_flight, left = groups["completed"], groups["running"], groups["interrupted"] + groups["expired"] + groups["pending"]
    if run.held or (not run.wanted and (schedule.producer == "interrupt" or run.engine.version != run.handed_out_at)):
        return 0
    if schedule.producer == "interrupt" and completed >= size:
        return 0
    wanted = math.ceil((1 + schedule.threshold) * size) - completed - in_flight
    if schedule.bound is not None and schedule.on_stale == "wait":
        batches = schedule.bound + (1 if run.wanted else 0)
        wanted = min(wanted, left + max(0, min(batches * size, math.ceil((1 + schedule.threshold) * size)) - completed - in_flight - left))
    rollouts = run.engine.running + run.engine.waiting
    room = wanted if schedule.in_flight_limit is None else (schedule.in_flight_limit - rollouts) // schedule.group_size
    return min(wanted, room)
