"""Shows that any sequence of calls, kills and reopenings leaves the buffer as a model of dictionaries says, and it answers as that does.

The model, the calls and what a kill leaves are in `tests/buffer/model`. To look longer, and for a failure made small:
`MILLRACE_MODEL_EXAMPLES=500 pytest --timeout 0 tests/buffer/test_model.py`.
"""

import inspect
import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from buffer import ReplayBuffer
from tests.buffer.model.machine import BufferMachine
from tests.buffer.model.on_postgres import PostgresMachine

LONGER = int(os.environ.get("MILLRACE_MODEL_EXAMPLES", "0"))
PUBLIC = {name for name, _ in inspect.getmembers(ReplayBuffer, inspect.iscoroutinefunction) if not name.startswith("_")}


ELSEWHERE = {"save_state", "load_state"}
"""They touch no group; `tests/buffer/test_states.py` shows what they do."""


def run(machine: type[BufferMachine], examples: int) -> None:
    machine.called.clear()
    options = settings(
        max_examples=LONGER or examples,
        stateful_step_count=50 if LONGER else 25,
        deadline=None,
        # To make a failure small takes minutes: more than a test has. What failed is kept, and tried first the next time.
        phases=tuple(Phase) if LONGER else (Phase.explicit, Phase.reuse, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)  # type: ignore[no-untyped-call]


def test_the_buffer_is_as_its_model() -> None:
    run(BufferMachine, 15)
    assert set(BufferMachine.called) == PUBLIC - {"close", *ELSEWHERE}, "every public method was called, and compared with the model"


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_on_a_server_too_it_is_as_its_model(backend: str) -> None:
    run(PostgresMachine, 4)
