"""An engine over servers sleeps as one: none samples before all have their weights back, whatever becomes of one meanwhile."""

import asyncio
import shutil
from pathlib import Path

import pytest

from agent_loop.engines.vllm_server import VLLMServerEngine
from agent_loop.errors import AdapterError, EngineDeadError, EngineError, RequestRefusedError
from agent_loop.sampling import SamplingParams
from agent_loop.testing import InFlight
from tests.engines.served import PARAMS, QUICK, adapted_logprobs, ask, asked, check_tokens, served, slow
from tests.engines.simulated_server import answer, write_adapter, write_weights


async def test_a_paused_engine_wakes_up_paused_unless_it_was_resumed_in_its_sleep() -> None:
    async with served(sleeps=True) as (engine, servers):
        for resumed in (False, True):
            await engine.pause()
            await engine.sleep()
            with pytest.raises(EngineError, match="wake_up"):
                await engine.pause()
            if resumed:
                await engine.resume()
            await engine.wake_up()
            assert [server.is_paused for server in servers] == [not resumed] * 2
            await engine.resume()
            check_tokens(await ask(engine, "after"))


@pytest.mark.parametrize("level", [1, 2])
async def test_a_replica_that_restarts_in_the_sleep_serves_when_the_engine_is_awake(level: int, tmp_path: Path) -> None:
    async with served(sleeps=True) as (engine, servers):
        await engine.update_weights(write_weights(tmp_path, 3), 1)
        await engine.sleep(level)
        await servers[0].kill()
        await servers[0].start()
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(ask(engine, f"waiting-{number}")) for number in range(4)]
            score = tasks.create_task(engine.score([5, 6, 7]))
            await engine.wake_up(weights_only=True)
            await engine.wake_up()
        for call in waiting:
            check_tokens(call.result(), seeds=(0, 3))
        assert len(score.result()) == 2
        await engine.until_serving(2)
        assert servers[0].label == servers[1].label
        check_tokens(await ask(engine, "after"), seeds=(0, 3))


async def test_a_replica_that_does_not_wake_up_with_the_others_is_woken_later(tmp_path: Path) -> None:
    async with served(sleeps=True) as (engine, servers):
        await engine.sleep()
        servers[0].fault("/wake_up", answer(500))
        await engine.wake_up()
        check_tokens(await ask(engine, "at-the-other"))
        await engine.until_serving(2)
        assert not servers[0].is_paused


async def test_the_sleep_that_drops_weights_needs_a_way_back(tmp_path: Path) -> None:
    async with served(sleeps=True) as (engine, servers):
        adapter = await engine.add_adapter("a", write_adapter(tmp_path / "one", 3))
        with pytest.raises(RequestRefusedError, match="drops adapters"):
            await engine.sleep(level=2)
        await engine.sleep()
        with pytest.raises(AdapterError, match="wake_up"):
            await engine.add_adapter("b", write_adapter(tmp_path / "one", 3))
        await engine.wake_up()
        response = await ask(engine, "adapted", adapter=adapter)
        assert response.logprobs == pytest.approx(adapted_logprobs(3, [5, 6, 7], response.token_ids.tolist()), abs=1e-5)
        await engine.remove_adapter("a")
        folder = write_weights(tmp_path, 4)
        await engine.update_weights(folder, 1)
        shutil.rmtree(folder)
        await engine.sleep(level=2)
        before = [asked(server) for server in servers]
        with pytest.raises(EngineDeadError, match="update_weights brings others"):
            await engine.wake_up()
        assert [asked(server) for server in servers] == before
        await engine.update_weights(write_weights(tmp_path, 5), 2)
        await engine.wake_up()
        check_tokens(await ask(engine, "after"), seeds=(0, 4, 5))


async def test_servers_that_are_left_asleep_are_woken_up_by_whoever_comes_next_and_refused_without_weights() -> None:
    async with served(1, make=slow, sleeps=True) as (engine, servers):
        async with asyncio.TaskGroup() as tasks:
            call = await InFlight(tasks, engine, [5, 6, 7], PARAMS.replace(max_tokens=1000), "cut").seen()
            await engine.sleep()
        assert call.task.result().finish_reason == "abort"
        async with VLLMServerEngine(servers[0].url, **QUICK) as other:
            check_tokens(await ask(other, "woken", SamplingParams(max_tokens=4)))
        await engine.sleep()
        await engine.close()
        assert not servers[0].is_paused, "a closed engine leaves its servers awake"
        async with VLLMServerEngine(servers[0].url, **QUICK) as other:
            await other.sleep(level=2)  # where its weights came from is no folder
        with pytest.raises(EngineError, match="restart it"):
            await VLLMServerEngine(servers[0].url, **QUICK).open()
