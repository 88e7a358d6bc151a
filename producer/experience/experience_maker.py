"""`ExperienceMaker`: batches in, experiences out, with what one batch leaves for the next; and samples in one call."""

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import uuid4

from agent_loop import AgentLoop, Sampler, SamplingParams
from agent_loop.arguments import function, instance, mapping, text
from agent_loop.rewards import GroupReward, Reward
from agent_loop.sampling import whole
from buffer import ReplayBuffer, RolloutGroup
from producer.errors import ProducerError
from producer.experience.advantages import AdvantageFn
from producer.experience.arrays import Experience
from producer.experience.attached import Attached
from producer.experience.balancing import Cost
from producer.experience.config import AdvantageConfig
from producer.experience.kl import AdaptiveKL
from producer.experience.maker import check_rows, make_experience
from producer.experience.off_policy import OffPolicy, off_policy_named
from producer.experience.running import RunningMoments
from producer.experience.samples import Prompt, Source, rows_of, sampled

Attach = Callable[[Sequence[RolloutGroup]], Attached]
"""From a batch to what is attached to it, such as `Scorer.attached`."""


@dataclass(frozen=True)
class MakerState:
    """What batches leave for the next.

    Attributes:
        running: the moments of rewards, where the configuration normalises.
        kl: the coefficient of the divergence, where it adapts.
        batches: made so far.
    """

    running: RunningMoments | None = None
    kl: AdaptiveKL | None = None
    batches: int = 0


