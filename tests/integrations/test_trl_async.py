"""Shows that our rollout worker and weight transfer keep TRL's contract: its queue dataset, batchers, collator and trainer run on them.

`AsyncGRPOTrainer` needs a GPU: its attention is a CUDA kernel. One test runs it on a CPU with the same attention in plain PyTorch;
the others do what it does, in its order.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import DataLoaderDispatcher
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_grpo_trainer import (
    DataCollatorForRollout,
    FixedCountBatcher,
    RolloutQueueDataset,
    TokenBudgetBatcher,
)

from agent_loop import AgentLoop, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.transformers import TransformersEngine
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from producer import AsyncProduceStrategy, ReplayPromptSampler
from producer.errors import ProducerError
from producer.experience import AdvantageConfig, make_experience, preset
from producer.integrations.trl import AsyncRollouts, GRPORollouts
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.sqlite]
TASK, SIZE, GROUPS = "async", 4, 2
ROWS = [{"prompt": f"What is {a} + {a}?"} for a in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def low(rollout: RolloutState) -> float:
    return float(np.mean(rollout.response_ids < 256))


def rollouts_of(model: Path, out: Path, **given: Any) -> AsyncRollouts:
    buffer = ReplayBuffer.open(f"sqlite:///{out / 'run.db'}")
    engine = TransformersEngine(model, max_length=64, cache_tokens=4096)
    agent_loop = SingleTurnAgentLoop(engine, AutoTokenizer.from_pretrained(model), low, sampling=SamplingParams(max_tokens=6))
    strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, max_staleness=given.pop("max_staleness", 2), progress=False)
    sampler = ReplayPromptSampler(ROWS, buffer, group_size=given.pop("group_size", SIZE))
    return AsyncRollouts(strategy, agent_loop, sampler, TASK, **{"groups_per_step": GROUPS} | given)


def arguments(out: Path, **changes: Any) -> AsyncGRPOConfig:
    given = {
        "output_dir": str(out),
        "num_generations": SIZE,
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": GROUPS,
        "token_budget": 0,
        "max_staleness": 3,
        "max_steps": 4,
        "bf16": False,
        "use_cpu": True,
        "ignore_data_skip": True,  # as the trainer itself sets it
        "report_to": [],
    }
    return AsyncGRPOConfig(**(given | changes))


class Trainer:
    """What `AsyncGRPOTrainer` does with a worker and a transfer, and its own dataset, batcher and collator; the model only moves."""

    def __init__(self, model: Path, rollouts: AsyncRollouts, args: AsyncGRPOConfig, step: int = 0) -> None:
        self.model, self.rollouts, self.args = AutoModelForCausalLM.from_pretrained(model), rollouts, args
        self.state, self.version = TrainerState(global_step=step), 0
        self.drawn: set[int] = set()
        self.metrics: dict[str, list[Any]] = defaultdict(list)

    def tell(self, event: str) -> None:
        getattr(self.rollouts.callback, event)(self.args, self.state, TrainerControl(), model=self.model)

    def sync(self) -> None:
        transfer = self.rollouts.weight_transfer
        transfer.pause()
        transfer.send_weights(iter([(name, value.detach()) for name, value in self.model.named_parameters()]))
        transfer.resume()
        self.version += 1
        self.rollouts.update_model_version(self.version)

    def batches(self, batcher: Any = None) -> Iterator[dict[str, Any]]:
        dataset = RolloutQueueDataset(
            self.rollouts.rollout_buffer,
            lambda: self.version,
            self.rollouts.check_health,
            stale_after_s=60.0,
            poll_interval_s=0.2,
            max_staleness=self.args.max_staleness,
            metrics=self.metrics,
        )
        planned = batcher(dataset) if batcher else FixedCountBatcher(dataset, 1, self.args.per_device_train_batch_size)
        collate = DataCollatorForRollout(pad_token_id=1, groups_trained=self.drawn)
        # The trainer's loader: it draws a batch more before it gives one out.
        return iter(DataLoaderDispatcher(planned, split_batches=True, collate_fn=collate, batch_size=1))

    def begin(self) -> None:
        self.tell("on_train_begin")
        self.rollouts.weight_transfer.init_weight_transfer()
        self.sync()
        self.rollouts.start()

    def step(self, batches: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        micro = [next(batches) for _ in range(self.args.gradient_accumulation_steps)]
        with torch.no_grad():
            for value in self.model.parameters():
                value.mul_(1.01)
        self.state.global_step += 1
        self.sync()
        return micro

    def end(self) -> None:
        self.rollouts.stop()
        self.rollouts.weight_transfer.destroy()


def stored(out: Path) -> list[RolloutGroup]:
    async def read() -> list[RolloutGroup]:
        async with ReplayBuffer.open(f"sqlite:///{out / 'run.db'}", read_only=True) as buffer:
            assert (await buffer.audit()).ok
            return await buffer.query(task_name=TASK, limit=1000)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(read())).result()


def test_its_steps_are_ours_and_a_stopped_run_goes_on_from_its_checkpoint(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(model, rollouts_of(model, tmp_path), arguments(tmp_path))
    try:
        trainer.begin()
        batches = trainer.batches()
        seen = [trainer.step(batches) for _ in range(2)]
        trainer.tell("on_save")
        seen.append(trainer.step(batches))
    finally:
        trainer.end()
    first = {group.group_id: group for group in stored(tmp_path)}
    by_step = {step: [group for group in first.values() if group.consumed_step == step] for step in (1, 2, 3)}
    assert [len(groups) for groups in by_step.values()] == [GROUPS] * 3
    assert {group.status for step in (1, 2) for group in by_step[step]} == {Status.ARCHIVED}
    assert trainer.drawn > {group.group_id for groups in by_step.values() for group in groups}, "it draws ahead"
    for step, micro in enumerate(seen, 1):
        check_batch(by_step[step], micro)

    resumed = Trainer(model, rollouts_of(model, tmp_path), arguments(tmp_path), step=2)
    try:
        resumed.begin()
        resumed.step(resumed.batches())
    finally:
        resumed.end()
    second = {group.group_id: group for group in stored(tmp_path)}
    assert resumed.drawn >= {group.group_id for group in by_step[3]}, "what was trained on after the checkpoint comes again, the same"
    for group in by_step[3]:
        assert second[group.group_id].consumed_step == 3
        assert [one.response_ids.tolist() for one in second[group.group_id].rollouts] == [
            one.response_ids.tolist() for one in group.rollouts
        ]
    consumed = Counter(group.consumed_step for group in second.values())
    assert [consumed[step] for step in (1, 2, 3, 4)] == [GROUPS] * 4, "that of step 4 was drawn ahead of it, and none is trained on twice"
    with pytest.raises(RuntimeError, match="stopped, or never opened"):
        resumed.rollouts.check_health(60.0)


def check_batch(groups: list[RolloutGroup], micro: list[dict[str, Any]]) -> None:
    """Every token, log-probability and advantage of the step's groups is in its micro-batches."""
    experience = make_experience(groups, advantage=preset("trl_async", "grpo"))
    got = sorted(
        (round(float(logprob), 5), round(float(advantage), 4))
        for batch in micro
        for logprob, advantage in zip(batch["old_log_probs"][0], batch["advantages"][0], strict=True)
        if logprob != 0
    )
    mask = experience.loss_mask
    wanted = sorted(
        (round(float(logprob), 5), round(float(advantage), 4))
        for logprob, advantage in zip(experience.logprobs[mask], experience.advantages[mask], strict=True)
    )
    assert got == wanted


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What the kernel computes: of each segment, over all that lies before it on its path."""
    assert causal
    assert window_size == (-1, -1)
    out = []
    for (start, end), (first, last) in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
        q, k, v = (array.transpose(0, 1)[None] for array in (query[start:end], key[first:last], value[first:last]))
        seen = torch.ones(end - start, last - first, dtype=torch.bool).tril(last - first - (end - start))
        own = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
        out.append(own[0].transpose(0, 1))
    return torch.cat(out)


class Failing(TrainerCallback):
    """Raises when a step is done, as a machine that fails."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 5:
            raise RuntimeError("the machine fails")


