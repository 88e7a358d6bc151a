"""Shows that options which make no sense together are refused where they are put together, with the reason."""

import re
from typing import Any

import pytest

from producer.experience import KL, AdvantageConfig
from producer.experience.config import ALIASES, ESTIMATORS

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"estimator": "ppo"}, "unknown advantage 'ppo'; known are"),
    ({"estimator": "rloo", "scale": "group"}, "would get 1e6"),  # O33
    ({"estimator": "dr_grpo", "scale": "batch"}, "it is GRPO without the deviation"),
    ({"estimator": "dr_grpo", "whiten": "full"}, "leaves out the deviation on purpose"),
    ({"whiten": "scale"}, "divided by a deviation already"),
    ({"scale": "batch", "whiten": "full"}, "divided by a deviation already"),
    ({"estimator": "gdpo", "whiten": "full"}, "scaled over the batch already"),
    ({"estimator": "pass_at_k", "whiten": "full"}, "deviation of the best of k already"),
    ({"estimator": "rloo", "gamma": 0.9}, "a rollout has one advantage"),
    ({"estimator": "rloo", "lam": 0.9}, "no such option"),
    ({"estimator": "reinforce", "lam": 0.9}, "only 'gae' has values"),
    ({"estimator": "grpo", "k": 2}, "no such option"),
    ({"estimator": lambda rewards, ids: rewards, "eps": 1e-3}, "no such option"),
    ({"estimator": "gdpo", "normalise": True}, "parts of a reward"),
    ({"estimator": "gdpo", "kl": KL(0.1)}, "parts of a reward"),
    ({"estimator": "gdpo", "part_weights": {}}, "leaves no part"),
    ({"normalise": True}, "changes nothing"),
    ({"estimator": "pass_at_k", "normalise": True}, "changes nothing"),
    ({"estimator": "gae", "gamma": 1.5}, "gamma=1.5 must be 0 to 1"),
    ({"estimator": "pass_at_k", "k": 0}, "k=0 must be"),
    ({"clip": (1.0, -1.0)}, "clip=(1.0, -1.0); give (low, high)"),
    ({"reward_clip": (0.0, 0.0)}, "reward_clip=(0.0, 0.0)"),
    ({"clip": (0.5, 1.0)}, "give bounds around 0"),
    ({"clip": 1.0}, "clip=1.0; give (low, high)"),
    ({"estimator": "gdpo", "part_weights": {"a": 0.0}}, "leaves no part"),
    ({"estimator": "gdpo", "part_weights": {"a": float("nan")}}, "the weight of 'a'=nan must be a finite number"),
    ({"shape": lambda rewards, lengths, truncated: rewards}, "shape=(step,)"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        AdvantageConfig(**options)


def test_a_divergence_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="k1 as a loss term"):
        KL(0.1, "k1", "loss")


@pytest.mark.parametrize("name", [*ESTIMATORS, *ALIASES])
def test_every_name_stands_by_itself(name: str) -> None:
    config = AdvantageConfig(name)
    assert config.estimator == ALIASES.get(name, name)
    assert AdvantageConfig(name, whiten=None) == config
