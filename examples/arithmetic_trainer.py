"""A trainer in plain PyTorch: a small transformer made on the spot, its optimiser, and checkpoints that are whole or absent."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from producer.experience import Experience

logging.disable_progress_bar()

WARM_UP_STEPS = 40
WARM_UP_LEARNING_RATE = 5e-4
LEARNING_RATE = 5e-4
CLIP = 0.2


class Trainer:
    """The policy under training, with `step` and the mean reward of each step.

    A run's folder holds `checkpoint.pt` (weights, optimiser, step, rewards) and `weights-0/`, `weights-1/` for the engine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.step = folder, 0
        self.rewards: list[float] = []
        self.tokenizer = make_tokenizer()
        torch.manual_seed(0)
        self.model = make_model(self.tokenizer)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self._checkpoint, self._saved = folder / "checkpoint.pt", 0

    @classmethod
    def restore(cls, folder: Path, prompts: Sequence[Mapping[str, Any]]) -> "Trainer":
        """The trainer of the last checkpoint; in a new run one after the supervised warm-up."""
        trainer = cls(folder)
        if trainer._checkpoint.exists():
            state = torch.load(trainer._checkpoint, weights_only=True)
            trainer.model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.step, trainer.rewards = state["step"], state["rewards"]
        else:
            trainer.warm_up(prompts)
            trainer.save_checkpoint()
        return trainer

    def warm_up(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """A short supervised start, in place of the pre-trained model that a real run begins from."""
        asked = [self.tokenizer.encode(p["prompt"]) for p in prompts]
        answered = [[*self.tokenizer.encode(p["answer"]), self.tokenizer.eos_token_id] for p in prompts]
        ids = _padded([a + b for a, b in zip(asked, answered, strict=True)], self.tokenizer.pad_token_id)
        labels = _padded([[-100] * len(a) + b for a, b in zip(asked, answered, strict=True)], -100)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=WARM_UP_LEARNING_RATE)
        for _ in tqdm(range(WARM_UP_STEPS), desc="supervised warm-up (stands for pre-training)", unit="step"):
            loss = self.model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def train(self, experience: Experience, step: int) -> None:
        """One update on the clipped policy-gradient loss of PPO (Schulman et al. 2017), a mean over all sampled tokens."""
        batch = experience.to_torch()
        weights = torch.from_numpy(experience.shift_weights("token-mean")).float()
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logprobs = -functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="none", ignore_index=-100)
        ratio = (logprobs.view_as(weights) - batch["shift_logprobs"]).where(batch["shift_mask"], 0).exp()
        advantages = batch["shift_advantages"]
        loss = -(torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages) * weights).sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step = step
        self.rewards.append(experience.metrics["reward/mean"])

    def save_weights(self) -> Path:
        """The weights in Hugging Face's format, for the engine; never over those that it may still be reading."""
        self._saved += 1
        folder = self.folder / f"weights-{self._saved % 2}"
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def save_checkpoint(self) -> None:
        """Replace the checkpoint in one step: a kill leaves the old one or the new one, never half of one."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step, "rewards": self.rewards}
        with self._checkpoint.with_suffix(".new").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self._checkpoint)


def _padded(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    characters = [*"0123456789+=", "<eos>", "<pad>"]
    tokenizer = Tokenizer(models.WordLevel({character: index for index, character in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()  # or two digits would decode with a space between them
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A decoder-only transformer of two layers of width 128."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)
