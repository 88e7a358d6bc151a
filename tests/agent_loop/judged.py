"""Rollouts to be judged, and a server on the loopback that answers as it is told: for the tests of rewards."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from agent_loop import AgentLoop
from buffer import RolloutState, Status


def rollout(index: int = 0, text: str | None = "four", *, prompt: Any = "2 + 2 =", **row: Any) -> RolloutState:
    """A finished response; a prompt that is a list is a chat."""
    chat = None if isinstance(prompt, str) else prompt
    state = RolloutState(
        7,
        index,
        status=Status.RUNNING,
        prompt=None if chat else prompt,
        messages=chat,
        prompt_ids=[10, 11],
        row={"prompt": prompt, **row},
    )
    state.append([5, 6], logprobs=[-0.1, -0.2], version=index)
    state.text, state.finish_reason = text, "stop"
    return state


class Whole(AgentLoop):
    """Its rollouts are whole from the start: only judging is left."""

    async def generate(self, state: RolloutState) -> RolloutState:
        raise AssertionError("a finished response is not generated again")


Handler = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[bytes | None]]
"""Given a request's `head` and decoded `body`, gives the bytes to answer; None has written what it wants, or nothing."""


def answer(value: Any, status: int = 200, **headers: str) -> bytes:
    """A response of HTTP/1.1."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    fields = {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}
    head = "".join(f"{name.replace('_', '-')}: {field}\r\n" for name, field in fields.items())
    return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + body


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """The URL of a server on the loopback."""
    writers: set[asyncio.StreamWriter] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().lower().split("\r\n")
                length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length"))
                request = {"head": lines, "body": json.loads(await reader.readexactly(length))}
                said = await handler(request, writer)
                if said is None:
                    break
                writer.write(said)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            writers.discard(writer)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/score"
    finally:
        server.close()
        for writer in list(writers):
            writer.close()
        await server.wait_closed()
