"""A process that checks: run as a script, by itself, it imports nothing of this project.

It reads lines of JSON and answers each with one. The first says what to import, and is answered with `{"ready": true}` or why
not; each further one is `{"id", "sample"}`, and is answered with `{"id", "score"}`, or `{"id", "error"}`. It writes to a
descriptor that the function does not know: what it prints goes nowhere.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

_PR_SET_PDEATHSIG = 1


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    order = json.loads(requests.readline())
    _die_with(order["parent"])
    sys.path[:] = order["path"]
    try:
        module, _, name = order["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}, no function")
        _bound_memory(order["memory"])
    except BaseException as error:  # noqa: BLE001 - told to the parent, which ends this process
        return _say(answers, {"error": _told(error)})
    _say(answers, {"ready": True})
    for line in requests:
        request = json.loads(line)
        _say(answers, {"id": request["id"], **_checked(function, request["sample"])})
    return None


def _checked(function: Any, sample: Any) -> dict[str, Any]:
    try:
        score = function(sample)
        return {"score": None if score is None else float(score)}
    except MemoryError:
        return {"error": "MemoryError: it wanted more than memory_mb", "spent": True}
    except BaseException as error:  # noqa: BLE001 - SystemExit too is an answer to this one request
        return {"error": _told(error)}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _say(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


def _die_with(parent: int) -> None:
    """A check that loops reads no end of its pipe: the kernel ends it when the parent was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that was said
            os._exit(1)


def _bound_memory(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # Address space beside what the module took: a library may reserve gigabytes that it never uses.
        with open("/proc/self/statm") as sizes:
            taken = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))


if __name__ == "__main__":
    main()
