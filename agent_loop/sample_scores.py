"""Sampled sequences judged by reward functions, which see them as rollouts."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from agent_loop.errors import RewardError
from agent_loop.rewards import REWARD_THREADS, GroupReward, Reward, judge, judge_group
from agent_loop.sample_inputs import Prompt
from agent_loop.samples import SampledSequence, SampleResponse
from buffer.rollout import RolloutGroup, RolloutState

_TASK = "sampler"


@dataclass(frozen=True, slots=True)
class Judge:
    """Asks one of two kinds of reward; `timeout` seconds for one judgement."""

    reward: Reward | None
    group_reward: GroupReward | None
    timeout: float
    threads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(REWARD_THREADS))

    async def all(self, pairs: Sequence[tuple[Prompt, SampleResponse]]) -> list[SampleResponse]:
        """The responses with their scores, or with the reasons why there are none."""
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(self._response(place, *pair)) for place, pair in enumerate(pairs)]
        return [call.result() for call in calls]

    async def _response(self, place: int, prompt: Prompt, response: SampleResponse) -> SampleResponse:
        """What was interrupted is not finished, and left as it is."""
        finished = [number for number, one in enumerate(response.sequences) if one.finish_reason != "abort"]
        rollouts = [_rollout(place, index, prompt, response.sequences[number]) for index, number in enumerate(finished)]
        sequences = list(response.sequences)
        for number, verdict in zip(finished, await self._verdicts(place, rollouts), strict=True):
            told = {"error": str(verdict)} if isinstance(verdict, RewardError) else {"score": verdict}
            sequences[number] = replace(sequences[number], **told)
        return replace(response, sequences=tuple(sequences))

    async def _verdicts(self, place: int, rollouts: list[RolloutState]) -> list[float | RewardError]:
        if self.group_reward is None:
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(self._one(rollout)) for rollout in rollouts]
            return [call.result() for call in calls]
        if not rollouts:
            return []
        group = RolloutGroup(place, rollouts, task_name=_TASK)
        try:
            judgements = await judge_group(self.group_reward, group, timeout=self.timeout, threads=self.threads)
        except RewardError as error:
            return [error] * len(rollouts)
        return [judgement.score for judgement in judgements]

    async def _one(self, rollout: RolloutState) -> float | RewardError:
        assert self.reward is not None
        try:
            return (await judge(self.reward, rollout, timeout=self.timeout, threads=self.threads)).score
        except RewardError as error:
            return error


def _rollout(place: int, index: int, prompt: Prompt, sequence: SampledSequence) -> RolloutState:
    """A sequence as rewards know it; its group is numbered as the input."""
    messages = prompt.row.get("messages")
    return RolloutState(
        place,
        index,
        _TASK,
        row=prompt.row,
        prompt=prompt.row.get("prompt"),
        messages=None if messages is None else list(messages),
        prompt_ids=prompt.ids,
        response_ids=sequence.token_ids,
        logprobs=sequence.logprobs,
        loss_mask=np.ones(len(sequence.token_ids), np.uint8),
        versions=sequence.versions,
        finish_reason=sequence.finish_reason,
        text=sequence.text,
    )
