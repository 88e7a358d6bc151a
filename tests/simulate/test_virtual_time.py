"""Virtual time: hours pass in milliseconds, two runs are the same, and nothing outside of the loop is ever overtaken in silence."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_loop.rewards import judge
from buffer import ReplayBuffer, RolloutState
from buffer.errors import ReplayBufferError
from producer.simulate.virtual_time import VirtualTimeError, VirtualTimeLoop, run


@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=20))
def test_timers_come_in_order_at_their_times(delays: list[float]) -> None:
    seen: list[tuple[float, float]] = []

    async def sleeper(delay: float) -> None:
        await asyncio.sleep(delay)
        seen.append((asyncio.get_running_loop().time(), delay))

    async def main() -> float:
        async with asyncio.TaskGroup() as tasks:
            for delay in delays:
                tasks.create_task(sleeper(delay))
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(max(delays), abs=1e-6)
    assert seen == sorted(seen)
    assert all(at == pytest.approx(delay, abs=1e-6) for at, delay in seen)


def test_a_day_takes_no_time() -> None:
    async def main() -> int:
        for _ in range(24 * 60):
            await asyncio.sleep(60)
        return int(asyncio.get_running_loop().time())

    began = time.process_time()
    assert run(main()) == 86400
    assert time.process_time() - began < 86400 / 1000


def test_an_executors_work_takes_no_virtual_time_and_its_errors_reach_who_asked() -> None:
    async def main() -> tuple[int, float]:
        async with asyncio.timeout(0.001):  # real time: the work takes far longer
            value = await asyncio.to_thread(lambda: (time.sleep(0.02), 7)[1])
        with pytest.raises(KeyError):
            await asyncio.get_running_loop().run_in_executor(None, {}.__getitem__, "absent")
        return value, asyncio.get_running_loop().time()

    assert run(main()) == (7, 0.0)


def test_a_thread_that_reports_to_the_loop_ends_the_run() -> None:
    async def main() -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def work() -> None:
            with pytest.raises(VirtualTimeError, match="'a-thread' reports"):
                loop.call_soon_threadsafe(done.set)

        thread = threading.Thread(target=work, name="a-thread")
        thread.start()
        thread.join()
        await asyncio.wait_for(done.wait(), 3600)

    with pytest.raises(VirtualTimeError, match="does not wait for threads"):
        run(main())


def test_who_waits_for_ever_is_told() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(VirtualTimeError, match="no timer is set"):
        run(main())


def test_a_buffer_with_threads_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with ReplayBuffer.open(f"sqlite:///{tmp_path}/run.db"):
            pass

    with pytest.raises(ReplayBufferError, match="InlineReplayBuffer"):
        run(main())


def test_a_sync_reward_is_called_in_the_loop() -> None:
    def reward(state: RolloutState) -> float:
        time.sleep(0.02)
        return float(threading.get_ident())

    async def main() -> float:
        judgement = await judge(reward, RolloutState(0, 0, row={"prompt": "1"}), timeout=0.001, threads=asyncio.Semaphore(1))
        assert asyncio.get_running_loop().time() == 0.0
        return judgement.score

    assert run(main()) == threading.get_ident()


def test_sockets_and_processes_are_refused() -> None:
    async def listen() -> None:
        await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)

    async def process() -> None:
        await asyncio.create_subprocess_exec(sys.executable, "-c", "")

    for main in (listen, process):
        with pytest.raises(VirtualTimeError, match="no place in virtual time"):
            run(main())


def test_ctrl_c_cancels_a_run_in_virtual_time() -> None:
    program = (
        "import asyncio\nfrom producer.simulate.virtual_time import run\n"
        "async def main():\n    print('on', flush=True)\n    while True: await asyncio.sleep(60)\n"
        "run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(2)
        _, said = child.communicate(timeout=60)
    assert b"KeyboardInterrupt" in said


def test_the_clock_begins_at_zero_for_each_run() -> None:
    async def now() -> float:
        assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop)
        return asyncio.get_running_loop().time()

    assert [run(now()), run(now())] == [0.0, 0.0]
