"""Shows that what is kept by step is there after a crash, to the last digit, and goes back when the run does."""

import math
from pathlib import Path

import pytest

from buffer import ReplayBuffer
from buffer.errors import ResumeRequiredError, StepError
from tests.buffer.groups import a_group, put_all, url

pytestmark = pytest.mark.usefixtures("backend")


async def test_a_rewind_gives_the_state_of_its_step_to_the_last_digit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, math.pi * 1e-300, 5e-324]
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(n) for n in range(1, 4)])
        for step in (1, 2, 3):
            await buffer.take("math", 1, step=step)
            await buffer.save_state("moments", {"step": step, "values": values}, step=step)
            await buffer.save_state("other", {"step": -step}, step=step)
        assert await buffer.load_state("moments", step=3) == {"step": 3, "values": values}
        await buffer.commit(1)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        with pytest.raises(ResumeRequiredError):
            await buffer.save_state("moments", {}, step=4)
        await buffer.resume(step=2)
        assert await buffer.load_state("moments", step=9) == {"step": 2, "values": values}
        assert await buffer.load_state("moments", step=1) == {"step": 1, "values": values}
        assert await buffer.load_state("moments", step=0) is None
        assert await buffer.load_state("other", step=2) == {"step": -2}


async def test_saving_again_replaces_until_the_step_is_committed(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(1)])
        await buffer.take("math", 1, step=1)
        await buffer.save_state("moments", {"n": 1}, step=1)
        await buffer.save_state("moments", {"n": 2}, step=1)
        await buffer.commit(1)
        with pytest.raises(StepError, match="step=1 lies at or before the committed step 1, where 'moments' is final"):
            await buffer.save_state("moments", {"n": 3}, step=1)
        assert await buffer.load_state("moments", step=5) == {"n": 2}


async def test_a_fork_has_the_states_of_its_step(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(n) for n in (1, 2)])
        for step in (1, 2):
            await buffer.take("math", 1, step=step)
            await buffer.save_state("moments", {"n": step}, step=step)
            await buffer.commit(step)
        await buffer.fork(url(tmp_path, "fork.db"), step=1)
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        await fork.resume(step=1)
        assert await fork.load_state("moments", step=2) == {"n": 1}


async def test_bad_arguments_are_refused_and_change_nothing(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await buffer.save_state("moments", {"n": 1}, step=1)
        for name, state, step, message in (
            ("", {}, 1, "name='' names no state"),
            ("a\0b", {}, 1, "null character"),
            ("moments", {"n": math.nan}, 1, "the state 'moments' cannot be stored"),
            ("moments", {"n": object()}, 1, "the state 'moments' cannot be stored"),
            ("moments", {}, 0, "step=0 must be a whole number, 1 or more"),
        ):
            with pytest.raises(ValueError, match=message):
                await buffer.save_state(name, state, step=step)
        assert await buffer.load_state("moments", step=1) == {"n": 1}
