"""Shows that the metrics of batches are those of what was done: figures by hand, tokens that add up against what the engine
sampled, waste and biases that survive a restart."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent_loop import Completion, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_costs import CostModel
from agent_loop.engines.simulated_policy import Request, lognormal_lengths
from agent_loop.errors import EngineDeadError
from buffer import Account, ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.accounts import WASTE
from buffer.amounts import Amount
from buffer.inline import InlineReplayBuffer
from producer import AsyncProduceStrategy, ProducedBatch, Producer, RedundantMembers, ReplayPromptSampler, SyncProduceStrategy
from producer.ledger import BatchRecord, EngineUse
from producer.metrics import Books, Metrics, batch_metrics, batch_statistics, handing_out
from producer.simulate.virtual_time import run
from tests.buffer.groups import a_group, url

S = Status
TASK = "math"


def account(trained: Amount, finished: Amount, **wasted: int) -> Account:
    return Account(trained, Amount(), dict.fromkeys(WASTE, 0) | wasted, finished, overdue=0, cohort=0, untrained=0, window=8)


def test_a_record_by_hand() -> None:
    record = BatchRecord(
        period=10.0,
        waited=4.0,
        between=6.0,
        started=3,
        ended={S.COMPLETED: 2, S.FILTERED: 1},
        reasons={(S.FILTERED, "too_easy"): 1},
        tokens=600,
        group_seconds=[1.0, 2.0, 3.0],
        in_flight=5.5,
        most_in_flight=8,
        busy=5.0,
        engine=EngineUse(4.0, 1.5, 2),
    )
    metrics = batch_metrics([a_group(1), a_group(2, version=1)], {S.COMPLETED: 7}, record, version=12)
    assert (metrics["produce/seconds"], metrics["produce/train_seconds"], metrics["produce/period_seconds"]) == (4.0, 6.0, 10.0)
    assert (metrics["produce/tokens_per_second"], metrics["produce/groups_per_second"]) == (60.0, 0.2)
    assert [metrics[f"produce/group_seconds_p{q}"] for q in (50, 95, 99)] == pytest.approx([2.0, 2.9, 2.98])
    assert (metrics["engine/tokens_per_second"], metrics["engine/busy"], metrics["engine/in_flight_mean"]) == (120.0, 0.5, 5.5)
    assert (metrics["engine/running_mean"], metrics["engine/waiting_mean"], metrics["engine/preemptions"]) == (4.0, 1.5, 2)
    assert (metrics["filtered/too_easy"], metrics["produce/failed"], metrics["buffer/completed"]) == (1, 0, 7)
    assert (metrics["batch/staleness_8_up"], metrics["batch/staleness_7"]) == (2, 0)


def test_the_histogram_of_staleness_counts_each_group_once() -> None:
    groups = [a_group(n, version=version) for n, version in enumerate([9, 9, 8, 2, 0], 1)]
    metrics = batch_statistics(groups, version=9)
    shown = {name.removeprefix("batch/staleness_"): n for name, n in metrics.items() if name[-1].isdigit() or name.endswith("_up")}
    assert shown == {**{str(n): 0 for n in range(8)}, "0": 2, "1": 1, "7": 1, "8_up": 1}
    assert not any("staleness" in name for name in batch_statistics(groups, None))


def test_books_tell_of_the_run_of_the_window_and_of_the_batch() -> None:
    books = Books()
    books.open(account(Amount(100, 10, 100), Amount(400, 20, 400), stale=5))
    first = books.of_run(account(Amount(200, 20, 200), Amount(500, 30, 500), stale=5, failed=3))
    assert (first["produce/wasted"], first["run/tokens_wasted"], first["run/wasted_failed"]) == (3, 8, 3)
    assert first["run/length_bias"] == pytest.approx(10 / (500 / 30) - 1)
    assert first["window/length_bias"] == pytest.approx(0.0), "what went wrong before is not this window's"
    assert "run/coverage_bias" not in first
    for _ in range(9):
        last = books.of_run(account(Amount(200, 20, 200), Amount(500, 30, 500), stale=6, failed=3))
    assert last["produce/wasted"] == 0
    assert "window/length_bias" not in last, "nothing was trained on in it"


def test_handing_out_moves_what_waits_to_what_is_trained() -> None:
    group = a_group(1, tokens=5)
    group.rollouts[0].error = "it failed"  # left out
    before = Account(Amount(), Amount(30, 5, 25), dict.fromkeys(WASTE, 0), Amount(30, 5, 25), 0, 0, 0, 8)
    after = handing_out(before, [group])
    assert (after.trained, after.waiting, after.wasted["left_out"]) == (Amount(5, 1, 5), Amount(20, 4, 20), 5)
    assert after.generated == before.generated


class CountingEngine(SimulatedEngine):
    """Counts what it gave."""

    sampled = 0

    async def generate(self, *args: Any, **options: Any) -> Completion:
        completion = await super().generate(*args, **options)
        self.sampled += completion.token_ids.size
        return completion


def sampler_of(buffer: ReplayBuffer) -> ReplayPromptSampler:
    return ReplayPromptSampler([{"prompt_ids": [10 + n % 40], "n": n} for n in range(500)], buffer, group_size=2, shuffle=False)


def loop_of(engine: SimulatedEngine) -> SingleTurnAgentLoop:
    async def one(state: RolloutState) -> float:
        return 1.0

    return SingleTurnAgentLoop(engine, reward=one, sampling=SamplingParams(max_tokens=400, seed=1))


def every_third(group: RolloutGroup) -> str | None:
    return "every 3rd is of no use" if group.rollouts[0].row["n"] % 3 == 2 else None


def tokens(metrics: Metrics) -> tuple[float, float]:
    return metrics["run/tokens_generated"], sum(metrics[f"run/tokens_{part}"] for part in ("trained", "waiting", "wasted"))


async def produce(buffer: ReplayBuffer, engine: SimulatedEngine, batches: int, **options: Any) -> list[ProducedBatch]:
    strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, **options)
    loop, sampler = loop_of(engine), sampler_of(buffer)
    return [await strategy.produce_batch(loop, sampler, 4, TASK) for _ in range(batches)]


@pytest.mark.parametrize("keep", [True, False], ids=["partial rollouts", "begun anew"])
def test_generated_is_what_the_engine_sampled_and_adds_up(tmp_path: Path, keep: bool) -> None:
    """In virtual time: on a slow machine all that a batch does not wait for may have ended by itself when the batch is whole."""

    async def main() -> None:
        engine = CountingEngine(lengths=lognormal_lengths(12, 1.2, longest=200), costs=CostModel(slots=16, tokens_per_second=2000))
        async with InlineReplayBuffer.open(url(tmp_path)) as buffer, engine:
            batches = await produce(buffer, engine, 6, enable_partial_rollout=keep, group_filter=every_third)
            for batch in batches:
                generated, parts = tokens(batch.metrics)
                assert generated == parts
            last = batches[-1].metrics
            assert last["run/tokens_generated"] == engine.sampled
            assert sum(batch.metrics["produce/tokens"] for batch in batches) == engine.sampled
            assert (last["run/wasted_interrupted"] > 0) == (not keep)
            assert last["run/wasted_filtered"] == sum(
                r.response_ids.size for g in await buffer.query(status=S.FILTERED, limit=500) for r in g.rollouts
            )
            assert sum(batch.metrics["produce/wasted"] for batch in batches) == last["run/tokens_wasted"]
            filtered = sum(batch.metrics.get("filtered/every_nrd_is_of_no_use", 0) for batch in batches)
            assert filtered == await buffer.count(TASK, S.FILTERED)

    run(main())


async def test_redundant_members_are_wasted_by_that_name(buffer: ReplayBuffer) -> None:
    async with CountingEngine(lengths=lognormal_lengths(12, 1.2, longest=200), slots=16) as engine:
        strategy = SyncProduceStrategy(buffer, redundant=RedundantMembers(1, bias="accept"))
        metrics = (await strategy.produce_batch(loop_of(engine), sampler_of(buffer), 8, TASK)).metrics
    generated, parts = tokens(metrics)
    assert generated == parts == engine.sampled
    assert metrics["run/wasted_left_out"] == metrics["run/tokens_wasted"] > 0


async def test_run_metrics_go_on_after_a_restart(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        async with ReplayBuffer.open(url(tmp_path)) as buffer, SimulatedEngine(lengths=lognormal_lengths(12, 1.0, longest=99)) as engine:
            await buffer.resume(step=await buffer.last_step())
            before = await buffer.account(TASK)
            batches = await produce(buffer, engine, 4, enable_partial_rollout=False)
            found.append((before, batches[0].metrics, batches[-1].metrics))
            after = await buffer.account(TASK)
            assert (after.generated, after.trained.tokens) == (
                batches[-1].metrics["run/tokens_generated"],
                batches[-1].metrics["run/tokens_trained"],
            )
    (_, _, last), (before, again, end) = found
    assert before.generated == last["run/tokens_generated"] > 0
    assert end["run/tokens_generated"] > before.generated
    assert again["run/tokens_generated"] >= before.generated, "the first batch may have waited"
    assert again["run/wasted_interrupted"] >= last["run/wasted_interrupted"]
    assert "produce/train_seconds" not in again, "it is another process's first batch"


async def test_sync_batches_of_all_that_was_drawn_have_no_bias_and_no_waste(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=lognormal_lengths(12, 1.2, longest=200)) as engine:
        strategy, loop, sampler = SyncProduceStrategy(buffer), loop_of(engine), sampler_of(buffer)
        batches = [await strategy.produce_batch(loop, sampler, 3, TASK) for _ in range(10)]
    for batch in batches:
        assert (batch.metrics["run/length_bias"], batch.metrics["window/length_bias"]) == pytest.approx((0.0, 0.0))
        assert (batch.metrics["run/tokens_wasted"], batch.metrics["run/overdue"]) == (0, 0)
    assert batches[-1].metrics["run/coverage_bias"] == 0.0


async def test_dropping_slow_prompts_shows_in_both_biases(buffer: ReplayBuffer) -> None:
    """What this library does not do: every response longer than the median fails."""

    def slow_ones_fail(state: RolloutState) -> float:
        if state.response_ids.size > 12:
            raise ValueError("too slow")
        return 1.0

    async with SimulatedEngine(lengths=lognormal_lengths(12, 1.0, longest=99)) as engine:
        loop = SingleTurnAgentLoop(engine, reward=slow_ones_fail, sampling=SamplingParams(max_tokens=400), max_attempts=1)
        strategy, sampler = SyncProduceStrategy(buffer, max_failed=1000), sampler_of(buffer)
        for _ in range(10):
            metrics = (await strategy.produce_batch(loop, sampler, 3, TASK)).metrics
    assert metrics["run/length_bias"] < -0.2
    assert metrics["run/coverage_bias"] > 0.2
    assert metrics["run/wasted_failed"] > 0
    assert sum(n for name, n in metrics.items() if name.startswith("failed/")) == metrics["produce/failed"]


async def test_a_background_producer_tells_how_long_the_trainer_trained_and_waited(buffer: ReplayBuffer) -> None:
    engine = SimulatedEngine(lengths=lognormal_lengths(12, 1.0, longest=99), slots=8)
    strategy = AsyncProduceStrategy(buffer, staleness_threshold=2.0)
    async with engine, Producer(strategy, loop_of(engine), sampler_of(buffer), TASK) as producer:
        batches = [await producer.next_batch(4) for _ in range(4)]
    for batch in batches:
        assert 0 <= batch.metrics["engine/in_flight_mean"] <= batch.metrics["engine/in_flight_max"] <= 24
        assert 0 <= batch.metrics["engine/busy"] <= 1
    assert ["produce/train_seconds" in batch.metrics for batch in batches] == [False, True, True, True]


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_times_and_engine_use_are_those_of_a_simulated_run(tmp_path: Path, background: bool) -> None:
    """In virtual time all of them are known: the trainer trains for 100 s, and the engine tells how long its slots were held."""

    async def train() -> tuple[list[Metrics], float, float]:
        engine = SimulatedEngine(lengths=lognormal_lengths(12, 1.0, longest=99), slots=16, tokens_per_second=1.0)
        async with InlineReplayBuffer.open(f"sqlite:///{tmp_path / 'run.db'}") as buffer, engine:
            found: list[Metrics] = []
            strategy, loop, sampler = AsyncProduceStrategy(buffer, staleness_threshold=1.0), loop_of(engine), sampler_of(buffer)
            async with Producer(strategy, loop, sampler, TASK) as producer:
                for step in range(1, 7):
                    one = producer.next_batch(4) if background else strategy.produce_batch(loop, sampler, 4, TASK, step=step)
                    found.append((await one).metrics)
                    held, now = engine.statistics().busy_slot_seconds, asyncio.get_running_loop().time()
                    await asyncio.sleep(100.0)
            return found, held, now

    metrics, held, now = run(train())
    assert [one["produce/train_seconds"] for one in metrics[1:]] == pytest.approx([100.0] * 5)
    for one in metrics[1:]:
        assert one["produce/seconds"] + one["produce/train_seconds"] == pytest.approx(one["produce/period_seconds"])
    assert sum(one["produce/period_seconds"] for one in metrics) == pytest.approx(now)
    assert sum(one["engine/running_mean"] * one["produce/period_seconds"] for one in metrics) == pytest.approx(held, rel=0.05)
    assert sum(one["engine/in_flight_mean"] * one["produce/period_seconds"] for one in metrics) == pytest.approx(held, rel=0.1)
    for one in metrics:
        assert one["produce/tokens_per_second"] * one["produce/period_seconds"] == pytest.approx(one["produce/tokens"])
        assert one["engine/tokens_per_second"] >= one["produce/tokens_per_second"]


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_over_issuing_with_half_of_the_prompts_ten_times_slower_is_without_bias(tmp_path: Path, background: bool) -> None:
    """Over 30 batches, though each is whole long before its slow prompts are."""

    def slow_half(request: Request) -> int:
        return 120 if request.prompt_ids[0] % 2 else 12

    async def train() -> list[ProducedBatch]:
        engine = SimulatedEngine(lengths=slow_half, slots=32, tokens_per_second=1.0)
        async with InlineReplayBuffer.open(f"sqlite:///{tmp_path / 'run.db'}") as buffer, engine:
            strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, max_staleness=4, progress=False)
            loop, sampler, batches = loop_of(engine), sampler_of(buffer), list[ProducedBatch]()
            async with Producer(strategy, loop, sampler, TASK) as producer:
                for step in range(1, 31):
                    one = producer.next_batch(8) if background else strategy.produce_batch(loop, sampler, 8, TASK, step=step)
                    batches.append(await one)
                    await engine.update_weights({"seed": step}, version=step)
            assert (await buffer.audit(payloads=True)).ok
            return batches

    batches = run(train())
    metrics, groups = batches[-1].metrics, [group for batch in batches for group in batch.groups]
    slow = sum(group.rollouts[0].prompt_ids[0] % 2 for group in groups if group.rollouts[0].prompt_ids is not None)
    assert abs(slow / len(groups) - 0.5) < 0.05
    assert abs(metrics["run/length_bias"]) < 0.05
    assert (metrics["run/coverage_bias"], metrics["run/overdue"], metrics["run/tokens_wasted"]) == (0.0, 0, 0)
    assert all(batch.metrics["batch/staleness_max"] <= 4 for batch in batches)


def test_after_an_engine_died_nothing_counts_as_in_flight(tmp_path: Path) -> None:
    async def train() -> Metrics:
        def engine(**options: Any) -> SimulatedEngine:
            return SimulatedEngine(lengths=lambda request: 10, slots=4, tokens_per_second=1.0, **options)

        def dies(request_id: str, attempt: int) -> Exception | None:
            return EngineDeadError("gone") if "-3-" in request_id else None

        async with InlineReplayBuffer.open(f"sqlite:///{tmp_path / 'run.db'}") as buffer, engine(fail=dies) as first, engine() as second:
            strategy, sampler = SyncProduceStrategy(buffer, progress=False), sampler_of(buffer)
            with pytest.raises(EngineDeadError):
                await strategy.produce_batch(loop_of(first), sampler, 4, TASK)
            await asyncio.sleep(1000.0)
            return (await strategy.produce_batch(loop_of(second), sampler, 4, TASK)).metrics

    metrics = run(train())
    assert metrics["engine/in_flight_mean"] * metrics["produce/period_seconds"] < 8 * 40
