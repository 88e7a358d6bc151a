"""Checks in processes: what loops, eats memory or dies is killed at the deadline, in Python and in C, and the pool goes on."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent_loop import RewardFunction, RewardSet, Sampler
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import RewardClosedError, RewardError, RewardTimeoutError
from agent_loop.rewards.processes import ProcessReward
from buffer import RolloutGroup
from tests.agent_loop.judged import Whole, rollout

ROOT = Path(__file__).parents[2]
CHECKS = "tests.agent_loop.checks:"


def reward_of(name: str = "by_name", **options: Any) -> ProcessReward:
    return ProcessReward(CHECKS + name, **{"timeout": 20.0, "workers": 1, "path": [ROOT], **options})


def alive(process: int) -> bool:
    """A zombie, which only waits to be counted, does not live."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children() -> set[int]:
    """Of this process, those that live."""
    found = set[int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            head, _, tail = stat.read_text().rpartition(")")
            if tail.split()[1] == str(os.getpid()) and tail.split()[0] != "Z":
                found.add(int(head.split()[0]))
    return found


async def until(holds: Callable[[], bool]) -> None:
    """Wait for another process."""

    def poll() -> None:
        while not holds():
            time.sleep(0.005)

    await asyncio.to_thread(poll)


async def test_it_judges_by_text_and_row_in_several_processes_at_once() -> None:
    async with reward_of("length", workers=2) as reward:
        scores = await asyncio.gather(*[reward(rollout(n, "x" * n)) for n in range(20)])
    assert scores == list(range(20))


@pytest.mark.parametrize("does", ["loop", "loop_in_c"])
async def test_an_endless_loop_is_killed_at_the_deadline_and_the_pool_goes_on(does: str) -> None:
    before = children()
    async with reward_of(timeout=1.0) as reward:
        with pytest.raises(RewardTimeoutError, match=r"took longer than 1 s to check, and was killed"):
            await reward(rollout(does=does))
        assert await reward(rollout(does="length")) == 4.0
    assert children() == before


@pytest.mark.parametrize(("does", "said"), [("bomb", "wanted more than memory_mb"), ("bomb_in_c", "its worker died \\(signal SIGSEGV")])
async def test_a_memory_bomb_dies_within_its_bound_and_the_pool_goes_on(does: str, said: str) -> None:
    async with reward_of(memory_mb=256) as reward:
        with pytest.raises(RewardError, match=said):
            await reward(rollout(does=does))
        assert await reward(rollout(does="length")) == 4.0


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("leave", "raised SystemExit: no more of this"),
        ("die", "its worker died (exit status 3)"),
        ("crash", "its worker died (signal SIGSEGV"),
        ("word", "raised ValueError: could not convert string to float: 'five'"),
        ("nan", "gave nan; it must give a finite number, or None"),
        ("huge", "raised OverflowError"),
        ("absent", "raised KeyError: 'absent'"),
    ],
)
async def test_what_goes_wrong_is_told_and_the_pool_goes_on(does: str, said: str) -> None:
    async with reward_of() as reward:
        with pytest.raises(RewardError) as caught:
            await reward(rollout(does=does))
        assert said in str(caught.value)
        assert await reward(rollout(does="length")) == 4.0
        assert await reward(rollout(does="no_say")) is None


@pytest.mark.parametrize(
    ("says", "said"),
    [
        ('{"id": 77, "score": 1}', "answered something else"),
        ("[]", "is no mapping"),
        ("\0", "is no JSON"),
        ("[" * 50_000, "is no JSON"),
        ("x" * 200_000, "died or answered nonsense"),
    ],
)
async def test_a_worker_is_not_believed(says: str, said: str) -> None:
    async with reward_of() as reward:
        with pytest.raises(RewardError, match=said):
            await reward(rollout(does="forge", says=says))
        assert await reward(rollout(does="length")) == 4.0


async def test_what_a_check_prints_and_reads_is_not_the_protocol() -> None:
    async with reward_of("chatter") as reward:
        assert await reward(rollout()) == 1.0


async def test_neither_secrets_nor_descriptors_are_inherited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLRACE_SECRET", "x")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    async with reward_of("environment", environment={"GIVEN": "yes"}) as reward:
        assert await reward(rollout()) == 1.0
    os.close(descriptor)


async def test_a_row_that_is_no_json_fails_its_rollout_whoever_asks() -> None:
    async with reward_of("length") as reward, SimulatedEngine(lengths=3) as engine:
        inputs = [{"prompt_ids": [1], "image": object()}]
        (response,) = await Sampler(engine).generate_and_score(inputs, reward)
        assert "cannot be stored" in str(response.sequences[0].error)
        with pytest.raises(RewardError, match="reward length raised ValueError"):
            await RewardSet({"length": reward})(rollout(image=object()))


async def test_it_may_be_opened_again_but_not_twice_at_once() -> None:
    reward = reward_of("length")
    for _ in range(2):
        async with reward:
            assert await reward(rollout()) == 4.0
            with pytest.raises(RuntimeError, match="it is open already"):
                async with reward:
                    raise AssertionError
            assert await reward(rollout()) == 4.0


