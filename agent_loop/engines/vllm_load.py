"""How busy vLLM is, from the numbers that its scheduler sends along with each step."""

from typing import Any

from agent_loop.engines.base import EngineLoad


class LoadMonitor:
    """The newest load of each engine process. vLLM counts what it preempted among those that wait."""

    def __init__(self) -> None:
        self._loads: dict[int, EngineLoad] = {}

    def load(self) -> EngineLoad:
        """Of all processes together; nothing runs before their first step."""
        running, waiting = (sum(getattr(load, name) for load in self._loads.values()) for name in ("running", "waiting"))
        return EngineLoad(running, waiting)

    def record(self, engine: int, stats: Any) -> None:
        """Note what a step of an engine process says; None says nothing."""
        if stats is not None:
            self._loads[engine] = EngineLoad(stats.num_running_reqs, stats.num_waiting_reqs + stats.num_skipped_waiting_reqs)

    def stat_logger(self) -> Any:
        """A class for vLLM's `stat_loggers` that tells this monitor.

        It takes the place of vLLM's own logger for Prometheus, whose work at each step costs more than all else of this.
        """
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        monitor = self

        class Logger(PrometheusStatLogger):  # type: ignore[misc]  # vLLM is not typed
            def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
                """Registers no metrics."""

            def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
                monitor.record(engine_idx, scheduler_stats)

            def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
                """Nobody looks at it."""

            def record_admission_rejection(self, reason: str) -> None:
                """Whoever asked is told."""

            def log_engine_initialized(self) -> None:
                """Nothing to say."""

        return Logger


def without_iteration_stats(llm: Any) -> None:
    """Leave out what vLLM counts of each token, before its output handler starts: only the scheduler's numbers are looked at."""
    llm.log_stats = llm.output_processor.log_stats = False
