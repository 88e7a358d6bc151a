"""A set of reward functions judges by recipe, keeps every part, and fails, skips, fills or repeats as each function is told."""

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_loop import AgentLoop, Judgement, RewardFunction, RewardSet, Sampler, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import RewardError
from agent_loop.rewards.combining import combined
from agent_loop.rewards.statistics import RewardStatistics
from buffer import RolloutGroup, RolloutState, Status
from producer.simulate import virtual_time


def state_of(index: int = 0, **row: Any) -> RolloutState:
    state = RolloutState(7, index, status=Status.RUNNING, prompt_ids=[10, 11], row={"prompt_ids": [10, 11], **row})
    state.append([5, 6, 7][: index + 1], logprobs=[-0.1] * (index + 1))
    state.text, state.finish_reason = "x" * (index + 1), "stop"
    return state


def group_of(size: int = 3, **row: Any) -> RolloutGroup:
    return RolloutGroup(7, [state_of(index, **row) for index in range(size)])


class Whole(AgentLoop):
    """Its rollouts are whole from the start."""

    def __init__(self, reward: Any, **options: Any) -> None:
        super().__init__(reward=reward, **{"back_off": 0.0, "max_attempts": 2, **options})

    async def generate(self, state: RolloutState) -> RolloutState:
        raise AssertionError("a finished response is not generated again")


def length(state: RolloutState) -> float:
    return float(state.response_ids.size)


async def half(state: RolloutState) -> float:
    await asyncio.sleep(0)
    return 0.5


def broken(state: RolloutState) -> float:
    raise KeyError("answer")


async def judged(reward: RewardSet, **row: Any) -> RolloutState:
    group = await Whole(reward).generate_group(group_of(1, **row))
    return group.rollouts[0]


# -- weights and recipes ----------------------------------------------------------------------------------------


async def test_score_and_reward_are_weighed_apart_and_every_part_is_kept() -> None:
    functions = {"length": length, "half": half, "brief": RewardFunction(lambda state: -state.response_ids.size, shaping=True)}
    group = await Whole(RewardSet(functions, {"length": 1.0, "half": 2.0, "brief": 0.25})).generate_group(group_of())
    assert group.status is Status.COMPLETED
    assert [state.score for state in group.rollouts] == [2.0, 3.0, 4.0]
    assert [state.reward for state in group.rollouts] == [1.75, 2.5, 3.25]
    assert [state.reward_parts for state in group.rollouts] == [{"length": n, "half": 0.5, "brief": -n} for n in (1.0, 2.0, 3.0)]
    assert all(set(state.metrics) == {f"reward_seconds/{name}" for name in functions} for state in group.rollouts)


async def test_a_recipe_asks_its_functions_only_and_others_go_by_the_default_weights() -> None:
    asked = Counter[str]()

    def counting(name: str) -> Callable[[RolloutState], float]:
        def reward(state: RolloutState) -> float:
            asked[name] += 1
            return 1.0

        return reward

    functions = {name: counting(name) for name in "abc"}
    reward = RewardSet(functions, {"c": 5.0}, recipes={"math": {"a": 1.0, "b": 0.0}, "code": {"b": 3.0}})
    scores = [(await judged(reward, data_source=source)).score for source in ("math", "code", "chat")]
    scores.append((await judged(reward)).score)
    assert scores == [1.0, 3.0, 5.0, 5.0]
    assert asked == {"a": 1, "b": 2, "c": 2}, "a weight of 0 asks, and does not count"


async def test_a_function_of_the_row_may_name_the_source() -> None:
    reward = RewardSet(
        {"a": half, "b": length}, recipes={"yes": {"a": 1.0}, "no": {"b": 1.0}}, source=lambda row: "yes" if row["easy"] else "no"
    )
    assert [(await judged(reward, easy=easy)).score for easy in (True, False)] == [0.5, 1.0]
    assert "source= raised KeyError: 'easy'" in str((await judged(reward)).error)


