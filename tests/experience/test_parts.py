"""Shows that no way to split a batch over ranks and micro-batches, packed or padded, changes a model's gradient, and what a part holds."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from buffer.rollout import RolloutGroup
from producer.experience import Experience, make_experience
from producer.experience.losses import Reduction
from producer.experience.policy_loss import policy_loss
from tests.experience.test_maker import group, rollout

REDUCTIONS: list[tuple[Reduction, int | None]] = [
    ("token-mean", None),
    ("seq-mean-token-mean", None),
    ("seq-mean-token-sum", None),
    ("dr_grpo", 16),
    ("seq-sum-norm", 16),
]


def a_batch(seed: int, groups: int = 5) -> list[RolloutGroup]:
    """Prompts and responses of many lengths, some with tokens of an environment; one rollout in five has no reward."""
    rng = np.random.default_rng(seed)

    def member(group_id: int, index: int, prompt: list[int]) -> Any:
        parts = [rng.integers(3, 60, rng.integers(1, 9)).tolist() for _ in range(rng.choice([1, 3]))]
        return rollout(group_id, index, prompt, *parts, reward=None if rng.random() < 0.2 else float(rng.integers(0, 3)))

    prompts = [rng.integers(3, 60, rng.integers(1, 12)).tolist() for _ in range(groups)]
    return [group(n, *(member(n, index, prompt) for index in range(3))) for n, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    pytest.importorskip("transformers")
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=64, max_position_embeddings=64, initializer_range=0.3, **sizes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield Qwen2ForCausalLM(config).double().eval()
    torch.set_num_threads(threads)


def gradient(model: Any, parts: list[Experience], reduction: Reduction, max_length: int | None) -> tuple[float, Any]:
    """The loss and the gradient of all parameters, added up over parts as a trainer accumulates them."""
    import torch

    model.zero_grad()
    total = 0.0
    for part in parts:
        tensors = part.to_torch()
        weights = torch.from_numpy(part.shift_weights(reduction, max_length=max_length))
        inputs = {name: tensors[name] for name in ("input_ids", "attention_mask", "position_ids") if name in tensors}
        logits = model(**inputs, use_cache=False).logits
        logprobs = torch.log_softmax(logits, -1).gather(-1, tensors["shift_labels"].clamp(min=0)[..., None])[..., 0]
        tokens = policy_loss(logprobs, logprobs.detach() + 0.1, tensors["shift_advantages"].double())
        loss = (tokens * weights).sum()
        loss.backward()
        total += loss.item()
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("reduction", "max_length"), REDUCTIONS)
def test_no_split_changes_the_gradient(model: Any, reduction: Reduction, max_length: int | None) -> None:
    for seed in range(2):
        groups, rng = a_batch(seed), np.random.default_rng(seed)
        whole = make_experience(groups, advantage="drgrpo")
        loss, expected = gradient(model, [whole], reduction, max_length)
        scale = float(expected.abs().max())
        assert scale > 0
        packed = make_experience(groups, advantage="drgrpo", token_budget=64)
        for experience in (whole, packed):
            ranks, budget = int(rng.integers(1, 5)), int(rng.integers(40, 120))
            for split in (experience.split(ranks, token_budget=budget), experience.split(ranks, micro_batches=int(rng.integers(1, 9)))):
                parts = [part for of_rank in split for part in of_rank]
                found_loss, found = gradient(model, parts, reduction, max_length)
                assert found_loss == pytest.approx(loss, rel=1e-6, abs=1e-9)
                assert float((found - expected).abs().max()) <= 1e-6 * scale


def test_a_part_holds_its_sequences_as_they_were() -> None:
    whole = make_experience(a_batch(3), pad_id=7, advantage="gae", attached=_values(a_batch(3)))
    packed = make_experience(a_batch(3), pad_id=7, token_budget=60, advantage="gae", attached=_values(a_batch(3)))
    for experience in (whole, packed):
        part = experience.part([4, 0, 2])
        assert part.rollout_ids == tuple(experience.rollout_ids[number] for number in (4, 0, 2))
        assert part.rewards.tolist() == [experience.rewards[number] for number in (4, 0, 2)]
        for name in ("input_ids", "loss_mask", "logprobs", "advantages", "versions", "values", "returns", "position_ids", "shift_labels"):
            there, here = experience.layout.unplace(getattr(experience, name)), part.layout.unplace(getattr(part, name))
            assert [one.tolist() for one in here] == [there[number].tolist() for number in (4, 0, 2)], name
            assert getattr(part, name).dtype == getattr(experience, name).dtype
        outside = part.layout.sequence < 0
        assert (part.input_ids[outside] == 7).all()
        assert (part.versions[outside] == -1).all()
        assert (part.attention_mask is None) == (experience.attention_mask is None)
        assert part.part([1]).whole == part.whole == experience.totals


def _values(groups: list[RolloutGroup]) -> Any:
    from producer.experience import Attached

    return Attached(values={one.rollout_id: np.linspace(0, 1, one.response_ids.size) for group in groups for one in group.rollouts})


def test_a_filler_is_a_token_that_nothing_is_learned_from() -> None:
    for budget in (None, 60):
        whole = make_experience(a_batch(1), token_budget=budget)
        (first, filler), (second, other) = whole.part([0, 1]).split(2, micro_batches=2)
        assert [part.rollout_ids for part in (filler, other)] == [(), ()]
        assert filler.input_ids.shape == filler.shift_labels.shape == (1, 1)
        assert not filler.loss_mask.any()
        assert filler.shift_weights().tolist() == [[0.0]]
        assert filler.totals.tokens == 0
        assert first.shift_weights().sum() + second.shift_weights().sum() < 1.0  # of the whole batch, of which these are two sequences
        assert filler.row_media(0) == ()


def test_media_go_with_their_sequences() -> None:
    groups = [group(1, *(rollout(1, index, [1, 2], [3 + index], reward=float(index)) for index in range(3)))]
    for index, shown in enumerate((["a.png", "b.png"], None, ["c.wav"])):
        groups[0].rollouts[index].media = shown
    made = make_experience(groups, token_budget=6)
    assert made.layout.rows == ((0, 1), (2,))
    assert [made.row_media(row) for row in (0, 1)] == [("a.png", "b.png"), ("c.wav",)]
    assert made.part([2, 0]).row_media(0) == ("c.wav", "a.png", "b.png")


def test_a_packed_row_as_flash_attention_takes_it() -> None:
    pytest.importorskip("torch")
    made = make_experience(
        [group(1, *(rollout(1, index, [1, 2], [3] * (index + 1), reward=float(index)) for index in range(3)))], token_budget=12
    )
    kwargs = made.varlen()
    assert kwargs["cu_seq_lens_q"].tolist() == kwargs["cu_seq_lens_k"].tolist() == [0, 3, 7, 12]
    assert (kwargs["max_length_q"], kwargs["max_length_k"]) == (5, 5)


def test_numbers_that_are_none_are_refused() -> None:
    made = make_experience(a_batch(0))
    with pytest.raises(ValueError, match="there is no sequence 99"):
        made.part([0, 99])
    with pytest.raises(ValueError, match="name a sequence twice"):
        made.part([0, 0])


def test_tensors_bring_the_weights_that_are_asked_for() -> None:
    pytest.importorskip("torch")
    made = make_experience(a_batch(0), token_budget=64)
    tensors = made.to_torch(reduction="dr_grpo", max_length=16)
    np.testing.assert_allclose(tensors["shift_weights"].numpy(), made.shift_weights("dr_grpo", max_length=16), rtol=1e-6)
    assert "shift_weights" not in made.to_torch()
