"""Shows that importance weights, masks and log-probabilities are those that the installed TRL makes of the same numbers."""

import inspect
import itertools
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")
import torch
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from producer.experience.off_policy import OffPolicy, correct
from producer.experience.scorer import Scorer
from tests.tiny_model import VOCAB_SIZE, make_tiny_model

LENGTHS = [7, 1, 12, 4, 0]
WIDTH = max(LENGTHS)


def policies(spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of trainer and sampler, flat over the lengths."""
    draw = np.random.default_rng(int(10 * spread))
    sampler = -draw.exponential(1.0, sum(LENGTHS))
    return sampler + draw.normal(0, spread, sampler.size), sampler


def padded(flat: np.ndarray) -> torch.Tensor:
    """(rows, width) float64, with numbers that must not count where there is no token."""
    rows = np.full((len(LENGTHS), WIDTH), -77.0)
    for row, (start, end) in enumerate(itertools.pairwise(np.cumsum([0, *LENGTHS]))):
        rows[row, : end - start] = flat[start:end]
    return torch.as_tensor(rows)


def flat(rows: torch.Tensor) -> np.ndarray:
    return np.concatenate([row[:length] for row, length in zip(rows.expand(-1, WIDTH).numpy(), LENGTHS, strict=True)])


MASK = torch.as_tensor(np.arange(WIDTH)[None] < np.array(LENGTHS)[:, None])


def importance_of_trl(mode: str, low: float | None, high: float | None, trainer: np.ndarray, sampler: np.ndarray) -> np.ndarray:
    """What the lines of `GRPOTrainer` give that make the ratio; they stand in the middle of a method and are no function."""
    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    start = source.rindex("mask = completion_mask if tool_mask is None", 0, source.index("per_token_logps_diff = ("))
    end = source.index("# Compute the per-token log probabilities for the reference model", start)
    lines = source[source.rindex("\n", 0, start) + 1 : source.rindex("\n", 0, end)]
    trainer_of_trl = SimpleNamespace(
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high
    )
    names: dict[str, Any] = {
        "self": trainer_of_trl,
        "torch": torch,
        "math": math,
        "completion_mask": MASK.int(),
        "tool_mask": None,
        "old_per_token_logps": padded(trainer),
        "sampling_per_token_logps": padded(sampler),
    }
    exec(textwrap.dedent(lines), names)  # noqa: S102 - TRL's own lines
    return flat(names["vllm_importance_sampling_ratio"])


@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize(("low", "high"), [(None, 3.0), (0.5, 2.0)])
def test_ratios_are_those_of_the_grpo_trainer(spread: float, low: float | None, high: float) -> None:
    trainer, sampler = policies(spread)
    bounds = (low or 0.0, high)
    for mode, config in {
        "token_truncate": OffPolicy("token", truncate=bounds),
        "token_mask": OffPolicy("token", mask="token", keep=bounds),
        "sequence_truncate": OffPolicy("sequence", truncate=bounds),
        "sequence_mask": OffPolicy("sequence", mask="sequence", keep=bounds),
    }.items():
        ours = correct(config, LENGTHS, trainer=trainer, sampler=sampler).weights
        np.testing.assert_allclose(ours, importance_of_trl(mode, low, high, trainer, sampler), rtol=1e-12)


def test_negative_tokens_are_masked_as_by_the_grpo_trainer() -> None:
    trainer, sampler = policies(1.0)
    for threshold in (0.05, 0.3, 2.0):
        advantages = torch.tensor([1.0, -1.0, -1.0, -0.5, -1.0], dtype=torch.float64)[:, None]
        theirs = GRPOTrainer.get_off_policy_mask(advantages, padded(trainer), padded(sampler), MASK.int(), threshold)
        ours = correct(
            OffPolicy(negative_kl=threshold), LENGTHS, trainer=trainer, sampler=sampler, advantages=flat(advantages.expand(-1, WIDTH))
        )
        np.testing.assert_array_equal(ours.weights, flat(theirs))


def test_log_probabilities_and_entropies_are_those_of_trls_fused_head(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path)).eval()
    draw = np.random.default_rng(0)
    sequences = [draw.integers(0, VOCAB_SIZE, length) for length in (5, 19, 2, 11)]
    found = Scorer(model, temperature=0.7, token_budget=30).score(sequences, entropy=True)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    for one, ids in zip(found, sequences, strict=True):
        with torch.no_grad():
            theirs = model(torch.as_tensor(ids)[None], labels=torch.as_tensor(ids)[None], fused_lm_head=True)
        np.testing.assert_allclose(one.logprobs, theirs.log_probs[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(one.entropy, theirs.entropy[0].numpy(), atol=1e-5)
