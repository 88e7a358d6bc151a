"""`EngineScorer`: the log-probabilities of a batch by engines that have `score`, where the trainer's process has no model to ask."""

import asyncio
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent_loop.arguments import at_least, instance
from agent_loop.engines.base import Engine
from buffer.rollout import RolloutGroup
from producer.experience.attached import Attached
from producer.experience.scorable import Scorable, scorable


class EngineScorer:
    """Scores the responses of a batch by the policy's engine, by a reference's, or both.

    Engines score at temperature 1 and without truncation. An engine that also sampled the tokens, at the same version, says how far its
    own numbers are reproducible, not how far the trainer's are from them.
    """

    def __init__(self, engine: Engine | None = None, *, reference: Engine | None = None, max_in_flight: int = 64) -> None:
        """Say which engines; they are open when `attached` is called.

        Args:
            engine: of the policy that is trained; `engine.with_adapter(name)` where that is an adapter.
            reference: of the reference policy, for an adapter the engine without it.
            max_in_flight: requests at once to each.

        Raises:
            ValueError: there is no engine, or `max_in_flight` is below 1.
        """
        instance("engine", engine, Engine | None, "an Engine, or None")
        instance("reference", reference, Engine | None, "an Engine, or None")
        at_least("max_in_flight", max_in_flight, 1)
        if engine is None and reference is None:
            raise ValueError("an EngineScorer needs an engine or a reference")
        self.engine, self.reference, self.max_in_flight = engine, reference, max_in_flight

    async def attached(self, groups: Iterable[RolloutGroup]) -> Attached:
        """What `make_experience` takes, of all rollouts that can be trained on.

        Cancelling it calls off what is in flight.

        Raises:
            ValueError: an engine has no `score`, or a rollout has media.
            RequestRefusedError: ids outside the vocabulary, or a response longer than the engine takes.
            RuntimeError: the weights changed meanwhile, so that the numbers are not of one policy.
        """
        rollouts = list(scorable(groups))
        version = None if self.engine is None else self.engine.version
        trainer = {} if self.engine is None else await self._scored(self.engine, rollouts)
        reference = {} if self.reference is None else await self._scored(self.reference, rollouts)
        return Attached(reference=reference, trainer=trainer, version=version, temperature=1.0)

    async def _scored(self, engine: Engine, rollouts: Sequence[Scorable]) -> dict[str, ArrayLike]:
        if not engine.capabilities.score:
            raise ValueError(f"{type(engine).__name__} gives no log-probabilities of given tokens; take one with capabilities.score")
        before, free = engine.version, asyncio.Semaphore(self.max_in_flight)

        async def one(rollout: Scorable) -> NDArray[np.float32]:
            async with free:
                return await engine.score(rollout.token_ids, start=rollout.start)

        try:
            async with asyncio.TaskGroup() as tasks:
                running = {rollout.rollout_id: tasks.create_task(one(rollout)) for rollout in rollouts}
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        if engine.version != before:
            raise RuntimeError(f"the weights went from version {before} to {engine.version} while a batch was scored; score, then update")
        return {rollout_id: task.result() for rollout_id, task in running.items()}
