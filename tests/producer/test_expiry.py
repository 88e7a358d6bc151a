"""A group that expired runs again only where it was stale."""

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from producer import ReplayPromptSampler, SyncProduceStrategy

TASK = "math"


async def test_after_expiry_only_the_stale_member_is_generated_and_scored(buffer: ReplayBuffer) -> None:  # case 10
    group = RolloutGroup(1, [RolloutState(1, index, TASK, prompt_ids=[5]) for index in range(2)], TASK)
    for state, version in zip(group.rollouts, (0, 4), strict=True):
        state.append([7, 8], logprobs=[-0.5, -0.25], version=version)
        state.status, state.finish_reason, state.score, state.reward = Status.COMPLETED, "stop", 0.5, 0.5
    await buffer.put(group)
    assert await buffer.expire(TASK, version=5, max_staleness=3) == 1

    generated: list[int] = []
    scored: list[int] = []

    class Noting(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            generated.append(state.index)
            return await super().generate(state)

    def score(state: RolloutState) -> float:
        scored.append(state.index)
        return 1.0

    async with SimulatedEngine(lengths=3) as engine:
        await engine.update_weights({"seed": 1}, version=5)
        loop = Noting(engine, reward=score, sampling=SamplingParams(max_tokens=8, seed=1))
        sampler = ReplayPromptSampler([{"prompt_ids": [6]}], buffer, group_size=2)
        batch = await SyncProduceStrategy(buffer).produce_batch(loop, sampler, 1, TASK)
    assert (generated, scored) == ([0], [0])
    assert (batch.metrics["produce/started"], batch.metrics["batch/staleness_max"]) == (1, 1)
    again, kept = batch.groups[0].rollouts
    assert (batch.groups[0].group_id, again.versions.tolist(), again.score) == (1, [5, 5, 5], 1.0)
    assert (kept.versions.tolist(), kept.response_ids.tolist(), kept.score) == ([4, 4], [7, 8], 0.5)