async def test_an_unknown_source_without_default_fails_and_says_which_there_are() -> None:
    reward = RewardSet({"a": half}, recipes={"math": {"a": 1.0}})
    state = await judged(reward, data_source="maths")
    assert (state.status, state.score) == (Status.FAILED, None)
    assert str(state.error).startswith("no recipe is for rows with data_source = 'maths'; those are for ['math']. Add one, or weights=")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (({},), "must map one name or more"),
        (({"a": half}, {"b": 1.0}), r"weights for \['b'\]; the functions are \['a'\]"),
        (({"a": half}, {"a": math.nan}), "the weight of 'a' for 'any source'=nan must be a finite number"),
        (({"a": half}, {"a": 0.0}), "no function that is not shaping has a weight other than 0"),
        (({"a": RewardFunction(half, shaping=True)},), "no function that is not shaping"),
        (({"a": half, "b": half}, {"a": 1.0}), r"functions \['b'\] have a weight for no source"),
        (({"a": half}, ["a"]), "must map names of functions to weights"),
        (({"": half},), "their names must be text"),
    ],
)
def test_what_can_never_judge_is_refused_at_once(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardSet(*arguments)


def test_recipes_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ValueError, match=r"recipes=\['math'\] must map sources to weights"):
        RewardSet({"a": half}, recipes=["math"])  # type: ignore[arg-type]


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="is no function of a rollout"):
        RewardSet({"a": 1.0})  # type: ignore[dict-item]  # what is to be refused


NAMES = st.sampled_from("abcdef")
WEIGHTS = st.dictionaries(NAMES, st.floats(0.01, 100), min_size=1)
NUMBERS = st.floats(-1e6, 1e6)


@given(WEIGHTS, st.data())
def test_the_sum_is_of_weights_times_parts_in_any_order(weights: dict[str, float], data: st.DataObject) -> None:
    signed = {name: weight * data.draw(st.sampled_from([1, -1])) for name, weight in weights.items()}
    parts = {name: data.draw(NUMBERS) for name in weights}
    expected = sum(signed[name] * parts[name] for name in weights)
    shuffled = data.draw(st.permutations(list(weights)))
    for order in (list(weights), shuffled):
        assert combined({name: signed[name] for name in order}, parts | {"unweighed": 9.0}) == pytest.approx(expected, abs=1e-6)


@given(WEIGHTS, st.data())
def test_weights_of_skipped_functions_go_to_the_others_in_proportion(weights: dict[str, float], data: st.DataObject) -> None:
    left = data.draw(st.sets(st.sampled_from(sorted(weights)), min_size=1))
    skipped = set(weights) - left
    parts = {name: data.draw(NUMBERS) for name in left}
    share = sum(weights[name] for name in left) / sum(weights.values())
    assert combined(weights, parts, skipped) == pytest.approx(sum(weights[name] * parts[name] for name in left) / share, rel=1e-9, abs=1e-9)
    constant = data.draw(NUMBERS)
    assert combined(weights, dict.fromkeys(left, constant), skipped) == pytest.approx(constant * sum(weights.values()), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("parts", "skipped"), [({}, ["a", "b"]), ({}, []), ({"b": 1.0}, ["a"]), ({"b": 1.0}, []), ({"a": 1e308}, [])])
def test_no_part_that_counts_is_an_error_and_never_0(parts: dict[str, float], skipped: list[str]) -> None:
    with pytest.raises(RewardError, match=r"no function gave a part that counts|keep them within what a float holds"):
        combined({"a": 100.0, "b": 0.0}, parts, skipped)


# -- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_error", "reward"), [("skip", 1.0), (0.25, 0.5 + 0.25), (0, 0.5)])
async def test_a_failing_function_is_skipped_or_a_number_is_taken(on_error: Any, reward: float) -> None:
    state = await judged(RewardSet({"half": half, "broken": RewardFunction(broken, on_error=on_error)}))
    assert (state.status, state.score, state.reward) == (Status.COMPLETED, reward, reward)
    mark = "skipped" if on_error == "skip" else "filled"
    assert state.metrics[f"reward_{mark}/broken"] == 1.0
    assert state.reward_parts == {"half": 0.5} | ({} if on_error == "skip" else {"broken": float(on_error)})


