"""Shows that every constructor of experiences, rewards and data pipes refuses nonsense by name, with its value, before it does harm."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_loop.rewards import Judgement, RewardFunction, RewardSet, trl_reward
from agent_loop.rewards.batching import MicroBatcher
from agent_loop.rewards.processes import ProcessReward
from agent_loop.rewards.wire import Wire, openrlhf_wire, vllm_wire
from buffer import ReplayBuffer
from producer.dataset import row_source
from producer.experience import (
    KL,
    AdaptiveKL,
    AdvantageConfig,
    Attached,
    EngineScorer,
    ExperienceMaker,
    OffPolicy,
    Overlong,
    RunningMoments,
    StopProperly,
    make_experience,
    preset,
)
from producer.experience.balancing import Cost, balance
from producer.experience.losses import Totals, token_weights
from tests.experience.test_maker import two_groups

# What is none of each kind. Numbers as text, NaN and True are what configurations read from files hold by mistake.
NO_NUMBER = ["0.1", math.nan, math.inf, True, [1.0], np.array([1.0, 2.0]), int, 10**400]
NO_SHARE = [*NO_NUMBER, -0.1, 1.1]
NOT_POSITIVE = [*NO_NUMBER, 0, -1]
NEGATIVE = [*NO_NUMBER, -1]
NO_WHOLE = ["1", math.nan, math.inf, True, 1.5, [1], np.array([1, 2]), int]
NO_INDEX = [*NO_WHOLE, -1]
NO_COUNT = [*NO_INDEX, 0]
NO_FLAG = ["False", "no", 1, 0, None, [], math.nan]
NO_NAME = [1, True, b"grpo", ["grpo"], {}, np.array(["a"]), "nothing"]
NO_TEXT = [1, True, b"a", ["a"], "", None]
NO_FUNCTION = ["length", 1, True, [print], {}]
NO_MAPPING = ["ab", 1, True, [1], ("a", 1), print]
NO_BOUNDS = [1.0, "ab", (1.0,), ("0", "1"), (math.nan, 1.0), [0.0, 1.0, 2.0], {}]
NOT_OF_THE_CLASS = ["x", 0, True, {}, [], print]


def length(state: Any) -> float:
    return 1.0


Case = tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]
"""What is called, what is right, and what is wrong by argument."""

CASES: dict[str, Case] = {
    "KL": (KL, {"coef": 0.1}, {"coef": NOT_POSITIVE, "estimator": NO_NAME, "where": NO_NAME}),
    "AdaptiveKL": (AdaptiveKL, {"coef": 1, "target": 1}, dict.fromkeys(["coef", "target", "horizon"], NOT_POSITIVE)),
    "AdaptiveKL.updated": (AdaptiveKL(1, 1).updated, {"kl": 0.0, "sequences": 1}, {"kl": NO_NUMBER, "sequences": NO_INDEX}),
    "AdvantageConfig": (
        AdvantageConfig,
        {},
        {"estimator": [*NO_NAME, None], "scale": NO_NAME, "ddof": [*NO_INDEX, 2], "eps": NEGATIVE, "whiten": NO_NAME}
        | {
            "whiten_ddof": [*NO_INDEX, 2],
            "whiten_eps": NEGATIVE,
            "normalise": NO_FLAG,
            "kl": NOT_OF_THE_CLASS,
            "shape": [length, "x", (1,)],
        }
        | {"reward_clip": NO_BOUNDS, "clip": NO_BOUNDS},
    ),
    "gae": (AdvantageConfig, {"estimator": "gae"}, {"gamma": NO_SHARE, "lam": NO_SHARE}),
    "pass_at_k": (AdvantageConfig, {"estimator": "pass_at_k"}, {"k": [*NO_COUNT, 10**400]}),
    "gdpo": (AdvantageConfig, {"estimator": "gdpo"}, {"part_weights": [*NO_MAPPING, {}, {"a": "1"}, {"a": math.nan}]}),
    "preset": (preset, {"name": "trl"}, {"name": NO_NAME, "estimator": NO_NAME}),
    "OffPolicy": (
        OffPolicy,
        {"weight": "token", "truncate": (0, 2), "mask": "token", "keep": (0, 2)},
        {"weight": NO_NAME, "mask": NO_NAME, "truncate": NO_BOUNDS, "keep": NO_BOUNDS, "negative_kl": NOT_POSITIVE}
        | {"max_staleness": NO_INDEX, "drop": NO_FLAG, "sampling": NOT_OF_THE_CLASS},
    ),
    "Overlong": (
        Overlong,
        {"limit": 10, "buffer": 2},
        {"limit": NO_COUNT, "buffer": [*NO_COUNT, 11], "factor": NOT_POSITIVE, "capped": NO_FLAG},
    ),
    "StopProperly": (StopProperly, {}, {"coef": [*NO_NUMBER, 1.5]}),
    "RunningMoments": (RunningMoments, {}, {"count": NO_INDEX, "mean": NO_NUMBER, "squares": NEGATIVE}),
    "RunningMoments.from_json": (RunningMoments.from_json, {}, {"text": [1, None, "nothing", "[]"]}),
    "Attached": (
        Attached,
        {},
        dict.fromkeys(["reference", "values", "baselines", "trainer"], NO_MAPPING) | {"version": NO_WHOLE, "temperature": NEGATIVE},
    ),
    "Totals": (Totals, {"tokens": 2, "sequences": 1}, {"tokens": NO_INDEX, "sequences": [*NO_INDEX, 3]}),
    "token_weights": (token_weights, {"mask": [1], "sequence": [0]}, {"reduction": [*NO_NAME, None], "max_length": NO_COUNT}),
    "Cost": (Cost, {}, {"linear": NEGATIVE, "quadratic": NEGATIVE}),
    "Cost.transformer": (Cost.transformer, {}, {"hidden_size": NO_COUNT}),
    "balance": (balance, {"lengths": [1, 2, 3]}, dict.fromkeys(["ranks", "token_budget", "micro_batches"], NO_COUNT)),
    "make_experience": (
        make_experience,
        {"groups": two_groups()},
        {"advantage": [*NO_NAME, None], "attached": NOT_OF_THE_CLASS, "off_policy": [*NO_NAME, {}], "running": NOT_OF_THE_CLASS}
        | {"token_budget": NO_COUNT, "pad_id": NO_INDEX, "groups": [two_groups()[0], "ab", None, 7, [1], [[]], {"a": 1}]},
    ),
    "ExperienceMaker": (
        ExperienceMaker,
        {},
        {"advantage": [*NO_NAME, None], "adaptive_kl": NOT_OF_THE_CLASS, "off_policy": NO_NAME, "attach": NO_FUNCTION, "name": NO_TEXT}
        | {"token_budget": NO_COUNT, "pad_id": NO_INDEX, "source": NOT_OF_THE_CLASS, "reward": [length], "group_reward": [length]},
    ),
    "ExperienceMaker.load_state_dict": (ExperienceMaker().load_state_dict, {}, {"state": [*NO_MAPPING, {}, None]}),
    "EngineScorer": (EngineScorer, {}, {"engine": NOT_OF_THE_CLASS, "reference": NOT_OF_THE_CLASS, "max_in_flight": NO_COUNT}),
    "RewardFunction": (
        RewardFunction,
        {"function": length},
        {"function": [*NO_FUNCTION, int], "of_group": NO_FLAG, "shaping": NO_FLAG, "timeout": NOT_POSITIVE, "concurrency": NO_COUNT}
        | {"on_error": ["nothing", *NO_NUMBER], "retries": NO_INDEX, "back_off": NEGATIVE},
    ),
    "RewardSet": (
        RewardSet,
        {"functions": {"length": length}},
        {"functions": [*NO_MAPPING, {}, None, {1: length}, {"": length}], "weights": [*NO_MAPPING, {"other": 1}, {"length": "1"}]}
        | {"recipes": NO_MAPPING, "source": [1, True, [], None]},
    ),
    "Judgement": (Judgement, {"score": 1.0}, {"metrics": [*NO_MAPPING, None]}),
    "MicroBatcher": (MicroBatcher, {"work": length, "most": 1, "at_once": 1}, {"window": NEGATIVE}),
    "ProcessReward": (
        ProcessReward,
        {"function": "module:name"},
        {"function": [length, "module", 1, None], "workers": NO_COUNT, "timeout": NOT_POSITIVE, "start_timeout": NOT_POSITIVE}
        | {"memory_mb": NO_COUNT, "max_checks": NO_COUNT, "fields": NO_FUNCTION, "path": ["src", 1, [1]], "environment": NO_MAPPING},
    ),
    "trl_reward": (trl_reward, {"function": length}, {"function": [*NO_FUNCTION, None], "log_extra": NO_FUNCTION}),
    "Wire": (Wire, {"encode": length, "decode": length}, {"encode": NO_FUNCTION, "decode": NO_FUNCTION}),
    "openrlhf_wire": (openrlhf_wire, {}, {"label": NO_TEXT, "render": NO_FUNCTION}),
    "vllm_wire": (vllm_wire, {"model": "a"}, {"model": NO_TEXT, "label": NO_INDEX, "render": NO_FUNCTION, "options": NO_MAPPING}),
    "row_source": (row_source, {"dataset": [1], "shuffle": True, "seed": 0}, {"shuffle": NO_FLAG, "seed": NO_INDEX}),
}


def check_refused(make: Callable[..., Any], good: dict[str, Any], refused: dict[str, list[Any]]) -> None:
    for name, values in refused.items():
        for value in values:
            with pytest.raises((ValueError, TypeError)) as caught:
                make(**good | {name: value})
            assert re.search(NAMES.get(name, name), str(caught.value)), f"{name}={value!r}: {caught.value!r}"


NAMES = {"functions": "function", "weights": "weight", "part_weights": "weight", "text": "state of running moments"} | dict.fromkeys(
    ["advantage", "estimator"], "advantage|estimator"
)
"""What messages call an argument by, where not by its name."""


@pytest.mark.parametrize("case", CASES)
def test_nonsense_is_refused_by_name(case: str) -> None:
    check_refused(*CASES[case])


def test_nonsense_given_to_what_needs_torch_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from agent_loop.rewards.classifier import ClassifierReward
    from producer.data import BufferDataset, in_background
    from producer.experience.scorer import Scorer

    numbers = {"temperature": NOT_POSITIVE, "token_budget": NO_COUNT, "logit_bytes": NO_COUNT, "packed": NO_FLAG, "autocast": NO_NAME}
    no_model = ["gpt2", 1, print, {}]
    check_refused(Scorer, {}, numbers | {"model": no_model, "reference": no_model, "critic": no_model})
    check_refused(
        ClassifierReward,
        {"model": "gpt2"},
        {"model": [1, None, {}], "label": [-1, 1.5, None], "device": NO_TEXT, "dtype": NO_NAME, "batch": NO_COUNT, "window": NEGATIVE}
        | {"max_length": NO_COUNT, "render": NO_FUNCTION},
    )
    buffer = ReplayBuffer.open(f"sqlite:///{tmp_path}/run.db")
    check_refused(
        BufferDataset,
        {"source": buffer, "batch_size": 1, "task_name": "math"},
        {"source": NOT_OF_THE_CLASS, "batch_size": NO_COUNT, "task_name": NO_TEXT, "make": NO_FUNCTION, "prefetch": NO_INDEX}
        | {"last_step": [*NO_WHOLE, -1], "wait": NO_FLAG, "tensors": NO_FLAG, "reduction": NO_NAME, "max_length": NO_COUNT},
    )
    with pytest.raises(ValueError, match="source='production' is no function"), in_background("production"):  # type: ignore[arg-type]
        pass


def test_nonsense_given_to_a_reward_over_http_is_refused_by_name() -> None:
    pytest.importorskip("httpx")
    from agent_loop.rewards.remote import HTTPReward

    check_refused(
        HTTPReward,
        {"url": "http://localhost/score"},
        {"url": [1, None, "localhost", "ftp://localhost"], "wire": NOT_OF_THE_CLASS, "headers": NO_MAPPING, "client": NO_FUNCTION}
        | dict.fromkeys(["batch", "connections", "attempts", "max_answer"], NO_COUNT)
        | dict.fromkeys(["timeout", "back_off", "longest_back_off"], NOT_POSITIVE)
        | {"window": NEGATIVE},
    )
