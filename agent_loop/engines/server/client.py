"""One vLLM server over HTTP: its endpoints as coroutines, and its errors as ours. The only module that knows the HTTP library.

Of vLLM's endpoints it uses `/health`, `/version`, `/v1/models`, `/inference/v1/generate` (`--enable-scale-out`), and of its development
mode (`VLLM_SERVER_DEV_MODE=1`) `/pause`, `/resume`, `/is_paused`, `/sleep`, `/wake_up`, `/abort_requests`, `/collective_rpc`,
`/weight_info`, `/update_weight_version`, `/reset_prefix_cache` and `/server_info`; for adapters `/v1/load_lora_adapter` and
`/v1/unload_lora_adapter` (`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`).
"""

import asyncio
import email.utils
import json
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

from agent_loop.engines.server.answers import REFUSALS, Answer, Events, Piece, error_message, parse, read_answer, read_piece
from agent_loop.engines.server.faults import NoSuchEndpoint, ReplicaBusy, ReplicaError
from agent_loop.errors import EngineError, RequestRefusedError
from agent_loop.sampling import SamplingParams

try:
    import aiohttp
except ImportError as error:
    raise ImportError("VLLMServerEngine needs aiohttp: pip install 'millrace[server]'") from error

LARGEST_ANSWER = 256 << 20
"""Bytes of an answer that is no stream."""

GENERATE = "/inference/v1/generate"


def server_url(url: str) -> str:
    """`url` without what lies behind the host's port, or `ValueError`."""
    parts = urlsplit(url if isinstance(url, str) else "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url={url!r} is no server's address; give one such as 'http://127.0.0.1:8000'")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"url={url!r} has no port that there is ({error}); give an address such as 'http://127.0.0.1:8000'") from None
    if parts.path.rstrip("/") not in ("", "/v1") or parts.query:
        raise ValueError(f"url={url!r} names a path; give the server's address alone, such as 'http://127.0.0.1:8000'")
    return f"{parts.scheme}://{parts.netloc}"


def new_session(api_key: str | None, connect_seconds: float) -> aiohttp.ClientSession:
    """The connections to all servers: as many as there are requests, which are bounded elsewhere."""
    headers = {"Content-Type": "application/json"} | ({} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout)


