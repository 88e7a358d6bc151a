"""Shows that an engine over several servers loses and doubles no token, whatever its replicas do: on real sockets, over simulated vLLM."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from agent_loop import create_sampler
from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Completion, Engine, WeightSource
from agent_loop.engines.vllm_server import VLLMServerEngine
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError, RequestRefusedError, WeightUpdateError
from agent_loop.sampling import SamplingParams
from agent_loop.testing import EngineSuite, InFlight
from tests.engines.served import PARAMS, QUICK, REFERENCE, adapted_logprobs, ask, asked, check_tokens, fast, served, slow
from tests.engines.simulated_server import GENERATE, SimulatedServer, answer, hang, raw_stream, write_adapter, write_weights


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def servers() -> AsyncIterator[list[SimulatedServer]]:
    async with SimulatedServer(fast, sleeps=True) as one, SimulatedServer(fast, sleeps=True) as other:
        yield [one, other]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(servers: list[SimulatedServer]) -> AsyncIterator[Engine]:
    async with VLLMServerEngine([server.url for server in servers]) as engine:
        yield engine


class TestOverSimulatedServers(EngineSuite):
    tolerance = 1e-5

    @pytest.fixture(autouse=True)
    def _places(self, servers: list[SimulatedServer], tmp_path: Path) -> None:
        self.servers, self.folder = servers, tmp_path

    def make_engine(self) -> Engine:
        return VLLMServerEngine([server.url for server in self.servers], adopt=True)

    async def reference_logprobs(
        self, engine: Engine, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
    ) -> NDArray[np.floating]:
        return REFERENCE.reference_logprobs(prompt_ids, response_ids, 0, SamplingParams(temperature=temperature))

    def original_weights(self, engine: Engine) -> WeightSource:
        return write_weights(self.folder, 0)

    def new_weights(self, engine: Engine) -> WeightSource:
        return write_weights(self.folder, 1)

    def adapter_sources(self, engine: Engine) -> Sequence[WeightSource]:
        return [write_adapter(self.folder / f"adapter-{seed}", seed) for seed in (3, 4)]

    async def adapted_logprobs(
        self, engine: Engine, adapter: Adapter, source: WeightSource, prompt_ids: Sequence[int], response_ids: Sequence[int]
    ) -> NDArray[np.floating]:
        return adapted_logprobs(int(str(source)[-1]), prompt_ids, response_ids)


async def test_a_sampler_over_servers_is_made_by_name(servers: list[SimulatedServer]) -> None:
    async with create_sampler("vllm_server", [server.url for server in servers], adopt=True, seed=3) as sampler:
        responses = await sampler.sample([[5, 6], [7, 8]], PARAMS, num_samples=2)
    for prompt, response in zip(([5, 6], [7, 8]), responses, strict=True):
        assert len({sequence.token_ids.tobytes() for sequence in response.sequences}) == 2
        for sequence in response.sequences:
            assert len(sequence.token_ids) == 40
            expected = REFERENCE.reference_logprobs(prompt, sequence.token_ids.tolist(), 0)
            np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-5)


# --- which replica


async def test_requests_go_to_the_least_loaded_replica() -> None:
    async with served(make=slow) as (engine, servers), asyncio.TaskGroup() as tasks:
        calls = [InFlight(tasks, engine, [5, 6], PARAMS, f"r{number}") for number in range(10)]
        for call in calls:
            await call.seen()
        assert [server.engine.running for server in servers] == [5, 5]
        assert [one.in_flight for one in engine.replicas()] == [5, 5]


async def test_a_session_stays_with_its_replica_until_that_is_much_busier() -> None:
    async with served(make=slow, affinity_slack=2) as (engine, servers):
        for turn in range(4):
            await ask(engine, f"turn-{turn}", PARAMS.replace(max_tokens=2), session_id="a b/ü")
        assert sorted(map(asked, servers)) == [0, 4]
        home = max(servers, key=asked)
        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(ask(engine, f"s{number}", session_id="a b/ü"))
        assert asked(home) < 8


async def test_no_more_requests_than_the_bound_are_at_a_replica_and_others_come_in_order() -> None:
    async with served(make=slow, max_in_flight=3) as (engine, servers), asyncio.TaskGroup() as tasks:
        ended: list[int] = []

        async def one(number: int) -> None:
            await ask(engine, f"r{number}", PARAMS.replace(max_tokens=4))
            ended.append(number)

        calls = [tasks.create_task(one(number)) for number in range(24)]
        while not all(call.done() for call in calls):
            assert all(server.engine.running + server.engine.waiting <= 3 for server in servers)
            await asyncio.wait([call for call in calls if not call.done()], return_when=asyncio.FIRST_COMPLETED)
        # When one began, all before it had ended but the five that were in flight with it.
        assert all(ended.index(number) >= number - 5 for number in range(24)), ended


# --- replicas that fail


async def test_what_a_killed_replica_had_goes_on_elsewhere_with_every_token_once() -> None:
    async with served(make=slow) as (engine, servers):
        async with asyncio.TaskGroup() as tasks:
            calls = [InFlight(tasks, engine, [5, 6, 7], PARAMS.replace(seed=number), f"r{number}") for number in range(12)]
            for call in calls:
                await call.seen(3)
            await servers[0].kill()
        for call in calls:
            completion = call.task.result()
            assert (len(completion.token_ids), completion.finish_reason) == (40, "length")
            assert completion.token_ids.tolist() == call.tokens
            check_tokens(completion)
        assert [one.serving for one in engine.replicas()] == [False, True]
        assert "cannot be reached" in engine.replicas()[0].cause
        await engine.health()
        await servers[0].start()
        await engine.until_serving(2)


async def test_a_structured_response_whose_replica_dies_begins_anew_and_is_shown_at_its_end() -> None:
    """The structure begins at the first token of a request: what came before the end of its replica cannot be gone on with."""
    params = PARAMS.replace(structured_outputs={"regex": ".*"}, ignore_eos=False, top_logprobs=2)
    likely = [{"token_id": token, "logprob": -1.0, "rank": token + 1} for token in range(3)]
    choice = {"token_ids": [9], "logprobs": {"content": [{"token_id": 9, "logprob": -1.0, "top_logprobs": likely}]}}
    begun = b"data: " + json.dumps({"request_id": "a", "choices": [choice]}).encode() + b"\n\n"
    async with served(tokenizer=True) as (engine, servers):
        whole, pieces = await ask(engine, "whole", params), list[Completion]()
        for server in servers:
            server.fault(GENERATE, raw_stream(begun))
        response = await ask(engine, "structured", params, on_tokens=pieces.append)
        assert not any(server.faults[GENERATE] for server in servers)
        assert [piece.token_ids.tolist() for piece in pieces] == [response.token_ids.tolist()] == [whole.token_ids.tolist()]
        check_tokens(response)
        assert response.top is not None
        assert response.top.token_ids.shape == (len(whole.token_ids), 2)
        with pytest.raises(RequestRefusedError, match="made of what JSON has"):
            await ask(engine, "odd", params.replace(structured_outputs={"json": {"type": object()}}))


async def test_a_restarted_server_is_given_the_weights_in_force_before_it_serves(tmp_path: Path) -> None:
    async with served() as (engine, servers):
        await engine.update_weights(write_weights(tmp_path, 3), 1)
        await servers[0].kill()
        while engine.replicas()[0].serving:
            check_tokens(await ask(engine, "while-down"), seeds=(0, 3))
        await servers[0].start()
        await engine.until_serving(2)
        before = asked(servers[0])
        for number in range(4):
            completion = await ask(engine, f"r{number}")
            check_tokens(completion, seeds=(0, 3))
            assert set(completion.versions.tolist()) == {1}
        assert asked(servers[0]) > before


async def test_a_server_that_restarts_unnoticed_is_found_out_by_the_first_response_which_says_what_sampled_it(tmp_path: Path) -> None:
    async with served(1, health_seconds=60.0) as (engine, servers):
        await engine.update_weights(write_weights(tmp_path, 3), 1)
        await servers[0].kill()
        await servers[0].start()
        first, second = await ask(engine, "first"), await ask(engine, "second")
        for completion in (first, second):
            check_tokens(completion, seeds=(0, 3))
        assert set(second.versions.tolist()) == {1}


async def test_what_a_restarted_server_began_is_of_the_weights_that_sampled_it_also_when_it_goes_on_with_others(tmp_path: Path) -> None:
    async with served(1, make=slow, health_seconds=60.0) as (engine, servers):
        await engine.update_weights(write_weights(tmp_path, 3), 1)
        await servers[0].kill()
        await servers[0].start()
        async with asyncio.TaskGroup() as tasks:
            calls = [await InFlight(tasks, engine, [5, 6, 7], PARAMS, f"long-{number}").seen() for number in range(3)]
            tasks.create_task(ask(engine, "short", PARAMS.replace(max_tokens=2)))  # its end tells that the server was restarted
        for call in calls:
            check_tokens(call.task.result(), seeds=(0, 3))
            assert call.task.result().token_ids.tolist() == call.tokens
        await engine.until_serving(1)
        assert set((await ask(engine, "after")).versions.tolist()) == {1}


@pytest.mark.parametrize("status", [429, 503])
async def test_a_replica_without_room_is_left_alone_for_as_long_as_it_says(status: int) -> None:
    async with served(health_seconds=60.0) as (engine, servers):
        for server in servers:
            server.fault(GENERATE, answer(status, **{"Retry-After": "0"}))
        check_tokens(await ask(engine, "both-refuse-once"))
        servers[0].fault(GENERATE, answer(status, **{"Retry-After": "60"}))
        count = [asked(server) for server in servers]
        for number in range(6):
            check_tokens(await ask(engine, f"r{number}"))
        assert asked(servers[0]) <= count[0] + 1
        assert [one.serving for one in engine.replicas()] == [True, True], "being full is no failure"


def event(token_ids: str = "[4]", content: str = '[{"token_id": 4, "logprob": -1.0}]', finish: str = "null") -> Any:
    """A stream of one event."""
    choice = f'{{"token_ids": {token_ids}, "logprobs": {{"content": {content}}}, "finish_reason": {finish}}}'
    return raw_stream(f'data: {{"request_id": "a", "choices": [{choice}]}}\n\n'.encode())


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (answer(500), "500"),
        (raw_stream(b"data: {not json}\n\n"), "no JSON"),
        (raw_stream(b"data: []\n\n"), "no JSON object"),
        (raw_stream(b"data: {}\n\n"), "unknown form"),
        (raw_stream(b'data: {"error": {"message": "engine died"}}\n\n'), "engine died"),
        (event("[64]", '[{"token_id": 64, "logprob": -1.0}]'), "outside the vocabulary of 64"),
        (event(content='[{"token_id": 4, "logprob": NaN}]'), "unknown form"),
        (event(content='[{"token_id": 4, "logprob": -9999.0}]'), "-9999"),
        (event(content='[{"token_id": 4, "logprob": 0.5}]'), "0.5"),
        (event(content='[{"token_id": 5, "logprob": -1.0}]'), "other tokens"),
        (event("[4, 5]"), "2 tokens with 1"),
        (event("[]", "[]", '"tired"'), "tired"),
        (event(finish='"stop"'), "versions"),
        (event(str([4] * 41), str([{"token_id": 4, "logprob": -1.0}] * 41).replace("'", '"')), "more than the 40"),
        (raw_stream(b": nothing but a comment\n\n"), "without a finish reason"),
    ],
)
async def test_nonsense_is_refused_and_asked_again_elsewhere_and_fails_where_there_is_nothing_else(fault: Any, says: str) -> None:
    async with served(attempts=3) as (engine, servers):
        servers[0].fault(GENERATE, fault)
        servers[1].fault(GENERATE, fault)
        completion = await ask(engine, "once")
        assert len(completion.token_ids) == 40
        for server in servers:
            server.fault(GENERATE, *[fault] * 4)
        with pytest.raises(EngineError, match=f"(?s)failed 3 times.*{says}"):
            await ask(engine, "always")
        for server in servers:
            server.faults.clear()
        await engine.until_serving(2)
        check_tokens(await ask(engine, "after"))


async def test_what_a_server_refuses_is_refused() -> None:
    async with served() as (engine, servers):
        servers[0].fault(GENERATE, answer(400))
        servers[1].fault(GENERATE, answer(400))
        with pytest.raises(RequestRefusedError, match="400"):
            await ask(engine, "refused")
        # What is found out when a stream has begun comes as an event of it.
        told = raw_stream(b'data: {"error": {"message": "invalid regex", "code": 400}}\n\n')
        for server in servers:
            server.faults.clear()
            server.fault(GENERATE, told)
        with pytest.raises(RequestRefusedError, match="invalid regex"):
            await ask(engine, "refused-late")
        for server in servers:
            server.faults.clear()
        check_tokens(await ask(engine, "after"))


async def test_a_server_that_answers_nothing_any_more_is_left() -> None:
    async with served(make=slow, control_seconds=0.2) as (engine, servers), asyncio.TaskGroup() as tasks:
        calls = [await InFlight(tasks, engine, [5, 6, 7], PARAMS, f"r{number}").seen(2) for number in range(4)]
        # It holds its connections, and is silent on all of them: as after SIGSTOP.
        await servers[0].engine.pause("keep")
        servers[0].fault("/health", *[hang] * 50)
        for call in calls:
            check_tokens(await call.task)
            assert len(call.tokens) == 40
        assert not engine.replicas()[0].serving


async def test_a_response_that_stands_still_goes_on_elsewhere() -> None:
    policy: Any = REFERENCE.policy
    logprob = float(policy.log_probs([5, 6, 7], 0, SamplingParams())[4])
    choice = {"token_ids": [4], "logprobs": {"content": [{"token_id": 4, "logprob": logprob}]}, "finish_reason": None}
    first = b"data: " + json.dumps({"request_id": "a", "choices": [choice]}).encode() + b"\n\n"
    async with served(stall_seconds=0.1) as (engine, servers):
        servers[0].fault(GENERATE, raw_stream(first, end=False))
        servers[1].faults = servers[0].faults  # whichever is asked first
        completion = await ask(engine, "r")
        assert (completion.token_ids[0], len(completion.token_ids)) == (4, 40)
        check_tokens(completion)


async def test_a_server_that_ends_its_requests_on_its_way_down_has_them_go_on_elsewhere() -> None:
    async with served(make=slow) as (engine, servers), asyncio.TaskGroup() as tasks:
        calls = [await InFlight(tasks, engine, [5, 6, 7], PARAMS, f"r{number}").seen(2) for number in range(4)]
        await servers[0].engine.interrupt()
        for call in calls:
            assert (await call.task).finish_reason == "length"
            check_tokens(call.task.result())


async def test_requests_of_a_replica_that_dies_in_a_pause_go_on_after_it() -> None:
    async with served(make=slow) as (engine, servers), asyncio.TaskGroup() as tasks:
        calls = [await InFlight(tasks, engine, [5, 6, 7], PARAMS, f"r{number}").seen(2) for number in range(4)]
        await engine.pause("keep")
        counts = [len(call.tokens) for call in calls]
        await servers[0].kill()
        while engine.replicas()[0].serving:
            await asyncio.wait([call.task for call in calls], timeout=0.01)
        assert [len(call.tokens) for call in calls] == counts, "none goes on before the pause is over"
        await engine.resume()
        for call in calls:
            check_tokens(await call.task)
            assert len(call.tokens) == 40


async def test_a_key_that_is_asked_for_is_named() -> None:
    async with SimulatedServer() as server:
        server.fault("/version", answer(401))
        with pytest.raises(EngineError, match="api_key"):
            await VLLMServerEngine(server.url, **QUICK).open()


async def test_requests_wait_for_a_replica_and_fail_when_none_comes_back() -> None:
    async with served(1, patience_seconds=0.3) as (engine, servers):
        await servers[0].kill()
        with pytest.raises(EngineDeadError, match="no replica serves"):
            await ask(engine, "waits")
        with pytest.raises(EngineDeadError, match="no replica serves"):
            await ask(engine, "at-once")
        with pytest.raises(EngineDeadError):
            await engine.health()
        await servers[0].start()
        await engine.until_serving(1)
        check_tokens(await ask(engine, "again"))


async def test_a_cancelled_request_that_waits_leaves_no_trace() -> None:
    async with served(1, make=slow, max_in_flight=1) as (engine, _), asyncio.TaskGroup() as tasks:
        running = await InFlight(tasks, engine, [5, 6, 7], PARAMS, "running").seen()
        waiting = [InFlight(tasks, engine, [5, 6, 7], PARAMS, f"w{number}") for number in range(3)]
        await asyncio.sleep(0)  # they wait from here on
        waiting[0].task.cancel()
        await engine.interrupt(["w1"])
        assert (await waiting[1].task).finish_reason == "abort"
        check_tokens(await running.task)
        assert (await waiting[2].task).finish_reason == "length"
    assert waiting[0].task.cancelled()


# --- weights


@pytest.mark.parametrize("fault", [answer(500), hang])
async def test_a_replica_that_missed_an_update_is_out_until_it_has_caught_up(tmp_path: Path, fault: Any) -> None:
    async with served(make=slow, control_seconds=0.3) as (engine, servers), asyncio.TaskGroup() as tasks:
        calls = [await InFlight(tasks, engine, [5, 6, 7], PARAMS.replace(max_tokens=300), f"r{number}").seen(2) for number in range(6)]
        servers[0].fault("/pause", fault)
        await engine.update_weights(write_weights(tmp_path, 2), 1)
        assert engine.version == 1
        await engine.until_serving(2)
        assert servers[0].label == servers[1].label
        for call in calls:
            completion = await call.task
            assert set(completion.versions.tolist()) == {0, 1}
            check_tokens(completion, seeds=(0, 2))


async def test_a_replica_where_a_load_broke_off_is_out_until_it_is_restarted(tmp_path: Path) -> None:
    async with served() as (engine, servers):
        servers[0].fault("/collective_rpc", answer(200, {"results": ["True"]}), answer(200, {"results": ["True"]}), answer(500))
        await engine.update_weights(write_weights(tmp_path, 2), 1)
        for number in range(4):
            check_tokens(await ask(engine, f"r{number}"), seeds=(0, 2))
        assert not asked(servers[0])
        assert "restart it" in engine.replicas()[0].cause or "500" in engine.replicas()[0].cause
        await servers[0].kill()
        await servers[0].start()
        await engine.until_serving(2)
        assert servers[0].label == servers[1].label


async def test_an_update_that_no_replica_takes_leaves_the_old_weights(tmp_path: Path) -> None:
    async with served() as (engine, servers):
        for server in servers:
            server.fault("/pause", answer(500))
        with pytest.raises(WeightUpdateError, match="0 is still in force"):
            await engine.update_weights(write_weights(tmp_path, 2), 1)
        check_tokens(await ask(engine, "after"))
        for server in servers:
            server.fault("/collective_rpc", answer(200, {"results": ["False"]}))
        with pytest.raises(WeightUpdateError, match="does not find"):
            await engine.update_weights(write_weights(tmp_path, 2), 1)
        check_tokens(await ask(engine, "after"))
        assert engine.version == 0
        await engine.update_weights(write_weights(tmp_path, 2), 1)
        check_tokens(await ask(engine, "new"), seeds=(0, 2))


async def test_a_cancelled_update_comes_to_its_end(tmp_path: Path) -> None:
    async with served() as (engine, _):
        for turns in (1, 5, 20, 60):
            updating = asyncio.create_task(engine.update_weights(write_weights(tmp_path, turns), engine.version + 1))
            for _ in range(turns):
                await asyncio.sleep(0)
            updating.cancel()
            await asyncio.wait([updating])
            completion = await ask(engine, "after")
            assert set(completion.versions.tolist()) == {engine.version}
            check_tokens(completion, seeds=(0, *[turns] * engine.version))


async def test_a_replica_may_come_late_and_go_while_requests_run(tmp_path: Path) -> None:
    async with served(1, make=slow) as (engine, servers), SimulatedServer(slow) as late:
        await engine.update_weights(write_weights(tmp_path, 2), 1)
        async with asyncio.TaskGroup() as tasks:
            calls = [await InFlight(tasks, engine, [5, 6, 7], PARAMS, f"r{number}").seen(2) for number in range(3)]
            await engine.add_replica(late.url + "/v1")
            assert late.label == servers[0].label
            with pytest.raises(ValueError, match="already"):
                await engine.add_replica(late.url)
            await engine.remove_replica(servers[0].url, drain=False)
            with pytest.raises(ValueError, match="no replica"):
                await engine.remove_replica(servers[0].url)
        for call in calls:
            check_tokens(call.task.result(), seeds=(0, 2))
            assert len(call.tokens) == 40
        assert [one.url for one in engine.replicas()] == [late.url]
        assert late.engine.statistics().tokens > 0


async def test_servers_that_an_earlier_engine_updated_wait_for_weights_unless_adopted(tmp_path: Path) -> None:
    async with served(patience_seconds=0.3) as (engine, servers):
        await engine.update_weights(write_weights(tmp_path, 2), 7)
        urls = [server.url for server in servers]
        async with VLLMServerEngine(urls, adopt=True, **QUICK) as adopted:
            assert adopted.version == 7
            assert (await ask(adopted, "adopted")).versions.tolist() == [7] * 40
        async with VLLMServerEngine(urls, **QUICK) as fresh:
            with pytest.raises(EngineError, match="earlier run left"):
                await ask(fresh, "too-early")
            await fresh.update_weights(write_weights(tmp_path, 3), 5)
            check_tokens(await ask(fresh, "fresh"), seeds=(0, 0, 0, 0, 0, 3))
            with pytest.raises(EngineError, match="another"):
                await ask(engine, "robbed")
            assert (await ask(fresh, "still-fresh")).versions.tolist() == [5] * 40


# --- servers that cannot be used


@pytest.mark.parametrize(
    ("told", "hidden", "says"),
    [
        ({"version": "0.31.4"}, set(), r"0\.31\.4"),
        ({}, {"/is_paused"}, "VLLM_SERVER_DEV_MODE=1"),
        ({}, {GENERATE}, "--enable-scale-out"),
        ({"max_model_len": 100}, set(), "max_length"),
        ({"id": "another"}, set(), "'another'"),
        ({"vocab_size": 63}, set(), "vocab_size"),
        ({"root": None}, set(), "generative model"),
        ({"vocab_size": None}, set(), "give vocab_size"),
    ],
)
async def test_a_server_that_does_not_fit_is_refused_at_the_opening(told: dict[str, Any], hidden: set[str], says: str) -> None:
    async with SimulatedServer() as good, SimulatedServer(**told) as bad:
        bad.hidden = hidden
        engine = VLLMServerEngine([good.url, bad.url], **QUICK)
        with pytest.raises(EngineError, match=says):
            await engine.open()
        await engine.close()
        with pytest.raises(EngineClosedError):
            await engine.open()


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"vllm_config": None}, "give vocab_size"),
        ({"vllm_config": {"model_config": {"hf_config": 'C {"vocab_size": 64, "eos_token_id": "a"}'}}}, "give eos_token_ids"),
    ],
)
async def test_a_server_that_tells_nonsense_of_itself_is_refused_and_ends_no_engine(info: Any, says: str, tmp_path: Path) -> None:
    async with SimulatedServer() as good, SimulatedServer() as odd:
        odd.fault("/server_info", *[answer(200, info)] * 100)
        with pytest.raises(EngineError, match=says):
            await VLLMServerEngine(odd.url, **QUICK).open()
        odd.faults.clear()
        async with VLLMServerEngine([good.url, odd.url], **QUICK) as engine:
            odd.fault("/server_info", *[answer(200, info)] * 100)
            await odd.kill()
            while engine.replicas()[1].serving:
                check_tokens(await ask(engine, "while-down"))
            await engine.update_weights(write_weights(tmp_path, 1), 1)
            await odd.start()
            async with asyncio.timeout(10.0):
                while says not in engine.replicas()[1].cause:
                    check_tokens(await ask(engine, "at-the-other"), seeds=(0, 1))


async def test_a_timeout_of_a_callback_is_its_own_error_and_no_abort() -> None:
    def late(piece: Completion) -> None:
        raise TimeoutError("of the callback")

    async with served(1) as (engine, _):
        with pytest.raises(TimeoutError, match="of the callback"):
            await ask(engine, "late", on_tokens=late)


async def test_a_server_that_is_added_twice_at_once_is_taken_in_once() -> None:
    async with served(1) as (engine, _), SimulatedServer(fast) as other:
        said = [str(one) for one in await asyncio.gather(*(_outcome(engine.add_replica(other.url)) for _ in range(2)))]
        assert said.count("None") == 1
        assert sum("already" in one for one in said) == 1
        assert [one.serving for one in engine.replicas()] == [True, True]


async def test_a_server_that_is_not_there_is_not_waited_for_as_at_the_opening() -> None:
    async with served(1, open_seconds=600.0) as (engine, _):
        async with SimulatedServer() as gone:
            pass
        with pytest.raises(EngineError, match=r"did not come up in 0\.2 s.*more open_seconds"):
            await engine.add_replica(gone.url, open_seconds=0.2)
        for odd in (0, "x"):
            with pytest.raises(ValueError, match=f"open_seconds={odd!r}"):
                await engine.add_replica(gone.url, open_seconds=odd)  # type: ignore[arg-type]
        for count in ("x", 0, 1.5):
            with pytest.raises(ValueError, match=f"count={count!r}"):
                await engine.until_serving(count)  # type: ignore[arg-type]
        assert len(engine.replicas()) == 1


async def test_a_server_whose_logprobs_are_not_those_sampled_from_is_refused() -> None:
    entry = {"token_id": 4, "logprob": -1.5}
    choice = {"token_ids": [4], "logprobs": {"content": [entry]}, "weight_versions": [{"version": "default", "start": 0, "end": 1}]}
    async with SimulatedServer() as server:
        server.fault(GENERATE, answer(200, {"choices": [choice]}))
        with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
            await VLLMServerEngine(server.url, **QUICK).open()


async def test_a_server_on_a_cpu_without_our_extension_is_refused() -> None:
    async with SimulatedServer(extended=False) as server:
        with pytest.raises(EngineError, match="--worker-extension-cls"):
            await VLLMServerEngine(server.url, **QUICK).open()


async def test_a_server_that_is_not_there_yet_is_waited_for() -> None:
    server = SimulatedServer()
    await server.start()
    await server.kill()
    with pytest.raises(EngineError, match=r"did not come up in 0\.3 s"):
        await VLLMServerEngine(server.url, open_seconds=0.3).open()
    async with VLLMServerEngine(server.url, open_seconds=10.0) if await _later(server) else None as engine:  # type: ignore[union-attr]
        check_tokens(await ask(engine, "r"))
    await server.kill()


async def _later(server: SimulatedServer) -> bool:
    await server.start()
    return True


@pytest.mark.parametrize(
    ("urls", "options", "match"),
    [
        ([], {}, "urls is empty"),
        ("127.0.0.1:8000", {}, "no server's address"),
        ("ftp://host", {}, "no server's address"),
        ("http://host:1/v2", {}, "names a path"),
        (["http://host:1", "http://host:1/v1"], {}, "twice"),
        ("http://host:1", {"max_in_flight": 0}, "max_in_flight=0"),
        ("http://host:1", {"affinity_slack": -1}, "affinity_slack=-1"),
        ("http://host:1", {"health_seconds": 0}, "health_seconds=0"),
        ("http://host:99999", {}, "no port"),
        (5, {}, "no server's address"),
        ("http://host:1", {"vocab_size": 0}, "vocab_size=0"),
        ("http://host:1", {"max_logprobs": -1}, "max_logprobs=-1"),
        ("http://host:1", {"eos_token_ids": 5}, "eos_token_ids=5"),
        ("http://host:1", {"eos_token_ids": ["a"]}, "eos_token_ids='a'"),
    ],
)
def test_bad_arguments_are_refused_at_construction(urls: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        VLLMServerEngine(urls, **options)


async def test_whoever_waits_when_the_engine_is_closed_is_told(tmp_path: Path) -> None:
    async with served(1, make=slow, max_in_flight=1) as (engine, _), asyncio.TaskGroup() as tasks:
        running = await InFlight(tasks, engine, [5, 6, 7], PARAMS, "running").seen()
        waiting = InFlight(tasks, engine, [5, 6, 7], PARAMS, "waiting")
        scoring = tasks.create_task(_outcome(engine.score([5, 6, 7])))
        until = tasks.create_task(_outcome(engine.until_serving(2)))
        pausing = tasks.create_task(_outcome(engine.pause("wait")))
        await asyncio.sleep(0)  # all of them have begun
        updating = tasks.create_task(_outcome(engine.update_weights(write_weights(tmp_path, 1), 1)))
        await asyncio.sleep(0)
        await engine.close()
        assert [call.task.result().finish_reason for call in (running, waiting)] == ["abort", "abort"]
        assert len(running.tokens) > 0
        check_tokens(running.task.result())
        for call in (scoring, until, updating):
            assert isinstance(await call, EngineClosedError), repr(call)
        assert isinstance(await pausing, EngineClosedError | None)


async def _outcome(call: Any) -> Exception | None:
    try:
        await call
    except Exception as error:  # noqa: BLE001 - it is looked at
        return error
    return None
