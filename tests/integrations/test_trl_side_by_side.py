"""Shows that our advantages, divergences, loss reductions and importance weights are those of the installed TRL's own code."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.async_grpo import async_rollout_worker as trl_async
from trl.trainer.utils import nanstd

from producer.experience import kl_estimate, preset
from producer.experience.advantages import grpo
from producer.experience.estimate import Scored, estimate
from producer.experience.losses import reduce_loss
from producer.experience.off_policy import OffPolicy, correct
from producer.integrations.trl import CorrectedGRPOTrainer
from producer.integrations.trl.corrected import importance_weights, logprobs_of
from tests.tiny_model import make_tiny_model

SIZE, GROUPS = 4, 3
NAN = math.nan
REWARDS = [[0.0, 1, 0, 1, 1, 0, 0, 0, 0.5, 0.5, 0.5, 0.5], [0.25, NAN, 1, 1, 3, 2, 1, NAN, -1, 0, 1, 2]]
LENGTHS = [3, 6, 4, 5, 6, 3, 4, 4, 5, 6, 3, 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def completions(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """What a rollout_func gives: fixed tokens, each row another first token, and log-probabilities that are somebody else's."""
    draw = np.random.default_rng(5)
    ids = [[10 + at, *draw.integers(2, 500, n - 1).tolist()] for at, n in enumerate(LENGTHS)]
    return {
        "prompt_ids": [[3, 4, 5 + at // SIZE] for at in range(len(prompts))],
        "completion_ids": ids,
        "logprobs": [draw.normal(-6, 0.6, len(one)).tolist() for one in ids],
    }


def column(number: int) -> Any:
    """A reward function that gives one of `REWARDS`; None where it has none."""

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [None if math.isnan(value) else value for value in (REWARDS[number][ids[0] - 10] for ids in completion_ids)]

    reward.__name__ = f"column{number}"
    return reward


def trainer_of(model: Path, out: Path, *, kind: Any = GRPOTrainer, rewards: tuple[int, ...] = (0,), **changes: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": SIZE * GROUPS,
        "num_generations": SIZE,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "shuffle_dataset": False,
    }
    config = RLOOConfig if kind is RLOOTrainer else GRPOConfig
    dataset = Dataset.from_list([{"prompt": f"{at}?"} for at in range(GROUPS)])
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    functions = [column(number) for number in rewards]
    own = {} if kind is RLOOTrainer else {"rollout_func": completions}
    return kind(str(model), functions, config(**(given | changes)), dataset, processing_class=tokenizer, **own)


def batch_of(trainer: Any) -> dict[str, Any]:
    """A generation, scored by TRL, in the order in which it was given: it is shuffled."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs([{"prompt": f"{at // SIZE}?"} for at in range(SIZE * GROUPS)])
    order = inputs["completion_ids"][:, 0].argsort()
    return {
        name: value[order] if isinstance(value, torch.Tensor) and value.dim() and len(value) == len(order) else value
        for name, value in inputs.items()
    }


def ours(name: str, estimator: str, rewards: np.ndarray, **changes: Any) -> np.ndarray:
    ids = np.arange(len(rewards)) // SIZE
    parts = {"parts": rewards, "part_weights": np.ones(rewards.shape[1])} if rewards.ndim == 2 else {}
    known = np.nansum(rewards, 1) if rewards.ndim == 2 else rewards
    config = preset(name, estimator, **changes)  # type: ignore[arg-type]
    return estimate(config, Scored(known, ids, np.ones(len(ids), np.int64), **parts)).advantages


@pytest.mark.parametrize("rewards", [0, 1])
@pytest.mark.parametrize(
    ("options", "estimator", "changes"),
    [
        ({"scale_rewards": "group"}, "grpo", {}),
        ({"scale_rewards": "batch"}, "grpo", {"scale": "batch"}),
        ({"scale_rewards": "none"}, "dr_grpo", {}),
    ],
)
def test_advantages_of_grpo(
    model: Path, tmp_path: Path, rewards: int, options: dict[str, Any], estimator: str, changes: dict[str, Any]
) -> None:
    theirs = batch_of(trainer_of(model, tmp_path, rewards=(rewards,), **options))["advantages"]
    np.testing.assert_allclose(ours("trl", estimator, np.array(REWARDS[rewards]), **changes), theirs, atol=2e-6)


def test_advantages_of_several_rewards_normalised_apart(model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, rewards=(0, 1), multi_objective_aggregation="normalize_then_sum")
    theirs = batch_of(trainer)["advantages"]
    np.testing.assert_allclose(ours("trl", "gdpo", np.array(REWARDS).T), theirs, atol=2e-5)


def test_advantages_of_rloo(model: Path, tmp_path: Path) -> None:
    values = iter(REWARDS[0])
    trainer = trainer_of(model, tmp_path, kind=RLOOTrainer, beta=0.0)
    given: dict[tuple[int, ...], float] = {}

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [given.setdefault(tuple(ids), next(values)) for ids in completion_ids]

    trainer.reward_funcs = [reward]
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": f"{at // SIZE}?"} for at in range(SIZE * GROUPS)])
    found = {
        tuple(ids[mask.bool()].tolist()): float(advantage)
        for ids, mask, advantage in zip(inputs["completion_ids"], inputs["completion_mask"], inputs["advantages"], strict=True)
    }
    assert len(found) == len(given) == SIZE * GROUPS
    np.testing.assert_allclose(ours("trl", "rloo", np.array(list(given.values()))), [found[ids] for ids in given], atol=1e-6)


@pytest.mark.parametrize("rewards", [0, 1])
def test_advantages_of_the_asynchronous_trainer(rewards: int) -> None:
    for at in range(0, len(REWARDS[rewards]), SIZE):
        values = REWARDS[rewards][at : at + SIZE]

        def reward(values: list[float] = values, **columns: Any) -> list[float | None]:
            return [None if math.isnan(value) else value for value in values]

        empty: list[list[Any]] = [[] for _ in values]
        sequences = [[trl_async.TrainingSequence([1, 2], [0, 1], [0.0, -1.0], "one")] for _ in values]
        group = trl_async.RolloutGroup(empty, {}, empty, empty, sequences, [0] * 4, [0] * 4, 0, 1, [None] * 4, [None] * 4)
        stand_in = SimpleNamespace(
            reward_funcs=[reward], reward_func_names=["reward"], _env_reward_types=[], _provides_rollout_reward=False
        )
        loop = asyncio.new_event_loop()
        samples = loop.run_until_complete(trl_async._AsyncRolloutLoop._score_group(stand_in, group))
        loop.close()
        np.testing.assert_allclose(ours("trl_async", "grpo", np.array(values)), [one.advantage for one in samples], atol=1e-6)


def test_deviations_with_gaps() -> None:
    values = np.array(REWARDS[1][:4])
    expected = grpo(values, [0] * 4, eps=0.0) * nanstd(torch.tensor(values)).item()
    np.testing.assert_allclose(np.nan_to_num(values - np.nanmean(values)), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("loss_type", "reduction", "max_length"),
    [("grpo", "seq-mean-token-mean", None), ("bnpo", "token-mean", None), ("dapo", "token-mean", None), ("dr_grpo", "dr_grpo", 8)],
)
def test_losses_with_their_divergence_and_gradient(
    model: Path, tmp_path: Path, loss_type: str, reduction: Any, max_length: int | None
) -> None:
    trainer = trainer_of(model, tmp_path, loss_type=loss_type, beta=0.3, epsilon=0.05)
    inputs = batch_of(trainer)
    generator = torch.Generator().manual_seed(3)
    own = logprobs_of(trainer.model, inputs, 1.0)
    inputs["old_per_token_logps"] = own + 0.1 * torch.randn(own.shape, generator=generator)
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    gradient = trainer.model.lm_head.weight.grad.clone()

    trainer.model.zero_grad()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    n = inputs["completion_ids"].size(1)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -n - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
    ratio, advantages = (logprobs - inputs["old_per_token_logps"]).exp(), inputs["advantages"][:, None]
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages)
    loss = loss + 0.3 * kl_estimate(logprobs, inputs["ref_per_token_logps"], "k3")
    mine = reduce_loss(loss, inputs["completion_mask"], reduction, max_length=max_length)
    mine.backward()
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(trainer.model.lm_head.weight.grad, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights_and_the_loss_that_they_weigh(model: Path, tmp_path: Path, mode: str) -> None:
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.5, "vllm_importance_sampling_clip_min": 0.6}
    trainer = trainer_of(model, tmp_path, kind=CorrectedGRPOTrainer, loss_type="grpo", vllm_importance_sampling_correction=True, **options)
    # As with a vLLM of its own that has these weights: then TRL computes the ratio itself.
    trainer.use_vllm, trainer._last_loaded_step = True, 0
    inputs = batch_of(trainer)
    weights = importance_weights(
        inputs["old_per_token_logps"], inputs["sampling_per_token_logps"], inputs["completion_mask"], mode=mode, clip_min=0.6, clip_max=1.5
    )
    torch.testing.assert_close(weights, inputs["importance_sampling_ratio"])
    level, beyond = mode.split("_")
    mask = inputs["completion_mask"].bool()
    config = OffPolicy(weight=level, **({"truncate": (0.6, 1.5)} if beyond == "truncate" else {"mask": level, "keep": (0.6, 1.5)}))  # type: ignore[arg-type]
    flat = {"trainer": inputs["old_per_token_logps"][mask].numpy(), "sampler": inputs["sampling_per_token_logps"][mask].numpy()}
    np.testing.assert_allclose(correct(config, mask.sum(1), **flat).weights, weights.expand(mask.shape)[mask], rtol=1e-4)
    assert 0 < ((weights == 0) | (weights == 0.6) | (weights == 1.5)).float().mean() <= 1
    theirs = trainer.compute_loss(trainer.model, inputs)
    trainer.use_vllm = False
    del inputs["importance_sampling_ratio"]
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), theirs)
    del inputs["old_per_token_logps"]  # as where the weights have not changed since the generation
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), theirs, atol=1e-5, rtol=1e-4)


def test_sequences_of_negative_advantage_that_drifted_are_masked() -> None:
    draw = np.random.default_rng(2)
    trainer, sampler = draw.normal(-2, 0.5, (8, 5)), draw.normal(-2, 0.5, (8, 5))
    advantages, mask = draw.normal(size=(8, 1)), np.arange(5) < draw.integers(1, 6, (8, 1))
    tensors = [torch.tensor(array) for array in (advantages, trainer, sampler, mask.astype(np.int64))]
    theirs = GRPOTrainer.get_off_policy_mask(*tensors, 0.1).expand(8, 5)[tensors[3].bool()]
    flat = {"trainer": trainer[mask], "sampler": sampler[mask], "advantages": np.broadcast_to(advantages, mask.shape)[mask]}
    kept = correct(OffPolicy(negative_kl=0.1), mask.sum(1), **flat).kept
    np.testing.assert_array_equal(kept, theirs.bool())
    assert 0 < kept.mean() < 1