async def test_failing_is_the_default_and_only_what_failed_is_asked_again() -> None:
    asked = Counter[str]()

    async def steady(state: RolloutState) -> float:
        asked["steady"] += 1
        return 1.0

    async def at_second(state: RolloutState) -> float:
        asked["at second"] += 1
        if asked["at second"] == 1:
            raise ConnectionResetError("by peer")
        return 2.0

    state = await judged(RewardSet({"steady": steady, "at second": at_second}))
    assert (state.status, state.score, state.attempts, state.error) == (Status.COMPLETED, 3.0, 1, None)
    assert asked == {"steady": 1, "at second": 2}
    state = await judged(RewardSet({"half": half, "broken": broken, "nan": lambda state: math.nan}))
    assert (state.status, state.score, state.reward, state.reward_parts) == (Status.FAILED, None, None, {"half": 0.5})
    assert state.error == "reward broken raised KeyError: 'answer'; reward nan gave nan; it must give a finite number"


async def test_retries_pause_longer_each_time_and_are_counted() -> None:
    times: list[float] = []

    async def main() -> RewardSet:
        async def always(state: RolloutState) -> float:
            times.append(asyncio.get_running_loop().time())
            raise ConnectionResetError

        reward = RewardSet({"half": half, "always": RewardFunction(always, retries=3, back_off=2.0, on_error="skip")})
        assert (await reward(state_of())).score == 1.0
        return reward

    statistics = (await asyncio.to_thread(virtual_time.run, main())).statistics
    assert times == [0.0, 2.0, 6.0, 14.0]
    own = statistics["always", ""]
    assert (own.calls, own.failures, own.retries, own.skipped, own.timeouts, own.parts) == (4, 4, 3, 1, 0, 0)


async def test_each_function_has_its_own_deadline_and_the_loops_is_not_theirs() -> None:
    async def main() -> tuple[RewardSet, RolloutState]:
        async def slow(state: RolloutState) -> float:
            await asyncio.sleep(90)
            return 1.0

        reward = RewardSet({"slow": RewardFunction(slow, timeout=100), "too slow": RewardFunction(slow, timeout=80, on_error=0.0)})
        group = await Whole(reward, reward_timeout=1.0).generate_group(group_of(1))
        return reward, group.rollouts[0]

    reward, state = await asyncio.to_thread(virtual_time.run, main())
    assert (state.status, state.score, state.attempts) == (Status.COMPLETED, 1.0, 0)
    assert reward.statistics["too slow", ""].timeouts == 1
    assert reward.statistics["slow", ""].longest == 90.0
    assert state.metrics["reward_seconds/too slow"] == 80.0


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_no_more_calls_run_at_once_than_a_function_allows(kind: str) -> None:
    running, most, lock, both = 0, 0, threading.Lock(), threading.Barrier(2, timeout=30)

    def enter() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)

    def leave() -> None:
        nonlocal running
        with lock:
            running -= 1

    def sync(state: RolloutState) -> float:
        enter()
        both.wait()  # two are there at once, or this breaks
        leave()
        return 1.0

    async def other(state: RolloutState) -> float:
        enter()
        for _ in range(5):
            await asyncio.sleep(0)
        leave()
        return 1.0

    reward = RewardSet({"one": RewardFunction(sync if kind == "sync" else other, concurrency=2)})
    group = await Whole(reward).generate_group(group_of(3) if kind == "async" else RolloutGroup(7, [state_of(index) for index in range(2)]))
    assert (group.status, most) == (Status.COMPLETED, 2)


async def test_none_is_no_say_and_takes_no_weight_with_it() -> None:
    reward = RewardSet({"half": half, "code only": lambda state: None}, {"half": 1.0, "code only": 3.0})
    assert (await judged(reward)).score == 0.5
    assert reward.statistics["code only", ""].no_say == 1
    state = await judged(RewardSet({"none": lambda state: None}))
    assert state.status is Status.FAILED
    assert "no function gave a part that counts" in str(state.error)


