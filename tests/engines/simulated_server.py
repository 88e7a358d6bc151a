"""A server that speaks the endpoints of vLLM 0.32 that `VLLMServerEngine` uses, over a `SimulatedEngine`: real sockets, no model.

New weights are a folder whose name ends in the seed of the simulated ones. Faults are put in by `fault`, `kill` and `hold`.
"""

import asyncio
import itertools
import json
import os
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from agent_loop.engines.base import Completion
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import RequestRefusedError
from agent_loop.sampling import SamplingParams

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

GENERATE = "/inference/v1/generate"


def write_weights(folder: Path, seed: int) -> Path:
    """A folder of weights, as far as anybody looks into it."""
    path = folder / f"weights-{seed}"
    path.mkdir(exist_ok=True)
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return path


def answer(status: int, body: Any = None, **headers: str) -> Handler:
    """A fault: answer with this, once."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return web.json_response(body or {"error": {"message": f"told to answer {status}"}}, status=status, headers=headers)

    return handle


def raw_stream(*events: bytes, end: bool = True) -> Handler:
    """A fault: stream these bytes, and then end, or say nothing more."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(event)
        if not end:
            await asyncio.Event().wait()
        return response

    return handle


async def hang(request: web.Request) -> web.StreamResponse:
    """A fault: never answer."""
    await asyncio.Event().wait()
    raise AssertionError


class _Pieces:
    """An `on_tokens` that hands pieces of a size to a handler."""

    def __init__(self, piece_tokens: int) -> None:
        self.piece_tokens = piece_tokens
        self.queue: asyncio.Queue[Completion | None] = asyncio.Queue()

    def __call__(self, piece: Completion) -> None:
        self.queue.put_nowait(piece)


