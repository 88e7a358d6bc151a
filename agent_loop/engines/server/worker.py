"""What `VLLMServerEngine` adds to vLLM's workers: `--worker-extension-cls agent_loop.engines.server.worker.WorkerExtension`."""

from pathlib import Path
from typing import Any

from agent_loop.engines.vllm_worker import WorkerExtension as LocalExtension


class WorkerExtension(LocalExtension):
    """Answers to `collective_rpc`; needed on a CPU, and wherever servers may not see the folders of new weights."""

    vllm_config: Any

    def sees_images(self) -> bool:
        """Whether the model takes images."""
        return bool(self.vllm_config.model_config.is_multimodal_model)

    def can_sleep(self) -> bool:
        """Whether memory can be given up."""
        return bool(self.vllm_config.model_config.enable_sleep_mode)

    def sees_folder(self, folder: str) -> bool:
        """Whether this process finds the folder. vLLM would notice too late: it gives the old weights up before it looks."""
        return Path(folder).is_dir()
