"""Writing down what parts of a run keep with it by step."""

from collections.abc import Sequence
from dataclasses import dataclass

from buffer import queries as q
from buffer.errors import StepError
from buffer.operations.consuming import committed_step
from buffer.queries import Transaction


@dataclass(frozen=True, slots=True)
class SaveState:
    """A wish to keep `state` (JSON) as that of `name` after `step`."""

    name: str
    step: int
    state: str


def save_state(tx: Transaction, requests: Sequence[SaveState]) -> list[None]:
    """Write each down."""
    for request in requests:
        committed = committed_step(tx.conn)
        if committed is not None and request.step <= committed:
            raise StepError(
                f"step={request.step} lies at or before the committed step {committed}, where {request.name!r} is final; "
                f"save a state at step {committed + 1} or later, before it is committed"
            )
        q.record_state(tx.conn, request.name, request.step, request.state)
    return [None] * len(requests)
