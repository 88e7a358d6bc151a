"""TRL's GRPOTrainer on stored rollouts: a tiny model, on a laptop's CPU, learns to answer in small numbers.

Stop it at any moment (Ctrl-C, or kill -9) and start it again: it goes on from its checkpoint and from `run.db`.
It needs the extra `trl`.
"""

import argparse
from pathlib import Path
from typing import Any

from arithmetic_trainer import make_model, make_tokenizer
from datasets import Dataset
from trl import GRPOConfig

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.transformers import TransformersEngine
from buffer import ReplayBuffer
from producer.integrations.trl import CorrectedGRPOTrainer, GRPORollouts

MAX_TOKENS, GROUP_SIZE, PROMPTS = 4, 16, 8


def small_digits(completions: list[str], **columns: Any) -> list[float]:
    """A reward function as TRL has them: the fraction of characters that are a digit below 5."""
    return [sum(character in "01234" for character in text) / MAX_TOKENS for text in completions]


def make_folder(folder: Path) -> Path:
    """A small transformer with its tokenizer, in Hugging Face's format; made once."""
    if not (folder / "config.json").exists():
        tokenizer = make_tokenizer()
        make_model(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def arguments(out: Path, steps: int) -> GRPOConfig:
    """A step is one generation of 8 prompts with 16 completions each."""
    return GRPOConfig(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        save_steps=5,
        save_total_limit=2,
        logging_steps=5,
        per_device_train_batch_size=PROMPTS * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_TOKENS,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        vllm_importance_sampling_correction=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )


def main(options: argparse.Namespace) -> None:
    """Train, from the last checkpoint where there is one."""
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = make_folder(options.out / "model"), make_tokenizer()
    tokenizer.padding_side = "left"
    prompts = [{"prompt": f"{a}+{b}="} for a in range(10) for b in range(10)]
    agent_loop = SingleTurnAgentLoop(TransformersEngine(model), tokenizer, sampling=SamplingParams(max_tokens=MAX_TOKENS, seed=0))
    with GRPORollouts(ReplayBuffer.open(f"sqlite:///{options.out / 'run.db'}"), agent_loop) as rollouts:
        trainer = CorrectedGRPOTrainer(
            model=str(model),
            reward_funcs=small_digits,
            args=arguments(options.out, options.steps),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            rollout_func=rollouts,
            callbacks=[rollouts.callback],
        )
        trainer.train(resume_from_checkpoint=any((options.out / "checkpoints").glob("checkpoint-*")))
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward: {rewards[0]:.2f} at the first logged step, {rewards[-1]:.2f} at the last")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".demo/trl"), help="folder of the run: database, checkpoints, model")
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args())
