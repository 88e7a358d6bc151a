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

import numpy as np
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


def write_adapter(folder: Path, seed: int) -> Path:
    """A folder of an adapter, with the seed of the simulated one."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "seed": seed}))
    names = [f"base_model.model.layer.{factor}.weight" for factor in ("lora_A", "lora_B")]
    header = {name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * place, 4 * place + 4]} for place, name in enumerate(names)}
    told = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(told).to_bytes(8, "little") + told + bytes(8))
    return folder


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


async def break_off(request: web.Request) -> web.StreamResponse:
    """A fault: the connection ends without a word."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


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
        adapters: it was started with what adapters need.
        strict: it refuses requests for models that it does not have.
        sleeps: it can sleep; at level 2 its weights become others.
        tokenizer: it has one, and takes structures, which it does not heed.
        told: changes what it says of its model: "id", "root", "max_model_len", "version", "vocab_size".
    """

    def __init__(
        self,
        make: Callable[[], SimulatedEngine] = SimulatedEngine,
        *,
        extended: bool = True,
        adapters: bool = True,
        strict: bool = True,
        sleeps: bool = False,
        tokenizer: bool = False,
        **told: Any,
    ) -> None:
        self._make, self._extended, self._adapters, self._strict, self._tokenizer = make, extended, adapters, strict, tokenizer
        self._sleeps = sleeps
        self.told = {"id": "simulated", "root": "simulated", "version": "0.32.0"} | told
        self.faults: dict[str, deque[Handler]] = defaultdict(deque)
        self.calls: list[str] = []
        self.hidden: set[str] = set()
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_paused(self) -> bool:
        """Whether it stands still, in a sleep or without."""
        return self._paused

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
        self._paused, self._asleep, self._seed, self._names = False, set[str](), 0, itertools.count()
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
        adapters = [{"id": adapter.name, "root": "folder", "parent": told["id"]} for adapter in self.engine.adapters]
        return web.json_response({"data": [told | {"max_model_len": length}, *adapters]})

    async def _post_v1_load_lora_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, folder = body["lora_name"], body["lora_path"]
        if not name:
            raise RequestRefusedError("Both 'lora_name' and 'lora_path' must be provided.")
        if not self._adapters:
            return web.json_response({"error": {"message": "LoRA is not enabled"}}, status=500)
        if not await asyncio.to_thread(os.path.isdir, folder):
            return web.json_response({"error": {"message": f"The lora adapter {folder} was not found"}}, status=404)
        if name in {adapter.name for adapter in self.engine.adapters}:
            raise RequestRefusedError("has already been loaded")
        config = await asyncio.to_thread(Path(folder, "adapter_config.json").read_text)
        await self.engine.add_adapter(name, {"seed": json.loads(config)["seed"]})
        return web.Response(text="Success: LoRA adapter added successfully.")

    async def _post_v1_unload_lora_adapter(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if name not in {adapter.name for adapter in self.engine.adapters}:
            return web.json_response({"error": {"message": "cannot be found"}}, status=404)
        await self.engine.remove_adapter(name)
        return web.Response(text="Success: LoRA adapter removed successfully.")

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

    async def _post_sleep(self, request: web.Request) -> web.Response:
        self._paused, self._asleep = True, {"weights", "kv_cache"}
        await self.engine.interrupt()
        await self.engine.pause("keep")
        if request.query["level"] == "2":
            self._seed = 666
            await self._stamp()
        return web.json_response({"status": "sleeping"})

    async def _post_wake_up(self, request: web.Request) -> web.Response:
        self._asleep -= set(request.query.getall("tags", list(self._asleep)))
        if not self._asleep:
            await self._post_resume(request)
        return web.json_response({"status": "awake"})

    async def _get_weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def _post_update_weight_version(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["new_version"]
        await self._stamp()
        return web.json_response({"success": True})

    async def _stamp(self) -> None:
        """Tokens from now on have the label in force: the engine counts on, and we remember what the number stands for."""
        # Past the engine's own look at adapters: vLLM changes weights under those that it still has.
        await self.engine._load_weights({"seed": self._seed}, self.engine.version + 1)
        self.engine._version += 1
        self._labels[self.engine.version] = self.label

    async def _post_collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        match body["method"]:
            case "reload_weights" if "weights" in self._asleep:
                return web.json_response({"error": {"message": "no memory"}}, status=500)
            case "reload_weights":
                self._seed = int(Path(body["kwargs"]["weights_path"]).name.rpartition("-")[2])
                await self._stamp()
                return web.json_response({"results": [None]})
            case "sees_folder" if self._extended:
                return web.json_response({"results": [str(await asyncio.to_thread(os.path.isdir, body["args"][0]))]})
            case "sees_images" if self._extended:
                return web.json_response({"results": ["False"]})
            case "can_sleep" if self._extended:
                return web.json_response({"results": [str(self._sleeps)]})
            case "refresh_output_matrix" | "mend_rows_without_adapter" if self._extended:
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
        if not self._tokenizer and (body.get("output_mode") == "text" or "structured_outputs" in asked):
            raise RequestRefusedError("requires a tokenizer")
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos", "seed")
        params = SamplingParams(
            **{name: asked[name] for name in names if name in asked}, stop_token_ids=tuple(asked.get("stop_token_ids", ()))
        )
        name = f"generate-tokens-{body.get('request_id', '')}-{next(self._names)}"
        session, adapter = request.headers.get("X-Session-ID"), self._named(body["model"])
        if not body["stream"]:
            return web.json_response(await self._whole(body["token_ids"], params, asked, name, adapter))
        pieces = _Pieces(asked.get("stream_interval", 1))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        async with asyncio.TaskGroup() as tasks:
            generated = self.engine.generate(
                body["token_ids"], params, request_id=name, session_id=session, adapter=adapter, on_tokens=pieces
            )
            call = tasks.create_task(generated)
            call.add_done_callback(lambda _: pieces.queue.put_nowait(None))
            await response.prepare(request)
            while (piece := await pieces.queue.get()) is not None:
                content = _content(piece) if not asked["logprobs"] else self._likely(piece, body["token_ids"], params, asked["logprobs"])
                body["token_ids"] += piece.token_ids.tolist()
                await self._write(response, name, piece, content, None)
            end = Completion.of([], [], [], call.result().finish_reason)
            await self._write(response, name, end, [], self._spans(call.result(), adapter))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _named(self, model: str) -> str | None:
        """The adapter that a request names as its model."""
        if model == self.told["id"]:
            return None
        if model in {adapter.name for adapter in self.engine.adapters}:
            return model
        if self._strict:
            raise web.HTTPNotFound(text=json.dumps({"error": {"message": f"The model `{model}` does not exist."}}))
        return None

    def _spans(self, completion: Completion, adapter: str | None) -> list[dict[str, Any]]:
        if adapter is not None:  # the engine tells versions of adapters, vLLM those of the weights; these stay while there are adapters
            return [{"version": self.label, "start": 0, "end": len(completion.token_ids)}]
        spans: list[dict[str, Any]] = []
        for place, version in enumerate(completion.versions.tolist()):
            label = self._labels[version]
            if spans and spans[-1]["version"] == label:
                spans[-1]["end"] = place + 1
            else:
                spans.append({"version": label, "start": place, "end": place + 1})
        return spans

    def _likely(self, piece: Completion, ids: list[int], params: SamplingParams, count: int) -> list[dict[str, Any]]:
        """As `_content`, with the likeliest tokens: as vLLM tells them, the sampled one first, and no more than were asked for."""
        policy: Any = self.engine.policy
        content, context = _content(piece), list(ids)
        for entry in content:
            logprobs = policy.log_probs(context, self._seed, params)
            ranked = np.argsort(-logprobs, kind="stable").tolist()
            tokens = dict.fromkeys([entry["token_id"], *ranked[:count]])
            entry["top_logprobs"] = [
                {"token_id": token, "logprob": max(float(logprobs[token]), -9999.0), "rank": ranked.index(token) + 1} for token in tokens
            ][:count]
            context.append(entry["token_id"])
        return content

    async def _write(self, response: web.StreamResponse, name: str, piece: Completion, content: Any, spans: Any) -> None:
        choice = {
            "index": 0,
            "token_ids": piece.token_ids.tolist(),
            "logprobs": {"content": content},
            "finish_reason": None if spans is None else piece.finish_reason,
            "weight_versions": spans,
        }
        await response.write(b"data: " + json.dumps({"request_id": name, "choices": [choice]}).encode() + b"\n\n")

    async def _whole(self, ids: list[int], params: SamplingParams, asked: dict[str, Any], name: str, adapter: str | None) -> dict[str, Any]:
        completion = await self.engine.generate(ids, params, request_id=name, adapter=adapter)
        content = _content(completion)
        if asked["logprobs"]:
            top = await self.engine.top_tokens(ids, asked["logprobs"], adapter=adapter)
            pairs = zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
            content[0]["top_logprobs"] = [{"token_id": token, "logprob": logprob} for token, logprob in pairs]
        told: dict[str, Any] = {"request_id": name, "prompt_logprobs": None}
        if "prompt_logprobs" in asked:
            scores = (await self.engine.score(ids, adapter=adapter)).tolist() if len(ids) > 1 else []
            told["prompt_logprobs"] = [None, *({str(token): {"logprob": one}} for token, one in zip(ids[1:], scores, strict=True))]
        choice = {"token_ids": completion.token_ids.tolist(), "logprobs": {"content": content}, "finish_reason": completion.finish_reason}
        return told | {"choices": [choice | {"weight_versions": self._spans(completion, adapter)}]}


def _content(piece: Completion) -> list[dict[str, Any]]:
    pairs = zip(piece.token_ids.tolist(), piece.logprobs.tolist(), strict=True)
    return [{"token_id": token, "logprob": logprob} for token, logprob in pairs]
