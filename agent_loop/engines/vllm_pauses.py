"""How a `VLLMEngine` stands still and goes on; who waits meanwhile."""

import asyncio
from collections.abc import Collection
from typing import Any, get_args

from agent_loop.engines.base import PauseMode
from agent_loop.engines.vllm_weights import WeightsOfVLLM
from agent_loop.errors import EngineError


class PausesOfVLLM(WeightsOfVLLM):
    """Pauses of a `VLLMEngine`, and the requests that it holds back."""

    def __init__(self) -> None:
        super().__init__()
        self._draining = False
        self._held: dict[str, asyncio.Future[bool]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stop sampling until `resume`; see `Engine.pause`. Control calls are carried out one after another."""
        if mode not in get_args(PauseMode):
            raise ValueError(f"unknown pause mode {mode!r}; known are {get_args(PauseMode)}")
        async with self._control:
            llm = self._alive()
            if self._asleep:
                raise EngineError("the engine sleeps; await wake_up() first")
            with self._translated():
                if mode == "wait":
                    await self._drain(llm)
                self._paused = True
                await llm.pause_generation(mode="abort" if mode == "abort" else "keep", clear_cache=False)

    async def _drain(self, llm: Any) -> None:
        """Let all requests in flight finish while new ones are held back.

        vLLM's own "wait" leaves those frozen that found no slot yet: whoever awaits them before `resume` waits for ever.
        """
        self._draining = True
        try:
            if self._paused:
                await llm.resume_generation()
                self._paused = False
            await self._idle.wait()
            # Before the held ones go in, else they would run.
            await llm.pause_generation(mode="keep", clear_cache=False)
        finally:
            self._draining = False
            self._release(list(self._held), True)

    async def resume(self) -> None:
        """Go on after `pause`."""
        async with self._control:
            llm = self._alive()
            if self._paused and not self._asleep:
                with self._translated():
                    await llm.resume_generation()
            self._paused = False

    async def _turn(self, request_id: str) -> bool:
        """Wait while the engine drains; False if the request was interrupted meanwhile."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._held[request_id] = turn
        try:
            return await turn
        finally:
            del self._held[request_id]

    def _release(self, request_ids: Collection[str], proceed: bool) -> None:
        for request_id in request_ids:
            if not self._held[request_id].done():
                self._held[request_id].set_result(proceed)
