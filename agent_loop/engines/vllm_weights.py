"""The weights of a `VLLMEngine`: put in force from folders, tensors and transfers, and given up for a while in its sleep."""

import asyncio
import tempfile
from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from agent_loop.engines.base import Engine, WeightSource, WeightTransfer
from agent_loop.engines.checkpoint import Checkpoint, check_fits, read_checkpoint, write_checkpoint
from agent_loop.engines.vllm_adapter import stop_engine, tied, to_its_end
from agent_loop.engines.vllm_transfer import WeightSyncClient, named_parameters
from agent_loop.errors import EngineDeadError, EngineError, RequestRefusedError, WeightUpdateError
from agent_loop.sampling import whole

_PARTS = ("weights", "kv_cache")

Scratch = tempfile.TemporaryDirectory[str]


class WeightsOfVLLM(Engine):
    """What `VLLMEngine` does with its weights. It changes them between two steps, with requests in flight frozen meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False
        self._control = asyncio.Lock()
        self._paused = False
        self._death: BaseException | None = None
        self._running: set[str] = set()
        self._model: Checkpoint | None = None
        self._weights: Checkpoint | None = None
        self._scratch: Scratch | None = None
        self._client: WeightSyncClient | None = None
        self._asleep: list[str] = []
        self._hollow = False

    @abstractmethod
    def _alive(self) -> Any:
        """The open `AsyncLLM`, or the error that says why there is none."""

    @abstractmethod
    def _translated(self) -> AbstractContextManager[None]:
        """vLLM's errors as ours."""

    # New weights

    async def _load_weights(self, source: WeightSource, version: int) -> None:
        """Swap the weights between two steps of the engine, with requests in flight frozen meanwhile.

        A path is read by the engine process; tensors are written to a temporary folder first. What does not fit the model is
        refused before the engine is touched. Cancelled, the old weights are loaded again from where they came. Where a load
        breaks off midway, or the old weights are gone, the engine is given up for dead.
        """
        async with self._exchange() as llm:
            new, scratch = await self._staged(source)
            async with self._frozen(llm):
                await self._swap(llm, new, version)
                self._note(version, new, scratch)
                await self._drop_caches(llm)

    async def _transfer_weights(self, transfer: WeightTransfer, version: int) -> None:
        async with self._exchange() as llm:
            client = self._check_transfer(transfer)
            async with self._frozen(llm):
                await self._sent(llm, transfer, client, version)

    @asynccontextmanager
    async def _exchange(self) -> AsyncIterator[Any]:
        """The engine, for one exchange of weights at a time."""
        async with self._control:
            llm = self._alive()
            if "weights" in self._asleep:
                raise EngineError("the engine sleeps; await wake_up(weights_only=True) first")
            with self._translated():
                yield llm

    @asynccontextmanager
    async def _frozen(self, llm: Any) -> AsyncIterator[None]:
        """Nothing is sampled meanwhile."""
        try:
            await llm.pause_generation(mode="keep", clear_cache=False)
            yield
        finally:
            if not self._paused and not self._asleep and not llm.errored:
                await llm.resume_generation()

    async def _drop_caches(self, llm: Any) -> None:
        # Without `recompute` it clears nothing while requests are in flight; the salts see to those.
        await llm.reset_prefix_cache(reset_running_requests=self.recompute, reset_connector=True)

    async def _staged(self, source: WeightSource) -> tuple[Checkpoint, Scratch | None]:
        """The new weights as a folder that fits the model, and the temporary folder if one was made."""
        if isinstance(source, str | Path):
            return await asyncio.to_thread(self._checked, Path(source)), None
        scratch = tempfile.TemporaryDirectory(prefix="millrace-weights-", ignore_cleanup_errors=True)
        await asyncio.to_thread(write_checkpoint, source, Path(scratch.name))
        return await asyncio.to_thread(self._checked, Path(scratch.name)), scratch

    def _checked(self, folder: Path) -> Checkpoint:
        new = read_checkpoint(folder)
        if self._model is not None:
            check_fits(new, self._model, tied=tied(self._alive().model_config))
        return new

    async def _swap(self, llm: Any, new: Checkpoint, version: int) -> None:
        try:
            await self._reload(llm, new, version)
        except asyncio.CancelledError:
            # The engine process goes on loading the new weights, and then answers to this.
            old = self._weights
            if old is None or not old.unchanged():
                await self._give_up(llm, "its loading was cancelled, and the folder of the old weights is gone or was written over")
            else:
                await self._reload(llm, old, self._version)
            raise

    async def _reload(self, llm: Any, weights: Checkpoint, version: int) -> None:
        try:
            await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights.folder)})
            await self._settle(llm, version)
        except Exception as error:
            if llm.errored:
                raise
            # vLLM fills layers in place, and one that is half filled cannot be loaded again.
            await self._give_up(llm, f"loading {weights.folder} broke off: {error}")
            raise EngineDeadError(str(self._death)) from error

    async def _settle(self, llm: Any, version: int) -> None:
        if tied(llm.model_config):
            await llm.collective_rpc("refresh_output_matrix")
        await llm.update_weight_version(str(version))

    async def _give_up(self, llm: Any, reason: str) -> None:
        """Count the engine as dead and stop it: better none than one with a mixture of weights.

        Requests in flight return the tokens they have, which the old weights sampled.
        """
        self._death = WeightUpdateError(f"the engine was given up, because its weights may be a mixture: {reason}")
        await llm.abort(list(self._running))
        await to_its_end(stop_engine, llm)

    def _note(self, version: int, new: Checkpoint | None, scratch: Scratch | None) -> None:
        """These weights are in force, and lie there; the temporary folder of those before is dropped."""
        self._version, self._hollow = version, False
        last, self._weights, self._scratch = self._scratch, new, scratch
        self._model = self._model or new
        if last is not None:
            last.cleanup()

    # Transfers

    def weight_sync_client(self) -> WeightSyncClient:
        """The engine's side of vLLM's weight transfer, for the trainer's: `trainer_init(..., client=engine.weight_sync_client())`.

        The engine must have been made with `weight_transfer_config={"backend": ...}`. The trainer's engine then is a source of weights:
        `await engine.update_weights(transfer, version)`.

        Raises:
            RequestRefusedError: the engine was made without.
            EngineClosedError, EngineDeadError: it is not open, or gone.
        """
        if self._alive().vllm_config.weight_transfer_config is None:
            raise RequestRefusedError(
                "the engine was made without weight_transfer_config; pass weight_transfer_config={'backend': 'nccl'}, or another back end"
            )
        self._client = self._client or WeightSyncClient(self._alive, asyncio.get_running_loop())
        return self._client

    def _check_transfer(self, transfer: WeightTransfer) -> WeightSyncClient:
        client = self.weight_sync_client()
        if getattr(transfer, "client", client) is not client:
            raise ValueError("the transfer was made for another engine; make it with client=engine.weight_sync_client() of this one")
        sent = named_parameters(transfer)
        if sent is not None and self._model is not None:
            check_fits(sent, self._model, tied=tied(self._alive().model_config))
        return client

    async def _sent(self, llm: Any, transfer: WeightTransfer, client: WeightSyncClient, version: int) -> None:
        """Let the transfer send, and stamp what it brought; a cancellation is raised when that is done."""
        settled = False

        def send() -> None:
            nonlocal settled
            transfer.send_weights()
            if not client.finished:
                raise ValueError("it returned before it had finished an update of this engine")
            client.call(lambda llm: self._settle(llm, version))
            settled = True
            client.call(self._drop_caches)

        client.begin()
        try:
            await to_its_end(send)
        except BaseException as error:
            if client.started and not settled:
                await self._fail_transfer(llm, error)
            raise
        finally:
            client.updating = False
            if settled:
                self._note(version, None, None)

    async def _fail_transfer(self, llm: Any, error: BaseException) -> None:
        if llm.errored:
            raise llm.dead_error from error
        await self._give_up(llm, f"its transfer broke off: {error}")
        if isinstance(error, Exception):
            raise EngineDeadError(str(self._death)) from error

    # Sleep

    async def sleep(self, level: int = 1) -> None:
        """See `Engine`. It needs the engine argument `enable_sleep_mode=True`, which vLLM has on GPUs only."""
        if whole("level", level) not in (1, 2):
            raise RequestRefusedError(f"level={level} is not known; 1 keeps the weights in main memory, 2 drops them")
        self._check_sleep()
        async with self._control:
            llm = self._alive()
            if not self._asleep:
                # Noted before it is asked: cancelled, the engine falls asleep all the same.
                self._asleep, self._hollow = list(_PARTS), self._hollow or level == 2
                with self._translated():
                    await llm.sleep(level=level, mode="abort")

    async def wake_up(self, *, weights_only: bool = False) -> None:
        """See `Engine`."""
        self._check_sleep()
        async with self._control:
            llm = self._alive()
            with self._translated():
                if "weights" in self._asleep:
                    await self._awake(llm, "weights")
                if self._asleep and not weights_only:
                    await self._filled(llm)
                    await self._awake(llm, "kv_cache")  # after which vLLM goes on
                    if self._paused:
                        await llm.pause_generation(mode="keep", clear_cache=False)

    def _check_sleep(self) -> None:
        if not self.capabilities.sleep:
            raise RequestRefusedError(
                "this engine cannot sleep: it was made without enable_sleep_mode=True, which vLLM takes on GPUs only; close it instead"
            )

    async def _awake(self, llm: Any, part: str) -> None:
        await llm.wake_up([part])
        self._asleep.remove(part)

    async def _filled(self, llm: Any) -> None:
        """Weights that were dropped are loaded again, from where they came."""
        if not self._hollow:
            return
        if self._weights is None or not self._weights.unchanged():
            reason = "its weights were dropped in its sleep, and where they came from is gone or was written over"
            await self._give_up(llm, f"{reason}; update_weights before the last wake_up brings others")
            raise EngineDeadError(str(self._death))
        await self._reload(llm, self._weights, self._version)
        self._hollow = False
