"""A worker that says of itself that it can sleep: on a CPU vLLM does all of it but for giving memory up."""

from agent_loop.engines.server.worker import WorkerExtension


class SleepingExtension(WorkerExtension):
    """For servers whose engine is to be sent to sleep by tests."""

    def can_sleep(self) -> bool:
        return True
