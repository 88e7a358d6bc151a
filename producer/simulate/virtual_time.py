"""An event loop whose clock jumps to the next timer when nothing is ready: hours pass in milliseconds, the same each time.

Time stands still while code runs, code of executors included: `run_in_executor` does its work at once, in the loop. What
else reaches the loop from outside (a thread of its own, a socket, a process) has no place on this clock: whether it comes
before or after a timer would depend on how busy the machine is. It is refused with `VirtualTimeError`.
"""

import asyncio
import selectors
import threading
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualTimeError(RuntimeError):
    """Something in virtual time waits for what happens outside of it."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop that begins at time 0 and never waits.

    Its errors end the run: `VirtualTimeError` where nothing is ready and no timer is set, so that all would wait for ever
    or for something outside, and where a thread, a file descriptor or a subprocess comes in from outside.
    """

    waits_for_threads = False
    """Asked by what else would start a thread: a `ReplayBuffer` refuses, a sync reward is called in the loop."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)
        self._clock.sealed = True
        self._own_thread = threading.get_ident()

    def time(self) -> float:
        """Seconds of virtual time since the loop was made."""
        return self._clock.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> "asyncio.Future[T]":  # type: ignore[override]
        """Do it now, in the loop: whoever asked is told in this turn. It must not wait for the loop."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except StopIteration as error:
            done.set_exception(RuntimeError(f"{func!r} raised {error!r}"))
        except Exception as error:  # noqa: BLE001 - raised again for the one who waits
            done.set_exception(error)
        return done

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        """As `call_soon`; from another thread it ends the run, since time may have gone on while that worked."""
        if threading.get_ident() != self._own_thread:
            self._clock.refused = VirtualTimeError(
                f"thread {threading.current_thread().name!r} reports {callback!r:.100} to a loop in virtual time, which does not wait "
                "for threads; do it in the loop (an async reward, an InlineReplayBuffer) or by run_in_executor"
            )
            raise self._clock.refused
        return super().call_soon_threadsafe(callback, *args, context=context)

    async def _make_subprocess_transport(self, *args: Any, **options: Any) -> Any:
        raise VirtualTimeError("a subprocess has no place in virtual time: the loop would not wait for it")


class _JumpingSelector(selectors.DefaultSelector):
    """Waits by setting the clock forward; looks at descriptors all the same, as Ctrl-C comes through one."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.sealed = False
        self.refused: VirtualTimeError | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self.sealed:
            raise VirtualTimeError(f"file descriptor {fileobj!r:.80} has no place in virtual time: the loop would not wait for it")
        key: selectors.SelectorKey = super().register(fileobj, events, data)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.refused is not None:
            refused, self.refused = self.refused, None
            raise refused
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not ready:
            if timeout is None:
                raise VirtualTimeError(
                    "everything waits, and no timer is set: for each other, or for something outside the loop (a thread, a socket, "
                    "a process), which is not waited for in virtual time"
                )
            self.now += max(0.0, timeout)
        return ready


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(debug=debug, loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
