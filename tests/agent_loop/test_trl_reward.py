"""Reward functions written for TRL's trainers judge unchanged: called by keyword as there, in both formats, sync and async."""

import asyncio
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_loop import RewardFunction, RewardSet, trl_reward
from agent_loop.errors import RewardError
from buffer import RolloutGroup, RolloutState, Status
from producer.simulate import virtual_time
from tests.agent_loop.judged import Whole, rollout

CHAT = [{"role": "user", "content": "2 + 2?"}]


def group_of(texts: list[str], **row: Any) -> RolloutGroup:
    return RolloutGroup(7, [rollout(index, text, **row) for index, text in enumerate(texts)])


# As in TRL's own documentation


def by_tokens(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def by_characters(completions: Any, **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def by_truth(completions: Any, ground_truth: Any, log_extra: Any = None, log_metric: Any = None, **kwargs: Any) -> list[float]:
    extracted = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    found = [match.group(1) if match else None for match in extracted]
    rewards = [1.0 if one == truth else 0.0 for one, truth in zip(found, ground_truth, strict=True)]
    if log_extra:
        log_extra("golden_answer", list(ground_truth))
        log_extra("characters", [len(completion) for completion in completions])
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
        log_metric("odd", math.nan)
    return rewards


def by_format(completions: Any, **kwargs: Any) -> list[float]:
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think><answer>.*?</answer>$", content) else 0.0 for content in contents]


def math_only(prompts: Any, completions: Any, task: Any, **kwargs: Any) -> list[float | None]:
    return [1.0 if one == "math" else None for one in task]


async def later(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [1.0 if completion else 0.0 for completion in completions]


@pytest.mark.parametrize(
    ("function", "state", "score"),
    [
        (by_tokens, rollout(), 2.0),
        (by_characters, rollout(0, "four"), 4.0),
        (by_truth, rollout(0, r"so \boxed{4}", ground_truth="4"), 1.0),
        (by_truth, rollout(0, r"so \boxed{5}", ground_truth="4"), 0.0),
        (by_format, rollout(0, "<think>hm</think><answer>4</answer>", prompt=CHAT), 1.0),
        (later, rollout(), 1.0),
    ],
)
async def test_one_rollout_is_judged_by_lists_of_one(function: Any, state: RolloutState, score: float) -> None:
    group = RolloutGroup(7, [state])
    state.status, state.score = Status.RUNNING, None
    await Whole(reward=trl_reward(function), max_attempts=1).generate_group(group)
    assert (state.status, state.score, state.reward) == (Status.COMPLETED, score, score)


async def test_a_group_is_judged_by_one_call_with_all() -> None:
    calls: list[dict[str, Any]] = []

    def seen(**given: Any) -> list[float]:
        calls.append(given)
        return [float(len(text)) for text in given["completions"]]

    group = group_of(["a", "bb", "ccc"], ground_truth="4", task="math", completion="left out")
    await Whole(group_reward=trl_reward(seen)).generate_group(group)
    assert [state.score for state in group.rollouts] == [1.0, 2.0, 3.0]
    (given,) = calls
    assert callable(given.pop("log_extra"))
    assert callable(given.pop("log_metric"))
    assert given.pop("trainer_state").global_step == 2, "the newest weights that sampled any of them"
    assert given == {
        "prompts": ["2 + 2 ="] * 3,
        "completions": ["a", "bb", "ccc"],
        "completion_ids": [[5, 6]] * 3,
        "ground_truth": ["4"] * 3,
        "task": ["math"] * 3,
    }


async def test_in_a_chat_both_are_messages_and_turns_that_the_loop_added_are_the_completion() -> None:
    seen: list[Any] = []

    def keep(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    plain, turns = rollout(0, "four", prompt=CHAT), rollout(1, "four", prompt=CHAT)
    added = [{"role": "assistant", "content": "calc"}, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "four"}]
    assert turns.messages is not None
    turns.messages += added
    await Whole(group_reward=trl_reward(keep)).generate_group(RolloutGroup(7, [plain, turns]))
    assert seen == [(CHAT, [{"role": "assistant", "content": "four"}]), (CHAT, added)]


async def test_what_it_logs_is_kept_as_metrics_or_handed_on() -> None:
    columns: dict[str, list[Any]] = {}
    reward = trl_reward(by_truth, log_extra=columns.__setitem__)
    group = group_of([r"\boxed{4}", "five"], ground_truth="4")
    await Whole(group_reward=reward).generate_group(group)
    assert [state.metrics for state in group.rollouts] == [{"accuracy": 0.5, "characters": 9.0}, {"accuracy": 0.5, "characters": 4.0}]
    assert columns == {"golden_answer": ["4", "4"], "characters": [9, 4]}


async def test_the_trainers_state_is_handed_on() -> None:
    def by_step(completions: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
        return [float(trainer_state.global_step)] * len(completions)

    state = SimpleNamespace(global_step=5)
    assert trl_reward(by_step, trainer_state=state)(rollout()) == 5.0
    assert trl_reward(by_step, trainer_state=lambda: SimpleNamespace(global_step=6))(rollout()) == 6.0
    assert trl_reward(by_step)(rollout(3)) == 3.0


async def test_in_a_set_none_is_no_say_as_in_trl() -> None:
    functions = {"math": RewardFunction(trl_reward(math_only), of_group=True), "later": trl_reward(later), "tokens": trl_reward(by_tokens)}
    rewards = RewardSet(functions, {"math": 10.0, "later": 1.0, "tokens": 0.5})
    for task, score in (("math", 12.0), ("code", 2.0)):
        group = await Whole(reward=rewards).generate_group(group_of(["a", "b"], task=task))
        assert [state.score for state in group.rollouts] == [score, score]
    assert rewards.statistics["math", ""].no_say == 2


@given(st.lists(st.tuples(st.floats(-10, 10), st.none() | st.floats(-10, 10)), min_size=1, max_size=5))
def test_the_sum_is_that_of_trls_trainer(weights_and_parts: list[tuple[float, float | None]]) -> None:
    weights = {f"f{place}": weight or 1.0 for place, (weight, _) in enumerate(weights_and_parts)}
    gives = {f"f{place}": part for place, (_, part) in enumerate(weights_and_parts)}
    parts = np.array([np.nan if part is None else part for part in gives.values()])
    theirs = np.nan if np.isnan(parts).all() else np.nansum(parts * np.array(list(weights.values())))
    functions = {name: trl_reward(lambda completions, part=part, **kwargs: [part]) for name, part in gives.items()}
    try:
        ours = virtual_time.run(RewardSet(functions, weights)(rollout())).score
    except RewardError:
        ours = np.nan
    assert ours == pytest.approx(theirs, nan_ok=True)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda **given: [1.0, 2.0], "gave 2 scores; it must give 1 finite numbers"),
        (lambda **given: [None], "gave None; it must give a finite number"),
        (lambda **given: [math.nan], "gave nan; it must give a finite number"),
        (lambda **given: 1.0, "gave 1.0; it must give 1 finite numbers"),
        (lambda completions: [1.0], "raised TypeError"),
        (by_truth, "raised TypeError"),
        (lambda log_extra, **given: log_extra("a", [1, 2]), "raised ValueError"),
    ],
)
async def test_what_trl_would_not_take_is_an_error_of_the_rollout(function: Any, said: str) -> None:
    group = await Whole(reward=trl_reward(function), max_attempts=1).generate_group(group_of(["a"]))
    assert group.status is Status.FAILED
    assert said in str(group.rollouts[0].error)


async def test_without_text_a_function_of_texts_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="give the agent loop a tokenizer"):
        trl_reward(by_characters)(rollout(0, None))
    assert trl_reward(by_tokens)(rollout(0, None)) == 2.0
    with pytest.raises(RewardError):
        await RewardSet({"characters": trl_reward(by_characters)})(rollout(0, None))


@pytest.mark.parametrize("text", ["<think>hm</think> four", "four", "<think>a<think>b</think>"])
async def test_the_installed_trls_own_functions_give_what_trl_computes(text: str) -> None:
    rewards = pytest.importorskip("trl.rewards")
    state = rollout(0, text, prompt=CHAT)
    directly = rewards.think_format_reward(completions=[[{"role": "assistant", "content": text}]])
    group = await Whole(reward=trl_reward(rewards.think_format_reward)).generate_group(RolloutGroup(7, [state]))
    assert [group.rollouts[0].score] == directly
