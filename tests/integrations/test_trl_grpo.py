"""Shows that TRL's GRPOTrainer trains on our rollouts, goes on after a kill from what is stored, and is refused where it does not fit."""

import argparse
import asyncio
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOTrainer

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.loop_thread import call
from agent_loop.rewards import trl_reward
from buffer import ReplayBuffer, RolloutGroup, Status
from producer.errors import FailureBudgetError, ProducerError
from producer.integrations.trl import GRPORollouts, stored_reward
from producer.integrations.trl.checks import check_trainer
from producer.integrations.trl.corrected import logprobs_of
from tests.integrations.tiny_grpo import GROUP_SIZE, PROMPTS, TASK, low_tokens, options, rollouts_of, rows, trainer_of
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.sqlite, pytest.mark.filterwarnings("ignore:TRL currently supports vLLM")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stored(out: Path, **asked: Any) -> list[RolloutGroup]:
    """The groups that the database in `out` holds."""

    async def read() -> list[RolloutGroup]:
        async with ReplayBuffer.open(f"sqlite:///{out / 'run.db'}", read_only=True) as buffer:
            assert (await buffer.audit()).ok
            return await buffer.query(task_name=TASK, limit=10_000, **asked)

    with ThreadPoolExecutor(1) as pool:  # not on this thread, whose loop the suite keeps
        return pool.submit(lambda: asyncio.run(read())).result()


def test_it_trains_and_every_group_is_consumed_at_its_step(model: Path, tmp_path: Path) -> None:
    steps = 14
    with rollouts_of(model, tmp_path) as rollouts:
        trainer = trainer_of(model, options(tmp_path, steps, learning_rate=1e-2), rollouts)
        trainer.train()
        ids = torch.tensor([[5, 9, 301, 17, 40]])
        inputs = {
            "prompt_ids": ids[:, :2],
            "prompt_mask": torch.ones(1, 2),
            "completion_ids": ids[:, 2:],
            "completion_mask": torch.ones(1, 3),
        }
        own = logprobs_of(trainer.model.eval(), inputs, 1.0)[0]
        engines = call(rollouts._loop, rollouts.engine.score(ids[0].tolist(), start=2))
    np.testing.assert_allclose(engines, own, atol=1e-4)  # the weights after the last step are in force

    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    groups = stored(tmp_path)
    assert Counter(group.consumed_step for group in groups) == dict.fromkeys(range(1, steps + 1), PROMPTS)
    assert {group.status for group in groups} == {Status.ARCHIVED}
    for group in groups:
        assert {int(version) for rollout in group.rollouts for version in rollout.versions} == {group.consumed_step - 1}
    of_step = [np.mean([low_tokens([one.response_ids.tolist()]) for one in group.rollouts]) for group in groups if group.consumed_step == 1]
    assert np.mean(of_step) == pytest.approx(rewards[0], abs=1e-6)


def test_a_killed_run_goes_on_from_what_is_stored_and_ends_as_one_that_was_not(model: Path, tmp_path: Path) -> None:
    steps, whole, cut = 6, tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    with rollouts_of(model, whole) as rollouts:
        undisturbed = trainer_of(model, options(whole, steps), rollouts)
        undisturbed.train()

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.integrations.tiny_grpo", str(model), str(cut), str(steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.strip() == "step 5":  # one step behind the checkpoint of step 4, while step 6 is being sampled
                run.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail("the run ended by itself")
    before = {group.group_id: group for group in stored(cut)}
    assert Counter(group.status for group in before.values())[Status.ARCHIVED] == 4 * PROMPTS
    assert Counter(group.consumed_step for group in before.values())[5] == PROMPTS

    with rollouts_of(model, cut) as rollouts:
        resumed = trainer_of(model, options(cut, steps), rollouts)
        resumed.train(resume_from_checkpoint=True)
    after = {group.group_id: group for group in stored(cut)}
    for group_id, group in before.items():
        if group.status in (Status.ARCHIVED, Status.CONSUMED, Status.COMPLETED):
            assert tokens(after[group_id]) == tokens(group)
            assert group.consumed_step in (after[group_id].consumed_step, None)
    assert Counter(group.consumed_step for group in after.values()) == dict.fromkeys(range(1, steps + 1), PROMPTS)
    assert {group_id: tokens(group) for group_id, group in after.items()} == {g.group_id: tokens(g) for g in stored(whole)}
    moved = [(resumed.model.state_dict()[name] - value).abs().mean() for name, value in undisturbed.model.state_dict().items()]
    assert max(moved) < 1e-5, "the same weights, but for the rounding of responses that were continued: a step moves them by 3e-3"