async def test_a_worker_is_replaced_after_its_checks_and_when_it_died_between_two() -> None:
    async with reward_of("many", max_checks=2) as reward:
        assert [await reward(rollout()) for _ in range(5)] == [1.0, 2.0, 1.0, 2.0, 1.0]
        (worker,) = children()
        os.kill(worker, signal.SIGKILL)
        await until(lambda: not alive(worker))
        with suppress(RewardError):  # where asyncio has not been told yet
            assert await reward(rollout()) == 1.0
        assert await reward(rollout()) in (1.0, 2.0)


async def test_cancelled_in_mid_check_it_is_killed_with_what_it_started(tmp_path: Path) -> None:
    before, tasks_before, file = children(), asyncio.all_tasks(), tmp_path / "processes"
    async with reward_of("children") as reward, asyncio.TaskGroup() as tasks:
        call = tasks.create_task(reward(rollout(file=str(file))))
        await until(lambda: file.exists() and len(file.read_text().split()) == 2)
        processes = [int(one) for one in file.read_text().split()]
        assert all(map(alive, processes))
        call.cancel()
    assert children() == before
    assert not any(map(alive, processes))
    assert asyncio.all_tasks() == tasks_before


async def test_closed_in_mid_check_who_waits_is_told() -> None:
    told = Counter[str]()

    async def ask(reward: ProcessReward) -> None:
        try:
            await reward(rollout())
        except RewardError as error:
            told[type(error).__name__] += 1

    before = children()
    async with asyncio.TaskGroup() as tasks, reward_of("loop", timeout=600, workers=2) as reward:
        calls = [tasks.create_task(ask(reward)) for _ in range(4)]
        await until(lambda: len(children() - before) == 2)
        assert not any(call.done() for call in calls)
    assert told.total() == 4
    with pytest.raises(RewardClosedError, match="it is not open; use it"):
        await reward(rollout())


def test_when_this_process_is_killed_its_workers_end_even_in_a_loop(tmp_path: Path) -> None:
    program = f"""
import asyncio, os
from agent_loop.rewards.processes import ProcessReward
from buffer import RolloutGroup
from tests.agent_loop.judged import Whole, rollout
async def main():
    async with ProcessReward("{CHECKS}loop", timeout=600) as reward, asyncio.TaskGroup() as tasks:
        tasks.create_task(reward(rollout()))
        await asyncio.sleep(0.2)
        print(*open(f"/proc/self/task/{{os.getpid()}}/children").read().split(), flush=True)
asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as parent:
        assert parent.stdout is not None
        (worker,) = map(int, parent.stdout.readline().split())
        assert alive(worker)
        parent.kill()
    while alive(worker):
        time.sleep(0.005)


async def test_in_a_set_a_check_that_hangs_is_skipped() -> None:
    functions = {
        "length": lambda state: float(len(state.text)),
        "check": RewardFunction(reward_of(timeout=1.0), on_error="skip", timeout=60, retries=1, back_off=0.0),
    }
    async with RewardSet(functions) as rewards:
        judgement = await rewards(rollout(does="loop"))
        assert judgement.score == 8.0
        assert (await rewards(rollout(1, does="length"))).score == 8.0
    own = rewards.statistics["check", ""]
    assert (own.skipped, own.retries, own.failures, own.timeouts, own.parts) == (1, 1, 2, 2, 1)


async def test_a_wait_for_a_worker_is_no_part_of_a_checks_time() -> None:
    check = reward_of("length", workers=1)
    group = RolloutGroup(7, [rollout(index) for index in range(4)])
    async with check, asyncio.TaskGroup() as tasks:
        await check._slots.acquire()  # as long as somebody else is checked
        asked = tasks.create_task(Whole(reward=check, reward_timeout=0.05, max_attempts=1).generate_group(group))
        await asyncio.sleep(0.2)
        check._slots.release()
        await asked
    assert [state.score for state in group.rollouts] == [4.0] * 4
    in_a_set = RewardSet({"check": reward_of(workers=3), "few": RewardFunction(reward_of(workers=9), concurrency=2), "plain": len})
    assert [function.slots for function in in_a_set.functions.values()] == [3, 2, 32]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("tests.agent_loop.absent:f", "ModuleNotFoundError: No module named 'tests.agent_loop.absent'"),
        (CHECKS + "absent", "AttributeError"),
        (CHECKS + "not_a_function", "not_a_function is a int, no function"),
    ],
)
async def test_a_function_that_is_not_there_is_told_at_opening(function: str, said: str) -> None:
    before = children()
    with pytest.raises(ValueError, match="cannot be imported by a worker") as caught:
        async with ProcessReward(function, path=[ROOT]):
            raise AssertionError
    assert said in str(caught.value)
    assert children() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"function": "print"}, "must be text like"),
        ({"function": "a b:c"}, "must be text like"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ProcessReward(**{"function": "a:b", **options})