async def test_a_plain_reward_may_give_score_and_reward_apart() -> None:
    group = await Whole(lambda state: Judgement(1.0, 0.75, {"checks": 3})).generate_group(group_of(1))
    state = group.rollouts[0]
    assert (state.score, state.reward, state.metrics) == (1.0, 0.75, {"checks": 3.0})
    group = await Whole(None, group_reward=lambda group: [Judgement(1.0, metrics=None)]).generate_group(group_of(1))  # type: ignore[arg-type]
    assert "raised TypeError: metrics=None must map names to numbers" in str(group.rollouts[0].error)
    group = await Whole(lambda state: Judgement(1.0, math.inf)).generate_group(group_of(1))
    assert "gave inf; it must give a finite number" in str(group.rollouts[0].error)


OUTCOMES = st.lists(st.none() | st.floats(-5, 5) | st.sampled_from(["raises", "hangs", "nan"]), min_size=1, max_size=4)


@st.composite
def scripted(draw: st.DrawFn) -> tuple[dict[str, list[Any]], dict[str, dict[str, Any]], dict[str, float]]:
    """Functions by what their calls do one after the other, the last again and again; their options; their weights."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    outcomes = {name: draw(OUTCOMES) for name in names}
    policies = st.sampled_from(["fail", "skip", 0.5])
    options = {name: {"on_error": draw(policies), "retries": draw(st.integers(0, 2)), "shaping": draw(st.booleans())} for name in names}
    options[names[0]]["shaping"] = False
    return outcomes, options, {name: draw(st.sampled_from([0.5, 1.0, -2.0])) for name in names}


@given(scripted())
def test_whatever_functions_do_the_judgement_is_that_of_the_rules(case: Any) -> None:
    outcomes, options, weights = case
    calls = Counter[str]()

    def function(name: str) -> Callable[[RolloutState], Any]:
        async def reward(state: RolloutState) -> Any:
            outcome = outcomes[name][min(calls[name], len(outcomes[name]) - 1)]
            calls[name] += 1
            if outcome == "hangs":
                await asyncio.sleep(1000)
            if outcome == "raises":
                raise LookupError
            return math.nan if outcome == "nan" else outcome

        return reward

    def by_the_rules(name: str) -> tuple[str, Any]:
        """Of one judgement: what the first call that does not fail gives, within the retries."""
        for call in range(1 + options[name]["retries"]):
            outcome = outcomes[name][min(call, len(outcomes[name]) - 1)]
            if not isinstance(outcome, str):
                return ("no say", None) if outcome is None else ("part", outcome)
        return {"fail": ("failed", None), "skip": ("skipped", None)}.get(options[name]["on_error"], ("part", 0.5))

    reward = RewardSet({name: RewardFunction(function(name), timeout=10.0, **options[name]) for name in outcomes}, weights)
    state = state_of()
    try:
        judgement = virtual_time.run(reward(state))
    except RewardError:
        judgement = None
    ends = {name: by_the_rules(name) for name in outcomes}
    parts = {name: value for name, (kind, value) in ends.items() if kind == "part"}
    assert state.reward_parts == parts

    def total(names: set[str]) -> float | None:
        present, lost = (sum(abs(weights[name]) for name in names if ends[name][0] == kind) for kind in ("part", "skipped"))
        return sum(weights[name] * parts[name] for name in names & set(parts)) * (present + lost) / present if present else None

    expected = total({name for name in outcomes if not options[name]["shaping"]}), total(set(outcomes))
    if None in expected or any(kind == "failed" for kind, _ in ends.values()):
        assert judgement is None
    else:
        assert judgement is not None
        assert (judgement.score, judgement.reward) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    statistics = [reward.statistics[name, ""] for name in outcomes]
    assert sum(own.parts + own.filled for own in statistics) == len(parts)
    assert {name: reward.statistics[name, ""].calls for name in outcomes} == dict(calls)


# -- of a group -------------------------------------------------------------------------------------------------


def ranks(group: RolloutGroup) -> list[float | None]:
    return [float(len(group.rollouts) - place) for place, _ in enumerate(group.rollouts)]


async def test_functions_of_the_group_and_of_its_rollouts_judge_together_once_all_are_whole() -> None:
    asked = Counter[str]()

    def rank(group: RolloutGroup) -> list[float | None]:
        asked["rank"] += 1
        assert all(state.finished for state in group.rollouts)
        return ranks(group)

    reward = RewardSet({"length": length, "rank": RewardFunction(rank, of_group=True)}, {"length": 10.0, "rank": 1.0})
    async with SimulatedEngine(lengths=lambda request: int(request.session_id[-1]) + 1) as engine:
        loop = SingleTurnAgentLoop(engine, reward=reward, sampling=SamplingParams(max_tokens=8))
        fresh = RolloutGroup(7, [RolloutState(7, index, prompt_ids=[1]) for index in range(3)])
        group = await loop.generate_group(fresh)
    assert [state.score for state in group.rollouts] == [13.0, 22.0, 31.0]
    assert asked == {"rank": 1}
    # One member is sampled anew: what it is worth beside its siblings, and they beside it, is asked again.
    again = group.rollouts[1]
    again.reset()
    again.append([9], logprobs=[-0.5])
    again.status, again.finish_reason = Status.RUNNING, "stop"
    reward.reset_statistics()
    await Whole(reward).generate_group(group)
    assert [state.score for state in group.rollouts] == [13.0, 12.0, 31.0]
    assert asked == {"rank": 2}
    assert reward.statistics["length", ""].calls == 1


class Slow(AgentLoop):
    """The last member is whole only when a function was asked of the first."""

    def __init__(self, asked: asyncio.Event, **options: Any) -> None:
        super().__init__(**{"back_off": 0.0, "max_attempts": 2, **options})
        self._asked = asked

    async def generate(self, state: RolloutState) -> RolloutState:
        if state.index == 2:
            await self._asked.wait()
        state.append([5] * (state.index + 1), logprobs=[-0.1] * (state.index + 1))
        state.finish_reason = "stop"
        return state


async def test_functions_of_single_rollouts_do_not_wait_for_the_siblings_and_fail_their_rollout_only() -> None:
    asked, calls = asyncio.Event(), Counter[str]()

    async def not_the_second(state: RolloutState) -> float | None:
        asked.set()
        calls[f"single {state.index}"] += 1
        if state.index == 1:
            raise LookupError("no answer")
        return None if state.index == 2 else 10.0

    def rank(group: RolloutGroup) -> list[float | None]:
        calls["group"] += 1
        return ranks(group)

    functions = {"single": not_the_second, "rank": RewardFunction(rank, of_group=True)}
    fresh = RolloutGroup(7, [RolloutState(7, index, prompt_ids=[1]) for index in range(3)])
    group = await asyncio.wait_for(Slow(asked, reward=RewardSet(functions), min_group_size=2).generate_group(fresh), 60)
    assert [state.left_out for state in group.rollouts] == [False, True, False]
    assert [state.score for state in group.rollouts] == [12.0, None, 1.0]
    assert calls == {"single 0": 1, "single 1": 2, "single 2": 1, "group": 1}, "none is asked again at the end, None and a failure included"
    assert "reward_no_say/single" in group.rollouts[2].metrics


def test_one_set_judges_in_one_event_loop_after_the_other() -> None:
    reward = RewardSet({"half": RewardFunction(half, concurrency=1)})
    for _ in range(2):
        group = asyncio.run(Whole(reward).generate_group(group_of()))
        assert [state.score for state in group.rollouts] == [0.5] * 3


async def test_a_group_function_that_fails_or_gives_too_few_fails_the_group() -> None:
    reward = RewardSet({"rank": RewardFunction(lambda group: [1.0], of_group=True)})
    group = await Whole(reward).generate_group(group_of())
    assert group.status is Status.FAILED
    assert "reward rank gave 1 scores; it must give 3" in str(group.rollouts[2].error)
    with pytest.raises(RewardError, match="cannot judge one rollout"):
        await reward(state_of())


async def test_a_sampler_scores_by_a_set() -> None:
    reward = RewardSet(
        {"length": length, "rank": RewardFunction(ranks, of_group=True)}, recipes={"math": {"length": 1.0}, "rank": {"rank": 1.0}}
    )
    async with SimulatedEngine(lengths=4) as engine:
        inputs = [{"prompt_ids": [1], "data_source": "math"}, {"prompt_ids": [2], "data_source": "rank"}, {"prompt_ids": [3]}]
        responses = await Sampler(engine).generate_and_score(inputs, reward, num_samples=2)
    assert [[one.score for one in response.sequences] for response in responses] == [[4.0, 4.0], [2.0, 1.0], [None, None]]
    assert "no recipe is for" in str(responses[2].sequences[0].error)


# -- statistics and cancellation ----------------------------------------------------------------------------------


async def test_metrics_are_by_function_and_source() -> None:
    reward = RewardSet({"length": length, "half": half}, recipes={"a/b": {"length": 1.0}, "c": {"length": 1.0, "half": 1.0}})
    for source, index in (("a/b", 0), ("a/b", 2), ("c", 1)):
        await reward(state_of(index, data_source=source))
    metrics = reward.metrics()
    assert metrics["rewards/length/a/b/mean"] == metrics["rewards/length/c/mean"] == metrics["rewards/length/mean"] == 2.0
    assert (metrics["rewards/length/a/b/std"], metrics["rewards/length/c/std"]) == (1.0, 0.0)
    assert metrics["rewards/length/std"] == pytest.approx(math.sqrt(2 / 3))
    assert (metrics["rewards/length/calls"], metrics["rewards/half/calls"]) == (3, 1)
    assert all(math.isfinite(value) for value in metrics.values())
    reward.reset_statistics()
    assert reward.metrics() == {}


@given(st.lists(NUMBERS, max_size=20), st.lists(NUMBERS, max_size=20))
def test_statistics_of_two_sources_add_up_to_those_of_both(one: list[float], other: list[float]) -> None:
    def of(parts: list[float]) -> RewardStatistics:
        statistics = RewardStatistics()
        for part in parts:
            statistics.called(part * part)
            statistics.gave(part)
        return statistics

    both, together = of(one) + of(other), of(one + other)
    assert both.metrics() == pytest.approx(together.metrics(), rel=1e-6, abs=1e-3)


async def test_cancelled_in_mid_scoring_it_leaves_no_task_and_no_call_and_what_was_given_stays() -> None:
    started, ended = asyncio.Event(), list[str]()

    async def endless(state: RolloutState) -> float:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("endless")
        raise AssertionError

    reward = RewardSet({"half": half, "endless": endless, "also": RewardFunction(endless, concurrency=1)})
    loop, group = Whole(reward), group_of(1)
    before = asyncio.all_tasks()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(loop.generate_group(group))
        await started.wait()
        await asyncio.sleep(0)  # the turn in which `half` gives its part
        running.cancel()
    assert ended == ["endless", "endless"]
    assert asyncio.all_tasks() == before
    state = group.rollouts[0]
    assert (state.status, state.score, state.reward_parts) == (Status.INTERRUPTED, None, {"half": 0.5})


async def test_interrupted_in_mid_scoring_it_goes_on_with_what_was_missing() -> None:
    asked, started = Counter[str](), asyncio.Event()

    async def slow_once(state: RolloutState) -> float:
        asked["slow"] += 1
        started.set()
        if asked["slow"] == 1:
            await asyncio.Event().wait()
        return 2.0

    async def quick(state: RolloutState) -> float:
        asked["quick"] += 1
        return 1.0

    loop, group = Whole(RewardSet({"quick": quick, "slow": slow_once})), group_of(1)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(loop.generate_group(group))
        await started.wait()
        await asyncio.sleep(0)
        await loop.interrupt([7])
        await running
    assert (group.status, group.rollouts[0].score) == (Status.INTERRUPTED, None)
    group.rollouts[0].status = Status.RUNNING
    await loop.generate_group(group)
    assert (group.status, group.rollouts[0].score) == (Status.COMPLETED, 3.0)
    assert asked == {"quick": 1, "slow": 2}