class ExperienceMaker:
    """`make_experience` with a configuration, and with the state that goes on from batch to batch.

    The state belongs to the run: save it by step beside the trainer's checkpoint, and take it back with the rewind.

    ```python
    maker = ExperienceMaker(AdvantageConfig("rloo", normalise=True))
    await maker.resume(buffer, step=trainer.step)
    for step in range(trainer.step + 1, steps + 1):
        batch = await strategy.produce_batch(agent_loop, sampler, 64, "math", step=step)
        experience = maker.make_experience(batch.groups)
        await maker.save(buffer, step=step)
        ...
    ```

    A batch that cannot be made raises, and leaves the state as it was.
    """

    def __init__(
        self,
        advantage: str | AdvantageFn | AdvantageConfig = "grpo",
        *,
        adaptive_kl: AdaptiveKL | None = None,
        off_policy: str | OffPolicy | None = None,
        attach: Attach | None = None,
        token_budget: int | None = None,
        pad_id: int = 0,
        source: Source | None = None,
        reward: Reward | None = None,
        group_reward: GroupReward | None = None,
        name: str = "experience",
    ) -> None:
        """Say how.

        Args:
            advantage: as of `make_experience`.
            adaptive_kl: gives the configuration's divergence its coefficient, and follows what each batch measured.
            off_policy: as of `make_experience`.
            attach: called with each batch that comes without `attached`; a function that is not async, such as `Scorer.attached`.
            token_budget: as of `make_experience`; of `make_experience_list` also the bound of a micro-batch.
            pad_id: as of `make_experience`.
            source: what `generate_samples` asks: an agent loop, which has its own reward, or a `Sampler`.
            reward: of a `Sampler`'s sequences, one by one; either this or `group_reward`.
            group_reward: of all sequences of a prompt.
            name: under which the state is kept with the run; makers of several tasks need different ones.

        Raises:
            ValueError: parts that make no sense together.
        """
        self.config = advantage if isinstance(advantage, AdvantageConfig) else AdvantageConfig(advantage)
        instance("adaptive_kl", adaptive_kl, AdaptiveKL | None, "an AdaptiveKL, or None")
        if adaptive_kl is not None and self.config.kl is None:
            raise ValueError(f"{adaptive_kl} has no divergence to weigh; give the configuration one: AdvantageConfig(kl=KL(...))")
        if source is not None and not isinstance(source, AgentLoop | Sampler):
            raise TypeError(f"source={source!r:.80} is neither an agent loop nor a Sampler")
        check_rows(token_budget, pad_id)
        text("name", name, "the name of the state")
        if attach is not None:
            function("attach", attach, "one of a batch, such as Scorer.attached")
        if inspect.iscoroutinefunction(attach):
            raise TypeError(f"attach={attach!r:.80} is async; await it yourself, and give make_experience what comes of it")
        if isinstance(source, Sampler) and (reward is None) == (group_reward is None):
            raise ValueError("a Sampler's sequences need one judge; pass either reward or group_reward")
        if not isinstance(source, Sampler) and not (reward is None and group_reward is None):
            raise ValueError("reward and group_reward judge what a Sampler gives; an agent loop has its own, and stored groups have theirs")
        self._off_policy = None if off_policy is None else off_policy_named(off_policy)
        self._attach, self._token_budget, self._pad_id, self.name = attach, token_budget, pad_id, name
        self._source, self._judges = source, {"reward": reward, "group_reward": group_reward}
        self._first = self._state = MakerState(kl=adaptive_kl)
        self._id = uuid4().hex
        self._goes_on_from = self._id

    # From groups

    @property
    def state(self) -> MakerState:
        """What the batches so far have left."""
        return self._state

    def made(self, groups: Sequence[RolloutGroup], attached: Attached | None = None) -> tuple[Experience, MakerState]:
        """The experience of a batch and the state after it, which is not yet taken on: see `take_on`."""
        state = self._state
        if attached is None and self._attach is not None:
            attached = self._attach(groups)
        config = self.config
        if state.kl is not None and config.kl is not None:
            config = replace(config, kl=replace(config.kl, coef=state.kl.coef))
        experience = make_experience(
            groups,
            advantage=config,
            attached=attached,
            off_policy=self._off_policy,
            running=state.running,
            token_budget=self._token_budget,
            pad_id=self._pad_id,
        )
        kl = state.kl
        if kl is not None:
            experience.metrics["kl/coef"] = kl.coef
            kl = kl.updated(experience.metrics["kl/sequence"], len(experience.rollout_ids))
        return experience, MakerState(experience.running or state.running, kl, state.batches + 1)

    def take_on(self, state: MakerState) -> None:
        """Go on from this state, which `made` gave."""
        self._state = state

    def make_experience(self, groups: Sequence[RolloutGroup], attached: Attached | None = None) -> Experience:
        """Arrays of a whole batch, as the function of this name makes them; the state goes on.

        Raises:
            ValueError: as of the function. The state stays as it was.
        """
        experience, state = self.made(groups, attached)
        self.take_on(state)
        return experience

    # From prompts

    async def generate_samples(
        self,
        prompts: Sequence[Prompt],
        *,
        references: Sequence[Any] | None = None,
        labels: Sequence[Any] | None = None,
        num_samples: int = 8,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
    ) -> list[RolloutGroup]:
        """Sample and judge `num_samples` responses to each prompt: a group each, in the order of the prompts. Nothing is stored.

        Every member's `row` is that of its prompt, so that a reward always sees the reference that belongs to it.

        Args:
            prompts: text, token ids, chats, or rows of a dataset.
            references: one a prompt, which rewards find as `row["reference"]`.
            labels: one a prompt, likewise `row["label"]`.
            num_samples: 1 or more.
            sampling_params: of a `Sampler`; an agent loop has its own.

        Raises:
            ValueError: unequal numbers of prompts and references or labels, or there is no source.
            EngineError: as of the source. Nothing of the call is kept.
        """
        if self._source is None:
            raise ValueError("this maker has no source to sample from; pass source=, an agent loop or a Sampler")
        rows = rows_of(prompts, references=references, labels=labels)
        return await sampled(self._source, rows, num_samples, sampling_params, self._judges)

    async def make_experience_list(
        self,
        prompts: Sequence[Prompt],
        *,
        references: Sequence[Any] | None = None,
        labels: Sequence[Any] | None = None,
        num_samples: int = 8,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        micro_batches: int | None = None,
        cost: Cost | None = None,
    ) -> list[Experience]:
        """`generate_samples` and `make_experience`, as micro-batches whose gradients add up: see `Experience.split`."""
        groups = await self.generate_samples(
            prompts, references=references, labels=labels, num_samples=num_samples, sampling_params=sampling_params
        )
        experience, state = await asyncio.to_thread(self.made, groups)
        self.take_on(state)
        return experience.split(token_budget=self._token_budget, micro_batches=micro_batches, cost=cost)[0]

    # Kept with the run

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON-able values, to the last digit."""
        return _as_dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: it is something else, or has no coefficient where this maker adapts one. The state stays as it was.
        """
        mapping("state", state, "batches, running and kl_coef to what state_dict gave")
        if set(state) != {"batches", "running", "kl_coef"}:
            raise ValueError(f"{dict(state)!r:.100} is not the state of an ExperienceMaker; it has batches, running and kl_coef")
        kl = self._first.kl
        if (kl is None) != (state["kl_coef"] is None):
            raise ValueError(
                f"kl_coef={state['kl_coef']} and adaptive_kl={kl} do not go together; give the maker the adaptive_kl that the run had"
            )
        batches = whole("batches", state["batches"])
        if batches < 0:
            raise ValueError(f"batches={batches} must be 0 or more")
        running = None if state["running"] is None else RunningMoments.from_json(json.dumps(state["running"]))
        self._state = MakerState(running, None if kl is None else AdaptiveKL(**asdict(kl) | {"coef": state["kl_coef"]}), batches)

    async def save(self, buffer: ReplayBuffer, *, step: int, state: MakerState | None = None) -> None:
        """Keep the state (that of now, or `state`) with the run, as that after the batch of `step`; durable on return.

        Do it before the trainer's checkpoint of that step.

        Raises:
            ProducerError: another maker saved under this name, and this one did not go on from there; nothing is overwritten.
        """
        found = await buffer.load_state(self.name, step=step)
        if found is not None and found["maker"] not in (self._id, self._goes_on_from):
            raise ProducerError(
                f"the run has a state of another ExperienceMaker by the name {self.name!r}: give each its own name=, or, to go on from "
                "that state, call resume(buffer, step=...) before the first batch"
            )
        await buffer.save_state(self.name, _as_dict(state or self._state) | {"maker": self._id}, step=step)

    async def resume(self, buffer: ReplayBuffer, *, step: int) -> None:
        """Go on from the state that the run had after the batch of `step`; from the beginning where it has none."""
        found = await buffer.load_state(self.name, step=step)
        if found is None:
            self._state = self._first
        else:
            self._goes_on_from = found.pop("maker")
            self.load_state_dict(found)


def _as_dict(state: MakerState) -> dict[str, Any]:
    return {
        "batches": state.batches,
        "running": None if state.running is None else json.loads(state.running.to_json()),
        "kl_coef": None if state.kl is None else state.kl.coef,
    }