def tokens(group: RolloutGroup) -> list[list[int]]:
    return [rollout.response_ids.tolist() for rollout in group.rollouts]


def test_a_reward_function_of_trl_scores_in_the_agent_loop_and_evaluations_are_not_stored(model: Path, tmp_path: Path) -> None:
    dataset = [row | {"wanted": str(at)} for at, row in enumerate(rows())]
    seen: list[str] = []

    def low(completion_ids: list[list[int]], wanted: list[str], **columns: Any) -> list[float]:
        seen.extend(wanted)
        return low_tokens(completion_ids, **columns)

    with rollouts_of(model, tmp_path, trl_reward(low), rows=dataset, max_in_flight=GROUP_SIZE) as rollouts:
        args = options(tmp_path, 1, per_device_eval_batch_size=GROUP_SIZE, num_generations_eval=4)
        trainer = trainer_of(model, args, rollouts, reward_funcs=stored_reward, eval_dataset=Dataset.from_list(rows()[:2]))
        trainer.train()
        evaluated = trainer.evaluate()
    groups = stored(tmp_path)
    assert len(groups) == PROMPTS
    rewards = [one.reward for group in groups for one in group.rollouts]
    assert trainer.state.log_history[0]["reward"] == pytest.approx(np.mean(rewards), abs=1e-6)
    assert len(seen) == PROMPTS * GROUP_SIZE + 2 * 4
    assert 0 < evaluated["eval_reward"] < 1


