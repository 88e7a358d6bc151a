"""What `VLLMServerEngine` adds to vLLM's workers: `--worker-extension-cls agent_loop.engines.server.worker.WorkerExtension`."""

from pathlib import Path

from agent_loop.engines.vllm_worker import WorkerExtension as LocalExtension


class WorkerExtension(LocalExtension):
    """Answers to `collective_rpc`; needed on a CPU, and wherever servers may not see the folders of new weights."""

    def sees_folder(self, folder: str) -> bool:
        """Whether this process finds the folder. vLLM would notice too late: it gives the old weights up before it looks."""
        return Path(folder).is_dir()
