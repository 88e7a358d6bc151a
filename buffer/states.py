"""What parts of a run keep with it: running moments, coefficients, anything small that must go back when the run does."""

import json
from collections.abc import Mapping
from typing import Any

from buffer import arguments as args
from buffer import operations, queries
from buffer.access import Access
from buffer.codec import to_json
from buffer.numbers import refuse_text
from buffer.operations import SaveState


class States(Access):
    """How a `ReplayBuffer` keeps small states by step."""

    async def save_state(self, name: str, state: Mapping[str, Any], *, step: int) -> None:
        """Keep `state` as that of `name` after the batch of `step`; durable on return. Again replaces it.

        `resume(step=s)` forgets what was saved at later steps, and a fork at `s` does not get it. Save it before the trainer's
        checkpoint of that step, so that whoever resumes from the checkpoint finds it.

        Args:
            name: of the part, such as "experience/math".
            state: JSON-able; floats come back to the last digit.
            step: of the trainer, behind the last committed one.

        Raises:
            ResumeRequiredError: an earlier process consumed batches without committing them; call `resume` first.
            StepError: `step` is committed.
            ValueError: the state is not JSON.
        """
        _check_name(name)
        self._check_open()
        self._check_resumed()
        text = to_json(state, f"the state {name!r}")
        await self._write(operations.save_state, SaveState(name, args.step_number(step), text))

    async def load_state(self, name: str, *, step: int) -> dict[str, Any] | None:
        """The state of `name` as the batch of `step` left it: that of the last step up to it that has one; None where none has."""
        _check_name(name)
        found = await self._read(queries.state_at, name, args.whole_number("step", step, at_least=0))
        return None if found is None else json.loads(found[1])


def _check_name(name: str) -> None:
    if not name or not isinstance(name, str):
        raise ValueError(f"name={name!r} names no state; give text, such as 'experience/math'")
    refuse_text("name", name)
