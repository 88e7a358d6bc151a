"""What `VLLMEngine` adds to vLLM's workers; runs in the engine's processes only."""

import os
import select
import signal
import threading
from typing import Any

OWNER = "MILLRACE_ENGINE_OWNER"
"""Environment variable with the id of the process that the engine belongs to."""


def end_with_owner() -> None:
    """End this process when the owner's ends, however that ends: vLLM alone would stay, with its memory, after a kill -9."""
    owner = int(os.environ.get(OWNER, os.getpid()))
    if owner == os.getpid() or not hasattr(os, "pidfd_open"):
        return
    try:
        handle = os.pidfd_open(owner)
    except OSError:
        return  # on another machine, as workers of an engine over several may be
    threading.Thread(target=_kill_after, args=(handle,), name="millrace-owner", daemon=True).start()


def _kill_after(handle: int) -> None:
    select.select([handle], [], [])
    os.kill(os.getpid(), signal.SIGKILL)  # the engine process ends when a worker does


end_with_owner()  # when vLLM imports its worker extension: the owner may be killed while the engine still starts


class WorkerExtension:
    """Mixed into the worker by vLLM's `worker_extension_cls`; its methods answer to `collective_rpc`."""

    model_runner: Any

    def refresh_output_matrix(self) -> None:
        """Make the output matrix anew from its weight, after a reload of a model with tied embeddings.

        On a CPU the layer computes with a packed copy. Where the matrix is the input embedding, a checkpoint does not name
        it, so that a reload passes it over: new layers would go on with the old output matrix, without a word.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)

    def mend_rows_without_adapter(self) -> None:
        """Have requests of the model itself answered by the model, beside requests of adapters in one batch.

        vLLM's operators for CPUs look up the adapter of such a row, which is -1, as the last one of the list. A further call does nothing.
        """
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            from vllm.lora.ops.torch_ops import lora_ops
            from vllm.lora.punica_wrapper import punica_cpu

            if not hasattr(lora_ops.bgmv_shrink, "mended"):
                # Under both names: what is called by the other operators, and by the layers.
                lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = _without_rows_of_none(lora_ops.bgmv_shrink)


def _without_rows_of_none(shrink: Any) -> Any:
    """vLLM's first product of an adapter, with nothing in the rows that have none; the second one makes nothing of that."""

    def bgmv_shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, output, indices, scaling)
        output[: len(indices)][indices < 0] = 0

    bgmv_shrink.mended = True  # type: ignore[attr-defined]  # it is told by this
    return bgmv_shrink