def test_chats_are_trained_on_for_two_steps_each(model: Path, tmp_path: Path) -> None:
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows()]
    given: list[Any] = []

    def low(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        given.extend(completions)
        return low_tokens(completion_ids)

    with rollouts_of(model, tmp_path) as rollouts:
        trainer = trainer_of(model, options(tmp_path, 4, num_iterations=2), rollouts, reward_funcs=low, dataset=chats)
        trainer.train()
    groups = stored(tmp_path)
    assert Counter(group.consumed_step for group in groups) == {1: PROMPTS, 3: PROMPTS}
    assert {int(version) for group in groups for one in group.rollouts for version in one.versions} == {0, 2}
    assert all(message["role"] == "assistant" for (message,) in given)
    assert all(group.rollouts[0].messages == group.rollouts[0].row["prompt"] for group in groups)


class Dying(TrainerCallback):
    """Raises when a step is done, as a machine that fails."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("the machine fails")


def test_in_whatever_order_the_prompts_come_again_their_groups_are_found(model: Path, tmp_path: Path) -> None:
    few = rows()[:PROMPTS]  # each step is an epoch, in an order of its own
    with rollouts_of(model, tmp_path) as rollouts, pytest.raises(RuntimeError, match="the machine fails"):
        trainer_of(model, options(tmp_path, 4), rollouts, callbacks=[Dying()], dataset=few).train()
    before = {group.group_id: tokens(group) for group in stored(tmp_path)}
    with rollouts_of(model, tmp_path, max_staleness=3) as rollouts:
        trainer_of(model, options(tmp_path, 4), rollouts, dataset=few).train(resume_from_checkpoint=True)
    after = stored(tmp_path)
    assert Counter(group.consumed_step for group in after) == dict.fromkeys(range(1, 5), PROMPTS)
    assert {group.group_id: tokens(group) for group in after if group.group_id in before} == before


def test_the_example_learns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    example = importlib.import_module("trl_grpo")
    for steps in (5, 10):
        example.main(argparse.Namespace(out=tmp_path, steps=steps))
    told = re.findall(r"reward: ([\d.]+) at the first logged step, ([\d.]+) at the last", capsys.readouterr().out)
    assert float(told[1][1]) > float(told[0][0])


MISFITS: list[tuple[str, str, Any, str]] = [
    ("args", "vllm_importance_sampling_correction", False, "ignores the log-probabilities"),
    ("", "temperature", 0.8, "temperature=1.0 and the trainer divides its logits by 0.8"),
    ("", "max_completion_length", 4, "max_tokens=8 of the agent loop is over max_completion_length=4"),
    ("args", "steps_per_generation", 6, "save_steps=2 .* make it a multiple"),
    ("", "tools", [print], "leave tools out"),
]


def test_a_trainer_that_does_not_fit_is_refused_before_anything_is_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rollouts_of(model, tmp_path, rows=[{"prompt": "What is love?"}]) as rollouts:
        trainer = trainer_of(model, options(tmp_path, 1), rollouts)
        for owner, name, value, message in MISFITS:
            with monkeypatch.context() as patch:
                patch.setattr(trainer.args if owner else trainer, name, value)
                with pytest.raises(ValueError, match=message):
                    rollouts(["What is love?"] * GROUP_SIZE, trainer)
        with pytest.raises(ValueError, match="no row of rows= has the prompt 'What is"):
            trainer.train()
        with pytest.raises(ValueError, match="ignores the log-probabilities"):
            trainer_of(model, options(tmp_path, 1), rollouts, GRPOTrainer).train()
    assert stored(tmp_path) == []


def test_a_trainer_that_does_not_tell_is_refused(model: Path, tmp_path: Path) -> None:
    with rollouts_of(model, tmp_path) as rollouts:
        trainer = trainer_of(model, options(tmp_path, 1), rollouts)
        trainer.remove_callback(rollouts.callback)
        with pytest.raises(ProducerError, match=r"callbacks=\[rollouts.callback\]"):
            trainer.train()
        with pytest.raises(ValueError, match="7 prompts are no whole groups of 8"):
            rollouts(["a"] * 7, trainer)
        with pytest.raises(ValueError, match="prompts 0 to 7 differ"):
            rollouts(["a"] * 7 + ["b"], trainer)
        with pytest.raises(ValueError, match="is not JSON"):
            rollouts([{1, 2}] * 8, trainer)


class Broken(SingleTurnAgentLoop):
    """Fails on one prompt, as often as it is told to."""

    failures = 1

    async def generate(self, state: Any) -> Any:
        if state.group_id == 2 and state.index == 3 and self.failures > 0:
            self.failures -= 1
            raise RuntimeError("the tool is out")
        state.append([7, 8], logprobs=[-1.0, -2.0], version=0)
        state.append([9], trainable=False)
        state.finish_reason, state.prompt_ids = "stop", np.array([1, 2, 3], np.int32)
        return state


class Standing:
    """A trainer as `GRPORollouts` sees one, without a model: it is asked for attributes only."""

    def __init__(self, args: Any, tmp_path: Path) -> None:
        self.args, self.num_generations, self.num_generations_eval = args, 4, 4
        self.temperature, self.max_completion_length, self.use_vllm = 1.0, 8, True
        self.model = torch.nn.Linear(1, 1)
        self.accelerator = type("Accelerator", (), {"num_processes": 1})()
        self.state = type("State", (), {"global_step": 0})()


@pytest.mark.parametrize("biased", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_ratios_that_sampling_biases_are_warned_of(tmp_path: Path, biased: dict[str, Any]) -> None:
    trainer = Standing(options(tmp_path, 1), tmp_path)
    with pytest.warns(UserWarning, match=f"samples with {next(iter(biased))}=.*ratios are biased"):
        check_trainer(trainer, SamplingParams(max_tokens=8, **biased), "required")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trainer(trainer, SamplingParams(max_tokens=8), "required")


def test_a_group_that_fails_stops_the_trainer_and_runs_again_when_it_starts_again(tmp_path: Path) -> None:
    buffer = ReplayBuffer.open(f"sqlite:///{tmp_path / 'run.db'}")
    agent_loop = Broken(SimulatedEngine(), max_attempts=1, sampling=SamplingParams(max_tokens=8))
    trainer = Standing(options(tmp_path, 1), tmp_path)
    prompts = [prompt for prompt in "abc" for _ in range(4)]
    with GRPORollouts(buffer, agent_loop, task_name=TASK, max_in_flight=4, weights=lambda model: {"seed": 0}) as rollouts:
        rollouts.begin(0, trainer.model)
        with pytest.raises(FailureBudgetError, match=r"group 2 .* is failed.*the tool is out"):
            rollouts(prompts, trainer)
        found = Counter(group.status for group in stored(tmp_path))
        assert found[Status.FAILED] == 1
        assert found.total() == 3
        given = rollouts(prompts, trainer)
    assert given["completion_ids"] == [[7, 8, 9]] * 12
    assert given["env_mask"] == [[1, 1, 0]] * 12
    assert given["logprobs"][0] == [-1.0, -2.0, 0.0]
    assert given["rollout_id"] == [f"{TASK}-{group}-{member}" for group in (1, 2, 3) for member in range(4)]
    assert Counter(group.consumed_step for group in stored(tmp_path)) == {1: 3}, "each was drawn once"


class Interrupting(SingleTurnAgentLoop):
    """Samples two tokens, presses Ctrl-C once, and never ends by itself."""

    pressed = False

    async def generate(self, state: Any) -> Any:
        state.prompt_ids = np.array([1], np.int32)
        if state.response_ids.size:
            state.finish_reason = "stop"
            return state
        state.append([7, 8], logprobs=[-1.0, -2.0], version=0)
        if not self.pressed and state.index == 3:
            type(self).pressed = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        await asyncio.Event().wait()
        return state


def test_ctrl_c_amid_a_call_keeps_what_was_sampled(tmp_path: Path) -> None:
    buffer = ReplayBuffer.open(f"sqlite:///{tmp_path / 'run.db'}")
    agent_loop = Interrupting(SimulatedEngine(), sampling=SamplingParams(max_tokens=8))
    trainer = Standing(options(tmp_path, 1), tmp_path)
    with GRPORollouts(buffer, agent_loop, task_name=TASK, weights=lambda model: {"seed": 0}) as rollouts:
        rollouts._rules = replace(rollouts._rules, interrupt_timeout=0.2)
        rollouts.begin(0, trainer.model)
        with pytest.raises(KeyboardInterrupt):
            rollouts(["a"] * 4 + ["b"] * 4, trainer)
        assert Counter(group.status for group in stored(tmp_path)) == {Status.INTERRUPTED: 2}
        given = rollouts(["b"] * 4 + ["a"] * 4, trainer)
    assert given["completion_ids"] == [[7, 8]] * 8
    assert [name.split("-")[1] for name in given["rollout_id"]] == ["2"] * 4 + ["1"] * 4


def test_adapters_are_trained_and_the_engine_has_them_merged(model: Path, tmp_path: Path) -> None:
    with rollouts_of(model, tmp_path) as rollouts:
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        trainer = trainer_of(model, options(tmp_path, 2, save_strategy="no"), rollouts, peft_config=adapter)
        base = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" not in name}
        trainer.train()
        ids = torch.tensor([[5, 9, 301, 17, 40]])
        inputs = {
            "prompt_ids": ids[:, :2],
            "prompt_mask": torch.ones(1, 2),
            "completion_ids": ids[:, 2:],
            "completion_mask": torch.ones(1, 3),
        }
        own = logprobs_of(trainer.model.eval(), inputs, 1.0)[0]
        engines = call(rollouts._loop, rollouts.engine.score(ids[0].tolist(), start=2))
    np.testing.assert_allclose(engines, own, atol=1e-4)
    for name, value in base.items():
        assert torch.equal(trainer.model.state_dict()[name], value), f"{name} has drifted"
