"""`ProcessReward`: checks that compute much, hang or crash, in processes that are killed at the deadline."""

import asyncio
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent_loop.arguments import at_least, mapping, positive
from agent_loop.errors import RewardClosedError, RewardError, RewardTimeoutError
from agent_loop.rewards.wire import as_json
from buffer.codec import to_json
from buffer.rollout import RolloutState

_WORKER = Path(__file__).with_name("_worker.py")

_INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
"""Variables that a worker needs to find its libraries; others may hold secrets."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Libraries of numbers would start threads for all cores in each worker."""

_MOST_ANSWER = 1 << 16
"""Bytes of a worker's answer: a number, or an error of 1000 characters."""


class ProcessReward:
    """Asks a function in worker processes; a reward of one rollout, open while its `async with` lasts.

    A check that exceeds `timeout` (a loop in Python or in C), its memory, or dies, costs its rollout an error and its worker the
    life: it is killed with all processes of its group, and another is started when it is needed. So is one whose rollout is
    cancelled. Workers are ended with this process, a SIGKILL included.

    The function is imported in the worker, and is given plain data as JSON; nothing is pickled, in either direction. This is no
    sandbox: what it runs may read your files and use the network. Memory is bounded on Linux only.
    """

    own_deadlines = True
    """A check's time runs while it is checked, not while it waits for a worker: `reward_timeout` is of plain rewards."""

    def __init__(
        self,
        function: str,
        *,
        workers: int = 2,
        timeout: float = 5.0,
        start_timeout: float = 60.0,
        memory_mb: int = 1024,
        max_checks: int = 1000,
        fields: Callable[[RolloutState], Any] = as_json,
        path: Sequence[str | Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Say which function.

        Args:
            function: "package.module:name" of a function that is given a mapping and gives a number, or None: no say. The mapping has
                `prompt`, `messages`, `text`, `response_ids`, `finish_reason` and `row`, unless `fields` says otherwise.
            workers: processes, and thus checks at once; more wait, and their time does not run meanwhile.
            timeout: seconds for one check.
            start_timeout: seconds to start a worker and import the function's module.
            memory_mb: megabytes (2**20 bytes) of address space that a check may take beside what the module took, and likewise each
                process that it starts.
            max_checks: of one worker, then another is started; 1 gives each check a process of its own, which costs some 0.1 s.
            fields: what of a rollout is sent, JSON-able.
            path: folders to import from, before those of this process.
            environment: variables for the workers, beside PATH, LANG, LC_ALL, TMPDIR and LD_LIBRARY_PATH; others are not inherited.

        Raises:
            ValueError: a bound is crossed, or `function` is no such name.
        """
        if not isinstance(function, str) or not re.fullmatch(r"[\w.]+:\w+", function):
            raise ValueError(f'function={function!r:.80} must be text like "package.module:name", which a worker imports')
        for name, value in {"workers": workers, "memory_mb": memory_mb, "max_checks": max_checks}.items():
            at_least(name, value, 1)
        for name, seconds in {"timeout": timeout, "start_timeout": start_timeout}.items():
            positive(name, seconds)
        if not callable(fields):
            raise ValueError(f"fields={fields!r:.80} is no function; give one of a rollout whose answer JSON holds")
        if not isinstance(path, list | tuple) or not all(isinstance(folder, str | Path) for folder in path):
            raise ValueError(f"path={path!r:.80} must be a list of folders, also where it is one")
        if environment is not None:
            mapping("environment", environment, "names of variables to their values")
        self.__name__ = function
        self._timeout, self._start_timeout, self._max_checks, self._fields = timeout, start_timeout, max_checks, fields
        self._memory, self._path = memory_mb << 20, [str(Path(folder).resolve()) for folder in path]
        self._environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | _ONE_THREAD | dict(environment or {})
        self.at_once = workers
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._open = False

    async def __aenter__(self) -> Self:
        """Starts one worker.

        Raises:
            ValueError: the function cannot be imported; the message says why.
        """
        if self._open:
            raise RuntimeError("it is open already; open either the reward or the RewardSet that holds it, and one set only")
        self._ends, self._slots = await asyncio.TaskGroup().__aenter__(), asyncio.Semaphore(self.at_once)
        self._open = True
        try:
            self._idle.append(await self._started())
        except BaseException as error:
            await self.__aexit__(None, None, None)
            if isinstance(error, RewardError):
                raise ValueError(str(error)) from error
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open = False
        self._idle.clear()
        for worker in list(self._workers):
            self._end(worker)
        # Without the error of the block, which is not of these tasks and would come out wrapped.
        await self._ends.__aexit__(None, None, None)

    async def __call__(self, rollout: RolloutState) -> float | None:
        """What the function gives of the rollout.

        Raises:
            RewardTimeoutError: it took longer than `timeout`, and was killed.
            RewardError: it raised, died, wanted too much memory, or gave no finite number.
        """
        sample = to_json(self._fields(rollout), f"what is sent of rollout {rollout.rollout_id}")
        self._check_open()
        async with self._slots:
            self._check_open()
            worker = await self._idle_or_started()
            try:
                score = await self._checked(worker, sample)
            finally:
                if worker.fit and worker.checks < self._max_checks and self._open:
                    self._idle.append(worker)
                else:
                    self._end(worker)
        return score

    def _check_open(self) -> None:
        if not self._open:
            raise RewardClosedError("it is not open; use it, or the RewardSet that holds it, with `async with`")

    async def _checked(self, worker: "_Worker", sample: str) -> float | None:
        answer = await worker.ask(sample, self._timeout)
        if "error" in answer:
            raise RewardError(f"{self.__name__} raised {answer['error']!s:.1000}")
        score = answer.get("score")
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score)):
            raise RewardError(f"{self.__name__} gave {score!r:.100}; it must give a finite number, or None")
        return score

    async def _idle_or_started(self) -> "_Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            self._end(worker)
        return await self._started()

    async def _started(self) -> "_Worker":
        order = {"function": self.__name__, "memory": self._memory, "path": [*self._path, *sys.path], "parent": os.getpid()}
        worker = await _Worker.started(self._environment)
        if not self._open:
            worker.kill()
            await worker.gone()
            raise RewardClosedError("it was closed before it had an answer")
        self._workers.add(worker)
        try:
            answer = await worker.order(order, self._start_timeout)
            if answer.get("ready") is not True:
                raise RewardError(f"function={self.__name__!r} cannot be imported by a worker: {answer.get('error')!s:.1000}")
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: "_Worker") -> None:
        """Kill it now, and have it waited for: no zombie is left."""
        if worker in self._workers:
            self._workers.discard(worker)
            worker.kill()
            self._ends.create_task(worker.gone())


class _Worker:
    """One process; `fit` while it is between two checks and has kept to the protocol."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.fit = self._busy = False
        self.checks = 0

    @property
    def alive(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.returncode is None

    @classmethod
    async def started(cls, environment: Mapping[str, str]) -> "_Worker":
        # Isolated: its folder is not imported from, nor what the environment's PYTHON variables name. A session of its own is a
        # process group that can be killed as a whole.
        command = [sys.executable, "-I", str(_WORKER)]
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment, start_new_session=True, limit=_MOST_ANSWER
        )
        return cls(process)

    async def order(self, order: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to the first line."""
        return await self._exchange(json.dumps(order), timeout, "to start")

    async def ask(self, sample: str, timeout: float) -> dict[str, Any]:
        """The answer to one check."""
        self.checks += 1
        answer = await self._exchange(f'{{"id":{self.checks},"sample":{sample}}}', timeout, "to check")
        if answer.get("id") != self.checks:
            self.fit = False
            raise RewardError("the worker answered something else; it was killed")
        self.fit = not answer.get("spent")
        return answer

    async def _exchange(self, line: str, timeout: float, what: str) -> dict[str, Any]:
        """Send a line and read one; not fit until it has come as it should."""
        self.fit, self._busy = False, True
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout):
                self._process.stdin.write(line.encode() + b"\n")
                await self._process.stdin.drain()
                answer = await self._process.stdout.readline()
        except TimeoutError as error:
            raise RewardTimeoutError(f"it took longer than {timeout:g} s {what}, and was killed") from error
        except (OSError, ValueError) as error:  # its pipe broke, or its answer has no end
            raise RewardError(f"its worker died or answered nonsense ({error})") from error
        if not answer.endswith(b"\n"):
            raise RewardError(f"its worker died ({await self._cause(timeout)})")
        try:
            decoded = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"its worker answered {answer!r:.100}, which is no JSON") from error
        if not isinstance(decoded, dict):
            raise RewardError(f"its worker answered {answer!r:.100}, which is no mapping")
        self.fit, self._busy = True, False
        return decoded

    async def _cause(self, timeout: float) -> str:
        try:
            async with asyncio.timeout(timeout):
                status = await self._process.wait()
        except TimeoutError:
            return "it closed its pipe"
        return f"signal {signal.Signals(-status).name}; out of memory?" if status < 0 else f"exit status {status}"

    def kill(self) -> None:
        """It, and what it has started."""
        # Long after its end its number may be another's.
        if self.alive or self._busy:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def gone(self) -> None:
        """Wait for its end, which is near."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
