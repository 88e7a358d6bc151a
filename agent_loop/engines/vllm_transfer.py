"""vLLM's weight transfer, from a trainer in this process: the engine's side of it, as blocking calls for the thread that sends."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from agent_loop.engines.base import WeightTransfer
from agent_loop.engines.checkpoint import Checkpoint

NEEDS_CUDA = ("nccl", "ipc", "sparse_nccl", "sharded_rdt", "nccl_m2n")
"""vLLM's own back ends."""


class WeightSyncClient:
    """What vLLM's trainer engines call `client`; made by `VLLMEngine.weight_sync_client`.

    Its methods block until the engine has answered, as those of vLLM's own clients do. So call them, and what calls them
    (`trainer_init`, `send_weights`), in a thread.

    An update is only let through inside `VLLMEngine.update_weights(transfer, version)`: weights that changed by another way would
    stamp their tokens with the old version.
    """

    def __init__(self, alive: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._alive, self._loop = alive, loop
        self.updating = False
        self.started = self.finished = False

    def begin(self) -> None:
        """An update may pass from now on; nothing of it has come yet."""
        self.updating, self.started, self.finished = True, False, False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the engine with the trainer."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self.call(lambda llm: llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect them."""
        self.call(lambda llm: llm.shutdown_weight_transfer_engine())

    def start_weight_update(self) -> None:
        """See vLLM's `VLLMWeightSyncClient`."""
        if not self.updating:
            raise RuntimeError("weights are sent outside an update; call `await engine.update_weights(transfer, version)` instead")
        self.started = True
        self.call(lambda llm: llm.start_weight_update())

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """See vLLM's `VLLMWeightSyncClient`."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self.call(lambda llm: llm.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See vLLM's `VLLMWeightSyncClient`. The version is that of `VLLMEngine.update_weights`, whatever is given here."""
        self.call(lambda llm: llm.finish_weight_update())
        self.finished = True

    def call(self, ask: Callable[[Any], Coroutine[Any, Any, Any]]) -> None:
        """Have `ask(llm)` run on the engine's event loop, and wait for it."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is self._loop:
            raise RuntimeError("this would block the engine's own event loop for ever; use `await asyncio.to_thread(...)`")
        asyncio.run_coroutine_threadsafe(self._answer(ask), self._loop).result()

    async def _answer(self, ask: Callable[[Any], Coroutine[Any, Any, Any]]) -> None:
        await ask(self._alive())


def named_parameters(transfer: WeightTransfer) -> Checkpoint | None:
    """What the transfer will bring, where a module says so at no cost; other sources may need all ranks of the trainer for that."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    source = getattr(transfer, "source", None)
    if not isinstance(source, ModuleSource):
        return None
    return Checkpoint(Path("the module that is sent"), {one.name: tuple(one.shape) for one in source.metadata()}, ())
