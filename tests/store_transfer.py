"""A back end for vLLM's weight transfer over torch's TCPStore: real tensors between two processes of a machine without a GPU.

`Extension` registers it in vLLM's workers, as any `worker_extension_cls` of a user may; `StoreTrainer` is the trainer's end.
"""

import io
import threading
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore
from vllm.distributed.weight_transfer.base import (
    ModuleSource,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from agent_loop.engines.vllm_worker import WorkerExtension

TIMEOUT = timedelta(seconds=60)


@dataclass
class StoreInit(WeightTransferInitInfo):
    port: int


@dataclass
class StoreUpdate(WeightTransferUpdateInfo):
    names: list[str]


class StoreEngine(WeightTransferEngine[StoreInit, StoreUpdate]):
    """The worker's end."""

    init_info_cls = StoreInit
    update_info_cls = StoreUpdate
    store: TCPStore

    def init_transfer_engine(self, init_info: StoreInit) -> None:
        self.store = TCPStore("127.0.0.1", init_info.port, is_master=False, timeout=TIMEOUT)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # vLLM's own waits for an accelerator then

    def receive_weights(self, update_info: StoreUpdate) -> None:
        for name in update_info.names:
            self.model.load_weights([(name, torch.load(io.BytesIO(self.store.get(name)), weights_only=True))])

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class Extension(WorkerExtension):
    """Millrace's, and the back end with it."""


if "store" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("store", StoreEngine)


class StoreTrainer(TrainerWeightTransferEngine[Any]):
    """The trainer's end; `fail_after` tensors it breaks off."""

    def __init__(self, model: torch.nn.Module, client: Any, fail_after: int | None = None) -> None:
        super().__init__(client=client, source=ModuleSource(model))
        self.store = TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
        self.fail_after = fail_after
        self.sending, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        client.init_weight_transfer_engine(asdict(StoreInit(self.store.port)))

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> "StoreTrainer":
        raise NotImplementedError("made by its constructor")

    def send_weights(self) -> None:
        assert self.source is not None
        self.client.start_weight_update()
        for number, (name, tensor) in enumerate(self.source):
            if number == self.fail_after:
                raise ConnectionError("the network is gone")
            whole = io.BytesIO()
            torch.save(tensor.detach().clone(), whole)
            self.store.set(name, whole.getvalue())
            self.client.update_weights(asdict(StoreUpdate([name])))
            self.sending.set()
            self.go_on.wait()
        self.client.finish_weight_update()
