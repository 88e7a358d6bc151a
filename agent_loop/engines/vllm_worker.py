"""What `VLLMEngine` adds to vLLM's workers; runs in the engine's processes only."""

from typing import Any


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
