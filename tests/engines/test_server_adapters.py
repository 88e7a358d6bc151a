"""Adapters are in all replicas or in none, whatever those do meanwhile, and no request under one is answered without it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent_loop.engines.base import Completion
from agent_loop.engines.vllm_server import VLLMServerEngine
from agent_loop.errors import AdapterError, EngineError, RequestRefusedError
from agent_loop.testing import InFlight
from tests.engines.served import PARAMS, QUICK, adapted_logprobs, ask, check_tokens, served, slow
from tests.engines.simulated_server import SimulatedServer, answer, break_off, write_adapter, write_weights

LOAD = "/v1/load_lora_adapter"


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """Where copies of adapters lie; none is left in the end."""
    folder = tmp_path / "shared"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir())


def held(server: SimulatedServer) -> list[str]:
    """The adapters that a server has, without the part of their names that is made once."""
    return [adapter.name.rpartition(":")[2] for adapter in server.engine.adapters]


def check_adapted(completion: Completion, seed: int, version: int = 0) -> None:
    np.testing.assert_allclose(completion.logprobs, adapted_logprobs(seed, [5, 6, 7], completion.token_ids.tolist()), atol=1e-5)
    assert set(completion.versions.tolist()) == {version}


@pytest.mark.parametrize("status", [400, 500, 503])
async def test_where_one_replica_refuses_an_adapter_none_keeps_it(status: int, tmp_path: Path, shared: Path) -> None:
    async with served(weights_folder=shared) as (engine, servers):
        await engine.add_adapter("a", write_adapter(tmp_path / "one", 3))
        servers[1].fault(LOAD, answer(status))
        with pytest.raises(AdapterError, match=rf"a@1 was not loaded.*{servers[1].url} answered {status}"):
            await engine.add_adapter("a", write_adapter(tmp_path / "two", 4))
        assert [held(server) for server in servers] == [["a@0"], ["a@0"]]
        check_adapted(await ask(engine, "still", adapter="a"), 3)
        assert all(one.serving for one in engine.replicas())


async def test_a_replica_that_is_lost_in_a_load_serves_again_when_it_has_the_adapter(tmp_path: Path, shared: Path) -> None:
    async with served(weights_folder=shared) as (engine, servers):
        servers[1].fault(LOAD, break_off)
        adapter = await engine.add_adapter("a", write_adapter(tmp_path / "one", 3), 5)
        await engine.until_serving(2)
        assert [server.calls.count(LOAD) for server in servers] == [1, 2]
        assert [held(server) for server in servers] == [["a@5"], ["a@5"]]
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(ask(engine, f"r{number}", adapter=adapter)) for number in range(4)]
        for call in calls:
            check_adapted(call.result(), 3, 5)


async def test_what_a_restarted_or_late_server_answers_is_of_the_adapter_too(tmp_path: Path, shared: Path) -> None:
    """It comes back with the label that is in force: only the adapter that it lacks tells that it was restarted."""
    async with served(2, make=slow, weights_folder=shared, health_seconds=60.0) as (engine, servers), SimulatedServer(slow) as late:
        await engine.add_adapter("a", write_adapter(tmp_path / "one", 3))
        async with asyncio.TaskGroup() as tasks:
            long = PARAMS.replace(max_tokens=400)
            calls = [await InFlight(tasks, engine, [5, 6, 7], long, f"r{number}", "a").seen(2) for number in range(4)]
            await servers[0].kill()
            await servers[0].start()
        for call in calls:
            check_adapted(call.task.result(), 3)
        await engine.until_serving(2)
        assert held(servers[0]) == ["a@0"]
        await engine.add_replica(late.url)
        assert held(late) == ["a@0"]
        await late.engine.remove_adapter(late.engine.adapters[0].name)  # behind its back: it refuses what it does not have
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(ask(engine, f"refused-{number}", adapter="a")) for number in range(3)]
        for one in asking:
            check_adapted(one.result(), 3)
        await engine.until_serving(3)
        assert held(late) == ["a@0"]


async def test_probes_find_a_server_that_lost_its_adapters(tmp_path: Path, shared: Path) -> None:
    async with served(weights_folder=shared) as (engine, servers):
        await engine.add_adapter("a", write_adapter(tmp_path / "one", 3))
        await servers[0].engine.remove_adapter(servers[0].engine.adapters[0].name)
        while not held(servers[0]):
            check_adapted(await ask(engine, "while", adapter="a"), 3)
        check_tokens(await ask(engine, "model"))


async def test_a_cancelled_load_comes_to_its_end_and_is_undone(tmp_path: Path, shared: Path) -> None:
    async with served(weights_folder=shared) as (engine, servers):
        for turns in (1, 5, 20, 60):
            adding = asyncio.create_task(engine.add_adapter("a", write_adapter(tmp_path / "one", 3)))
            for _ in range(turns):
                await asyncio.sleep(0)
            adding.cancel()
            await asyncio.wait([adding])
            if adding.cancelled():
                with pytest.raises(RequestRefusedError, match="unknown adapter"):
                    await ask(engine, "none", adapter="a")
            else:
                await engine.remove_adapter("a")
        await engine.update_weights(write_weights(tmp_path, 2), 1)
    for server in servers:
        assert not server.engine.adapters


async def test_a_closed_engine_leaves_no_adapter_at_servers_that_run_on(tmp_path: Path, shared: Path) -> None:
    async with SimulatedServer() as server:
        async with VLLMServerEngine(server.url, weights_folder=shared, **QUICK) as engine:
            await engine.add_adapter("a", write_adapter(tmp_path / "one", 3))
            assert held(server) == ["a@0"]
        assert not held(server)


async def test_adapters_need_servers_that_take_them_and_refuse_what_they_lack(tmp_path: Path) -> None:
    for hidden, options in (({LOAD}, {}), (set(), {"adapters": False})):
        async with SimulatedServer(**options) as server:  # type: ignore[arg-type]
            server.hidden = hidden
            async with VLLMServerEngine(server.url, **QUICK) as engine:
                assert not engine.capabilities.adapters
                with pytest.raises(RequestRefusedError, match="has no adapters"):
                    await engine.add_adapter("a", write_adapter(tmp_path / "one", 3))
    async with SimulatedServer(strict=False) as lax:
        with pytest.raises(EngineError, match="VLLM_SKIP_MODEL_NAME_VALIDATION"):
            await VLLMServerEngine(lax.url, **QUICK).open()
