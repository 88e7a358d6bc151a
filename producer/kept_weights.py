"""`KeptWeights`: the weights of tasks as they change, kept with the run, so that a run that is resumed goes on with them."""

from collections.abc import Mapping
from typing import Any

from buffer import ReplayBuffer
from producer.shares import checked_weights

_STATE = "tasks/weights"
"""Under this name the run keeps, by task, the weight that the program gave it and the one that was in force."""


class KeptWeights:
    """Weights of now, and what is kept of them. Of the program's weight and one that was set later, the last that changed holds.

    Args:
        buffer: where they are kept, by step.
        given: the weights that the program says, by task.
    """

    def __init__(self, buffer: ReplayBuffer, given: Mapping[str, float]) -> None:
        self._buffer, self._given = buffer, dict(checked_weights(given))
        self._asked: dict[str, float] = {}
        self._kept: dict[str, Any] = {}
        self.now: Mapping[str, float] = dict(self._given)

    def ask(self, name: str, weight: float) -> None:
        """A weight from the next batch on; `ValueError` as of `change`."""
        self.change({name: weight})
        self._asked[name] = weight

    def asked(self) -> Mapping[str, float]:
        """What was asked for since `settle`."""
        return dict(self._asked)

    def settle(self, asked: Mapping[str, float]) -> None:
        """A batch with what was asked for has been consumed: from now on it is in what is kept."""
        self._asked = {name: weight for name, weight in self._asked.items() if asked.get(name) != weight}

    def change(self, changed: Mapping[str, float]) -> None:
        """Other weights for some; `ValueError` if one is none, or the last above 0 would go."""
        if unknown := [name for name in changed if name not in self._given]:
            raise ValueError(f"there is no task {unknown[0]!r}; the tasks are {sorted(self._given)}")
        self.now = dict(checked_weights({**self.now, **changed}))

    async def as_after(self, step: int) -> None:
        """Those that the batch of `step` left, but for what was asked for since."""
        self._kept = await self._buffer.load_state(_STATE, step=step) or {}
        kept = {name: of["weight"] for name, of in self._kept.items() if self._given.get(name) == of["given"]}
        # All that are left may have been set to 0, others having been removed or undone: then the program's hold.
        found = ({**self._given, **kept, **self._asked}, {**self._given, **self._asked}, self._given)
        self.now = dict(next(weights for weights in found if any(weights.values())))

    async def keep(self, step: int) -> None:
        """Write them down as those after the batch of `step`, where anything has changed.

        Raises:
            StepError, ResumeRequiredError: see `ReplayBuffer.save_state`.
        """
        changed = {name: weight for name, weight in self.now.items() if name in self._kept or weight != self._given[name]}
        state = self._kept | {name: {"given": self._given[name], "weight": weight} for name, weight in changed.items()}
        # What a batch of this step that failed has left is written over.
        if state != (await self._buffer.load_state(_STATE, step=step) or {}):
            await self._buffer.save_state(_STATE, state, step=step)
