"""An event loop for tests whose clock jumps to the next timer when nothing is ready: hours pass in milliseconds, exactly."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For coroutines that wait for nothing outside the loop: no thread, no file."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._select: Callable[[float | None], Any] = self._selector.select  # type: ignore[attr-defined]
        self._selector.select = self._jump  # type: ignore[attr-defined]

    def _jump(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everything waits, and no timer is set"
        self._now += max(0.0, timeout)
        return self._select(0)

    def time(self) -> float:
        return self._now


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
