"""Processes that start in milliseconds and are killed by the hundred: each is forked from a server that has imported everything.

The server is a process without threads, so that its children can do whatever they like. A child reports by writing lines
to a pipe of its own: what it had written before it was killed is read after it.
"""

import asyncio
import ctypes
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]

Say = Callable[..., None]
"""`say(what, **more)`: one line of the ledger."""

Program = Callable[..., Coroutine[Any, Any, None]]
"""What a child does: a coroutine function that is given `say` and the arguments of `Zygote.start`."""


class Zygote:
    """Starts children that run `program` ("module:function"), one at a time; ends with its `with` block.

    `imports` are modules that the program imports late.
    """

    def __init__(self, program: str, *imports: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One thread each: a library's pool of threads would not live on in a forked child.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", "from tests.zygote import serve; serve()", str(theirs.fileno()), program, *imports]
        self._server = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._control.shutdown(socket.SHUT_WR)
        self._server.wait()
        self._control.close()

    def start(self, **arguments: Any) -> "Child":
        """A new process, given these arguments (JSON-able)."""
        reading, writing = os.pipe()
        socket.send_fds(self._control, [json.dumps(arguments).encode()], [writing])
        os.close(writing)
        answer, (process,), *_ = socket.recv_fds(self._control, 64, 1)
        assert answer == b"started", f"the server is gone: {answer!r}"
        return Child(self._control, process, os.fdopen(reading, "rb", buffering=0))


@dataclass(frozen=True)
class Moment:
    """When to kill: `delay` seconds after the `count`-th line (of those that say `what`, if it is given); 0 is the very start."""

    count: int
    delay: float
    what: str | None = None

    @classmethod
    def any(cls, chance: random.Random, *, at_start: float, lines: int, whats: list[str]) -> "Moment":
        """A quarter in the first `at_start` seconds, half after some of the next `lines` lines, the rest right at some kind of act."""
        # The delay is not for synchronisation: a kill at the very moment of a line would always hit the same statement.
        match chance.randrange(4):
            case 0:
                return cls(0, chance.random() * at_start)
            case 1:
                return cls(1, chance.random() * 0.001, chance.choice(whats))
            case _:
                return cls(chance.randint(1, lines), chance.random() * 0.001)


class Child:
    """A process of the zygote. `lines` are those read so far."""

    def __init__(self, control: socket.socket, process: int, pipe: Any) -> None:
        self._control, self._process, self._pipe, self._rest = control, process, pipe, b""
        self.lines: list[dict[str, Any]] = []

    def ended(self) -> list[dict[str, Any]]:
        """Let it run to its end; what it said."""
        self._end()
        return self.lines

    def killed(self, moment: Moment) -> bool:
        """Kill it then; False if it ended by itself before. `lines` holds all that it said afterwards."""
        left = moment.count
        while left > 0:
            fresh = self._read()
            if not fresh:
                break
            for line in fresh:
                left -= moment.what in (None, line["what"])
        wait_until = time.perf_counter() + moment.delay
        while time.perf_counter() < wait_until:  # a sleep would be too coarse for a fraction of a millisecond
            pass
        with suppress(ProcessLookupError):  # it ended by itself
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        return self._end() == -signal.SIGKILL

    def _read(self) -> list[dict[str, Any]]:
        """Lines that came; none at the end. One that was cut off by the kill was never said."""
        while read := self._pipe.read(2**16):
            *whole, self._rest = (self._rest + read).split(b"\n")
            if whole:
                fresh = [json.loads(line) for line in whole]
                self.lines += fresh
                return fresh
        return []

    def _end(self) -> int:
        while self._read():
            pass
        self._pipe.close()
        os.close(self._process)
        status = int(self._control.recv(64))
        assert status in (0, -signal.SIGKILL), f"exit {status}: " + (self.lines[-1].get("trace", "it said nothing") if self.lines else "")
        return status


_PR_SET_CHILD_SUBREAPER = 36


def serve() -> None:
    """The server: imports the program, then forks a child per request, and says how it ended."""
    module, _, name = sys.argv[2].partition(":")
    program: Program = getattr(importlib.import_module(module), name)
    for late in sys.argv[3:]:
        importlib.import_module(late)
    control = socket.socket(fileno=int(sys.argv[1]))
    # A dataloader's worker ends when its parent changes. One whose parent is killed before it looked has us, and ends after us.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    while True:
        request, ledgers, *_ = socket.recv_fds(control, 2**16, 1)
        if not request:
            return
        child = os.fork()
        if child == 0:
            control.close()
            os._exit(_live(program, ledgers[0], json.loads(request)))
        os.close(ledgers[0])
        process = os.pidfd_open(child)
        socket.send_fds(control, [b"started"], [process])
        os.close(process)
        _, status = os.waitpid(child, 0)
        control.send(str(os.waitstatus_to_exitcode(status)).encode())


def _live(program: Program, ledger: int, arguments: dict[str, Any]) -> int:
    # A dataloader's workers outlive a killed process for a while; the pipe must end with the process.
    os.register_at_fork(after_in_child=lambda: os.close(ledger))

    def say(what: str, **more: Any) -> None:
        os.write(ledger, (json.dumps({"what": what, **more}) + "\n").encode())

    try:
        asyncio.run(program(say, **arguments))
    except BaseException:  # noqa: BLE001 - told in the ledger, which is where somebody looks
        say("error", trace=traceback.format_exc()[-3000:])
        return 1
    return 0
