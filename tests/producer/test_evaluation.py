"""An evaluation beside training is of one version of the weights, exact after crashes and rewinds, and never trained on."""

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import EngineDeadError
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.errors import ResumeRequiredError
from producer import AsyncProduceStrategy, EvaluationResult, ReplayPromptSampler, SyncProduceStrategy, TaskManager, TrainingTask
from producer.errors import DatasetError, ProducerError
from producer.pinning import Pins
from tests.buffer.groups import url as url_of
from tests.zygote import Moment, Say, Zygote

ROWS = [{"prompt_ids": [10 + index], "answer": index} for index in range(6)]
EVAL = "eval/math"


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


@pytest.fixture
def url(tmp_path: Path, backend: str) -> str:
    return url_of(tmp_path)


class Told(SimulatedEngine):
    """Knows which prompts were asked for, by first token, and can be stopped before any of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"lengths": 4, **options})
        self.asked, self.held, self.go = list[int](), set[int](), asyncio.Event()
        self.some_held, self.eight_asked = asyncio.Event(), asyncio.Event()

    async def generate(self, prompt_ids: Any, *arguments: Any, **named: Any) -> Any:
        self.asked.append(int(prompt_ids[0]))
        if len(self.asked) >= 8:
            self.eight_asked.set()
        if int(prompt_ids[0]) in self.held:
            self.some_held.set()
            await self.go.wait()
        return await super().generate(prompt_ids, *arguments, **named)


def by_row(state: RolloutState) -> float:
    """Of each prompt as many members pass as its answer says."""
    assert state.row is not None
    return float(state.index < state.row["answer"])


def loop_of(engine: SimulatedEngine, **options: Any) -> SingleTurnAgentLoop:
    return SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=3500, seed=1), **{"reward": by_row, "back_off": 0.0, **options})


def manager_of(buffer: ReplayBuffer, engine: SimulatedEngine, strategy: Any = None, **options: Any) -> TaskManager:
    sampler = ReplayPromptSampler([{"prompt_ids": [40 + n % 20], "answer": n} for n in range(500)], buffer, group_size=2, shuffle=False)
    return TaskManager(buffer, [TrainingTask("math", loop_of(engine), sampler, strategy or SyncProduceStrategy(buffer))], **options)


def versions(result: EvaluationResult) -> set[int]:
    return {int(version) for group in result.groups for state in group.rollouts for version in state.versions}


async def test_it_says_version_scores_and_pass_at_k_and_is_stored_under_its_own_name(url: str) -> None:
    async with ReplayBuffer.open(url) as buffer, Told() as engine:
        manager = manager_of(buffer, engine)
        await manager.produce_batch(2)
        await engine.update_weights({"seed": 1}, 1)
        result = await manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=4)
        assert (result.version, versions(result), result.step, result.failed) == (1, {1}, 2, 0)
        passed = [0, 1, 2, 3, 4, 4]
        assert result.score_mean == pytest.approx(sum(passed) / 24)
        assert result.pass_at == {
            1: pytest.approx(sum(passed) / 24),
            2: pytest.approx((0 + 1 / 2 + 5 / 6 + 1 + 1 + 1) / 6),
            4: pytest.approx(5 / 6),
        }
        assert result.metrics[f"eval/{EVAL}/pass@4"] == result.pass_at[4]
        assert result.metrics.keys() == {
            f"eval/{EVAL}/{name}" for name in ("version", "prompts", "failed", "score_mean", "pass@1", "pass@2", "pass@4")
        }
        assert [group.position for group in result.groups] == [(0, offset) for offset in range(6)]
        assert {group.status for group in await buffer.query(task_name=EVAL)} == {Status.CONSUMED}
        batch = await manager.produce_batch(3)
        assert {group.task_name for group in batch.groups} == {"math"}
        again = await manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=4)
        assert [group.position for group in again.groups] == [(1, offset) for offset in range(6)]
        assert (await buffer.audit()).ok


async def test_beside_training_an_update_of_the_weights_waits_for_it(buffer: ReplayBuffer) -> None:
    async with Told() as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight="keep", max_staleness=2)
        async with manager_of(buffer, engine, strategy, max_in_flight=8) as manager, asyncio.TaskGroup() as tasks:
            engine.held = {13}
            evaluating = tasks.create_task(manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=2))
            await engine.some_held.wait()
            first = await manager.produce_batch(3)

            async def update() -> None:
                async with manager.update_weights({"seed": 1}, mode="keep"):
                    assert evaluating.done()

            updating = tasks.create_task(update())
            second = await manager.produce_batch(3)
            assert (engine.version, updating.done()) == (0, False)
            engine.go.set()
            await updating
            assert engine.version == 1
            third = await manager.produce_batch(3)
        assert (evaluating.result().version, versions(evaluating.result())) == (0, {0})
        assert [len(batch.groups) for batch in (first, second, third)] == [3, 3, 3]


@pytest.mark.sqlite  # a response of 3000 tokens must outlast what the database does meanwhile
@pytest.mark.parametrize("in_flight", ["keep", "interrupt"])
@pytest.mark.parametrize("mode", ["keep", "abort", "wait"])
async def test_weights_are_updated_while_all_tasks_are_in_flight(buffer: ReplayBuffer, mode: Any, in_flight: Any) -> None:
    async with Told(lengths=3000) as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight=in_flight)
        async with manager_of(buffer, engine, strategy) as manager, asyncio.TaskGroup() as tasks:
            producing = tasks.create_task(manager.produce_batch(2))
            await engine.eight_asked.wait()
            for _ in range(20):  # a token a turn
                await asyncio.sleep(0)
            async with manager.update_weights({"seed": 1}, mode=mode):
                begun = len(engine.asked)
                assert engine.running + engine.waiting == (8 if mode == "keep" else 0)
                for _ in range(100):
                    await asyncio.sleep(0)
                assert len(engine.asked) == begun
            assert engine.version == 1
            batch = await producing
        seen = {(int(state.versions[0]), int(state.versions[-1])) for group in batch.groups for state in group.rollouts}
        assert seen == ({(0, 0)} if mode == "wait" else {(0, 1)})


async def test_weights_that_are_updated_all_the_same_make_it_begin_anew(url: str) -> None:
    async with ReplayBuffer.open(url) as buffer, Told() as engine:
        manager = manager_of(buffer, engine)
        engine.held = {13, 14}
        async with asyncio.TaskGroup() as tasks:
            evaluating = tasks.create_task(manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=2))
            await engine.some_held.wait()
            await buffer.wait_for(EVAL, Status.COMPLETED, 4, timeout=30)
            await engine.update_weights({"seed": 1}, 1)
            engine.held.clear()
            engine.go.set()
        result = evaluating.result()
        assert (result.version, versions(result), len(result.groups)) == (1, {1}, 6)
        assert (await buffer.audit()).ok


async def test_weights_that_are_updated_all_the_time_are_an_error_that_names_the_remedy(buffer: ReplayBuffer) -> None:
    class Restless(Told):
        async def generate(self, *arguments: Any, **named: Any) -> Any:
            completion = await super().generate(*arguments, **named)
            self._version += 1
            return completion

    async with Restless() as engine:
        with pytest.raises(ProducerError, match=r"updated 11 times.*manager\.update_weights"):
            await manager_of(buffer, engine).evaluate(EVAL, ROWS, loop_of(engine))
    assert await buffer.count(EVAL, Status.RUNNING) == 0


# -- broken off ------------------------------------------------------------------------------------------------------


async def test_one_that_was_cancelled_is_gone_on_with_and_what_was_finished_is_not_sampled_again(url: str) -> None:
    async with ReplayBuffer.open(url) as buffer, Told() as engine:
        manager = manager_of(buffer, engine)
        engine.held = {12, 13}
        evaluating = asyncio.create_task(manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=2))
        await buffer.wait_for(EVAL, Status.COMPLETED, 4, timeout=30)
        with pytest.raises(ProducerError, match="runs already"):
            await manager.evaluate(EVAL, ROWS, loop_of(engine))
        evaluating.cancel()
        engine.go.set()
        with pytest.raises(asyncio.CancelledError):
            await evaluating
        with pytest.raises(ValueError, match="other prompts"):
            await manager.evaluate(EVAL, ROWS[:3], loop_of(engine), group_size=2)
        engine.asked.clear()
        engine.held.clear()
        result = await manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=2)
        assert set(engine.asked) <= {12, 13}
        assert len(result.groups) == 6


async def test_a_rewind_gives_it_back_and_at_the_same_weights_nothing_is_sampled_again(url: str) -> None:
    async with ReplayBuffer.open(url) as buffer, Told() as engine:
        manager = manager_of(buffer, engine)
        await engine.update_weights({"seed": 1}, 1)
        await manager.produce_batch(2, step=1)
        await buffer.commit(1, version=1)
        first = await manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=2)
        second = await manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=2, step=5)
        assert (first.step, second.step) == (2, 5)
        with pytest.raises(ProducerError, match="no task"):
            async with TaskManager(buffer, [await _without_engine(buffer)]).update_weights():
                pass
    async with ReplayBuffer.open(url) as buffer, Told() as engine:
        manager = manager_of(buffer, engine)
        await engine.update_weights({"seed": 1}, 1)
        with pytest.raises(ResumeRequiredError):
            await manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=2)
        await buffer.resume(1)
        again = [await manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=2) for _ in range(2)]
        assert engine.asked == []
        for before, after in zip((first, second), again, strict=True):
            assert [group.group_id for group in after.groups] == [group.group_id for group in before.groups]
            assert (after.score_mean, after.pass_at) == (before.score_mean, before.pass_at)
        await buffer.resume(1)
        await engine.update_weights({"seed": 2}, 2)
        third = await manager.evaluate(EVAL, ROWS, loop_of(engine), group_size=2)
        assert versions(third) == {2}
        assert [group.group_id for group in third.groups] == [group.group_id for group in first.groups]
        assert (await buffer.audit()).ok


async def _without_engine(buffer: ReplayBuffer) -> TrainingTask:
    loop = SingleTurnAgentLoop.__new__(SingleTurnAgentLoop)
    loop.engine = None
    return TrainingTask("none", loop, ReplayPromptSampler(ROWS, buffer), SyncProduceStrategy(buffer))


PROMPTS, KILLS = 12, 5


async def evaluate(say: Say, url: str) -> None:
    """The child: evaluates, beside a batch; says what it asks the engine for, and what is durable when it begins."""
    rows = [{"prompt_ids": [10 + index], "answer": index} for index in range(PROMPTS)]

    class Saying(SimulatedEngine):
        async def generate(self, prompt_ids: Any, *arguments: Any, **named: Any) -> Any:
            completion = await super().generate(prompt_ids, *arguments, **named)
            say("sampled", prompt=int(prompt_ids[0]))
            return completion

    class Storing(ReplayBuffer):
        async def put(self, group: RolloutGroup) -> None:
            await super().put(group)
            say("stored", group=group.group_id)

    async with Storing(url) as buffer, Saying(lengths=40, slots=3, tokens_per_second=2000.0) as engine:
        await buffer.resume(0)
        done = await buffer.query(task_name=EVAL, status=Status.COMPLETED)
        say("begun", done=[group.position.offset for group in done if group.position])
        result = await manager_of(buffer, engine).evaluate(EVAL, rows, loop_of(engine), group_size=2)
        say("result", version=result.version, mean=result.score_mean, pass_at=sorted(result.pass_at.items()))


def test_killed_it_goes_on_and_finished_groups_are_not_run_again(tmp_path: Path, backend: str) -> None:
    chance, kills, done_in_all = random.Random(backend), 0, 0
    with Zygote("tests.producer.test_evaluation:evaluate", "buffer.backends.postgres") as zygote:
        reference = zygote.start(url=url_of(tmp_path, "reference.db")).ended()[-1]
        while True:
            child = zygote.start(url=url_of(tmp_path))
            if not kills:
                kills += child.killed(Moment(1, 0.0, "stored"))  # however busy the machine is, the next finds something done
            elif kills < KILLS:
                kills += child.killed(Moment(chance.randint(2, 9), chance.random() * 0.005))
            else:
                child.ended()
            lines = child.lines
            done = {10 + offset for line in lines if line["what"] == "begun" for offset in line["done"]}
            assert not done & {line["prompt"] for line in lines if line["what"] == "sampled"}
            done_in_all = max(done_in_all, len(done))
            if lines and lines[-1]["what"] == "result":
                break
    assert kills >= 2
    assert done_in_all > 0
    assert lines[-1] == reference


# -- failures and bounds ---------------------------------------------------------------------------------------------


async def test_a_prompt_that_fails_is_counted_and_not_replaced_and_all_failing_is_an_error(buffer: ReplayBuffer) -> None:
    def judges(state: RolloutState) -> float:
        if state.row is None or state.row["answer"] == 2 or everything:
            raise ZeroDivisionError("no such answer")
        return 1.0

    everything = False
    async with Told() as engine:
        manager = manager_of(buffer, engine)
        result = await manager.evaluate(EVAL, ROWS, loop_of(engine, reward=judges, max_attempts=1), group_size=2)
        assert (len(result.groups), result.failed, result.score_mean) == (5, 1, 1.0)
        assert sum((await buffer.counts(EVAL)).values()) == 6
        everything = True
        for _ in range(2):
            with pytest.raises(ProducerError, match=r"every prompt .* failed, .*no such answer"):
                await manager.evaluate("other", ROWS, loop_of(engine, reward=judges, max_attempts=1))
        everything = False
        assert (await manager.evaluate("other", ROWS, loop_of(engine, reward=judges, max_attempts=1))).failed == 1


async def test_an_engine_that_dies_ends_it_and_weights_can_be_updated_after_it(buffer: ReplayBuffer) -> None:
    def die(request_id: str, attempt: int) -> Exception | None:
        return EngineDeadError("fell off the bus")

    async with Told() as engine, SimulatedEngine(lengths=4, fail=die) as dead:
        manager = manager_of(buffer, engine, max_in_flight=4)
        with pytest.raises(EngineDeadError, match="fell off the bus"):
            await manager.evaluate(EVAL, ROWS, loop_of(dead))
        async with manager.update_weights({"seed": 1}):
            pass
        assert (await manager.evaluate(EVAL, ROWS, loop_of(engine))).version == 1
        assert len((await manager.produce_batch(4)).groups) == 4


async def test_it_has_its_share_of_permits_beside_training(buffer: ReplayBuffer) -> None:
    most = Counter[str]()

    class Shared(SimulatedEngine):
        async def generate(self, prompt_ids: Any, *arguments: Any, **named: Any) -> Any:
            kind = "eval" if int(prompt_ids[0]) < 40 else "train"
            now[kind] += 1
            most.update({key: max(0, n - most[key]) for key, n in [*now.items(), ("all", now.total())]})
            if now[kind] == share[kind]:
                reached[kind].set()
            try:
                await reached[kind].wait()  # none is answered before as many are in flight once
                return await super().generate(prompt_ids, *arguments, **named)
            finally:
                now[kind] -= 1

    now, share = Counter[str](), {"train": 12, "eval": 4}
    reached = {kind: asyncio.Event() for kind in share}
    rows = [{"prompt_ids": [10 + index % 30], "answer": 0} for index in range(60)]
    async with Shared(lengths=30) as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=9.0, in_flight="keep")
        async with manager_of(buffer, engine, strategy, max_in_flight=12, evaluation_weight=0.5) as manager, asyncio.TaskGroup() as tasks:
            await manager.produce_batch(4)
            evaluating = tasks.create_task(manager.evaluate(EVAL, rows, loop_of(engine)))
            for _ in range(6):
                await manager.produce_batch(8)
            await evaluating
    assert most["all"] <= 12
    assert all(most[kind] >= share[kind] for kind in share)


async def test_what_is_no_evaluation_is_refused(buffer: ReplayBuffer) -> None:
    async with Told() as engine:
        manager, loop = manager_of(buffer, engine), loop_of(engine)
        await manager.produce_batch(1)
        other = TaskManager(buffer, [TrainingTask("b", loop, ReplayPromptSampler(ROWS, buffer), SyncProduceStrategy(buffer))])
        for call, match in (
            (manager.evaluate("math", ROWS, loop), "no name for an evaluation"),
            (other.evaluate("math", ROWS, loop), "was trained on"),
            (manager.evaluate("", ROWS, loop), "no name"),
            (manager.evaluate(EVAL, [], loop), "rows is empty"),
            (manager.evaluate(EVAL, ROWS, loop, group_size=0), "group_size=0"),
        ):
            with pytest.raises(ValueError, match=match):
                await call
        with pytest.raises(DatasetError, match="row 1 of the evaluation"):
            await manager.evaluate(EVAL, [*ROWS[:1], {"answer": 1}], loop)
        with pytest.raises(ValueError, match="mode='drop'"):
            async with manager.update_weights(mode="drop"):  # type: ignore[arg-type]
                pass
        assert not math.isnan((await manager.evaluate(EVAL, ROWS, loop)).score_mean)


async def test_updates_and_evaluations_come_in_the_order_in_which_they_were_asked_for() -> None:
    pins, seen, go = Pins(), list[str](), asyncio.Event()

    async def hold(name: str) -> None:
        async with pins.held():
            seen.append(name)
            await go.wait()

    async def update() -> None:
        async with pins.updating():
            seen.append("update")

    async with asyncio.TaskGroup() as tasks:
        for work in (hold("a"), hold("b"), update(), hold("c")):
            tasks.create_task(work)
            for _ in range(5):
                await asyncio.sleep(0)
        assert seen == ["a", "b"]
        go.set()
    assert seen == ["a", "b", "update", "c"]
    await pins.settled()