class SimulatedServer:
    """One server; `async with` starts it on a free port, where it stays over `kill` and `start`.

    Args:
        make: the engine behind it, made anew at each start.
        extended: its workers have our extension.
        told: changes what it says of its model: "id", "root", "max_model_len", "version", "vocab_size".
    """

    def __init__(self, make: Callable[[], SimulatedEngine] = SimulatedEngine, *, extended: bool = True, **told: Any) -> None:
        self._make, self._extended = make, extended
        self.told = {"id": "simulated", "root": "simulated", "version": "0.32.0"} | told
        self.faults: dict[str, deque[Handler]] = defaultdict(deque)
        self.calls: list[str] = []
        self.hidden: set[str] = set()
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> "SimulatedServer":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Come up, as a process that was started anew."""
        self.engine = self._make()
        await self.engine.open()
        self.label, self._labels = "default", {0: "default"}
        self._paused, self._seed, self._names = False, 0, itertools.count()
        self._running: dict[str, str] = {}
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def kill(self) -> None:
        """Break off every connection and be gone, without a word."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        assert runner.server is not None
        for site in list(runner.sites):
            await site.stop()
        for connection in list(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self.engine.close()
        await runner.cleanup()

    def fault(self, path: str, *handlers: Handler) -> None:
        """Answer the next requests to `path` like this."""
        self.faults[path].extend(handlers)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.calls.append(request.path)
        if self.faults[request.path]:
            return await self.faults[request.path].popleft()(request)
        name = f"_{request.method.lower()}_{request.path.strip('/').replace('/', '_')}"
        method: Handler | None = None if request.path in self.hidden else getattr(self, name, None)
        if method is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        try:
            return await method(request)
        except RequestRefusedError as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)

    async def _get_health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _get_version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.told["version"]})

    async def _get_v1_models(self, request: web.Request) -> web.Response:
        told = {"id": self.told["id"], "root": self.told["root"], "parent": None}
        length = self.told.get("max_model_len", self.engine.max_length)
        return web.json_response({"data": [told | {"max_model_len": length}]})

    async def _get_server_info(self, request: web.Request) -> web.Response:
        config = {"vocab_size": self.told.get("vocab_size", self.engine.vocab_size), "eos_token_id": min(self.engine.eos_token_ids)}
        model_config = {"hf_config": f"SimulatedConfig {json.dumps(config)}"}
        return web.json_response({"vllm_config": {"model_config": model_config, "device_config": {"device_type": "cpu"}}})

    async def _get_is_paused(self, request: web.Request) -> web.Response:
        return web.json_response({"is_paused": self._paused})

    async def _post_pause(self, request: web.Request) -> web.Response:
        self._paused = True
        await self.engine.pause(request.query["mode"])  # type: ignore[arg-type]  # the engine checks it
        return web.json_response({"status": "paused"})

    async def _post_resume(self, request: web.Request) -> web.Response:
        self._paused = False
        await self.engine.resume()
        return web.json_response({"status": "resumed"})

    async def _get_weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def _post_update_weight_version(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["new_version"]
        await self._stamp()
        return web.json_response({"success": True})

    async def _stamp(self) -> None:
        """Tokens from now on have the label in force: the engine counts on, and we remember what the number stands for."""
        await self.engine.update_weights({"seed": self._seed}, self.engine.version + 1)
        self._labels[self.engine.version] = self.label

    async def _post_collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        match body["method"]:
            case "reload_weights":
                self._seed = int(Path(body["kwargs"]["weights_path"]).name.rpartition("-")[2])
                await self._stamp()
                return web.json_response({"results": [None]})
            case "sees_folder" if self._extended:
                return web.json_response({"results": [str(await asyncio.to_thread(os.path.isdir, body["args"][0]))]})
            case "refresh_output_matrix" if self._extended:
                return web.json_response({"results": [None]})
        return web.json_response({"error": {"message": "NotImplementedError"}}, status=500)

    async def _post_reset_prefix_cache(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def _post_abort_requests(self, request: web.Request) -> web.Response:
        await self.engine.interrupt((await request.json())["request_ids"])
        return web.json_response({"status": "aborted"})

    # requests

    async def _post_inference_v1_generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        asked = body["sampling_params"]
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos", "seed")
        params = SamplingParams(
            **{name: asked[name] for name in names if name in asked}, stop_token_ids=tuple(asked.get("stop_token_ids", ()))
        )
        name = f"generate-tokens-{body.get('request_id', '')}-{next(self._names)}"
        session = request.headers.get("X-Session-ID")
        if not body["stream"]:
            return web.json_response(await self._whole(body["token_ids"], params, asked, name))
        pieces = _Pieces(asked.get("stream_interval", 1))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(self.engine.generate(body["token_ids"], params, request_id=name, session_id=session, on_tokens=pieces))
            call.add_done_callback(lambda _: pieces.queue.put_nowait(None))
            await response.prepare(request)
            while (piece := await pieces.queue.get()) is not None:
                await self._write(response, name, piece, None)
            await self._write(response, name, Completion.of([], [], [], call.result().finish_reason), self._spans(call.result()))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _spans(self, completion: Completion) -> list[dict[str, Any]]:
        spans: list[dict[str, Any]] = []
        for place, version in enumerate(completion.versions.tolist()):
            label = self._labels[version]
            if spans and spans[-1]["version"] == label:
                spans[-1]["end"] = place + 1
            else:
                spans.append({"version": label, "start": place, "end": place + 1})
        return spans

    async def _write(self, response: web.StreamResponse, name: str, piece: Completion, spans: Any) -> None:
        choice = {
            "index": 0,
            "token_ids": piece.token_ids.tolist(),
            "logprobs": {"content": _content(piece)},
            "finish_reason": None if spans is None else piece.finish_reason,
            "weight_versions": spans,
        }
        await response.write(b"data: " + json.dumps({"request_id": name, "choices": [choice]}).encode() + b"\n\n")

    async def _whole(self, ids: list[int], params: SamplingParams, asked: dict[str, Any], name: str) -> dict[str, Any]:
        completion = await self.engine.generate(ids, params, request_id=name)
        content = _content(completion)
        if asked["logprobs"]:
            top = await self.engine.top_tokens(ids, asked["logprobs"])
            pairs = zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
            content[0]["top_logprobs"] = [{"token_id": token, "logprob": logprob} for token, logprob in pairs]
        told: dict[str, Any] = {"request_id": name, "prompt_logprobs": None}
        if "prompt_logprobs" in asked:
            scores = (await self.engine.score(ids)).tolist() if len(ids) > 1 else []
            told["prompt_logprobs"] = [None, *({str(token): {"logprob": one}} for token, one in zip(ids[1:], scores, strict=True))]
        choice = {"token_ids": completion.token_ids.tolist(), "logprobs": {"content": content}, "finish_reason": completion.finish_reason}
        return told | {"choices": [choice | {"weight_versions": self._spans(completion)}]}


def _content(piece: Completion) -> list[dict[str, Any]]:
    pairs = zip(piece.token_ids.tolist(), piece.logprobs.tolist(), strict=True)
    return [{"token_id": token, "logprob": logprob} for token, logprob in pairs]