def test_the_trainer_itself_learns_and_goes_on_from_its_checkpoint(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attention))
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda accelerator, dtype: None)  # asks CUDA for its name
    size, groups, steps = 16, 4, 12

    def run(callbacks: list[Any], **resumed: Any) -> Any:
        rollouts = rollouts_of(model, tmp_path, group_size=size, groups_per_step=groups, max_staleness=1)
        settings = {"num_generations": size, "per_device_train_batch_size": 2 * size, "gradient_accumulation_steps": groups // 2}
        rates = {"learning_rate": 1e-2, "weight_decay": 0.0, "gradient_checkpointing": False, "disable_tqdm": True, "max_staleness": 2}
        args = arguments(tmp_path / "checkpoints", max_steps=steps, save_steps=2, logging_steps=1, **settings, **rates)
        trainer = AsyncGRPOTrainer(
            str(model),
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            rollout_worker=rollouts,
            weight_transfer=rollouts.weight_transfer,
            callbacks=[rollouts.callback, *callbacks],
        )
        trainer.train(**resumed)
        return trainer

    with pytest.raises(RuntimeError, match="the machine fails"):
        run([Failing()])
    first = {group.group_id: group for group in stored(tmp_path)}
    assert {step for group in first.values() if (step := group.consumed_step)} >= {1, 2, 3, 4, 5}
    trainer = run([], resume_from_checkpoint=True)
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert np.mean([entry["reward"] for entry in logged[-2:]]) > np.mean([entry["reward"] for entry in logged[:2]]) + 0.1
    assert logged[0]["ratio"] == pytest.approx(1, abs=1e-4), "the first samples are of the weights that they are trained with"
    assert all(entry["sample/staleness_max"] <= 2 for entry in logged)
    assert not any("sample/dropped_stale_total" in entry for entry in logged)
    second = {group.group_id: group for group in stored(tmp_path)}
    consumed = Counter(group.consumed_step for group in second.values())
    assert [consumed[step] for step in range(1, steps + 1)] == [groups] * steps
    for group in first.values():
        if group.status is Status.ARCHIVED:
            assert second[group.group_id].consumed_step == group.consumed_step


def test_it_runs_under_a_token_budget_too(model: Path, tmp_path: Path) -> None:
    rollouts = rollouts_of(model, tmp_path)
    trainer = Trainer(model, rollouts, arguments(tmp_path))
    try:
        trainer.begin()
        batch = next(trainer.batches(lambda dataset: TokenBudgetBatcher(dataset, 1, 48, trainer.metrics)))
    finally:
        trainer.end()
    assert batch["attention_mask"].sum() <= 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_budget": None}, "set token_budget=0"),
        ({"max_staleness": 2}, "set 3 or more"),
        ({"num_generations": 2}, "group_size=4"),
        ({"gradient_accumulation_steps": 3}, "a step has 12 samples"),
        ({"temperature": 0.7}, "temperature=0.7"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    trainer = Trainer(model, rollouts_of(model, tmp_path), arguments(tmp_path, **changes))
    with pytest.raises(ValueError, match=message):
        trainer.tell("on_train_begin")


def test_a_failure_beside_the_trainer_reaches_it(model: Path, tmp_path: Path) -> None:
    def fails(rollout: RolloutState) -> float:
        raise RuntimeError("the judge is out")

    rollouts = rollouts_of(model, tmp_path)
    rollouts._producer._agent_loop.reward = fails
    trainer = Trainer(model, rollouts, arguments(tmp_path))
    try:
        trainer.begin()
        with pytest.raises(RuntimeError, match="the judge is out"):
            next(trainer.batches())  # its dataset asks for our health while nothing comes
    finally:
        trainer.end()


def test_parts_that_cannot_work_are_refused_at_once(tmp_path: Path) -> None:
    buffer = ReplayBuffer.open(f"sqlite:///{tmp_path / 'run.db'}")
    engine = SimulatedEngine()
    agent_loop, sampler = SingleTurnAgentLoop(engine), ReplayPromptSampler(ROWS, buffer, group_size=SIZE)

    def made(strategy: Any = None, loop: Any = agent_loop, **given: Any) -> AsyncRollouts:
        chosen = strategy or AsyncProduceStrategy(buffer, staleness_threshold=1.0, max_staleness=1)
        return AsyncRollouts(chosen, loop, sampler, TASK, **{"groups_per_step": 2} | given)

    with pytest.raises(ValueError, match="max_staleness=None"):
        made(AsyncProduceStrategy(buffer, staleness_threshold=1.0))
    with pytest.raises(ValueError, match="groups_per_step=0"):
        made(groups_per_step=0)
    with pytest.raises(ValueError, match=r"'reinforce.*take an estimator of groups"):
        made(advantage=AdvantageConfig("reinforce++"))
    with pytest.raises(ValueError, match="has no engine"):
        GRPORollouts(buffer, Unheard())
    with pytest.raises(ValueError, match="correction='on'"):
        GRPORollouts(buffer, agent_loop, correction="on")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is no ReplayBuffer"):
        GRPORollouts("sqlite:///run.db", agent_loop)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ in other columns"):
        GRPORollouts(buffer, agent_loop, rows=[{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}])
    rollouts = made()
    with pytest.raises(ProducerError, match=r"callbacks=\[rollouts.callback\]"):
        rollouts.weight_transfer.init_weight_transfer()
    with pytest.raises(ProducerError, match=r"weight_transfer=rollouts\.weight_transfer"):
        rollouts.update_model_version(1)
    with pytest.raises(RuntimeError, match="never opened"):
        rollouts.start()
    with pytest.raises(ProducerError, match="not entered"):
        GRPORollouts(buffer, agent_loop)(["a"], None)


class Unheard(AgentLoop):
    """Has no engine."""

    async def generate(self, state: RolloutState) -> RolloutState:
        return state
