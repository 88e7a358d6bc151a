"""A local reward model judges rollouts together as it judges each alone, by its chat template, and says what it cannot judge."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen2ForSequenceClassification

from agent_loop import RewardSet
from agent_loop.errors import RewardClosedError, RewardError
from agent_loop.rewards.classifier import ClassifierReward
from tests.agent_loop.judged import rollout
from tests.tiny_model import make_tiny_classifier, make_tiny_model

CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier of three labels with its tokenizer."""
    torch.set_num_threads(1)
    return make_tiny_classifier(tmp_path_factory.mktemp("models") / "classifier")


def directly(folder: Path, text: str, label: int) -> float:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), Qwen2ForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        return float(model.eval()(input_ids=torch.tensor([tokenizer.encode(text)])).logits[0, label])


class Counting(ClassifierReward):
    """Knows the sizes of its batches."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sizes: list[int] = []

    def _judge(self, rollouts: Any) -> Any:
        self.sizes.append(len(rollouts))
        assert threading.current_thread().name.startswith("millrace-classifier")
        return super()._judge(rollouts)


async def test_rollouts_judged_together_have_the_scores_of_each_alone(folder: Path) -> None:
    texts = ["four" * (1 + n % 7) + "." for n in range(20)]
    async with Counting(folder, label="good", batch=8, window=0.05) as reward:
        together = await asyncio.gather(*[reward(rollout(n, text)) for n, text in enumerate(texts)])
        assert max(reward.sizes) == 8
        assert sum(reward.sizes) == 20
        assert len(reward.sizes) <= 4
        alone = await reward(rollout(3, texts[3]))
    assert alone == pytest.approx(together[3], abs=1e-5)
    assert together[:3] == pytest.approx([directly(folder, "2 + 2 =" + text, 1) for text in texts[:3]], abs=1e-5)
    assert len({round(score, 4) for score in together}) == 7


async def test_a_chat_is_judged_in_the_tokenizers_template_with_the_turns_that_the_loop_added(folder: Path) -> None:
    turns = rollout(1, "four", prompt=CHAT)
    assert turns.messages is not None
    turns.messages += [{"role": "assistant", "content": "calc"}, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "four"}]
    async with ClassifierReward(folder) as reward:
        scores = [await reward(rollout(0, "four", prompt=CHAT)), await reward(turns)]
    expected = ["user: What is 2 + 2?\nassistant: four\n", "user: What is 2 + 2?\nassistant: calc\ntool: 4\nassistant: four\n"]
    assert scores == pytest.approx([directly(folder, text, 0) for text in expected], abs=1e-5)


async def test_one_that_cannot_be_judged_fails_alone(folder: Path) -> None:
    async with Counting(folder, max_length=16, window=0.05) as reward:
        scores = await asyncio.gather(*map(reward, [rollout(0), rollout(1, "four " * 30), rollout(2, None)]), return_exceptions=True)
    assert reward.sizes == [3]
    assert isinstance(scores[0], float)
    assert "tokens for the reward model, which takes 16" in str(scores[1])
    assert "give the agent loop a tokenizer" in str(scores[2])


async def test_a_loaded_model_and_a_rendering_of_ones_own(folder: Path) -> None:
    model: PreTrainedModel = Qwen2ForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="came without tokenizer="):
        ClassifierReward(model)
    reward = ClassifierReward(
        model, AutoTokenizer.from_pretrained(folder), label=2, render=lambda state: f"Q: {state.prompt} A: {state.text}"
    )
    async with RewardSet({"model": reward}) as rewards:
        score = (await rewards(rollout())).score
    assert score == pytest.approx(directly(folder, "Q: 2 + 2 = A: four", 2), abs=0.05)
    with pytest.raises(RewardError, match="it is not open"):
        await rewards(rollout(1))


async def test_what_is_no_classifier_is_refused_at_opening(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is no sequence classifier: its weights lack \['score.weight'\]"):
        async with ClassifierReward(make_tiny_model(folder.parent / "language")):
            raise AssertionError
    for label in (3, "great"):
        with pytest.raises(ValueError, match="is none of the model's 3 labels"):
            async with ClassifierReward(folder, label=label):
                raise AssertionError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("millrace-classifier")]


async def test_cancelled_and_closed_in_mid_batch_it_leaves_neither_task_nor_thread(folder: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(ClassifierReward):
        def _judge(self, rollouts: Any) -> Any:
            entered.set()
            go_on.wait()
            return super()._judge(rollouts)

    before = asyncio.all_tasks()
    async with Slow(folder, window=0.0) as reward, asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(reward(rollout(n))) for n in range(3)]
        await asyncio.to_thread(entered.wait)
        for call in calls:
            call.cancel()
        go_on.set()
    assert asyncio.all_tasks() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("millrace-classifier")]
    with pytest.raises(RewardClosedError):
        await reward(rollout())