class Server:
    """Speaks with one server.

    Attributes:
        url: scheme, host and port.
        seconds: for which a control call may go unanswered.
        load_seconds: the same, of loading weights.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, seconds: float, load_seconds: float) -> None:
        self._session = session
        self.url = url
        self.seconds, self.load_seconds = seconds, load_seconds

    # Of any server

    async def health(self) -> None:
        """Return if it says that it is well."""
        try:
            await self._call("GET", "/health")
        except ReplicaBusy as error:
            raise ReplicaError(f"{self.url} is not well: {error}", lost=True) from error

    async def version(self) -> str:
        """vLLM's."""
        return str((await self._call("GET", "/version")).get("version", ""))

    async def models(self) -> list[dict[str, Any]]:
        """The models that it serves, as it lists them."""
        data = (await self._call("GET", "/v1/models")).get("data")
        if not isinstance(data, list) or not all(isinstance(model, dict) for model in data):
            raise ReplicaError(f"{self.url} lists its models in an unknown form")
        return data

    async def info(self) -> dict[str, Any]:
        """vLLM's configuration; takes seconds, since it looks at the whole machine."""
        return await self._call("GET", "/server_info?config_format=json", seconds=self.load_seconds)

    # Requests

    async def stream(self, body: dict[str, Any], session_id: str | None, vocab_size: int, top: int = 0) -> AsyncGenerator[Piece, None]:
        """The pieces of a response; ends after the one with a finish reason, or raises."""
        headers = None if session_id is None else {"X-Session-ID": quote(session_id)[:256]}
        with self._translated():
            async with self._session.post(self.url + GENERATE, data=json.dumps(body), headers=headers, allow_redirects=False) as response:
                if response.status != 200:
                    self._refuse(response.status, response.headers.get("Retry-After"), await _body(response))
                events = Events()
                while data := await response.content.readany():
                    for event in events.feed(data):
                        piece = read_piece(event, vocab_size, top)
                        yield piece
                        if piece.finish is not None:
                            return
        raise ReplicaError(f"{self.url} ended a response without a finish reason", lost=True)

    async def ask(self, body: dict[str, Any], *, seconds: float | None = None) -> Answer:
        """The answer to a request that is no stream; by default, whenever it comes."""
        content = await self._content("POST", GENERATE, body, seconds)
        with self._translated():
            return read_answer(content)

    async def abort(self, server_ids: Collection[str]) -> None:
        """End requests early; those that are not there are ignored. None given: nothing is done, where vLLM would end all."""
        if server_ids:
            await self._call("POST", "/abort_requests", {"request_ids": list(server_ids)})

    # Control

    async def pause(self) -> None:
        """Freeze what runs; returns when no step runs any more."""
        await self._call("POST", "/pause?mode=keep&clear_cache=false")

    async def resume(self) -> None:
        """Go on."""
        await self._call("POST", "/resume")

    async def sleep(self, level: int) -> None:
        """Give the accelerator's memory up; requests that are there are aborted."""
        await self._call("POST", f"/sleep?level={level}&mode=abort", seconds=self.load_seconds)

    async def wake_up(self, part: str | None = None) -> None:
        """Take a part of the memory back, "weights" or "kv_cache"; None: all of it. When it has all, it goes on, also after a pause."""
        await self._call("POST", "/wake_up" if part is None else f"/wake_up?tags={part}", seconds=self.load_seconds)

    async def is_paused(self) -> bool:
        """Whether it is."""
        return bool((await self._call("GET", "/is_paused")).get("is_paused"))

    async def label(self) -> str:
        """What the weights are labelled; "default" as they were at its start."""
        label = (await self._call("GET", "/weight_info")).get("weight_version")
        if not isinstance(label, str):
            raise ReplicaError(f"{self.url} labels its weights {label!r:.50}, no text")
        return label

    async def set_label(self, label: str) -> None:
        """Label the weights; tokens sampled from now on carry it."""
        await self._call("POST", "/update_weight_version", {"new_version": label})

    async def rpc(self, method: str, *args: str, **kwargs: str) -> list[Any]:
        """Call a method of the server's workers; their results."""
        answer = await self._call("POST", "/collective_rpc", {"method": method, "args": args, "kwargs": kwargs}, seconds=self.load_seconds)
        results = answer.get("results")
        return results if isinstance(results, list) else []

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter; requests name it as their model. `NoSuchEndpoint` also where the server does not find the folder."""
        await self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, seconds=self.load_seconds)

    async def unload_adapter(self, name: str) -> None:
        """Know this adapter no more; requests that run under it go on."""
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def reset_cache(self, *, running: bool) -> None:
        """Empty the prefix cache; with `running`, also compute that of requests in flight anew."""
        await self._call("POST", f"/reset_prefix_cache?reset_running_requests={str(running).lower()}&reset_external=true")

    async def _call(self, method: str, path: str, body: Any = None, *, seconds: float | None = None) -> dict[str, Any]:
        content = await self._content(method, path, body, self.seconds if seconds is None else seconds)
        with self._translated():
            return parse(content) if content.startswith(b"{") else {}

    async def _content(self, method: str, path: str, body: Any, seconds: float | None) -> bytes:
        data = None if body is None else json.dumps(body)
        with self._translated():
            async with asyncio.timeout(seconds):
                async with self._session.request(method, self.url + path, data=data, allow_redirects=False) as response:
                    content = await _body(response)
        if response.status != 200:
            self._refuse(response.status, response.headers.get("Retry-After"), content)
        return content

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The library's errors as ours."""
        try:
            yield
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ReplicaError(f"{self.url} cannot be reached, or broke off: {error or type(error).__name__}", lost=True) from error
        except ReplicaError as error:
            if self.url in str(error):
                raise
            raise ReplicaError(f"{self.url} gave {error}", lost=error.lost) from error

    def _refuse(self, status: int, retry_after: str | None, content: bytes) -> None:
        try:
            said = error_message(parse(content))
        except ReplicaError:
            said = content[:200].decode(errors="replace")
        message = f"{self.url} answered {status}: {said}"
        if status in (429, 503):
            raise ReplicaBusy(message, seconds_of(retry_after, time.time()))
        if status in REFUSALS:
            raise RequestRefusedError(message)
        if status == 401:
            raise EngineError(f"{message}; give the server's key as api_key")
        if status in (403, 404, 405):
            raise NoSuchEndpoint(message)
        raise ReplicaError(message)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """All of the body, or `ReplicaError` if it is of an absurd size."""
    parts, size = list[bytes](), 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise ReplicaError(f"an answer of more than {LARGEST_ANSWER} bytes")
    return b"".join(parts)


def seconds_of(retry_after: str | None, now: float) -> float | None:
    """What a Retry-After header says, a number or a date; None where it says nothing that can be read."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - now
        except ValueError:
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def generate_body(
    model: str, ids: Sequence[int], params: SamplingParams, stop_ids: Collection[int], *, name: str, salt: str, piece: int
) -> dict[str, Any]:
    """A request for a response, streamed in pieces of so many tokens."""
    sampling: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "stop": list(params.stop),
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": params.ignore_eos,
        "seed": params.seed,
        "logprobs": params.top_logprobs and params.top_logprobs + 1,  # see `read_top`
        "detokenize": bool(params.stop),
        "include_stop_str_in_output": True,
        "stream_interval": piece,
    }
    if params.structured_outputs is not None:
        sampling["structured_outputs"] = dict(params.structured_outputs)
    # The salt keeps blocks of the prefix cache apart by weights: those of requests in flight outlive an update.
    return {"request_id": name, "model": model, "token_ids": ids, "sampling_params": sampling, "stream": True, "cache_salt": salt}


def look_body(model: str, ids: Sequence[int], *, likely_tokens: int, salt: str, **sampling: Any) -> dict[str, Any]:
    """A request that samples one token, and tells what it made of its prompt (`likely_tokens` 0), or which next tokens are likely."""
    asked = {"max_tokens": 1, "temperature": 0.0, "logprobs": likely_tokens, "detokenize": False, "ignore_eos": True}
    if not likely_tokens:
        asked["prompt_logprobs"] = 0
    return {"model": model, "token_ids": ids, "sampling_params": asked | sampling, "stream": False, "cache_salt": salt}
