"""Shows that the simulated engine takes the time that its costs say, and stamps each token with the version of its moment."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop.engines.base import Completion, Engine, EngineLoad
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_clock import LATE, Alarm
from agent_loop.engines.simulated_costs import CostModel
from agent_loop.engines.simulated_policy import Decoder, FillerPolicy, Request, Step, empirical_lengths, lognormal_lengths
from agent_loop.errors import EngineError
from agent_loop.sampling import SamplingParams
from producer.simulate import virtual_time
from tests.engines.test_simulated import TestSimulatedEngine as Promises

PARAMS = SamplingParams(max_tokens=1000)


class TestWithCosts(Promises):
    """The promises of an engine where everything costs something."""

    @pytest_asyncio.fixture
    async def engine(self) -> AsyncIterator[Engine]:
        async with self.make_engine() as engine:
            yield engine

    def make_engine(self) -> Engine:
        costs = CostModel(
            16,
            8_000.0,
            half_batch=64,
            prefill_tokens_per_second=1e6,
            prefix_cache_tokens=100,
            block_tokens=2,
            kv_tokens=1500,
            update_seconds=0.001,
        )
        return SimulatedEngine(costs=costs)


class Singly:
    """The same responses, token by token: a policy of whose responses the engine knows nothing."""

    def __init__(self, inner: FillerPolicy) -> None:
        self.vocab_size, self.eos_token_ids, self._inner = inner.vocab_size, inner.eos_token_ids, inner

    def start(self, request: Request, params: SamplingParams) -> Decoder:
        known = self._inner.start(request, params)

        def step(context: Sequence[int], weights: int) -> Step:
            return known(context, weights)

        return step


def now() -> float:
    return asyncio.get_running_loop().time()


async def ask(engine: Engine, name: str, prompt: Sequence[int] = (1,), **options: Any) -> tuple[float, Completion]:
    """When the response came, and what it is."""
    completion = await engine.generate(list(prompt), options.pop("params", PARAMS), request_id=name, **options)
    return now(), completion


def in_virtual_time(engine: SimulatedEngine, story: Callable[[asyncio.TaskGroup], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with engine, asyncio.TaskGroup() as tasks:
            return await story(tasks)

    return virtual_time.run(run())


# -- time ---------------------------------------------------------------------------------------------------------


def test_a_response_takes_its_tokens_at_the_rate_of_its_batch() -> None:
    engine = SimulatedEngine(lengths=30, costs=CostModel(2, 10.0, half_batch=2.0))

    async def story(tasks: asyncio.TaskGroup) -> list[float]:
        calls = [tasks.create_task(ask(engine, str(number))) for number in range(3)]
        return [(await call)[0] for call in calls]

    # Two at 5 a second, then one at 10 / 1.5.
    assert in_virtual_time(engine, story) == pytest.approx([6.0, 6.0, 10.5])
    assert engine.statistics().busy_slot_seconds == pytest.approx(2 * 6.0 + 4.5)
    assert engine.statistics().as_dict()["tokens"] == 90


def test_members_of_a_group_and_continuations_pay_no_prefill_for_what_is_remembered() -> None:
    costs = CostModel(1, 10.0, prefill_tokens_per_second=100.0, prefix_cache_tokens=10_000, block_tokens=10)
    engine = SimulatedEngine(lengths=40, costs=costs)
    prompt = [1] * 100

    async def story(tasks: asyncio.TaskGroup) -> list[float]:
        ends = [(await ask(engine, "first", prompt))[0], (await ask(engine, "member", prompt))[0]]
        called = tasks.create_task(ask(engine, "cut", prompt))
        await asyncio.sleep(2.0 + 0.1)
        await engine.interrupt(["cut"])
        kept = (await called)[1].token_ids
        assert kept.size == 20
        began = now()
        ends.append((await ask(engine, "continued", [*prompt, *kept]))[0] - began)
        await engine.update_weights({"seed": 1}, 1)
        began = now()
        return [*ends, (await ask(engine, "later", prompt))[0] - began]

    # The last token of a prompt is always computed.
    first, member, continued, later = in_virtual_time(engine, story)
    assert (first, member) == pytest.approx((1 + 4, 5 + 0.01 + 4))
    assert continued == pytest.approx(0.01 + 2, abs=1e-6)
    assert later == pytest.approx(1 + 4)
    assert engine.statistics().cached_tokens == 99 + 99 + 119
    assert engine.statistics().busy_slot_seconds == pytest.approx(member + 2.1 + continued + later)  # prefills too


def test_an_update_of_weights_takes_its_time_and_nothing_is_decoded_meanwhile() -> None:
    engine = SimulatedEngine(lengths=100, costs=CostModel(1, 10.0, update_seconds=7.0))

    async def story(tasks: asyncio.TaskGroup) -> tuple[float, Completion, tuple[float, Completion]]:
        calls = [tasks.create_task(ask(engine, name)) for name in ("first", "second")]
        await asyncio.sleep(3.05)
        update = tasks.create_task(engine.update_weights({"seed": 1}, 5))
        await asyncio.sleep(3.0)
        assert engine.version == 0
        assert engine.statistics().tokens == 30
        assert engine.load() == EngineLoad(running=1, waiting=1)
        await update
        return now(), (await calls[0])[1], await calls[1]

    at, first, (end, second) = in_virtual_time(engine, story)
    assert at == pytest.approx(10.05)
    assert first.versions.tolist() == [0] * 30 + [5] * 70
    assert (end, second.versions.tolist()) == (pytest.approx(27.0), [5] * 100)
    assert engine.statistics().busy_slot_seconds == pytest.approx(20.0)


def test_a_cancelled_update_changes_nothing_but_the_time() -> None:
    engine = SimulatedEngine(lengths=10, costs=CostModel(1, 10.0, update_seconds=7.0))

    async def story(tasks: asyncio.TaskGroup) -> tuple[float, Completion]:
        call = tasks.create_task(ask(engine, "r"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await engine.update_weights({"seed": 1}, 5)
        return await call

    end, completion = in_virtual_time(engine, story)
    assert (end, completion.versions.tolist(), engine.version) == (pytest.approx(3.0), [0] * 10, 0)


def test_a_pause_that_keeps_lasts_until_both_it_and_an_update_are_over() -> None:
    engine = SimulatedEngine(lengths=10, costs=CostModel(1, 10.0, update_seconds=2.0))

    async def story(tasks: asyncio.TaskGroup) -> list[float]:
        calls = [tasks.create_task(ask(engine, "r"))]
        await asyncio.sleep(0.55)
        await engine.pause("keep")
        calls.append(tasks.create_task(ask(engine, "came in the pause")))
        await asyncio.sleep(1.0)
        assert engine.load() is None
        async with asyncio.TaskGroup() as both:
            both.create_task(engine.update_weights({"seed": 1}, 1))
            await asyncio.sleep(1.0)
            await engine.resume()
        return [(await call)[0] for call in calls]

    assert in_virtual_time(engine, story) == pytest.approx([1.0 + 3.0, 1.0 + 3.0 + 1.0])


# -- tokens and versions ------------------------------------------------------------------------------------------

ACTS = ("update", "freeze", "abort all", "cancel", "interrupt")


@settings(max_examples=150, deadline=None)
@given(
    acts=st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 400), st.integers(0, 7)), max_size=8),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    slots=st.integers(1, 4),
    kv=st.none() | st.integers(1, 60),
    half=st.sampled_from([math.inf, 4.0]),
    piece=st.sampled_from([1, 3, 100]),
    singly=st.booleans(),
)
def test_whatever_happens_every_token_is_there_once_with_the_version_of_its_moment(
    acts: list[tuple[str, int, int]], lengths: list[int], slots: int, kv: int | None, half: float, piece: int, singly: bool
) -> None:
    """Acts come at hundredths of a second; rollouts are continued until they are whole."""
    inner = FillerPolicy(lambda request: lengths[int(str(request.session_id))])
    costs = CostModel(slots, 8.0, half_batch=half, kv_tokens=kv, prefill_tokens_per_second=50.0, update_seconds=0.3)
    engine = SimulatedEngine(policy=Singly(inner) if singly else inner, costs=costs)
    in_force: list[tuple[float, int]] = [(0.0, 0)]

    class Seen:
        piece_tokens = piece

        def __init__(self) -> None:
            self.ids, self.versions = list[int](), list[int]()

        def __call__(self, shown: Completion) -> None:
            self.ids += shown.token_ids.tolist()
            self.versions += shown.versions.tolist()

    async def rollout(number: int) -> None:
        kept, came, attempt = list[int](), math.inf, 0
        while True:
            seen, asked = Seen(), now()
            name, attempt = f"{number}-{attempt}", attempt + 1
            try:
                end, completion = await ask(engine, name, [1, number, *kept], session_id=str(number), on_tokens=seen)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task is not None
                assert task.uncancel() == 0
                kept += seen.ids
                continue
            assert (seen.ids, seen.versions) == (completion.token_ids.tolist(), completion.versions.tolist())
            known = [version for at, version in in_force if at <= end]
            oldest = max((version for at, version in in_force if at <= asked), default=0)
            assert all(oldest <= version <= known[-1] for version in completion.versions)
            assert (np.diff(completion.versions) >= 0).all()
            kept, came = kept + seen.ids, end
            if completion.finish_reason != "abort":
                break
        assert came < math.inf
        assert kept == [63] * (lengths[number] - 1) + [0]

    async def act(what: str, member: int, rollouts: list[asyncio.Task[None]]) -> None:
        if what == "update":
            await engine.update_weights({"seed": 1}, engine.version + 1)
            in_force.append((now(), engine.version))
        elif what == "freeze":
            await engine.pause("keep")
            await asyncio.sleep(0.25)
            await engine.resume()
        elif what == "abort all":
            await engine.pause()
            await engine.resume()
        elif what == "cancel":
            rollouts[member % len(rollouts)].cancel()
        else:
            await engine.interrupt([name for name in engine._requests if name.startswith(str(member))])

    async def story(tasks: asyncio.TaskGroup) -> None:
        rollouts = [tasks.create_task(rollout(number)) for number in range(len(lengths))]
        await asyncio.sleep(0)
        for what, hundredths, member in sorted(acts, key=lambda one: one[1]):
            await asyncio.sleep(max(0.0, hundredths / 100 - now()))
            await act(what, member, rollouts)

    in_virtual_time(engine, story)
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.tokens >= sum(lengths)


@settings(deadline=None)
@given(st.integers(1, 99), st.integers(1, 20))
def test_an_interrupted_request_has_the_tokens_of_its_time(hundredths: int, rate: int) -> None:
    engine = SimulatedEngine(lengths=100, costs=CostModel(1, float(rate)))

    async def story(tasks: asyncio.TaskGroup) -> int:
        call = tasks.create_task(ask(engine, "r"))
        await asyncio.sleep(hundredths / 100 + 1e-6)
        await engine.interrupt()
        return int((await call)[1].token_ids.size)

    assert in_virtual_time(engine, story) == hundredths * rate // 100


def test_a_request_that_is_given_up_during_a_pause_is_not_heard_of_after_it() -> None:
    engine = SimulatedEngine(lengths=10, costs=CostModel(2, 10.0))

    async def story(tasks: asyncio.TaskGroup) -> float:
        await engine.pause("keep")
        held = [tasks.create_task(ask(engine, name)) for name in ("cancelled", "interrupted", "kept")]
        await asyncio.sleep(1.0)
        held[0].cancel()
        await engine.interrupt(["interrupted"])
        assert (await held[1])[1].finish_reason == "abort"
        assert engine.waiting == 1
        await engine.resume()
        assert (engine.running, engine.waiting) == (1, 0)
        return (await held[2])[0]

    assert in_virtual_time(engine, story) == pytest.approx(2.0)


def test_a_preempted_request_keeps_its_tokens_and_their_versions() -> None:
    engine = SimulatedEngine(lengths=20, costs=CostModel(2, 10.0, kv_tokens=22))

    async def story(tasks: asyncio.TaskGroup) -> list[tuple[float, Completion]]:
        calls = [tasks.create_task(ask(engine, name)) for name in "ab"]
        await asyncio.sleep(0.5)
        await engine.update_weights({"seed": 1}, 1)
        await asyncio.sleep(0.7)
        await engine.update_weights({"seed": 2}, 2)
        return [await call for call in calls]

    first, second = in_virtual_time(engine, story)
    assert engine.statistics().preemptions == 1
    assert engine.load() == EngineLoad(0, 0, 1)
    assert (first[0], first[1].versions.tolist()) == (pytest.approx(2.0), [0] * 5 + [1] * 7 + [2] * 8)
    assert (second[0], second[1].versions.tolist()) == (pytest.approx(3.0), [0] * 5 + [1] * 5 + [2] * 10)


# -- who is shown tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [True, False])
def test_pieces_come_as_large_as_asked_for_or_only_at_the_end(pieces: bool) -> None:
    engine = SimulatedEngine(lengths=100, costs=CostModel(1, 10.0), pieces=pieces)
    came: list[tuple[float, int]] = []

    class Watcher:
        piece_tokens = 40

        def __call__(self, piece: Completion) -> None:
            came.append((now(), piece.token_ids.size))

    async def story(tasks: asyncio.TaskGroup) -> None:
        await ask(engine, "r", on_tokens=Watcher())
        call = tasks.create_task(ask(engine, "cancelled", on_tokens=Watcher()))
        await asyncio.sleep(1.05)
        call.cancel()

    in_virtual_time(engine, story)
    times, sizes = zip(*came, strict=True)
    assert sizes == ((40, 40, 20, 10) if pieces else (100, 10))
    assert times == pytest.approx((4.0, 8.0, 10.0, 11.05) if pieces else (10.0, 11.05))


def test_a_request_that_nobody_watches_wakes_the_loop_only_at_its_end() -> None:
    engine = SimulatedEngine(lengths=900, costs=CostModel(4, 10.0))

    async def story(tasks: asyncio.TaskGroup) -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual_time.VirtualTimeLoop)
        jumps, select = 0, loop._clock.select

        def counted(timeout: float | None = None) -> Any:
            nonlocal jumps
            jumps += 1
            return select(timeout)

        loop._clock.select = counted  # type: ignore[method-assign]
        async with asyncio.TaskGroup() as calls:
            for number in range(8):
                calls.create_task(ask(engine, str(number)))
        return jumps

    assert in_virtual_time(engine, story) < 20


def test_an_error_of_one_request_disturbs_no_other() -> None:
    def lengths(request: Request) -> int:
        if request.request_id == "bad":
            raise EngineError("no such prompt")
        return 10

    engine = SimulatedEngine(lengths=lengths, costs=CostModel(1, 10.0))

    async def story(tasks: asyncio.TaskGroup) -> float:
        calls = [ask(engine, "good"), ask(engine, "bad"), ask(engine, "other")]
        good, bad, other = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(bad, EngineError)
        assert not isinstance(good, BaseException)
        assert not isinstance(other, BaseException)
        return other[0]

    assert in_virtual_time(engine, story) == pytest.approx(2.0)


# -- lengths ------------------------------------------------------------------------------------------------------


def lengths_of(draw: Callable[[Request], int], prompts: int, members: int, epoch: int = 0) -> np.ndarray[Any, Any]:
    """(prompts, members) lengths."""
    ids = [np.array([1, prompt], np.int32) for prompt in range(prompts)]
    sessions = [[f"{epoch}-{prompt}-{member}" for member in range(members)] for prompt in range(prompts)]
    return np.array([[draw(Request(ids[p], "r", None, sessions[p][m])) for m in range(members)] for p in range(prompts)])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_variance_belongs_to_the_prompt_in_all_epochs(share: float) -> None:
    draw = lognormal_lengths(1000, 1.0, longest=10**9, seed=4, prompt_share=share)
    logs = [np.log(lengths_of(draw, 300, 16, epoch)) for epoch in range(2)]
    assert np.median(logs[0]) == pytest.approx(math.log(1000), abs=0.2)
    assert logs[0].var() == pytest.approx(1.0, abs=0.15)
    across = np.corrcoef(logs[0][:, 0], logs[1][:, 0])[0, 1]
    assert across == pytest.approx(share, abs=0.15)
    within = np.corrcoef(logs[0][:, 0], logs[0][:, 1])[0, 1]
    assert within == pytest.approx(share, abs=0.15)
    assert (lengths_of(draw, 300, 16) == np.round(np.exp(logs[0]))).all()


def test_recorded_lengths_are_those_of_the_prompt_where_it_is_known_else_of_all() -> None:
    draw = empirical_lengths({(1, 0): [5, 7], (1, 1): [100], (1, 2): []}, seed=1)
    lengths = lengths_of(draw, 4, 50)
    assert [set(lengths[prompt]) for prompt in range(4)] == [{5, 7}, {100}, {5, 7, 100}, {5, 7, 100}]
    turned = empirical_lengths({(1, 2): [], (1, 1): [100], (1, 0): [7, 5]}, seed=1)
    assert (lengths_of(turned, 4, 50) == lengths).all()
    for recorded in ({}, {(1,): []}, {(1,): [0]}):
        with pytest.raises(ValueError, match="1 or more"):
            empirical_lengths(recorded)


def test_lengths_out_of_bounds_are_refused() -> None:
    for arguments in ({"median": 0}, {"sigma": -1}, {"longest": 0}, {"prompt_share": 1.5}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            lognormal_lengths(**{"median": 10, "sigma": 1, "longest": 100, **arguments})  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_a_continued_response_keeps_its_length_though_that_belongs_to_the_prompt(length: int, data: st.DataObject) -> None:
    prompts: list[tuple[int, ...]] = []

    def lengths(request: Request) -> int:
        prompts.append(request.prompt_ids)
        return length

    policy, prompt, kept = FillerPolicy(lengths), [1, 63, 2], data.draw(st.integers(0, length - 1))
    whole = policy.start(Request(np.array(prompt, np.int32), "a"), PARAMS).token_ids.tolist()
    rest = policy.start(Request(np.array([*prompt, *whole[:kept]], np.int32), "b"), PARAMS)
    assert whole[:kept] + rest.token_ids.tolist() == whole
    assert set(prompts) == {tuple(prompt)}


def test_responses_of_one_policy_are_parts_of_one_array() -> None:
    policy = FillerPolicy(1000)
    policy.start(Request(np.array([1], np.int32), "a"), PARAMS)
    parts = [policy.start(Request(np.array([1], np.int32), name), PARAMS).token_ids for name in "bc"]
    assert np.shares_memory(*parts)
    with pytest.raises(ValueError, match="read-only"):
        parts[0][0] = 1


# -- determinism and clocks ---------------------------------------------------------------------------------------


def test_the_same_calls_give_the_same_result() -> None:
    def run() -> tuple[list[tuple[str, float, bytes]], Any]:
        costs = CostModel(
            8, 20.0, half_batch=16, prefill_tokens_per_second=500.0, prefix_cache_tokens=500, kv_tokens=900, update_seconds=0.5
        )
        engine = SimulatedEngine(lengths=lognormal_lengths(40, 1.0, longest=500, seed=2, prompt_share=0.5), costs=costs)
        ends: list[tuple[str, float, bytes]] = []

        async def one(name: str, prompt: int) -> None:
            end, completion = await ask(engine, name, [1, prompt] * 9, session_id=name)
            ends.append((name, end, completion.versions.tobytes()))

        async def story(tasks: asyncio.TaskGroup) -> None:
            for number in range(60):
                tasks.create_task(one(str(number), number // 6))
            for version in range(1, 4):
                await asyncio.sleep(5.0)
                await engine.update_weights({"seed": version}, version)

        in_virtual_time(engine, story)
        return ends, engine.statistics()

    assert run() == run()


def test_an_engine_opened_again_in_another_loop_goes_on() -> None:
    engine = SimulatedEngine(lengths=10, costs=CostModel(1, 10.0))

    async def story(tasks: asyncio.TaskGroup) -> float:
        await asyncio.sleep(3.0)
        return (await ask(engine, "r"))[0]

    assert [in_virtual_time(engine, story) for _ in range(2)] == pytest.approx([4.0, 4.0])
    assert engine.statistics().busy_slot_seconds == pytest.approx(2.0)


class HeldUp(virtual_time.VirtualTimeLoop):
    """Its clock can be set forward, as that of a program that did something else."""

    def skip(self, seconds: float) -> None:
        self._clock.now += seconds


def test_a_loop_that_was_held_up_slows_the_engine_and_does_not_end_everything_at_once() -> None:
    engine = SimulatedEngine(lengths=1000, costs=CostModel(1, 1000.0))
    shown: list[float] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, HeldUp)
        async with engine, asyncio.TaskGroup() as tasks:
            call = tasks.create_task(ask(engine, "r", on_tokens=lambda piece: shown.append(now())))
            await asyncio.sleep(0.1005)
            loop.skip(50.0)
            await asyncio.sleep(0)
            assert len(shown) <= 100 + LATE * 1000 + 2
            assert (await call)[0] == pytest.approx(51.0, abs=0.01)

    with asyncio.Runner(loop_factory=HeldUp) as runner:
        runner.run(run())
    assert len(shown) == 1000


def test_an_alarm_rings_at_the_time_that_was_set_last_unless_that_is_never() -> None:
    async def run() -> list[float]:
        rang = list[float]()
        alarm = Alarm(lambda: rang.append(now()), turns=False)
        alarm.open()
        alarm.set(3.0)
        alarm.set(1.0)
        await asyncio.sleep(2.0)
        alarm.set(4.0)
        alarm.set(math.inf)
        await asyncio.sleep(10.0)
        return rang

    assert virtual_time.run(run()) == [1.0]


# -- arguments ----------------------------------------------------------------------------------------------------


def test_costs_and_their_short_forms_exclude_each_other() -> None:
    for short in ({"slots": 3}, {"tokens_per_second": 3.0}):
        with pytest.raises(ValueError, match="belong into costs"):
            SimulatedEngine(costs=CostModel(), **short)  # type: ignore[arg-type]
    assert SimulatedEngine(slots=3, tokens_per_second=2.0).costs == CostModel(3, 2.0)
