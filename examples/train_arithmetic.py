"""GRPO on sums of two digits: the whole of RL post-training on a laptop, and a start for a loop of your own.

Prompts come from a JSONL file, rollouts from an engine, and everything is kept in `run.db`. Stop it at any moment
(Ctrl-C, or kill -9) and start it again: it goes on from the database and the last checkpoint.
"""

import argparse
import asyncio
import json
import signal
from pathlib import Path
from typing import Any

from arithmetic_trainer import Trainer
from report import report
from tqdm import tqdm

from agent_loop import Engine, SamplingParams, SingleTurnAgentLoop
from buffer import ReplayBuffer, RolloutState
from producer import AsyncProduceStrategy, Producer, ReplayPromptSampler
from producer.experience import AdvantageConfig, make_experience

TASK = "sums"
ADVANTAGE = AdvantageConfig("dr_grpo")  # of eleven: "grpo", "rloo", "reinforce++_baseline", ...; shaping, whitening, clipping go here too


def exact_match(state: RolloutState) -> float:
    """1 where the response is the answer that the dataset row gives."""
    return float(state.text == state.row["answer"])


def create_engine(name: str, model: Path) -> Engine:
    """An engine over the weights in `model`; each is imported only when it is asked for."""
    if name == "vllm":
        from agent_loop.engines.vllm import VLLMEngine

        return VLLMEngine(model, max_model_len=32, max_num_seqs=256, enforce_eager=True, gpu_memory_utilization=0.3)
    from agent_loop.engines.transformers import TransformersEngine

    return TransformersEngine(model, max_length=32)


async def train(options: argparse.Namespace) -> None:
    """The loop: train on a batch while the next is produced, update the engine's weights in flight; checkpoint and commit now and then."""
    prompts = [json.loads(line) for line in options.prompts.read_text().splitlines()]
    trainer = await asyncio.to_thread(Trainer.restore, options.out, prompts)
    url = f"sqlite:///{options.out / 'run.db'}"
    async with ReplayBuffer.open(url) as buffer, create_engine(options.engine, trainer.save_weights()) as engine:
        resumed = await buffer.resume(step=trainer.step)
        tell_where_it_goes_on(trainer, resumed)
        await engine.update_weights(trainer.save_weights(), version=resumed.version)

        agent_loop = SingleTurnAgentLoop(engine, trainer.tokenizer, reward=exact_match, sampling=SamplingParams(max_tokens=4))
        sampler = ReplayPromptSampler(prompts, buffer, group_size=options.group_size)
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, max_staleness=2, progress=False)

        bar = tqdm(range(trainer.step + 1, options.steps + 1), initial=trainer.step, total=options.steps, desc="training", unit="step")
        async with Producer(strategy, agent_loop, sampler, TASK) as producer:
            for step in bar:
                batch = await producer.next_batch(options.batch_size, step=step)
                experience = make_experience(batch.groups, advantage=ADVANTAGE, pad_id=trainer.tokenizer.pad_token_id)
                await asyncio.to_thread(trainer.train, experience, step)
                async with producer.update_weights(mode="keep"):
                    await engine.update_weights(trainer.save_weights(), version=engine.version + 1)
                if step % options.checkpoint_every == 0 or step == options.steps:
                    trainer.save_checkpoint()
                    await buffer.commit(step=step, version=engine.version)
                bar.set_postfix(reward=f"{batch.metrics['batch/reward_mean']:.2f}", stale=f"{batch.metrics['batch/staleness_mean']:.2f}")
        counts = await buffer.counts(TASK)
    await asyncio.to_thread(report, counts, trainer.rewards, options.out)


def tell_where_it_goes_on(trainer: Trainer, resumed: Any) -> None:
    """Say whether this is a new run, and what an earlier one left."""
    if trainer.step == 0 and not resumed.counts:
        print("a new run begins at step 1")
        return
    held = sum(sum(by_status.values()) for by_status in resumed.counts.values())
    print(f"going on from the checkpoint of step {trainer.step}: the buffer holds {held} groups;")
    print(f"{resumed.rewound} of them were consumed after it and are handed out again, {resumed.released} were running and are continued")


async def main(options: argparse.Namespace) -> None:
    """Train, and let SIGTERM end it as Ctrl-C does: what runs is stored before the program ends."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    options.out.mkdir(parents=True, exist_ok=True)
    await train(options)


if __name__ == "__main__":
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--prompts", type=Path, default=here / "arithmetic.jsonl", help="JSON lines with prompt and answer")
    parser.add_argument("--out", type=Path, default=Path(".demo/transformers"), help="folder of the run: database, checkpoints, report")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="prompts a step")
    parser.add_argument("--group-size", type=int, default=16, help="responses a prompt")
    parser.add_argument("--checkpoint-every", type=int, default=5, help="steps")
    try:
        asyncio.run(main(parser.parse_args()))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit("interrupted: everything is stored; run the same command again to go on") from None
