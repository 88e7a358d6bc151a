"""A group that expired runs again only where it was stale."""

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from producer import AsyncProduceStrategy, ReplayPromptSampler, SyncProduceStrategy

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


async def test_nothing_older_than_the_bound_is_handed_out(buffer: ReplayBuffer) -> None:
    """Over twenty updates, with long and short responses and twice as many groups started as a batch needs."""
    dataset = [{"prompt_ids": [6 + n % 50]} for n in range(40)]
    lengths = lognormal_lengths(10, 1.2, longest=200, seed=1)
    async with SimulatedEngine(lengths=lengths, max_length=1024) as engine:
        loop = SingleTurnAgentLoop(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=200, seed=1))
        sampler = ReplayPromptSampler(dataset, buffer, group_size=2)
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, max_staleness=1)
        bounds, ages = [], list[float]()
        for step in range(1, 21):
            batch = await strategy.produce_batch(loop, sampler, 4, TASK, step=step)
            bounds += [group.staleness(engine.version) for group in batch.groups]
            ages.append(batch.metrics["batch/staleness_max"])
            await engine.update_weights({"seed": step}, version=step)
    assert len(bounds) == 80
    assert max(bounds) == max(ages) == 1, "some of it is stale, none of it too stale"
    assert (await buffer.audit()).ok


async def test_what_a_weight_update_makes_too_stale_meanwhile_is_not_handed_out(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine:

        class Updating(SingleTurnAgentLoop):
            async def generate(self, state: RolloutState) -> RolloutState:
                state = await super().generate(state)
                if state.row["n"] == 1 and engine.version == 0:
                    await engine.update_weights({"seed": 1}, version=1)
                return state

        loop = Updating(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=8, seed=1))
        sampler = ReplayPromptSampler([{"prompt_ids": [6], "n": n} for n in range(9)], buffer, group_size=1, shuffle=False)
        batch = await SyncProduceStrategy(buffer, max_staleness=0).produce_batch(loop, sampler, 3, TASK)
    assert [group.staleness(1) for group in batch.groups] == [0, 0, 0]
    assert (await buffer.audit()).ok
