"""Batches of many tasks: shared out by weight, whole or not at all, and going on as they were after a kill, a failure or a rewind."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from agent_loop.errors import EngineDeadError
from buffer import ReplayBuffer, Status
from producer import AsyncProduceStrategy, ProducedBatch, ReplayPromptSampler, SyncProduceStrategy, TaskManager, TrainingTask, zero_variance
from producer.errors import DatasetError, FailureBudgetError, ProducerError
from tests.buffer.groups import url as url_of
from tests.zygote import Moment, Say, Zygote


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


@pytest.fixture
def url(tmp_path: Path, backend: str) -> str:
    return url_of(tmp_path)


def loop_of(engine: SimulatedEngine, **options: Any) -> SingleTurnAgentLoop:
    return SingleTurnAgentLoop(
        engine, sampling=SamplingParams(max_tokens=400, seed=1), **{"reward": lambda state: 1.0, "back_off": 0.0, **options}
    )


def a_task(buffer: ReplayBuffer, engine: SimulatedEngine, name: str, weight: float = 1.0, **given: Any) -> TrainingTask:
    """`given`: `rows`, `group_size`, `loop`, `strategy`, and options of the sampler."""
    rows = given.pop("rows", [{"prompt_ids": [10 + index % 40], "answer": index} for index in range(500)])
    loop, strategy = given.pop("loop", None) or loop_of(engine), given.pop("strategy", None) or SyncProduceStrategy(buffer)
    return TrainingTask(name, loop, ReplayPromptSampler(rows, buffer, **{"group_size": 2, "shuffle": False, **given}), strategy, weight)


def sizes(batch: ProducedBatch) -> dict[str, int]:
    return dict(Counter(group.task_name for group in batch.groups))


def offsets(batch: ProducedBatch, name: str) -> list[int]:
    return [group.position.offset for group in batch.groups if group.task_name == name and group.position]


async def nothing_is_lost(buffer: ReplayBuffer) -> None:
    report = await buffer.audit()
    assert report.ok, report.problems


# -- batches ---------------------------------------------------------------------------------------------------------


async def test_a_batch_is_shared_out_by_weight_and_consumed_at_one_step(url: str) -> None:  # case 31
    async with ReplayBuffer.open(url) as buffer, SimulatedEngine(lengths=4) as engine:
        tasks = [a_task(buffer, engine, name, weight) for name, weight in (("a", 1), ("b", 2), ("c", 0))]
        async with TaskManager(buffer, tasks) as manager:
            batches = [await manager.produce_batch(7) for _ in range(3)]
        assert [sizes(batch) for batch in batches] == [{"a": 2, "b": 5}, {"a": 3, "b": 4}, {"a": 2, "b": 5}]
        assert [batch.step for batch in batches] == [1, 2, 3]
        assert [offset for batch in batches for offset in offsets(batch, "a")] == list(range(7))
        assert {group.consumed_step for group in batches[1].groups} == {2}
        assert await buffer.count("c", Status.CONSUMED) == 0
        await nothing_is_lost(buffer)


async def test_tasks_train_adapters_of_one_engine_each_at_versions_of_its_own(url: str) -> None:
    async with ReplayBuffer.open(url) as buffer, SimulatedEngine(max_length=1000) as engine:
        loops = {name: loop_of(engine, adapter=name) for name in ("a", "b")}
        adapters = {name: [await engine.add_adapter(name, {"seed": seed})] for seed, name in enumerate(loops)}
        strategies = {name: AsyncProduceStrategy(buffer, staleness_threshold=1.0, max_staleness=1, progress=False) for name in loops}
        tasks = [a_task(buffer, engine, name, loop=loop, strategy=strategies[name]) for name, loop in loops.items()]
        batches = []
        async with TaskManager(buffer, tasks) as manager:
            for step in range(1, 5):
                batches.append(await manager.produce_batch(4))
                async with manager.update_weights():
                    for name in "aab" if step % 2 else "b":  # a by two at every second step, b at each
                        await loops[name].engine.update_weights({"seed": 10 * step}, loops[name].engine.version + 1)  # type: ignore[union-attr]
                        adapters[name].append(engine.check_adapter(name))
        assert (engine.version, [loops[name].engine.version for name in "ab"]) == (0, [4, 4])  # type: ignore[union-attr]
        for group in [group for batch in batches for group in batch.groups]:
            for state in group.rollouts:
                assert state.prompt_ids is not None
                for version in set(state.versions.tolist()):
                    adapter = adapters[group.task_name][version]
                    expected = engine.reference_logprobs(state.prompt_ids.tolist(), state.response_ids.tolist(), 0, adapter=adapter)
                    mine = state.versions == version
                    assert abs(state.logprobs - expected)[mine].max() < 1e-5
        await nothing_is_lost(buffer)


async def test_metrics_are_those_of_each_task_and_of_the_whole(url: str) -> None:
    async with (
        ReplayBuffer.open(url) as buffer,
        SimulatedEngine(lengths=4) as engine,
        TaskManager(buffer, [a_task(buffer, engine, "a"), a_task(buffer, engine, "b", 3), a_task(buffer, engine, "c", 0)]) as manager,
    ):
        metrics = (await manager.produce_batch(4)).metrics
    assert (metrics["batch/groups"], metrics["task/a/batch/groups"], metrics["task/b/batch/groups"]) == (4, 1, 3)
    assert metrics["produce/started"] == metrics["task/a/produce/started"] + metrics["task/b/produce/started"] == 4
    assert (metrics["buffer/consumed"], metrics["task/b/buffer/consumed"], metrics["task/c/buffer/consumed"]) == (4, 3, 0)
    assert (metrics["task/b/share/weight"], metrics["task/b/share/groups"], metrics["task/c/share/groups"]) == (3, 3, 0)
    assert metrics["batch/staleness_max"] == 0


async def test_each_part_is_produced_by_its_own_strategy_and_all_at_once(buffer: ReplayBuffer) -> None:
    together = asyncio.Barrier(4)

    async def meets(state: Any) -> float:
        await together.wait()
        return float(state.index)

    async with SimulatedEngine(lengths=4) as engine:
        tasks = [
            a_task(
                buffer, engine, "a", loop=loop_of(engine, reward=meets), strategy=SyncProduceStrategy(buffer, group_filter=zero_variance)
            ),
            a_task(buffer, engine, "b", loop=loop_of(engine, reward=meets), strategy=AsyncProduceStrategy(buffer, staleness_threshold=0.0)),
        ]
        batch = await asyncio.wait_for(TaskManager(buffer, tasks).produce_batch(2), 30)
    assert sizes(batch) == {"a": 1, "b": 1}


async def test_a_task_without_a_group_in_a_batch_is_not_run_and_what_it_keeps_running_goes_on(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine, AsyncProduceStrategy(buffer) as _:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=3.0, in_flight="keep")
        tasks = [
            a_task(buffer, engine, "often", 3, strategy=SyncProduceStrategy(buffer)),
            a_task(buffer, engine, "kept", 1, strategy=strategy),
        ]
        async with TaskManager(buffer, tasks) as manager:
            seen = [sizes(await manager.produce_batch(1)) for _ in range(4)]
            assert Counter(name for part in seen for name in part) == {"often": 3, "kept": 1}
            await buffer.wait_for("kept", Status.COMPLETED, 4, timeout=30)  # one batch's surplus, produced while the others' came
            before = await buffer.counts("kept")
            await manager.set_weight("kept", 0)
            assert sizes(await manager.produce_batch(5)) == {"often": 5}
            assert await buffer.counts("kept") == before
        assert await buffer.count("kept", Status.RUNNING) == 0


async def test_batches_come_one_after_the_other(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=lognormal_lengths(8, 1.0, longest=60)) as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight="keep", max_staleness=2)
        tasks = [a_task(buffer, engine, name, weight, strategy=strategy) for name, weight in (("a", 1), ("b", 2))]
        async with TaskManager(buffer, tasks) as manager:
            seen: list[ProducedBatch] = []
            async for batch in manager.batches(6, first_step=3):
                seen.append(batch)
                await engine.update_weights({"seed": batch.step}, engine.version + 1)
                if len(seen) == 5:
                    break
    assert [batch.step for batch in seen] == [3, 4, 5, 6, 7]
    assert [sizes(batch) for batch in seen] == [{"a": 2, "b": 4}] * 5
    assert max(batch.metrics["batch/staleness_max"] for batch in seen) <= 2
    for name in ("a", "b"):
        drawn = [offset for batch in seen for offset in offsets(batch, name)]
        assert len(set(drawn)) == len(drawn)


class SlowToHandOut(ReplayBuffer):
    """What was taken arrives late, while production goes on."""

    async def _hand_out(self, *arguments: Any) -> Any:
        groups = await super()._hand_out(*arguments)
        for _ in range(100):
            await asyncio.sleep(0)
        return groups


@pytest.mark.parametrize("weights", [{"a": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 9}])
@pytest.mark.parametrize("in_flight", ["interrupt", "keep"])
async def test_within_a_bound_that_is_waited_for_nothing_expires_however_parts_vary(tmp_path: Path, in_flight: Any, weights: Any) -> None:
    lengths = lognormal_lengths(8, 1.0, longest=60)
    async with SlowToHandOut.open(f"sqlite:///{tmp_path}/run.db") as buffer, SimulatedEngine(lengths=lengths, slots=12) as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight=in_flight, max_staleness=1)
        async with TaskManager(buffer, [a_task(buffer, engine, name, weights[name], strategy=strategy) for name in weights]) as manager:
            for step in range(1, 25):
                batch = await manager.produce_batch(4, step)
                assert batch.metrics["batch/staleness_max"] <= 1
                await engine.update_weights({"seed": step}, step)
        for name in weights:
            assert not sum((await buffer.account(name)).wasted.values())


@pytest.mark.parametrize("in_flight", ["interrupt", "keep"])
async def test_nor_does_it_for_one_strategy_alone(tmp_path: Path, in_flight: Any) -> None:
    lengths = lognormal_lengths(8, 1.0, longest=60)
    async with SlowToHandOut.open(f"sqlite:///{tmp_path}/run.db") as buffer, SimulatedEngine(lengths=lengths, slots=12) as engine:
        task = a_task(buffer, engine, "a")
        async with AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight=in_flight, max_staleness=1) as strategy:
            for step in range(1, 25):
                await strategy.produce_batch(task.agent_loop, task.sampler, 4, "a", step=step)
                await engine.update_weights({"seed": step}, step)
        assert not sum((await buffer.account("a")).wasted.values())


class Told(SimulatedEngine):
    """Keeps the named weights that it was given."""

    async def update_weights(self, source: Any, version: int) -> None:
        self.given = list(source)
        await super().update_weights({"seed": 1}, version)


async def test_weights_that_come_one_by_one_reach_the_engines_of_all_tasks(buffer: ReplayBuffer) -> None:
    async with Told(lengths=4) as one, Told(lengths=4) as other:
        manager = TaskManager(buffer, [a_task(buffer, one, "a"), a_task(buffer, other, "b")])
        async with manager.update_weights((name, 0.5) for name in ("embedding", "head")):
            assert one.given == other.given == [("embedding", 0.5), ("head", 0.5)]
            assert (one.version, other.version) == (1, 1)


# -- weights ---------------------------------------------------------------------------------------------------------


async def test_weights_change_from_batch_to_batch(buffer: ReplayBuffer) -> None:
    told: list[tuple[int, float]] = []

    def weights(step: int, metrics: Any) -> dict[str, float]:
        told.append((step, metrics.get("task/a/share/groups", -1.0)))
        return {"b": float(step)}

    async with SimulatedEngine(lengths=4) as engine:
        tasks = [a_task(buffer, engine, "a"), a_task(buffer, engine, "b")]
        manager = TaskManager(buffer, tasks, weights=weights)
        assert [sizes(await manager.produce_batch(12)) for _ in range(3)] == [{"a": 6, "b": 6}, {"a": 4, "b": 8}, {"a": 3, "b": 9}]
        assert told == [(1, -1), (2, 6), (3, 4)]
        with pytest.raises(ValueError, match="=None must map tasks to weights"):
            await TaskManager(buffer, tasks, weights=lambda *_: None).produce_batch(12)  # type: ignore[arg-type, return-value]
        manager = TaskManager(buffer, tasks)
        await manager.set_weight("a", 0)
        assert sizes(await manager.produce_batch(3)) == {"b": 3}
        assert manager.weights == {"a": 0, "b": 3}
        for name, weight in (("a", -1.0), ("b", 0.0), ("x", 1.0)):
            with pytest.raises(ValueError, match=r"weight|no task 'x'"):
                await manager.set_weight(name, weight)
        assert sizes(await manager.produce_batch(1)) == {"b": 1}


async def weights_of(buffer: ReplayBuffer, engine: SimulatedEngine, program: dict[str, float], **options: Any) -> dict[str, float]:
    """Of a batch of a manager that was made anew, with these weights in its program."""
    batch = await TaskManager(buffer, [a_task(buffer, engine, *of) for of in program.items()], **options).produce_batch(4)
    return {name: batch.metrics[f"task/{name}/share/weight"] for name in program}


async def test_weights_that_were_changed_come_back_with_the_run_unless_the_program_says_others_since(url: str) -> None:
    program = {"a": 1.0, "b": 1.0}
    async with SimulatedEngine(lengths=4) as engine:
        async with (
            ReplayBuffer.open(url) as buffer,
            TaskManager(buffer, [a_task(buffer, engine, *of) for of in program.items()]) as manager,
        ):
            assert sizes(await manager.produce_batch(4)) == {"a": 2, "b": 2}
            await manager.set_weight("b", 3)  # of step 1
            assert sizes(await manager.produce_batch(4)) == {"a": 1, "b": 3}
            await buffer.commit(2)
            await manager.set_weight("a", 0.5)  # of step 3, since step 2 is final
            await manager.produce_batch(4)
            await manager.set_weight("a", 9)
        async with ReplayBuffer.open(url) as buffer:
            early = TaskManager(buffer, [a_task(buffer, engine, *of) for of in program.items()])
            await early.set_weight("b", 7)  # before it is known where the run goes on
            await buffer.resume(step=2)
            assert (await early.produce_batch(4)).metrics["task/b/share/weight"] == 7
            assert early.weights == {"a": 1, "b": 7}
            await buffer.resume(step=2)
            async with TaskManager(buffer, [a_task(buffer, engine, *of) for of in program.items()]) as manager:
                assert manager.weights == {"a": 1, "b": 3}
            assert await weights_of(buffer, engine, program) == {"a": 1, "b": 3}
            assert await weights_of(buffer, engine, {"a": 2.0, "b": 1.0, "new": 5.0}) == {"a": 2, "b": 3, "new": 5}
            assert await weights_of(buffer, engine, {"a": 2.0, "b": 2.0}) == {"a": 2, "b": 2}
            assert await weights_of(buffer, engine, program) == program, "the last that changed holds"
            await nothing_is_lost(buffer)


async def test_weights_of_a_function_that_speaks_once_come_back_and_those_of_a_batch_that_failed_do_not(buffer: ReplayBuffer) -> None:
    program = {"a": 1.0, "b": 1.0}
    async with SimulatedEngine(lengths=4) as engine:
        assert await weights_of(buffer, engine, program, weights=lambda step, metrics: {"b": 0.0} if step == 1 else {}) == {"a": 1, "b": 0}
        assert await weights_of(buffer, engine, program) == {"a": 1, "b": 0}
        broken = TaskManager(buffer, [a_task(buffer, engine, "b", rows=[{}]), a_task(buffer, engine, "a")], weights=lambda *_: {"b": 4.0})
        with pytest.raises(DatasetError):
            await broken.produce_batch(4)
        assert await weights_of(buffer, engine, program) == {"a": 1, "b": 0}
        assert await weights_of(buffer, engine, {"b": 1.0}) == {"b": 1}, "what was set to 0 beside others that are gone"


async def test_a_rewound_run_is_shared_out_as_the_one_that_was_not(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine:
        tasks = [a_task(buffer, engine, name, weight) for name, weight in (("a", 1), ("b", 2.5), ("c", 0.7))]
        before = [await TaskManager(buffer, tasks).produce_batch(5) for _ in range(6)]
        await buffer.resume(step=2)
        after = [await TaskManager(buffer, tasks).produce_batch(5) for _ in range(4)]
    assert [[group.group_id for group in batch.groups] for batch in after] == [
        [group.group_id for group in batch.groups] for batch in before[2:]
    ]
    shares = [{name: batch.metrics[f"task/{name}/share/carried"] for name in "abc"} for batch in (before[-1], after[-1])]
    assert shares[0] == shares[1]


async def test_tasks_are_removed_and_added_and_nothing_of_them_is_lost(buffer: ReplayBuffer, caplog: pytest.LogCaptureFixture) -> None:
    async with SimulatedEngine(lengths=4) as engine:
        old = AsyncProduceStrategy(buffer, staleness_threshold=2.0, in_flight="keep")
        async with TaskManager(buffer, [a_task(buffer, engine, "a"), a_task(buffer, engine, "gone", strategy=old)]) as manager:
            await manager.produce_batch(4)
            await buffer.wait_for("gone", Status.COMPLETED, 6, timeout=30)
        manager = TaskManager(buffer, [a_task(buffer, engine, "a"), a_task(buffer, engine, "new", 3)])
        with caplog.at_level(logging.WARNING, "producer.manager"):
            assert sizes(await manager.produce_batch(8)) == {"a": 2, "new": 6}
            await manager.produce_batch(8)
        (told,) = [record.getMessage() for record in caplog.records]
        assert "'gone'" in told
        assert "'completed': 6" in told
        removed = await manager.removed()
        assert removed.keys() == {"gone"}
        assert removed["gone"][Status.COMPLETED] == 6


# -- failures --------------------------------------------------------------------------------------------------------


async def test_where_one_task_fails_the_others_groups_stay_completed_and_are_not_generated_again(url: str) -> None:
    async with ReplayBuffer.open(url) as buffer, SimulatedEngine(lengths=4) as engine:
        failing = True

        async def reward(state: Any) -> float:
            if failing:
                await buffer.wait_for("sound", Status.COMPLETED, 3)
                raise ZeroDivisionError("no such answer")
            return 1.0

        broken = loop_of(engine, reward=reward, max_attempts=1)
        strict = SyncProduceStrategy(buffer, max_failed=0)
        tasks = [a_task(buffer, engine, "sound"), a_task(buffer, engine, "broken", loop=broken, strategy=strict)]
        manager = TaskManager(buffer, tasks)
        with pytest.raises(FailureBudgetError, match="no such answer") as raised:
            await asyncio.wait_for(manager.produce_batch(6), 30)
        assert any("'broken'" in note for note in raised.value.__notes__)
        counts = await buffer.counts("sound")
        assert (counts[Status.COMPLETED], counts[Status.CONSUMED], counts[Status.RUNNING]) == (3, 0, 0)
        assert await buffer.shares(before=99) == []
        failing = False
        batch = await manager.produce_batch(6)
        assert (batch.step, sizes(batch)) == (1, {"sound": 3, "broken": 3})
        assert offsets(batch, "sound") == [0, 1, 2]
        assert batch.metrics["task/sound/buffer/completed"] == 0
        await nothing_is_lost(buffer)


async def test_a_bad_row_and_an_empty_dataset_of_one_task_are_told_with_its_name(buffer: ReplayBuffer) -> None:
    rows = [{"prompt_ids": [10]}, {"answer": 4}]
    async with SimulatedEngine(lengths=4) as engine:
        manager = TaskManager(buffer, [a_task(buffer, engine, "good"), a_task(buffer, engine, "bad", rows=rows)])
        assert len((await manager.produce_batch(2)).groups) == 2
        for _ in range(2):
            with pytest.raises(DatasetError, match="row") as raised:
                await manager.produce_batch(2)
            assert raised.value.__notes__ == ["This happened in task 'bad'."]
        empty = TaskManager(buffer, [a_task(buffer, engine, "good"), a_task(buffer, engine, "empty", rows=[])])
        with pytest.raises(DatasetError, match="empty"):
            await empty.produce_batch(2)
        await manager.set_weight("bad", 0)
        assert sizes(await manager.produce_batch(2)) == {"good": 2}


async def test_a_dataset_that_ends_begins_its_next_epoch_while_others_go_on(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine:
        short = a_task(buffer, engine, "short", rows=[{"prompt_ids": [10 + index]} for index in range(3)])
        manager = TaskManager(buffer, [a_task(buffer, engine, "long"), short])
        batches = [await manager.produce_batch(4) for _ in range(3)]
    places = [group.position for batch in batches for group in batch.groups if group.task_name == "short"]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("in_flight", ["interrupt", "keep"])
async def test_an_engine_that_dies_and_a_batch_that_is_cancelled_consume_nothing(buffer: ReplayBuffer, in_flight: Any) -> None:
    dead = False

    def fail(request_id: str, attempt: int) -> Exception | None:
        return EngineDeadError("fell off the bus") if dead else None

    slow = SimulatedEngine(lengths=4)
    async with SimulatedEngine(lengths=4, fail=fail) as engine, slow:
        strategy = AsyncProduceStrategy(buffer, in_flight=in_flight, interrupt_timeout=0.05)
        async with TaskManager(
            buffer, [a_task(buffer, engine, "a", strategy=strategy), a_task(buffer, slow, "b", strategy=strategy)]
        ) as manager:
            await slow.pause("keep")
            producing = asyncio.create_task(manager.produce_batch(4))
            await buffer.wait_for("a", Status.COMPLETED, 2, timeout=30)
            with pytest.raises(ProducerError, match="being produced already"):
                await manager.produce_batch(4)
            producing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await producing
            assert await buffer.count("a", Status.CONSUMED) == 0
            await slow.resume()
            first = await manager.produce_batch(4)
            assert first.step == 1
            dead = True
            with pytest.raises(EngineDeadError, match="fell off the bus"):
                await manager.produce_batch(40)
        counts = await buffer.counts("b")
        assert counts[Status.RUNNING] == 0


async def test_keeping_needs_an_owner_and_what_cannot_be_is_refused(buffer: ReplayBuffer, tmp_path: Path) -> None:
    async with SimulatedEngine(lengths=4) as engine, ReplayBuffer.open(f"sqlite:///{tmp_path}/other.db") as other:
        task = a_task(buffer, engine, "a", strategy=AsyncProduceStrategy(buffer, in_flight="keep"))
        manager = TaskManager(buffer, [task])
        with pytest.raises(ProducerError, match="async with TaskManager"):
            await manager.produce_batch(2)
        async with manager:
            with pytest.raises(ProducerError, match="entered already"):
                await manager.__aenter__()
            assert len((await manager.produce_batch(2)).groups) == 2
            with pytest.raises(ValueError, match="batch_size=0"):
                await manager.produce_batch(0)
        sampler = task.sampler
        for wrong, match in (
            ([], "empty"),
            ([task, a_task(buffer, engine, "a")], "same name"),
            ([task, TrainingTask("b", task.agent_loop, sampler, task.strategy)], "same sampler"),
            ([a_task(other, engine, "a")], "another buffer"),
            ([a_task(buffer, engine, "a", -1.0)], "weight"),
            ([a_task(buffer, engine, "")], "names no task"),
        ):
            with pytest.raises(ValueError, match=match):
                TaskManager(buffer, wrong)
        with pytest.raises(TypeError, match="no TrainingTask"):
            TaskManager(buffer, ["a"])  # type: ignore[list-item]


# -- a bound on what is in flight --------------------------------------------------------------------------------------


class Counting(SimulatedEngine):
    """Knows the most requests that were ever in flight, and answers none before there are 8 once."""

    def __init__(self) -> None:
        super().__init__(lengths=lognormal_lengths(8, 1.0, longest=60))
        self.now = self.most = 0
        self.eight = asyncio.Event()

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        if self.most >= 8:
            self.eight.set()
        try:
            await self.eight.wait()
            return await super().generate(*arguments, **named)
        finally:
            self.now -= 1


@pytest.mark.parametrize("in_flight", ["interrupt", "keep"])
async def test_all_tasks_together_have_no_more_in_flight_than_allowed_and_use_it_all(buffer: ReplayBuffer, in_flight: Any) -> None:
    async with Counting() as engine:
        strategies = [AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight=in_flight, max_staleness=1) for _ in range(3)]
        tasks = [a_task(buffer, engine, name, n + 1, strategy=strategies[n]) for n, name in enumerate("abc")]
        async with TaskManager(buffer, tasks, max_in_flight=9) as manager:
            for step in range(1, 6):
                assert len((await asyncio.wait_for(manager.produce_batch(6), 60)).groups) == 6
                await engine.update_weights({"seed": step}, step)
    assert engine.most == 8  # no group of 2 more has room


async def test_a_bound_below_a_group_is_refused(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine:
        with pytest.raises(ValueError, match="max_in_flight=1 lets no group of 2"):
            TaskManager(buffer, [a_task(buffer, engine, "a")], max_in_flight=1)


# -- killed ----------------------------------------------------------------------------------------------------------

STEPS, KILLS = 9, 8


async def train(say: Say, url: str) -> None:
    """The child: goes on from the last commit to the end; weights change with the step."""

    def weights(step: int, metrics: Any) -> dict[str, float]:
        return {"b": 1.0 + step % 3, "c": 0.3 if step < 5 else 0.0}

    async with ReplayBuffer.open(url) as buffer, SimulatedEngine(lengths=4) as engine:
        checkpoint = (await buffer.overview()).committed_step or 0
        await buffer.resume(step=checkpoint)
        tasks = [a_task(buffer, engine, name) for name in "abc"]
        manager = TaskManager(buffer, tasks, weights=weights)
        for step in range(checkpoint + 1, STEPS + 1):
            batch = await manager.produce_batch(5, step)
            carried = [batch.metrics[f"task/{name}/share/carried"] for name in "abc"]
            say("batch", step=step, groups={name: offsets(batch, name) for name in "abc"}, carried=carried)
            if step % 3 == 0:
                await buffer.commit(step)
                say("committed", step=step)
    say("done")


def test_killed_at_any_moment_a_run_is_shared_out_as_one_that_was_not(tmp_path: Path, backend: str) -> None:
    def batches(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [line for line in lines if line["what"] == "batch"]

    chance = random.Random(backend)
    with Zygote("tests.producer.test_manager:train", "buffer.backends.postgres") as zygote:
        reference = {line["step"]: line for line in batches(zygote.start(url=url_of(tmp_path, "reference.db")).ended())}
        assert sorted(reference) == list(range(1, STEPS + 1))
        seen, kills = [], 0
        while True:
            child = zygote.start(url=url_of(tmp_path))
            if kills < KILLS:
                kills += child.killed(Moment(chance.randint(1, 3), chance.random() * 0.02))
            else:
                child.ended()
            seen += batches(child.lines)
            if any(line["what"] == "done" for line in child.lines):
                break
    assert kills >= 2
    assert {line["step"] for line in seen} == set(reference)
    assert all(line == reference[line["step"]] for line in seen)
