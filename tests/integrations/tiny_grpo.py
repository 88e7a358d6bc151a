"""A GRPO run of a tiny model on a task that a few steps teach: responses of tokens below a bound. Run as a program, it can be killed."""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.transformers import TransformersEngine
from buffer import ReplayBuffer
from producer.integrations.trl import CorrectedGRPOTrainer, GRPORollouts

TASK, GROUP_SIZE, PROMPTS, MAX_TOKENS = "low", 8, 4, 8
LOW = 256


def low_tokens(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The fraction of tokens below the bound; TRL's signature."""
    return [sum(token < LOW for token in ids) / len(ids) for ids in completion_ids]


def rows() -> list[dict[str, str]]:
    """One prompt each."""
    return [{"prompt": f"What is {a} + {b}?"} for a in range(8) for b in range(8)]


def options(out: Path, steps: int, **changes: Any) -> GRPOConfig:
    """Arguments of the trainer: a step is a generation of 4 prompts in two micro-batches."""
    given: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "max_steps": steps,
        "per_device_train_batch_size": GROUP_SIZE * PROMPTS // 2,
        "gradient_accumulation_steps": 2,
        "num_generations": GROUP_SIZE,
        "max_completion_length": MAX_TOKENS,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 7,
    }
    return GRPOConfig(**(given | changes))


def rollouts_of(model: Path, out: Path, reward: Any = None, **given: Any) -> GRPORollouts:
    """Over a database in `out`, on an engine of its own."""
    buffer = ReplayBuffer.open(f"sqlite:///{out / 'run.db'}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=3)
    agent_loop = SingleTurnAgentLoop(TransformersEngine(model, max_length=64, cache_tokens=4096), tokenizer, reward, sampling=sampling)
    return GRPORollouts(buffer, agent_loop, task_name=TASK, **given)


def trainer_of(model: Path, args: GRPOConfig, rollouts: GRPORollouts, kind: Any = CorrectedGRPOTrainer, **given: Any) -> Any:
    """The trainer, fed by `rollouts`."""
    callbacks = [rollouts.callback, *given.pop("callbacks", [])]
    reward = given.pop("reward_funcs", low_tokens)
    dataset = Dataset.from_list(given.pop("dataset", rows()))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    return kind(str(model), reward, args, dataset, processing_class=tokenizer, rollout_func=rollouts, callbacks=callbacks, **given)


class Telling(TrainerCallback):
    """Prints each step that is done."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        print(f"step {state.global_step}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with rollouts_of(model, out) as running:
        trainer_of(model, options(out, steps), running, callbacks=[Telling()]).train()
